//! The control record: what a domain's directory contains, in one small file that is replaced as a whole.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::disk::{Disk, Mode, write_all};
use crate::history::Place;
use crate::record::{u16_at, u32_at, u64_at, uuid_text};
use crate::{FORMAT_VERSION, JournalError};

/// The record's name in the domain's directory.
pub const CONTROL_FILE: &str = "control";
/// The name under which it is prepared.
const CONTROL_NEW_FILE: &str = "control.new";

const MAGIC: &[u8; 8] = b"VMDRCTL\0";
const HEAD_BYTES: usize = 16;
const SUM_BYTES: usize = 8;
/// The longest control record read. Usual are 300 bytes.
const CONTROL_BYTES_MAX: u64 = 1 << 20;
/// The largest generation, epoch and number of anything: room to count on. What peers send has the same bound.
const NUMBER_MAX: u64 = u64::MAX / 2;
/// A field with this bit in its tag must be understood; others are kept as they are.
const TAG_CRITICAL: u16 = 0x8000;

const TAG_UUID: u16 = 0x8001;
const TAG_NAME: u16 = 0x0002;
const TAG_GENERATION: u16 = 0x8003;
const TAG_STANDBY: u16 = 0x8004;
const TAG_SEED: u16 = 0x8005;
const TAG_NEXT_DIR: u16 = 0x8006;
const TAG_JOURNAL_FIRST: u16 = 0x8007;
const TAG_DAMAGE: u16 = 0x0008;
const TAG_FROZEN: u16 = 0x8009;
const TAG_HISTORY: u16 = 0x800A;
const TAG_CHAIN: u16 = 0x800B;
const TAG_PIN: u16 = 0x800C;
const TAG_RETENTION: u16 = 0x000D;
const TAG_SMALL_SUMS: u16 = 0x8047;
const TAG_OWNER: u16 = 0x8010;
const TAG_GRANTED: u16 = 0x8011;

const STANDBY_BYTES: usize = 64;
const HISTORY_BYTES: usize = 64;
const SMALL_SUMS_BYTES: usize = 40;

/// The standby: which directory, and what it contains for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standby {
    /// The N of `standby.N`.
    pub dir: u64,
    /// Generation of the recovery point.
    pub generation: u64,
    /// The epoch up to which everything is applied and synced. Parts of later ones may be there too.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// The E of `device-E.state` of this epoch.
    pub device_epoch: u64,
    /// The E of `layout-E` that holds in this epoch.
    pub layout_epoch: u64,
    /// The E of `domain-E.xml` that holds in this epoch.
    pub xml_epoch: u64,
    /// The epoch up to which applying has begun: the files may have anything up to it. At least `epoch`.
    pub applying: u64,
}

/// How far the history of a standby is valid.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HistoryMark {
    /// Up to here there are whole sets, down from the standby's epoch.
    pub committed: Place,
    /// Up to here there are before-images of whatever may have been overwritten since.
    pub announced: Place,
    /// The `applying` of the standby that `announced` is for. Another one there: that batch had no before-images.
    pub announced_for: u64,
    /// The oldest epoch that can be gone back to. Sets before it mean nothing.
    pub floor: u64,
    /// The standby's epoch is application-consistent.
    pub application: bool,
}

/// Checksums of the small files of a standby, XXH3-64. (A layout file has its own.) Where they are, there are checksums of the
/// images too, and a program that does not know of them must not change those.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SmallSums {
    /// The N of the `standby.N`.
    pub dir: u64,
    /// The E of the `device-E.state` that is meant.
    pub device_epoch: u64,
    /// Its checksum.
    pub device: u64,
    /// The E of the `domain-E.xml` that is meant.
    pub xml_epoch: u64,
    /// Its checksum.
    pub xml: u64,
}

/// A standby that a seed has replaced, kept for the points in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// The standby: exactly one epoch.
    pub standby: Standby,
    /// Its history.
    pub history: HistoryMark,
}

/// A point that is kept until it is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// The point's generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// What the operator calls it.
    pub name: String,
}

/// One of every so many nanoseconds is kept for so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// 0: every epoch.
    pub every_ns: u64,
    /// Age up to which.
    pub for_ns: u64,
}

