use proptest::prelude::*;

use super::*;

const SLOTS: [(u64, u64); 2] = [(0, 16 * PAGE_BYTES), (1 << 20, 40 * PAGE_BYTES)];

/// A log that is told what was written.
#[derive(Debug)]
struct Told {
    slots: Vec<Slot>,
    written: Vec<(usize, u64)>,
}

impl DirtyLog for Told {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn collect(&mut self, into: &mut [Bitmap]) -> std::result::Result<(), LogError> {
        for (slot, page) in self.written.drain(..) {
            into[slot].insert(page, 1);
        }
        Ok(())
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&SLOTS.map(|(address, bytes)| (GuestAddress(address), bytes as usize))).unwrap()
}

fn source(memory: &GuestMemoryMmap) -> Source<Told, ()> {
    let slot = |(number, &(guest_address, bytes)): (usize, &(u64, u64))| Slot {
        number: number as u32,
        guest_address,
        bytes,
        host_address: 0,
        read_only: false,
    };
    let slots = SLOTS.iter().enumerate().map(slot).collect();
    Source::new(Told { slots, written: Vec::new() }, memory.clone()).unwrap()
}

fn content(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = Vec::new();
    for (address, bytes) in SLOTS {
        let mut block = vec![0; bytes as usize];
        memory.read_slice(&mut block, GuestAddress(address)).unwrap();
        all.extend(block);
    }
    all
}

/// Writes a page with content of this number, and tells the log.
fn write(memory: &GuestMemoryMmap, source: &mut Source<Told, ()>, slot: usize, page: u64, number: u8) {
    let data: Vec<u8> = (0..PAGE_BYTES).map(|at| (at as u8 ^ 7).wrapping_mul(number)).collect();
    memory.write_slice(&data, GuestAddress(SLOTS[slot].0 + page * PAGE_BYTES)).unwrap();
    source.log().written.push((slot, page));
}

/// A stream of some epochs, and memory at each cut; the first epoch in parts, between which pages change that were sent.
fn stream(epochs: u64) -> (Vec<u8>, Vec<Vec<u8>>) {
    let memory = memory();
    let mut source = source(&memory);
    let mut writer = Writer::new(Vec::new()).unwrap();
    let mut contents = Vec::new();
    for page in 0..30 {
        write(&memory, &mut source, 1, page, page as u8 + 1);
    }
    for number in 0..6 {
        let part = source.part(9).unwrap();
        assert!(part.pages() == 9 && !part.is_last());
        writer.part(&part).unwrap();
        write(&memory, &mut source, 1, 3, number + 100);
    }
    for epoch in 1..=epochs {
        write(&memory, &mut source, 0, epoch % 16, 200 + epoch as u8);
        write(&memory, &mut source, 1, epoch * 5 % 40, epoch as u8);
        if epoch == 2 {
            // A page becomes zero, by the VMM's own hand.
            memory.write_slice(&[0; PAGE_BYTES as usize], GuestAddress(SLOTS[1].0)).unwrap();
            source.mark(1, 0, 1);
        }
        let part = source.cut(&GuestState::default()).unwrap();
        assert_eq!(part.epoch(), epoch);
        writer.part(&part).unwrap();
        contents.push(content(&memory));
    }
    assert_eq!(source.collect().unwrap(), 0);
    (writer.to, contents)
}

/// Applies what comes, and fails unless each epoch leaves memory as it was at its cut. How many came, and what ended it.
fn apply(bytes: &[u8], contents: &[Vec<u8>]) -> (usize, Result<bool>) {
    let memory = memory();
    let mut reader = Reader::new(bytes, 1 << 20);
    let mut count = 0;
    loop {
        match reader.epoch() {
            Ok(Some(epoch)) => {
                assert_eq!(epoch.slots, SLOTS);
                epoch.apply(&memory).unwrap();
                assert_eq!(content(&memory), contents[count], "memory after epoch {}", epoch.number);
                count += 1;
            }
            Ok(None) => return (count, Ok(reader.torn())),
            Err(error) => return (count, Err(error)),
        }
    }
}

#[test]
fn each_epoch_makes_memory_what_it_was_at_the_cut() {
    let (bytes, contents) = stream(6);
    let (count, end) = apply(&bytes, &contents);
    assert_eq!((count, end.unwrap()), (6, false));
}

#[test]
fn a_stream_that_ends_anywhere_gives_the_whole_epochs_before() {
    let (bytes, contents) = stream(3);
    let mut seen = [0; 4];
    for length in 0..bytes.len() {
        let (count, end) = apply(&bytes[..length], &contents);
        assert!(count < 3, "{length} of {} bytes gave all epochs", bytes.len());
        end.unwrap();
        seen[count] += 1;
    }
    assert!(seen[..3].iter().all(|&n| n > 0), "ends within each epoch: {seen:?}");
}

#[test]
fn an_epoch_beyond_the_limit_or_outside_of_memory_is_refused() {
    let (bytes, _) = stream(1);
    let error = Reader::new(bytes.as_slice(), 100).epoch().unwrap_err();
    assert!(matches!(error, StreamError::TooLong(100)), "{error}");
    let epoch = Reader::new(bytes.as_slice(), 1 << 20).epoch().unwrap().unwrap();
    let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SLOTS[0].1 as usize)]).unwrap();
    let error = epoch.apply(&small).unwrap_err();
    assert!(matches!(error, StreamError::Memory { address, .. } if address == SLOTS[1].0), "{error}");
    assert_eq!(content_of(&small), vec![0; SLOTS[0].1 as usize], "nothing of it was written");
}

fn content_of(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = vec![0; SLOTS[0].1 as usize];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    all
}

#[test]
fn a_slot_outside_of_memory_is_refused() {
    let slot = Slot { number: 0, guest_address: 1 << 20, bytes: 41 * PAGE_BYTES, host_address: 0, read_only: false };
    let error = Source::new(Told { slots: vec![slot], written: Vec::new() }, memory()).unwrap_err();
    assert!(matches!(error, StreamError::Memory { address: 0x10_0000, .. }), "{error}");
}

proptest! {
    /// Whatever is damaged: no epoch is applied that was not sent.
    #[test]
    fn damage_is_found(at in any::<prop::sample::Index>(), change in 1u8..) {
        let (mut bytes, contents) = stream(3);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        let (count, _) = apply(&bytes, &contents);
        prop_assert!(count < 3, "a stream with byte {at} changed gave all epochs");
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut stream = MAGIC.to_vec();
        stream.extend(&bytes);
        let _ = Reader::new(stream.as_slice(), 1 << 20).epoch();
        let _ = GuestState::from_bytes(&bytes);
    }
}
