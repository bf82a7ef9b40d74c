//! A disk in memory that crashes: what was not synced is after a crash there, in part, or not, each piece by itself.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdr_journal::{Disk, File, LockGuard, Mode};

use super::Random;

/// Bytes that a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// Bytes that a file system reads before it writes some of them.
const BLOCK_BYTES: u64 = 4096;

/// What shall go wrong at the operation with the given number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// From there on nothing works: the process is dead.
    Crash,
    /// No space, once.
    Full,
    /// An I/O error, once; a sync that fails so loses what it should have synced.
    Error,
    /// Half of a write, then no space.
    Short,
    /// An I/O error of something that only looks, once; these operations are counted by themselves.
    Read,
}

#[derive(Debug, Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<PathBuf, Node>,
    durable_names: BTreeMap<PathBuf, Node>,
    name_ops: Vec<(PathBuf, NameOp)>,
    files: BTreeMap<u64, Inode>,
    next: u64,
    operations: u64,
    reads: u64,
    fault: Option<(u64, Fault)>,
    dead: bool,
    space: Option<u64>,
    lie: Option<Lie>,
    /// Places that cannot be read until they are written: file and offset.
    unreadable: Vec<(u64, u64)>,
}

/// Which syncs a disk only pretends to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    Files,
    Names,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(u64),
}

#[derive(Debug, Clone)]
enum NameOp {
    Make(PathBuf, Node),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

#[derive(Debug, Default, Clone)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: u64,
}

#[derive(Debug)]
struct SimLock;
impl LockGuard for SimLock {}

fn change(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, data) => {
            let (from, to) = (*offset as usize, *offset as usize + data.len());
            bytes.resize(bytes.len().max(to), 0);
            bytes[from..to].copy_from_slice(data);
        }
        Change::Length(length) => bytes.resize(*length as usize, 0),
    }
}

fn rename(names: &mut BTreeMap<PathBuf, Node>, from: &Path, to: &Path) {
    let moved: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
    if moved.is_empty() {
        return;
    }
    names.retain(|path, _| !path.starts_with(to));
    for path in moved {
        let node = names.remove(&path).unwrap();
        let rest = path.strip_prefix(from).unwrap();
        let new = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
        names.insert(new, node);
    }
}

fn apply(names: &mut BTreeMap<PathBuf, Node>, op: &NameOp) {
    match op {
        NameOp::Make(path, node) => {
            names.insert(path.clone(), *node);
        }
        NameOp::Rename(from, to) => rename(names, from, to),
        NameOp::Remove(path) => names.retain(|name, _| !name.starts_with(path)),
    }
}

