//! Recovery points: what there is, where its files are, and what they hash to; who may write.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmdr_codec::{DOMAIN_XML_BYTES_MAX, Digest, Layout};
use vmdr_journal::{JournalError, Mode};

use super::NUMBER_MAX;
use super::domain::Domain;
use super::ingest::Ingest;
use super::standby::{self, read_layout, read_small};
use super::{DomainSummary, StoreError};

/// Bytes hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// A recovery point in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// Bytes that it takes up on the disk.
    pub bytes: u64,
}

/// A recovery point that can be activated. The files may be changed by later epochs unless the domain is frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryPoint {
    /// The domain's UUID.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// The point's generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// QEMU's machine type, with version.
    pub machine: String,
    /// The domain's XML.
    pub domain_xml: String,
    /// The RAM blocks that are there.
    pub ram: Vec<RamImage>,
    /// What xen-save-devices-state wrote.
    pub device_state: PathBuf,
    /// The disks.
    pub disks: Vec<DiskImage>,
    /// The standby's directory.
    pub dir: PathBuf,
    /// What it consists of, blocks that are gone included.
    pub layout: Layout,
}

/// A RAM block of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamImage {
    /// QEMU's name of it.
    pub name: String,
    /// Bytes in use; the file has these, rounded up to 4 KiB.
    pub used_bytes: u64,
    /// Page size of the protected host's mapping.
    pub page_bytes: u32,
    /// The file.
    pub path: PathBuf,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// libvirt's target name.
    pub target: String,
    /// Virtual size; the file has this length.
    pub size_bytes: u64,
    /// The file, raw.
    pub path: PathBuf,
}

/// What the standby hashes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The generation.
    pub generation: u64,
    /// The epoch that was hashed.
    pub epoch: u64,
    /// The RAM blocks.
    pub ram: Vec<VerifiedImage>,
    /// The disks.
    pub disks: Vec<VerifiedImage>,
    /// XXH3-128 of the device state.
    pub device_state: u128,
}

/// What a RAM block or disk hashes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedImage {
    /// The block's name or disk's target.
    pub name: String,
    /// Bytes hashed: the block's bytes in use, the disk's size.
    pub bytes: u64,
    /// XXH3-128 of them.
    pub xxh3: u128,
}

impl Domain {
    pub fn open_stream(self: &Arc<Self>, name: &str, generation: u64) -> Result<Ingest, StoreError> {
        let mut ingest = self.ingest();
        let (stored, frozen, known) = {
            let shared = self.shared();
            self.alive(&shared)?;
            (shared.position.generation, shared.frozen, shared.name == name)
        };
        if frozen {
            return Err(StoreError::Frozen(self.id.clone()));
        }
        let generation = if generation == 0 { stored } else { generation };
        if generation > NUMBER_MAX {
            let what = format!("generation {generation} is out of range");
            return Err(StoreError::Corrupt { domain: self.id.clone(), epoch: 0, part: 0, what });
        }
        if generation < stored {
            return Err(StoreError::Fenced { domain: self.id.clone(), offered: generation, stored });
        }
        ingest.give_up_part(self)?;
        if generation > stored {
            self.discard_open(&mut ingest)?;
        }
        if generation > stored || !known {
            self.change_control(|control| {
                control.generation = generation;
                control.name = name.to_owned();
            })?;
        }
        let mut shared = self.shared();
        shared.position.generation = generation;
        shared.name = name.to_owned();
        shared.stream += 1;
        shared.stream_open = true;
        self.changed.notify_all();
        Ok(Ingest { domain: self.clone(), stream: shared.stream, generation })
    }

    pub fn raise_generation(&self, generation: u64) -> Result<u64, StoreError> {
        let mut ingest = self.ingest();
        let stored = {
            let shared = self.shared();
            self.alive(&shared)?;
            shared.position.generation
        };
        if generation <= stored {
            return Ok(stored);
        }
        ingest.give_up_part(self)?;
        self.change_control(|control| control.generation = generation)?;
        {
            let mut shared = self.shared();
            shared.position.generation = generation;
            shared.stream_open = false;
            self.changed.notify_all();
        }
        self.discard_open(&mut ingest)?;
        Ok(generation)
    }

    pub fn set_frozen(&self, frozen: bool) -> Result<(), StoreError> {
        {
            let mut ingest = self.ingest();
            {
                let mut shared = self.shared();
                self.alive(&shared)?;
                if shared.frozen == frozen {
                    return Ok(());
                }
                if frozen {
                    // In force before it is durable: nothing may become durable behind what is waited for.
                    shared.frozen = true;
                    shared.stream_open = false;
                }
                self.changed.notify_all();
            }
            ingest.give_up_part(self)?;
        }
        let result = if frozen { self.wait_synced() } else { Ok(()) };
        let result = result.and_then(|()| self.change_control(|control| control.frozen = frozen));
        let mut shared = self.shared();
        shared.frozen = if result.is_ok() { frozen } else { !frozen };
        result
    }

