//! Files that are sealed, on a disk that crashes, fails, drops and tears what was not synced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../../src/store/tests/random.rs"]
mod random;
#[allow(dead_code)]
#[path = "../../src/store/tests/sim.rs"]
mod sim;

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use random::Random;
use sim::{Fault, SimDisk};
use vmdr_journal::{Disk, File, Mode};
use vmdr_keys::DataKey;
use vmdr_sealed::SealedDisk;

const SPACE: u64 = 700_000;
const MARK: &[u8] = b"the guest's own secret, which nobody may find. ";

/// What a file has to have.
struct Model {
    live: Vec<u8>,
    synced: Vec<u8>,
    /// Bytes that were changed since the last sync: after a crash they may be anything.
    touched: Vec<bool>,
    /// Bytes of which nothing is known, because a write failed.
    unknown: Vec<bool>,
    length_known: bool,
    /// Its length was changed since the last sync.
    resized: bool,
    /// Something has failed since the last sync, or it has: what was written may be lost by a sync that nobody asked for.
    failed: bool,
}

impl Model {
    fn new() -> Self {
        let flags = vec![false; SPACE as usize + 8192];
        Self {
            live: Vec::new(),
            synced: Vec::new(),
            touched: flags.clone(),
            unknown: flags,
            length_known: true,
            resized: false,
            failed: false,
        }
    }

    fn change(&mut self, range: std::ops::Range<u64>, worked: bool) {
        for at in range.start..range.end {
            self.touched[at as usize] = true;
            self.unknown[at as usize] = !worked;
        }
        self.length_known &= worked;
        self.failed |= !worked;
    }

    /// Bytes become zero: those that were so, durably, stay so.
    fn change_to_zero(&mut self, range: std::ops::Range<u64>, worked: bool) {
        for at in range {
            let was_zero = self.synced.get(at as usize) == Some(&0) && !self.touched[at as usize];
            if worked && was_zero {
                continue;
            }
            self.change(at..at + 1, worked);
        }
        self.length_known &= worked;
        self.failed |= !worked;
    }

    /// After a failed sync nothing is trusted that it should have made durable.
    fn trust_nothing(&mut self) {
        (0..self.touched.len()).filter(|at| self.touched[*at]).for_each(|at| self.unknown[at] = true);
        self.length_known = false;
    }

    /// After a failure the file is as long as it is.
    fn look(&mut self, file: &dyn File) {
        if let Some(length) = file.length().ok().filter(|_| !self.length_known) {
            let before = self.live.len() as u64;
            self.live.resize(length as usize, 0);
            if length != before {
                self.change(length.min(before)..length.max(before), false);
            }
        }
    }

    /// What was written is there, and a write that failed has spoilt nothing but what it was to write.
    fn assert_live(&self, file: &dyn File, context: &str) {
        if self.length_known {
            assert_eq!(file.length().unwrap(), self.live.len() as u64, "{context}");
        }
        if self.length_known && !self.unknown.iter().any(|unknown| *unknown) {
            let mut found = vec![0xee; self.live.len() + 100];
            let got = file.read_at(&mut found, 0).unwrap();
            assert_eq!(got, self.live.len(), "{context}");
            assert!(found[..got] == self.live[..], "{context}: {:?}", first_difference(&found, &self.live));
            return;
        }
        for start in (0..self.live.len()).step_by(4096) {
            let end = (start + 4096).min(self.live.len());
            if self.unknown[start..end].iter().all(|unknown| *unknown) {
                continue;
            }
            let mut found = vec![0; end - start];
            let got = file.read_at(&mut found, start as u64);
            let got = got.unwrap_or_else(|e| panic!("{context}: block {}: {e}", start / 4096));
            found[got..].fill(0);
            let wrong = (start..end).find(|at| !self.unknown[*at] && found[at - start] != self.live[*at]);
            assert_eq!(wrong, None, "{context}: after a failure");
        }
    }

