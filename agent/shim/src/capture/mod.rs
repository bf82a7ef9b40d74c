//! The capture of one guest: owns its monitor, its dirty log, the logs of its disks and all parts that are not
//! durable yet.
//!
//! Watermarks: `released <= unreleased parts <= open epoch`. What is dirty is always in exactly one of these places,
//! so that nothing that changed is ever forgotten:
//!
//! ```text
//!   RAM    the kernel's page table --scan+protect--> pending --copy--> a held part --release--> (durable)
//!   disk   the open log / remembered --take-->  reading --read-->      a held part --release--> (durable)
//! ```
//!
//! A part is made of what was copied; only [`cut`](Capture::cut) makes one that completes its epoch.

pub mod bitmaps;
mod catch_up;
mod cut;
mod ending;
pub mod exports;
mod permitted;
mod placement;
mod storage;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::fs::{MemfdFlags, memfd_create};
use vmdr_proto::shim::{DiskOp, DiskOpKind, DiskState, Part, PartId, RamBlock, RamRun, State};
use vmdr_proto::{PAGE_BYTES, SHIM_VERSION};

use self::bitmaps::Bitmaps;
use self::catch_up::CatchUp;
use self::ending::Ending;
use self::placement::Placement;
use self::storage::Storage;
use crate::arena::{Arena, CHUNK_BYTES, Chunk};
use crate::bitmap::Bitmap;
use crate::config::Config;
use crate::dirty_log::{DirtyLog, Run};
use crate::disk::{Disk, Op, Taken};
use crate::inject::{self, Origin};
use crate::monitor::{Breaker, Monitor};
use crate::permission::{self, Permission};
use crate::qmp::{COMMAND_LIMIT, Event, QmpError};
use crate::ramblock;
use crate::rescue;
use crate::state_page::StatePage;

pub use self::cut::NoCut;

/// The fd set through which QEMU writes device state: far from the low numbers that libvirt hands out.
const DEVICE_FD_SET: u32 = 0x7642_4400;
const PAGES_PER_CHUNK: usize = CHUNK_BYTES / PAGE_BYTES;
/// Pages copied ahead of need is memory taken: this much is kept present beyond the last cut's size.
const PREFAULT_BYTES: usize = 8 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The request makes no sense now; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// There is no room now; it comes back as parts become durable.
    #[error("{0}")]
    NoSpace(String),
    /// Something went wrong; what was dirty is still known, and the request may be repeated.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
    /// QEMU is gone or cannot be talked to.
    #[error("the guest's monitor is lost: {0}")]
    MonitorLost(QmpError),
}

impl CaptureError {
    /// Whether this shim can do nothing more.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::MonitorLost(_))
    }
}

impl From<QmpError> for CaptureError {
    fn from(error: QmpError) -> Self {
        if error.is_fatal() { Self::MonitorLost(error) } else { Self::Failed(error.into()) }
    }
}

/// Whether an epoch begins with the whole guest: everything is dirty then, and what was captured before forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Only what is dirty.
    No,
    /// Its parts make a new standby.
    Seed,
    /// Its parts are differences to the standby that is there.
    Resync,
}

impl Whole {
    /// From the flags of a request.
    pub fn of(seed: bool, resync: bool) -> Self {
        match (seed, resync) {
            (true, _) => Self::Seed,
            (false, true) => Self::Resync,
            (false, false) => Self::No,
        }
    }
}

/// A part that is not durable yet, and the memory it lies in.
#[derive(Debug)]
struct Held {
    part: Part,
    /// Freed when the part is released.
    _chunks: Vec<Chunk>,
}

