//! Prometheus metrics: counters that the rest of the daemon raises, and gauges that are read from the store when somebody
//! asks. Both become text here; [`vmdr_daemon::scrape`] serves it.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets of durations, in milliseconds: an fsync takes from under one to thousands.
const BUCKETS_MS: [u64; 12] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000];

/// How often and how long something took.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS_MS.len()],
    count: AtomicU64,
    sum_ns: AtomicU64,
}

impl Histogram {
    /// Counts one more.
    pub fn observe(&self, took: Duration) {
        let ms = took.as_nanos().div_ceil(1_000_000);
        if let Some(bucket) = BUCKETS_MS.iter().position(|bound| ms <= u128::from(*bound)) {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (bucket, bound) in self.buckets.iter().zip(BUCKETS_MS) {
            below += bucket.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{}\"}} {below}", bound as f64 / 1e3);
        }
        let count = self.count.load(Ordering::Relaxed).max(below);
        let sum = self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9;
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}");
    }
}

/// What the daemon counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Replication streams that were opened.
    pub streams_opened: AtomicU64,
    /// Replication streams that were refused, at the beginning or later.
    pub streams_refused: AtomicU64,
    /// Payload bytes of chunks.
    pub received_bytes: AtomicU64,
    /// Parts acknowledged as durable.
    pub durable_parts: AtomicU64,
    /// Epochs acknowledged as durable.
    pub durable_epochs: AtomicU64,
    /// From the end of a part to its acknowledgement.
    pub commit: Histogram,
    /// Activations that ended with a running guest.
    pub activations: AtomicU64,
    /// Activations that failed or were refused.
    pub activation_failures: AtomicU64,
    /// From the request to a running guest.
    pub activation: Histogram,
    /// Bytes that were read to verify points.
    pub verified_bytes: AtomicU64,
    /// Drills that have ended.
    pub drills: AtomicU64,
    /// Those that failed.
    pub drill_failures: AtomicU64,
}

/// How a domain's last drill went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DrillSample {
    /// When it ended, seconds since 1970.
    pub ended_seconds: f64,
    /// Whether it passed.
    pub passed: bool,
    /// What an activation would have taken; `None`: the copy never ran.
    pub rto_seconds: Option<f64>,
}

/// What the store says of one domain.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainSample {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The stored generation.
    pub generation: u64,
    /// The newest durable epoch.
    pub epoch: u64,
    /// Age of the newest recovery point; `None`: there is none.
    pub recovery_point_age_seconds: Option<f64>,
    /// Bytes it takes on the disk.
    pub stored_bytes: u64,
    /// Recovery points.
    pub points: u64,
    /// Bytes that older ones take, and may take.
    pub history_bytes: u64,
    /// See `history_bytes`.
    pub history_budget_bytes: u64,
    /// Older points will have to go, or have to already.
    pub history_alarm: bool,
    /// Points that are known to be damaged.
    pub damaged_points: u64,
    /// Something of the standby is damaged.
    pub damaged: bool,
    /// When a point was last found to be sound, seconds since 1970; `None`: never.
    pub verified_seconds: Option<f64>,
    /// Its last drill; `None`: there was none.
    pub drill: Option<DrillSample>,
    /// For how long nothing was heard of its agent; `None`: it is not waited for.
    pub silent_seconds: Option<f64>,
    /// That is too long.
    pub alarm: bool,
    /// It is taken when its host is silent and has no lease; `None`: its failover is not automatic.
    pub armed: Option<bool>,
    /// A stream is open.
    pub receiving: bool,
    /// It was activated here.
    pub active: bool,
}

/// The state at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// All domains.
    pub domains: Vec<DomainSample>,
    /// Bytes free on the state directory's file system.
    pub free_bytes: u64,
    /// The recovery plan: what of it does not fit this site, and when that was looked at, seconds since 1970.
    pub plan: Option<(u64, f64)>,
}

