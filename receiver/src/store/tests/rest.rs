//! Encryption at rest: nothing in the clear, no key no guest, and the same promises as without.

use std::collections::BTreeMap;

use vmdr_keys::MasterKey;

use crate::activate::clear;
use crate::activate::record::ActiveDirectory;

use super::crash::copy_dir;
use super::drill::assert_copied;
use super::history::{by_hand, host};
use super::sim::{Fault, SimDisk};
use super::verify::{files, flip, offered, verified, with_a_past_under};
use super::*;

/// Written to memory and disks of the guest, and in its definition.
const SECRET: &[u8] = b"what only the guest knows: ";

fn sealed() -> StoreOptions {
    StoreOptions { keys: keyring(1), ..by_hand() }
}

/// A guest that has the secret everywhere.
fn secretive(seed: u64) -> Host {
    let mut host = host(seed);
    let secret = |bytes: &mut [u8]| bytes.iter_mut().zip(SECRET.iter().cycle()).for_each(|(to, from)| *to = *from);
    host.guest.ram.iter_mut().for_each(|block| secret(block));
    host.guest.disks.iter_mut().for_each(|disk| secret(disk));
    host.guest.xml = format!("<domain><name>{}</name></domain>", std::str::from_utf8(SECRET).unwrap());
    host
}

fn assert_nothing_in_the_clear(dir: &Path, context: &str) {
    let words: [&[u8]; 5] = [SECRET, b"<domain", b"pc-q35-10.0", b"/rom@etc/acpi", b"VMDRSEG"];
    let all = files(dir);
    assert!(all.len() > 8, "{context}: {all:?}");
    for path in all {
        let bytes = std::fs::read(&path).unwrap();
        for word in words {
            let found = bytes.windows(word.len()).position(|window| window == word);
            assert_eq!(found, None, "{context}: {} has {:?}", path.display(), String::from_utf8_lossy(word));
        }
    }
}

fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files(dir).into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn trouble(dir: &Path, keys: Keyring) -> String {
    let store = Store::open(dir, StoreOptions { keys, ..by_hand() }).unwrap();
    let refused = store.open_stream(UUID, "gast", 0).unwrap_err();
    assert!(matches!(refused, StoreError::Sealed { .. }), "{refused}");
    store.domains().pop().and_then(|domain| domain.trouble).unwrap()
}

#[test]
fn nothing_acknowledged_is_lost_in_a_crash_of_what_is_encrypted() {
    super::crash::schedules(40, &StoreOptions { keys: keyring(1), ..eager() });
}

#[test]
fn nothing_of_the_guest_is_in_the_clear_and_another_master_key_rewrites_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(3);
    let store = with_a_past_under(dir.path(), &mut host, 8, sealed());
    store.note_verified(UUID, store.points(UUID).unwrap()[0].id(), 5).unwrap();
    // Some that are in the journal only.
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for epoch in 9..=10 {
        for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
            part.send(&mut ingest).unwrap();
        }
        host.past.insert(epoch, host.guest.clone());
    }
    assert_nothing_in_the_clear(dir.path(), "with a journal");
    drop(ingest);
    drop(store);
    let crashed = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), crashed.path());

    let (old, new) = (keyring(1), keyring(2));
    let both = Keyring::new(key(2), vec![key(1)]);
    let store = Store::open(dir.path(), StoreOptions { keys: both.clone(), ..by_hand() }).unwrap();
    assert_eq!(offered(&store, &host, "both keys").1, Vec::<u64>::new());
    drop(store);
    assert_nothing_in_the_clear(dir.path(), "after rotation");
    let before = contents(dir.path());
    assert!(trouble(dir.path(), old).contains(&key(2).id().to_string()));
    assert!(trouble(dir.path(), Keyring::default()).contains("no key is configured"));
    let unusable = trouble(dir.path(), Keyring::unusable("the file is gone".to_owned()));
    assert!(unusable.contains("the file is gone"), "{unusable}");
    assert!(contents(dir.path()) == before, "who lacks the key changes nothing");
    let store = Store::open(dir.path(), StoreOptions { keys: new, ..by_hand() }).unwrap();
    let (good, _) = offered(&store, &host, "the new key");
    assert_eq!(good[0], 10);

    // The same data key: only the wrapping is another.
    let store = Store::open(crashed.path(), StoreOptions { keys: both, ..lazy() }).unwrap();
    drop(store);
    let rewrapped = contents(&crashed.path().join(UUID));
    let key_file = crashed.path().join(UUID).join(KEY_FILE);
    assert_ne!(rewrapped[&key_file], before[&dir.path().join(UUID).join(KEY_FILE)], "another salt");
    assert_eq!(rewrapped[&key_file].len(), 128);
}

