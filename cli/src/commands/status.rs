//! `status`: one table out of what both daemons of this host say.
//!
//! A host that can be failed back to runs both daemons, a protected host only the agent, a backup host only the
//! receiver: so a socket that is not there is no error while the other is. A socket that is there without an answer
//! is one, after what the other daemon says has been shown.

use vmdr_proto::control::{self, StatusRequest};

use super::{Out, group};
use crate::args::{Common, Domain};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::table::{Cell, Side, Table};
use crate::{json, text};

/// The longest name shown whole.
const NAME_COLUMNS: usize = 18;

/// States that last, and in which nothing happens: since when is worth a line.
const QUIET: [&str; 8] = ["suspended", "shut off", "crashed", "paused", "stopped", "held", "failed", "fenced"];

type Rows = Vec<(Daemon, control::DomainStatus)>;

/// Asks, merges, shows.
pub async fn status(common: &Common, out: Out, domain: Option<&Domain>) -> Result<(), Failure> {
    let daemons = client::there(common)?;
    let mut rows = Rows::new();
    let (mut unknown, mut silent) = (Vec::new(), Vec::new());
    // Both daemons know the same of their host.
    let mut notices = std::collections::BTreeSet::new();
    let mut groups = Vec::new();
    for daemon in daemons {
        let name = domain.map(|domain| domain.0.clone()).unwrap_or_default();
        match ask(common, daemon, name).await {
            Ok(reply) => {
                rows.extend(reply.domains.into_iter().map(|status| (daemon, status)));
                notices.extend(reply.notices);
                groups.extend(reply.groups);
            }
            Err(failure @ Failure::NotFound(_)) => unknown.push(failure),
            Err(failure) => silent.push((daemon, failure)),
        }
    }
    rows.sort_by(|(a, x), (b, y)| (&x.name, *a == Daemon::Receiver).cmp(&(&y.name, *b == Daemon::Receiver)));
    // Nobody answered, or nobody who did knows the domain: there is nothing to show.
    if rows.is_empty() && (domain.is_some() || unknown.is_empty() && !silent.is_empty()) {
        let missing = || {
            let name = domain.map(|domain| text::one_line(&domain.0)).unwrap_or_default();
            Failure::NotFound(format!("{name} is neither protected here nor stored here; `vmdr status` lists what is"))
        };
        return Err(match silent.into_iter().next() {
            Some((_, failure)) => failure,
            None => unknown.into_iter().next_back().unwrap_or_else(missing),
        });
    }
    out.result(
        "status",
        || json::Status {
            domains: rows.iter().map(|(daemon, status)| json::DomainStatus::new(*daemon, status)).collect(),
            unreachable: silent.iter().map(|(daemon, _)| daemon.to_string()).collect(),
            notices: notices.iter().cloned().collect(),
            groups: groups.iter().map(json::group::Group::from).collect(),
        },
        || {
            let warnings = notices.iter().map(|notice| text::wrapped("warning: ", &text::one_line(notice)));
            let groups = groups.iter().map(|report| group::line(out, report));
            table(out, &rows) + &groups.collect::<String>() + &warnings.collect::<String>()
        },
    )?;
    silent.into_iter().next().map_or(Ok(()), |(_, failure)| Err(failure))
}

async fn ask(common: &Common, daemon: Daemon, domain: String) -> Result<control::StatusReply, Failure> {
    let request = StatusRequest { domain };
    match daemon {
        Daemon::Agent => answer(daemon, "status", client::agent(common).await?.status(request)).await,
        Daemon::Receiver => answer(daemon, "status", client::receiver(common).await?.status(request)).await,
    }
}

fn table(out: Out, rows: &Rows) -> String {
    if rows.is_empty() {
        return "no domain is protected or stored on this host; `vmdr protect DOMAIN` protects one\n".to_owned();
    }
    let mut table = Table::new([
        ("DOMAIN", Side::Left),
        ("ROLE", Side::Left),
        ("STATE", Side::Left),
        ("EPOCH", Side::Right),
        ("RPO", Side::Right),
        ("WORST", Side::Right),
        ("PAUSE p50/p99", Side::Right),
        ("DIRTY", Side::Right),
        ("SENT", Side::Right),
        ("LINK", Side::Right),
    ]);
    for (daemon, status) in rows {
        let mut below = String::new();
        if status.since_unix_ns > 0 && QUIET.contains(&status.state.as_str()) {
            below.push_str(&format!("  since: {}\n", text::instant_short(status.since_unix_ns)));
        }
        let verify = status.verify.clone().unwrap_or_default();
        let sentences = [
            ("  verify: ", &verify.doing),
            ("  drill: ", &drill_text(status)),
            ("  limited by: ", &status.limited_by),
            ("  last error: ", &status.last_error),
            ("  no application-consistent point: ", &status.application_error),
            ("  ALARM: ", &status.silent),
            ("  failover: ", &failover_text(status)),
            ("  alarm: ", &status.alarm),
            ("  export: ", &status.export_error),
            ("  advice: ", &status.advice),
        ];
        for (label, sentence) in sentences {
            if !sentence.is_empty() {
                below.push_str(&text::wrapped(label, &text::one_line(sentence)));
            }
        }
        table.row(cells(*daemon, status), below);
    }
    table.render(out.style)
}

