//! Parts of epochs come in: checked, made durable, and only then acknowledged.
//!
//! Order of checks, each of which refuses: the stream is still the domain's newest; its generation is not older than the
//! stored one; the epoch and part are the next ones; there is space; every chunk and record is right. Parts of a delta go to
//! the journal, parts of a seed straight into a standby directory of its own, because nothing is lost by starting a seed
//! again, and the journal would have to hold the whole guest.
//!
//! A part of a seed that is given up may leave pages and extents in that directory. That is sound because a sender
//! may only end an epoch after it has sent again whatever was in a part that was not acknowledged.

use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use vmdr_codec::Layout;
use vmdr_journal::{
    HistoryLog, HistoryMark, JournalError, Kind, Mode, PartHead, PartTail, Place, Seed, SmallSums, Standby,
    remove_segments_before,
};

use super::apply::{Applier, small_sums};
use super::catalog::Chain;
use super::check::{Checked, PartCheck};
use super::domain::{Content, Domain, Epoch, IngestState, OpenEpoch, OpenPart, Shared};
use super::images::StandbyFiles;
use super::standby::{self, write_aside};
use super::{Durable, NUMBER_MAX, Position, StoreError};

/// Payload bytes of an open epoch kept in memory for applying; of a larger one they are read from the journal again.
const KEEP_BYTES_MAX: u64 = 64 << 20;

/// Parts of a delta, at most: what is known of each is kept in memory until the last, some 200 bytes. Of 16 MiB each they are
/// 16 TiB.
const DELTA_PARTS_MAX: u32 = 1 << 20;

/// The stream of a domain into the store. A newer one of the same domain takes over: then every call here fails.
#[derive(Debug)]
pub struct Ingest {
    pub(super) domain: Arc<Domain>,
    pub(super) stream: u64,
    pub(super) generation: u64,
    /// The damage of the standby that the sender was told of.
    pub(super) told: u64,
    /// The newest durable epoch when the stream was opened: it may mend what is damaged.
    pub(super) opened_at: u64,
    /// The damage that was last found, and the newest epoch then, which may mend it as well.
    pub(super) found: (u64, u64),
}

impl Ingest {
    /// The generation agreed on.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How far the domain has come.
    pub fn position(&self) -> Position {
        self.domain.shared().position
    }

    /// Whether this is still the domain's newest stream, in the generation that is in force, and the domain a standby.
    pub fn is_newest(&self) -> Result<(), StoreError> {
        self.may_write()
    }

    /// Whether there is a recovery point of its generation.
    pub fn has_point(&self) -> bool {
        let shared = self.domain.shared();
        shared.position.epoch > 0 && shared.point_generation == self.generation
    }

    /// Whether the standby turned out to be damaged, so that the sender should compare all of it with what it has: said once
    /// for what is found, and not in the middle of an epoch of several parts.
    pub fn wants_comparison(&mut self) -> bool {
        let (position, applied) = {
            let shared = self.domain.shared();
            (shared.position, shared.applied)
        };
        let mut catalog = self.domain.catalog();
        let found = catalog.flaws_found;
        if found <= self.told {
            return false;
        }
        if self.found.0 != found {
            self.found = (found, position.epoch.max(position.open_epoch));
        }
        if position.open_epoch > 0 || applied < self.opened_at.max(self.found.1) {
            return false;
        }
        self.told = found;
        catalog.standby().is_some_and(|chain| chain.open_flaws().next().is_some())
    }

    /// Begins a part. One that was begun and not ended is given up. Waits while too much is durable but not applied.
    pub fn begin(&mut self, head: PartHead) -> Result<(), StoreError> {
        let domain = &*self.domain;
        self.wait_for_room()?;
        let mut ingest = domain.ingest();
        self.may_write()?;
        ingest.give_up_part(domain)?;
        if head.generation < self.generation {
            let (domain, offered, stored) = (domain.id.clone(), head.generation, self.generation);
            return Err(StoreError::Fenced { domain, offered, stored });
        }
        if head.generation > self.generation || head.epoch == 0 || head.epoch > NUMBER_MAX {
            let expected = format!("generation {} and an epoch from 1", self.generation);
            return Err(domain.sequence(&head, expected));
        }
        match head.kind {
            Kind::Delta => domain.begin_delta(&mut ingest, &head)?,
            Kind::Seed => domain.begin_seed(&mut ingest, &head)?,
        }
        let layout = ingest.open.as_ref().and_then(|open| open.layout.clone());
        ingest.part = Some(OpenPart { head, check: PartCheck::new(layout), payloads: Vec::new() });
        Ok(())
    }

