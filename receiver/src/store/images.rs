//! The images of a standby, and how payloads become their content.
//!
//! A seed grows in a directory that is of no use before it is whole: its payloads are written as they come. The standby that
//! is in use is changed in three steps instead, which the caller calls in this order: [`StandbyFiles::record`] gathers
//! writes in memory and what they replace in the history; the history is made durable; [`StandbyFiles::flush`] writes.
//! Whatever happens then, [`StandbyFiles::roll_back`] brings back what was there before.
//!
//! Beside each image lie checksums of its units ([`super::sums`]), which go forward and back with it. What is read of an
//! image to be kept in the history is checked against them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmdr_codec::{
    Assembler, DEVICE_STATE_BYTES_MAX, DISK_PIECE_BYTES_MAX, DOMAIN_XML_BYTES_MAX, Layout, PAGE_BYTES, PageData,
    RamPages, Record,
};
use vmdr_journal::{Array, Disk, File, JournalError, Mode, Place, UNIT_BYTES, read_back, unit_sum, write_all};

use super::flaws::Flaw;
use super::pending::{Flawed, Pending, Recorder, Run, Source};
use super::standby::{disk_path, history_dir, ram_path};
use super::sums::{self, Sums, is_unreadable, units};

/// Pages written at once.
const RUN_PAGES: usize = 256;
/// Shorter runs of zero pages are written: punching costs more, and splits the image into many extents.
const PUNCH_BYTES_MIN: u64 = 64 << 10;
/// Bytes of a range that becomes zero that are recorded at once: so much of before-images at most comes in between two looks
/// at how much is pending.
pub(super) const ZERO_BYTES: u64 = 16 << 20;

static ZEROES: [u8; PUNCH_BYTES_MIN as usize] = [0; PUNCH_BYTES_MIN as usize];

/// An open standby directory.
#[derive(Debug)]
pub(super) struct StandbyFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    layout: Arc<Layout>,
    ram: Vec<Image>,
    disks: Vec<Image>,
    names_changed: bool,
    device_state: Assembler,
    xml: Assembler,
    brought: Brought,
    pending: Pending,
    run: Vec<u8>,
    piece: Box<[u8; DISK_PIECE_BYTES_MAX]>,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: Box<dyn File>,
    /// The length that it has to have; the file has it after the next flush.
    length: u64,
    resized: bool,
    dirty: bool,
    /// `None`: there are none yet.
    sums: Option<Sums>,
}

/// What was applied beside pages and extents since it was last taken.
#[derive(Debug, Default)]
pub(super) struct Brought {
    /// A device state.
    pub device_state: Option<Vec<u8>>,
    /// A layout; [`StandbyFiles::layout`] has it.
    pub layout: bool,
    /// A domain XML.
    pub xml: Option<Vec<u8>>,
}

