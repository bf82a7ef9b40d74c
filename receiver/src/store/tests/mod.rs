//! A guest in memory, what it sends, and whether the store has it.

mod crash;
mod drill;
mod every;
mod fault;
mod fixtures;
mod history;
mod ownership;
mod random;
mod refuse;
mod rest;
mod round_trip;
mod sim;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vmdr_codec::{Digest, Disk as DiskLayout, Encoder, Layout, PAGE_BYTES, RamBlock};

use super::*;

pub use random::Random;

pub const UUID: &str = "6c0d4a3e-1111-4222-8333-abcdefabcdef";

pub const SECOND_NS: u64 = 1_000_000_000;

/// Options under which everything happens often.
pub fn eager() -> StoreOptions {
    StoreOptions {
        space_reserve_bytes: 0,
        backlog_bytes_max: 1 << 20,
        apply_bytes: 200_000,
        apply_interval: Duration::from_millis(30),
        retry_interval: Duration::from_millis(10),
        segment_bytes: 150_000,
        history_segment_bytes: 100_000,
        retention: Retention::default(),
        // VMDR_SEALED=1: all of these tests on directories that are encrypted.
        keys: if std::env::var_os("VMDR_SEALED").is_some() { keyring(1) } else { Keyring::default() },
    }
}

/// A key for directories that are encrypted.
pub fn keyring(number: u8) -> Keyring {
    let mut secret = [number; 32];
    secret[0] = !number;
    Keyring::new(vmdr_keys::MasterKey::new(secret), Vec::new())
}

/// A guest: everything that a recovery point must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    pub layout: Layout,
    pub ram: Vec<Vec<u8>>,
    pub disks: Vec<Vec<u8>>,
    pub device: Vec<u8>,
    pub xml: String,
    pub cut: u64,
    /// Wall clock at the last cut, if cuts go by a clock.
    pub clock: Option<u64>,
}

/// A part, ready to be sent.
#[derive(Debug, Clone)]
pub struct Sent {
    pub head: PartHead,
    pub chunks: Vec<(Bytes, u64)>,
    pub tail: PartTail,
}

impl Guest {
    pub fn new() -> Self {
        let mut guest = Guest {
            layout: Layout { machine: "pc-q35-10.0".to_owned(), ..Layout::default() },
            ram: Vec::new(),
            disks: Vec::new(),
            device: Vec::new(),
            xml: "<domain/>".to_owned(),
            cut: 0,
            clock: None,
        };
        for (name, pages) in [("pc.ram", 48), ("/rom@etc/acpi/tables", 3), ("vga.vram", 9)] {
            guest.add_block(name, pages);
        }
        for (target, size) in [("vda", 150_000usize), ("sdb", 40_960)] {
            guest.layout.disks.push(DiskLayout { target: target.to_owned(), size_bytes: size as u64 });
            guest.disks.push(vec![0; size]);
        }
        guest
    }

    pub fn add_block(&mut self, name: &str, pages: usize) {
        let used_bytes = (pages * PAGE_BYTES) as u64;
        self.layout.ram.push(RamBlock { name: name.to_owned(), used_bytes, page_bytes: 4096 });
        self.ram.push(vec![0; pages * PAGE_BYTES]);
    }

    /// Some writes, which go to the encoder too.
    pub fn run(&mut self, random: &mut Random, encoder: &mut Encoder) {
        for _ in 0..random.below(12) {
            let block = random.below(self.ram.len() as u64) as usize;
            let pages = (self.ram[block].len() / PAGE_BYTES) as u64;
            if pages == 0 {
                continue;
            }
            let first = random.below(pages);
            for page in first..(first + 1 + random.below(6)).min(pages) {
                let at = page as usize * PAGE_BYTES;
                let bytes: &mut [u8; PAGE_BYTES] = (&mut self.ram[block][at..at + PAGE_BYTES]).try_into().unwrap();
                random.fill(bytes);
                encoder.ram_page(block as u16, page, bytes);
            }
        }
        for _ in 0..random.below(6) {
            let disk = random.below(self.disks.len() as u64) as usize;
            let size = self.disks[disk].len() as u64;
            let offset = random.below(size);
            let length = 1 + random.below((size - offset).min(90_000));
            let bytes = &mut self.disks[disk][offset as usize..(offset + length) as usize];
            if random.below(3) == 0 {
                bytes.fill(0);
                encoder.disk_zero(disk as u16, offset, length);
            } else {
                random.fill(bytes);
                encoder.disk_data(disk as u16, offset, bytes);
            }
        }
    }