    /// Adds the next chunk. If it is refused the part is given up.
    pub fn chunk(&mut self, sequence: u32, payload: Bytes, xxh3: u64) -> Result<(), StoreError> {
        let domain = &*self.domain;
        let mut ingest = domain.ingest();
        self.may_write()?;
        let ingest = &mut *ingest;
        let (Some(part), Some(open)) = (&mut ingest.part, &mut ingest.open) else {
            return Err(self.outside("a chunk"));
        };
        if let Err(what) = part.check.chunk(sequence, &payload, xxh3) {
            let error = domain.corrupt(&part.head, what);
            ingest.give_up_part(domain)?;
            return Err(error);
        }
        let result = match &mut open.content {
            Content::Seed { files, .. } => files.write(&payload),
            Content::Delta { payloads, bytes, .. } => {
                if *bytes + part.check.payload_bytes() > KEEP_BYTES_MAX {
                    *payloads = None;
                    part.payloads.clear();
                }
                if payloads.is_some() {
                    part.payloads.push(payload.clone());
                }
                ingest.journal.chunk(payload, xxh3)
            }
        };
        result.map_err(|error| {
            let error = domain.failure(error);
            let _ = ingest.give_up_part(domain); // A failure of this too has made the domain fail.
            error
        })
    }

    /// Ends the part: it is durable when this returns. If it is refused it is given up.
    pub fn end(&mut self, tail: PartTail) -> Result<Durable, StoreError> {
        let domain = &*self.domain;
        let mut ingest = domain.ingest();
        self.may_write()?;
        let (Some(part), Some(open)) = (ingest.part.take(), &ingest.open) else {
            return Err(self.outside("the end of a part"));
        };
        let head = part.head;
        let checked = part.check.end(&tail).and_then(|checked| whole(open, checked, &tail));
        let result = match checked {
            Err(what) => Err(domain.corrupt(&head, what)),
            Ok(checked) if head.kind == Kind::Delta => domain
                .fits(&ingest, &head, &checked)
                .and_then(|()| domain.end_delta(&mut ingest, tail, checked, part.payloads)),
            Ok(checked) => domain.end_seed(&mut ingest, &tail, checked),
        };
        if let Err(error) = result {
            let _ = ingest.give_up_part(domain); // A failure of this too has made the domain fail.
            return Err(error);
        }
        let PartHead { generation, epoch, part, .. } = head;
        Ok(Durable { generation, epoch, part, last: tail.last })
    }

    /// The sender hands the domain over at `epoch`, which must be the newest one, and all of it durable: `generation` is in
    /// force when this returns, durably, and this stream is over. A newer stream of the domain, or a newer generation,
    /// comes first: then it is refused, and will be for ever.
    pub fn hand_over(&mut self, epoch: u64, generation: u64) -> Result<(), StoreError> {
        let domain = &*self.domain;
        let mut ingest = domain.ingest();
        self.may_write()?;
        let refused = |what: String| Err(StoreError::Refused { domain: domain.id.clone(), what });
        let (newest, open) = {
            let shared = domain.shared();
            (shared.position.epoch, shared.position.open_epoch)
        };
        if newest != epoch || open != 0 {
            return refused(format!("epoch {newest} is the newest durable one, not {epoch}"));
        }
        if generation != self.generation + 1 || generation > NUMBER_MAX {
            return refused(format!("generation {generation} does not follow {}", self.generation));
        }
        ingest.give_up_part(domain)?;
        domain.raise_locked(&mut ingest, generation)
    }

    /// Gives up the part that was begun, if any.
    pub fn abort(&mut self) -> Result<(), StoreError> {
        let mut ingest = self.domain.ingest();
        self.may_write()?;
        ingest.give_up_part(&self.domain)
    }

    fn outside(&self, got: &str) -> StoreError {
        let (domain, got) = (self.domain.id.clone(), got.to_owned());
        StoreError::Sequence { domain, got, expected: "the beginning of a part".to_owned() }
    }