impl SimDisk {
    pub fn new() -> Self {
        Self(Arc::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets something go wrong `after` more operations.
    pub fn fail(&self, after: u64, fault: Fault) {
        let mut state = self.state();
        let from = if fault == Fault::Read { state.reads } else { state.operations };
        state.fault = Some((from + after, fault));
    }

    /// How many operations there were of those that a fault is counted by.
    pub fn reached(&self, fault: Fault) -> u64 {
        if fault == Fault::Read { self.state().reads } else { self.operations() }
    }

    /// Counts an operation that only looks, and says whether it goes wrong.
    fn look(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.dead {
            return Err(io::Error::other("crashed"));
        }
        state.reads += 1;
        match state.fault {
            Some((at, Fault::Read)) if state.reads >= at => {
                state.fault = None;
                Err(io::Error::from_raw_os_error(5))
            }
            _ => Ok(()),
        }
    }

    pub fn lie(&self, lie: Lie) {
        self.state().lie = Some(lie);
    }

    /// From now on the sector of a file that has this offset cannot be read, until it is written.
    pub fn lose_sector(&self, path: &Path, offset: u64) {
        let mut state = self.state();
        let Some(Node::File(inode)) = state.names.get(path).copied() else { panic!("{path:?}") };
        state.unreadable.push((inode, offset));
    }

    pub fn heal(&self) {
        self.state().fault = None;
    }

    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    pub fn set_space(&self, bytes: Option<u64>) {
        self.state().space = bytes;
    }

    /// What is there when the machine is on again.
    pub fn crashed(&self, random: &mut Random) -> SimDisk {
        let state = self.state();
        let mut names = state.durable_names.clone();
        for (_, op) in &state.name_ops {
            if random.below(2) == 0 {
                apply(&mut names, op);
            }
        }
        // What is in a directory of which the name is lost is lost with it.
        let all = names.clone();
        names.retain(|path, _| path.ancestors().skip(1).all(|dir| dir == Path::new("/") || all.contains_key(dir)));
        let mut files = BTreeMap::new();
        for node in names.values() {
            let Node::File(number) = node else { continue };
            let mut inode = state.files[number].clone();
            for pending in std::mem::take(&mut inode.pending) {
                match (random.below(4), pending) {
                    (0, _) => {}
                    (1, Change::Write(offset, data)) => {
                        for (i, sector) in data.chunks(SECTOR_BYTES).enumerate() {
                            if random.below(2) == 0 {
                                let at = offset + (i * SECTOR_BYTES) as u64;
                                change(&mut inode.durable, &Change::Write(at, sector.to_vec()));
                            }
                        }
                    }
                    (_, pending) => change(&mut inode.durable, &pending),
                }
            }
            inode.live = inode.durable.clone();
            files.insert(*number, inode);
        }
        let state = State { durable_names: names.clone(), names, files, next: state.next, ..State::default() };
        SimDisk(Arc::new(Mutex::new(state)))
    }

    /// What is in the state directory, as files below `to`.
    pub fn export(&self, to: &Path) {
        let state = self.state();
        for (path, node) in &state.names {
            let Ok(name) = path.strip_prefix("/state") else { continue };
            match node {
                Node::Dir => std::fs::create_dir_all(to.join(name)).unwrap(),
                Node::File(number) => std::fs::write(to.join(name), &state.files[number].live).unwrap(),
            }
        }
    }

    /// Counts a changing operation and says whether it goes wrong.
    fn step(&self) -> io::Result<Option<Fault>> {
        let mut state = self.state();
        if state.dead {
            return Err(io::Error::other("crashed"));
        }
        state.operations += 1;
        match state.fault {
            Some((at, fault)) if fault != Fault::Read && state.operations >= at => {
                if fault == Fault::Crash {
                    state.dead = true;
                    return Err(io::Error::other("crashed"));
                }
                state.fault = None;
                Ok(Some(fault))
            }
            _ => Ok(None),
        }
    }

    fn plain_step(&self) -> io::Result<()> {
        match self.step()? {
            None => Ok(()),
            Some(Fault::Full | Fault::Short) => Err(ErrorKind::StorageFull.into()),
            Some(Fault::Error | Fault::Crash | Fault::Read) => Err(io::Error::from_raw_os_error(5)),
        }
    }

    fn name_op(&self, op: NameOp) {
        let mut state = self.state();
        apply(&mut state.names, &op);
        let (NameOp::Make(path, _) | NameOp::Rename(_, path) | NameOp::Remove(path)) = &op;
        let parent = path.parent().unwrap().to_owned();
        state.name_ops.push((parent, op));
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>> {
        self.look()?;
        let found = self.state().names.get(path).copied();
        let inode = match (found, mode) {
            (Some(Node::Dir), _) => return Err(ErrorKind::IsADirectory.into()),
            (Some(Node::File(inode)), Mode::Create) => {
                let file = SimFile { disk: self.clone(), inode };
                file.set_length(0)?;
                inode
            }
            (Some(Node::File(inode)), _) => inode,
            (None, Mode::Create) => {
                self.plain_step()?;
                let inode = {
                    let mut state = self.state();
                    if state.names.get(path.parent().unwrap()) != Some(&Node::Dir) {
                        return Err(ErrorKind::NotFound.into());
                    }
                    state.next += 1;
                    let inode = state.next;
                    state.files.insert(inode, Inode::default());
                    inode
                };
                self.name_op(NameOp::Make(path.to_owned(), Node::File(inode)));
                inode
            }
            (None, _) => return Err(ErrorKind::NotFound.into()),
        };
        Ok(Box::new(SimFile { disk: self.clone(), inode }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut missing: Vec<&Path> = path.ancestors().take_while(|p| *p != Path::new("/")).collect();
        missing.retain(|dir| !self.state().names.contains_key(*dir));
        for dir in missing.into_iter().rev() {
            self.plain_step()?;
            self.name_op(NameOp::Make(dir.to_owned(), Node::Dir));
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.look()?;
        let state = self.state();
        if state.names.get(path) != Some(&Node::Dir) {
            return Err(ErrorKind::NotFound.into());
        }
        let within = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(within.map(|name| name.file_name().unwrap().to_str().unwrap().to_owned()).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.plain_step()?;
        if !self.state().names.contains_key(from) {
            return Err(ErrorKind::NotFound.into());
        }
        self.name_op(NameOp::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.plain_step()?;
        if !matches!(self.state().names.get(path), Some(Node::File(_))) {
            return Err(ErrorKind::NotFound.into());
        }
        self.name_op(NameOp::Remove(path.to_owned()));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let within: Vec<PathBuf> = self.state().names.keys().filter(|n| n.starts_with(path)).cloned().collect();
        for name in within.into_iter().rev() {
            self.plain_step()?;
            self.name_op(NameOp::Remove(name));
        }
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.plain_step()?;
        let mut state = self.state();
        if state.lie == Some(Lie::Names) {
            return Ok(());
        }
        let (synced, left) = std::mem::take(&mut state.name_ops).into_iter().partition(|(dir, _)| dir == path);
        state.name_ops = left;
        for (_, op) in synced as Vec<(PathBuf, NameOp)> {
            apply(&mut state.durable_names, &op);
        }
        Ok(())
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        self.look()?;
        Ok(self.state().space.unwrap_or(u64::MAX))
    }

    fn used_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(self.state().files.values().map(|inode| inode.live.len() as u64).sum())
    }

    fn lock(&self, _: &Path) -> io::Result<Box<dyn LockGuard>> {
        Ok(Box::new(SimLock))
    }
}

impl SimFile {
    fn change(&self, changed: Change) {
        let mut state = self.disk.state();
        if let Change::Write(at, bytes) = &changed {
            let range = *at..*at + bytes.len() as u64;
            state.unreadable.retain(|(inode, at)| *inode != self.inode || !range.contains(at));
        }
        let inode = state.files.get_mut(&self.inode).unwrap();
        change(&mut inode.live, &changed);
        inode.pending.push(changed);
    }
}

impl SimFile {
    /// A block that is written in part is read first.
    fn read_around(&self, written: std::ops::Range<u64>) -> io::Result<()> {
        let state = self.disk.state();
        let spoilt = |block: u64| {
            let within = |(inode, at): &(u64, u64)| *inode == self.inode && at / BLOCK_BYTES == block;
            state.unreadable.iter().any(within)
        };
        let (first, last) = (written.start / BLOCK_BYTES, written.end.saturating_sub(1) / BLOCK_BYTES);
        let begins_within = !written.start.is_multiple_of(BLOCK_BYTES) && spoilt(first);
        let in_part = begins_within || (!written.end.is_multiple_of(BLOCK_BYTES) && spoilt(last));
        if in_part && !written.is_empty() { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    }
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.look()?;
        let state = self.disk.state();
        let range = offset..offset + buffer.len() as u64;
        if state.unreadable.iter().any(|(inode, at)| *inode == self.inode && range.contains(at)) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let live = &state.files[&self.inode].live;
        let from = live.get(offset as usize..).unwrap_or(&[]);
        let length = from.len().min(buffer.len());
        buffer[..length].copy_from_slice(&from[..length]);
        Ok(length)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        self.read_around(offset..offset + all.len() as u64)?;
        match self.disk.step() {
            Ok(None) => {
                self.change(Change::Write(offset, all));
                Ok(())
            }
            Ok(Some(Fault::Full)) => Err(ErrorKind::StorageFull.into()),
            Ok(Some(Fault::Short)) => {
                self.change(Change::Write(offset, all[..all.len() / 2].to_vec()));
                Err(ErrorKind::StorageFull.into())
            }
            Ok(Some(_)) => Err(io::Error::from_raw_os_error(5)),
            Err(dead) => {
                // The write during which the machine died may have come through in part.
                self.change(Change::Write(offset, all));
                Err(dead)
            }
        }
    }

    fn data_from(&self, offset: u64) -> io::Result<u64> {
        self.disk.look()?;
        let state = self.disk.state();
        let live = &state.files[&self.inode].live;
        let rest = live.get(offset as usize..).unwrap_or(&[]);
        let data = rest.iter().position(|byte| *byte != 0).unwrap_or(rest.len());
        Ok(offset + data as u64)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.disk.plain_step()?;
        self.change(Change::Write(offset, vec![0; length as usize]));
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        self.disk.look()?;
        Ok(self.disk.state().files[&self.inode].live.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.disk.plain_step()?;
        self.change(Change::Length(length));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let fault = self.disk.step()?;
        let mut state = self.disk.state();
        if state.lie == Some(Lie::Files) {
            return Ok(());
        }
        let inode = state.files.get_mut(&self.inode).unwrap();
        let pending = std::mem::take(&mut inode.pending);
        match fault {
            None => {
                pending.iter().for_each(|pending| change(&mut inode.durable, pending));
                Ok(())
            }
            // As Linux does: what could not be written is taken for clean, and the next sync succeeds.
            Some(Fault::Full | Fault::Short) => Err(ErrorKind::StorageFull.into()),
            Some(_) => Err(io::Error::from_raw_os_error(5)),
        }
    }
}
