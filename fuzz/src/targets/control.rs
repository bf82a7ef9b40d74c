//! A control record: read, stored and read again it is the same.

use std::path::Path;

use vmdr_journal::Control;

use super::{split, with_fixtures};
use crate::disk::MemDisk;
use crate::seal;

pub fn run(bytes: &[u8]) {
    let Some((sealed, _, bytes)) = split(bytes) else { return };
    let mut bytes = bytes.to_vec();
    if sealed {
        seal::control(&mut bytes);
    }
    let (disk, dir) = (MemDisk::default(), Path::new("/state"));
    disk.put(&dir.join("control"), &bytes);
    let Ok(control) = Control::load(&disk, dir, &seal::DOMAIN) else { return };
    control.store(&disk, dir).unwrap_or_else(|e| panic!("{e}"));
    let again = Control::load(&disk, dir, &seal::DOMAIN).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(again, control);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    with_fixtures(|dir| {
        let bytes = std::fs::read(dir.join("control")).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        seeds.extend([0, 1].map(|first| [&[first], &bytes[..]].concat()));
    });
    seeds
}