    fn may_write(&self) -> Result<(), StoreError> {
        self.check(&self.domain.shared())
    }

    fn check(&self, shared: &Shared) -> Result<(), StoreError> {
        let domain = || self.domain.id.clone();
        let stored = shared.position.generation;
        if self.generation < stored {
            return Err(StoreError::Fenced { domain: domain(), offered: self.generation, stored });
        }
        if self.stream != shared.stream {
            return Err(StoreError::Superseded(domain()));
        }
        if shared.frozen {
            return Err(StoreError::Frozen(domain()));
        }
        self.domain.alive(shared)
    }

    /// Waits until little enough is durable but not applied, and checks the space that must stay free.
    fn wait_for_room(&self) -> Result<(), StoreError> {
        let domain = &*self.domain;
        let mut shared = domain.shared();
        loop {
            self.check(&shared)?;
            if shared.backlog_bytes <= domain.options.backlog_bytes_max {
                break;
            }
            if let Some(why) = &shared.stalled {
                let what = format!("{} bytes wait to be applied: {why}", shared.backlog_bytes);
                return Err(StoreError::Full { domain: domain.id.clone(), what });
            }
            shared = domain.wait(shared);
        }
        if let Some(why) = &shared.over_budget {
            return Err(StoreError::Full { domain: domain.id.clone(), what: why.clone() });
        }
        drop(shared);
        let free = domain.disk.free_bytes(&domain.dir).map_err(JournalError::io("measure", &domain.dir));
        let free = free.map_err(|error| domain.failure(error))?;
        let reserve = domain.options.space_reserve_bytes;
        if free < reserve {
            let what = format!("{free} bytes are free in {}, {reserve} are kept in reserve", domain.dir.display());
            return Err(StoreError::Full { domain: domain.id.clone(), what });
        }
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        let mut ingest = self.domain.ingest();
        {
            let shared = self.domain.shared();
            // Closed or failed, its journal may be open a second time by now: cutting it would cut what is new.
            if shared.stream != self.stream || shared.closing || shared.failed.is_some() {
                return;
            }
        }
        if let Err(error) = ingest.give_up_part(&self.domain) {
            tracing::warn!(domain = %self.domain.id, %error, "cannot cut off the part that was not ended");
        }
        self.domain.shared().stream_open = false;
    }
}

/// With the last part the epoch must be one that can be activated.
fn whole(open: &OpenEpoch, checked: Checked, tail: &PartTail) -> Result<Checked, String> {
    if checked.layout.is_none() {
        return Err("a seed without a layout in its first part".to_owned());
    }
    if tail.last {
        // A guest that has shut down has no devices either.
        let off = checked.layout.as_ref().is_some_and(|layout| layout.is_off());
        if !off && checked.device_state.as_ref().is_none_or(Vec::is_empty) {
            return Err("the last part has no device state".to_owned());
        }
        if let Content::Seed { has_xml: false, .. } = open.content
            && checked.xml.is_none()
        {
            return Err("a seed without a domain XML".to_owned());
        }
    }
    Ok(checked)
}

impl IngestState {
    /// Gives up the part that was begun, if any; those before it stay.
    pub fn give_up_part(&mut self, domain: &Domain) -> Result<(), StoreError> {
        self.part = None;
        if let Some(OpenEpoch { content: Content::Seed { files, .. }, layout, .. }) = &mut self.open {
            files.give_up_part(layout.clone().unwrap_or_default());
        }
        self.journal.abort().map_err(|error| domain.failure(error))
    }
}

impl Domain {
    fn sequence(&self, head: &PartHead, expected: String) -> StoreError {
        let PartHead { generation, epoch, part, kind } = head;
        let got = format!("{kind:?} epoch {epoch} part {part} of generation {generation}");
        StoreError::Sequence { domain: self.id.clone(), got, expected }
    }

    fn corrupt(&self, head: &PartHead, what: String) -> StoreError {
        StoreError::Corrupt { domain: self.id.clone(), epoch: head.epoch, part: head.part, what }
    }

