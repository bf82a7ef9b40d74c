//! A drill, from its beginning to its end.
//!
//! ```text
//!  begin -- refuse -- copy the point -- make files -- bridges -- restore -- checks -- remove everything
//!    |                                                                        |
//!    book: what there will be                                                 or keep it
//! ```
//! What a drill makes is in the book before it is made. Whoever ends one removes all of it, in any order, and as often as
//! need be.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, setpriority_process};
use uuid::Uuid;
use vmdr_daemon::durable;
use vmdr_hypervisor::libvirt::DomainState;
use vmdr_hypervisor::xml::Element;

use super::checks::{self, Check, Subject};
use super::isolate::{Identity, isolate};
use super::net::{self, Probe};
use super::process::Process;
use super::record::{self, Book, Current, Outcome, Report};
use super::{Claim, DrillError, copy};
use crate::activate::host::{Host, LocalHost};
use crate::activate::memory::Memory;
use crate::activate::plan::{self, Plan};
use crate::activate::run::{make_files, unix_ns};
use crate::activate::{ActivateError, clear, files, findings};
use crate::daemon::Receiver;
use crate::store::{DomainSummary, PointId, PointReader, RecoveryPoint};

/// How long the copy may take from "libvirt has restored it" to running.
const RUNNING_WAIT_MAX: Duration = Duration::from_secs(120);
/// Between two questions to libvirt.
const POLL: Duration = Duration::from_millis(50);
/// How long an activation waits for the drill to be gone. Then it begins all the same.
pub const MAKE_WAY_MAX: Duration = Duration::from_secs(10);
/// The same for a hand-over: its guest is paused meanwhile.
pub const HAND_OVER_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long a drill that is ended may take to be gone.
const END_MAX: Duration = Duration::from_secs(50);
/// How much the copy gives way to everything else on this host: steps of nice(2).
const NICE: i32 = 10;
/// How long a QEMU may take to be gone after it was killed.
const KILL_MAX: Duration = Duration::from_secs(5);
/// As much of a domain's name is in that of its copy.
const NAME_CHARS_MAX: usize = 100;
/// Where libvirt keeps what its QEMUs say.
const QEMU_LOGS: &str = "/var/log/libvirt/qemu";
const SAVE_IMAGE: &str = "restore.save";

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Which point; nothing: the newest.
    pub point: Option<PointId>,
    /// Beside those that are always made.
    pub checks: Vec<Check>,
    /// How long the copy has to run.
    pub run: Duration,
    /// How long a check may take.
    pub limit: Duration,
    /// The copy shall run on.
    pub keep: bool,
    /// Nobody asked for it.
    pub scheduled: bool,
}

/// A drill that has begun: its domain has no other.
pub struct Drill {
    receiver: Arc<Receiver>,
    uuid: Uuid,
    name: String,
    claim: Claim,
    reader: Option<Arc<PointReader>>,
    current: Current,
    book: Book,
    asked: Asked,
}