/// A seed that is not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed {
    /// The N of `standby.N` where it grows.
    pub dir: u64,
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// How many of its parts, from 0, are applied and synced.
    pub parts: u32,
}

/// What a domain's directory contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// The domain.
    pub uuid: [u8; 16],
    /// Its name when it was last heard of.
    pub name: String,
    /// The highest generation seen: older hosts are refused.
    pub generation: u64,
    /// The standby, if there is a whole one.
    pub standby: Option<Standby>,
    /// A seed under way.
    pub seed: Option<Seed>,
    /// The N for the next `standby.N`; never used twice.
    pub next_dir: u64,
    /// Journal segments with lower numbers are rubbish.
    pub journal_first: u64,
    /// What the operator should know about damage that was found.
    pub damage: Option<String>,
    /// A guest runs on the standby: nothing may change it.
    pub frozen: bool,
    /// The history of the standby.
    pub history: HistoryMark,
    /// Standbys before this one that are kept, oldest first.
    pub chains: Vec<Chain>,
    /// Points that are kept until they are released.
    pub pins: Vec<Pin>,
    /// What this domain's own retention policy is, if it has one: bytes of history at most, and the tiers.
    pub retention: Option<(u64, Vec<Tier>)>,
    /// Of the standbys that there are.
    pub small_sums: Vec<SmallSums>,
    /// The peer whose domain this is: the first that seeded it.
    pub owner: Option<String>,
    /// Other peers that may do what the owner may.
    pub granted: Vec<String>,
    /// Fields of later versions that need not be understood.
    extra: Vec<(u16, Vec<u8>)>,
}

