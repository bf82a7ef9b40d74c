//! A disk in memory: files with holes, so that a guest with a large disk costs what is written to it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdr_journal::{Disk, File, LockGuard, Mode};

const BLOCK_BYTES: usize = 4096;
/// The longest file, as file systems have a limit too.
const FILE_BYTES_MAX: u64 = 1 << 40;

/// Cloned, it is the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemDisk(Arc<Mutex<BTreeMap<PathBuf, Node>>>);

#[derive(Debug, Clone)]
enum Node {
    Dir,
    File(MemFile),
}

#[derive(Debug, Clone, Default)]
struct MemFile(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    length: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>,
}

#[derive(Debug)]
struct MemLock;
impl LockGuard for MemLock {}

fn not_found<T>() -> io::Result<T> {
    Err(ErrorKind::NotFound.into())
}

impl MemDisk {
    fn names(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Node>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a file there, and the directories above it.
    pub fn put(&self, path: &Path, bytes: &[u8]) {
        if let Some(dir) = path.parent() {
            let _ = self.create_dir_all(dir);
        }
        let file = MemFile::default();
        let _ = file.write_at(&mut [IoSlice::new(bytes)], 0);
        self.names().insert(path.to_owned(), Node::File(file));
    }
}

impl Disk for MemDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>> {
        let mut names = self.names();
        match (names.get(path), mode) {
            (Some(Node::Dir), _) => Err(ErrorKind::IsADirectory.into()),
            (Some(Node::File(file)), Mode::Create) => {
                file.set_length(0)?;
                Ok(Box::new(file.clone()))
            }
            (Some(Node::File(file)), _) => Ok(Box::new(file.clone())),
            (None, Mode::Create) => {
                if !matches!(path.parent().and_then(|dir| names.get(dir)), Some(Node::Dir)) {
                    return not_found();
                }
                let file = MemFile::default();
                names.insert(path.to_owned(), Node::File(file.clone()));
                Ok(Box::new(file))
            }
            (None, _) => not_found(),
        }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut names = self.names();
        for dir in path.ancestors() {
            match names.get(dir) {
                Some(Node::File(_)) => return Err(ErrorKind::NotADirectory.into()),
                Some(Node::Dir) => {}
                None => {
                    names.insert(dir.to_owned(), Node::Dir);
                }
            }
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let names = self.names();
        if !matches!(names.get(path), Some(Node::Dir)) {
            return not_found();
        }
        let within = names.keys().filter(|name| name.parent() == Some(path));
        Ok(within.filter_map(|name| Some(name.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = self.names();
        let moved: Vec<PathBuf> = names.keys().filter(|name| name.starts_with(from)).cloned().collect();
        if moved.is_empty() {
            return not_found();
        }
        if matches!(names.get(to), Some(Node::Dir)) {
            return Err(ErrorKind::DirectoryNotEmpty.into());
        }
        for name in moved {
            let rest = name.strip_prefix(from).map(Path::to_owned).unwrap_or_default();
            let new = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            if let Some(node) = names.remove(&name) {
                names.insert(new, node);
            }
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut names = self.names();
        match names.get(path) {
            Some(Node::File(_)) => {
                names.remove(path);
                Ok(())
            }
            Some(Node::Dir) => Err(ErrorKind::IsADirectory.into()),
            None => not_found(),
        }
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.names().retain(|name, _| !name.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if matches!(self.names().get(path), Some(Node::Dir)) { Ok(()) } else { not_found() }
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn used_bytes(&self, path: &Path) -> io::Result<u64> {
        let names = self.names();
        let files = names.iter().filter(|(name, _)| name.starts_with(path));
        Ok(files.map(|(_, node)| if let Node::File(file) = node { file.used() } else { 0 }).sum())
    }

    fn lock(&self, _: &Path) -> io::Result<Box<dyn LockGuard>> {
        Ok(Box::new(MemLock))
    }
}

impl MemFile {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> u64 {
        (self.content().blocks.len() * BLOCK_BYTES) as u64
    }
}

/// Block, and range in it, for each piece of a range.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = offset;
    let end = offset + length as u64;
    std::iter::from_fn(move || {
        let (block, from) = (at / BLOCK_BYTES as u64, (at % BLOCK_BYTES as u64) as usize);
        let now = (BLOCK_BYTES - from).min((end - at) as usize);
        at += now as u64;
        (now > 0).then_some((block, from, now))
    })
}

impl File for MemFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.content();
        let length = content.length.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let mut done = 0;
        for (block, from, now) in pieces(offset, length) {
            match content.blocks.get(&block) {
                Some(bytes) => buffer[done..done + now].copy_from_slice(&bytes[from..from + now]),
                None => buffer[done..done + now].fill(0),
            }
            done += now;
        }
        Ok(length)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        let mut content = self.content();
        for slice in slices {
            if offset.checked_add(slice.len() as u64).is_none_or(|end| end > FILE_BYTES_MAX) {
                return Err(ErrorKind::FileTooLarge.into());
            }
            let mut done = 0;
            for (block, from, now) in pieces(offset, slice.len()) {
                let bytes = content.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_BYTES]));
                bytes[from..from + now].copy_from_slice(&slice[done..done + now]);
                done += now;
            }
            offset += slice.len() as u64;
            content.length = content.length.max(offset);
        }
        Ok(())
    }

    fn data_from(&self, offset: u64) -> io::Result<u64> {
        let content = self.content();
        let own = offset / BLOCK_BYTES as u64;
        let block = content.blocks.range(own..).next().map(|(block, _)| *block);
        Ok(block.map_or(content.length.max(offset), |block| (block * BLOCK_BYTES as u64).max(offset)))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut content = self.content();
        let end = offset.saturating_add(length).min(content.length);
        let (first, last) = (offset / BLOCK_BYTES as u64, end.div_ceil(BLOCK_BYTES as u64));
        let within: Vec<u64> = content.blocks.range(first..last.max(first)).map(|(block, _)| *block).collect();
        for block in within {
            let start = block * BLOCK_BYTES as u64;
            let (from, to) = (offset.max(start) - start, end.min(start + BLOCK_BYTES as u64) - start);
            if (from, to) == (0, BLOCK_BYTES as u64) {
                content.blocks.remove(&block);
            } else if let Some(bytes) = content.blocks.get_mut(&block) {
                bytes[from as usize..to as usize].fill(0);
            }
        }
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.content().length)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        if length > FILE_BYTES_MAX {
            return Err(ErrorKind::FileTooLarge.into());
        }
        let old = self.content().length;
        if length < old {
            self.zero(length, old - length)?;
            let mut content = self.content();
            content.blocks.split_off(&length.div_ceil(BLOCK_BYTES as u64));
        }
        self.content().length = length;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
