//! The recovery plan is compared with this site at the start and once a day, and whenever the file or the set of standbys is another
//! one than the last time: what does not fit is in `status`, in the metrics and in the log, long before the plan is needed.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use vmdr_proto::control::{PlanFinding, Severity};

use super::site::{self, Found};
use crate::activate::host::LocalHost;
use crate::daemon::Receiver;

/// How often it is looked at whatever happens.
const EVERY: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked whether something is another than it was.
const LOOK: Duration = Duration::from_secs(10);
/// Between two looks whether the receiver ends.
const PAUSE: Duration = Duration::from_millis(200);

/// What the last check has found.
#[derive(Debug, Default)]
pub struct Watched {
    last: Mutex<Option<Checked>>,
}

/// One check.
#[derive(Debug, Clone)]
pub struct Checked {
    /// When, in seconds since 1970.
    pub unix_seconds: f64,
    /// Everything.
    pub found: Vec<Found>,
}

impl Checked {
    /// Findings that refuse an activation.
    pub fn refusals(&self) -> usize {
        self.found.iter().filter(|f| f.finding.severity() == Severity::Refused).count()
    }

    /// What is wrong for a domain.
    fn of(&self, name: &str, uuid: &str) -> Vec<&PlanFinding> {
        let concerns = |f: &&Found| {
            let its = f.domain.is_empty() || f.domain == name || f.domain == uuid;
            its && f.finding.severity() == Severity::Refused
        };
        self.found.iter().filter(concerns).map(|f| &f.finding).collect()
    }
}

impl Watched {
    /// The last check, if there was one.
    pub fn last(&self) -> Option<Checked> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the operator should know of a domain: a sentence, empty if all is well.
    pub fn advice(&self, file: Option<&Path>, name: &str, uuid: &str) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(file), Some(last)) = (file, last.as_ref()) else { return String::new() };
        let found = last.of(name, uuid);
        let Some(first) = found.first() else { return String::new() };
        let file = file.display();
        let place = if first.line > 0 { format!(":{}:{}", first.line, first.column) } else { String::new() };
        let more = if found.len() > 1 { format!(", and {} more", found.len() - 1) } else { String::new() };
        format!(
            "the recovery plan does not fit this site ({file}{place}: {}{more}): `vmdr plan check {file}`",
            first.message
        )
    }
}

/// Starts the thread, if there is a plan. It ends with the receiver.
pub fn start(receiver: &Arc<Receiver>) -> io::Result<()> {
    if receiver.config.plan.is_none() {
        return Ok(());
    }
    let of = Arc::downgrade(receiver);
    std::thread::Builder::new().name("vmdr-plan".to_owned()).spawn(move || run(&of)).map(drop)
}

/// What makes a check worth while before its time.
type Seen = (Option<(SystemTime, u64)>, Vec<(String, bool)>);

fn seen(receiver: &Receiver, file: &Path) -> Seen {
    let metadata = std::fs::metadata(file).ok();
    let changed = metadata.and_then(|m| Some((m.modified().ok()?, m.len())));
    let mut domains: Vec<_> = receiver.store.domains().into_iter().map(|d| (d.uuid, d.position.epoch > 0)).collect();
    domains.sort();
    (changed, domains)
}

fn run(of: &Weak<Receiver>) {
    let mut last: Option<(Instant, Seen)> = None;
    let mut look = Instant::now();
    while let Some(receiver) = of.upgrade() {
        if receiver.is_ending() {
            return;
        }
        let Some(file) = receiver.config.plan.clone() else { return };
        if Instant::now() >= look {
            look = Instant::now() + LOOK;
            let now = seen(&receiver, &file);
            if last.as_ref().is_none_or(|(at, before)| at.elapsed() >= EVERY || *before != now) {
                // One that libvirt could not answer is tried again at the next look.
                last = check(&receiver, &file).then(|| (Instant::now(), now));
            }
        }
        drop(receiver);
        std::thread::sleep(PAUSE);
    }
}

fn check(receiver: &Receiver, file: &Path) -> bool {
    let found = match super::load(file) {
        Ok(plan) => {
            let checked = LocalHost::connect(&receiver.config.libvirt_uri)
                .and_then(|host| site::check(&plan, &site::standbys(receiver), &host));
            match checked {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "the recovery plan cannot be checked now");
                    return false;
                }
            }
        }
        Err(mistakes) => {
            let finding = |m: vmdr_plan::Mistake| PlanFinding {
                severity: Severity::Refused.into(),
                line: m.place.line,
                column: m.place.column,
                message: m.message,
            };
            mistakes.into_iter().map(|m| Found { domain: String::new(), finding: finding(m) }).collect()
        }
    };
    let shown = file.display();
    for Found { finding, .. } in &found {
        let PlanFinding { line, column, message, .. } = finding;
        match finding.severity() {
            Severity::Refused => tracing::error!("recovery plan: {shown}:{line}:{column}: {message}"),
            _ => tracing::warn!("recovery plan: {shown}:{line}:{column}: {message}"),
        }
    }
    if found.is_empty() {
        tracing::info!("the recovery plan {shown} fits this site");
    }
    let unix_seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let checked = Checked { unix_seconds, found };
    *receiver.watched.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(checked);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_told_what_concerns_it() {
        let found = |domain: &str, severity: Severity, line, message: &str| Found {
            domain: domain.to_owned(),
            finding: PlanFinding { severity: severity.into(), line, column: 7, message: message.to_owned() },
        };
        let watched = Watched::default();
        let file = Some(Path::new("/etc/vmdr/plan.toml"));
        assert_eq!(watched.advice(file, "web1", "u1"), "", "not looked at yet");
        let all = vec![
            found("", Severity::Refused, 2, "bridge br-dr is not on this host"),
            found("web1", Severity::Refused, 5, "web1 has no such NIC"),
            found("web1", Severity::Warning, 6, "it will be swapped out"),
            found("u2", Severity::Refused, 9, "db1 has no such disk"),
        ];
        let checked = Checked { unix_seconds: 1.0, found: all };
        assert_eq!(checked.refusals(), 3);
        *watched.last.lock().unwrap() = Some(checked);
        let advice = watched.advice(file, "web1", "u1");
        assert!(advice.contains("plan.toml:2:7: bridge br-dr") && advice.contains("and 1 more"), "{advice}");
        assert!(watched.advice(file, "db1", "u2").contains("and 1 more"));
        assert!(!watched.advice(file, "other", "u3").contains("more"));
        assert_eq!(watched.advice(None, "web1", "u1"), "");
    }
}
