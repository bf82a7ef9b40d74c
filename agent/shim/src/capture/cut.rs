//! The two things that stop the guest: a pass (scan and protect, copy later) and the cut (the end of an epoch).
//!
//! ```text
//!   query-status, stop ........ ours only if the guest ran; drains and flushes all disks
//!   xen-save-devices-state      | meanwhile: scan all, protect what was found, copy it
//!   scan once more ............ what saving the devices wrote (little or nothing)
//!   take the disks' logs
//!   cont ...................... only because this cut stopped the guest
//!   query-block-jobs .......... every mirror ready and actively-synced, else no recovery point
//!   info ramblock ............. the blocks that were scanned, else no recovery point
//! ```
//!
//! All commands before `cont` are sent at once. Whatever fails, the guest is resumed, and pages that were
//! protected again stay pending.
//!
//! The last two are asked when the guest runs again and take no time from it. A cut rests on two looks, this one and that of
//! the cut before: a mirror that was synced then and is now, over the same connection, has been so in between, because
//! it falls behind only when its target fails a write, and then libvirt's mirrors end. RAM blocks that come or go change
//! the list; one that went and came back under its old name is not under watch any more, which the scan tells.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use rustix::fs::{SeekFrom, seek};
use serde_json::{Value, json};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::shim::{ArenaRange, NoPartReason, Part, Timing};

use super::{Capture, CaptureError, Copied, DEVICE_FD_SET, PREFAULT_BYTES, mirror_of};
use crate::dirty_log::Run;
use crate::qmp::{COMMAND_LIMIT, Command, QmpError, Sent};
use crate::ramblock;

/// How long a resumed guest's RESUME event is waited for, and a late answer to `stop`.
const LATE_LIMIT: Duration = Duration::from_secs(30);
/// How often a pause to end the mirrors in is tried.
const END_TRIES: usize = 3;
/// Arena bytes that device state and disk logs may take in a cut, beside pages.
const CUT_SPARE_BYTES: u64 = 4 << 20;

/// Why there is no recovery point. Nothing is lost: what was dirty still is.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct NoCut {
    /// For the program.
    pub reason: NoPartReason,
    /// For the operator.
    pub message: String,
    /// Of the pause, if there was one.
    pub timing: Timing,
}

impl NoCut {
    pub(super) fn new(reason: NoPartReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), timing: Timing::default() }
    }
}

/// What a pass found.
#[derive(Debug)]
pub struct Passed {
    /// Pages written since the last pass or cut.
    pub dirty_pages: u64,
    /// Pages that are in no part yet, these included.
    pub pending_pages: u64,
    /// Of the pause.
    pub timing: Timing,
}

/// What happened between `stop` and `cont`.
enum InPause<T> {
    Done(T),
    Not(NoCut),
}

impl Capture {
    /// A short pause: scan and protect again; what was found is pending.
    pub fn pass(&mut self) -> Result<Result<Passed, NoCut>, CaptureError> {
        self.ready_to_stop()?;
        if let Some(no) = self.storage_hangs()? {
            return Ok(Err(no));
        }
        let outcome = self.while_paused(
            false,
            [("human-monitor-command", Some(&ramblock_arguments()))],
            |this, [blocks], timing| {
                let blocks = this.qmp.wait(blocks, this.cut_left())?;
                this.follow(&blocks)?;
                let dirty_pages = this.scan_and_protect(timing)?.1;
                Ok(InPause::Done(dirty_pages))
            },
        )?;
        // What is pending stays so: nothing more to be done.
        self.resumed_by_others = false;
        let pending_pages = self.pending_pages();
        Ok(outcome.map(|(dirty_pages, timing)| Passed { dirty_pages, pending_pages, timing }))
    }

