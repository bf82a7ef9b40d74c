//! What a guest's memory and disks hold, read by paths that share nothing with vmdr's, and whether a standby is that.
//!
//! Memory: QEMU's own `pmemsave` through libvirt's monitor (guest-physical memory), or QEMU's RAM blocks through
//! /proc/PID/mem at the addresses that `info ramblock` names. Disks: their files, which are complete while the guest is paused
//! (cache=none, and `stop` flushes). Nothing here pauses the guest by itself: the caller says when.

use crate::exec;
use crate::guest::{GuestSpec, Store};
use crate::site::Site;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

const PAGE_BYTES: usize = vmdr_proto::PAGE_BYTES;
/// Guest-physical memory between these is the video card's window and ROM, not the main RAM block.
const HOLE: std::ops::Range<u64> = 0xa_0000..0x10_0000;
/// Bytes compared at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Shorter stretches of guest-physical memory (below 1 MiB) are read as part of their RAM blocks only.
const STRETCH_BYTES_MIN: u64 = 1 << 20;
/// The RAM block with the UEFI variables.
const VARIABLES: &str = "system.flash1";

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

/// Guest-physical memory that shows a part of a RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// QEMU's name of the memory region, which is the block's.
    pub block: String,
    /// Where in the block it begins.
    pub offset: u64,
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
    // One without a name is no part of the guest: on an activated guest, the memory that the standby's image took the place of.
    let name = words.join(" ");
    (!name.is_empty()).then_some(RamBlock { name, bytes: *numbers.get(1)?, address: *numbers.get(3)? })
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
    pmemsave_stretch(site, guest, 0, guest.mem_mib << 20)
}

fn pmemsave_stretch(site: &Site, guest: &GuestSpec, address: u64, bytes: u64) -> Result<Vec<u8>> {
    // QEMU writes as its own user: into its own directory.
    let inside = format!("/var/lib/libvirt/qemu/{}.pmem", guest.name);
    let said = hmp(site, guest, &format!("pmemsave {address:#x} {bytes:#x} \"{inside}\""))?;
    let file = site.path(&inside);
    let memory = fs::read(&file).with_context(|| format!("read what pmemsave wrote ({})", said.trim()))?;
    fs::remove_file(&file).context("remove what pmemsave wrote")?;
    if memory.len() as u64 != bytes {
        bail!("pmemsave wrote {} of {bytes} bytes: {}", memory.len(), said.trim());
    }
    Ok(memory)
}

/// Where the guest sees its RAM blocks, as QEMU's flattened view of its memory has it.
pub fn stretches(site: &Site, guest: &GuestSpec) -> Result<Vec<Stretch>> {
    let text = hmp(site, guest, "info mtree -f")?;
    let found = parse_stretches(&text);
    if found.is_empty() {
        bail!("QEMU shows no memory: {text}");
    }
    Ok(found)
}

/// `  START-END (prio N, ram): BLOCK @OFFSET KVM`, in the view of the address space "memory".
fn parse_stretches(text: &str) -> Vec<Stretch> {
    let Some(view) = text.split("FlatView #").find(|view| view.contains("AS \"memory\",")) else { return Vec::new() };
    let stretch = |line: &str| {
        let (range, rest) = line.trim().split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let (kind, what) = rest.split_once("): ")?;
        if !kind.ends_with(", ram") {
            return None;
        }
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let what = what.trim().trim_end_matches(" KVM");
        let (block, offset) = match what.split_once(" @") {
            Some((block, offset)) => (block, hex(offset)?),
            None => (what, 0),
        };
        let (address, bytes) = (hex(start)?, hex(end)?.checked_sub(hex(start)?)?.checked_add(1)?);
        Some(Stretch { address, bytes, block: block.to_owned(), offset })
    };
    view.lines().filter_map(stretch).collect()
}