impl Drill {
    /// Takes the domain's place and its point, or says why not. Nothing is made yet but the book's entry.
    pub fn begin(receiver: &Arc<Receiver>, summary: &DomainSummary, asked: Asked) -> Result<Self, DrillError> {
        let uuid = Uuid::parse_str(&summary.uuid).map_err(|e| DrillError::Refused(format!("{}: {e}", summary.uuid)))?;
        let name = &summary.name;
        let refused = |what: String| Err(DrillError::Refused(what));
        let claim = {
            let lock = receiver.activation_lock(uuid);
            let Ok(_no_activation) = lock.try_lock() else {
                return Err(DrillError::Stopped(format!("{name} is being activated or forgotten")));
            };
            if summary.frozen {
                return refused(format!("{name} was activated here: it is no rehearsal any more"));
            }
            receiver.drills.claim(uuid)
        };
        // An activation that comes from here on finds the claim, has it end, and waits only so long.
        let Some(claim) = claim else {
            return refused(format!("a drill of {name} is under way; `vmdr drill {name} --end` ends it"));
        };
        let directory = receiver.domain_directory(uuid);
        let mut book = Book::read(&directory)?;
        match &book.current {
            Some(kept) if kept.kept => {
                let copy = &kept.copy_name;
                return refused(format!("a drill of {name} is kept ({copy}); `vmdr drill {name} --end` ends it"));
            }
            Some(left) => {
                tear_down(receiver, &directory, left)?;
                let report = interrupted(left);
                book.close(report);
            }
            None => {}
        }
        let reader = Arc::new(receiver.store.read_point(&summary.uuid, asked.point)?);
        let id = record::new_id();
        let short: String = name.chars().map(|c| if c == '/' { '_' } else { c }).take(NAME_CHARS_MAX).collect();
        let report = Report {
            point: reader.id().to_string(),
            cut_unix_ns: reader.cut_unix_ns(),
            ..Report::begun(id.clone(), asked.scheduled, unix_ns(SystemTime::now()))
        };
        let copy_name = format!("{short}-drill-{id}");
        let sealed = Arc::clone(&reader).recovery_point().sealed;
        let clear_dir = receiver.config.encryption.clear_dir.as_ref().filter(|_| sealed);
        if let Some(dir) = clear_dir {
            clear::sweep_drills(dir, uuid).map_err(DrillError::io("remove what drills have left in", dir))?;
        }
        let clear = clear_dir.map(|dir| clear::drill(dir, uuid, &id));
        let copy_uuid = Uuid::new_v4();
        let current = Current { id, copy_name, copy_uuid, bridges: Vec::new(), qemu: None, clear, kept: false, report };
        claim.control.go_on()?;
        book.current = Some(current.clone());
        book.write(&directory)?;
        let (receiver, name) = (Arc::clone(receiver), name.clone());
        Ok(Drill { receiver, uuid, name, claim, reader: Some(reader), current, book, asked })
    }

    /// The drill as it stands.
    pub fn current(&self) -> &Current {
        &self.current
    }

    /// Rehearses, and removes everything, or keeps it as asked. `progress` is told each step when it begins.
    pub fn run(mut self, progress: &mut dyn FnMut(&str)) -> Current {
        let result = self.rehearse(progress);
        self.reader = None;
        let report = &mut self.current.report;
        let passed = report.checks.iter().all(|check| check.passed);
        (report.outcome, report.error) = match &result {
            Ok(()) if passed => (Outcome::Passed, String::new()),
            Ok(()) => (Outcome::Failed, String::new()),
            Err(DrillError::Stopped(why)) => (Outcome::Ended, why.clone()),
            Err(error) => (Outcome::Failed, error.to_string()),
        };
        report.ended_unix_ns = unix_ns(SystemTime::now());
        let directory = self.receiver.domain_directory(self.uuid);
        if self.asked.keep && result.is_ok() {
            self.current.kept = true;
            self.book.current = Some(self.current.clone());
        } else {
            progress("remove the copy");
            match tear_down(&self.receiver, &directory, &self.current) {
                Ok(()) => self.book.close(self.current.report.clone()),
                // The entry stays: it is tried again.
                Err(error) => {
                    tracing::error!(domain = self.name, drill = self.current.id, %error, "a drill is not removed yet");
                    self.book.current = Some(self.current.clone());
                }
            }
        }
        if let Err(error) = self.book.write(&directory) {
            tracing::error!(domain = self.name, drill = self.current.id, %error, "how a drill went is not noted");
        }
        let Report { outcome, rto_seconds, copied_bytes, error, .. } = &self.current.report;
        let (id, rto, outcome_word) = (&self.current.id, rto_seconds, outcome.word());
        tracing::info!(domain = self.name, drill = id, outcome = outcome_word, ?rto, copied_bytes, error, "drill");
        self.receiver.metrics.drills.fetch_add(1, Ordering::Relaxed);
        if *outcome == Outcome::Failed {
            self.receiver.metrics.drill_failures.fetch_add(1, Ordering::Relaxed);
        }
        self.current
    }

    fn directory(&self) -> PathBuf {
        if let Some(clear) = &self.current.clear {
            return clear.clone();
        }
        record::directory(&self.receiver.domain_directory(self.uuid)).join(&self.current.id)
    }