    fn begin_delta(&self, ingest: &mut IngestState, head: &PartHead) -> Result<(), StoreError> {
        let (next, point_generation) = {
            let shared = self.shared();
            (shared.position.epoch + 1, shared.point_generation)
        };
        if next == 1 {
            return Err(self.sequence(head, "a seed".to_owned()));
        }
        if head.generation != point_generation {
            let expected = format!("a seed, because the recovery point is of generation {point_generation}");
            return Err(self.sequence(head, expected));
        }
        let is_open = |open: &OpenEpoch| {
            matches!(open.content, Content::Delta { .. })
                && (open.generation, open.epoch) == (head.generation, head.epoch)
        };
        let parts = ingest.open.as_ref().filter(|open| is_open(open)).map_or(0, |open| open.parts);
        if head.epoch != next || (head.part != parts && head.part != 0) {
            return Err(self.sequence(head, format!("epoch {next} part {parts}, or a seed")));
        }
        if head.part >= DELTA_PARTS_MAX {
            return Err(self.sequence(head, format!("a seed, because an epoch has at most {DELTA_PARTS_MAX} parts")));
        }
        if head.part == 0 {
            self.discard_open(ingest)?;
            ingest.open = Some(OpenEpoch {
                generation: head.generation,
                epoch: head.epoch,
                parts: 0,
                layout: ingest.layout.clone(),
                content: Content::Delta { parts: Vec::new(), payloads: Some(Vec::new()), bytes: 0 },
            });
        }
        ingest.journal.begin(*head).map_err(|error| self.failure(error))
    }

    fn begin_seed(&self, ingest: &mut IngestState, head: &PartHead) -> Result<(), StoreError> {
        let (durable, point_generation) = {
            let shared = self.shared();
            (shared.position.epoch, shared.point_generation)
        };
        if head.generation == point_generation && head.epoch <= durable {
            return Err(self.sequence(head, format!("a seed with an epoch after {durable}")));
        }
        let is_open = |open: &OpenEpoch| {
            matches!(open.content, Content::Seed { .. })
                && (open.generation, open.epoch) == (head.generation, head.epoch)
        };
        let parts = ingest.open.as_ref().filter(|open| is_open(open)).map_or(0, |open| open.parts);
        if head.part != 0 && head.part == parts {
            return Ok(());
        }
        if head.part != 0 {
            return Err(self.sequence(head, format!("part {parts} of that seed, or part 0 of a new one")));
        }
        self.discard_open(ingest)?;
        let dir = self.control().next_dir;
        let seed = Seed { dir, generation: head.generation, epoch: head.epoch, parts: 0 };
        self.change_control(|control| {
            control.next_dir = dir + 1;
            control.seed = Some(seed);
            // Its images have checksums from the beginning.
            control.put_small_sums(SmallSums { dir, ..SmallSums::default() });
        })?;
        let files = StandbyFiles::create(self.disk.clone(), &self.standby_dir(dir));
        let files = Box::new(files.map_err(|error| self.failure(error))?);
        ingest.open = Some(OpenEpoch {
            generation: head.generation,
            epoch: head.epoch,
            parts: 0,
            layout: None,
            content: Content::Seed { files, dir, has_xml: false },
        });
        Ok(())
    }

    /// Forgets the epoch that is open; of a seed its directory too.
    pub fn discard_open(&self, ingest: &mut IngestState) -> Result<(), StoreError> {
        let open = ingest.open.take();
        {
            let mut shared = self.shared();
            (shared.position.open_epoch, shared.position.open_parts) = (0, 0);
            shared.open_segment = shared.open_segment.max(ingest.journal.segment());
        }
        let Some(OpenEpoch { content: Content::Seed { dir, .. }, .. }) = open else { return Ok(()) };
        self.change_control(|control| control.seed = None)?;
        let dir = self.standby_dir(dir);
        self.disk.remove_dir_all(&dir).map_err(|e| self.failure(JournalError::io("remove", &dir)(e)))
    }

