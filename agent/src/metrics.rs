//! What the agent tells Prometheus, by domain.

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::TcpListener;

use crate::daemon::Agent;

/// Serves metrics for ever, or does nothing for ever where none are configured.
pub async fn serve(agent: Agent) -> anyhow::Result<()> {
    let Some(address) = agent.config.metrics_listen else {
        std::future::pending::<()>().await;
        return Ok(());
    };
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen for metrics on {address}"))?;
    vmdr_daemon::scrape::serve(listener, Arc::new(move || text(&agent))).await;
    Ok(())
}

/// The figures of one domain that are exported.
struct Sample {
    labels: String,
    values: [Option<f64>; FAMILIES.len()],
}

/// Name, type, help.
const FAMILIES: [(&str, &str, &str); 14] = [
    ("vmdr_protected", "gauge", "1 while epochs become durable."),
    ("vmdr_generation", "gauge", "Generation in which this host runs the guest."),
    ("vmdr_epoch", "gauge", "Newest epoch cut."),
    ("vmdr_durable_epoch", "gauge", "Newest epoch durable at the receiver."),
    ("vmdr_rpo_seconds", "gauge", "Age of the newest recovery point."),
    ("vmdr_rpo_worst_hour_seconds", "gauge", "Worst age of the newest recovery point in the last hour."),
    ("vmdr_pause_p50_seconds", "gauge", "Median pause of the cuts of the last minute."),
    ("vmdr_pause_p99_seconds", "gauge", "99th percentile of the pauses of the last minute."),
    ("vmdr_cuts_total", "counter", "Cuts made."),
    ("vmdr_paused_seconds_total", "counter", "Time the guest was paused by vmdr."),
    ("vmdr_sent_bytes_total", "counter", "Payload bytes sent to the receiver."),
    ("vmdr_sent_disk_bytes_total", "counter", "Bytes of disk content sent, before compression."),
    ("vmdr_pending_bytes", "gauge", "Bytes known to be dirty and not captured yet."),
    (
        "vmdr_agent_domain_lease_seconds",
        "gauge",
        "For how long the guest may run by its lease; automatic failover only.",
    ),
];

fn text(agent: &Agent) -> String {
    let samples: Vec<Sample> = agent
        .sessions()
        .values()
        .map(|session| {
            let status = session.shared.status();
            let figures = &status.figures;
            let labels =
                format!("domain=\"{}\",uuid=\"{}\"", escape(&session.protection.name), session.protection.uuid);
            let values = [
                Some(f64::from(status.shown_phase() == crate::session::Phase::Protected)),
                Some(status.generation as f64),
                Some(status.epoch as f64),
                Some(status.durable_epoch as f64),
                figures.rpo_seconds(),
                Some(figures.rpo_worst_seconds()),
                Some(figures.pause_seconds(0.5)),
                Some(figures.pause_seconds(0.99)),
                Some(figures.cuts_total as f64),
                Some(figures.paused_ns_total as f64 / 1e9),
                Some(figures.sent_bytes as f64),
                Some(figures.sent_disk_bytes as f64),
                Some(status.pending_bytes as f64),
                session.failover.as_ref().map(crate::failover::Failover::lease_seconds),
            ];
            Sample { labels, values }
        })
        .collect();
    let mut out = String::new();
    for (index, (name, kind, help)) in FAMILIES.iter().enumerate() {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for sample in &samples {
            if let Some(value) = sample.values[index] {
                let _ = writeln!(out, "{name}{{{}}} {value}", sample.labels);
            }
        }
    }
    out + &vmdr_daemon::host::metrics(&agent.trust)
}

/// A label's value: names of domains come from outside.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