    fn note(&mut self) -> Result<(), DrillError> {
        self.book.current = Some(self.current.clone());
        Ok(self.book.write(&self.receiver.domain_directory(self.uuid))?)
    }

    fn rehearse(&mut self, progress: &mut dyn FnMut(&str)) -> Result<(), DrillError> {
        let receiver = Arc::clone(&self.receiver);
        let settings = receiver.settings(&self.name, self.uuid);
        let control = Arc::clone(&self.claim.control);
        let guard = || {
            control.go_on()?;
            room(&receiver)
        };
        progress("check this host");
        let host = LocalHost::connect(&receiver.config.libvirt_uri)?;
        let directory = self.directory();
        let attempt = directory.join("run");
        let identity = Identity {
            id: self.current.id.clone(),
            name: self.current.copy_name.clone(),
            uuid: self.current.copy_uuid,
        };
        let answered;
        let point = {
            let reader = self.reader.take().ok_or_else(|| DrillError::Stopped("it has no point".to_owned()))?;
            let standby = Arc::clone(&reader).recovery_point();
            let mut plan = plan::make(&standby, &attempt, &settings, &host)?;
            self.refuse(&plan, &host)?;
            let original = Element::parse(&standby.domain_xml);
            answered = checks::answered(&original.map_err(|error| ActivateError::DomainXml(error.to_string()))?);
            let isolated = isolate(&mut plan.transformed.restore, &identity).map_err(|what| {
                let what = what.join(", ");
                DrillError::Refused(format!("{} cannot be cut off from the outside: {what}", self.name))
            })?;
            self.current.bridges = isolated.bridges;
            // Before anything of it is there.
            self.note()?;
            let created = match &self.current.clear {
                Some(clear) => clear::create(clear),
                None => durable::create_directory(&directory),
            };
            created.map_err(DrillError::io("create", &directory))?;
            let clone = make_room(&receiver, &reader, &standby, &plan, &directory)?;
            progress("copy the recovery point");
            let begun = Instant::now();
            let id = self.uuid.to_string();
            let alarmed = receiver.store.strain(&id, false).is_some();
            let mut pace = Pace { due: None, per_second: receiver.config.drill.copy_bytes_per_second };
            let mut turn = |bytes: u64| {
                guard()?;
                // The point pins the history.
                if let Some(why) = receiver.store.strain(&id, alarmed) {
                    return Err(DrillError::Stopped(format!(
                        "its point keeps the history from being thinned out: {why}"
                    )));
                }
                control.rest(pace.rest(bytes))
            };
            let (point, cost) = copy::copy(&reader, &directory, clone, copy::BESIDE, &mut turn)?;
            self.current.report.copy_seconds = begun.elapsed().as_secs_f64();
            (self.current.report.copied_bytes, self.current.report.shared_bytes) =
                (cost.copied_bytes, cost.shared_bytes);
            point
        };

        // From here on it is what an activation does.
        let requested = Instant::now();
        progress("prepare disks and memory");
        let mut plan = plan::make(&point, &attempt, &settings, &host)?;
        let isolated = isolate(&mut plan.transformed.restore, &identity)
            .map_err(|what| DrillError::Refused(format!("it cannot be cut off: {}", what.join(", "))))?;
        let image = attempt.join(SAVE_IMAGE);
        let top = self.current.clear.as_deref().and_then(Path::parent).unwrap_or(&settings.state_directory);
        make_files(top, &attempt, &point, &plan, &image)?;
        guard()?;
        net::create(&self.current.bridges)?;
        let probe = Arc::new(Probe::start(&self.current.bridges)?);
        progress("restore the copy");
        let restored = match plan.memory {
            Memory::Off => host.boot(&plan.transformed.restore),
            _ => host.restore(&image),
        };
        restored.map_err(|error| {
            let said = host.qemu_complaints(&identity.name).map(|said| format!("; QEMU says: {said}"));
            DrillError::Refused(format!("libvirt does not run the copy: {error}{}", said.unwrap_or_default()))
        })?;
        self.wait_running(&host, &identity)?;
        self.current.report.rto_seconds = Some(requested.elapsed().as_secs_f64());
        let qemu = host.connection().domain_by_uuid(&identity.uuid).and_then(|domain| domain.qemu_pid());
        if let Ok(pid) = qemu {
            give_way(pid);
            self.current.qemu = i32::try_from(pid).ok().and_then(Process::of);
            self.note()?;
        }
        let environment = vec![
            ("VMDR_DRILL_ID", identity.id.clone()),
            ("VMDR_DRILL_DOMAIN", self.name.clone()),
            ("VMDR_DRILL_COPY", identity.name.clone()),
            ("VMDR_DRILL_POINT", self.current.report.point.clone()),
        ];
        let subject = Subject {
            connection: host.connection(),
            uuid: identity.uuid,
            environment,
            probe: &probe,
            macs: &isolated.macs,
            directory: &directory,
            control: &self.claim.control,
            answered: &answered,
            limit: self.asked.limit,
            run: self.asked.run,
            guard: &guard,
        };
        self.current.report.checks = subject.check(&self.asked.checks, progress)?;
        Ok(())
    }

