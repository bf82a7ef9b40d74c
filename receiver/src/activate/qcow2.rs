//! Writes a qcow2 overlay that has content: what an older recovery point has otherwise than the standby's image below it.
//!
//! Version 3, clusters of 64 KiB, refcounts of 16 bits; no snapshots, no compression. The format is that of QEMU's
//! docs/interop/qcow2.txt. Clusters that are zero are marked so and take no space.
//!
//! ```text
//! header, backing file's name | refcount table | refcount blocks | L1 table | L2 tables | clusters
//! ```

use std::io::{self, Seek, SeekFrom, Write};

/// Bytes of a cluster.
pub const CLUSTER_BYTES: u64 = 64 << 10;
const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table: 8 bytes each in a cluster.
const L2_ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Refcounts in a block: 2 bytes each in a cluster.
const BLOCK_REFCOUNTS: u64 = CLUSTER_BYTES / 2;
const REFCOUNT_ORDER: u32 = 4;
const HEADER_BYTES: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// QEMU's limit for the name of a backing file.
const BACKING_BYTES_MAX: usize = 1023;
/// This table or cluster is used once: it may be written in place.
const COPIED: u64 = 1 << 63;
/// The cluster is zero.
const ZERO: u64 = 1;

/// Writes an overlay of `size_bytes` over the raw image `backing`. `clusters` are the numbers of those that it has itself, in
/// order; `read` fills one. Returns the length of the file.
pub fn write<F: Write + Seek>(
    to: &mut F,
    backing: &str,
    size_bytes: u64,
    clusters: &[u64],
    read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    if backing.len() > BACKING_BYTES_MAX {
        let what = format!("the path of the image has {} bytes, QEMU takes {BACKING_BYTES_MAX}", backing.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let l1_entries = size_bytes.div_ceil(CLUSTER_BYTES * L2_ENTRIES);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_BYTES).max(1);
    let mut tables: Vec<u64> = clusters.iter().map(|cluster| cluster / L2_ENTRIES).collect();
    tables.dedup();
    let rest = 1 + l1_clusters + tables.len() as u64 + clusters.len() as u64;
    // The refcount blocks count themselves and their table.
    let (mut blocks, mut block_clusters) = (1, 1);
    while (rest + blocks + block_clusters).div_ceil(BLOCK_REFCOUNTS) > blocks {
        blocks = (rest + blocks + block_clusters).div_ceil(BLOCK_REFCOUNTS);
        block_clusters = (blocks * 8).div_ceil(CLUSTER_BYTES);
    }
    let table_at = 1;
    let blocks_at = table_at + block_clusters;
    let l1_at = blocks_at + blocks;
    let l2_at = l1_at + l1_clusters;
    let mut next = l2_at + tables.len() as u64;

    let mut buffer = vec![0; CLUSTER_BYTES as usize];
    let mut l2 = vec![0u64; L2_ENTRIES as usize];
    let mut done = 0;
    for (i, table) in tables.iter().enumerate() {
        l2.fill(0);
        while let Some(cluster) = clusters.get(done).filter(|cluster| *cluster / L2_ENTRIES == *table) {
            read(*cluster, &mut buffer)?;
            let entry = &mut l2[(cluster % L2_ENTRIES) as usize];
            if buffer.iter().all(|byte| *byte == 0) {
                *entry = ZERO;
            } else {
                to.seek(SeekFrom::Start(next * CLUSTER_BYTES))?;
                to.write_all(&buffer)?;
                *entry = (next * CLUSTER_BYTES) | COPIED;
                next += 1;
            }
            done += 1;
        }
        put(to, l2_at + i as u64, l2.iter().copied())?;
    }
    let mut l1 = vec![0; l1_entries as usize];
    for (i, table) in tables.iter().enumerate() {
        if let Some(entry) = l1.get_mut(*table as usize) {
            *entry = ((l2_at + i as u64) * CLUSTER_BYTES) | COPIED;
        }
    }
    put(to, l1_at, l1.into_iter())?;
    put(to, table_at, (0..blocks).map(|block| (blocks_at + block) * CLUSTER_BYTES))?;
    to.seek(SeekFrom::Start(blocks_at * CLUSTER_BYTES))?;
    for block in 0..blocks {
        let used = next.saturating_sub(block * BLOCK_REFCOUNTS).min(BLOCK_REFCOUNTS) as usize;
        buffer.fill(0);
        buffer[..used * 2].chunks_exact_mut(2).for_each(|count| count.copy_from_slice(&1u16.to_be_bytes()));
        to.write_all(&buffer)?;
    }

    let mut head = Vec::with_capacity(2048);
    let u32s = |head: &mut Vec<u8>, numbers: &[u32]| numbers.iter().for_each(|n| head.extend(n.to_be_bytes()));
    let u64s = |head: &mut Vec<u8>, numbers: &[u64]| numbers.iter().for_each(|n| head.extend(n.to_be_bytes()));
    let extensions = 8 + 8 + 8;
    head.extend(b"QFI\xfb");
    u32s(&mut head, &[3]);
    u64s(&mut head, &[u64::from(HEADER_BYTES) + extensions]);
    u32s(&mut head, &[backing.len() as u32, CLUSTER_BITS]);
    u64s(&mut head, &[size_bytes]);
    u32s(&mut head, &[0, l1_entries as u32]);
    u64s(&mut head, &[l1_at * CLUSTER_BYTES, table_at * CLUSTER_BYTES]);
    u32s(&mut head, &[block_clusters as u32, 0]);
    u64s(&mut head, &[0, 0, 0, 0]);
    u32s(&mut head, &[REFCOUNT_ORDER, HEADER_BYTES]);
    u32s(&mut head, &[BACKING_FORMAT, 3]);
    head.extend(b"raw\0\0\0\0\0");
    u32s(&mut head, &[0, 0]);
    head.extend(backing.as_bytes());
    to.seek(SeekFrom::Start(0))?;
    to.write_all(&head)?;
    // The last table may end in a cluster that was not written to its end.
    let length = next * CLUSTER_BYTES;
    if to.seek(SeekFrom::End(0))? < length {
        to.seek(SeekFrom::Start(length - 1))?;
        to.write_all(&[0])?;
    }
    Ok(length)
}

fn put<F: Write + Seek>(to: &mut F, cluster: u64, numbers: impl Iterator<Item = u64>) -> io::Result<()> {
    let bytes: Vec<u8> = numbers.flat_map(u64::to_be_bytes).collect();
    to.seek(SeekFrom::Start(cluster * CLUSTER_BYTES))?;
    to.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    fn qemu_img(words: &[&str], paths: &[&Path]) {
        let output = Command::new("qemu-img").args(words).args(paths).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    #[test]
    fn qemu_reads_what_was_written_and_finds_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        // More than one L2 table; the end is within a cluster.
        let size = (CLUSTER_BYTES * L2_ENTRIES) + 5 * CLUSTER_BYTES + 1536;
        let file = fs::File::create(&base).unwrap();
        file.set_len(size).unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[7; 200_000], 100_000).unwrap();
        file.write_all_at(&[9; 1000], size - 1000).unwrap();
        let want = dir.path().join("want.raw");
        fs::copy(&base, &want).unwrap();
        let expected = fs::OpenOptions::new().write(true).open(&want).unwrap();
        let last = size / CLUSTER_BYTES;
        let clusters = [0, 2, 3, L2_ENTRIES - 1, L2_ENTRIES + 1, last];
        let content = |cluster: u64| if cluster == 3 { 0 } else { (cluster % 200) as u8 + 1 };
        for cluster in clusters {
            let length = CLUSTER_BYTES.min(size - cluster * CLUSTER_BYTES) as usize;
            expected.write_all_at(&vec![content(cluster); length], cluster * CLUSTER_BYTES).unwrap();
        }
        for clusters in [&clusters[..], &[]] {
            let overlay = dir.path().join(format!("overlay-{}.qcow2", clusters.len()));
            let mut to = fs::File::create(&overlay).unwrap();
            let mut read = |cluster: u64, buffer: &mut [u8]| {
                let length = CLUSTER_BYTES.min(size - cluster * CLUSTER_BYTES) as usize;
                buffer.fill(0);
                buffer[..length].fill(content(cluster));
                Ok(())
            };
            let length = write(&mut to, base.to_str().unwrap(), size, clusters, &mut read).unwrap();
            assert_eq!(fs::metadata(&overlay).unwrap().len(), length);
            qemu_img(&["check", "-q", "-f", "qcow2"], &[&overlay]);
            let same = if clusters.is_empty() { &base } else { &want };
            qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[same, &overlay]);
        }
        let mut nowhere = io::Cursor::new(Vec::new());
        let long = "x".repeat(1024);
        assert!(write(&mut nowhere, &long, size, &[], &mut |_, _| Ok(())).is_err());
    }
}
