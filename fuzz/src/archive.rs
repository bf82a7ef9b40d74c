//! Files as one input: for each its name's number, its length, its bytes. What is cut short counts as far as it goes.

use std::path::{Path, PathBuf};

use crate::disk::MemDisk;
use crate::seal;

/// The domain of every fixture.
pub const UUID: &str = "6c0d4a3e-1111-4222-8333-abcdefabcdef";
/// Where the state directory is on the disk in memory.
pub const STATE: &str = "/state";
/// Files in an input, at most.
const FILES_MAX: usize = 64;

/// What files of a domain are called; numbers stand for these, and two more digits for the numbers in them.
const NAMES: [&str; 12] = [
    "control",
    "verified",
    "journal/{}.seg",
    "standby.{}/layout-{}",
    "standby.{}/device-{}.state",
    "standby.{}/domain-{}.xml",
    "standby.{}/history/{}.seg",
    "standby.{}/ram/{}.img",
    "standby.{}/disk/{}.raw",
    "standby.{}/ram/{}.sums",
    "standby.{}/disk/{}.sums",
    "standby.{}/flaws",
];
/// Disks of the fixtures, by number.
const TARGETS: [&str; 3] = ["vda", "vdb", "sda"];

/// A file of an input: which, and its bytes.
pub struct Item<'a> {
    kind: usize,
    first: u8,
    second: u8,
    bytes: &'a [u8],
}

impl Item<'_> {
    fn path(&self) -> PathBuf {
        let (first, second) = (self.first, self.second);
        let name = match self.kind {
            0 | 1 => NAMES[self.kind].to_owned(),
            2 => format!("journal/{first:08}.seg"),
            6 => format!("standby.{first}/history/{second:08}.seg"),
            8 => format!("standby.{first}/disk/{}.raw", TARGETS[usize::from(second) % TARGETS.len()]),
            10 => format!("standby.{first}/disk/{}.sums", TARGETS[usize::from(second) % TARGETS.len()]),
            kind => NAMES[kind].replacen("{}", &first.to_string(), 1).replacen("{}", &second.to_string(), 1),
        };
        Path::new(STATE).join(UUID).join(name)
    }
}

/// The files of an input.
pub fn items(mut bytes: &[u8]) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<7>()
        && items.len() < FILES_MAX
    {
        let [kind, first, second, length @ ..] = *head;
        let length = (u32::from_le_bytes(length) as usize).min(rest.len());
        let (body, rest) = rest.split_at(length);
        items.push(Item { kind: usize::from(kind) % NAMES.len(), first, second, bytes: body });
        bytes = rest;
    }
    items
}

/// Puts the files of an input on a disk; sealed: with checksums that are right.
pub fn unpack(bytes: &[u8], sealed: bool) -> MemDisk {
    let disk = MemDisk::default();
    for item in items(bytes) {
        let mut bytes = item.bytes.to_vec();
        if sealed {
            match item.kind {
                0 => seal::control(&mut bytes),
                1 | 3 | 11 => seal::trailer(&mut bytes),
                2 => seal::segment(&mut bytes, u64::from(item.first)),
                6 => seal::segment(&mut bytes, u64::from(item.second)),
                _ => {}
            }
        }
        disk.put(&item.path(), &bytes);
    }
    disk
}

/// An input out of a domain's directory.
pub fn pack(dir: &Path) -> Vec<u8> {
    let mut files = Vec::new();
    walk(dir, &mut files);
    files.sort();
    let mut to = Vec::new();
    for path in files {
        let Some(name) = path.strip_prefix(dir).ok().and_then(Path::to_str) else { continue };
        let Some((kind, first, second)) = number(name) else { continue };
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        to.extend_from_slice(&[kind, first, second]);
        to.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        to.extend_from_slice(&bytes);
    }
    to
}

fn walk(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() { walk(&entry.path(), into) } else { into.push(entry.path()) }
    }
}

/// What stands for a name; nothing for one that no input has.
fn number(name: &str) -> Option<(u8, u8, u8)> {
    let digits = |text: &str| text.parse::<u8>().ok();
    match name {
        "control" => return Some((0, 0, 0)),
        "verified" => return Some((1, 0, 0)),
        _ => {}
    }
    if let Some(segment) = name.strip_prefix("journal/") {
        return Some((2, digits(segment.strip_suffix(".seg")?)?, 0));
    }
    let (standby, rest) = name.strip_prefix("standby.")?.split_once('/')?;
    let first = digits(standby)?;
    let between = |before: &str, after: &str| rest.strip_prefix(before)?.strip_suffix(after).and_then(digits);
    let plain = [
        (3, "layout-", ""),
        (4, "device-", ".state"),
        (5, "domain-", ".xml"),
        (6, "history/", ".seg"),
        (7, "ram/", ".img"),
        (9, "ram/", ".sums"),
    ];
    if let Some((kind, second)) = plain.iter().find_map(|(kind, before, after)| Some((*kind, between(before, after)?)))
    {
        return Some((kind, first, second));
    }
    if rest == "flaws" {
        return Some((11, first, 0));
    }
    let (target, kind) = match rest.strip_prefix("disk/")?.rsplit_once('.')? {
        (target, "raw") => (target, 8),
        (target, "sums") => (target, 10),
        _ => return None,
    };
    let second = TARGETS.iter().position(|known| *known == target)?;
    Some((kind, first, second as u8))
}