    /// What would refuse an activation refuses its rehearsal, and so does what would be a risk for others here.
    fn refuse(&self, plan: &Plan, host: &LocalHost) -> Result<(), DrillError> {
        let mut reasons: Vec<String> =
            findings::refusals(&plan.findings).map(|f| format!("{}: {}; {}", f.subject, f.fact, f.remedy)).collect();
        let available = host.memory_available_bytes().unwrap_or(u64::MAX);
        if plan.domain.memory_bytes > available && reasons.is_empty() {
            reasons.push(format!(
                "memory: the copy may take {} MiB, this host has {} MiB left; stop something here, or add memory",
                plan.domain.memory_bytes >> 20,
                available >> 20
            ));
        }
        if reasons.is_empty() {
            return Ok(());
        }
        Err(DrillError::Refused(format!("{} cannot be activated here: {}", self.name, reasons.join(" | "))))
    }

    fn wait_running(&self, host: &LocalHost, identity: &Identity) -> Result<(), DrillError> {
        let deadline = Instant::now() + RUNNING_WAIT_MAX;
        loop {
            let state = host.guest(identity.uuid)?.map_or(DomainState::ShutOff, |guest| guest.state);
            match state {
                DomainState::Running | DomainState::Blocked => return Ok(()),
                DomainState::Paused if Instant::now() < deadline => {
                    room(&self.receiver)?;
                    self.claim.control.rest(POLL)?;
                }
                other => {
                    return Err(DrillError::Refused(format!("{} is {other} instead of running", identity.name)));
                }
            }
        }
    }
}

/// Rests so that no more than this is copied in a second.
struct Pace {
    due: Option<Instant>,
    per_second: u64,
}

impl Pace {
    fn rest(&mut self, bytes: u64) -> Duration {
        let now = Instant::now();
        // What was not used is not saved up.
        let due = self.due.map_or(now, |due| due.max(now));
        self.due = Some(due + Duration::from_secs_f64(bytes as f64 / self.per_second.max(1) as f64));
        due.saturating_duration_since(now)
    }
}

/// Whether a drill may go on here.
pub fn room(receiver: &Receiver) -> Result<(), DrillError> {
    if receiver.is_ending() {
        return Err(DrillError::Stopped("the receiver was ended".to_owned()));
    }
    let free = receiver.free_bytes().map_err(DrillError::io("look at", &receiver.config.state_dir))?;
    let floor = receiver.config.space_floor_bytes();
    if free < floor {
        return Err(DrillError::Space { needed_bytes: 0, free_bytes: free, reserve_bytes: floor });
    }
    Ok(())
}