    /// Ends the epoch: a part with `last`, or the reason why not. `pages_max` of 0 is the configured limit.
    /// With `hold` the guest stays paused after a recovery point was made. A part without `last` is what was captured
    /// when it turned out afterwards that it is no recovery point; the epoch stays open.
    pub fn cut(&mut self, pages_max: u64, hold: bool) -> Result<Result<Part, NoCut>, CaptureError> {
        self.ready_to_stop()?;
        self.recover_taken();
        let pages_max = if pages_max == 0 { self.config.cut_pages_max } else { pages_max };
        if !self.mirrors_ready {
            let jobs = self.qmp.execute("query-block-jobs", None)?;
            if let Err(error) = self.check_mirrors(&jobs) {
                return Ok(Err(NoCut::new(NoPartReason::Mirror, format!("{error:#}"))));
            }
        }
        if self.block_list.is_empty() {
            let message = "the guest's RAM blocks have changed: a pass has to come first".to_owned();
            return Ok(Err(NoCut::new(NoPartReason::Pending, message)));
        }
        if let Some(no) = self.not_now(pages_max) {
            return Ok(Err(no));
        }
        if let Some(no) = self.storage_hangs()? {
            return Ok(Err(no));
        }
        self.renew_bitmaps();
        seek(&self.device_writer, SeekFrom::Start(0)).context("rewind the device state")?;
        let save = json!({ "filename": format!("/dev/fdset/{DEVICE_FD_SET}"), "live": false });
        let outcome = self.while_paused(hold, [("xen-save-devices-state", Some(&save))], |this, [save], timing| {
            let cut_unix_ns = unix_ns();
            // QEMU is writing device state; its answer has to be taken whatever happens.
            let copied = this.capture_memory(pages_max, timing);
            let started = Instant::now();
            let saved = this.qmp.wait(save, this.cut_left());
            timing.device_ns = nanos(started);
            let mut copied = match copied? {
                InPause::Done(copied) => copied,
                InPause::Not(no) => return Ok(InPause::Not(no)),
            };
            saved?;
            // Saving may have written to guest memory: a second, small look.
            let (runs, _) = this.scan_and_protect(timing)?;
            this.copy(&runs, &mut copied)?;
            this.ending.taking = true;
            for (index, disk) in this.disks.iter().enumerate() {
                copied.add_log(index, disk.take());
            }
            copied.part.cut_unix_ns = cut_unix_ns;
            // Writes of the last moment may have found the arena full.
            let behind = this.disks.iter().any(|disk| disk.remembered_bytes() > 0);
            Ok(InPause::Done((copied, behind)))
        })?;
        let ((mut copied, behind), timing) = match outcome {
            Ok(done) => done,
            Err(no) => return Ok(Err(no)),
        };
        let resumed = std::mem::take(&mut self.resumed_by_others);
        let finished = self.look().and_then(|standing| {
            let standing =
                if resumed { Err("somebody else has resumed the guest within the cut".to_owned()) } else { standing };
            if let Err(why) = &standing {
                tracing::info!(domain = self.config.domain_name, "no recovery point: {why}");
            }
            self.finish(&mut copied, timing)?;
            Ok(standing.is_ok() && !behind)
        });
        self.arena.prefault(copied.pages as usize * PAGE_BYTES + PREFAULT_BYTES);
        // Taken disk writes are in `copied` alone: an epoch that cannot be finished is a part all the same.
        let part = self.hold(copied, matches!(finished, Ok(true)));
        if self.held && !part.last {
            // Held, but not at a recovery point: that is not what was asked for.
            self.end_hold()?;
        }
        finished.map(|_| Ok(part))
    }

    /// Before the guest is stopped: what makes this cut pointless.
    fn not_now(&self, pages_max: u64) -> Option<NoCut> {
        if let Some((disk, _)) = self
            .disks
            .iter()
            .zip(&self.catch_up)
            .find(|(disk, catch_up)| disk.remembered_bytes() + catch_up.bytes() > 0)
        {
            let message = format!("disk {} is behind: written places are remembered without their data", disk.target());
            return Some(NoCut::new(NoPartReason::Pending, message));
        }
        let pending = self.pending_pages();
        if pending > pages_max {
            return Some(NoCut::new(
                NoPartReason::Pending,
                format!("{pending} pages are pending, {pages_max} may be copied in a pause"),
            ));
        }
        let need = pending * PAGE_BYTES as u64 + CUT_SPARE_BYTES;
        (self.arena.free_bytes() < need).then(|| {
            if self.unreleased.is_empty() {
                // No acknowledgement will make room: what is logged has to go out in parts.
                return NoCut::new(NoPartReason::Pending, "the arena is full of disk writes of the open epoch");
            }
            NoCut::new(NoPartReason::NoSpace, "the arena is full of parts that are not durable yet")
        })
    }