impl StandbyFiles {
    /// A new directory without anything in it.
    pub fn create(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, JournalError> {
        disk.remove_dir_all(dir).map_err(JournalError::io("remove", dir))?;
        for sub in ["ram", "disk"] {
            let path = dir.join(sub);
            disk.create_dir_all(&path).map_err(JournalError::io("create", &path))?;
        }
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).map_err(JournalError::io("sync", parent))?;
        }
        Ok(Self::with(disk, dir))
    }

    /// A directory that has this layout, or something between it and that of an epoch that is to be applied again.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, layout: Arc<Layout>) -> Result<Self, JournalError> {
        let mut files = Self::with(disk, dir);
        for (block, of) in layout.ram.iter().enumerate() {
            let image = files.image(ram_path(dir, block), false, of.pages() * PAGE_BYTES as u64)?;
            files.ram.push(image);
        }
        for of in &layout.disks {
            let image = files.image(disk_path(dir, &of.target), false, of.size_bytes)?;
            files.disks.push(image);
        }
        files.layout = layout;
        Ok(files)
    }

    fn with(disk: Arc<dyn Disk>, dir: &Path) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            layout: Arc::default(),
            ram: Vec::new(),
            disks: Vec::new(),
            names_changed: true,
            device_state: Assembler::new("device state", DEVICE_STATE_BYTES_MAX),
            xml: Assembler::new("domain XML", DOMAIN_XML_BYTES_MAX),
            brought: Brought::default(),
            pending: Pending::default(),
            run: Vec::with_capacity(RUN_PAGES * PAGE_BYTES),
            piece: Box::new([0; DISK_PIECE_BYTES_MAX]),
        }
    }

    /// The disk.
    pub fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The layout that holds after what was applied.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What was applied beside pages and extents since this was last asked.
    pub fn take_brought(&mut self) -> Brought {
        std::mem::take(&mut self.brought)
    }

    /// Forgets what an unfinished part brought; its pages and extents stay, until they are written again.
    pub fn give_up_part(&mut self, layout: Arc<Layout>) {
        self.layout = layout;
        self.brought = Brought::default();
        self.device_state = Assembler::new("device state", DEVICE_STATE_BYTES_MAX);
        self.xml = Assembler::new("domain XML", DOMAIN_XML_BYTES_MAX);
    }

    /// Writes a payload of a seed, whose records were checked against the layout.
    pub fn write(&mut self, payload: &[u8]) -> Result<(), JournalError> {
        for record in vmdr_codec::decode(payload) {
            let record = record.map_err(|e| unusable(&self.dir, e))?;
            self.apply(record, None)?;
        }
        Ok(())
    }

    /// Gathers a record of a delta, and what it replaces. A range that becomes zero must have no more than [`ZERO_BYTES`]:
    /// see [`StandbyFiles::zeroed_by`] for what a layout makes zero.
    pub fn record(&mut self, record: Record<'_>, to: &mut Recorder<'_>) -> Result<(), JournalError> {
        self.apply(record, Some(to))
    }

    /// The units that were found to be damaged while writes to them were gathered, since this was last asked.
    pub fn take_flawed(&mut self) -> Vec<Flawed> {
        self.pending.take_flawed()
    }

    /// How much of the images has checksums, and how much there is, in bytes. Equal: all of it.
    pub fn summed_bytes(&self) -> (u64, u64) {
        let all = self.ram.iter().chain(&self.disks);
        all.fold((0, 0), |(done, all), image| {
            let built = image.sums.as_ref().map_or(0, Sums::built).saturating_mul(UNIT_BYTES as u64);
            (done + built.min(image.length), all + image.length)
        })
    }

    /// The images that there are, and their lengths.
    pub fn images(&self) -> Vec<(Array, u64)> {
        let ram = self.ram.iter().enumerate().map(|(n, image)| (Array::Ram(n as u16), image.length));
        let disks = self.disks.iter().enumerate().map(|(n, image)| (Array::Disk(n as u16), image.length));
        ram.chain(disks).filter(|(_, length)| *length > 0).collect()
    }

    /// The first unit from `unit` on that is not known to be zero; `u64::MAX`: none.
    pub fn next_unit(&self, array: Array, unit: u64) -> Result<u64, JournalError> {
        let image = find(&self.ram, &self.disks, array, &self.dir)?;
        let at = image.data_from(unit * UNIT_BYTES as u64)?;
        Ok(if at == u64::MAX { at } else { at / UNIT_BYTES as u64 })
    }

    /// Reads units, and says which of them do not match their checksums, or cannot be read. The images must be exactly one
    /// epoch.
    pub fn read_checked(&self, array: Array, first: u64, into: &mut [u8]) -> Result<Vec<u64>, JournalError> {
        let image = find(&self.ram, &self.disks, array, &self.dir)?;
        let unread = image.read(into, first * UNIT_BYTES as u64)?;
        let mut sums = vec![0; into.len() / UNIT_BYTES];
        let known = Source::sums(image, first, &mut sums)?;
        let units = into.as_chunks::<UNIT_BYTES>().0.iter().enumerate();
        let bad = units.filter(|(i, content)| {
            unread.binary_search(&(*i as u64)).is_ok() || (*i < known && unit_sum(content) != sums[*i])
        });
        Ok(bad.map(|(i, _)| first + i as u64).collect())
    }

    /// Whether there are images without checksums.
    pub fn lacks_sums(&self) -> bool {
        self.ram.iter().chain(&self.disks).any(lacks_sums)
    }

    /// Makes checksums where there are none, of at most `most` bytes of data. The images must be exactly one epoch. Returns
    /// how many were read (0: there was nothing to do), and what cannot be read.
    pub fn make_sums(&mut self, most: usize) -> Result<(u64, Vec<Flaw>), JournalError> {
        let Self { disk, ram, disks, .. } = self;
        let ram = ram.iter_mut().enumerate().map(|(n, image)| (Array::Ram(n as u16), image));
        let disks = disks.iter_mut().enumerate().map(|(n, image)| (Array::Disk(n as u16), image));
        let Some((array, image)) = ram.chain(disks).find(|(_, image)| lacks_sums(image)) else {
            return Ok((0, Vec::new()));
        };
        let mut sums = match image.sums.take() {
            Some(sums) => sums,
            None => Sums::begin(&**disk, &image.path)?,
        };
        let (unit_bytes, end) = (UNIT_BYTES as u64, units(image.length));
        let data = image.data_from(sums.built() * unit_bytes)? / unit_bytes;
        sums.skip_to(data.min(end));
        let count = (most.div_ceil(UNIT_BYTES) as u64).min(end - sums.built());
        let mut contents = vec![0; count as usize * UNIT_BYTES];
        let first = sums.built();
        let unread = image.read(&mut contents, first * unit_bytes)?;
        sums.add(&contents, &unread)?;
        if sums.built() >= end {
            sums.complete(&**disk, &image.path, end)?;
        }
        image.sums = Some(sums);
        let unread = unread.into_iter().map(|unit| Flaw::of(array, first + unit, 1));
        Ok(((contents.len() as u64).max(1), unread.collect()))
    }

    /// Of a standby that is only read: its checksums are not looked at.
    pub fn ignore_sums(&mut self) {
        self.ram.iter_mut().chain(&mut self.disks).for_each(|image| image.sums = None);
    }

    /// Forgets the checksums, because writes were interrupted that nothing takes back: they are made anew later. Durable with
    /// the next [`StandbyFiles::sync`].
    pub fn drop_sums(&mut self) -> Result<(), JournalError> {
        for image in self.ram.iter_mut().chain(&mut self.disks) {
            sums::remove(&*self.disk, &image.path)?;
            image.sums = None;
        }
        self.names_changed = true;
        Ok(())
    }

    /// Memory that gathered writes take.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// The ranges that have to become zero before this layout is recorded: blocks that go, shrink or become others.
    pub fn zeroed_by(&self, layout: &Layout) -> Vec<(Array, u64, u64)> {
        let mut ranges = Vec::new();
        let mut lost = |array, from: u64, to: u64| {
            if from < to {
                ranges.push((array, from, to - from));
            }
        };
        let (page, old) = (PAGE_BYTES as u64, &self.layout);
        for (i, before) in old.ram.iter().enumerate() {
            let same = layout.ram.get(i).filter(|after| after.name == before.name);
            lost(Array::Ram(i as u16), same.map_or(0, |after| after.pages() * page), before.pages() * page);
        }
        for (i, before) in old.disks.iter().enumerate() {
            let after = layout.disks.get(i).map_or(0, |after| after.size_bytes);
            lost(Array::Disk(i as u16), after, before.size_bytes);
        }
        ranges
    }

    /// Where from `offset` on there may be anything but zeroes, and not before; `u64::MAX`: nowhere.
    pub fn data_from(&self, array: Array, offset: u64) -> Result<u64, JournalError> {
        let Self { pending, ram, disks, dir, .. } = self;
        pending.data_from(find(ram, disks, array, dir)?, array, offset)
    }

    /// Gathers that a range becomes zero, and what it was.
    pub fn record_zero(
        &mut self,
        array: Array,
        offset: u64,
        length: u64,
        to: &mut Recorder<'_>,
    ) -> Result<(), JournalError> {
        let Self { pending, ram, disks, dir, .. } = self;
        pending.zero(find(ram, disks, array, dir)?, array, offset..offset + length, to)
    }

    /// Writes what was gathered. What it replaces must be durable.
    pub fn flush(&mut self) -> Result<(), JournalError> {
        let Self { pending, ram, disks, dir, .. } = self;
        for image in ram.iter_mut().chain(&mut *disks).filter(|image| image.resized) {
            set_length(image, image.length)?;
        }
        pending.drain(&mut |array, offset, run, sums| {
            let image = find_mut(ram, disks, array, dir)?;
            put(image, offset, run)?;
            put_sums(image, offset / UNIT_BYTES as u64, run, sums)
        })
    }

    /// Forgets what was gathered and not written: the images have `layout`, or what is not known until they are written.
    pub fn forget(&mut self, layout: Arc<Layout>) {
        self.pending.clear();
        self.ram.truncate(layout.ram.len());
        self.disks.truncate(layout.disks.len());
        for (image, block) in self.ram.iter_mut().zip(&layout.ram) {
            (image.length, image.resized) = (block.pages() * PAGE_BYTES as u64, true);
        }
        for (image, disk) in self.disks.iter_mut().zip(&layout.disks) {
            (image.length, image.resized) = (disk.size_bytes, true);
        }
        self.give_up_part(layout);
    }

    /// Takes the images back to where they were at `from` in the history, which had `layout`, and makes that durable.
    pub fn roll_back(&mut self, from: Place, to: Place, layout: Arc<Layout>) -> Result<(), JournalError> {
        self.forget(layout);
        for image in self.ram.iter_mut().chain(&mut self.disks) {
            set_length(image, image.length)?;
        }
        let Self { disk, ram, disks, dir, .. } = self;
        read_back(&**disk, &history_dir(dir), from, to, &mut |entry, content| {
            let (key, count) = (entry.key, entry.count);
            let small = matches!(key.array, Array::Device | Array::Xml | Array::Layout);
            let there = |images: &[Image], n: u16| usize::from(n) < images.len();
            let gone = match key.array {
                Array::Ram(n) => !there(ram, n),
                Array::Disk(n) => !there(disks, n),
                _ => false,
            };
            if small || gone {
                return Ok(());
            }
            let image = find_mut(ram, disks, key.array, dir)?;
            let run = match content {
                Some(content) => Run::Data(content),
                None => Run::Zero(u64::from(count) * UNIT_BYTES as u64),
            };
            put(image, key.unit * UNIT_BYTES as u64, run)?;
            put_sums(image, key.unit, run, &[entry.sum()])
        })?;
        self.sync()
    }

    /// Makes everything written durable, names included.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        for image in self.ram.iter_mut().chain(&mut self.disks) {
            if image.dirty {
                image.file.sync().map_err(JournalError::io("sync", &image.path))?;
                image.dirty = false;
            }
            if let Some(sums) = &mut image.sums {
                sums.sync()?;
            }
        }
        if self.names_changed {
            for dir in [self.dir.join("ram"), self.dir.join("disk"), self.dir.clone()] {
                self.disk.sync_dir(&dir).map_err(JournalError::io("sync", &dir))?;
            }
            self.names_changed = false;
        }
        Ok(())
    }

    fn apply(&mut self, record: Record<'_>, mut to: Option<&mut Recorder<'_>>) -> Result<(), JournalError> {
        match record {
            Record::RamPages(run) => self.pages(&run, to)?,
            Record::RamZero { block, first, pages } => {
                let page = PAGE_BYTES as u64;
                self.zero(Array::Ram(block), first * page, pages * page, to)?;
            }
            Record::DiskData { disk, offset, data } => {
                let Self { piece, pending, ram, disks, dir, .. } = self;
                let bytes = data.read(piece).map_err(|e| unusable(dir, e))?;
                let array = Array::Disk(disk);
                match &mut to {
                    Some(to) => pending.write(find(ram, disks, array, dir)?, array, offset, bytes, to)?,
                    None => seed(find_mut(ram, disks, array, dir)?, offset, Run::Data(bytes))?,
                }
            }
            Record::DiskZero { disk, offset, length } => self.zero(Array::Disk(disk), offset, length, to)?,
            Record::DeviceState { offset, total, bytes } => {
                self.device_state.add(offset, total, bytes).map_err(|e| unusable(&self.dir, e))?;
                if offset + bytes.len() as u64 == total {
                    self.brought.device_state = self.device_state.take().map_err(|e| unusable(&self.dir, e))?;
                }
            }
            Record::DomainXml { offset, total, bytes } => {
                self.xml.add(offset, total, bytes).map_err(|e| unusable(&self.dir, e))?;
                if offset + bytes.len() as u64 == total {
                    self.brought.xml = self.xml.take().map_err(|e| unusable(&self.dir, e))?;
                }
            }
            Record::Layout(layout) => self.set_layout(layout, to.is_some())?,
        }
        Ok(())
    }

    fn zero(
        &mut self,
        array: Array,
        offset: u64,
        length: u64,
        to: Option<&mut Recorder<'_>>,
    ) -> Result<(), JournalError> {
        match to {
            Some(to) => self.record_zero(array, offset, length, to),
            None => seed(find_mut(&mut self.ram, &mut self.disks, array, &self.dir)?, offset, Run::Zero(length)),
        }
    }

    fn pages(&mut self, run: &RamPages<'_>, mut to: Option<&mut Recorder<'_>>) -> Result<(), JournalError> {
        let mut start = run.first;
        self.run.clear();
        for page in run.pages() {
            let (number, data) = page.map_err(|e| unusable(&self.dir, e))?;
            if self.run.len() == RUN_PAGES * PAGE_BYTES {
                self.put_pages(run.block, start, &mut to)?;
                start = number;
            }
            match data {
                PageData::Zero => self.run.resize(self.run.len() + PAGE_BYTES, 0),
                PageData::Raw(bytes) => self.run.extend_from_slice(bytes),
                PageData::Lz4(_) => {
                    let at = self.run.len();
                    self.run.resize(at + PAGE_BYTES, 0);
                    let Ok(page) = (&mut self.run[at..]).try_into() else { continue };
                    data.read(page).map_err(|e| unusable(&self.dir, e))?;
                }
            }
        }
        self.put_pages(run.block, start, &mut to)
    }

    /// The pages in `run` go where they belong.
    fn put_pages(&mut self, block: u16, first: u64, to: &mut Option<&mut Recorder<'_>>) -> Result<(), JournalError> {
        let Self { run, pending, ram, disks, dir, .. } = self;
        let (array, offset) = (Array::Ram(block), first * PAGE_BYTES as u64);
        match to {
            Some(to) => pending.write(find(ram, disks, array, dir)?, array, offset, run, to)?,
            None => seed(find_mut(ram, disks, array, dir)?, offset, Run::Data(run))?,
        }
        run.clear();
        Ok(())
    }

    /// Gives the images the sizes of `layout`: at once, and emptying those that become others, or, if what is lost was
    /// gathered as zero already, with the next flush.
    fn set_layout(&mut self, layout: Layout, gathered: bool) -> Result<(), JournalError> {
        let old = self.layout.clone();
        let page = PAGE_BYTES as u64;
        for i in self.ram.len()..layout.ram.len() {
            let image = self.image(ram_path(&self.dir, i), true, 0)?;
            self.ram.push(image);
        }
        for of in &layout.disks[self.disks.len().min(layout.disks.len())..] {
            let image = self.image(disk_path(&self.dir, &of.target), true, 0)?;
            self.disks.push(image);
        }
        for (i, image) in self.ram.iter_mut().enumerate() {
            let (before, after) = (old.ram.get(i), layout.ram.get(i));
            let other = before.map(|b| &b.name) != after.map(|a| &a.name);
            if !gathered && other && image.length > 0 {
                set_length(image, 0)?;
            }
            change_length(image, after.map_or(0, |after| after.pages() * page), gathered)?;
        }
        for (i, image) in self.disks.iter_mut().enumerate() {
            if !gathered && old.disks.get(i).is_none() && image.length > 0 {
                set_length(image, 0)?;
            }
            change_length(image, layout.disks.get(i).map_or(0, |after| after.size_bytes), gathered)?;
        }
        self.layout = Arc::new(layout);
        self.brought.layout = true;
        Ok(())
    }

    fn image(&mut self, path: PathBuf, new: bool, length: u64) -> Result<Image, JournalError> {
        let mode = if new { Mode::Create } else { Mode::Write };
        let file = self.disk.open(&path, mode).map_err(JournalError::io("open", &path))?;
        let sums = match new {
            true => Some(Sums::create(&*self.disk, &path)?),
            false => Sums::open(&*self.disk, &path, Mode::Write)?,
        };
        self.names_changed |= new;
        // What an earlier process wrote may not be on the disk, and is not written again if it is in no later epoch.
        Ok(Image { path, file, length, resized: false, dirty: true, sums })
    }
}

