//! The copy that a drill runs on is its point, whatever comes while it is made.

use std::fs::{self, File};
use std::io;

use super::history::host;
use super::*;
use crate::drill::copy::{self, Clone};

/// Copies of the usual run, and of one with VMDR_SOAK.
const COPIES: (u64, u64) = (60, 1_000);

/// A clone for file systems that have none: worse than the real one, since the image may be written in the middle of it.
fn torn(to: &File, from: &File) -> io::Result<bool> {
    let (mut to, mut from) = (to, from);
    io::copy(&mut from, &mut to).map(|_| true)
}

pub fn assert_copied(guest: &Guest, copy: &RecoveryPoint, context: &str) {
    assert_eq!(copy.layout, guest.layout, "{context}");
    assert!(copy.older.is_none() && copy.checked.is_none(), "{context}");
    assert!(fs::read(&copy.device_state).unwrap() == guest.device, "{context}: device state");
    assert_eq!(copy.domain_xml, guest.xml, "{context}");
    let blocks = guest.layout.ram.iter().zip(&guest.ram).filter(|(block, _)| block.used_bytes > 0);
    let blocks: Vec<_> = blocks.collect();
    assert_eq!((copy.ram.len(), copy.disks.len()), (blocks.len(), guest.disks.len()), "{context}");
    for (image, (block, bytes)) in copy.ram.iter().zip(blocks) {
        assert_eq!(image.name, block.name, "{context}");
        assert!(fs::read(&image.path).unwrap() == *bytes, "{context}: {}", block.name);
    }
    for (image, bytes) in copy.disks.iter().zip(&guest.disks) {
        assert!(fs::read(&image.path).unwrap() == *bytes, "{context}: {}", image.target);
    }
}

#[test]
fn a_copy_is_its_point_whatever_is_received_meanwhile() {
    let copies = if std::env::var_os("VMDR_SOAK").is_some() { COPIES.1 } else { COPIES.0 };
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut host = host(7);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for number in 0..copies {
        for _ in 0..3 {
            host.cut();
            host.send(&mut ingest, 0).unwrap();
        }
        let points = store.points(UUID).unwrap();
        let point = points[host.random.below(points.len() as u64) as usize].id();
        let clone: Option<Clone> = (number % 2 == 0).then_some(torn as Clone);
        let context = format!("copy {number} of {point}, cloned: {}", clone.is_some());
        let reader = match store.read_point(UUID, Some(point)) {
            Ok(reader) => Arc::new(reader),
            // Thinned out since it was listed.
            Err(StoreError::NoSuchPoint { .. }) => continue,
            Err(error) => panic!("{context}: {error}"),
        };
        let (cloned, copied) = copy::estimate(&reader, &Arc::clone(&reader).recovery_point()).unwrap();
        let to = tempfile::tempdir().unwrap();
        let pieces = if number % 3 == 0 { copy::FIRST } else { copy::BESIDE };
        let sealed = Arc::clone(&reader).recovery_point().sealed;
        let mut turns = 0;
        let mut pace = |_: u64| {
            turns += 1;
            if turns % 3 == 1 {
                host.cut();
                host.send(&mut ingest, 0).unwrap();
            }
            Ok(())
        };
        let made = copy::copy(&reader, to.path(), clone, pieces, &mut pace);
        let (copy, cost) = made.unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_copied(&host.past[&point.epoch], &copy, &context);
        let all: u64 = reader.arrays().map(|array| reader.length(array)).sum();
        assert!(cost.copied_bytes <= all + turns * (64 << 10) && cloned <= copied.max(cloned), "{context}: {cost:?}");
        assert_eq!(cost.shared_bytes > 0, clone.is_some() && !sealed && all > 0, "{context}: {cost:?}");
    }
}

#[test]
fn a_copy_that_is_given_up_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut host = host(8);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    let reader = Arc::new(store.read_point(UUID, None).unwrap());
    let to = tempfile::tempdir().unwrap();
    let mut pace = |_: u64| Err(crate::drill::DrillError::Stopped("the domain is activated".to_owned()));
    let error = copy::copy(&reader, to.path(), None, copy::BESIDE, &mut pace).unwrap_err();
    assert_eq!(error.to_string(), "the domain is activated");
    assert!(copy::can_clone(&to.path().join("nothing"), to.path()).unwrap().is_none());
}
