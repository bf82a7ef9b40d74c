//! Opening a domain's directory after whatever happened to it.
//!
//! The control record says what is certain: the standby up to its epoch, and a seed up to its parts. Whole epochs in the
//! journal beyond that are durable and are applied again; parts of the epoch after them are kept if they follow without a
//! gap. Where the journal is damaged, the epochs before that are the recovery point, the rest of it is moved aside, and
//! the damage is noted in the control record until a new seed is whole. If the standby was being brought to an epoch that
//! the journal does not reach any more, it may be a mixture: it is moved aside too, and there is no recovery point.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;
use uuid::Uuid;
use vmdr_codec::Layout;
use vmdr_journal::{
    Array, Control, Disk, HistoryLog, HistoryMark, HistoryScan, Journal, JournalError, Part, Standby, Torn,
};

use super::apply::Applier;
use super::catalog::{Catalog, Chain, Doomed};
use super::check::PartCheck;
use super::domain::{Content, Domain, Epoch, IngestState, OpenEpoch, Shared, standby_dir};
use super::flaws::{self, Flaw};
use super::images::StandbyFiles;
use super::rest;
use super::standby::{self, read_layout};
use super::thin::is_kept;
use super::verified;
use super::{EXPORTED_FILE, Position, StoreError, StoreOptions};

/// Prefix of a standby that may be a mixture, kept for a desperate operator until a new seed is whole.
const DAMAGED: &str = "damaged-standby.";

/// Follows the journal from the control record's epoch on.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub standby: Option<Standby>,
    pub layout: Option<Arc<Layout>>,
    pub epochs: Vec<Epoch>,
    pub open: Option<OpenEpoch>,
    pub broken: Option<String>,
}