impl Source for Image {
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<Vec<u64>, JournalError> {
        read_units(&*self.file, &self.path, buffer, offset)
    }

    fn data_from(&self, offset: u64) -> Result<u64, JournalError> {
        // What is a hole and should not be one is something to look at, too.
        let sum = match &self.sums {
            Some(sums) => sums.data_from(offset / UNIT_BYTES as u64)?,
            None => u64::MAX,
        };
        let sum = sum.saturating_mul(UNIT_BYTES as u64).max(offset);
        if sum == offset {
            // Before the image is asked, which may have to look far.
            return Ok(offset);
        }
        let at = self.file.data_from(offset).map_err(JournalError::io("read", &self.path))?;
        let length = self.file.length().map_err(JournalError::io("read", &self.path))?;
        Ok(if at >= length { sum } else { at.min(sum) })
    }

    fn sums(&self, first: u64, into: &mut [u64]) -> Result<usize, JournalError> {
        self.sums.as_ref().map_or(Ok(0), |sums| sums.read(first, into))
    }

    fn length(&self) -> u64 {
        self.length
    }
}

/// Reads units of an image. Those that cannot be read are zero; returns which those are, counted from the first.
pub(super) fn read_units(
    file: &dyn File,
    path: &Path,
    buffer: &mut [u8],
    offset: u64,
) -> Result<Vec<u64>, JournalError> {
    match file.read_at(buffer, offset) {
        Ok(got) => {
            buffer[got..].fill(0);
            return Ok(Vec::new());
        }
        Err(error) if is_unreadable(&error) => {}
        Err(error) => return Err(JournalError::io("read", path)(error)),
    }
    let mut unread = Vec::new();
    for (i, unit) in buffer.chunks_mut(UNIT_BYTES).enumerate() {
        match file.read_at(unit, offset + (i * UNIT_BYTES) as u64) {
            Ok(got) => unit[got..].fill(0),
            Err(error) if is_unreadable(&error) => {
                tracing::warn!(path = %path.display(), offset = offset + (i * UNIT_BYTES) as u64, %error, "cannot be read");
                unit.fill(0);
                unread.push(i as u64);
            }
            Err(error) => return Err(JournalError::io("read", path)(error)),
        }
    }
    Ok(unread)
}