    /// Everything there is, zero pages left out, as a seed sends it.
    pub fn send_all(&self, encoder: &mut Encoder) {
        for (block, ram) in self.ram.iter().enumerate() {
            for (page, bytes) in ram.chunks(PAGE_BYTES).enumerate() {
                if bytes.iter().any(|&b| b != 0) {
                    encoder.ram_page(block as u16, page as u64, bytes.try_into().unwrap());
                }
            }
        }
        for (disk, bytes) in self.disks.iter().enumerate() {
            encoder.disk_data(disk as u16, 0, bytes);
        }
    }

    /// The parts of an epoch. The guest is afterwards what it is at the epoch's cut.
    pub fn epoch(&mut self, random: &mut Random, generation: u64, epoch: u64, kind: Kind) -> Vec<Sent> {
        let count = match (kind, random.below(4)) {
            (Kind::Delta, 0..=2) => 1,
            _ => 1 + random.below(4) as u32,
        };
        (0..count)
            .map(|part| {
                let mut encoder = Encoder::new();
                let last = part + 1 == count;
                if kind == Kind::Seed && part == 0 {
                    encoder.layout(&self.layout).unwrap();
                    encoder.domain_xml(&self.xml).unwrap();
                    self.send_all(&mut encoder);
                }
                if last && random.below(3) == 0 {
                    self.hotplug(random);
                }
                if last {
                    encoder.layout(&self.layout).unwrap();
                }
                self.run(random, &mut encoder);
                if last {
                    let most = if random.below(20) == 0 { 600_000 } else { 20_000 };
                    self.device = vec![0; 1 + random.below(most) as usize];
                    random.fill(&mut self.device);
                    self.clock = self.clock.map(|clock| clock + SECOND_NS);
                    self.cut = self.clock.unwrap_or_else(|| random.next());
                    encoder.device_state(&self.device).unwrap();
                    if random.below(4) == 0 {
                        self.xml = format!("<domain><!-- {} --></domain>", random.next());
                        encoder.domain_xml(&self.xml).unwrap();
                    }
                }
                let cut = if last { self.cut } else { 0 };
                seal(encoder, PartHead { generation, epoch, part, kind }, last, cut)
            })
            .collect()
    }

    /// A block comes, goes, grows, or becomes another.
    fn hotplug(&mut self, random: &mut Random) {
        let newest = self.ram.len() - 1;
        match random.below(5) {
            0 if newest < 8 => self.add_block(&format!("hot{}", random.next()), 1 + random.below(5) as usize),
            1 if newest > 1 => {
                self.ram.pop();
                self.layout.ram.pop();
            }
            2 => {
                let pages = random.below(9) as usize;
                self.layout.ram[newest].used_bytes = (pages * PAGE_BYTES) as u64;
                self.ram[newest].resize(pages * PAGE_BYTES, 0);
            }
            3 => {
                self.layout.ram[newest].name = format!("other{}", random.next());
                self.ram[newest].fill(0);
            }
            _ => {
                let grown = self.disks[1].len() + 4096;
                if grown < 100_000 {
                    self.layout.disks[1].size_bytes = grown as u64;
                    self.disks[1].resize(grown, 0);
                }
            }
        }
    }

    /// Asserts that a point is this guest, byte for byte.
    pub fn assert_read(&self, reader: &PointReader, context: &str) {
        self.read(reader, context).unwrap_or_else(|e| panic!("{context}: point {}: {e}", reader.id()));
    }

