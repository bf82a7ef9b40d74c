//! What a guest's memory and disks hold, read by paths that share nothing with vmdr's.
//!
//! Memory: QEMU's own `pmemsave` through libvirt's monitor (guest-physical memory), or QEMU's RAM blocks through
//! /proc/PID/mem at the addresses that `info ramblock` names. Disks: their files, which are complete while the guest is paused
//! (cache=none, and `stop` flushes). Nothing here pauses the guest by itself: the caller says when.

use crate::exec;
use crate::guest::GuestSpec;
use crate::site::Site;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

const PAGE_BYTES: usize = vmdr_proto::PAGE_BYTES;
/// Guest-physical memory between these is the video card's window and ROM, not the main RAM block.
const HOLE: std::ops::Range<u64> = 0xa_0000..0x10_0000;
/// Bytes compared at once.
const BLOCK_BYTES: usize = 1 << 20;

/// A RAM block of QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub name: String,
    /// Bytes in use.
    pub bytes: u64,
    /// Where it lies in QEMU's address space.
    pub address: u64,
}

/// Pauses the guest through libvirt.
pub fn pause(site: &Site, guest: &GuestSpec) -> Result<()> {
    site.virsh(&["suspend", &guest.name]).map(|_| ())
}

/// Lets the guest run again through libvirt.
pub fn resume(site: &Site, guest: &GuestSpec) -> Result<()> {
    site.virsh(&["resume", &guest.name]).map(|_| ())
}

/// A command of QEMU's human monitor through libvirt.
pub fn hmp(site: &Site, guest: &GuestSpec, command: &str) -> Result<String> {
    site.virsh(&["qemu-monitor-command", &guest.name, "--hmp", command])
}

/// The RAM blocks QEMU has now.
pub fn ram_blocks(site: &Site, guest: &GuestSpec) -> Result<Vec<RamBlock>> {
    let text = hmp(site, guest, "info ramblock")?;
    let blocks: Vec<RamBlock> = text.lines().filter_map(parse_block).collect();
    if blocks.is_empty() {
        bail!("QEMU named no RAM blocks: {text}");
    }
    Ok(blocks)
}

/// `NAME  PAGE-SIZE UNIT  OFFSET USED TOTAL HVA ...`; a name may contain spaces.
fn parse_block(line: &str) -> Option<RamBlock> {
    let at = line.find(" 0x")?;
    let numbers: Vec<u64> = line[at..]
        .split_whitespace()
        .map_while(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok())
        .collect();
    let mut words: Vec<&str> = line[..at].split_whitespace().collect();
    let (_unit, _size) = (words.pop()?, words.pop()?);
    Some(RamBlock { name: words.join(" "), bytes: *numbers.get(1)?, address: *numbers.get(3)? })
}

/// Reads a RAM block out of QEMU's memory.
pub fn read_block(site: &Site, guest: &GuestSpec, block: &RamBlock) -> Result<Vec<u8>> {
    let path = format!("/proc/{}/mem", site.qemu(&guest.name)?);
    let memory = File::open(&path).with_context(|| format!("open {path}"))?;
    let mut bytes = vec![0; usize::try_from(block.bytes).context("a block larger than memory")?];
    memory.read_exact_at(&mut bytes, block.address).with_context(|| format!("read RAM block {}", block.name))?;
    Ok(bytes)
}

/// Has QEMU write guest-physical memory (up to 3 GiB, which one block holds) to a file, and reads that.
pub fn pmemsave(site: &Site, guest: &GuestSpec) -> Result<Vec<u8>> {
    // QEMU writes as its own user: into its own directory.
    let inside = format!("/var/lib/libvirt/qemu/{}.pmem", guest.name);
    let bytes = guest.mem_mib << 20;
    let said = hmp(site, guest, &format!("pmemsave 0 {bytes} \"{inside}\""))?;
    let file = site.path(&inside);
    let memory = fs::read(&file).with_context(|| format!("read what pmemsave wrote ({})", said.trim()))?;
    fs::remove_file(&file).context("remove what pmemsave wrote")?;
    if memory.len() as u64 != bytes {
        bail!("pmemsave wrote {} of {bytes} bytes: {}", memory.len(), said.trim());
    }
    Ok(memory)
}

/// Pages that differ between guest-physical memory as `pmemsave` gave it and an image of the main RAM block.
pub fn differing_pages(physical: &[u8], image: &[u8]) -> Vec<u64> {
    let pages = physical.len().max(image.len()).div_ceil(PAGE_BYTES);
    (0..pages as u64)
        .filter(|page| !HOLE.contains(&(page * PAGE_BYTES as u64)))
        .filter(|page| {
            let range = *page as usize * PAGE_BYTES..(*page as usize + 1) * PAGE_BYTES;
            physical.get(range.clone()) != image.get(range)
        })
        .collect()
}

/// Offsets of the MiB-sized blocks in which two files differ; a missing end reads as zeros.
pub fn differing_blocks(one: &Path, other: &Path) -> Result<Vec<u64>> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let (a, b) = (open(one)?, open(other)?);
    let bytes = a.metadata().context("size a file")?.len().max(b.metadata().context("size a file")?.len());
    let mut differing = Vec::new();
    for offset in (0..bytes).step_by(BLOCK_BYTES) {
        if read_block_at(&a, offset)? != read_block_at(&b, offset)? {
            differing.push(offset);
        }
    }
    Ok(differing)
}

fn read_block_at(file: &File, offset: u64) -> Result<Vec<u8>> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut done = 0;
    while done < BLOCK_BYTES {
        match file.read_at(&mut block[done..], offset + done as u64).context("read a file")? {
            0 => break,
            bytes => done += bytes,
        }
    }
    Ok(block)
}

/// One number for a file's content, holes and zeros being the same.
pub fn file_hash(path: &Path) -> Result<u64> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let bytes = file.metadata().context("size a file")?.len();
    let mut hashes = Vec::new();
    for offset in (0..bytes).step_by(BLOCK_BYTES) {
        hashes.extend(xxh3_64(&read_block_at(&file, offset)?).to_le_bytes());
    }
    Ok(xxh3_64(&hashes))
}

/// Copies a file with its holes.
pub fn copy_file(from: &Path, to: &Path) -> Result<()> {
    exec::run(std::process::Command::new("cp").arg("--sparse=always").arg(from).arg(to)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramblock_lines_are_read() {
        let line = "              pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f1c8fe00000";
        let block = parse_block(line).unwrap();
        assert_eq!((block.name.as_str(), block.bytes, block.address), ("pc.ram", 0x400_0000, 0x7f1c_8fe0_0000));
        assert!(parse_block("          Block Name    PSize              Offset               Used").is_none());
        let odd = "/rom@etc/acpi tables    4 KiB  0x1 0x20000 0x200000 0x7f00 rw";
        assert_eq!(parse_block(odd).unwrap().name, "/rom@etc/acpi tables");
    }

    #[test]
    fn one_changed_byte_is_one_differing_page_and_the_hole_does_not_count() {
        let one = vec![7u8; 0x20_0000];
        let mut other = one.clone();
        other[0x1_2345] = 8;
        other[0xb_0000] = 8;
        assert_eq!(differing_pages(&one, &other), [0x12]);
        assert_eq!(differing_pages(&one, &other[..0x1f_f000]), [0x12, 0x1ff]);
    }
}