fn lacks_sums(image: &Image) -> bool {
    image.sums.as_ref().is_none_or(|sums| sums.built() != u64::MAX)
}

fn unusable(dir: &Path, error: vmdr_codec::CodecError) -> JournalError {
    JournalError::Damaged { path: dir.to_owned(), what: format!("what is to be applied: {error}") }
}

fn missing(dir: &Path, array: Array) -> JournalError {
    let what = format!("what is to be applied: {array:?} is not in the layout");
    JournalError::Damaged { path: dir.to_owned(), what }
}

fn find<'a>(ram: &'a [Image], disks: &'a [Image], array: Array, dir: &Path) -> Result<&'a Image, JournalError> {
    let found = match array {
        Array::Ram(n) => ram.get(usize::from(n)),
        Array::Disk(n) => disks.get(usize::from(n)),
        Array::Device | Array::Xml | Array::Layout => None,
    };
    found.ok_or_else(|| missing(dir, array))
}

fn find_mut<'a>(
    ram: &'a mut [Image],
    disks: &'a mut [Image],
    array: Array,
    dir: &Path,
) -> Result<&'a mut Image, JournalError> {
    let found = match array {
        Array::Ram(n) => ram.get_mut(usize::from(n)),
        Array::Disk(n) => disks.get_mut(usize::from(n)),
        Array::Device | Array::Xml | Array::Layout => None,
    };
    found.ok_or_else(|| missing(dir, array))
}

