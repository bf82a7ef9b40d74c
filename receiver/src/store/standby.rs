//! The files of a standby directory, and how payloads become their content.
//!
//! Writing is idempotent: applying the same epochs again, in order, from the state of the control record's epoch on, gives
//! the same files whatever was applied before a crash. For that, what holds only from a certain epoch on (layout, device
//! state, XML) is in files named after the epoch, and the control record says which.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmdr_codec::{
    Assembler, DEVICE_STATE_BYTES_MAX, DISK_PIECE_BYTES_MAX, DOMAIN_XML_BYTES_MAX, Layout, PAGE_BYTES, PageData,
    RamPages, Record,
};
use vmdr_journal::{Disk, File, JournalError, Mode, write_all};

/// Pages written at once.
const RUN_PAGES: usize = 256;
/// Shorter runs of zero pages are written: punching costs more, and splits the image into many extents.
const PUNCH_BYTES_MIN: u64 = 64 << 10;
/// The longest layout file read: what [`vmdr_codec`]'s limits amount to is far less.
const LAYOUT_BYTES_MAX: u64 = 4 << 20;

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
    run: Vec<u8>,
    piece: Box<[u8; DISK_PIECE_BYTES_MAX]>,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: Box<dyn File>,
    dirty: bool,
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

/// The path of RAM block `block`'s image.
pub(super) fn ram_path(dir: &Path, block: usize) -> PathBuf {
    dir.join("ram").join(format!("{block}.img"))
}

/// The path of a disk's image.
pub(super) fn disk_path(dir: &Path, target: &str) -> PathBuf {
    dir.join("disk").join(format!("{target}.raw"))
}

/// The path of the device state of `epoch`.
pub(super) fn device_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("device-{epoch}.state"))
}

/// The path of the layout that holds from `epoch` on.
pub(super) fn layout_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("layout-{epoch}"))
}

/// The path of the XML that holds from `epoch` on.
pub(super) fn xml_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("domain-{epoch}.xml"))
}

/// Reads a layout file.
pub(super) fn read_layout(disk: &dyn Disk, path: &Path) -> Result<Layout, JournalError> {
    let bytes = read_small(disk, path, LAYOUT_BYTES_MAX)?;
    let damaged = |what: String| JournalError::Damaged { path: path.to_owned(), what };
    let Some((body, sum)) = bytes.split_at_checked(bytes.len().saturating_sub(8)) else {
        return Err(damaged("it is too short".to_owned()));
    };
    if sum != vmdr_codec::chunk_hash(body).to_le_bytes() {
        return Err(damaged("its checksum does not match".to_owned()));
    }
    Layout::from_bytes(body).map_err(|e| damaged(e.to_string()))
}