/// Whether the backup site takes the guest by itself; nothing where it never does.
fn failover_text(status: &control::DomainStatus) -> String {
    let Some(failover) = &status.failover else { return String::new() };
    let lease = if failover.lease_seconds > 0.0 {
        format!(", lease for {}", text::seconds(failover.lease_seconds))
    } else {
        String::new()
    };
    let stance = &failover.stance;
    format!("automatic, the backup site is {stance}{lease}; {}", failover.message)
        .replace("is unknown", "is not heard of")
}

/// How the last drill went; nothing where there was none.
fn drill_text(status: &control::DomainStatus) -> String {
    let Some(drill) = &status.drill else { return String::new() };
    let mut said = match drill.result.as_str() {
        "under way" => format!("under way since {}", text::seconds(drill.age_seconds)),
        result => format!("{result} {} ago", text::seconds(drill.age_seconds)),
    };
    if drill.rto_seconds > 0.0 {
        said.push_str(&format!(", RTO {}", text::seconds(drill.rto_seconds)));
    }
    if drill.kept {
        said.push_str(&format!("; its copy {} still runs", drill.copy_name));
    }
    let failed =
        drill.checks.iter().filter(|check| !check.passed).map(|check| format!("{}: {}", check.check, check.said));
    let why: Vec<String> = (!drill.error.is_empty()).then(|| drill.error.clone()).into_iter().chain(failed).collect();
    if why.is_empty() { said } else { format!("{said}: {}", why.join("; ")) }
}

fn cells(daemon: Daemon, status: &control::DomainStatus) -> [Cell; 10] {
    let none = || "-".to_owned();
    let rpo = |seconds: f64| if json::has_rpo(status) { text::seconds(seconds) } else { none() };
    let replicating = status.role != "active";
    let known = |value: f64, text: fn(f64) -> String| if replicating { text(value) } else { none() };
    // The agent counts what it cut; the receiver has only what is durable.
    let epoch = if daemon == Daemon::Receiver { status.epoch.max(status.durable_epoch) } else { status.epoch };
    let pause = if status.pause_p50_seconds > 0.0 {
        format!("{}/{} ms", text::milliseconds(status.pause_p50_seconds), text::milliseconds(status.pause_p99_seconds))
    } else {
        none()
    };
    let link = match known(status.link_bytes_per_second, text::bytes) {
        link if link == "-" => link,
        link => link + "/s",
    };
    [
        text::shortened(&text::one_line(&status.name), NAME_COLUMNS).into(),
        text::one_line(&status.role).into(),
        Cell::toned(text::one_line(&status.state), Tone::of_state(&status.state)),
        format!("{}-{epoch}", status.generation).into(),
        rpo(status.rpo_seconds).into(),
        rpo(status.rpo_worst_hour_seconds).into(),
        pause.into(),
        known(status.dirty_pages_per_epoch, text::count).into(),
        known(status.bytes_per_epoch, text::bytes).into(),
        link.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Output;
    use crate::style::Style;

    #[test]
    fn the_widest_rows_fit() {
        let status = control::DomainStatus {
            name: "a-name-that-is-far-too-long-for-any-table".into(),
            role: "protected".into(),
            state: "disconnected".into(),
            generation: 12,
            epoch: 87_654_321,
            durable_epoch: 87_654_320,
            rpo_seconds: 119.0 * 60.0,
            rpo_worst_hour_seconds: 119.0 * 60.0,
            pause_p50_seconds: 1.234,
            pause_p99_seconds: 12.345,
            dirty_pages_per_epoch: 99_999.0,
            bytes_per_epoch: 999.0 * 1024.0 * 1024.0,
            link_bytes_per_second: 999.0 * 1024.0 * 1024.0,
            last_error: "the receiver does not answer ".repeat(10),
            advice: "wait ".repeat(50),
            ..control::DomainStatus::default()
        };
        let text = table(Out { output: Output::Table, style: Style::plain() }, &vec![(Daemon::Agent, status)]);
        for line in text.lines() {
            assert!(line.chars().count() <= text::COLUMNS, "{} columns: {line}", line.chars().count());
        }
        assert!(text.contains("12-87654321"), "{text}");
    }
}