    /// After a crash: what was synced and not changed since is there.
    fn assert_durable(&mut self, file: &dyn File, context: &str) {
        let length = file.length().unwrap();
        let same_length = self.length_known && !self.resized && self.live.len() == self.synced.len();
        if same_length && !self.touched.iter().any(|touched| *touched) {
            assert_eq!(length, self.synced.len() as u64, "{context}");
        }
        for start in (0..self.synced.len()).step_by(4096) {
            let end = (start + 4096).min(self.synced.len());
            if self.touched[start..end].iter().all(|touched| *touched) {
                continue;
            }
            let mut found = vec![0; end - start];
            let got = file.read_at(&mut found, start as u64);
            let got = got.unwrap_or_else(|e| panic!("{context}: block {}: {e}", start / 4096));
            found[got..].fill(0);
            for at in start..end {
                if !self.touched[at] {
                    assert_eq!(found[at - start], self.synced[at], "{context}: byte {at} of {length}");
                }
            }
        }
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

fn fill(random: &mut Random, length: u64) -> Vec<u8> {
    match random.below(4) {
        0 => vec![0; length as usize],
        _ => {
            let skip = random.below(MARK.len() as u64) as usize;
            MARK.iter().copied().cycle().skip(skip).take(length as usize).collect()
        }
    }
}

/// A place and a length, sometimes whole blocks.
fn range(random: &mut Random, length: u64) -> (u64, u64) {
    let most = [50, 5000, 40_000, 300_000][random.below(4) as usize];
    let mut offset = if random.below(3) == 0 { length } else { random.below(length + 1) };
    let mut count = 1 + random.below(most);
    if random.below(2) == 0 {
        offset = offset / 4096 * 4096;
        count = count.next_multiple_of(4096);
    }
    let offset = offset.min(SPACE - 1);
    (offset, count.min(SPACE - offset))
}

fn step(random: &mut Random, file: &dyn File, model: &mut Model) {
    let length = model.live.len() as u64;
    match random.below(10) {
        0..=4 => {
            let (offset, count) = range(random, length);
            let bytes = fill(random, count);
            let (one, two) = bytes.split_at(bytes.len() / 3);
            let worked = file.write_at(&mut [IoSlice::new(one), IoSlice::new(two)], offset).is_ok();
            let (from, to) = (offset as usize, offset as usize + bytes.len());
            model.live.resize(model.live.len().max(to), 0);
            model.live[from..to].copy_from_slice(&bytes);
            model.change(offset.min(length)..to as u64, worked);
        }
        5 => {
            let (offset, count) = range(random, length);
            let end = (offset + count).min(length);
            if offset < end {
                let worked = file.zero(offset, count.min(length - offset)).is_ok();
                model.live[offset as usize..end as usize].fill(0);
                model.change_to_zero(offset..end, worked);
            }
        }
        6 => {
            let to = random.below(SPACE);
            let worked = file.set_length(to).is_ok();
            let from = length.min(to);
            model.live.resize(to as usize, 0);
            // A block that is last now, or was, is the same as before up to there.
            model.change_to_zero(from..length.max(to), worked);
            model.resized |= from < length.max(to);
        }
        7 => {
            let (offset, count) = range(random, length);
            if model.length_known && !model.unknown.iter().any(|unknown| *unknown) {
                let found = file.data_from(offset);
                if let Ok(found) = found {
                    assert!(found >= offset);
                    let skipped = model.live.get(offset as usize..(found as usize).min(model.live.len()));
                    assert!(skipped.unwrap_or_default().iter().all(|byte| *byte == 0), "{offset} {found} {count}");
                }
            }
        }
        _ => {
            if file.sync().is_ok() {
                model.synced = model.live.clone();
                model.touched.clone_from(&model.unknown);
                (model.failed, model.resized) = (false, false);
            } else {
                model.trust_nothing();
                model.failed = true;
            }
        }
    }
}

fn schedule(seed: u64, name: &str, faults: bool) {
    let mut random = Random(seed);
    let path = Path::new("/state").join(name);
    let key = DataKey::generate().unwrap().blocks(b"owner");
    let mut raw = SimDisk::new();
    raw.create_dir_all(Path::new("/state")).unwrap();
    let mut model = Model::new();
    let mut begun = false;
    for crash in 0..6 {
        let disk = SealedDisk::new(Arc::new(raw.clone()), key.clone());
        let context = format!("seed {seed} {name} crash {crash}");
        let opened = disk.open(&path, if begun { Mode::Write } else { Mode::Create }).unwrap();
        let mut file = opened;
        if !begun {
            file.sync().unwrap();
            raw.sync_dir(Path::new("/state")).unwrap();
            raw.sync_dir(Path::new("/")).unwrap();
            begun = true;
        }
        for _ in 0..random.below(14) {
            if faults && random.below(6) == 0 {
                let fault = [Fault::Full, Fault::Short, Fault::Error][random.below(3) as usize];
                raw.fail(random.below(6), fault);
            }
            step(&mut random, &*file, &mut model);
            raw.heal();
            model.look(&*file);
            model.assert_live(&*file, &context);
            if random.below(6) == 0 {
                // Another process: what the one before it wrote may not be durable.
                // The one before it was told of the failure, by this file's next sync at the latest; another is not.
                if model.failed {
                    model.trust_nothing();
                }
                model.failed = false;
                file = disk.open(&path, Mode::Write).unwrap();
                model.assert_live(&*file, &context);
            }
        }
        if random.below(2) == 0 {
            raw.fail(1 + random.below(5), Fault::Crash);
            step(&mut random, &*file, &mut model);
        }
        drop(file);
        raw = raw.crashed(&mut random);
        let exported = tempfile::tempdir().unwrap();
        raw.export(exported.path());
        let bytes = std::fs::read(exported.path().join(name)).unwrap();
        assert!(!bytes.windows(12).any(|window| MARK.starts_with(window)), "{context}: in the clear");
        let disk = SealedDisk::new(Arc::new(raw.clone()), key.clone());
        let file = disk.open(&path, Mode::Read).unwrap();
        model.assert_durable(&*file, &context);
        // Goes on with what there is.
        let length = file.length().unwrap();
        let mut found = vec![0; length as usize];
        let mut unknown = vec![false; SPACE as usize + 8192];
        for start in (0..length as usize).step_by(4096) {
            let end = (start + 4096).min(length as usize);
            if file.read_at(&mut found[start..end], start as u64).is_err() {
                unknown[start..end].fill(true);
            }
        }
        model.touched = unknown.clone();
        model.unknown = unknown;
        (model.length_known, model.failed, model.resized) = (true, false, false);
        (model.live, model.synced) = (found.clone(), found);
    }
}

fn seeds() -> std::ops::Range<u64> {
    // VMDR_SEEDS=FROM..TO replays or widens.
    let text = std::env::var("VMDR_SEEDS").ok();
    let range = text.as_deref().and_then(|text| text.split_once(".."));
    range.map_or(0..16, |(from, to)| from.parse().unwrap()..to.parse().unwrap())
}

#[test]
fn what_was_synced_survives_every_crash() {
    for seed in seeds() {
        for name in ["00000001.seg", "0.img", "0.sums"] {
            schedule(seed, name, false);
        }
    }
}

#[test]
fn what_was_synced_survives_failing_operations() {
    for seed in seeds() {
        for name in ["00000001.seg", "0.img", "0.sums"] {
            schedule(seed, name, true);
        }
    }
}

fn sealed(name: &str, bytes: &[u8]) -> (SimDisk, SealedDisk, std::path::PathBuf) {
    let raw = SimDisk::new();
    raw.create_dir_all(Path::new("/state")).unwrap();
    let disk = SealedDisk::new(Arc::new(raw.clone()), DataKey::generate().unwrap().blocks(b"owner"));
    let path = Path::new("/state").join(name);
    let file = disk.open(&path, Mode::Create).unwrap();
    vmdr_journal::write_all(&*file, bytes, 0).unwrap();
    (raw, disk, path)
}

#[test]
fn a_bit_that_flips_is_found_out() {
    let bytes: Vec<u8> = MARK.iter().copied().cycle().take(10_000).collect();
    for (name, fails) in [("0.img", true), ("0.sums", false), ("control", false)] {
        let (raw, disk, path) = sealed(name, &bytes);
        let inner = raw.open(&path, Mode::Write).unwrap();
        // Salt, tag, number and length of the first block's entry, and its content.
        for at in [0, 15, 16, 31, 32, 39, 40, 43, 4096, 6000, 8191] {
            let mut byte = [0];
            inner.read_at(&mut byte, at).unwrap();
            for bit in [0, 7] {
                vmdr_journal::write_all(&*inner, &[byte[0] ^ 1 << bit], at).unwrap();
                let mut found = vec![1; 4096];
                match disk.open(&path, Mode::Read).unwrap().read_at(&mut found, 0) {
                    Err(error) => assert!(fails && error.raw_os_error() == Some(74), "{name} {at}: {error}"),
                    Ok(_) => assert!(!fails && found.iter().all(|byte| *byte == 0), "{name} {at}"),
                }
                let mut rest = vec![0; 4096];
                disk.open(&path, Mode::Read).unwrap().read_at(&mut rest, 4096).unwrap();
                assert!(rest == bytes[4096..8192]);
            }
            vmdr_journal::write_all(&*inner, &byte, at).unwrap();
        }
        let mut found = vec![0; bytes.len()];
        disk.open(&path, Mode::Read).unwrap().read_at(&mut found, 0).unwrap();
        assert!(found == bytes);
    }
}

#[test]
fn another_key_or_another_place_opens_nothing() {
    let bytes: Vec<u8> = MARK.iter().copied().cycle().take(8192).collect();
    let (raw, _, path) = sealed("0.img", &bytes);
    let other = SealedDisk::new(Arc::new(raw.clone()), DataKey::generate().unwrap().blocks(b"owner"));
    let error = other.open(&path, Mode::Read).unwrap().read_at(&mut [0; 4096], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(74));
    let (raw, disk, path) = sealed("0.img", &bytes);
    let inner = raw.open(&path, Mode::Write).unwrap();
    let (mut entry, mut slot) = (vec![0; 64], vec![0; 4096]);
    inner.read_at(&mut entry, 0).unwrap();
    inner.read_at(&mut slot, 4096).unwrap();
    vmdr_journal::write_all(&*inner, &entry, 64).unwrap();
    vmdr_journal::write_all(&*inner, &slot, 8192).unwrap();
    let file = disk.open(&path, Mode::Read).unwrap();
    file.read_at(&mut [0; 4096], 0).unwrap();
    assert!(file.read_at(&mut [0; 4096], 4096).is_err(), "the first block is not the second");
}

#[test]
fn the_same_written_twice_is_other_bytes() {
    let (raw, disk, path) = sealed("0.img", &[7; 4096]);
    let read = || {
        let mut slot = vec![0; 4096];
        raw.open(&path, Mode::Read).unwrap().read_at(&mut slot, 4096).unwrap();
        slot
    };
    let before = read();
    let file = disk.open(&path, Mode::Write).unwrap();
    vmdr_journal::write_all(&*file, &[7; 4096], 0).unwrap();
    assert_ne!(before, read());
}

#[test]
fn holes_stay_holes_on_a_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let raw: Arc<dyn Disk> = Arc::new(vmdr_journal::FsDisk);
    let disk = SealedDisk::new(raw.clone(), DataKey::generate().unwrap().blocks(b"owner"));
    let path = dir.path().join("vda.raw");
    let file = disk.open(&path, Mode::Create).unwrap();
    file.set_length(8 << 30).unwrap();
    assert_eq!(file.length().unwrap(), 8 << 30);
    let data = vec![3; 1 << 20];
    vmdr_journal::write_all(&*file, &data, 5 << 30).unwrap();
    file.sync().unwrap();
    let reopened = disk.open(&path, Mode::Read).unwrap();
    assert_eq!(reopened.length().unwrap(), 8 << 30);
    let found = reopened.data_from(0).unwrap();
    assert!(((5 << 30) - (1 << 20)..=5 << 30).contains(&found), "{found}");
    let used = raw.used_bytes(&path).unwrap();
    assert!(used < 2 << 20, "{used}");
    file.zero(5 << 30, 1 << 20).unwrap();
    file.sync().unwrap();
    assert!(raw.used_bytes(&path).unwrap() < 200_000);
    let mut read = vec![1; 1 << 20];
    assert_eq!(reopened.read_at(&mut read, 5 << 30).unwrap(), 1 << 20);
    assert!(read.iter().all(|byte| *byte == 0));
}