/// The content of a layout file.
pub(super) fn layout_bytes(layout: &Layout, path: &Path) -> Result<Vec<u8>, JournalError> {
    let what = |e: vmdr_codec::CodecError| JournalError::Damaged { path: path.to_owned(), what: e.to_string() };
    let mut bytes = layout.to_bytes().map_err(what)?;
    let sum = vmdr_codec::chunk_hash(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    Ok(bytes)
}

/// Reads a file of at most `max` bytes.
pub(super) fn read_small(disk: &dyn Disk, path: &Path, max: u64) -> Result<Vec<u8>, JournalError> {
    let file = disk.open(path, Mode::Read).map_err(JournalError::io("open", path))?;
    let length = file.length().map_err(JournalError::io("read", path))?;
    if length > max {
        let what = format!("it has {length} bytes, at most {max} are possible");
        return Err(JournalError::Damaged { path: path.to_owned(), what });
    }
    let mut bytes = vec![0; length as usize];
    let got = file.read_at(&mut bytes, 0).map_err(JournalError::io("read", path))?;
    bytes.truncate(got);
    Ok(bytes)
}

/// Makes a file with this content appear as a whole, durable once its directory is synced.
pub(super) fn write_aside(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), JournalError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let file = disk.open(&new, Mode::Create).map_err(JournalError::io("create", &new))?;
    write_all(&*file, bytes, 0).map_err(JournalError::io("write", &new))?;
    file.sync().map_err(JournalError::io("sync", &new))?;
    disk.rename(&new, path).map_err(JournalError::io("rename", &new))
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
        for block in 0..layout.ram.len() {
            let image = files.image(ram_path(dir, block), false)?;
            files.ram.push(image);
        }
        for of in &layout.disks {
            let image = files.image(disk_path(dir, &of.target), false)?;
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
            run: Vec::with_capacity(RUN_PAGES * PAGE_BYTES),
            piece: Box::new([0; DISK_PIECE_BYTES_MAX]),
        }
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

    /// Applies a payload, whose records were checked against the layout.
    pub fn apply(&mut self, payload: &[u8]) -> Result<(), JournalError> {
        for record in vmdr_codec::decode(payload) {
            match record.map_err(|e| self.unusable(e))? {
                Record::RamPages(run) => self.pages(&run)?,
                Record::RamZero { block, first, pages } => {
                    let page = PAGE_BYTES as u64;
                    let image = image(&mut self.ram, block, &self.dir)?;
                    zero(image, first * page, pages * page)?;
                }
                Record::DiskData { disk, offset, data } => {
                    let bytes = data.read(&mut self.piece).map_err(|e| unusable(&self.dir, e))?;
                    let image = image(&mut self.disks, disk, &self.dir)?;
                    write(image, bytes, offset)?;
                }
                Record::DiskZero { disk, offset, length } => {
                    zero(image(&mut self.disks, disk, &self.dir)?, offset, length)?;
                }
                Record::DeviceState { offset, total, bytes } => {
                    self.device_state.add(offset, total, bytes).map_err(|e| self.unusable(e))?;
                    if offset + bytes.len() as u64 == total {
                        self.brought.device_state = self.device_state.take().map_err(|e| self.unusable(e))?;
                    }
                }
                Record::DomainXml { offset, total, bytes } => {
                    self.xml.add(offset, total, bytes).map_err(|e| self.unusable(e))?;
                    if offset + bytes.len() as u64 == total {
                        self.brought.xml = self.xml.take().map_err(|e| self.unusable(e))?;
                    }
                }
                Record::Layout(layout) => self.set_layout(layout)?,
            }
        }
        Ok(())
    }

    /// Makes everything applied durable, names included.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        for image in self.ram.iter_mut().chain(&mut self.disks) {
            if image.dirty {
                image.file.sync().map_err(JournalError::io("sync", &image.path))?;
                image.dirty = false;
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

    fn pages(&mut self, run: &RamPages<'_>) -> Result<(), JournalError> {
        let page_bytes = PAGE_BYTES as u64;
        let mut start = run.first;
        self.run.clear();
        for page in run.pages() {
            let (number, data) = page.map_err(|e| unusable(&self.dir, e))?;
            if self.run.len() == RUN_PAGES * PAGE_BYTES {
                write(image(&mut self.ram, run.block, &self.dir)?, &self.run, start * page_bytes)?;
                self.run.clear();
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
        write(image(&mut self.ram, run.block, &self.dir)?, &self.run, start * page_bytes)
    }

    /// Gives the images the sizes of `layout`. One whose block is now another is emptied.
    fn set_layout(&mut self, layout: Layout) -> Result<(), JournalError> {
        let old = self.layout.clone();
        for (i, block) in layout.ram.iter().enumerate() {
            let before = old.ram.get(i);
            if i >= self.ram.len() {
                let image = self.image(ram_path(&self.dir, i), true)?;
                self.ram.push(image);
            }
            let bytes = block.pages() * PAGE_BYTES as u64;
            if before.is_none_or(|before| before.name != block.name) {
                resize(&mut self.ram[i], 0)?;
            }
            if before.is_none_or(|before| before.name != block.name || before.used_bytes != block.used_bytes) {
                resize(&mut self.ram[i], bytes)?;
            }
        }
        for i in layout.ram.len()..old.ram.len() {
            resize(&mut self.ram[i], 0)?;
        }
        for (i, of) in layout.disks.iter().enumerate() {
            let before = old.disks.get(i);
            if i >= self.disks.len() {
                let image = self.image(disk_path(&self.dir, &of.target), true)?;
                self.disks.push(image);
            }
            if before.is_none() {
                resize(&mut self.disks[i], 0)?;
            }
            if before.is_none_or(|before| before.size_bytes != of.size_bytes) {
                resize(&mut self.disks[i], of.size_bytes)?;
            }
        }
        self.layout = Arc::new(layout);
        self.brought.layout = true;
        Ok(())
    }

    fn image(&mut self, path: PathBuf, new: bool) -> Result<Image, JournalError> {
        let mode = if new { Mode::Create } else { Mode::Write };
        let file = self.disk.open(&path, mode).map_err(JournalError::io("open", &path))?;
        self.names_changed |= new;
        // What an earlier process wrote may not be on the disk, and is not written again if it is in no later epoch.
        Ok(Image { path, file, dirty: true })
    }

    fn unusable(&self, error: vmdr_codec::CodecError) -> JournalError {
        unusable(&self.dir, error)
    }
}

fn unusable(dir: &Path, error: vmdr_codec::CodecError) -> JournalError {
    JournalError::Damaged { path: dir.to_owned(), what: format!("what is to be applied: {error}") }
}

fn image<'a>(images: &'a mut [Image], number: u16, dir: &Path) -> Result<&'a mut Image, JournalError> {
    let what = || format!("what is to be applied: image {number} is not in the layout");
    images.get_mut(usize::from(number)).ok_or_else(|| JournalError::Damaged { path: dir.to_owned(), what: what() })
}

fn write(image: &mut Image, bytes: &[u8], offset: u64) -> Result<(), JournalError> {
    image.dirty = true;
    write_all(&*image.file, bytes, offset).map_err(JournalError::io("write", &image.path))
}

fn zero(image: &mut Image, offset: u64, length: u64) -> Result<(), JournalError> {
    if length < PUNCH_BYTES_MIN {
        return write(image, &ZEROES[..length as usize], offset);
    }
    image.dirty = true;
    image.file.zero(offset, length).map_err(JournalError::io("zero", &image.path))
}

fn resize(image: &mut Image, length: u64) -> Result<(), JournalError> {
    image.dirty = true;
    image.file.set_length(length).map_err(JournalError::io("resize", &image.path))
}