    /// Whether files here can be as long as the layout of a delta asks. Before it is acknowledged: what is durable has to be applied.
    /// (A seed makes its images before.)
    fn fits(&self, ingest: &IngestState, head: &PartHead, checked: &Checked) -> Result<(), StoreError> {
        let longest = |layout: &Layout| layout.lengths().max().unwrap_or(0);
        let known = ingest.layout.as_deref().map_or(0, longest);
        let asked = checked.layout.as_deref().map_or(0, longest);
        let Some(standby) = self.control().standby else { return Ok(()) };
        if !checked.layout_changed || asked <= known {
            return Ok(());
        }
        // One that is left by a crash is removed as a layout that is not in use.
        let dir = self.standby_dir(standby.dir);
        let path = dir.join("layout-probe");
        let probe = self.disk.open(&path, Mode::Create);
        let probe = probe.map_err(|e| self.failure(JournalError::io("create", &path)(e)))?;
        let extended = probe.set_length(asked);
        drop(probe);
        self.disk.remove_file(&path).map_err(|e| self.failure(JournalError::io("remove", &path)(e)))?;
        match extended {
            Ok(()) => Ok(()),
            Err(e) if matches!(e.kind(), ErrorKind::FileTooLarge | ErrorKind::InvalidInput) => {
                let what =
                    format!("RAM or a disk of {asked} bytes is longer than a file can be in {}: {e}", dir.display());
                Err(self.corrupt(head, what))
            }
            Err(e) => Err(self.failure(JournalError::io("extend", &path)(e))),
        }
    }

    fn end_delta(
        &self,
        ingest: &mut IngestState,
        tail: PartTail,
        checked: Checked,
        more: Vec<Bytes>,
    ) -> Result<(), StoreError> {
        let part = ingest.journal.end(tail).map_err(|error| self.failure(error))?;
        let Some(open) = &mut ingest.open else { return Ok(()) };
        let Content::Delta { parts, payloads, bytes } = &mut open.content else { return Ok(()) };
        open.parts += 1;
        open.layout = checked.layout;
        *bytes += tail.payload_bytes;
        parts.push(part);
        if let Some(payloads) = payloads {
            payloads.extend(more);
        }
        let mut shared = self.shared();
        if tail.last {
            let epoch = Epoch {
                epoch: open.epoch,
                cut_unix_ns: tail.cut_unix_ns,
                parts: std::mem::take(parts),
                payloads: payloads.take(),
                bytes: *bytes,
            };
            ingest.layout = open.layout.take();
            shared.position.epoch = epoch.epoch;
            (shared.position.open_epoch, shared.position.open_parts) = (0, 0);
            shared.cut_unix_ns = epoch.cut_unix_ns;
            shared.backlog_bytes += epoch.bytes;
            shared.open_segment = ingest.journal.segment();
            shared.backlog.push_back(Arc::new(epoch));
            ingest.open = None;
        } else {
            (shared.position.open_epoch, shared.position.open_parts) = (open.epoch, open.parts);
            shared.open_segment = parts.first().map_or(shared.open_segment, |part| part.segment);
        }
        self.changed.notify_all();
        Ok(())
    }

    fn end_seed(&self, ingest: &mut IngestState, tail: &PartTail, checked: Checked) -> Result<(), StoreError> {
        let Some(open) = &mut ingest.open else { return Ok(()) };
        let Content::Seed { files, has_xml, .. } = &mut open.content else { return Ok(()) };
        let layout = checked.layout.clone().unwrap_or_default();
        self.sync_seed(files, open.epoch, &layout, &checked, tail.last).map_err(|error| self.failure(error))?;
        files.take_brought();
        let parts = open.parts + 1;
        if tail.last {
            return self.commit_seed(ingest, tail, layout);
        }
        self.change_control(|control| {
            if let Some(seed) = &mut control.seed {
                seed.parts = parts;
            }
        })?;
        open.parts = parts;
        open.layout = checked.layout;
        *has_xml |= checked.xml.is_some();
        let mut shared = self.shared();
        (shared.position.open_epoch, shared.position.open_parts) = (open.epoch, open.parts);
        Ok(())
    }