/// See the module.
pub struct Capture {
    config: Config,
    qmp: Monitor,
    page: Arc<StatePage>,
    /// Whether the guest may run; none: it always may.
    permission: Option<Arc<Permission>>,
    arena: Arena,
    disks: Vec<Arc<Disk>>,
    log: Option<DirtyLog>,
    /// Per block of the dirty log: pages that were reported and protected again, and are in no part yet.
    pending: Vec<Bitmap>,
    catch_up: Vec<CatchUp>,
    storage: Storage,
    /// QEMU's NBD server runs for us.
    nbd_server: bool,
    unreleased: VecDeque<Held>,
    generation: u64,
    epoch: u64,
    next_part: u32,
    seed: bool,
    fenced: bool,
    /// A cut has left the guest paused, as it was asked to.
    held: bool,
    last_event: String,
    ending: Ending,
    bitmaps: Bitmaps,
    /// Whether the guest ran when last looked at. If not, it is looked at before it is stopped.
    was_running: bool,
    /// When the cut that is under way has to be over.
    deadline: Instant,
    /// Whether the mirrors were in order when last looked at. If not, they are looked at before the guest is stopped.
    mirrors_ready: bool,
    /// The mirrors' NBD sessions then.
    mirror_sessions: Vec<u64>,
    /// QEMU's list of the blocks that are under watch; empty when they have to be looked at anew, in a pause.
    block_list: String,
    /// What QEMU writes device state into; the write-only descriptor shares its offset with QEMU's.
    device_memory: File,
    device_writer: OwnedFd,
    helper: PathBuf,
    placement: Placement,
    /// Reused between scans.
    runs: Vec<Run>,
    /// Somebody else has resumed the guest within the last pause.
    resumed_by_others: bool,
    /// To be captured again, from the next pause on.
    again: Vec<Run>,
}

impl Capture {
    /// Connects to the guest's monitor. Nothing of the guest is changed yet.
    pub fn new(
        config: Config,
        page: Arc<StatePage>,
        permission: Option<Arc<Permission>>,
        arena: Arena,
        disks: Vec<Arc<Disk>>,
    ) -> anyhow::Result<Self> {
        let mut qmp = Monitor::connect(&config.monitor, COMMAND_LIMIT)
            .with_context(|| format!("connect to QEMU's monitor ({:?})", config.monitor))?;
        let device_memory: File = memfd_create("vmdr-device-state", MemfdFlags::CLOEXEC)?.into();
        // QEMU takes a descriptor of a set only if its access mode is the one it wants to open.
        let device_writer: OwnedFd = File::options()
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(format!("/proc/self/fd/{}", device_memory.as_raw_fd()))
            .context("open the device state for writing")?
            .into();
        // A predecessor's descriptor may still be there; it is not there the first time.
        match qmp.execute("remove-fd", Some(&serde_json::json!({ "fdset-id": DEVICE_FD_SET }))) {
            Err(error) if error.is_fatal() => return Err(error.into()),
            _ => {}
        }
        qmp.add_fd(std::os::fd::AsFd::as_fd(&device_writer), DEVICE_FD_SET).context("pass a descriptor to QEMU")?;
        let catch_up = disks.iter().map(|_| CatchUp::default()).collect();
        let storage = Storage::new(disks.len());
        let helper = std::env::current_exe().context("find this program's own file")?;
        let bitmaps = Bitmaps::new(&config.protection);
        let placement = Placement::of(config.qemu_pid).context("find QEMU's main thread")?;
        Ok(Self {
            ending: Ending::default(),
            bitmaps,
            config,
            qmp,
            page,
            permission,
            arena,
            disks,
            log: None,
            pending: Vec::new(),
            catch_up,
            storage,
            nbd_server: false,
            unreleased: VecDeque::new(),
            generation: 0,
            epoch: 0,
            next_part: 0,
            seed: false,
            fenced: false,
            held: false,
            last_event: String::new(),
            was_running: false,
            deadline: Instant::now(),
            mirrors_ready: false,
            mirror_sessions: Vec::new(),
            block_list: String::new(),
            device_memory,
            device_writer,
            helper,
            placement,
            runs: Vec::new(),
            resumed_by_others: false,
            again: Vec::new(),
        })
    }

    /// Uses another program for the injection than this process's own file (which tests are not).
    pub fn with_helper(mut self, helper: PathBuf) -> Self {
        self.helper = helper;
        self
    }

