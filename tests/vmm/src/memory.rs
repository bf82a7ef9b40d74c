//! Guest memory of each kind of pages that the host offers.
#![allow(unsafe_code)]

use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vmdr_kvm_log::Slot;

use crate::program::{AREA, LOW_BYTES};

/// What the area that the guest writes is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Anonymous memory in pages of 4 KiB.
    Anonymous,
    /// Anonymous memory in transparent huge pages.
    TransparentHuge,
    /// A shared memfd in huge pages of 2 MiB.
    HugeMemfd,
    /// A shared memfd.
    Memfd,
    /// A private mapping of a file.
    PrivateFile,
}

impl Kind {
    /// Bytes of the pages that the host maps it with, as far as they are fixed.
    pub fn page_bytes(self) -> u64 {
        if self == Self::HugeMemfd { 2 << 20 } else { 4096 }
    }

    /// The word at this place of the area before the guest has run: a file has content in every other 2 MiB, the rest is holes.
    pub fn initial(self, at: u64) -> u32 {
        if self == Self::PrivateFile && at >> 21 & 1 == 0 { 0xa5a5_a5a5 } else { 0 }
    }

    fn map(self, bytes: usize) -> Result<MmapRegion> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let region = match self {
            Self::Anonymous | Self::TransparentHuge => {
                let region = MmapRegion::build(None, bytes, protection, private | libc::MAP_ANONYMOUS)?;
                let advice = if self == Self::Anonymous { libc::MADV_NOHUGEPAGE } else { libc::MADV_HUGEPAGE };
                // SAFETY: the mapping is ours, and the advice changes nothing of its content.
                let result = unsafe { libc::madvise(region.as_ptr().cast(), bytes, advice) };
                ensure!(result == 0, "madvise: {}", std::io::Error::last_os_error());
                region
            }
            Self::HugeMemfd | Self::Memfd => {
                let huge = if self == Self::HugeMemfd {
                    MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB
                } else {
                    MemfdFlags::empty()
                };
                let file = memfd_create("vmdr-test-vmm", MemfdFlags::CLOEXEC | huge).context("make a memfd")?;
                ftruncate(&file, bytes as u64).context("size the memfd")?;
                MmapRegion::build(Some(FileOffset::new(file.into(), 0)), bytes, protection, libc::MAP_SHARED)?
            }
            Self::PrivateFile => {
                let file = tempfile::tempfile().context("make a file")?;
                for at in (0..bytes as u64).step_by(4 << 20) {
                    let word = self.initial(at).to_le_bytes();
                    file.write_all_at(&word.repeat((2 << 20) / word.len()), at)?;
                }
                file.set_len(bytes as u64)?;
                MmapRegion::build(Some(FileOffset::new(file, 0)), bytes, protection, private)?
            }
        };
        Ok(region)
    }
}

/// Guest memory: [`LOW_BYTES`] for program and page tables, and an area of this kind. Every other 2 MiB of the area are in memory
/// from the beginning, the others not before the guest comes.
pub fn memory(kind: Kind, area_bytes: u64) -> Result<GuestMemoryMmap> {
    let low = MmapRegion::new(LOW_BYTES as usize)?;
    let area = kind.map(area_bytes as usize).with_context(|| format!("memory of kind {kind:?}"))?;
    let regions = [(low, 0), (area, AREA)].map(|(mapping, at)| GuestRegionMmap::new(mapping, GuestAddress(at)));
    let regions = regions.into_iter().collect::<Option<Vec<_>>>().context("guest memory is beyond its addresses")?;
    let memory = GuestMemoryMmap::from_regions(regions)?;
    for at in (0..area_bytes).filter(|at| at >> 21 & 1 == 0).step_by(4096) {
        let old: u8 = memory.read_obj(GuestAddress(AREA + at))?;
        memory.write_obj(old, GuestAddress(AREA + at))?;
    }
    if kind == Kind::TransparentHuge {
        let slots = slots(&memory)?;
        let huge = anonymous_huge_bytes(slots[1].host_address, area_bytes)?;
        if huge < area_bytes / 4 {
            bail!("only {huge} of {area_bytes} bytes are in transparent huge pages: are they disabled on this host?");
        }
    }
    Ok(memory)
}

/// The slots of this memory, numbered in its order.
pub fn slots(memory: &GuestMemoryMmap) -> Result<Vec<Slot>> {
    let slot = |(number, region): (usize, &GuestRegionMmap)| -> Result<Slot> {
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0))?;
        Ok(Slot {
            number: number as u32,
            guest_address: region.start_addr().0,
            bytes: region.len(),
            host_address: host as u64,
            read_only: false,
        })
    };
    memory.iter().enumerate().map(slot).collect()
}

/// Bytes of transparent huge pages in the mappings within a range of our own, from /proc/self/smaps.
pub fn anonymous_huge_bytes(start: u64, bytes: u64) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps").context("read /proc/self/smaps")?;
    let mut inside = false;
    let mut total = 0;
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let first = fields.next().unwrap_or("");
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            // Neighbours of the same kind may have become one mapping with it.
            inside = from < start + bytes && to > start;
        } else if inside && first == "AnonHugePages:" {
            total += fields.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
        }
    }
    Ok(total)
}