    fn ready_to_stop(&mut self) -> Result<(), CaptureError> {
        if self.log.is_none() {
            return Err(CaptureError::Refused("not armed".to_owned()));
        }
        if self.fenced {
            return Err(CaptureError::Refused("fenced: another site owns this guest".to_owned()));
        }
        let events = self.qmp.events()?;
        self.note(events);
        Ok(())
    }

    /// Stops the guest, runs `work`, resumes the guest. `commands` are sent together with `stop`; `work` gets them to
    /// wait for. Not at all if the guest was not running.
    #[allow(clippy::type_complexity)]
    fn while_paused<const N: usize, T>(
        &mut self,
        hold: bool,
        commands: [Command<'_>; N],
        work: impl FnOnce(&mut Self, [Sent; N], &mut Timing) -> Result<InPause<T>, CaptureError>,
    ) -> Result<Result<(T, Timing), NoCut>, CaptureError> {
        let mut timing = Timing::default();
        let limit = self.cut_limit();
        self.end_own_pause()?;
        if !self.may_run() || self.is_stopped() {
            return Ok(Err(not_permitted()));
        }
        if !self.was_running {
            let state = self.run_state()?;
            if state != "running" {
                return Ok(Err(not_running(&state)));
            }
        }
        let started = Instant::now();
        self.deadline = started + limit;
        self.page.set_paused(true);
        // All in QEMU's socket before it has worked on the first: none waits for a round trip.
        let [status, stop] = self.qmp.send([("query-status", None), ("stop", None)])?;
        let sent = self.qmp.send(commands)?;
        let status = match self.qmp.wait(status, self.cut_left()) {
            Ok(status) => status,
            Err(error) => return self.give_up(stop, error),
        };
        let state = status.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        match self.qmp.wait(stop, self.cut_left()) {
            Ok(_) => {}
            Err(error @ QmpError::Timeout { .. }) => {
                tracing::warn!(domain = self.config.domain_name, "stop: {error}");
                return self.resume_late();
            }
            Err(error) => return Err(error.into()),
        }
        timing.stop_ns = nanos(started);
        self.was_running = state == "running";
        self.page.set_standing(true);
        if !self.was_running {
            // A guest in S3 was stopped all the same, and goes back there; any other was not ours to stop.
            if state == "suspended" {
                self.resume()?;
            }
            self.page.set_paused(false);
            for sent in sent {
                match self.qmp.wait(sent, LATE_LIMIT) {
                    Err(error) if error.is_fatal() => return Err(error.into()),
                    _ => {}
                }
            }
            return Ok(Err(not_running(&state)));
        }
        let stopped = self.qmp.wait_event("STOP", Duration::ZERO)?;
        let done = work(self, sent, &mut timing);
        // Before `cont`, of which QEMU makes no event when the guest runs already.
        let others = self.qmp.wait_event("RESUME", Duration::ZERO);
        self.resumed_by_others = others.is_ok_and(|event| event.is_some());
        self.note_resumed();
        if hold && matches!(done, Ok(InPause::Done(_))) {
            // From now on the pause is the operator's: nobody resumes it unasked.
            self.held = true;
            self.page.set_paused(false);
            return Ok(match done? {
                InPause::Done(value) => Ok((value, timing)),
                InPause::Not(no) => Err(NoCut { timing, ..no }),
            });
        }
        let resuming = Instant::now();
        let resumed = self.resume();
        timing.resume_ns = nanos(resuming);
        let resumed = resumed?;
        // One is this cut's own. (Without events, a guest found running at `cont` is told by one more.)
        if self.qmp.wait_event("RESUME", Duration::ZERO)?.is_some() {
            self.resumed_by_others = true;
            self.note_resumed();
        }
        if let (Some(stop), Some(resume)) = (stopped, resumed) {
            timing.pause_ns = resume.saturating_sub(stop.at_us) * 1000;
        }
        Ok(match done? {
            InPause::Done(value) => Ok((value, timing)),
            InPause::Not(no) => Err(NoCut { timing, ..no }),
        })
    }

    /// Cancels the mirrors of the disks, in a pause: then no write is on its way through them.
    ///
    /// QEMU (10.0.2, `mirror_run` in block/mirror.c) frees the bitmap of a mirror that is cancelled or fails before it waits for the
    /// guest's writes in flight, each of which clears its bits in that bitmap when it is done: a guest that writes at that
    /// moment dies of a damaged heap, at once or later. Writes that begin once the job is cancelled do not touch it.
    pub fn end_mirrors(&mut self) -> Result<(), CaptureError> {
        let jobs = self.qmp.execute("query-block-jobs", None)?;
        let mirrors = self.disks.iter().filter_map(|disk| mirror_of(&jobs, disk.target()).ok()?["device"].as_str());
        let mirrors: Vec<Value> = mirrors.map(|id| json!({ "device": id, "force": true })).collect();
        if mirrors.is_empty() {
            return Ok(());
        }
        let cancel = |this: &mut Self| {
            for mirror in &mirrors {
                match this.qmp.execute("block-job-cancel", Some(mirror)) {
                    Err(error) if error.is_fatal() || matches!(error, QmpError::Timeout { .. }) => {
                        return Err(CaptureError::from(error));
                    }
                    // It has ended by itself.
                    Err(error) => tracing::info!(domain = this.config.domain_name, %mirror, "{error}"),
                    Ok(_) => {}
                }
            }
            Ok(())
        };
        if self.fenced || self.held {
            // It stands still, and is to stay so.
            return cancel(self);
        }
        let mut why = String::new();
        for _ in 0..END_TRIES {
            // Storage that hangs would hold the guest in its pause.
            let paused = match self.storage_hangs()? {
                Some(no) => Err(no),
                None => self.while_paused(false, [], |this, [], _| cancel(this).map(InPause::Done))?.map(drop),
            };
            match paused {
                Ok(()) => return Ok(()),
                Err(no) if no.reason == NoPartReason::NotRunning => return cancel(self),
                Err(no) if no.reason == NoPartReason::NotPermitted && self.page.standing() => return cancel(self),
                Err(no) => why = no.message,
            }
        }
        Err(CaptureError::Refused(format!("the mirrors were not ended: {why}")))
    }

    /// If somebody else let the guest run within the pause that has just ended, what was captured in it is of no
    /// single instant. It was also protected again while the guest ran, which a page that was just being written by
    /// DMA does not survive: all of it is captured again after the next pause, whatever becomes of this cut.
    fn note_resumed(&mut self) {
        if self.resumed_by_others {
            tracing::warn!(
                domain = self.config.domain_name,
                "somebody else has resumed the guest within a pause of vmdr's"
            );
            self.again = self.pending_runs(u64::MAX);
        }
    }

    /// An earlier cut has taken the disks' logs and lost them, because the guest could not be resumed then: what was in them
    /// is not known any more, so the disks are read as a whole.
    pub(super) fn recover_taken(&mut self) {
        if !std::mem::take(&mut self.ending.taking) {
            return;
        }
        tracing::warn!(
            domain = self.config.domain_name,
            "a cut that failed has lost disk writes: the disks are read again"
        );
        for (disk, catch_up) in self.disks.iter().zip(&mut self.catch_up) {
            disk.remember_everything();
            catch_up.forget();
        }
    }

    /// What a disturbed pause has left to do, as far as it is still part of the guest.
    fn capture_again(&mut self) {
        let mut again = std::mem::take(&mut self.again);
        if let Some(log) = self.log.as_ref().filter(|_| !again.is_empty()) {
            again.retain(|run| log.blocks()[run.block].present);
            self.add_pending(&again);
        }
    }

    /// Ends a hold.
    pub fn end_hold(&mut self) -> Result<(), CaptureError> {
        if self.fenced {
            return Err(CaptureError::Refused("fenced: another site owns this guest".to_owned()));
        }
        if !self.held {
            return Err(CaptureError::Refused("the guest is not held".to_owned()));
        }
        self.resume()?;
        self.held = false;
        Ok(())
    }

    /// Resumes the guest that this cut stopped; answers with the time of the RESUME event in microseconds. A guest that may
    /// not run stays as it is, and goes on when it may again.
    pub(super) fn resume(&mut self) -> Result<Option<u64>, CaptureError> {
        if !self.may_run() {
            self.stay_stopped();
            return Ok(None);
        }
        self.page.set_standing(false);
        let [cont] = self.qmp.send([("cont", None)])?;
        self.qmp.wait(cont, LATE_LIMIT)?;
        let resumed = self.qmp.wait_event("RESUME", Duration::ZERO)?.map(|event| event.at_us);
        self.look_after_cont()?;
        self.page.set_paused(false);
        Ok(resumed)
    }

    /// `stop` takes too long, storage hangs perhaps: queue `cont` behind it and end this cut.
    fn resume_late<T>(&mut self) -> Result<Result<T, NoCut>, CaptureError> {
        self.resume()?;
        Ok(Err(NoCut::new(
            NoPartReason::TimeLimit,
            format!("stopping the guest took more than {:?}: its storage is slow or hangs", self.cut_limit()),
        )))
    }

    fn give_up<T>(&mut self, stop: Sent, error: QmpError) -> Result<Result<T, NoCut>, CaptureError> {
        if error.is_fatal() {
            return Err(error.into());
        }
        tracing::warn!(domain = self.config.domain_name, "query-status before stop: {error}");
        // The monitor did not answer at all, so it is unknown whether the guest ran: find out from `stop`'s event.
        self.qmp.wait(stop, LATE_LIMIT)?;
        if self.qmp.wait_event("STOP", Duration::ZERO)?.is_some() {
            return self.resume_late();
        }
        self.page.set_paused(false);
        Ok(Err(NoCut::new(NoPartReason::NotRunning, "the guest was not running")))
    }

    fn run_state(&mut self) -> Result<String, CaptureError> {
        let status = self.qmp.execute("query-status", None)?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned())
    }