/// Whether the copy fits; how the standby's images can be cloned, if they can.
fn make_room(
    receiver: &Receiver,
    reader: &PointReader,
    standby: &RecoveryPoint,
    plan: &Plan,
    directory: &Path,
) -> Result<Option<copy::Clone>, DrillError> {
    let images = standby.ram.iter().map(|block| &block.path).chain(standby.disks.iter().map(|disk| &disk.path));
    let clone = match images.into_iter().find(|path| path.exists()) {
        Some(image) if !standby.sealed => copy::can_clone(image, directory)?,
        _ => None,
    };
    let (cloned, copied) = copy::estimate(reader, standby)?;
    // What goes into the save image.
    let carried = standby.ram.iter().enumerate().filter(|(number, _)| plan.memory != Memory::Mapped(*number));
    let carried: u64 = carried.map(|(_, block)| block.used_bytes).sum();
    let needed = (if clone.is_some() { cloned } else { copied }).saturating_add(carried);
    let free = free_bytes(directory).map_err(DrillError::io("look at", directory))?;
    // Also where it lies elsewhere: that may be the same file system.
    let floor = receiver.config.space_floor_bytes();
    if free < needed.saturating_add(floor) {
        return Err(DrillError::Space { needed_bytes: needed, free_bytes: free, reserve_bytes: floor });
    }
    Ok(clone)
}

