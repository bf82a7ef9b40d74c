//! A recovery point in a bucket: what it is, what of it is small, and which chunks the rest consists of.
//!
//! The first segment is the [`Head`], as JSON: enough for a list of points without reading more. The body is, numbers
//! little-endian:
//!
//! | type | meaning |
//! | --- | --- |
//! | u32, bytes | the layout, as `vmdr-codec` has it (record 6) |
//! | u32, bytes | the domain's XML, UTF-8 |
//! | u32, bytes | QEMU's device state |
//! | u16 | how many arrays follow |
//!
//! and for each array `u8` (0 RAM block, 1 disk), `u16` its number in the layout, `u64` its length in bytes, `u32` how many runs
//! follow; a run is `u8` (0 zero chunks, 1 chunks), `u32` how many, and for chunks their names of 32 bytes each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmdr_codec::{BLOCKS_MAX, DEVICE_STATE_BYTES_MAX, DISKS_MAX, DOMAIN_XML_BYTES_MAX, Layout, PAGE_BYTES};

use crate::chunk::CHUNK_BYTES_MAX;
use crate::keys::DataKey;
use crate::sealed::{self, MANIFEST, Place};
use crate::{CHUNK_BYTES, ColdError};

/// The largest manifest: 12 TiB of guest without a single zero chunk.
pub const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// The longest head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Bytes of an encoded layout, at most.
const LAYOUT_BYTES_MAX: usize = 1 << 20;

/// The name of a chunk: a keyed hash of its content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(pub [u8; 32]);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let good = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if text.len() != 64 || !text.as_bytes().iter().all(good) {
            return Err(());
        }
        let mut name = Name([0; 32]);
        for (i, byte) in name.0.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).map_err(|_| ())?;
        }
        Ok(name)
    }
}

/// A RAM block or disk, by its number in the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Array {
    /// A RAM block.
    Ram(u16),
    /// A disk.
    Disk(u16),
}

/// What a point is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The domain's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The point's generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// The guest's file systems were at rest at its cut.
    pub application: bool,
    /// When it was exported.
    #[serde(default)]
    pub exported_unix_ns: u64,
    /// Which version of vmdr exported it.
    #[serde(default)]
    pub exporter: String,
    /// Bytes of a chunk, but an array's last.
    pub chunk_bytes: u32,
    /// Bytes of RAM, and of disks, zeroes included.
    #[serde(default)]
    pub ram_bytes: u64,
    /// See `ram_bytes`.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Chunks that it lists, zero ones not counted.
    #[serde(default)]
    pub chunks: u64,
}

impl Head {
    /// GENERATION-EPOCH.
    pub fn point(&self) -> String {
        format!("{}-{}", self.generation, self.epoch)
    }

    /// The manifest's name within the domain. The time is in it, so that what another life of the domain exported under the same
    /// number is not replaced.
    pub fn object(&self) -> String {
        format!("points/{:020}-{}", self.cut_unix_ns, self.point())
    }
}

/// What of a guest is not in chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guest {
    /// RAM blocks, disks, machine type.
    pub layout: Layout,
    /// The domain's XML.
    pub domain_xml: String,
    /// QEMU's device state; empty of a guest that is off.
    pub device_state: Vec<u8>,
}

impl Guest {
    /// The arrays that have content, with their lengths in bytes.
    pub fn arrays(&self) -> impl Iterator<Item = (Array, u64)> + '_ {
        let ram = self.layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
        let ram = ram.map(|(n, block)| (Array::Ram(n as u16), block.pages() * PAGE_BYTES as u64));
        let disks = self.layout.disks.iter().enumerate().map(|(n, disk)| (Array::Disk(n as u16), disk.size_bytes));
        ram.chain(disks)
    }

    /// What tells an array from another of the same number: the block's name or the disk's target.
    pub(crate) fn title(&self, array: Array) -> Option<&str> {
        match array {
            Array::Ram(n) => self.layout.ram.get(usize::from(n)).map(|block| block.name.as_str()),
            Array::Disk(n) => self.layout.disks.get(usize::from(n)).map(|disk| disk.target.as_str()),
        }
    }
}

/// The chunks of an array in order; `None`: zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayChunks {
    /// Which.
    pub array: Array,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its chunks.
    pub chunks: Vec<Option<Name>>,
}

/// A recovery point in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// What it is.
    pub head: Head,
    /// What is not in chunks.
    pub guest: Guest,
    /// What is.
    pub arrays: Vec<ArrayChunks>,
}

/// How many chunks an array of this length has.
pub(crate) fn chunk_count(bytes: u64, chunk_bytes: u32) -> u64 {
    bytes.div_ceil(u64::from(chunk_bytes.max(1)))
}