    pub fn recovery_point(&self) -> Result<RecoveryPoint, StoreError> {
        self.wait_synced()?;
        let (name, durable) = {
            let control = self.control();
            (control.name.clone(), control.standby)
        };
        let durable = durable.ok_or_else(|| StoreError::NoPoint(self.id.clone()))?;
        let dir = self.standby_dir(durable.dir);
        let of = |error| StoreError::of(&self.id, error);
        let layout = read_layout(&*self.disk, &standby::layout_path(&dir, durable.layout_epoch)).map_err(of)?;
        let xml_path = standby::xml_path(&dir, durable.xml_epoch);
        let xml = read_small(&*self.disk, &xml_path, DOMAIN_XML_BYTES_MAX).map_err(of)?;
        let domain_xml = String::from_utf8(xml).map_err(|_| {
            let what = format!("{} is not UTF-8", xml_path.display());
            StoreError::Damaged { domain: self.id.clone(), what }
        })?;
        let whole = layout.clone();
        let ram = layout.ram.into_iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
        let ram = ram.map(|(i, block)| RamImage {
            name: block.name,
            used_bytes: block.used_bytes,
            page_bytes: block.page_bytes,
            path: standby::ram_path(&dir, i),
        });
        let disks = layout.disks.into_iter().map(|disk| DiskImage {
            path: standby::disk_path(&dir, &disk.target),
            target: disk.target,
            size_bytes: disk.size_bytes,
        });
        Ok(RecoveryPoint {
            uuid: self.id.clone(),
            name,
            generation: durable.generation,
            epoch: durable.epoch,
            cut_unix_ns: durable.cut_unix_ns,
            machine: layout.machine,
            domain_xml,
            ram: ram.collect(),
            device_state: standby::device_path(&dir, durable.device_epoch),
            disks: disks.collect(),
            dir,
            layout: whole,
        })
    }

    pub fn points(&self, bytes: u64) -> Vec<Point> {
        let shared = self.shared();
        let (generation, epoch, cut_unix_ns) = (shared.point_generation, shared.position.epoch, shared.cut_unix_ns);
        if epoch == 0 { Vec::new() } else { vec![Point { generation, epoch, cut_unix_ns, bytes }] }
    }

    pub fn verify(&self) -> Result<Verified, StoreError> {
        self.wait_synced()?;
        let mut standby = self.standby();
        let Some(applier) = &mut *standby else { return Err(StoreError::NoPoint(self.id.clone())) };
        // The lock is only ever let go of between batches, when the files are exactly one epoch; or in the middle of one
        // that ran out of space.
        if applier.durable.applying != applier.durable.epoch {
            let (epoch, applying) = (applier.durable.epoch, applier.durable.applying);
            let what = format!("the standby is between epochs {epoch} and {applying} until there is space");
            return Err(StoreError::Full { domain: self.id.clone(), what });
        }
        let (durable, layout) = (applier.durable, applier.files.layout().clone());
        let dir = applier.files.dir().to_owned();
        let hash = |path: &Path, bytes: u64| self.hash(path, bytes).map_err(|error| StoreError::of(&self.id, error));
        let mut verified = Verified {
            generation: durable.generation,
            epoch: durable.epoch,
            ram: Vec::new(),
            disks: Vec::new(),
            device_state: 0,
        };
        for (i, block) in layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0) {
            let xxh3 = hash(&standby::ram_path(&dir, i), block.used_bytes)?;
            verified.ram.push(VerifiedImage { name: block.name.clone(), bytes: block.used_bytes, xxh3 });
        }
        for disk in &layout.disks {
            let xxh3 = hash(&standby::disk_path(&dir, &disk.target), disk.size_bytes)?;
            verified.disks.push(VerifiedImage { name: disk.target.clone(), bytes: disk.size_bytes, xxh3 });
        }
        let path = standby::device_path(&dir, durable.device_epoch);
        let length = self.disk.open(&path, Mode::Read).and_then(|file| file.length());
        let length = length.map_err(JournalError::io("read", &path)).map_err(|e| StoreError::of(&self.id, e))?;
        verified.device_state = hash(&path, length)?;
        Ok(verified)
    }

    fn hash(&self, path: &Path, bytes: u64) -> Result<u128, JournalError> {
        let file = self.disk.open(path, Mode::Read).map_err(JournalError::io("open", path))?;
        let mut digest = Digest::new();
        let mut buffer = vec![0; HASH_BYTES];
        let mut at = 0;
        while at < bytes {
            let now = (bytes - at).min(buffer.len() as u64) as usize;
            let got = file.read_at(&mut buffer[..now], at).map_err(JournalError::io("read", path))?;
            if got != now {
                let what = format!("it ends at {}, it should have {bytes} bytes", at + got as u64);
                return Err(JournalError::Damaged { path: path.to_owned(), what });
            }
            digest.update(&buffer[..now]);
            at += now as u64;
        }
        let (low, high) = digest.halves();
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    pub fn summarize(&self, summary: &mut DomainSummary) {
        let shared = self.shared();
        summary.name = shared.name.clone();
        summary.position = shared.position;
        summary.point_generation = shared.point_generation;
        summary.cut_unix_ns = shared.cut_unix_ns;
        summary.applied_epoch = shared.applied;
        summary.backlog_bytes = shared.backlog_bytes;
        summary.receiving = shared.stream_open;
        summary.frozen = shared.frozen;
        summary.trouble = shared.failed.clone().or(shared.stalled.clone()).or(shared.damage.clone());
    }
}