    /// Opens `epoch`. The first time, memory is put under watch while the guest runs.
    pub fn arm(&mut self, generation: u64, epoch: u64, whole: Whole) -> Result<(), CaptureError> {
        if self.fenced {
            return Err(CaptureError::Refused("fenced: another site owns this guest".to_owned()));
        }
        if generation == 0 || epoch == 0 {
            return Err(CaptureError::Refused("generations and epochs count from 1".to_owned()));
        }
        if self.log.is_none() && whole == Whole::No {
            return Err(CaptureError::Refused("nothing was captured before: the first epoch is a seed".to_owned()));
        }
        let first_time = self.log.is_none();
        if first_time {
            let list = self.qmp.human("info ramblock")?;
            let blocks = ramblock::parse(&list).context("list RAM blocks")?;
            let (mut log, origin) = DirtyLog::open(self.config.qemu_pid, &self.helper)?;
            tracing::info!(domain = self.config.domain_name, ?origin, blocks = blocks.len(), "watching guest memory");
            let mut fresh = Vec::new();
            log.follow(&blocks, &mut fresh)?;
            self.block_list = list;
            self.log = Some(log);
            self.add_pending(&fresh);
            if origin == Origin::Adopted {
                tracing::debug!("the userfaultfd of a predecessor was found in QEMU and adopted");
            }
        } else if whole != Whole::No {
            let log = self.log.as_mut().context("no dirty log")?;
            let everything = log.everything().context("list populated pages")?;
            self.add_pending(&everything);
        }
        if whole == Whole::Resync {
            // What was never touched is zero, and has to replace what the standby has there.
            let log = self.log.as_ref().context("no dirty log")?;
            let all = log.whole_blocks();
            self.add_pending(&all);
        }
        if whole != Whole::No {
            // The first seed is brought by the mirrors themselves; afterwards, and where most is known already, the
            // disks are read.
            for (disk, catch_up) in self.disks.iter().zip(&mut self.catch_up) {
                if whole == Whole::Resync || !first_time {
                    disk.remember_everything();
                }
                catch_up.forget();
            }
            self.unreleased.clear();
        }
        self.generation = generation;
        self.epoch = epoch;
        self.next_part = 0;
        self.seed = whole == Whole::Seed;
        self.bitmaps.base_epoch = if whole == Whole::Resync { epoch - 1 } else { 0 };
        Ok(())
    }

    /// What ends the connection to QEMU from another thread.
    pub fn breaker(&self) -> std::io::Result<Option<Breaker>> {
        self.qmp.breaker()
    }

    /// This part and all before it are durable.
    pub fn release(&mut self, epoch: u64, part: u32) {
        while self.unreleased.front().is_some_and(|held| (held.part.epoch, held.part.part) <= (epoch, part)) {
            let part = self.unreleased.pop_front();
            if let Some(whole) = part.filter(|held| held.part.last) {
                self.bitmaps.durable_epoch = whole.part.epoch;
            }
        }
    }

    /// A part that is not released yet.
    pub fn resend(&self, epoch: u64, part: u32) -> Result<Part, CaptureError> {
        let found = self.unreleased.iter().find(|held| (held.part.epoch, held.part.part) == (epoch, part));
        found
            .map(|held| held.part.clone())
            .ok_or_else(|| CaptureError::Refused(format!("epoch {epoch} part {part} is not held")))
    }