impl Domain {
    /// Opens the directory `dir` of domain `uuid`; with `new`, a name and generation, one that has nothing in it is begun.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        uuid: Uuid,
        options: StoreOptions,
        new: Option<(&str, u64)>,
    ) -> Result<Arc<Self>, StoreError> {
        let id = uuid.to_string();
        let of = |error| StoreError::of(&id, error);
        let rest::Place { disk, sealed, refused } = rest::place(&disk, dir, uuid, &options.keys, new.is_some())?;
        let mut control = load_or_begin(&disk, dir, uuid, new)?;
        sweep(&*disk, dir, &control).map_err(of)?;
        let opened = open_standby(&disk, dir, &mut control).map_err(of)?;
        let (mut applier, layout) = opened.map_or((None, None), |(applier, layout)| (Some(applier), Some(layout)));
        let (mut catalog, unread, spoilt) = open_history(&*disk, dir, &mut control).map_err(of)?;
        if let (Some(applier), Some(layout), Some(chain)) = (&applier, &layout, catalog.standby()) {
            chain.flaws = flaws::recheck(&*disk, applier.files.dir(), applier.durable.epoch, layout);
            // What is known already has been looked at: which points it concerns.
            let known = |flaw: &Flaw| chain.open_flaws().any(|known| known.array == flaw.array);
            let more: Vec<Flaw> = applier.small_flaws().into_iter().filter(|flaw| !known(flaw)).collect();
            chain.flaws.extend(more);
            let wide = |f: &Flaw| f.count > 1 && matches!(f.array, Array::Ram(_) | Array::Disk(_));
            let coarse = chain.open_flaws().any(wide);
            chain.coarse = coarse;
            if let damage @ 1.. = chain.open_flaws().count() {
                tracing::error!(domain = %id, damage, "the standby is known to be damaged");
                catalog.flaws_found = 1;
            }
        }
        if let Some(applier) = &mut applier {
            applier.mark.floor = control.history.floor;
            applier.log.set_segment_bytes(options.history_segment_bytes);
            if spoilt {
                applier.begin_segment().map_err(of)?;
            }
            if applier.blind_until > 0
                && let Some(chain) = catalog.standby()
            {
                // Before-images lead back from an epoch, and these images are none.
                chain.sets.clear();
            }
        }
        catalog.verified = verified::read(&*disk, dir);
        let seed = open_seed(&disk, dir, &mut control).map_err(of)?;
        let mut replay = Replay { standby: control.standby, layout, epochs: Vec::new(), open: None, broken: None };
        let mut visit = |part: &Part, payloads: &[Bytes]| replay.part(part, payloads);
        let journal =
            Journal::open(disk.clone(), &dir.join("journal"), *uuid.as_bytes(), control.journal_first, &mut visit);
        let (mut journal, recovered) = journal.map_err(of)?;
        journal.set_segment_bytes(options.segment_bytes);
        let durable = replay.durable();
        let harmful = recovered.damage.iter().find(|damage| damage.epoch == 0 || damage.epoch > durable);
        let broken = replay.broken.take().or(harmful.map(ToString::to_string));
        let mixed = control.standby.filter(|standby| standby.applying > durable);
        let broken = broken.or(mixed.and(recovered.torn.as_ref()).map(|torn| {
            let Torn { segment, offset, .. } = torn;
            format!("journal segment {segment} ends at offset {offset}, in what was durable before")
        }));
        let broken = broken.or(mixed.map(|_| "the end of the journal is missing".to_owned()));
        for damage in &recovered.damage {
            tracing::error!(domain = %id, %damage, recovery_point = durable, "the journal is damaged");
        }
        let open = match (seed, &broken) {
            (Some(seed), _) => Some(seed),
            // Its host may no longer write if the generation was raised since.
            (None, None) if replay.standby.is_some_and(|s| s.generation == control.generation) => replay.open.take(),
            (None, _) => None,
        };
        let layout = replay.layout.take();
        let mut shared = shared(&control, replay, open.as_ref(), &journal);
        shared.unsummed = applier.as_ref().map(|applier| applier.files.summed_bytes()).filter(|(done, all)| done < all);
        if let Some(unread) = unread {
            shared.damage.get_or_insert(unread);
        }
        let domain = Arc::new(Domain {
            uuid,
            id: id.clone(),
            dir: dir.to_owned(),
            disk,
            sealed,
            refused,
            options,
            ingest: Mutex::new(IngestState { journal, layout, open, part: None }),
            standby: Mutex::new(applier),
            control: Mutex::new(control),
            catalog: Mutex::new(catalog),
            shared: Mutex::new(shared),
            changed: Condvar::new(),
            thread: Mutex::new(None),
        });
        match (broken, mixed) {
            (Some(what), None) => domain.quarantine(&what, durable)?,
            (Some(what), Some(standby)) => domain.give_up(&what, standby)?,
            (None, _) => {}
        }
        let chains: Vec<u64> = domain.control().chains.iter().map(|chain| chain.standby.dir).collect();
        chains.into_iter().for_each(|dir| domain.measure_chain(dir));
        domain.remove_doomed();
        domain.start()?;
        Ok(domain)
    }

    /// Applies what is good, moves the journal aside and notes why.
    fn quarantine(&self, what: &str, durable: u64) -> Result<(), StoreError> {
        self.forget_exported()?;
        self.apply_all()?;
        let note = format!("{what}; the recovery point is epoch {durable}, later ones were lost, a new seed is needed");
        self.change_control(|control| control.damage = Some(note.clone()))?;
        let mut ingest = self.ingest();
        let first = ingest.journal.quarantine().map_err(|error| self.failure(error))?;
        self.change_control(|control| control.journal_first = first)?;
        let mut shared = self.shared();
        shared.open_segment = first;
        shared.damage = Some(note);
        Ok(())
    }
}

impl Domain {
    /// Epochs are lost, and others will have their numbers: what was exported under them is nothing to build on.
    fn forget_exported(&self) -> Result<(), StoreError> {
        let path = self.dir.join(EXPORTED_FILE);
        match self.disk.remove_file(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(self.failure(JournalError::io("remove", &path)(e))),
            Ok(()) => self.disk.sync_dir(&self.dir).map_err(|e| self.failure(JournalError::io("sync", &self.dir)(e))),
        }
    }

    /// Moves journal and standby aside and notes why: there is no recovery point.
    fn give_up(&self, what: &str, standby: Standby) -> Result<(), StoreError> {
        let Standby { dir, epoch, applying, .. } = standby;
        let aside = self.dir.join(format!("{DAMAGED}{dir}"));
        let note = format!(
            "{what}; the standby may be a mixture of epochs {epoch} to {applying} and was moved to {}: there is no \
             recovery point, a new seed is needed",
            aside.display()
        );
        tracing::error!(domain = %self.id, "{note}");
        self.forget_exported()?;
        let mut ingest = self.ingest();
        let mut files = self.standby();
        *files = None;
        let first = ingest.journal.quarantine().map_err(|error| self.failure(error))?;
        self.change_control(|control| {
            control.damage = Some(note.clone());
            control.standby = None;
            control.history = HistoryMark::default();
            control.journal_first = first;
        })?;
        {
            let mut catalog = self.catalog();
            if std::mem::take(&mut catalog.current) {
                catalog.chains.pop();
            }
        }
        let from = self.standby_dir(dir);
        self.disk.rename(&from, &aside).map_err(|e| self.failure(JournalError::io("move aside", &from)(e)))?;
        if matches!(ingest.open, Some(OpenEpoch { content: Content::Delta { .. }, .. })) {
            ingest.open = None;
        }
        ingest.layout = None;
        let mut shared = self.shared();
        let Position { generation, open_epoch, open_parts, .. } = shared.position;
        shared.position = Position { generation, epoch: 0, open_epoch, open_parts };
        if ingest.open.is_none() {
            (shared.position.open_epoch, shared.position.open_parts) = (0, 0);
        }
        shared.point_generation = 0;
        shared.cut_unix_ns = 0;
        shared.backlog.clear();
        shared.backlog_bytes = 0;
        (shared.applied, shared.synced) = (0, 0);
        shared.open_segment = first;
        shared.damage = Some(note);
        Ok(())
    }
}

