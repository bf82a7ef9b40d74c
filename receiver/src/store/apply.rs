//! Durable epochs become the standby's content: by a thread of each domain, behind the acknowledgements, in batches.
//!
//! A batch is: say in the control record up to which epoch; apply; sync; say in the control record that it is done. Between
//! batches the standby is exactly one epoch, so that even a journal that cannot be read any more leaves a recovery point.
//! Within one, the journal can replay all of the batch, because nothing in it is removed before.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::time::Instant;

use vmdr_journal::{JournalError, Standby, read_chunk, remove_segments_before};

use super::StoreError;
use super::domain::{Domain, Epoch};
use super::standby::{self, Brought, StandbyFiles, write_aside};

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
}

impl Applier {
    /// For files that are as `durable` says.
    pub fn new(files: StandbyFiles, durable: Standby) -> Self {
        let (epoch, cut_unix_ns) = (durable.epoch, durable.cut_unix_ns);
        Self { files, durable, epoch, cut_unix_ns, brought: Brought::default() }
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
    fn checkpoint(&mut self, domain: &Domain) -> Result<(), StoreError> {
        let (epoch, cut_unix_ns) = (self.epoch, self.cut_unix_ns);
        let mut durable = Standby { epoch, cut_unix_ns, applying: epoch, ..self.durable };
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
        while self.wait_for_batch() {
            let result = self.batch();
            self.settle(result);
        }
    }

    /// Waits until there is enough to apply, or it has waited long enough, or somebody wants it; false: stop.
    fn wait_for_batch(&self) -> bool {
        let mut since = Instant::now();
        let mut shared = self.shared();
        loop {
            if shared.closing || shared.failed.is_some() {
                return false;
            }
            // Applied but not synced: the last batch ran out of space at its end.
            let idle = shared.backlog.is_empty() && shared.applied == shared.synced;
            if idle {
                shared.sync_wanted = false;
                since = Instant::now();
            }
            let due = shared.sync_wanted
                || shared.backlog_bytes >= self.options.apply_bytes
                || since.elapsed() >= self.options.apply_interval;
            if due && !idle {
                return true;
            }
            let left = self.options.apply_interval.saturating_sub(since.elapsed());
            shared = if idle { self.wait(shared) } else { self.wait_at_most(shared, left) };
        }
    }

    /// Applies all that is durable now, and makes that durable.
    pub fn batch(&self) -> Result<(), StoreError> {
        let mut standby = self.standby();
        let Some(applier) = &mut *standby else { return Ok(()) };
        // A seed replaces the backlog together with the standby, and has to wait for this lock.
        let batch: Vec<Arc<Epoch>> = self.shared().backlog.iter().cloned().collect();
        let Some(newest) = batch.last() else {
            let unsynced = applier.epoch != applier.durable.epoch || applier.durable.applying != applier.durable.epoch;
            return if unsynced { applier.checkpoint(self) } else { Ok(()) };
        };
        if applier.durable.applying < newest.epoch {
            let durable = Standby { applying: newest.epoch, ..applier.durable };
            self.change_control(|control| control.standby = Some(durable))?;
            applier.durable = durable;
        }
        for epoch in &batch {
            applier.apply(self, epoch).map_err(|error| self.failure(error))?;
            let mut shared = self.shared();
            shared.backlog.pop_front();
            shared.backlog_bytes = shared.backlog_bytes.saturating_sub(epoch.bytes);
            shared.applied = epoch.epoch;
            self.changed.notify_all();
        }
        applier.checkpoint(self)
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
                shared.stalls += 1;
                shared.retry_wanted = false;
                self.changed.notify_all();
                let until = Instant::now() + self.options.retry_interval;
                while !shared.closing && !shared.retry_wanted && Instant::now() < until {
                    shared = self.wait_at_most(shared, until.saturating_duration_since(Instant::now()));
                }
            }
            Err(_) => {}
        }
    }
}