    /// Copies pending pages and logged or remembered disk writes, at most about `bytes_max`, while the guest runs.
    pub fn fill(&mut self, bytes_max: u64) -> Result<Option<Part>, CaptureError> {
        self.recover_taken();
        let events = self.qmp.events()?;
        self.note(events);
        if self.arena.free_bytes() < self.arena.bytes() / 2 && !self.unreleased.is_empty() {
            return Err(CaptureError::NoSpace("half of the arena holds parts that are not durable".to_owned()));
        }
        let pages_max = bytes_max.min(self.arena.bytes() / 4).min(self.arena.free_bytes()) / PAGE_BYTES as u64;
        let mut copied = Copied::default();
        let runs = self.pending_runs(pages_max);
        self.copy(&runs, &mut copied)?;
        let left = (pages_max - copied.pages) * PAGE_BYTES as u64;
        let reading = self.read_disks(left, &mut copied);
        // Whatever was copied before a disk failed is in the part all the same.
        if copied.is_empty() {
            return reading.map(|()| None).map_err(CaptureError::from);
        }
        if let Err(error) = reading {
            tracing::warn!(domain = self.config.domain_name, "catching up: {error:#}");
        }
        self.remove_pending(&runs);
        Ok(Some(self.hold(copied, false)))
    }

    /// Stops the guest for good: another site owns it.
    pub fn fence(&mut self) -> Result<(), CaptureError> {
        self.fenced = true;
        self.held = false;
        if let Err(error) = self.qmp.execute("stop", None) {
            // One that does not run need not be stopped.
            return if error.is_fatal() && self.guest_gone() { Ok(()) } else { Err(error.into()) };
        }
        // The pause is no longer one that anybody may end.
        self.page.set_paused(false);
        self.page.set_standing(true);
        if let Some(permission) = &self.permission {
            permission.set_stopped(false);
        }
        tracing::error!(
            domain = self.config.domain_name,
            "fenced: another site owns this guest; it is paused and will not be resumed from here"
        );
        Ok(())
    }

    /// Ends a pause of ours, a hold, and the watch over the guest's memory. Whether the guest is known not to be left
    /// paused by us.
    pub fn detach(&mut self) -> bool {
        if self.held
            && let Err(error) = self.end_hold()
        {
            tracing::error!(domain = self.config.domain_name, "end the hold: {error}");
        }
        if self.ending.gone {
            // There is nobody to undo anything at.
            return true;
        }
        if let Some(mut log) = self.log.take() {
            log.unwatch();
            if let Err(error) = inject::unwatch(self.config.qemu_pid, &self.helper) {
                tracing::warn!(domain = self.config.domain_name, "{error:#}");
            }
        }
        self.close_exports();
        self.remove_bitmaps();
        let _ = self.qmp.execute("remove-fd", Some(&serde_json::json!({ "fdset-id": DEVICE_FD_SET })));
        if let Err(error) = self.end_own_pause() {
            tracing::warn!(domain = self.config.domain_name, "end the pause: {error}; trying a new connection");
            if let Err(error) =
                rescue::resume_if_left_paused(&self.page, self.permission.as_deref(), &self.config.monitor)
            {
                tracing::error!(domain = self.config.domain_name, "the guest may be left paused: {error}");
            }
        }
        !self.page.paused()
    }

    /// Where things stand, QEMU asked.
    pub fn state(&mut self) -> Result<State, CaptureError> {
        if self.ending.gone {
            return Ok(self.own_state());
        }
        let events = self.qmp.events()?;
        self.note(events);
        let status = self.qmp.execute("query-status", None)?;
        let run_state = status.get("status").and_then(serde_json::Value::as_str).unwrap_or("unknown").to_owned();
        Ok(State { run_state, ..self.own_state() })
    }

    /// Where things stand as far as this process knows: without the guest's run state.
    pub fn own_state(&self) -> State {
        let remembered: u64 = self
            .disks
            .iter()
            .zip(&self.catch_up)
            .map(|(disk, catch_up)| disk.remembered_bytes() + catch_up.bytes())
            .sum();
        State {
            protocol_version: SHIM_VERSION,
            pid: std::process::id(),
            arena_fd: self.arena.fd_number(),
            arena_bytes: self.arena.bytes(),
            generation: self.generation,
            epoch: self.epoch,
            next_part: self.next_part,
            seed: self.seed,
            pending_pages: self.pending_pages(),
            remembered_bytes: remembered,
            log_bytes: self.disks.iter().map(|disk| disk.log_bytes()).sum(),
            arena_free_bytes: self.arena.free_bytes(),
            unreleased: self
                .unreleased
                .iter()
                .map(|held| PartId { epoch: held.part.epoch, part: held.part.part, last: held.part.last })
                .collect(),
            armed: self.log.is_some() || self.ending.gone,
            fenced: self.fenced,
            run_state: String::new(),
            disks: self.disks.iter().map(|disk| disk_state(disk)).collect(),
            last_event: self.last_event.clone(),
            held: self.held,
            gone: self.ending.gone,
            gone_reason: self.ending.reason.clone(),
            may: self.permission.as_ref().map(|permission| permission::encode(permission.may())),
            stopped: self.is_stopped(),
        }
    }

