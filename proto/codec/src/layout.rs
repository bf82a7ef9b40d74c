//! What a guest consists of: RAM blocks, disks, machine type.

use std::collections::HashSet;

use crate::decode::Cursor;
use crate::{CodecError, PAGE_BYTES};

/// RAM blocks a layout may have. A q35 guest has some 20.
pub const BLOCKS_MAX: usize = 1024;
/// Disks a layout may have.
pub const DISKS_MAX: usize = 256;
/// Bytes of a block's name, a disk's target or a machine type. QEMU's own limit for block names is 256.
pub const STRING_BYTES_MAX: usize = 256;

/// A RAM block of the guest, as `info ramblock` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of the block.
    pub name: String,
    /// Bytes in use; 0: the block is no longer there, its number is kept.
    pub used_bytes: u64,
    /// Page size of the host's mapping.
    pub page_bytes: u32,
}

impl RamBlock {
    /// How many 4 KiB pages the block has.
    pub fn pages(&self) -> u64 {
        self.used_bytes.div_ceil(PAGE_BYTES as u64)
    }
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// libvirt's target name, for example `vda`. Letters, digits, `_`, `-` and, not first, `.`: it names a file.
    pub target: String,
    /// Virtual size.
    pub size_bytes: u64,
}

/// What a guest consists of. Block and disk numbers in records are indices into these lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// QEMU's machine type, with version, for example `pc-q35-10.0`.
    pub machine: String,
    /// RAM blocks in order of their numbers.
    pub ram: Vec<RamBlock>,
    /// Disks in order of their numbers.
    pub disks: Vec<Disk>,
}

/// What the names of RAM blocks begin with that outlast a guest's power: flash, with firmware and UEFI variables.
const FLASH: &str = "system.flash";

impl Layout {
    /// Whether this is a guest that does not run: it has shut down and has disks, but no memory.
    pub fn is_off(&self) -> bool {
        self.ram.iter().all(|block| block.used_bytes == 0 || block.name.starts_with(FLASH))
    }

    /// Bytes of each RAM block, in whole pages, and of each disk.
    pub fn lengths(&self) -> impl Iterator<Item = u64> {
        let ram = self.ram.iter().map(|block| block.pages().saturating_mul(PAGE_BYTES as u64));
        ram.chain(self.disks.iter().map(|disk| disk.size_bytes))
    }

    /// Checks bounds, names and that no name is there twice.
    pub fn check(&self) -> Result<(), CodecError> {
        bound("RAM blocks", self.ram.len() as u64, 0, BLOCKS_MAX as u64)?;
        bound("disks", self.disks.len() as u64, 0, DISKS_MAX as u64)?;
        bound("machine type length", self.machine.len() as u64, 0, STRING_BYTES_MAX as u64)?;
        if self.machine.contains('\0') {
            return Err(CodecError::Text { what: "machine type" });
        }
        let mut names = HashSet::new();
        for block in &self.ram {
            bound("RAM block name length", block.name.len() as u64, 1, STRING_BYTES_MAX as u64)?;
            bound("RAM block bytes", block.used_bytes, 0, i64::MAX as u64)?;
            if block.name.contains('\0') {
                return Err(CodecError::Text { what: "RAM block name" });
            }
            if !block.page_bytes.is_power_of_two() {
                let (value, max) = (u64::from(block.page_bytes), 1 << 31);
                return Err(CodecError::OutOfBounds { what: "RAM block page size", value, min: 1, max });
            }
            if block.used_bytes > 0 && !names.insert(block.name.as_str()) {
                return Err(CodecError::Duplicate { what: "RAM block", name: block.name.clone() });
            }
        }
        names.clear();
        for disk in &self.disks {
            bound("disk target length", disk.target.len() as u64, 1, STRING_BYTES_MAX as u64)?;
            bound("disk bytes", disk.size_bytes, 0, i64::MAX as u64)?;
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if !disk.target.chars().all(good) || disk.target.starts_with('.') {
                return Err(CodecError::Text { what: "disk target" });
            }
            if !names.insert(disk.target.as_str()) {
                return Err(CodecError::Duplicate { what: "disk", name: disk.target.clone() });
            }
        }
        Ok(())
    }

    /// The body of a Layout record.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CodecError> {
        self.check()?;
        let mut to = Vec::new();
        string(&mut to, &self.machine);
        to.extend_from_slice(&(self.ram.len() as u16).to_le_bytes());
        for block in &self.ram {
            string(&mut to, &block.name);
            to.extend_from_slice(&block.used_bytes.to_le_bytes());
            to.extend_from_slice(&block.page_bytes.to_le_bytes());
        }
        to.extend_from_slice(&(self.disks.len() as u16).to_le_bytes());
        for disk in &self.disks {
            string(&mut to, &disk.target);
            to.extend_from_slice(&disk.size_bytes.to_le_bytes());
        }
        Ok(to)
    }

    /// From the body of a Layout record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut from = Cursor::new("layout", bytes);
        let machine = from.string()?;
        let mut layout = Layout { machine, ..Layout::default() };
        let blocks = usize::from(from.u16()?);
        bound("RAM blocks", blocks as u64, 0, BLOCKS_MAX as u64)?;
        for _ in 0..blocks {
            let name = from.string()?;
            layout.ram.push(RamBlock { name, used_bytes: from.u64()?, page_bytes: from.u32()? });
        }
        let disks = usize::from(from.u16()?);
        bound("disks", disks as u64, 0, DISKS_MAX as u64)?;
        for _ in 0..disks {
            let target = from.string()?;
            layout.disks.push(Disk { target, size_bytes: from.u64()? });
        }
        from.end()?;
        layout.check()?;
        Ok(layout)
    }
}

pub(crate) fn bound(what: &'static str, value: u64, min: u64, max: u64) -> Result<(), CodecError> {
    if value < min || value > max {
        return Err(CodecError::OutOfBounds { what, value, min, max });
    }
    Ok(())
}

fn string(to: &mut Vec<u8>, text: &str) {
    to.extend_from_slice(&(text.len() as u16).to_le_bytes());
    to.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_memory_is_off() {
        let block = |name: &str, used_bytes| RamBlock { name: name.to_owned(), used_bytes, page_bytes: 4096 };
        let layout = |ram| Layout { ram, ..Layout::default() };
        assert!(layout(vec![]).is_off());
        assert!(layout(vec![block("pc.ram", 0), block("system.flash1", 4096)]).is_off());
        assert!(!layout(vec![block("pc.ram", 4096), block("system.flash1", 4096)]).is_off());
    }
}
