//! A guest in memory, and an S3 server.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use uuid::Uuid;
use vmdr_codec::{Disk, Layout, RamBlock};
use vmdr_cold::keys::MasterKey;
use vmdr_cold::{
    Array, Bucket, ColdError, ExportOptions, ExportReport, Guest, Head, Location, Manifest, Range, Source, SourceError,
    Vault, export, restore,
};
use vmdr_test_s3::Server;

pub const UUID: Uuid = Uuid::from_u128(0x1234_5678);
/// What must not be readable in a bucket.
pub const PATTERN: &[u8] = b"the guest's own secret, known to nobody else";

/// A guest at a cut.
#[derive(Clone)]
pub struct Point {
    pub head: Head,
    pub guest: Guest,
    pub ram: Vec<u8>,
    pub disk: Vec<u8>,
    /// What changed since the point before, as its store would say.
    pub changes: Vec<(Array, u64, u64)>,
}

/// Reads a [`Point`], and counts.
pub struct Reading {
    pub point: Point,
    pub reads: AtomicU64,
    pub pause: std::time::Duration,
}

impl Source for Reading {
    fn read(&self, array: Array, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        std::thread::sleep(self.pause);
        self.reads.fetch_add(1, Ordering::Relaxed);
        let offset = offset as usize;
        buffer.copy_from_slice(&self.point.bytes(array)[offset..offset + buffer.len()]);
        Ok(())
    }

    fn data_from(&self, array: Array, offset: u64) -> Result<u64, SourceError> {
        let bytes = self.point.bytes(array);
        let data = bytes[offset as usize..].iter().position(|byte| *byte != 0);
        Ok(data.map_or(bytes.len() as u64, |at| offset + at as u64))
    }

    fn changes(&self, base: &Head) -> Result<Option<Vec<Range>>, SourceError> {
        Ok((base.epoch + 1 == self.point.head.epoch).then(|| self.point.changes.clone()))
    }
}

impl Point {
    pub fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut ram = vec![0; 8 << 20];
        random.fill_bytes(&mut ram[..3 << 20]);
        // A copy, and something that compresses.
        ram.copy_within(0..1 << 20, 4 << 20);
        ram[5 << 20..6 << 20]
            .chunks_mut(PATTERN.len())
            .for_each(|piece| piece.copy_from_slice(&PATTERN[..piece.len()]));
        let mut disk = vec![0; (5 << 20) + 4096 + 512];
        random.fill_bytes(&mut disk[2 << 20..4 << 20]);
        let end = disk.len() - PATTERN.len();
        disk[end..].copy_from_slice(PATTERN);
        let blocks = [("gone", 0), ("pc.ram", ram.len() as u64)];
        let block = |(name, used_bytes): (&str, u64)| RamBlock { name: name.to_owned(), used_bytes, page_bytes: 4096 };
        let layout = Layout {
            machine: "pc-q35-10.0".to_owned(),
            ram: blocks.map(block).to_vec(),
            disks: vec![Disk { target: "vda".to_owned(), size_bytes: disk.len() as u64 }],
        };
        let domain_xml = format!("<domain><title>{}</title></domain>", String::from_utf8_lossy(PATTERN));
        let mut device_state = vec![7; 300_000];
        random.fill_bytes(&mut device_state[..1000]);
        let guest = Guest { layout, domain_xml, device_state };
        Point { head: head(1), guest, ram, disk, changes: Vec::new() }
    }

    pub fn bytes(&self, array: Array) -> &[u8] {
        match array {
            Array::Ram(1) => &self.ram,
            Array::Disk(0) => &self.disk,
            other => panic!("{other:?} is not there"),
        }
    }

    /// The next point: some pages and disk blocks are other.
    pub fn next(&self, random: &mut StdRng, pages: usize) -> Self {
        let mut next = self.clone();
        next.head = head(self.head.epoch + 1);
        next.changes.clear();
        for _ in 0..pages {
            let (array, bytes) =
                if random.random() { (Array::Ram(1), &mut next.ram) } else { (Array::Disk(0), &mut next.disk) };
            let page = random.random_range(0..bytes.len() / 4096);
            random.fill_bytes(&mut bytes[page * 4096..(page + 1) * 4096]);
            next.changes.push((array, page as u64 * 4096, 4096));
        }
        next
    }

    pub fn reading(&self) -> Arc<Reading> {
        Arc::new(Reading { point: self.clone(), reads: AtomicU64::new(0), pause: std::time::Duration::ZERO })
    }

    pub async fn export(&self, vault: &Vault, base: Option<&str>) -> Result<ExportReport, ColdError> {
        let options = ExportOptions { base: base.map(str::to_owned), ..ExportOptions::default() };
        export(vault, self.head.clone(), self.guest.clone(), self.reading(), &options, &|_| ()).await
    }

    /// Asserts that this is what a manifest gives.
    pub async fn assert_restored(&self, vault: &Vault, manifest: Manifest) {
        assert_eq!(manifest.guest, self.guest);
        assert_eq!((manifest.head.epoch, manifest.head.cut_unix_ns), (self.head.epoch, self.head.cut_unix_ns));
        let (ram, disk) = restored(vault, manifest).await.unwrap();
        assert!(ram == self.ram, "RAM is other");
        assert!(disk == self.disk, "the disk is other");
    }
}

/// RAM and disk out of a bucket.
pub async fn restored(vault: &Vault, manifest: Manifest) -> Result<(Vec<u8>, Vec<u8>), ColdError> {
    let pieces = restore(vault, Arc::new(manifest), 4);
    let taking = tokio::task::spawn_blocking(move || {
        let (mut ram, mut disk) = (vec![0; 8 << 20], vec![0; (5 << 20) + 4096 + 512]);
        for piece in pieces {
            let piece = piece?;
            let to = if piece.array == Array::Ram(1) { &mut ram } else { &mut disk };
            to[piece.offset as usize..piece.offset as usize + piece.bytes.len()].copy_from_slice(&piece.bytes);
        }
        Ok((ram, disk))
    });
    taking.await.unwrap()
}

pub fn head(epoch: u64) -> Head {
    Head {
        domain: "web1".to_owned(),
        uuid: UUID,
        generation: 1,
        epoch,
        cut_unix_ns: 1_700_000_000_000_000_000 + epoch * 60_000_000_000,
        application: epoch.is_multiple_of(2),
        // What is exported says the rest.
        ..Head::default()
    }
}

pub fn keys() -> Vec<MasterKey> {
    vec![MasterKey::new(*b"0123456789abcdef0123456789ABCDEF")]
}

pub fn local(directory: &Path) -> Bucket {
    let url = format!("file://{}", directory.display());
    Bucket::open(&Location { url, ..Location::default() }).unwrap()
}

/// Starts an S3 server over a directory; gives where it is.
pub fn s3(directory: &Path) -> (Server, Location) {
    let server = Server::start(std::net::TcpListener::bind("127.0.0.1:0").unwrap(), directory).unwrap();
    let location = Location {
        url: format!("s3://{}/some/prefix", vmdr_test_s3::BUCKET),
        endpoint: Some(server.endpoint()),
        region: Some(vmdr_test_s3::REGION.to_owned()),
        credentials: Some((vmdr_test_s3::ACCESS_KEY.to_owned(), vmdr_test_s3::SECRET_KEY.to_owned())),
    };
    (server, location)
}

/// All files below a directory.
pub fn files(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

/// The files of chunks.
pub fn chunk_files(directory: &Path) -> Vec<std::path::PathBuf> {
    files(directory).into_iter().filter(|path| path.to_string_lossy().contains("/chunks/")).collect()
}