fn key(number: u8) -> MasterKey {
    let mut secret = [number; 32];
    secret[0] = !number;
    MasterKey::new(secret)
}

#[test]
fn a_key_file_that_is_lost_or_damaged_is_said_and_nothing_is_harmed() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(4);
    drop(with_a_past_under(dir.path(), &mut host, 4, sealed()));
    let path = dir.path().join(UUID).join(KEY_FILE);
    let good = std::fs::read(&path).unwrap();
    for bit in (0..good.len() as u64 * 8).step_by(101) {
        flip(&path, bit / 8, bit % 8);
        // Four bytes that are not used yet are no damage.
        if !(12..16).contains(&(bit / 8)) {
            assert!(trouble(dir.path(), keyring(1)).contains("key"), "bit {bit}");
        }
        flip(&path, bit / 8, bit % 8);
    }
    std::fs::write(&path, &good[..100]).unwrap();
    assert!(trouble(dir.path(), keyring(1)).contains("128 are expected"));
    std::fs::remove_file(&path).unwrap();
    let before = contents(dir.path());
    assert!(trouble(dir.path(), keyring(1)).contains("is missing"));
    assert!(contents(dir.path()) == before, "no other key takes its place");
    std::fs::write(&path, &good).unwrap();
    let store = Store::open(dir.path(), sealed()).unwrap();
    assert_eq!(offered(&store, &host, "brought back").1, Vec::<u64>::new());
}

#[test]
fn what_was_stored_in_the_clear_stays_readable_and_takes_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(5);
    let plain = StoreOptions { keys: Keyring::default(), ..by_hand() };
    drop(with_a_past_under(dir.path(), &mut host, 4, plain));
    let said = trouble(dir.path(), keyring(1));
    assert!(said.contains("in the clear") && said.contains("vmdr forget"), "{said}");
    let store = Store::open(dir.path(), sealed()).unwrap();
    assert_eq!(offered(&store, &host, "in the clear").1, Vec::<u64>::new());
    assert!(!store.recovery_point(UUID).unwrap().sealed);
    store.forget(UUID).unwrap();
    drop(store);
    let mut host = secretive(6);
    let store = with_a_past_under(dir.path(), &mut host, 4, sealed());
    assert!(store.recovery_point(UUID).unwrap().sealed);
    assert_nothing_in_the_clear(dir.path(), "anew");
}

#[test]
fn a_bit_that_flips_in_what_is_encrypted_never_becomes_data() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(7);
    drop(with_a_past_under(dir.path(), &mut host, 6, sealed()));
    let mut found = 0;
    let mut random = Random(7);
    for file in files(&dir.path().join(UUID)) {
        let name = file.strip_prefix(dir.path()).unwrap().to_owned();
        let bytes = std::fs::read(&file).unwrap();
        let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        for _ in 0..3.min(used.len()) {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let at = used[random.below(used.len() as u64) as usize] as u64;
            flip(&copy.path().join(&name), at, random.below(8));
            let context = format!("{} at {at}", name.display());
            let store = Store::open(copy.path(), sealed()).unwrap();
            let summary = store.domains().pop().unwrap();
            if store.points(UUID).is_err() {
                assert!(summary.trouble.is_some(), "{context}");
                found += 1;
                continue;
            }
            let scope = Scope::All;
            let verdict = verified(&store, scope);
            found += u32::from(!verdict.damage.is_empty() || !verdict.damaged.is_empty());
            let (good, bad) = offered(&store, &host, &context);
            assert!(good.len() + bad.len() > 0, "{context}");
        }
    }
    assert!(found > 10, "{found}");
}

#[test]
fn a_rotation_that_is_interrupted_anywhere_loses_nothing() {
    let both = || Keyring::new(key(2), vec![key(1)]);
    for at in 1..12 {
        let mut random = Random(at);
        let disk = SimDisk::new();
        let mut host = Host::new(at);
        let options = |keys| StoreOptions { keys, ..eager() };
        let open = |disk: &SimDisk, keys| Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options(keys));
        {
            let store = open(&disk, keyring(1)).unwrap();
            let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
            host.cut();
            host.send(&mut ingest, 0).unwrap();
        }
        for fault in [Fault::Error, Fault::Full, Fault::Short] {
            disk.fail(at, fault);
            let _ = open(&disk, both());
            disk.heal();
        }
        disk.fail(at, Fault::Crash);
        let _ = open(&disk, both());
        let disk = disk.crashed(&mut random);
        let context = format!("operation {at}");
        let store = open(&disk, both()).unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_eq!(store.position(UUID).unwrap().epoch, host.acknowledged, "{context}");
        host.guest.assert_stored(&store, host.acknowledged, &context);
        drop(store);
        let store = open(&disk, keyring(2)).unwrap();
        host.guest.assert_stored(&store, host.acknowledged, &context);
    }
}

