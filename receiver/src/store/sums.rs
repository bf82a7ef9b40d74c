//! Checksums of an image: `NAME.sums` beside `NAME.img` or `NAME.raw`, 8 bytes for each unit of 4 KiB.
//!
//! The checksum of a zero unit is 0 ([`vmdr_journal::unit_sum`]), so that a hole in the image is one here too: what is empty
//! costs nothing. Nothing of the file is kept in memory.
//!
//! Sums are written with what they are of, synced with it, and taken back with it: whenever a standby is exactly one epoch,
//! its sums are that epoch's. A file of this name is always complete. Those of an image that came without (of an older
//! version, or of a seed that a restart interrupted) are made by reading it ([`Sums::begin`]), under another name until all
//! units have been read; whatever is applied meanwhile is noted in the part that is there already.

use std::path::{Path, PathBuf};

use vmdr_journal::{Disk, File, JournalError, Mode, UNIT_BYTES, unit_sum, write_all};

/// Bytes of a sum.
const SUM_BYTES: u64 = 8;
/// Sums written, or read, at once.
pub(super) const RUN_SUMS: usize = 512;
/// The sum of a unit that cannot be read: none that a content has.
pub(super) const UNREADABLE: u64 = u64::MAX;
/// Shorter runs of zero sums are written; see the same of images.
const PUNCH_BYTES_MIN: u64 = 64 << 10;

static ZEROES: [u8; PUNCH_BYTES_MIN as usize] = [0; PUNCH_BYTES_MIN as usize];

/// The sums of an image, open.
#[derive(Debug)]
pub(super) struct Sums {
    file: Box<dyn File>,
    path: PathBuf,
    /// Units from here on are not known yet; `u64::MAX`: all are.
    built: u64,
    dirty: bool,
}

/// Where the sums of an image are.
pub(super) fn sums_path(image: &Path) -> PathBuf {
    image.with_extension("sums")
}

fn new_path(image: &Path) -> PathBuf {
    image.with_extension("sums.new")
}

/// Units of so many bytes.
pub(super) fn units(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT_BYTES as u64)
}

impl Sums {
    /// Of an image that is empty.
    pub fn create(disk: &dyn Disk, image: &Path) -> Result<Self, JournalError> {
        let path = sums_path(image);
        let file = disk.open(&path, Mode::Create).map_err(JournalError::io("create", &path))?;
        Ok(Self { file, path, built: u64::MAX, dirty: true })
    }

