//! Durable epochs become the standby's content: by a thread of each domain, behind the acknowledgements.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use vmdr_journal::{JournalError, Standby, read_chunk, remove_segments_before};

use super::StoreError;
use super::domain::{Domain, Epoch};
use super::standby::{self, Brought, StandbyFiles, write_aside};

/// Between tries to apply when there is no space.
const RETRY: Duration = Duration::from_secs(1);

/// The current standby while it is written.
#[derive(Debug)]
pub(super) struct Applier {
    pub files: StandbyFiles,
    /// What the control record says of it.
    pub durable: Standby,
    /// Up to where it is written.
    pub epoch: u64,
    cut_unix_ns: u64,
    brought: Brought,
    bytes: u64,
    since: Instant,
}

enum Job {
    Apply(Arc<Epoch>),
    Checkpoint,
    Stop,
}

impl Applier {
    /// For files that are as `durable` says.
    pub fn new(files: StandbyFiles, durable: Standby) -> Self {
        let (epoch, cut_unix_ns) = (durable.epoch, durable.cut_unix_ns);
        Self { files, durable, epoch, cut_unix_ns, brought: Brought::default(), bytes: 0, since: Instant::now() }
    }

    fn apply(&mut self, domain: &Domain, epoch: &Epoch) -> Result<(), JournalError> {
        let layout = self.files.layout().clone();
        let result = self.payloads(domain, epoch);
        let brought = self.files.take_brought();
        if let Err(error) = result {
            // What was written is written again with the next try; what came beside must not be taken for applied.
            self.files.give_up_part(layout);
            return Err(error);
        }
        self.brought.layout |= brought.layout;
        self.brought.device_state = brought.device_state.or(self.brought.device_state.take());
        self.brought.xml = brought.xml.or(self.brought.xml.take());
        self.epoch = epoch.epoch;
        self.cut_unix_ns = epoch.cut_unix_ns;
        self.bytes += epoch.bytes;
        Ok(())
    }

    fn payloads(&mut self, domain: &Domain, epoch: &Epoch) -> Result<(), JournalError> {
        if let Some(payloads) = &epoch.payloads {
            return payloads.iter().try_for_each(|payload| self.files.apply(payload));
        }
        let dir = domain.journal_dir();
        for part in &epoch.parts {
            for chunk in &part.chunks {
                self.files.apply(&read_chunk(&*domain.disk, &dir, part.segment, chunk)?)?;
            }
        }
        Ok(())
    }

    /// Makes what was applied durable and says so in the control record; the journal up to there is then not needed.
    pub fn checkpoint(&mut self, domain: &Domain) -> Result<(), StoreError> {
        self.since = Instant::now();
        self.bytes = 0;
        if self.epoch == self.durable.epoch {
            return Ok(());
        }
        let mut durable = Standby { epoch: self.epoch, cut_unix_ns: self.cut_unix_ns, ..self.durable };
        self.write(domain, &mut durable).map_err(|error| domain.failure(error))?;
        let first = {
            let shared = domain.shared();
            let backlog = shared.backlog.iter().filter(|epoch| epoch.epoch > self.epoch);
            let backlog = backlog.filter_map(|epoch| epoch.parts.first()).map(|part| part.segment);
            backlog.chain([shared.open_segment]).min().unwrap_or(shared.open_segment)
        };
        domain.change_control(|control| {
            control.standby = Some(durable);
            control.journal_first = first;
        })?;
        let before = std::mem::replace(&mut self.durable, durable);
        self.brought = Brought::default();
        domain.shared().synced = self.epoch;
        domain.changed.notify_all();
        self.sweep(domain, first, &before);
        Ok(())
    }

    fn write(&mut self, domain: &Domain, durable: &mut Standby) -> Result<(), JournalError> {
        self.files.sync()?;
        let (disk, dir) = (&*domain.disk, self.files.dir().to_owned());
        if let Some(bytes) = &self.brought.device_state {
            write_aside(disk, &standby::device_path(&dir, self.epoch), bytes)?;
            durable.device_epoch = self.epoch;
        }
        if self.brought.layout {
            let path = standby::layout_path(&dir, self.epoch);
            write_aside(disk, &path, &standby::layout_bytes(self.files.layout(), &path)?)?;
            durable.layout_epoch = self.epoch;
        }
        if let Some(bytes) = &self.brought.xml {
            write_aside(disk, &standby::xml_path(&dir, self.epoch), bytes)?;
            durable.xml_epoch = self.epoch;
        }
        disk.sync_dir(&dir).map_err(JournalError::io("sync", &dir))
    }