/// Files below a directory of which the parent's name is `folder`, but checksums.
pub fn files(directory: &Path, folder: &str) -> Result<Vec<PathBuf>> {
    let within = format!("*/{folder}/*");
    let words = ["-type", "f", "-path", &within, "-not", "-name", "*.sums"];
    let found = exec::run(exec::limited(30, "find").arg(directory).args(words))?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// What of the guest, which must be paused, differs from the standby below a directory; empty: nothing.
///
/// Each RAM block must be one of the images of its size. What of them the guest sees as memory is read a second time, by
/// `pmemsave`, so that a mistake about where a block lies shows.
pub fn differences(site: &Site, guest: &GuestSpec, standby: &Path) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let images = files(standby, "ram")?;
    let stretches = stretches(site, guest)?;
    let mut seen_bytes = 0;
    for block in ram_blocks(site, guest)? {
        let bytes = read_block(site, guest, &block)?;
        let sized = |path: &&PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.len() == block.bytes);
        let mut closest: Option<Vec<u64>> = None;
        for image in images.iter().filter(sized) {
            let image = fs::read(image).with_context(|| format!("read {}", image.display()))?;
            let pages = differing(&bytes, &image);
            if closest.as_ref().is_none_or(|closest| pages.len() < closest.len()) {
                closest = Some(pages);
            }
        }
        match closest {
            None => differences.push(format!("RAM block {} has no image of {:#x} bytes", block.name, block.bytes)),
            Some(pages) if pages.is_empty() => {}
            Some(pages) => {
                let some: Vec<_> = pages.iter().take(8).collect();
                differences.push(format!("RAM block {} in {} pages, first {some:x?}", block.name, pages.len()));
            }
        }
        let name = block.name.trim_start_matches("/objects/");
        for stretch in stretches.iter().filter(|s| s.block == name && s.bytes >= STRETCH_BYTES_MIN) {
            let physical = pmemsave_stretch(site, guest, stretch.address, stretch.bytes)?;
            let from = usize::try_from(stretch.offset).context("a block larger than memory")?;
            if bytes.get(from..from + physical.len()) != Some(&physical) {
                bail!("RAM block {} as /proc and as pmemsave at {:#x} have it differ", block.name, stretch.address);
            }
            seen_bytes += stretch.bytes;
        }
        if guest.uefi && block.name == VARIABLES {
            let file = fs::read(site.path(guest.variables_path())).context("read the UEFI variables")?;
            if file != bytes {
                bail!("the file of UEFI variables is not what the flash holds");
            }
        }
    }
    // All but what lies below 1 MiB.
    if seen_bytes + STRETCH_BYTES_MIN < guest.mem_mib << 20 {
        bail!("only {seen_bytes} bytes of the guest's memory were found in {stretches:?}");
    }
    for number in 0..guest.disks_mib.len() {
        differences.extend(disk_difference(site, guest, number, standby)?);
    }
    Ok(differences)
}

fn differing(one: &[u8], other: &[u8]) -> Vec<u64> {
    let differ = |(page, (one, other)): (usize, (&[u8], &[u8]))| (one != other).then_some(page as u64);
    one.chunks(PAGE_BYTES).zip(other.chunks(PAGE_BYTES)).enumerate().filter_map(differ).collect()
}

fn disk_difference(site: &Site, guest: &GuestSpec, number: usize, standby: &Path) -> Result<Option<String>> {
    let name = format!("{}.raw", guest.disk_target(number));
    let disks = files(standby, "disk")?;
    let copy = disks.iter().find(|path| path.ends_with(&name)).with_context(|| format!("find {name}"))?;
    let disk = guest.disk_path(number);
    if guest.shape(number).store == Store::Chain {
        let mut compare = site.command("qemu-img");
        let output = exec::output(compare.args(["compare", "-U", "-f", "qcow2", "-F", "raw", &disk]).arg(copy))?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        return match output.status.code() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(format!("{name}: {said}"))),
            _ => bail!("compare {disk} with {}: {}", copy.display(), String::from_utf8_lossy(&output.stderr)),
        };
    }
    let blocks = differing_blocks(&site.path(&disk), copy)?;
    let first = blocks.first().copied().unwrap_or_default();
    Ok((!blocks.is_empty()).then(|| format!("{name} in {} MiB, first at {first:#x}", blocks.len())))
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
    fn stretches_of_ram_are_found_in_the_view_of_memory() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n  \
            0000000000000000-0000000000000007 (prio 0, ram): not-this\n\nFlatView #2\n AS \"memory\", root: system\n \
            Root memory region: system\n  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n  \
            00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n  \
            00000000000c0000-00000000000c3fff (prio 0, rom): pc.ram @00000000000c0000\n  \
            0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000 KVM\n";
        let stretch = |address, bytes, offset| Stretch { address, bytes, block: "pc.ram".to_owned(), offset };
        assert_eq!(parse_stretches(text), [stretch(0, 0xa_0000, 0), stretch(0x10_0000, 0x3f0_0000, 0x10_0000)]);
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