    /// Brings the watch in line with `info ramblock`'s answer.
    fn follow(&mut self, blocks: &Value) -> anyhow::Result<()> {
        let list = blocks.as_str().unwrap_or_default();
        let blocks = ramblock::parse(list).context("list RAM blocks")?;
        let log = self.log.as_mut().context("not armed")?;
        let mut fresh = Vec::new();
        let followed = log.follow(&blocks, &mut fresh);
        if !fresh.is_empty() {
            tracing::info!(domain = self.config.domain_name, "RAM blocks have changed");
            // Also when following failed half-way: what was protected has lost its old reports.
            self.add_pending(&fresh);
        }
        if followed.is_ok() {
            list.clone_into(&mut self.block_list);
        }
        followed
    }

    /// Whether what the cut rested on still holds, else why not.
    fn look(&mut self) -> Result<Result<(), String>, CaptureError> {
        let ramblock = ramblock_arguments();
        let [jobs, blocks] = self.qmp.send([("query-block-jobs", None), ("human-monitor-command", Some(&ramblock))])?;
        let jobs = self.qmp.wait(jobs, COMMAND_LIMIT);
        let blocks = self.qmp.wait(blocks, COMMAND_LIMIT);
        // Until the contrary is shown.
        let list = std::mem::take(&mut self.block_list);
        let before = self.mirror_sessions.clone();
        if let Err(error) = self.check_mirrors(&jobs?) {
            self.block_list = list;
            return Ok(Err(format!("{error:#}")));
        }
        if blocks?.as_str() != Some(&list) {
            return Ok(Err("the guest's RAM blocks have changed".to_owned()));
        }
        self.block_list = list;
        Ok(if before == self.mirror_sessions { Ok(()) } else { Err("a mirror has connected anew".to_owned()) })
    }