    /// Looks at QEMU's events, so that a socket that nobody reads does not fill up, and ends a pause that could not be
    /// ended before.
    pub fn idle(&mut self) -> Result<(), CaptureError> {
        if self.ending.gone {
            return Ok(());
        }
        self.end_own_pause()?;
        let events = self.qmp.events()?;
        self.note(events);
        Ok(())
    }

    /// A request has failed between `stop` and `cont`, and the guest may be paused since.
    fn end_own_pause(&mut self) -> Result<(), CaptureError> {
        if self.page.paused() {
            tracing::warn!(domain = self.config.domain_name, "an earlier pause was not ended: ending it");
            rescue::end_pause(&self.page, self.permission.as_deref(), &mut self.qmp)?;
        }
        Ok(())
    }

    fn note(&mut self, events: Vec<Event>) {
        for event in events {
            tracing::debug!(domain = self.config.domain_name, event = event.name, "QEMU event");
            // Somebody else ended the hold.
            self.held &= event.name != "RESUME";
            if event.name == "RESUME" {
                self.page.set_standing(false);
            }
            self.ending.note(&event);
            self.last_event = event.name;
        }
    }

    fn cut_limit(&self) -> Duration {
        Duration::from_millis(self.config.cut_limit_ms)
    }

    /// What is left of the time that a cut may take; a moment at least, for an answer that is there already.
    fn cut_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(10))
    }

    fn pending_pages(&self) -> u64 {
        self.pending.iter().map(Bitmap::count).sum()
    }

    fn add_pending(&mut self, runs: &[Run]) {
        let Some(log) = &self.log else { return };
        for (index, watched) in log.blocks().iter().enumerate() {
            let pages = watched.pages();
            if self.pending.len() == index {
                self.pending.push(Bitmap::new(pages));
            } else if self.pending[index].len() != pages {
                // A block that has changed its size was reported as a whole.
                self.pending[index] = Bitmap::new(pages);
            }
            if !watched.present {
                self.pending[index].clear();
            }
        }
        for run in runs {
            self.pending[run.block].insert(run.first, run.pages);
        }
    }

    fn remove_pending(&mut self, runs: &[Run]) {
        for run in runs {
            self.pending[run.block].remove(run.first, run.pages);
        }
    }

    /// Pending runs of at most `pages_max` pages together.
    fn pending_runs(&self, pages_max: u64) -> Vec<Run> {
        let mut left = pages_max;
        let mut runs = Vec::new();
        for (block, bitmap) in self.pending.iter().enumerate() {
            for (first, pages) in bitmap.runs() {
                if left == 0 {
                    return runs;
                }
                let pages = pages.min(left);
                runs.push(Run { block, first, pages });
                left -= pages;
            }
        }
        runs
    }

    /// Copies `runs` into chunks of the arena.
    fn copy(&mut self, runs: &[Run], into: &mut Copied) -> anyhow::Result<()> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let mut runs = runs.iter().copied();
        let mut rest: Option<Run> = None;
        let mut batch: Vec<Run> = Vec::with_capacity(PAGES_PER_CHUNK);
        loop {
            batch.clear();
            let mut room = PAGES_PER_CHUNK as u64;
            while room > 0 {
                let Some(mut run) = rest.take().or_else(|| runs.next()) else { break };
                if run.pages > room {
                    rest = Some(Run { first: run.first + room, pages: run.pages - room, ..run });
                    run.pages = room;
                }
                room -= run.pages;
                batch.push(run);
            }
            if batch.is_empty() {
                return Ok(());
            }
            let mut chunk = self.arena.take().context("the arena is full")?;
            let pages = PAGES_PER_CHUNK as u64 - room;
            log.read(&batch, &mut chunk.bytes_mut()[..pages as usize * PAGE_BYTES]).context("read guest memory")?;
            let mut at = chunk.offset();
            for run in &batch {
                into.runs.push(RamRun {
                    block: run.block as u32,
                    first: run.first,
                    pages: run.pages as u32,
                    arena_offset: at,
                });
                at += run.pages * PAGE_BYTES as u64;
            }
            into.pages += pages;
            into.chunks.push(chunk);
        }
    }

    fn blocks(&self) -> Vec<RamBlock> {
        let blocks = self.log.as_ref().map(DirtyLog::blocks).unwrap_or_default();
        blocks
            .iter()
            .map(|watched| RamBlock {
                name: watched.block.name.clone(),
                used_bytes: if watched.present && (!self.ending.off || ending::outlasts_power(&watched.block.name)) {
                    watched.block.used_bytes
                } else {
                    0
                },
                page_bytes: watched.block.page_bytes as u32,
            })
            .collect()
    }

    /// Makes a held part of what was copied; `last` closes the epoch.
    fn hold(&mut self, copied: Copied, last: bool) -> Part {
        let part = Part {
            generation: self.generation,
            epoch: self.epoch,
            part: self.next_part,
            last,
            seed: self.seed,
            dirty_pages: copied.pages,
            runs: copied.runs,
            ops: copied.ops,
            blocks: self.blocks(),
            ..copied.part
        };
        self.unreleased.push_back(Held { part: part.clone(), _chunks: copied.chunks });
        self.ending.taking = false;
        if last {
            self.bitmaps.base_epoch = 0;
            self.epoch += 1;
            self.next_part = 0;
            self.seed = false;
        } else {
            self.next_part += 1;
        }
        part
    }
}