/// The control record of `dir`. If there is none, and nothing else either, a new one.
fn load_or_begin(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    uuid: Uuid,
    new: Option<(&str, u64)>,
) -> Result<Control, StoreError> {
    let id = uuid.to_string();
    let of = |error| StoreError::of(&id, error);
    match Control::load(&**disk, dir, uuid.as_bytes()) {
        Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        other => {
            let control = other.map_err(of)?;
            Control::settle(&**disk, dir).map_err(of)?;
            return Ok(control);
        }
    }
    let names = match disk.list(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        other => other.map_err(JournalError::io("list", dir)).map_err(of)?,
    };
    if names.iter().any(|name| name.starts_with("standby.") || name.starts_with("journal")) {
        let what = format!("{} has no control record, but a standby or journal", dir.display());
        return Err(StoreError::Damaged { domain: id, what });
    }
    let Some((name, generation)) = new else { return Err(StoreError::Unknown(id)) };
    disk.create_dir_all(dir).map_err(JournalError::io("create", dir)).map_err(of)?;
    if let Some(parent) = dir.parent() {
        disk.sync_dir(parent).map_err(JournalError::io("sync", parent)).map_err(of)?;
    }
    let control = Control::new(*uuid.as_bytes(), name, generation);
    control.store(&**disk, dir).map_err(of)?;
    Ok(control)
}