    /// Asserts that a point is this guest as far as it can be read.
    pub fn read(&self, reader: &PointReader, context: &str) -> Result<(), StoreError> {
        let context = format!("{context}: point {}", reader.id());
        assert_eq!(reader.layout(), &self.layout, "{context}");
        assert_eq!(reader.cut_unix_ns(), self.cut, "{context}");
        assert_eq!(reader.application(), self.cut % 3 == 1, "{context}");
        assert_eq!(reader.domain_xml(), self.xml, "{context}");
        assert!(reader.device_state() == self.device, "{context}: device state");
        let mut arrays = Vec::new();
        for (n, bytes) in self.ram.iter().enumerate().filter(|(n, _)| self.layout.ram[*n].used_bytes > 0) {
            arrays.push((Array::Ram(n as u16), bytes));
        }
        for (n, bytes) in self.disks.iter().enumerate() {
            arrays.push((Array::Disk(n as u16), bytes));
        }
        assert_eq!(reader.arrays().collect::<Vec<_>>(), arrays.iter().map(|(a, _)| *a).collect::<Vec<_>>());
        for (array, bytes) in arrays {
            assert_eq!(reader.length(array), bytes.len() as u64, "{context}: {array:?}");
            let mut read = vec![0xee; bytes.len()];
            for (i, piece) in read.chunks_mut(7000).enumerate() {
                reader.read(array, i as u64 * 7000, piece)?;
            }
            let wrong = read.iter().zip(bytes).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{context}: {array:?}");
            let mut at = 0;
            while at < bytes.len() as u64 {
                let data = reader.data_from(array, at)?;
                assert!(data >= at && data <= bytes.len() as u64, "{context}: {array:?} at {at}: {data}");
                assert!(bytes[at as usize..data as usize].iter().all(|b| *b == 0), "{context}: {array:?} at {at}");
                at = (data / 4096 + 1) * 4096;
            }
        }
        Ok(())
    }

    /// Asserts that the store's recovery point is this guest, byte for byte.
    pub fn assert_stored(&self, store: &Store, epoch: u64, context: &str) {
        // A fault that hits while this waits is told, and over with the next try.
        let verified = match store.verify(UUID) {
            Err(StoreError::Full { .. }) => store.verify(UUID),
            other => other,
        };
        let verified = verified.unwrap_or_else(|e| panic!("{context}: {e}"));
        let point = store.recovery_point(UUID).unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_eq!((verified.epoch, point.epoch), (epoch, epoch), "{context}");
        assert_eq!(point.cut_unix_ns, self.cut, "{context}");
        assert_eq!(point.domain_xml, self.xml, "{context}");
        assert_eq!(point.machine, self.layout.machine, "{context}");
        let blocks = self.layout.ram.iter().zip(&self.ram).filter(|(block, _)| block.used_bytes > 0);
        let ram: Vec<_> = blocks.map(|(block, bytes)| (block.name.clone(), hash(bytes))).collect();
        let disks = self.layout.disks.iter().zip(&self.disks);
        let disks: Vec<_> = disks.map(|(disk, bytes)| (disk.target.clone(), hash(bytes))).collect();
        let found = |images: &[VerifiedImage]| images.iter().map(|i| (i.name.clone(), i.xxh3)).collect::<Vec<_>>();
        assert_eq!(found(&verified.ram), ram, "{context}");
        assert_eq!(found(&verified.disks), disks, "{context}");
        assert_eq!(verified.device_state, hash(&self.device), "{context}");
        assert_eq!(point.ram.len(), ram.len(), "{context}");
        assert_eq!(point.disks.len(), disks.len(), "{context}");
    }
}

pub fn hash(bytes: &[u8]) -> u128 {
    let mut digest = Digest::new();
    digest.update(bytes);
    let (low, high) = digest.halves();
    u128::from(high) << 64 | u128::from(low)
}

/// What was encoded becomes a part.
pub fn seal(mut encoder: Encoder, head: PartHead, last: bool, cut_unix_ns: u64) -> Sent {
    let counts = encoder.finish();
    let chunks: Vec<_> = std::iter::from_fn(|| encoder.take_full()).map(Bytes::from).collect();
    let mut digest = Digest::new();
    chunks.iter().for_each(|chunk| digest.update(chunk));
    let tail = PartTail {
        chunks: chunks.len() as u32,
        payload_bytes: chunks.iter().map(|chunk| chunk.len() as u64).sum(),
        digest: digest.halves(),
        last,
        cut_unix_ns,
        application: cut_unix_ns % 3 == 1,
        counts,
    };
    let chunks = chunks.into_iter().map(|chunk| (chunk.clone(), vmdr_codec::chunk_hash(&chunk))).collect();
    Sent { head, chunks, tail }
}