impl Manifest {
    /// All names, with repetitions.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.arrays.iter().flat_map(|array| array.chunks.iter().flatten())
    }

    /// Makes the object.
    pub(crate) fn seal(&self, key: &DataKey) -> Result<Vec<u8>, ColdError> {
        let shown = self.head.object();
        let owner = self.head.uuid.into_bytes();
        let place = Place { kind: MANIFEST, owner: &owner, name: shown.as_bytes(), shown: &shown };
        let head = serde_json::to_vec(&self.head).map_err(|e| place.damaged(&e.to_string()))?;
        let body = self.body().map_err(|e| place.damaged(&e))?;
        if body.len() as u64 > MANIFEST_BYTES_MAX - (MANIFEST_BYTES_MAX >> 8) || head.len() > HEAD_BYTES_MAX {
            let (domain, point) = (&self.head.domain, self.head.point());
            return Err(ColdError::Limit(format!(
                "point {point} of {domain} has more chunks than a manifest holds (12 TiB of data)"
            )));
        }
        sealed::seal(key, place, head, &body)
    }

    /// Reads the object of this name.
    pub(crate) fn open(key: &DataKey, uuid: Uuid, name: &str, object: &[u8]) -> Result<Self, ColdError> {
        let owner = uuid.into_bytes();
        let place = Place { kind: MANIFEST, owner: &owner, name: name.as_bytes(), shown: name };
        let (head, body) = sealed::open(key, place, object)?;
        let head = check_head(place, uuid, &head)?;
        Self::parse(head, &body).map_err(|what| place.damaged(&what))
    }

    fn body(&self) -> Result<Vec<u8>, String> {
        let mut to = Vec::new();
        let layout = self.guest.layout.to_bytes().map_err(|e| e.to_string())?;
        for bytes in [&layout, self.guest.domain_xml.as_bytes(), &self.guest.device_state] {
            to.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            to.extend_from_slice(bytes);
        }
        to.extend_from_slice(&(self.arrays.len() as u16).to_le_bytes());
        for array in &self.arrays {
            let (kind, number) = match array.array {
                Array::Ram(n) => (0, n),
                Array::Disk(n) => (1, n),
            };
            to.push(kind);
            to.extend_from_slice(&number.to_le_bytes());
            to.extend_from_slice(&array.bytes.to_le_bytes());
            let runs: Vec<_> = array.chunks.chunk_by(|a, b| a.is_some() == b.is_some()).collect();
            to.extend_from_slice(&(runs.len() as u32).to_le_bytes());
            for run in runs {
                to.push(u8::from(run[0].is_some()));
                to.extend_from_slice(&(run.len() as u32).to_le_bytes());
                run.iter().flatten().for_each(|name| to.extend_from_slice(&name.0));
            }
        }
        Ok(to)
    }

    fn parse(head: Head, body: &[u8]) -> Result<Self, String> {
        let mut from = Cursor(body);
        let layout = from.bytes(LAYOUT_BYTES_MAX)?;
        let layout = Layout::from_bytes(layout).map_err(|e| e.to_string())?;
        let xml = from.bytes(DOMAIN_XML_BYTES_MAX as usize)?;
        let domain_xml = String::from_utf8(xml.to_vec()).map_err(|_| "the XML is not UTF-8".to_owned())?;
        let device_state = from.bytes(DEVICE_STATE_BYTES_MAX as usize)?.to_vec();
        let guest = Guest { layout, domain_xml, device_state };
        let count = usize::from(from.u16()?);
        if count > BLOCKS_MAX + DISKS_MAX {
            return Err(format!("it lists {count} arrays"));
        }
        let mut arrays = Vec::with_capacity(count);
        for (array, bytes) in guest.arrays() {
            let kind = from.u8()?;
            let found = match (kind, from.u16()?) {
                (0, n) => Array::Ram(n),
                (1, n) => Array::Disk(n),
                _ => return Err(format!("an array of kind {kind}")),
            };
            let length = from.u64()?;
            if (found, length) != (array, bytes) {
                return Err(format!("it lists {found:?} of {length} bytes where {array:?} of {bytes} is next"));
            }
            let wanted = chunk_count(bytes, head.chunk_bytes);
            let runs = from.u32()?;
            let mut chunks: Vec<Option<Name>> = Vec::new();
            for _ in 0..runs {
                let (kind, count) = (from.u8()?, from.u32()?);
                if u64::from(count) > wanted - chunks.len() as u64 || count == 0 {
                    return Err(format!("{array:?} has too many chunks"));
                }
                match kind {
                    0 => chunks.resize(chunks.len() + count as usize, None),
                    1 => {
                        let names = from.take(count as usize * 32)?;
                        let name = |name: &[u8]| name.try_into().ok().map(Name);
                        chunks.extend(names.chunks_exact(32).map(name));
                    }
                    _ => return Err(format!("a run of kind {kind}")),
                }
            }
            if chunks.len() as u64 != wanted {
                return Err(format!("{array:?} has {} chunks, {wanted} are needed", chunks.len()));
            }
            arrays.push(ArrayChunks { array, bytes, chunks });
        }
        if arrays.len() != count || !from.0.is_empty() {
            return Err("it lists more arrays than there are".to_owned());
        }
        Ok(Manifest { head, guest, arrays })
    }
}