/// Writes what of a run lies within the image.
fn put(image: &mut Image, offset: u64, run: Run<'_>) -> Result<(), JournalError> {
    let room = image.length.saturating_sub(offset);
    match run {
        Run::Data(bytes) => write(image, &bytes[..(bytes.len() as u64).min(room) as usize], offset),
        Run::Zero(length) if length.min(room) < PUNCH_BYTES_MIN => {
            write(image, &ZEROES[..length.min(room) as usize], offset)
        }
        Run::Zero(length) => {
            image.dirty = true;
            image.file.zero(offset, length.min(room)).map_err(JournalError::io("zero", &image.path))
        }
    }
}

/// Notes the checksums of a run of units that was written.
fn put_sums(image: &mut Image, first: u64, run: Run<'_>, of: &[u64]) -> Result<(), JournalError> {
    let room = units(image.length).saturating_sub(first);
    let Some(sums) = image.sums.as_mut().filter(|_| room > 0) else { return Ok(()) };
    match run {
        Run::Data(_) => sums.write(first, &of[..of.len().min(room as usize)]),
        // Zeroes that do not have the sum of zeroes: something that is damaged was written over in part.
        Run::Zero(_) if of.first().is_some_and(|sum| *sum != 0) => {
            sums.write(first, &of[..of.len().min(room as usize)])
        }
        Run::Zero(length) => sums.zero(first, units(length).min(room)),
    }
}