    fn sync_seed(
        &self,
        files: &mut StandbyFiles,
        epoch: u64,
        layout: &Layout,
        checked: &Checked,
        last: bool,
    ) -> Result<(), JournalError> {
        // Before the layout, which must never tell of images that a crash can take away.
        files.sync()?;
        let (disk, dir) = (&*self.disk, files.dir().to_owned());
        if checked.layout_changed {
            let path = standby::layout_path(&dir, epoch);
            write_aside(disk, &path, &standby::layout_bytes(layout, &path)?)?;
        }
        if let Some(xml) = &checked.xml {
            write_aside(disk, &standby::xml_path(&dir, epoch), xml.as_bytes())?;
        }
        let device = standby::device_path(&dir, epoch);
        match &checked.device_state {
            Some(state) => write_aside(disk, &device, state)?,
            // A guest that has shut down has none, and a standby has the file all the same.
            None if last && !standby::is_there(disk, &device)? => write_aside(disk, &device, &[])?,
            None => {}
        }
        disk.sync_dir(&dir).map_err(JournalError::io("sync", &dir))
    }

    /// The seed is whole and durable: it becomes the standby, in one step, and what it replaces is removed after.
    fn commit_seed(&self, ingest: &mut IngestState, tail: &PartTail, layout: Arc<Layout>) -> Result<(), StoreError> {
        let first = ingest.journal.roll().map_err(|error| self.failure(error))?;
        // What is durable becomes points of the standby before; without space the sender tries again later.
        self.apply_all()?;
        let mut current = self.standby();
        if let Some(before) = current.as_mut().filter(|before| before.interrupted) {
            before.roll_back(self)?;
        }
        let Some(OpenEpoch { content: Content::Seed { dir, .. }, generation, epoch, .. }) = &ingest.open else {
            return Ok(());
        };
        let epoch = *epoch;
        let durable = Standby {
            dir: *dir,
            generation: *generation,
            epoch,
            cut_unix_ns: tail.cut_unix_ns,
            device_epoch: epoch,
            layout_epoch: epoch,
            xml_epoch: epoch,
            applying: epoch,
        };
        let log = HistoryLog::open(
            self.disk.clone(),
            &standby::history_dir(&self.standby_dir(durable.dir)),
            *self.uuid.as_bytes(),
            Place::default(),
        );
        let mut log = log.map_err(|error| self.failure(error))?;
        log.set_segment_bytes(self.options.history_segment_bytes);
        // The standby before, for the points in it, if it is exactly one epoch.
        let chain = current.as_ref().filter(|before| !before.interrupted && before.blind_until <= before.durable.epoch);
        let chain = chain.map(|before| vmdr_journal::Chain { standby: before.durable, history: before.mark });
        let chain = chain.filter(|chain| self.keeps_chain(chain));
        let mark = HistoryMark { floor: epoch, application: tail.application, ..HistoryMark::default() };
        let sums = small_sums(&*self.disk, &self.standby_dir(durable.dir), &durable);
        let sums = sums.map_err(|error| self.failure(error))?;
        self.change_control(|control| {
            control.standby = Some(durable);
            control.history = mark;
            control.chains.extend(chain);
            control.seed = None;
            control.journal_first = first;
            control.damage = None;
            control.put_small_sums(sums);
        })?;
        let Some(OpenEpoch { content: Content::Seed { mut files, .. }, .. }) = ingest.open.take() else {
            return Ok(());
        };
        files.give_up_part(layout.clone());
        let applier = Applier::new(*files, log, durable, mark, Some(sums)).map_err(|error| self.failure(error))?;
        let before = current.replace(applier);
        self.catalog().seeded(Chain::begin(durable, tail.application), chain.is_some());
        ingest.layout = Some(layout);
        {
            let mut shared = self.shared();
            let generation = shared.position.generation;
            shared.position = Position { generation, epoch, open_epoch: 0, open_parts: 0 };
            shared.point_generation = durable.generation;
            shared.cut_unix_ns = tail.cut_unix_ns;
            shared.backlog.clear();
            shared.backlog_bytes = 0;
            (shared.applied, shared.synced) = (epoch, epoch);
            shared.open_segment = first;
            shared.stalled = None;
            shared.damage = None;
            self.changed.notify_all();
        }
        drop(current);
        // What is left of the old standby and journal is removed at the next open.
        match before {
            Some(before) if chain.is_some() => self.measure_chain(before.durable.dir),
            Some(before) => self.doom_standby(before.durable.dir),
            None => {}
        }
        if let Err(error) = remove_segments_before(&*self.disk, &self.journal_dir(), first) {
            tracing::warn!(domain = %self.id, %error, "cannot remove the journal that a seed has replaced");
        }
        Ok(())
    }
}