impl Control {
    /// For a domain of which nothing is stored.
    pub fn new(uuid: [u8; 16], name: &str, generation: u64) -> Self {
        Self {
            uuid,
            name: name.to_owned(),
            generation,
            standby: None,
            seed: None,
            next_dir: 1,
            journal_first: 1,
            damage: None,
            frozen: false,
            history: HistoryMark::default(),
            chains: Vec::new(),
            pins: Vec::new(),
            retention: None,
            small_sums: Vec::new(),
            owner: None,
            granted: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// Notes the checksums of a standby's small files, and forgets those of standbys that are not there any more.
    pub fn put_small_sums(&mut self, sums: SmallSums) {
        self.small_sums.retain(|of| of.dir != sums.dir);
        self.small_sums.push(sums);
        let standbys = self.standby.iter().chain(self.chains.iter().map(|c| &c.standby)).map(|s| s.dir);
        let there: Vec<u64> = standbys.chain(self.seed.iter().map(|seed| seed.dir)).collect();
        self.small_sums.retain(|of| there.contains(&of.dir));
    }

    /// Reads the record of the domain directory `dir`, which must be that of domain `uuid`.
    pub fn load(disk: &dyn Disk, dir: &Path, uuid: &[u8; 16]) -> Result<Self, JournalError> {
        let path = dir.join(CONTROL_FILE);
        let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
        let length = file.length().map_err(JournalError::io("read", &path))?;
        let damaged = |what: String| JournalError::Damaged { path: path.clone(), what };
        if length > CONTROL_BYTES_MAX {
            return Err(damaged(format!("it has {length} bytes, at most {CONTROL_BYTES_MAX} are possible")));
        }
        let mut bytes = vec![0; length as usize];
        let got = file.read_at(&mut bytes, 0).map_err(JournalError::io("read", &path))?;
        bytes.truncate(got);
        let control = Self::from_bytes(&bytes).map_err(|fault| match fault {
            Fault::Damaged(what) => damaged(what),
            Fault::Version(found) => JournalError::Version { path: path.clone(), found },
        })?;
        if control.uuid != *uuid {
            let (expected, found) = (uuid_text(uuid), uuid_text(&control.uuid));
            return Err(JournalError::WrongDomain { path, expected, found });
        }
        Ok(control)
    }

    /// Replaces the record in `dir`. After an error it is the old one or this one.
    pub fn store(&self, disk: &dyn Disk, dir: &Path) -> Result<(), JournalError> {
        let (new, path) = (dir.join(CONTROL_NEW_FILE), dir.join(CONTROL_FILE));
        let file = disk.open(&new, Mode::Create).map_err(JournalError::io("create", &new))?;
        write_all(&*file, &self.to_bytes(), 0).map_err(JournalError::io("write", &new))?;
        file.sync().map_err(JournalError::io("sync", &new))?;
        disk.rename(&new, &path).map_err(JournalError::io("replace", &path))?;
        disk.sync_dir(dir).map_err(JournalError::io("sync", dir))
    }

    /// Makes what [`Control::load`] reads durable, before anything is built on it: who wrote it may have failed to, at the sync of
    /// the file or of its directory. Takes no space: the same bytes are written in place, which another crash cannot tear.
    pub fn settle(disk: &dyn Disk, dir: &Path) -> Result<(), JournalError> {
        let path = dir.join(CONTROL_FILE);
        let file = disk.open(&path, Mode::Write).map_err(JournalError::io("open", &path))?;
        let length = file.length().map_err(JournalError::io("read", &path))?.min(CONTROL_BYTES_MAX);
        let mut bytes = vec![0; length as usize];
        let got = file.read_at(&mut bytes, 0).map_err(JournalError::io("read", &path))?;
        write_all(&*file, &bytes[..got], 0).map_err(JournalError::io("write", &path))?;
        file.sync().map_err(JournalError::io("sync", &path))?;
        disk.sync_dir(dir).map_err(JournalError::io("sync", dir))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut to = Vec::with_capacity(512);
        to.extend_from_slice(MAGIC);
        to.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        to.extend_from_slice(&0u32.to_le_bytes());
        field(&mut to, TAG_UUID, &self.uuid);
        field(&mut to, TAG_NAME, self.name.as_bytes());
        field(&mut to, TAG_GENERATION, &self.generation.to_le_bytes());
        if let Some(s) = &self.standby {
            field(&mut to, TAG_STANDBY, &s.to_bytes());
        }
        if let Some(s) = &self.seed {
            let numbers = [s.dir, s.generation, s.epoch, u64::from(s.parts)];
            field(&mut to, TAG_SEED, &numbers.map(u64::to_le_bytes).concat());
        }
        field(&mut to, TAG_NEXT_DIR, &self.next_dir.to_le_bytes());
        field(&mut to, TAG_JOURNAL_FIRST, &self.journal_first.to_le_bytes());
        if let Some(damage) = &self.damage {
            field(&mut to, TAG_DAMAGE, damage.as_bytes());
        }
        if self.frozen {
            field(&mut to, TAG_FROZEN, &[1]);
        }
        if self.history != HistoryMark::default() {
            field(&mut to, TAG_HISTORY, &self.history.to_bytes());
        }
        for chain in &self.chains {
            field(&mut to, TAG_CHAIN, &[chain.standby.to_bytes(), chain.history.to_bytes()].concat());
        }
        for pin in &self.pins {
            let numbers = [pin.generation, pin.epoch].map(u64::to_le_bytes).concat();
            field(&mut to, TAG_PIN, &[&numbers, pin.name.as_bytes()].concat());
        }
        if let Some((budget, tiers)) = &self.retention {
            let numbers = tiers.iter().flat_map(|tier| [tier.every_ns, tier.for_ns]);
            let bytes: Vec<u8> = std::iter::once(*budget).chain(numbers).flat_map(u64::to_le_bytes).collect();
            field(&mut to, TAG_RETENTION, &bytes);
        }
        for sums in &self.small_sums {
            let SmallSums { dir, device_epoch, device, xml_epoch, xml } = *sums;
            let numbers = [dir, device_epoch, device, xml_epoch, xml];
            field(&mut to, TAG_SMALL_SUMS, &numbers.map(u64::to_le_bytes).concat());
        }
        if let Some(owner) = &self.owner {
            field(&mut to, TAG_OWNER, owner.as_bytes());
        }
        for peer in &self.granted {
            field(&mut to, TAG_GRANTED, peer.as_bytes());
        }
        for (tag, bytes) in &self.extra {
            field(&mut to, *tag, bytes);
        }
        let length = (to.len() - HEAD_BYTES) as u32;
        to[12..16].copy_from_slice(&length.to_le_bytes());
        let sum = xxh3_64(&to);
        to.extend_from_slice(&sum.to_le_bytes());
        to
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, Fault> {
        let damaged = |what: &str| Fault::Damaged(what.to_owned());
        if bytes.len() < HEAD_BYTES + SUM_BYTES || &bytes[..8] != MAGIC {
            return Err(damaged("it is not a control record"));
        }
        let (fields, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
        if u64_at(sum, 0) != xxh3_64(fields) {
            return Err(damaged("its checksum does not match"));
        }
        if u32_at(fields, 8) != FORMAT_VERSION {
            return Err(Fault::Version(u32_at(fields, 8)));
        }
        let mut rest = &fields[HEAD_BYTES..];
        if u32_at(fields, 12) as usize != rest.len() {
            return Err(damaged("its length does not match"));
        }
        let mut uuid = None;
        let mut control = Control::new([0; 16], "", 0);
        while !rest.is_empty() {
            if rest.len() < 6 {
                return Err(damaged("a field is cut short"));
            }
            let (tag, length) = (u16_at(rest, 0), u32_at(rest, 2) as usize);
            let Some((body, after)) = rest[6..].split_at_checked(length) else {
                return Err(damaged("a field is cut short"));
            };
            rest = after;
            let number = |i: usize| u64_at(body, i * 8);
            let long = |n: usize| {
                if body.len() == n { Ok(()) } else { Err(Fault::Damaged(format!("field {tag:#x} has {length} bytes"))) }
            };
            match tag {
                TAG_UUID => {
                    long(16)?;
                    control.uuid.copy_from_slice(body);
                    uuid = Some(());
                }
                TAG_NAME => control.name = String::from_utf8_lossy(body).into_owned(),
                TAG_GENERATION => {
                    long(8)?;
                    control.generation = number(0);
                }
                TAG_STANDBY => {
                    long(STANDBY_BYTES)?;
                    control.standby = Some(Standby::from_bytes(body));
                }
                TAG_SEED => {
                    long(32)?;
                    let parts = u32::try_from(number(3)).map_err(|_| damaged("the seed's parts are out of bounds"))?;
                    control.seed = Some(Seed { dir: number(0), generation: number(1), epoch: number(2), parts });
                }
                TAG_NEXT_DIR => {
                    long(8)?;
                    control.next_dir = number(0);
                }
                TAG_JOURNAL_FIRST => {
                    long(8)?;
                    control.journal_first = number(0);
                }
                TAG_DAMAGE => control.damage = Some(String::from_utf8_lossy(body).into_owned()),
                TAG_FROZEN => control.frozen = true,
                TAG_HISTORY => {
                    long(HISTORY_BYTES)?;
                    control.history = HistoryMark::from_bytes(body);
                }
                TAG_CHAIN => {
                    long(STANDBY_BYTES + HISTORY_BYTES)?;
                    let (standby, history) = body.split_at(STANDBY_BYTES);
                    let chain =
                        Chain { standby: Standby::from_bytes(standby), history: HistoryMark::from_bytes(history) };
                    control.chains.push(chain);
                }
                TAG_PIN => {
                    let Some((numbers, name)) = body.split_at_checked(16) else {
                        return Err(damaged("a pin is cut short"));
                    };
                    let name = String::from_utf8_lossy(name).into_owned();
                    control.pins.push(Pin { generation: u64_at(numbers, 0), epoch: u64_at(numbers, 8), name });
                }
                TAG_RETENTION => {
                    if length < 8 || length % 16 != 8 {
                        return Err(damaged("the retention policy is cut short"));
                    }
                    let tiers =
                        (0..length / 16).map(|i| Tier { every_ns: number(1 + i * 2), for_ns: number(2 + i * 2) });
                    control.retention = Some((number(0), tiers.collect()));
                }
                TAG_SMALL_SUMS => {
                    long(SMALL_SUMS_BYTES)?;
                    control.small_sums.push(SmallSums {
                        dir: number(0),
                        device_epoch: number(1),
                        device: number(2),
                        xml_epoch: number(3),
                        xml: number(4),
                    });
                }
                TAG_OWNER => control.owner = Some(String::from_utf8_lossy(body).into_owned()),
                TAG_GRANTED => control.granted.push(String::from_utf8_lossy(body).into_owned()),
                _ if tag & TAG_CRITICAL != 0 => {
                    return Err(Fault::Damaged(format!("field {tag:#x} is of a later version, use that")));
                }
                _ => control.extra.push((tag, body.to_vec())),
            }
        }
        uuid.ok_or_else(|| damaged("it names no domain"))?;
        control.check()?;
        Ok(control)
    }

    /// Numbers that are counted on must leave room for it, and be in order, whoever wrote them.
    fn check(&self) -> Result<(), Fault> {
        let standbys = self.standby.iter().chain(self.chains.iter().map(|chain| &chain.standby));
        let standbys = standbys
            .flat_map(|s| [s.dir, s.generation, s.epoch, s.device_epoch, s.layout_epoch, s.xml_epoch, s.applying]);
        let marks = std::iter::once(&self.history).chain(self.chains.iter().map(|chain| &chain.history));
        let marks = marks.flat_map(|m| [m.committed.segment, m.announced.segment, m.announced_for, m.floor]);
        let seeds = self.seed.iter().flat_map(|s| [s.dir, s.generation, s.epoch]);
        let own = [self.generation, self.next_dir, self.journal_first];
        if let Some(number) = standbys.chain(marks).chain(seeds).chain(own).find(|number| *number > NUMBER_MAX) {
            return Err(Fault::Damaged(format!("a number in it is {number}, at most {NUMBER_MAX} is possible")));
        }
        let current = self.standby.iter().map(|standby| (standby, &self.history));
        let chains = self.chains.iter().map(|chain| (&chain.standby, &chain.history));
        for (Standby { dir, epoch, applying, .. }, HistoryMark { floor, .. }) in current.chain(chains) {
            if floor > epoch {
                return Err(Fault::Damaged(format!(
                    "the history of standby.{dir}, which is at epoch {epoch}, begins at epoch {floor}"
                )));
            }
            if applying < epoch {
                return Err(Fault::Damaged(format!(
                    "standby.{dir} is at epoch {epoch}, and only up to {applying} was begun to be applied"
                )));
            }
        }
        Ok(())
    }
}

impl Standby {
    fn to_bytes(self) -> Vec<u8> {
        let s = self;
        let numbers =
            [s.dir, s.generation, s.epoch, s.cut_unix_ns, s.device_epoch, s.layout_epoch, s.xml_epoch, s.applying];
        numbers.map(u64::to_le_bytes).concat()
    }

    fn from_bytes(from: &[u8]) -> Self {
        let number = |i: usize| u64_at(from, i * 8);
        Standby {
            dir: number(0),
            generation: number(1),
            epoch: number(2),
            cut_unix_ns: number(3),
            device_epoch: number(4),
            layout_epoch: number(5),
            xml_epoch: number(6),
            applying: number(7),
        }
    }
}

impl HistoryMark {
    fn to_bytes(self) -> Vec<u8> {
        let HistoryMark { committed: c, announced: a, .. } = self;
        let flags = u64::from(self.application);
        let numbers = [c.segment, c.offset, a.segment, a.offset, self.announced_for, self.floor, flags, 0];
        numbers.map(u64::to_le_bytes).concat()
    }

    fn from_bytes(from: &[u8]) -> Self {
        let number = |i: usize| u64_at(from, i * 8);
        HistoryMark {
            committed: Place { segment: number(0), offset: number(1) },
            announced: Place { segment: number(2), offset: number(3) },
            announced_for: number(4),
            floor: number(5),
            application: number(6) & 1 != 0,
        }
    }
}

enum Fault {
    Damaged(String),
    Version(u32),
}

fn field(to: &mut Vec<u8>, tag: u16, body: &[u8]) {
    to.extend_from_slice(&tag.to_le_bytes());
    to.extend_from_slice(&(body.len() as u32).to_le_bytes());
    to.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FsDisk;
    use proptest::prelude::*;

    fn standby(dir: u64) -> Standby {
        Standby {
            dir,
            generation: 4,
            epoch: 5,
            cut_unix_ns: 6,
            device_epoch: 7,
            layout_epoch: 8,
            xml_epoch: 9,
            applying: 18,
        }
    }

    fn full() -> Control {
        Control {
            standby: Some(standby(3)),
            seed: Some(Seed { dir: 10, generation: 11, epoch: 12, parts: 13 }),
            next_dir: 14,
            journal_first: 15,
            damage: Some("epoch 16".to_owned()),
            frozen: true,
            history: HistoryMark {
                committed: Place { segment: 19, offset: 20 },
                announced: Place { segment: 21, offset: u64::MAX },
                announced_for: 22,
                floor: 3,
                application: true,
            },
            chains: vec![
                Chain { standby: standby(30), history: HistoryMark { floor: 5, ..HistoryMark::default() } },
                Chain { standby: standby(40), history: HistoryMark::default() },
            ],
            pins: vec![Pin { generation: 4, epoch: 5, name: "before-upgrade".to_owned() }],
            retention: Some((50, vec![Tier { every_ns: 0, for_ns: 51 }, Tier { every_ns: 52, for_ns: 53 }])),
            small_sums: vec![SmallSums { dir: 3, device_epoch: 7, device: 60, xml_epoch: 9, xml: 61 }],
            owner: Some("ab".repeat(32)),
            granted: vec!["cd".repeat(32), "ef".repeat(32)],
            extra: vec![(0x17, vec![1, 2, 3])],
            ..Control::new([0xab; 16], "gast", 2)
        }
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        for control in [full(), Control::new([0xab; 16], "", 1)] {
            control.store(&FsDisk, dir.path()).unwrap();
            assert_eq!(Control::load(&FsDisk, dir.path(), &[0xab; 16]).unwrap(), control);
        }
        assert_eq!(FsDisk.list(dir.path()).unwrap(), [CONTROL_FILE]);
    }

    #[test]
    fn another_domains_record_is_refused_by_both_names() {
        let dir = tempfile::tempdir().unwrap();
        full().store(&FsDisk, dir.path()).unwrap();
        let error = Control::load(&FsDisk, dir.path(), &[0xcd; 16]).unwrap_err().to_string();
        assert!(error.contains("abababab-abab-abab-abab-abababababab"), "{error}");
        assert!(error.contains("cdcdcdcd-cdcd-cdcd-cdcd-cdcdcdcdcdcd"), "{error}");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let mut bytes = full().to_bytes();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Control::from_bytes(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for length in 0..bytes.len() {
            assert!(Control::from_bytes(&bytes[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_field_that_must_be_understood_is_refused() {
        let mut control = full();
        control.extra = vec![(0x8017, vec![])];
        assert!(
            matches!(Control::from_bytes(&control.to_bytes()), Err(Fault::Damaged(what)) if what.contains("0x8017"))
        );
    }

    #[test]
    fn numbers_that_cannot_be_counted_on_are_refused() {
        for change in [
            (|c: &mut Control| c.generation = u64::MAX) as fn(&mut Control),
            |c| c.next_dir = u64::MAX,
            |c| c.journal_first = u64::MAX,
            |c| c.history.committed.segment = u64::MAX,
            |c| c.chains[0].standby.epoch = NUMBER_MAX + 1,
            |c| c.standby = Some(Standby { applying: u64::MAX, ..standby(1) }),
            |c| c.standby = Some(Standby { applying: 4, ..standby(1) }),
            |c| c.history.floor = 6,
            |c| c.chains[0].history.floor = 6,
        ] {
            let mut control = full();
            change(&mut control);
            assert!(matches!(Control::from_bytes(&control.to_bytes()), Err(Fault::Damaged(_))));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_fields_do_no_harm(fields in prop::collection::vec((0..0x12u16, prop::collection::vec(any::<u8>(), 0..64)), 0..8)) {
            let mut control = Control::new([0; 16], "", 1);
            control.extra = fields.into_iter().map(|(tag, body)| (if tag > 9 { tag - 9 } else { tag | 0x8000 }, body)).collect();
            let _ = Control::from_bytes(&control.to_bytes());
        }
    }
}