    /// Scans all blocks, remembers what was found as pending, and only then protects it.
    fn scan_and_protect(&mut self, timing: &mut Timing) -> anyhow::Result<(Vec<Run>, u64)> {
        let started = Instant::now();
        let mut runs = std::mem::take(&mut self.runs);
        let log = self.log.as_mut().context("not armed")?;
        if let Err(error) = log.scan(&mut runs) {
            // Perhaps a block is gone or was re-made: a pass finds out.
            self.block_list.clear();
            return Err(error);
        }
        timing.scan_ns += nanos(started);
        self.add_pending(&runs);
        self.capture_again();
        let started = Instant::now();
        let log = self.log.as_mut().context("not armed")?;
        let protected = log.protect(&mut runs);
        // Also what was written between scan and protection, and what was protected before a failure.
        self.add_pending(&runs);
        protected.context("protect guest memory again")?;
        timing.protect_ns += nanos(started);
        let pages = runs.iter().map(|run| run.pages).sum();
        Ok((runs, pages))
    }

    fn capture_memory(&mut self, pages_max: u64, timing: &mut Timing) -> Result<InPause<Copied>, CaptureError> {
        // The devices are being saved meanwhile.
        let _aside = self.placement.step_aside();
        self.runs = self.scan_and_protect(timing)?.0;
        let started = Instant::now();
        let pending = self.pending_pages();
        if pending > pages_max || pending * PAGE_BYTES as u64 + CUT_SPARE_BYTES > self.arena.free_bytes() {
            let message = format!("{pending} pages are dirty, more than may be copied in a pause");
            return Ok(InPause::Not(NoCut::new(NoPartReason::Pending, message)));
        }
        let runs = self.pending_runs(u64::MAX);
        let mut copied = Copied::default();
        self.copy(&runs, &mut copied)?;
        timing.copy_ns = nanos(started);
        Ok(InPause::Done(copied))
    }