fn free_bytes(directory: &Path) -> std::io::Result<u64> {
    let space = rustix::fs::statvfs(directory)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// The copy takes processor time that nobody else wants.
fn give_way(pid: u32) {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
    // If memory gets scarce, the copy is the first to go.
    let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000");
    let threads = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for thread in threads.filter_map(Pid::from_raw) {
        // One that has ended needs no time.
        let _ = setpriority_process(Some(thread), NICE);
    }
}

/// Removes what there is of a drill. Done as far as it can be, whatever fails on the way.
fn tear_down(receiver: &Receiver, domain_directory: &Path, drill: &Current) -> Result<(), DrillError> {
    let domain = remove_domain(receiver, drill);
    let network = net::remove(&drill.bridges);
    // As long as QEMU may have them open its files stay.
    domain?;
    files::remove_directory(&record::directory(domain_directory).join(&drill.id)).map_err(ActivateError::from)?;
    if let Some(clear) = &drill.clear {
        files::remove_directory(clear).map_err(ActivateError::from)?;
    }
    // Made by libvirt, for this copy alone.
    let _ = std::fs::remove_file(Path::new(QEMU_LOGS).join(format!("{}.log", drill.copy_name)));
    Ok(network?)
}

/// By libvirt; where that fails, the process is ended without it.
fn remove_domain(receiver: &Receiver, drill: &Current) -> Result<(), DrillError> {
    let Err(error) = destroy(receiver, drill) else { return Ok(()) };
    let Some(qemu) = &drill.qemu else { return Err(error) };
    tracing::warn!(drill = drill.id, %error, pid = qemu.pid, "libvirt does not end a drill's copy: its QEMU is killed");
    qemu.kill(KILL_MAX)
        .map_err(DrillError::io("end the QEMU of the copy, of", Path::new(&format!("/proc/{}", qemu.pid))))
}

fn destroy(receiver: &Receiver, drill: &Current) -> Result<(), DrillError> {
    let host = LocalHost::connect(&receiver.config.libvirt_uri)?;
    let domain = match host.connection().domain_by_uuid(&drill.copy_uuid) {
        Err(error) if error.is_no_such_domain() => return Ok(()),
        found => found?,
    };
    match domain.destroy() {
        // It has ended by itself.
        Err(_) if host.guest(drill.copy_uuid)?.is_none() => Ok(()),
        other => Ok(other?),
    }
}

fn interrupted(left: &Current) -> Report {
    let mut report = left.report.clone();
    if report.outcome == Outcome::UnderWay {
        report.outcome = Outcome::Ended;
        report.error = "the receiver was ended in the middle of it".to_owned();
        report.ended_unix_ns = unix_ns(SystemTime::now());
    }
    report
}

/// Ends the drill of a domain, if there is one, and removes it. Returns how it went.
pub fn end(receiver: &Arc<Receiver>, uuid: Uuid, why: &str) -> Result<Option<Report>, DrillError> {
    let busy = || DrillError::Refused("the drill of it does not end; try again, or see the receiver's log".to_owned());
    let directory = receiver.domain_directory(uuid);
    let mut ended = false;
    let deadline = Instant::now() + END_MAX;
    let claim = loop {
        match (receiver.drills.of(uuid), receiver.drills.claim(uuid)) {
            (_, Some(claim)) => break claim,
            (Some(control), None) => {
                control.end(why);
                ended = true;
                if !control.wait(deadline.saturating_duration_since(Instant::now())) {
                    return Err(busy());
                }
            }
            (None, None) if Instant::now() > deadline => return Err(busy()),
            (None, None) => {}
        }
    };
    let mut book = Book::read(&directory)?;
    let Some(current) = book.current.clone() else {
        return Ok(book.reports.first().filter(|_| ended).cloned());
    };
    tear_down(receiver, &directory, &current)?;
    let report = interrupted(&current);
    book.close(report.clone());
    book.write(&directory)?;
    drop(claim);
    tracing::info!(domain = %uuid, drill = current.id, why, "a drill is ended and removed");
    Ok(Some(report))
}

/// What there is of a domain's drill: under way, kept, or left over.
fn is_there(receiver: &Receiver, uuid: Uuid) -> bool {
    let nothing = || matches!(Book::read(&receiver.domain_directory(uuid)), Ok(book) if book.current.is_none());
    receiver.drills.of(uuid).is_some() || !nothing()
}

/// An activation goes first: all drills here end, kept or not, and none begins by itself for a while. They are waited for, because
/// an activation looks how much memory there is; if they do not go within `limit`, it goes on.
pub fn make_way(receiver: &Arc<Receiver>, uuid: Uuid, limit: Duration, progress: &mut dyn FnMut(&str)) {
    let why = format!("{uuid} is activated");
    receiver.drills.pause();
    receiver.drills.end_all(&why);
    let mut all: Vec<Uuid> = receiver.store.uuids().iter().filter_map(|uuid| Uuid::parse_str(uuid).ok()).collect();
    all.retain(|of| is_there(receiver, *of));
    if all.is_empty() {
        return;
    }
    // Its own is the first to be removed.
    all.sort_by_key(|of| *of != uuid);
    progress(if all.first() == Some(&uuid) { "end the drill of it" } else { "end the drills of others" });
    let (done, is_done) = sync_channel(1);
    let of = Arc::clone(receiver);
    let spawned = std::thread::Builder::new().name("end-drills".to_owned()).spawn(move || {
        for domain in all {
            if let Err(error) = end(&of, domain, &why) {
                tracing::warn!(%domain, %error, "a drill is not removed yet");
            }
        }
        // Nobody waits any more: that was said already.
        let _ = done.send(());
    });
    if let Err(error) = spawned {
        tracing::warn!(domain = %uuid, %error, "drills are not ended");
        return;
    }
    if is_done.recv_timeout(limit).is_err() {
        tracing::warn!(domain = %uuid, "drills are still being removed; the activation goes on");
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::report;
    use super::*;

    #[test]
    fn no_more_is_copied_than_may_be() {
        let mut pace = Pace { due: None, per_second: 1 << 20 };
        assert_eq!(pace.rest(1 << 20), Duration::ZERO);
        let rest = pace.rest(1 << 20);
        assert!(rest > Duration::from_millis(900) && rest <= Duration::from_secs(1), "{rest:?}");
        assert!(pace.rest(1) > Duration::from_millis(1900));
    }

    #[test]
    fn what_was_interrupted_has_ended_and_what_was_kept_went_as_it_went() {
        let under_way = Report { outcome: Outcome::UnderWay, ended_unix_ns: 0, ..report("0a0b0c") };
        let current = |report: Report, kept| Current {
            id: report.id.clone(),
            copy_name: "x".to_owned(),
            copy_uuid: Uuid::from_u128(1),
            bridges: Vec::new(),
            qemu: None,
            clear: None,
            kept,
            report,
        };
        let ended = interrupted(&current(under_way, false));
        assert!(ended.outcome == Outcome::Ended && ended.ended_unix_ns > 0 && ended.error.contains("receiver"));
        assert_eq!(interrupted(&current(report("0a0b0c"), true)), report("0a0b0c"));
    }
}