    /// Removes what the control record no longer mentions. What cannot be removed now is at the next open.
    fn sweep(&self, domain: &Domain, first: u64, before: &Standby) {
        let dir = self.files.dir();
        let mut old: Vec<PathBuf> = Vec::new();
        if before.device_epoch != self.durable.device_epoch {
            old.push(standby::device_path(dir, before.device_epoch));
        }
        if before.layout_epoch != self.durable.layout_epoch {
            old.push(standby::layout_path(dir, before.layout_epoch));
        }
        if before.xml_epoch != self.durable.xml_epoch {
            old.push(standby::xml_path(dir, before.xml_epoch));
        }
        for path in old {
            if let Err(error) = domain.disk.remove_file(&path) {
                tracing::warn!(domain = %domain.id, path = %path.display(), %error, "cannot remove a superseded file");
            }
        }
        if let Err(error) = remove_segments_before(&*domain.disk, &domain.journal_dir(), first) {
            tracing::warn!(domain = %domain.id, %error, "cannot remove journal segments that are applied");
        }
    }
}

impl Domain {
    /// Starts the thread that applies.
    pub fn start(self: &Arc<Self>) -> Result<(), StoreError> {
        let domain = self.clone();
        let thread = std::thread::Builder::new().name("vmdr-apply".to_owned()).spawn(move || domain.run());
        let thread = thread.map_err(|error| {
            let what = format!("cannot start the thread that applies: {error}");
            StoreError::Io { domain: self.id.clone(), what }
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn run(&self) {
        loop {
            match self.next_job() {
                Job::Stop => return,
                Job::Checkpoint => self.checkpoint_now(),
                Job::Apply(epoch) => self.apply_now(&epoch),
            }
        }
    }

    fn next_job(&self) -> Job {
        let interval = self.options.checkpoint_interval;
        let mut since = Instant::now();
        let mut shared = self.shared();
        loop {
            if shared.closing || shared.failed.is_some() {
                return Job::Stop;
            }
            if let Some(epoch) = shared.backlog.front() {
                return Job::Apply(epoch.clone());
            }
            if shared.synced == shared.applied {
                shared.sync_wanted = false;
                since = Instant::now();
            } else if shared.sync_wanted || since.elapsed() >= interval {
                return Job::Checkpoint;
            }
            shared = self.wait(shared);
        }
    }

    fn checkpoint_now(&self) {
        let result = match &mut *self.standby() {
            Some(applier) => applier.checkpoint(self),
            None => Ok(()),
        };
        self.settle(result);
    }

    /// Applies everything that is durable, then makes that durable; for use before the thread is started.
    pub fn apply_all(&self) -> Result<(), StoreError> {
        loop {
            let Some(epoch) = self.shared().backlog.front().cloned() else { break };
            self.apply_one(&epoch)?;
        }
        match &mut *self.standby() {
            Some(applier) => applier.checkpoint(self),
            None => Ok(()),
        }
    }

    fn apply_now(&self, epoch: &Arc<Epoch>) {
        let result = self.apply_one(epoch);
        self.settle(result);
    }

    fn apply_one(&self, epoch: &Arc<Epoch>) -> Result<(), StoreError> {
        let mut standby = self.standby();
        // A seed may have replaced standby and backlog while this waited.
        let current = self.shared().backlog.front().is_some_and(|front| Arc::ptr_eq(front, epoch));
        let Some(applier) = standby.as_mut().filter(|_| current) else { return Ok(()) };
        applier.apply(self, epoch).map_err(|error| self.failure(error))?;
        {
            let mut shared = self.shared();
            shared.backlog.pop_front();
            shared.backlog_bytes = shared.backlog_bytes.saturating_sub(epoch.bytes);
            shared.applied = epoch.epoch;
            self.changed.notify_all();
        }
        let due = applier.bytes >= self.options.checkpoint_bytes
            || applier.since.elapsed() >= self.options.checkpoint_interval;
        if due { applier.checkpoint(self) } else { Ok(()) }
    }

    /// After work of the thread: lack of space is waited out, anything else has made the domain fail.
    fn settle(&self, result: Result<(), StoreError>) {
        let mut shared = self.shared();
        match result {
            Ok(()) => shared.stalled = None,
            Err(error @ StoreError::Full { .. }) => {
                if shared.stalled.is_none() {
                    tracing::error!(domain = %self.id, %error, "durable epochs cannot be applied, trying again");
                }
                shared.stalled = Some(error.to_string());
                self.changed.notify_all();
                let until = Instant::now() + RETRY;
                while !shared.closing && Instant::now() < until {
                    shared = self.wait(shared);
                }
            }
            Err(_) => {}
        }
    }
}