/// What a part is being made of.
#[derive(Debug, Default)]
struct Copied {
    runs: Vec<RamRun>,
    ops: Vec<DiskOp>,
    chunks: Vec<Chunk>,
    pages: u64,
    /// The fields that only the last part has.
    part: Part,
}

impl Copied {
    fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.ops.is_empty()
    }

    fn add_log(&mut self, disk: usize, taken: Taken) {
        self.ops.extend(taken.ops.iter().map(|op| disk_op(disk, op)));
        self.chunks.extend(taken.chunks);
    }
}

fn disk_op(disk: usize, op: &Op) -> DiskOp {
    let kind = if op.arena_offset.is_some() { DiskOpKind::Data } else { DiskOpKind::Zero };
    DiskOp {
        disk: disk as u32,
        offset: op.offset,
        length: op.length,
        kind: kind.into(),
        arena_offset: op.arena_offset.unwrap_or(0),
    }
}

fn disk_state(disk: &Disk) -> DiskState {
    let (sessions, connected) = disk.sessions();
    DiskState {
        target: disk.target().to_owned(),
        size_bytes: disk.size(),
        connected: connected > 0,
        sessions,
        written_bytes: disk.written_bytes(),
    }
}

/// The export name and job prefix that belong to a disk.
fn job_prefix(target: &str) -> String {
    // libvirt names the jobs of virDomainBlockCopy so.
    format!("copy-{target}-")
}

/// The mirror job of a disk, from the answer of `query-block-jobs`.
fn mirror_of<'a>(jobs: &'a serde_json::Value, target: &str) -> anyhow::Result<&'a serde_json::Value> {
    let prefix = job_prefix(target);
    jobs.as_array()
        .into_iter()
        .flatten()
        .find(|job| job["type"] == "mirror" && job["device"].as_str().is_some_and(|name| name.starts_with(&prefix)))
        .ok_or_else(|| anyhow!("disk {target} has no mirror job"))
}