#[test]
fn without_the_key_inspection_says_which_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(8);
    drop(with_a_past_under(dir.path(), &mut host, 3, sealed()));
    let report = inspect::inspect(dir.path(), &inspect::Wanted::default()).unwrap();
    let closed = report.domains[0].closed.clone().unwrap();
    assert!(closed.contains(&key(1).id().to_string()) && closed.contains("--key-file"), "{closed}");
    assert!(!report.sound && report.domains[0].files.len() > 5);
    let wanted = inspect::Wanted { keys: vec![key(1)], ..inspect::Wanted::default() };
    let report = inspect::inspect(dir.path(), &wanted).unwrap();
    assert!(report.sound && report.domains[0].points.len() == 3, "{:?}", report.domains[0].damage);
    let wanted = inspect::Wanted { keys: vec![key(2)], ..inspect::Wanted::default() };
    assert!(inspect::inspect(dir.path(), &wanted).unwrap().domains[0].closed.is_some());
}

#[test]
fn a_base_that_would_be_filled_in_the_clear_is_left_empty() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = secretive(9);
    let store = with_a_past_under(dir.path(), &mut host, 3, sealed());
    store.grant(UUID, "ab", true).unwrap();
    store.raise_generation(UUID, 2).unwrap();
    let layout = Layout { ram: Vec::new(), ..host.guest.layout.clone() };
    let base = Base { peer: "ab", name: "gast", generation: 3, layout: &layout, xml: "<domain/>", cut_unix_ns: 5 };
    let made = store.seed_from_files(UUID, &base, &mut |_, image| panic!("{} is filled", image.display())).unwrap();
    assert_eq!(made.generation, 3);
    let verified = store.verify(UUID).unwrap();
    for (disk, found) in layout.disks.iter().zip(&verified.disks) {
        assert_eq!(found.xxh3, hash(&vec![0; disk.size_bytes as usize]), "{}", disk.target);
    }
    assert_nothing_in_the_clear(dir.path(), "with a base");
}

#[test]
fn what_is_decrypted_to_be_activated_is_the_point_and_is_made_once() {
    let (dir, clear) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut host = secretive(10);
    let store = with_a_past_under(dir.path(), &mut host, 6, sealed());
    let active = ActiveDirectory::of(&dir.path().join(UUID));
    let uuid = Uuid::parse_str(UUID).unwrap();
    let points = store.points(UUID).unwrap();
    for epoch in [6, 3] {
        let id = points.iter().map(|point| point.id()).find(|id| id.epoch == epoch).unwrap();
        let point = Arc::new(store.read_point(UUID, Some(id)).unwrap()).recovery_point();
        assert!(point.sealed && clear::estimate(&point) > 0);
        clear::begin(&active, clear.path(), uuid).unwrap();
        let (placed, took) = clear::decrypt(&point, &active).unwrap();
        assert!(took.unwrap().bytes > 0 && !placed.sealed);
        assert_copied(&host.past[&epoch], &placed, &format!("epoch {epoch}"));
        assert!(placed.disks.iter().all(|disk| disk.path.starts_with(clear.path())));
        assert_eq!(clear::decrypt(&point, &active).unwrap().1, None, "it is there already");
    }
    // What is damaged does not come into the clear, and nothing of it is left there.
    let newest = points.iter().map(|point| point.id()).find(|id| id.epoch == 5).unwrap();
    let point = Arc::new(store.read_point(UUID, Some(newest)).unwrap()).recovery_point();
    let before = files(clear.path()).len();
    for image in point.ram.iter().map(|block| &block.path) {
        let at = 4096 + 5;
        flip(image, at, 1);
    }
    let error = clear::decrypt(&point, &active).unwrap_err().to_string();
    assert!(error.contains("decrypted") && files(clear.path()).len() == before, "{error}");
    std::fs::create_dir(clear::drill(clear.path(), uuid, "0a0b0c")).unwrap();
    clear::sweep_drills(clear.path(), uuid).unwrap();
    clear::remove(active.path()).unwrap();
    assert_eq!(std::fs::read_dir(clear.path()).unwrap().count(), 0);
}