    /// Those there are of an image; `None`: none that are complete.
    pub fn open(disk: &dyn Disk, image: &Path, mode: Mode) -> Result<Option<Self>, JournalError> {
        let path = sums_path(image);
        match disk.open(&path, mode) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(JournalError::io("open", &path)(e)),
            Ok(file) => Ok(Some(Self { file, path, built: u64::MAX, dirty: true })),
        }
    }

    /// Begins to make those of an image.
    pub fn begin(disk: &dyn Disk, image: &Path) -> Result<Self, JournalError> {
        let path = new_path(image);
        let file = disk.open(&path, Mode::Create).map_err(JournalError::io("create", &path))?;
        Ok(Self { file, path, built: 0, dirty: true })
    }

    /// The first unit that is not known yet; `u64::MAX`: all are.
    pub fn built(&self) -> u64 {
        self.built
    }

    /// Says what the next units are that were not known; those in `unread`, counted from the first, cannot be read.
    pub fn add(&mut self, contents: &[u8], unread: &[u64]) -> Result<(), JournalError> {
        let first = self.built;
        let mut sums: Vec<u64> = contents.as_chunks::<UNIT_BYTES>().0.iter().map(unit_sum).collect();
        for unit in unread {
            if let Some(sum) = sums.get_mut(*unit as usize) {
                *sum = UNREADABLE;
            }
        }
        self.built = first + sums.len() as u64;
        for (i, run) in sums.chunks(RUN_SUMS).enumerate() {
            // What is zero is a hole already.
            if run.iter().any(|sum| *sum != 0) {
                self.write(first + (i * RUN_SUMS) as u64, run)?;
            }
        }
        Ok(())
    }

    /// Units up to this one are zero and need not be read.
    pub fn skip_to(&mut self, unit: u64) {
        self.built = self.built.max(unit);
    }

    /// All units are known: from now on the file is what its name says, also after a crash.
    pub fn complete(&mut self, disk: &dyn Disk, image: &Path, units: u64) -> Result<(), JournalError> {
        self.set_units(units)?;
        self.sync()?;
        let path = sums_path(image);
        disk.rename(&self.path, &path).map_err(JournalError::io("rename", &self.path))?;
        if let Some(dir) = path.parent() {
            disk.sync_dir(dir).map_err(JournalError::io("sync", dir))?;
        }
        (self.path, self.built) = (path, u64::MAX);
        Ok(())
    }

    /// Fills `into` with the sums from unit `first` on; returns how many of them are known. Of those that cannot be read it is
    /// one that nothing has.
    pub fn read(&self, first: u64, into: &mut [u64]) -> Result<usize, JournalError> {
        let known = self.built.saturating_sub(first).min(into.len() as u64) as usize;
        let mut bytes = [0; RUN_SUMS * SUM_BYTES as usize];
        for (i, run) in into[..known].chunks_mut(RUN_SUMS).enumerate() {
            let bytes = &mut bytes[..run.len() * SUM_BYTES as usize];
            let at = (first + (i * RUN_SUMS) as u64) * SUM_BYTES;
            // Once more: an error may be over.
            let got = self.file.read_at(bytes, at).or_else(|_| self.file.read_at(bytes, at));
            match got {
                Err(error) if is_unreadable(&error) => bytes.fill(0xff),
                other => {
                    let got = other.map_err(JournalError::io("read", &self.path))?;
                    bytes[got..].fill(0);
                }
            }
            for (sum, bytes) in run.iter_mut().zip(bytes.as_chunks().0) {
                *sum = u64::from_le_bytes(*bytes);
            }
        }
        Ok(known)
    }

    /// The first unit from `first` on that may have another sum than 0; `u64::MAX`: none.
    pub fn data_from(&self, first: u64) -> Result<u64, JournalError> {
        let failed = JournalError::io("read", &self.path);
        let found = || {
            let length = self.file.length()?;
            let at = first.saturating_mul(SUM_BYTES);
            if at >= length {
                return Ok(u64::MAX);
            }
            let data = self.file.data_from(at)?;
            Ok(if data >= length { u64::MAX } else { data / SUM_BYTES })
        };
        found().map_err(failed)
    }

    /// Notes the sums of neighbouring units.
    pub fn write(&mut self, first: u64, sums: &[u64]) -> Result<(), JournalError> {
        let known = self.built.saturating_sub(first).min(sums.len() as u64) as usize;
        if known == 0 {
            return Ok(());
        }
        let bytes: Vec<u8> = sums[..known].iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.dirty = true;
        self.put(&bytes, first * SUM_BYTES).map_err(JournalError::io("write", &self.path))
    }

    /// Writes a few bytes. Where what is around them cannot be read, that is written too: it is not known any more.
    fn put(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        let error = match write_all(&*self.file, bytes, at) {
            Err(error) if is_unreadable(&error) => error,
            other => return other,
        };
        let block = UNIT_BYTES as u64;
        let (from, end) = (at / block * block, (at + bytes.len() as u64).next_multiple_of(block));
        let mut around = vec![0; (end - from) as usize];
        if self.file.read_at(&mut around, from).map_or_else(|read| !is_unreadable(&read), |_| true) {
            return Err(error);
        }
        let length = self.file.length()?;
        tracing::warn!(%error, path = %self.path.display(), from, end, "checksums cannot be read and are written anew");
        let mut blocks = vec![0xff; (end - from) as usize];
        let within = (at - from) as usize;
        blocks[within..within + bytes.len()].copy_from_slice(bytes);
        write_all(&*self.file, &blocks, from)?;
        let length = length.max(at + bytes.len() as u64);
        if end > length { self.file.set_length(length) } else { Ok(()) }
    }

    /// Notes that neighbouring units are zero.
    pub fn zero(&mut self, first: u64, count: u64) -> Result<(), JournalError> {
        let length = self.file.length().map_err(JournalError::io("read", &self.path))?;
        let (from, end) = (first * SUM_BYTES, first.saturating_add(count.min(self.built.saturating_sub(first))));
        let bytes = end.saturating_mul(SUM_BYTES).min(length).saturating_sub(from);
        if bytes == 0 {
            return Ok(());
        }
        self.dirty = true;
        if bytes < PUNCH_BYTES_MIN {
            let zeroes = &ZEROES[..bytes as usize];
            return self.put(zeroes, from).map_err(JournalError::io("write", &self.path));
        }
        self.file.zero(from, bytes).map_err(JournalError::io("zero", &self.path))
    }

    /// The image has so many units now; those that are new are zero.
    pub fn set_units(&mut self, units: u64) -> Result<(), JournalError> {
        self.dirty = true;
        self.file.set_length(units * SUM_BYTES).map_err(JournalError::io("resize", &self.path))?;
        if self.built != u64::MAX {
            self.built = self.built.min(units);
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        if self.dirty {
            self.file.sync().map_err(JournalError::io("sync", &self.path))?;
            self.dirty = false;
        }
        Ok(())
    }
}

/// Whether a read failed because of what was to be read: EIO, ENODATA, EBADMSG, EILSEQ, EUCLEAN.
pub(super) fn is_unreadable(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(5 | 61 | 74 | 84 | 117))
}

/// Removes what there is of sums of an image.
pub(super) fn remove(disk: &dyn Disk, image: &Path) -> Result<(), JournalError> {
    for path in [sums_path(image), new_path(image)] {
        match disk.remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(JournalError::io("remove", &path)(e)),
            _ => {}
        }
    }
    Ok(())
}