    /// Whether all mirrors are in order.
    fn check_mirrors(&mut self, jobs: &Value) -> anyhow::Result<()> {
        self.mirrors_ready = false;
        let mut all_sessions = Vec::with_capacity(self.disks.len());
        for disk in &self.disks {
            let target = disk.target();
            let job = mirror_of(jobs, target)?;
            let is = |key: &str| job.get(key).and_then(Value::as_bool);
            let synced = is("actively-synced")
                .ok_or_else(|| anyhow!("QEMU does not tell whether mirrors are synced: 8.2 or later is needed"))?;
            if is("ready") != Some(true) || !synced {
                return Err(anyhow!("the mirror of disk {target} is not ready yet"));
            }
            let (sessions, connected) = disk.sessions();
            if connected != 1 {
                return Err(anyhow!("the mirror of disk {target} has {connected} connections (of {sessions} so far)"));
            }
            all_sessions.push(sessions);
        }
        self.mirrors_ready = true;
        self.ending.mirror_lost = false;
        self.mirror_sessions = all_sessions;
        Ok(())
    }

    /// What can be done after the guest runs again: device state into the arena, and the list of blocks.
    fn finish(&mut self, copied: &mut Copied, timing: Timing) -> anyhow::Result<()> {
        let pending: Vec<Run> = self.pending_runs(u64::MAX);
        self.remove_pending(&pending);
        let bytes = seek(&self.device_writer, SeekFrom::Current(0)).context("measure the device state")? as usize;
        let mut chunk = self.arena.take_contiguous(bytes).context("no room for the device state in the arena")?;
        self.device_memory.read_exact_at(&mut chunk.bytes_mut()[..bytes], 0).context("read the device state")?;
        copied.part.device_state = Some(ArenaRange { offset: chunk.offset(), length: bytes as u64 });
        copied.chunks.push(chunk);
        copied.part.timing = Some(timing);
        Ok(())
    }
}

fn not_running(state: &str) -> NoCut {
    let why = match state {
        "paused" => "somebody has paused it (`virsh resume` lets it go on)",
        "io-error" => "an I/O error of a disk has stopped it (`virsh domblkerror`; mend it, then `virsh resume`)",
        "internal-error" => "QEMU has met an internal error (see its log)",
        "guest-panicked" => "the guest has panicked",
        "shutdown" => "it has shut down, and QEMU was told to stay",
        "suspended" => "it sleeps",
        "inmigrate" | "postmigrate" | "finish-migrate" => "it is being migrated, or was",
        _ => "vmdr did not stop it",
    };
    NoCut::new(NoPartReason::NotRunning, format!("the guest is {state}, and vmdr did not stop it: {why}"))
}

fn not_permitted() -> NoCut {
    NoCut::new(
        NoPartReason::NotPermitted,
        "the guest may not run: its lease has ended, and the backup site has not said that it stands down",
    )
}

fn ramblock_arguments() -> Value {
    json!({ "command-line": "info ramblock" })
}

fn nanos(since: Instant) -> u64 {
    since.elapsed().as_nanos() as u64
}

fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}