impl Sent {
    pub fn send(&self, ingest: &mut Ingest) -> Result<Durable, StoreError> {
        ingest.begin(self.head)?;
        for (i, (payload, xxh3)) in self.chunks.iter().enumerate() {
            ingest.chunk(i as u32, payload.clone(), *xxh3)?;
        }
        ingest.end(self.tail)
    }
}

/// The protected host: a guest, its past, and the epoch that it is sending.
#[derive(Debug, Clone)]
pub struct Host {
    pub random: Random,
    pub guest: Guest,
    /// What the guest was at each cut.
    pub past: BTreeMap<u64, Guest>,
    /// The epoch being sent, and its parts.
    pub sending: Option<(u64, Vec<Sent>)>,
    /// The newest epoch acknowledged as whole.
    pub acknowledged: u64,
    /// Parts acknowledged of the epoch being sent.
    pub parts: u32,
    pub seeded: bool,
    /// Remember all of the past.
    pub keep: bool,
}

impl Host {
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            guest: Guest::new(),
            past: BTreeMap::new(),
            sending: None,
            acknowledged: 0,
            parts: 0,
            seeded: false,
            keep: false,
        }
    }

    /// Cuts an epoch, unless one is being sent.
    pub fn cut(&mut self) {
        if self.sending.is_some() {
            return;
        }
        let epoch = self.past.keys().last().map_or(1, |newest| newest + 1);
        let seed = !self.seeded || self.random.below(12) == 0;
        let kind = if seed { Kind::Seed } else { Kind::Delta };
        let parts = self.guest.epoch(&mut self.random, 1, epoch, kind);
        self.past.insert(epoch, self.guest.clone());
        self.sending = Some((epoch, parts));
        self.parts = 0;
    }

    /// Sends what is left of the epoch from `from` on.
    pub fn send(&mut self, ingest: &mut Ingest, from: u32) -> Result<(), StoreError> {
        let Some((epoch, parts)) = self.sending.clone() else { return Ok(()) };
        for sent in &parts[from as usize..] {
            let durable = sent.send(ingest)?;
            assert_eq!((durable.epoch, durable.part, durable.last), (epoch, sent.head.part, sent.tail.last));
            self.parts = durable.part + 1;
        }
        self.arrived(epoch);
        Ok(())
    }

    fn arrived(&mut self, epoch: u64) {
        self.acknowledged = epoch;
        self.sending = None;
        self.seeded = true;
        if !self.keep {
            self.past = self.past.split_off(&epoch);
        }
    }

    /// After a reconnect: checks that nothing acknowledged is lost, and returns the part to go on with.
    pub fn reconnected(&mut self, position: Position, context: &str) -> u32 {
        assert!(position.epoch >= self.acknowledged, "{context}: {position:?}, acknowledged {}", self.acknowledged);
        let Some((epoch, parts)) = &self.sending else { return 0 };
        let (epoch, count) = (*epoch, parts.len() as u32);
        if position.epoch == epoch {
            self.arrived(epoch);
            return 0;
        }
        assert_eq!(position.epoch, self.acknowledged, "{context}");
        let from = if position.open_epoch == epoch { position.open_parts } else { 0 };
        assert!(from >= self.parts && from < count, "{context}: {position:?}, parts {}", self.parts);
        self.parts = from;
        from
    }
}

pub fn store_in(dir: &tempfile::TempDir) -> Store {
    Store::open(dir.path(), eager()).unwrap()
}

/// Options under which nothing is applied unless it must be.
pub fn lazy() -> StoreOptions {
    StoreOptions {
        apply_bytes: 1 << 40,
        apply_interval: Duration::from_secs(3600),
        backlog_bytes_max: 1 << 40,
        ..eager()
    }
}

/// A store in memory.
pub fn store_on(disk: &sim::SimDisk) -> Result<Store, StoreError> {
    Store::open_on(Arc::new(disk.clone()), Path::new("/state"), eager())
}