impl Metrics {
    /// Everything as Prometheus' text format.
    pub fn render(&self, sample: &Sample) -> String {
        let mut out = String::new();
        let version = env!("CARGO_PKG_VERSION");
        family(&mut out, "vmdr_receiver_info", "gauge", "Constant 1, with the version.");
        let _ = writeln!(out, "vmdr_receiver_info{{version=\"{version}\"}} 1");
        for (name, help, value) in [
            ("vmdr_receiver_streams_opened_total", "Replication streams opened.", &self.streams_opened),
            ("vmdr_receiver_streams_refused_total", "Replication streams refused.", &self.streams_refused),
            ("vmdr_receiver_received_bytes_total", "Payload bytes received.", &self.received_bytes),
            ("vmdr_receiver_durable_parts_total", "Parts acknowledged as durable.", &self.durable_parts),
            ("vmdr_receiver_durable_epochs_total", "Epochs acknowledged as durable.", &self.durable_epochs),
            ("vmdr_receiver_activations_total", "Activations that ended with a running guest.", &self.activations),
            ("vmdr_receiver_verified_bytes_total", "Bytes read to verify recovery points.", &self.verified_bytes),
            ("vmdr_receiver_activation_failures_total", "Activations that failed.", &self.activation_failures),
            ("vmdr_receiver_drills_total", "Drills that have ended.", &self.drills),
            ("vmdr_receiver_drill_failures_total", "Drills that failed.", &self.drill_failures),
        ] {
            family(&mut out, name, "counter", help);
            let _ = writeln!(out, "{name} {}", value.load(Ordering::Relaxed));
        }
        let commit = "From the end of a part to its acknowledgement.";
        self.commit.write(&mut out, "vmdr_receiver_commit_seconds", commit);
        let activation = "From the request to a running guest.";
        self.activation.write(&mut out, "vmdr_receiver_activation_seconds", activation);
        family(&mut out, "vmdr_receiver_state_free_bytes", "gauge", "Free bytes where the state directory is.");
        let _ = writeln!(out, "vmdr_receiver_state_free_bytes {}", sample.free_bytes);
        if let Some((findings, checked)) = sample.plan {
            let (name, help) = ("vmdr_receiver_plan_findings", "What of the recovery plan does not fit this site.");
            family(&mut out, name, "gauge", help);
            let _ = writeln!(out, "{name} {findings}");
            let (name, help) = ("vmdr_receiver_plan_checked_timestamp_seconds", "When that was last looked at.");
            family(&mut out, name, "gauge", help);
            let _ = writeln!(out, "{name} {checked}");
        }
        type Value = fn(&DomainSample) -> Option<f64>;
        let gauges: [(&str, &str, Value); 19] = [
            ("vmdr_receiver_domain_generation", "Stored generation.", |d| Some(d.generation as f64)),
            ("vmdr_receiver_domain_durable_epoch", "Newest durable epoch.", |d| Some(d.epoch as f64)),
            ("vmdr_receiver_domain_recovery_point_age_seconds", "Age of the newest recovery point.", |d| {
                d.recovery_point_age_seconds
            }),
            ("vmdr_receiver_domain_stored_bytes", "Bytes on disk.", |d| Some(d.stored_bytes as f64)),
            ("vmdr_receiver_domain_points", "Recovery points.", |d| Some(d.points as f64)),
            ("vmdr_receiver_domain_history_bytes", "Bytes of older points.", |d| Some(d.history_bytes as f64)),
            ("vmdr_receiver_domain_history_budget_bytes", "Bytes that older points may take.", |d| {
                Some(d.history_budget_bytes as f64)
            }),
            ("vmdr_receiver_domain_history_alarm", "1 while older points will have to go for want of room.", |d| {
                Some(f64::from(d.history_alarm))
            }),
            ("vmdr_receiver_domain_damaged_points", "Recovery points known to be damaged.", |d| {
                Some(d.damaged_points as f64)
            }),
            ("vmdr_receiver_domain_standby_damaged", "1 while something of the standby is damaged.", |d| {
                Some(f64::from(d.damaged))
            }),
            ("vmdr_receiver_domain_verified_timestamp_seconds", "When a point was last found to be sound.", |d| {
                d.verified_seconds
            }),
            ("vmdr_receiver_domain_drill_timestamp_seconds", "When the last drill ended.", |d| {
                d.drill.map(|drill| drill.ended_seconds)
            }),
            ("vmdr_receiver_domain_drill_passed", "1 if the last drill passed.", |d| {
                d.drill.map(|drill| f64::from(drill.passed))
            }),
            ("vmdr_receiver_domain_drill_rto_seconds", "RTO that the last drill found.", |d| {
                d.drill.and_then(|drill| drill.rto_seconds)
            }),
            ("vmdr_receiver_domain_silent_seconds", "Since its agent was heard last.", |d| d.silent_seconds),
            ("vmdr_receiver_domain_alarm", "1 while nothing was heard of its agent for too long.", |d| {
                Some(f64::from(d.alarm))
            }),
            (
                "vmdr_receiver_domain_failover_armed",
                "1 while it is taken when its host is lost, 0 while it is not.",
                |d| d.armed.map(f64::from),
            ),
            ("vmdr_receiver_domain_receiving", "1 while a stream is open.", |d| Some(f64::from(d.receiving))),
            ("vmdr_receiver_domain_active", "1 once it was activated here.", |d| Some(f64::from(d.active))),
        ];
        for (name, help, value) in gauges {
            family(&mut out, name, "gauge", help);
            for domain in &sample.domains {
                if let Some(value) = value(domain) {
                    let (label, uuid) = (escape(&domain.name), &domain.uuid);
                    let _ = writeln!(out, "{name}{{domain=\"{label}\",uuid=\"{uuid}\"}} {value}");
                }
            }
        }
        out
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A label's value: names of domains come from outside.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        let domain = DomainSample {
            name: "we\"b\\1\n".to_owned(),
            uuid: "u".to_owned(),
            generation: 2,
            epoch: 9,
            recovery_point_age_seconds: Some(0.25),
            stored_bytes: 77,
            points: 12,
            history_bytes: 34,
            history_budget_bytes: 56,
            history_alarm: true,
            damaged_points: 3,
            damaged: true,
            verified_seconds: None,
            drill: Some(DrillSample { ended_seconds: 1.5, passed: true, rto_seconds: None }),
            silent_seconds: Some(1.5),
            alarm: true,
            armed: Some(true),
            receiving: true,
            active: false,
        };
        let none =
            DomainSample { name: "new".to_owned(), recovery_point_age_seconds: None, armed: None, ..domain.clone() };
        Sample { domains: vec![domain, none], free_bytes: 5, plan: Some((2, 1.5)) }
    }

    #[test]
    fn text_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.received_bytes.store(12, Ordering::Relaxed);
        for ms in [1, 3, 30_000] {
            metrics.commit.observe(Duration::from_millis(ms));
        }
        let text = metrics.render(&sample());
        for line in [
            "# TYPE vmdr_receiver_received_bytes_total counter",
            "vmdr_receiver_received_bytes_total 12",
            "vmdr_receiver_commit_seconds_bucket{le=\"0.001\"} 1",
            "vmdr_receiver_commit_seconds_bucket{le=\"0.005\"} 2",
            "vmdr_receiver_commit_seconds_bucket{le=\"5\"} 2",
            "vmdr_receiver_commit_seconds_bucket{le=\"+Inf\"} 3",
            "vmdr_receiver_commit_seconds_sum 30.004",
            "vmdr_receiver_commit_seconds_count 3",
            "vmdr_receiver_domain_recovery_point_age_seconds{domain=\"we\\\"b\\\\1\\n\",uuid=\"u\"} 0.25",
            "vmdr_receiver_domain_history_alarm{domain=\"new\",uuid=\"u\"} 1",
            "vmdr_receiver_domain_damaged_points{domain=\"new\",uuid=\"u\"} 3",
            "vmdr_receiver_state_free_bytes 5",
            "vmdr_receiver_plan_findings 2",
            "vmdr_receiver_plan_checked_timestamp_seconds 1.5",
            "vmdr_receiver_domain_durable_epoch{domain=\"new\",uuid=\"u\"} 9",
            "vmdr_receiver_domain_active{domain=\"new\",uuid=\"u\"} 0",
            "vmdr_receiver_domain_silent_seconds{domain=\"new\",uuid=\"u\"} 1.5",
            "vmdr_receiver_domain_alarm{domain=\"new\",uuid=\"u\"} 1",
            "vmdr_receiver_domain_failover_armed{domain=\"we\\\"b\\\\1\\n\",uuid=\"u\"} 1",
            "vmdr_receiver_domain_drill_passed{domain=\"new\",uuid=\"u\"} 1",
            "vmdr_receiver_domain_drill_timestamp_seconds{domain=\"new\",uuid=\"u\"} 1.5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("age_seconds{domain=\"new\""), "no recovery point has no age");
    }
}
