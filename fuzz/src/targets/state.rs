//! A whole state directory: opened, every point that is offered can be read or is said to be damaged, and it can be opened
//! again and says the same.

use std::path::Path;
use std::sync::Arc;

use vmdr_receiver::store::{Array, Store, StoreError};

use super::{split, with_fixtures};
use crate::archive::{self, STATE, UUID};
use crate::disk::MemDisk;
use crate::wire;

/// Points that are read, and bytes of each array.
const POINTS_MAX: usize = 6;
const ARRAY_BYTES_MAX: u64 = 256 << 10;

fn open(disk: &MemDisk) -> Store {
    let store = Store::open_on(Arc::new(disk.clone()), Path::new(STATE), wire::options());
    store.unwrap_or_else(|e| panic!("the state directory as a whole must open: {e}"))
}

pub fn run(bytes: &[u8]) {
    let Some((sealed, also_stream, bytes)) = split(bytes) else { return };
    let disk = archive::unpack(bytes, sealed);
    let before = {
        let store = open(&disk);
        if also_stream {
            // As an agent does that comes back.
            let _ = store.open_stream(UUID, "gast", 0);
        }
        look(&store)
    };
    let store = open(&disk);
    let after = look(&store);
    // What was offered and readable still is; one that turned out to be damaged need not be offered again. A control record
    // that was forged may say what never was: of that no more is promised than that nothing panics.
    if let (Ok(before), Ok(after), false) = (&before, &after, sealed) {
        assert_eq!(before.0, after.0, "the newest point");
        assert_eq!(readable(&before.1), readable(&after.1), "points that can be read");
    }
    let _ = store.forget(UUID);
}

/// The newest durable epoch, and which of the newest points can be read.
type Seen = ((u64, u64), Vec<(String, bool)>);

fn readable(seen: &[(String, bool)]) -> Vec<&str> {
    seen.iter().filter(|(_, read)| *read).map(|(id, _)| id.as_str()).collect()
}

fn look(store: &Store) -> Result<Seen, StoreError> {
    let position = store.position(UUID)?;
    let _ = store.recovery_point(UUID);
    let mut seen = Vec::new();
    for point in store.points(UUID)?.into_iter().take(POINTS_MAX) {
        let read = store.read_point(UUID, Some(point.id())).and_then(|reader| {
            for array in reader.arrays().collect::<Vec<Array>>() {
                let mut buffer = vec![0; reader.length(array).min(ARRAY_BYTES_MAX) as usize];
                reader.read(array, 0, &mut buffer)?;
                reader.data_from(array, 0)?;
            }
            Ok(())
        });
        let _ = store.given_up(UUID, point.id());
        seen.push((point.id().to_string(), read.is_ok()));
    }
    let domains = store.domains();
    assert!(domains.len() <= 1, "{domains:?}");
    Ok(((position.generation, position.epoch), seen))
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    with_fixtures(|dir| {
        let packed = archive::pack(dir);
        seeds.extend([0, 1, 3].map(|first| [&[first], &packed[..]].concat()));
    });
    seeds
}