/// Writes a run of a seed, with its checksums. After an error they may not be those of the image until the same is written
/// again, which the sender does.
fn seed(image: &mut Image, offset: u64, run: Run<'_>) -> Result<(), JournalError> {
    put(image, offset, run)?;
    let Some(mut sums) = image.sums.take() else { return Ok(()) };
    let result = sum_seed(image, &mut sums, offset, run);
    image.sums = Some(sums);
    result
}

fn sum_seed(image: &Image, sums: &mut Sums, offset: u64, run: Run<'_>) -> Result<(), JournalError> {
    let unit_bytes = UNIT_BYTES as u64;
    let end = match run {
        Run::Data(bytes) => offset + bytes.len() as u64,
        Run::Zero(length) => offset.saturating_add(length),
    };
    let end = end.min(image.length);
    // Of units that were written in part, all is read.
    let mut part = |unit: u64| {
        let mut content = [0; UNIT_BYTES];
        if !image.read(&mut content, unit * unit_bytes)?.is_empty() {
            return Err(JournalError::io("read", &image.path)(std::io::Error::from_raw_os_error(5)));
        }
        sums.write(unit, &[unit_sum(&content)])
    };
    let (first, last) = (offset.div_ceil(unit_bytes), end / unit_bytes);
    if !offset.is_multiple_of(unit_bytes) && offset < end {
        part(offset / unit_bytes)?;
    }
    if !end.is_multiple_of(unit_bytes) && end > offset && last * unit_bytes >= offset {
        part(last)?;
    }
    if first >= last {
        return Ok(());
    }
    match run {
        Run::Zero(_) => sums.zero(first, last - first),
        Run::Data(bytes) => {
            let whole = &bytes[(first * unit_bytes - offset) as usize..(last * unit_bytes - offset) as usize];
            let all: Vec<u64> = whole.as_chunks::<UNIT_BYTES>().0.iter().map(unit_sum).collect();
            sums.write(first, &all)
        }
    }
}

fn write(image: &mut Image, bytes: &[u8], offset: u64) -> Result<(), JournalError> {
    if bytes.is_empty() {
        return Ok(());
    }
    image.dirty = true;
    write_all(&*image.file, bytes, offset).map_err(JournalError::io("write", &image.path))
}

fn change_length(image: &mut Image, length: u64, later: bool) -> Result<(), JournalError> {
    if image.length == length {
        return Ok(());
    }
    if !later {
        return set_length(image, length);
    }
    (image.length, image.resized) = (length, true);
    Ok(())
}

fn set_length(image: &mut Image, length: u64) -> Result<(), JournalError> {
    image.dirty = true;
    image.file.set_length(length).map_err(JournalError::io("resize", &image.path))?;
    (image.length, image.resized) = (length, false);
    if let Some(sums) = &mut image.sums {
        sums.set_units(units(length))?;
    }
    Ok(())
}
