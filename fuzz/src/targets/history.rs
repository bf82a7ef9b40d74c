//! A segment of the history: what it has is found, read, copied into another set, and taken back by.

use std::path::Path;
use std::sync::Arc;

use vmdr_journal::{HistoryLog, HistoryScan, Place, UNIT_BYTES, read_back, read_set, read_unit};

use super::{files, split, with_fixtures};
use crate::disk::MemDisk;
use crate::seal;

/// Units of one entry that are looked at: a run of zero units can be as long as it says.
const UNITS_MAX: u32 = 1 << 20;

/// First the place up to which it is committed.
pub fn run(bytes: &[u8]) {
    let Some((sealed, whole, bytes)) = split(bytes) else { return };
    let Some((place, bytes)) = bytes.split_first_chunk::<4>() else { return };
    let mut bytes = bytes.to_vec();
    if sealed {
        seal::segment(&mut bytes, 1);
    }
    let offset = if whole { u64::MAX } else { u64::from(u32::from_le_bytes(*place)) };
    let (disk, dir) = (MemDisk::default(), Path::new("/state/history"));
    disk.put(&dir.join("00000001.seg"), &bytes);
    let end = Place { segment: 1, offset };
    let mut unit = [0; UNIT_BYTES];
    let from = Place { segment: 1, offset: 64 };
    let _ = read_back(&disk, dir, from, end, &mut |entry, content| {
        let (key, count) = (entry.key, entry.count);
        assert!(count > 0 && (content.is_none() || count == 1), "{key:?} {count}");
        assert!(key.unit.checked_add(u64::from(count)).and_then(|end| end.checked_mul(UNIT_BYTES as u64)).is_some());
        Ok(())
    });
    let Ok(scan) = HistoryScan::read(&disk, dir, &seal::DOMAIN, end) else { return };
    // A log of its own: whatever was read can be written.
    let to = Path::new("/state/other");
    let log = HistoryLog::open(Arc::new(disk.clone()), to, seal::DOMAIN, Place::default());
    let mut log = log.unwrap_or_else(|e| panic!("{e}"));
    for set in &scan.sets {
        assert!(set.from < set.to && set.offset < set.end && set.end <= bytes.len() as u64, "{set:?}");
        log.begin(set.generation, set.from, set.to).unwrap_or_else(|e| panic!("{e}"));
        let read = read_set(&disk, dir, set, &mut |entry, stored, at| {
            if entry.count <= UNITS_MAX {
                let direct = entry.content(stored, &mut unit);
                let before = unit;
                let again = read_unit(&disk, dir, 1, entry, at, &mut unit);
                assert_eq!(direct.is_ok(), again.is_ok(), "{entry:?}");
                assert!(direct.is_err() || before == unit, "{entry:?}");
            }
            log.copy(entry, stored)
        });
        let ended = log.end(set.point).unwrap_or_else(|e| panic!("{e}"));
        assert!(read.is_err() || ended.units == set.units, "{set:?} {ended:?}");
    }
    let place = log.sync().unwrap_or_else(|e| panic!("{e}"));
    let again = HistoryScan::read(&disk, to, &seal::DOMAIN, place).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((again.sets.len(), again.damage), (scan.sets.len(), Vec::new()));
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    with_fixtures(|dir| {
        for (name, _) in dirs(dir) {
            for (_, bytes) in files(&dir.join(name).join("history")) {
                let place = (bytes.len() as u32).to_le_bytes();
                seeds.extend([0, 1, 3].map(|first| [&[first], &place[..], &bytes[..]].concat()));
            }
        }
    });
    seeds
}

/// The standby directories of a domain.
fn dirs(dir: &Path) -> Vec<(String, ())> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("standby.")).map(|name| (name, ())).collect();
    names.sort();
    names
}