/// Reads a head, and checks that it is of this domain and of the object in which it stands.
pub(crate) fn check_head(place: Place<'_>, uuid: Uuid, bytes: &[u8]) -> Result<Head, ColdError> {
    if bytes.len() > HEAD_BYTES_MAX {
        return Err(place.damaged("its head is too long"));
    }
    let head: Head = serde_json::from_slice(bytes).map_err(|e| place.damaged(&format!("its head: {e}")))?;
    if head.uuid != uuid || head.object() != place.shown {
        return Err(place.damaged("it belongs elsewhere"));
    }
    if !head.chunk_bytes.is_power_of_two() || head.chunk_bytes < 4096 || head.chunk_bytes > CHUNK_BYTES_MAX {
        return Err(place.damaged(&format!("chunks of {} bytes", head.chunk_bytes)));
    }
    Ok(head)
}

/// Bytes under a head, at least: a list of points asks for so many.
pub(crate) const HEAD_BYTES_USUAL: u64 = 4096;
const _: () = assert!(CHUNK_BYTES.is_power_of_two());

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], String> {
        let short = || format!("{bytes} bytes are needed, {} are left", self.0.len());
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or_else(short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| "cut short".to_owned())
    }

    fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn bytes(&mut self, max: usize) -> Result<&'a [u8], String> {
        let length = self.u32()? as usize;
        if length > max {
            return Err(format!("{length} bytes where {max} are possible"));
        }
        self.take(length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmdr_codec::{Disk, RamBlock};

    use super::*;

    fn manifest() -> Manifest {
        let ram = RamBlock { name: "pc.ram".to_owned(), used_bytes: 5 << 20, page_bytes: 4096 };
        let gone = RamBlock { name: "gone".to_owned(), used_bytes: 0, page_bytes: 4096 };
        let disk = Disk { target: "vda".to_owned(), size_bytes: (2 << 20) + 1000 };
        let layout = Layout { machine: "pc".to_owned(), ram: vec![gone, ram], disks: vec![disk] };
        let guest = Guest { layout, domain_xml: "<domain/>".to_owned(), device_state: vec![1, 2, 3] };
        let name = |n| Some(Name([n; 32]));
        Manifest {
            head: Head {
                domain: "web1".to_owned(),
                uuid: Uuid::from_u128(7),
                generation: 1,
                epoch: 9,
                cut_unix_ns: 5,
                application: true,
                exported_unix_ns: 6,
                exporter: "x".to_owned(),
                chunk_bytes: CHUNK_BYTES,
                ram_bytes: 5 << 20,
                disk_bytes: 3,
                chunks: 4,
            },
            guest,
            arrays: vec![
                ArrayChunks { array: Array::Ram(1), bytes: 5 << 20, chunks: vec![None, name(1), name(2), None, None] },
                ArrayChunks { array: Array::Disk(0), bytes: (2 << 20) + 1000, chunks: vec![name(1), name(1), None] },
            ],
        }
    }

    #[test]
    fn it_is_read_as_it_was_written_and_in_its_place_only() {
        let key = DataKey::generate().unwrap();
        let manifest = manifest();
        let (uuid, name) = (manifest.head.uuid, manifest.head.object());
        let object = manifest.seal(&key).unwrap();
        assert_eq!(Manifest::open(&key, uuid, &name, &object).unwrap(), manifest);
        let refused = |key: &DataKey, uuid, name: &str, object: &[u8]| {
            Manifest::open(key, uuid, name, object).unwrap_err().to_string()
        };
        assert!(refused(&key, Uuid::from_u128(8), &name, &object).contains("does not open"));
        assert!(refused(&key, uuid, &name.replace("-9", "-8"), &object).contains("does not open"));
        assert!(refused(&DataKey::generate().unwrap(), uuid, &name, &object).contains("data key"));
        for at in 0..object.len() {
            let mut changed = object.clone();
            changed[at] ^= 1 << (at % 8);
            assert!(Manifest::open(&key, uuid, &name, &changed).is_err(), "byte {at}");
            assert!(Manifest::open(&key, uuid, &name, &object[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn names_are_read_strictly() {
        let name = Name([0xab; 32]);
        assert_eq!(name.to_string().parse(), Ok(name));
        for text in ["", "ab", &"AB".repeat(32), &"g".repeat(64), &"+1".repeat(32), &"é".repeat(32)] {
            assert_eq!(text.parse::<Name>(), Err(()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_do_no_harm(body in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..400, byte: u8) {
            let manifest = manifest();
            let _ = Manifest::parse(manifest.head.clone(), &body);
            let mut changed = manifest.body().unwrap();
            let at = at % changed.len();
            changed[at] = byte;
            let _ = Manifest::parse(manifest.head, &changed);
        }
    }
}