/// Removes what a crash has left that the control record does not mention.
fn sweep(disk: &dyn Disk, dir: &Path, control: &Control) -> Result<(), JournalError> {
    let keep = [control.standby.map(|s| s.dir), control.seed.filter(|s| s.parts > 0).map(|s| s.dir)];
    let chains = control.chains.iter().map(|chain| chain.standby.dir);
    let keep: Vec<String> = keep.into_iter().flatten().chain(chains).map(|n| format!("standby.{n}")).collect();
    for name in disk.list(dir).map_err(JournalError::io("list", dir))? {
        let useless = name.starts_with("standby.") && !keep.contains(&name);
        if useless || (name.starts_with(DAMAGED) && control.damage.is_none()) {
            let path = dir.join(&name);
            if is_kept(disk, &path) {
                continue;
            }
            tracing::info!(path = %path.display(), "removing a standby that is not in use");
            disk.remove_dir_all(&path).map_err(JournalError::io("remove", &path))?;
        }
    }
    let Some(durable) = control.standby else { return Ok(()) };
    let dir = standby_dir(dir, durable.dir);
    let keep = [
        standby::device_path(&dir, durable.device_epoch),
        standby::layout_path(&dir, durable.layout_epoch),
        standby::xml_path(&dir, durable.xml_epoch),
    ];
    for name in disk.list(&dir).map_err(JournalError::io("list", &dir))? {
        let path = dir.join(&name);
        let ours = ["device-", "layout-", "domain-"].iter().any(|prefix| name.starts_with(prefix));
        if ours && !keep.contains(&path) {
            disk.remove_file(&path).map_err(JournalError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// The standby in use. If a batch was stopped it is taken back to where that began; where the before-images are damaged, or
/// of a version that had none, only the journal can bring it to an epoch again.
fn open_standby(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    control: &mut Control,
) -> Result<Option<(Applier, Arc<Layout>)>, JournalError> {
    let Some(durable) = control.standby else { return Ok(None) };
    let at = standby_dir(dir, durable.dir);
    let layout = Arc::new(read_layout(&**disk, &standby::layout_path(&at, durable.layout_epoch))?);
    let mut files = StandbyFiles::open(disk.clone(), &at, layout.clone())?;
    let mark = control.history;
    let mut blind_until = 0;
    if durable.applying > durable.epoch {
        let back = match mark.announced_for == durable.applying {
            true => files.roll_back(mark.committed, mark.announced, layout.clone()),
            false => Err(JournalError::Damaged {
                path: standby::history_dir(&at),
                what: "it has no before-images of what was being applied".to_owned(),
            }),
        };
        match back {
            Ok(()) => {
                control.standby = Some(Standby { applying: durable.epoch, ..durable });
                control.history = HistoryMark { announced: mark.committed, announced_for: durable.epoch, ..mark };
                control.store(&**disk, dir)?;
            }
            Err(error @ JournalError::Damaged { .. }) => {
                tracing::error!(%error, epoch = durable.epoch, "the standby cannot be taken back, the journal is needed");
                files.forget(layout.clone());
                files.drop_sums()?;
                blind_until = durable.applying;
            }
            Err(error) => return Err(error),
        }
    }
    let (durable, mark) = (control.standby.unwrap_or(durable), control.history);
    let log = HistoryLog::open(disk.clone(), &standby::history_dir(&at), control.uuid, mark.committed)?;
    let sums = control.small_sums.iter().find(|sums| sums.dir == durable.dir).copied();
    if sums.is_none() {
        // A program that does not know of checksums may have changed the images since they were made.
        files.drop_sums()?;
    }
    let mut applier = Applier::new(files, log, durable, mark, sums)?;
    applier.blind_until = blind_until;
    Ok(Some((applier, layout)))
}

/// What the history of the standby, and of those before it, has; what of it cannot be read now, which keeps nobody from
/// protecting the guest: older points are only not offered; and whether that of the standby is damaged.
fn open_history(
    disk: &dyn Disk,
    dir: &Path,
    control: &mut Control,
) -> Result<(Catalog, Option<String>, bool), JournalError> {
    let mut catalog = Catalog { current: control.standby.is_some(), ..Catalog::default() };
    let current = control.standby.map(|standby| vmdr_journal::Chain { standby, history: control.history });
    let mut missing = Vec::new();
    let (mut unread, mut spoilt) = (None, false);
    for of in control.chains.iter_mut().chain(&mut current.clone()) {
        let history = standby::history_dir(&standby_dir(dir, of.standby.dir));
        let scan = match HistoryScan::read(disk, &history, &control.uuid, of.history.committed) {
            Err(error @ JournalError::Io { .. }) => {
                tracing::error!(%error, "the history cannot be read: older points are not offered");
                unread.get_or_insert(format!("{error}; older points cannot be had until that can be read"));
                let chain = Chain::begin(of.standby, of.history.application);
                let flaws = flaws::read(disk, &standby_dir(dir, of.standby.dir));
                catalog.chains.push(Chain { unread: true, flaws, ..chain });
                spoilt = false;
                continue;
            }
            scan => scan?,
        };
        // That of the standby comes last.
        spoilt = !scan.damage.is_empty();
        let (mut chain, lost) = Chain::new(of.standby, &of.history, &scan);
        chain.flaws = flaws::read(disk, &standby_dir(dir, of.standby.dir));
        if let Some(lost) = lost {
            tracing::error!(damage = %lost, "history");
            of.history.floor = chain.floor();
            missing.push((of.standby.dir, of.history.floor, lost));
        }
        let open = if of.history.committed.offset < u64::MAX { of.history.committed.segment } else { 0 };
        for number in vmdr_journal::segments(disk, &history)? {
            if number != open && !chain.sets.iter().any(|set| set.segment == number) {
                catalog.doom(Doomed::Segment(of.standby.dir, number));
            }
        }
        catalog.chains.push(chain);
    }
    for (dir, floor, lost) in missing {
        if current.is_some_and(|current| current.standby.dir == dir) {
            control.history.floor = floor;
        }
        control.damage.get_or_insert(lost);
    }
    Ok((catalog, unread, spoilt && current.is_some()))
}

/// The seed that was under way. One that cannot be continued is forgotten: nothing is lost but time.
fn open_seed(disk: &Arc<dyn Disk>, dir: &Path, control: &mut Control) -> Result<Option<OpenEpoch>, JournalError> {
    let Some(seed) = control.seed else { return Ok(None) };
    let staging = standby_dir(dir, seed.dir);
    let open = || {
        let layout = Arc::new(read_layout(&**disk, &standby::layout_path(&staging, seed.epoch))?);
        let mut files = StandbyFiles::open(disk.clone(), &staging, layout.clone())?;
        // A part may have been on its way: what of it is in the images is in no order that sums could tell of.
        files.drop_sums()?;
        let names = disk.list(&staging).map_err(JournalError::io("list", &staging))?;
        let xml = standby::xml_path(&staging, seed.epoch);
        let has_xml = names.iter().any(|name| staging.join(name) == xml);
        Ok::<_, JournalError>((layout, files, has_xml))
    };
    let current = seed.generation == control.generation && seed.parts > 0;
    match open() {
        Ok((layout, files, has_xml)) if current => Ok(Some(OpenEpoch {
            generation: seed.generation,
            epoch: seed.epoch,
            parts: seed.parts,
            layout: Some(layout),
            content: Content::Seed { files: Box::new(files), dir: seed.dir, has_xml },
        })),
        // A disk that does not answer now may later: what was acknowledged of the seed is kept.
        Err(error @ JournalError::Io { .. }) if current && !error.is_missing() => Err(error),
        result => {
            if let (true, Err(error)) = (current, result) {
                tracing::warn!(%error, epoch = seed.epoch, "the seed under way cannot be continued and is forgotten");
            }
            control.seed = None;
            control.store(&**disk, dir)?;
            disk.remove_dir_all(&staging).map_err(JournalError::io("remove", &staging))?;
            Ok(None)
        }
    }
}

fn shared(control: &Control, replay: Replay, open: Option<&OpenEpoch>, journal: &Journal) -> Shared {
    let standby = control.standby;
    let mut shared = Shared {
        name: control.name.clone(),
        position: Position {
            generation: control.generation,
            epoch: replay.durable(),
            open_epoch: open.filter(|open| open.parts > 0).map_or(0, |open| open.epoch),
            open_parts: open.map_or(0, |open| open.parts),
        },
        point_generation: standby.map_or(0, |standby| standby.generation),
        cut_unix_ns: replay
            .epochs
            .last()
            .map(|epoch| epoch.cut_unix_ns)
            .or(standby.map(|s| s.cut_unix_ns))
            .unwrap_or(0),
        backlog_bytes: replay.epochs.iter().map(|epoch| epoch.bytes).sum(),
        applied: standby.map_or(0, |standby| standby.epoch),
        synced: standby.map_or(0, |standby| standby.epoch),
        open_segment: journal.segment(),
        damage: control.damage.clone(),
        frozen: control.frozen,
        backlog: replay.epochs.into_iter().map(Arc::new).collect(),
        ..Shared::default()
    };
    if let Some(OpenEpoch { content: Content::Delta { parts, .. }, .. }) = open
        && let Some(part) = parts.first()
    {
        shared.open_segment = part.segment;
    }
    shared
}

impl Replay {
    /// The newest epoch that is durable: in the standby, or whole in the journal.
    pub fn durable(&self) -> u64 {
        let standby = self.standby.map_or(0, |standby| standby.epoch);
        self.epochs.last().map_or(standby, |epoch| epoch.epoch)
    }

    pub fn part(&mut self, part: &Part, payloads: &[Bytes]) {
        let Some(standby) = self.standby else { return };
        if self.broken.is_some() || part.head.generation != standby.generation || part.head.epoch <= standby.epoch {
            return;
        }
        if let Err(what) = self.follow(part, payloads) {
            self.broken = Some(format!("journal segment {}, epoch {}: {what}", part.segment, part.head.epoch));
        }
    }

    fn follow(&mut self, part: &Part, payloads: &[Bytes]) -> Result<(), String> {
        let next = self.durable() + 1;
        if part.head.epoch < next {
            return Err(format!("it comes again after epoch {}", next - 1));
        }
        if part.head.epoch > next {
            return Err(format!("epoch {next} is damaged or missing before it"));
        }
        if part.head.part == 0 {
            self.open = Some(OpenEpoch {
                generation: part.head.generation,
                epoch: part.head.epoch,
                parts: 0,
                layout: self.layout.clone(),
                content: Content::Delta { parts: Vec::new(), payloads: None, bytes: 0 },
            });
        }
        let Some(open) = self.open.as_mut().filter(|open| open.parts == part.head.part) else {
            return Err(format!("part {} does not follow, one before it is damaged or missing", part.head.part));
        };
        let mut check = PartCheck::new(open.layout.clone());
        payloads.iter().try_for_each(|payload| check.content(payload))?;
        open.layout = check.end(&part.tail)?.layout;
        open.parts += 1;
        let Content::Delta { parts, bytes, .. } = &mut open.content else { return Ok(()) };
        parts.push(part.clone());
        *bytes += part.tail.payload_bytes;
        if part.tail.last {
            self.epochs.push(Epoch {
                epoch: part.head.epoch,
                cut_unix_ns: part.tail.cut_unix_ns,
                parts: std::mem::take(parts),
                payloads: None,
                bytes: *bytes,
            });
            self.layout = open.layout.take();
            self.open = None;
        }
        Ok(())
    }
}
