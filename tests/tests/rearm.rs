//! Why protection is renewed only while the guest is stopped and drained. A page that is pinned for direct I/O is
//! written past the page table: renewed between the pin and the end of that write, its protection tells nobody that the
//! page has changed, ever after. Here a real QEMU reads O_DIRECT from its disk into guest memory while the shim's own
//! dirty log is used in both ways, on the same guest under the same load: from short pauses, as the shim does, where no
//! page may be stale, and on the running guest, where pages have to be, or else the test has no load worth the name.

use std::fs::File;
use std::ops::{AddAssign, Range};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::shim::Part;
use vmdr_shim::arena::Arena;
use vmdr_shim::capture::{Capture, Whole};
use vmdr_shim::config::{CUT_LIMIT_MS, CUT_PAGES_MAX, Config};
use vmdr_shim::dirty_log::{DirtyLog, Run};
use vmdr_shim::monitor::Address;
use vmdr_shim::qmp::Qmp;
use vmdr_shim::ramblock::{self, RamBlock};
use vmdr_shim::state_page::StatePage;
use vmdr_tests::guest::BOOT_SECONDS_MAX;
use vmdr_tests::images::Images;
use vmdr_tests::wait::wait_for;
use vmdr_tests::{daemon, exec};

const MEMORY_MIB: u64 = 160;
const DISK_MIB: u64 = 64;
const ARENA_BYTES: u64 = 512 << 20;
const ANSWER: Duration = Duration::from_secs(20);
/// Eight readers of 8 MiB each: a page whose change was missed is seldom read into again, which would heal it. Records
/// are direct too, so that no page but those of a direct read begins like a block of the disk.
const WORKLOAD: &str = "--ram-mib 16 --pages 50 --interval-ms 50 --records 8 --direct --readers 8 --reader-mib 8";
/// How a page begins that was read with O_DIRECT: a reader's block, or a record.
const READ_DIRECTLY: [&[u8]; 2] = [b"vmdrRDR1", b"vmdrREC1"];
/// How a page begins that the guest's processor wrote in its ticks.
const WRITTEN: &[u8] = b"vmdrRAM1";
/// How often the copy is compared with the guest, in each way.
const COMPARISONS: usize = 5;
/// How often, live, until a page is stale: a slow host reads less in a round.
const COMPARISONS_MAX: usize = 8 * COMPARISONS;
/// How often protection is renewed before each comparison.
const ROUNDS: usize = 40;
/// Between two rounds: time for the guest to read, the same in both ways.
const BETWEEN: Duration = Duration::from_millis(5);

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU with the Linux guest, its disk on a file system that has O_DIRECT.
struct Guest {
    qemu: Process,
    directory: tempfile::TempDir,
    oracle: Qmp,
}

impl Guest {
    fn boot() -> Result<Self> {
        let images = Images::get()?;
        // Not in /tmp, which may be a tmpfs.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        let disk = path("disk.raw");
        File::create(&disk)?.set_len(DISK_MIB << 20)?;
        exec::run(exec::limited(60, "mkfs.ext4").args(["-q", "-F", &disk]))?;
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", path(name));
        let words = WORKLOAD.replace(' ', ",");
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-machine", "q35", "-m", &format!("{MEMORY_MIB}M")])
            .args(["-display", "none", "-nodefaults", "-no-reboot"])
            .args(["-serial", &format!("file:{}", path("serial"))])
            .args(["-qmp", &monitor("capture.qmp"), "-qmp", &monitor("oracle.qmp")])
            .args(["-drive", &format!("file={disk},format=raw,if=virtio,cache=none,aio=native")])
            .arg("-kernel")
            .arg(images.kernel())
            .arg("-initrd")
            .arg(images.initrd())
            .args(["-append", &format!("console=ttyS0 quiet panic=1 vmdr.workload={words}")])
            .stdout(Stdio::null())
            .stderr(File::create(path("stderr"))?)
            .spawn()
            .context("start qemu-system-x86_64")?;
        let qemu = Process(qemu);
        let read = |name: &str| std::fs::read_to_string(path(name)).unwrap_or_default();
        // By the tenth tick every slot of the ring holds a record.
        wait_for("the guest's tenth tick", Duration::from_secs(BOOT_SECONDS_MAX), || {
            Ok(read("serial").contains("tick 10 ").then_some(()))
        })
        .with_context(|| format!("QEMU says {:?}, the guest {:?}", read("stderr"), read("serial")))?;
        let oracle = Qmp::connect(&directory.path().join("oracle.qmp"), ANSWER)?;
        Ok(Self { qemu, directory, oracle })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pid(&self) -> i32 {
        self.qemu.0.id() as i32
    }

    fn blocks(&mut self) -> Result<Vec<RamBlock>> {
        Ok(ramblock::parse(&self.oracle.human("info ramblock")?)?)
    }

    /// How many read requests QEMU has ended for the guest.
    fn reads(&mut self) -> Result<u64> {
        let stats = self.oracle.execute("query-blockstats", None)?;
        stats[0]["stats"]["rd_operations"].as_u64().with_context(|| format!("no count of reads in {stats}"))
    }

    fn capture(&self) -> Result<Capture> {
        let config = Config {
            domain_name: "rearm".to_owned(),
            domain_uuid: "00000000-0000-4000-8000-000000000000".to_owned(),
            permission: None,
            protection: String::new(),
            qemu_pid: self.pid(),
            qemu_uid: 0,
            monitor: Address::Socket(self.path("capture.qmp")),
            directory: self.path("shim"),
            disks: Vec::new(),
            arena_bytes: ARENA_BYTES,
            cut_pages_max: CUT_PAGES_MAX,
            cut_limit_ms: CUT_LIMIT_MS,
        };
        let page = Arc::new(StatePage::create(&self.path("state"))?);
        let capture = Capture::new(config, page, None, Arena::new(ARENA_BYTES)?, Vec::new())?;
        Ok(capture.with_helper(daemon::binary("vmdr-shim")?))
    }

    /// Counts the pages of the paused guest that a copy has otherwise, and mends the copy: no page counts twice.
    fn stale(&mut self, copy: &mut Copy) -> Result<Stale> {
        let process = File::open(format!("/proc/{}/mem", self.pid()))?;
        let mut stale = Stale::default();
        for block in self.blocks()? {
            let mut bytes = vec![0; block.used_bytes as usize];
            process.read_exact_at(&mut bytes, block.host_address).with_context(|| format!("read {}", block.name))?;
            let copied = copy.blocks.iter_mut().find(|(name, _)| *name == block.name);
            let (_, copied) = copied.with_context(|| format!("{} was not copied", block.name))?;
            ensure!(copied.len() == bytes.len(), "{} has {} bytes, not {}", block.name, copied.len(), bytes.len());
            for (now, then) in bytes.chunks(PAGE_BYTES).zip(copied.chunks(PAGE_BYTES)).filter(|(a, b)| a != b) {
                stale.all += 1;
                stale.read_directly += usize::from(READ_DIRECTLY.iter().any(|word| now.starts_with(word)));
                stale.written += usize::from([now, then].iter().any(|page| page.starts_with(WRITTEN)));
            }
            *copied = bytes;
        }
        Ok(stale)
    }
}

/// Pages of a copy that are not the guest's.
#[derive(Debug, Default)]
struct Stale {
    all: usize,
    read_directly: usize,
    written: usize,
}

impl AddAssign for Stale {
    fn add_assign(&mut self, more: Self) {
        self.all += more.all;
        self.read_directly += more.read_directly;
        self.written += more.written;
    }
}

/// What a receiver would have: the bytes of every block, by the block's number.
#[derive(Default)]
struct Copy {
    blocks: Vec<(String, Vec<u8>)>,
    pages: u64,
}

impl Copy {
    fn pages(&mut self, block: u64, first: u64, pages: u64) -> (Range<usize>, &mut Vec<u8>) {
        self.pages += pages;
        let memory = &mut self.blocks[block as usize].1;
        let end = ((first + pages) as usize * PAGE_BYTES).min(memory.len());
        (first as usize * PAGE_BYTES..end, memory)
    }

    /// What the shim captured.
    fn apply(&mut self, part: &Part, arena: &File) -> Result<()> {
        for block in &part.blocks[self.blocks.len()..] {
            self.blocks.push((block.name.clone(), vec![0; block.used_bytes as usize]));
        }
        for run in &part.runs {
            let (range, memory) = self.pages(run.block.into(), run.first, run.pages.into());
            arena.read_exact_at(&mut memory[range], run.arena_offset)?;
        }
        Ok(())
    }

    /// What a scan found.
    fn read(&mut self, runs: &[Run], log: &mut DirtyLog) -> Result<()> {
        for run in runs {
            let (range, memory) = self.pages(run.block as u64, run.first, run.pages);
            log.read(&[*run], &mut memory[range])?;
        }
        Ok(())
    }
}

/// The shim's way: every round is a pass, and a copy on the running guest; a cut comes before each comparison.
fn from_pauses(guest: &mut Guest) -> Result<Stale> {
    let mut capture = guest.capture()?;
    capture.arm(1, 1, Whole::Seed)?;
    let arena = File::open(format!("/proc/self/fd/{}", capture.state()?.arena_fd))?;
    let mut copy = Copy::default();
    let pass = |capture: &mut Capture, copy: &mut Copy| -> Result<()> {
        capture.pass()?.map_err(|no| anyhow!("no pass: {no}"))?;
        while let Some(part) = capture.fill(ARENA_BYTES / 4)? {
            copy.apply(&part, &arena)?;
            capture.release(part.epoch, part.part);
        }
        Ok(())
    };
    pass(&mut capture, &mut copy)?;
    let (reads, seeded) = (guest.reads()?, copy.pages);
    let mut stale = Stale::default();
    for _ in 0..COMPARISONS {
        for _ in 0..ROUNDS {
            std::thread::sleep(BETWEEN);
            pass(&mut capture, &mut copy)?;
        }
        let part = capture.cut(u64::MAX, true)?.map_err(|no| anyhow!("no cut: {no}"))?;
        copy.apply(&part, &arena)?;
        capture.release(part.epoch, part.part);
        stale += guest.stale(&mut copy)?;
        capture.end_hold()?;
    }
    capture.detach();
    report("from pauses", COMPARISONS * ROUNDS, guest.reads()? - reads, copy.pages - seeded, &stale)?;
    Ok(stale)
}

/// The way that must not be: the same scan, protection and copy on the running guest. The last scan before a comparison
/// is one of the stopped guest, so that whatever it does not report was missed before.
fn live(guest: &mut Guest) -> Result<Stale> {
    let (mut log, _) = DirtyLog::open(guest.pid(), &daemon::binary("vmdr-shim")?)?;
    let blocks = guest.blocks()?;
    let zeroed = blocks.iter().map(|block| (block.name.clone(), vec![0; block.used_bytes as usize]));
    let mut copy = Copy { blocks: zeroed.collect(), pages: 0 };
    // A sound beginning: watched and copied while the guest is stopped and drained.
    guest.oracle.execute("stop", None)?;
    let mut fresh = Vec::new();
    log.follow(&blocks, &mut fresh)?;
    copy.read(&fresh, &mut log)?;
    ensure!(guest.stale(&mut copy)?.all == 0, "the copy was wrong from the beginning");
    let (reads, seeded) = (guest.reads()?, copy.pages);
    let mut runs = Vec::new();
    let mut round = |copy: &mut Copy| -> Result<()> {
        log.scan(&mut runs)?;
        log.protect(&mut runs)?;
        copy.read(&runs, &mut log)
    };
    let mut stale = Stale::default();
    let mut comparisons = 0;
    while comparisons < COMPARISONS || (stale.all == 0 && comparisons < COMPARISONS_MAX) {
        guest.oracle.execute("cont", None)?;
        for _ in 0..ROUNDS {
            std::thread::sleep(BETWEEN);
            round(&mut copy)?;
        }
        guest.oracle.execute("stop", None)?;
        round(&mut copy)?;
        stale += guest.stale(&mut copy)?;
        comparisons += 1;
    }
    log.unwatch();
    report("live", comparisons * ROUNDS, guest.reads()? - reads, copy.pages - seeded, &stale)?;
    Ok(stale)
}

fn report(way: &str, rounds: usize, reads: u64, pages: u64, stale: &Stale) -> Result<()> {
    println!("{way}: {rounds} rounds, {reads} reads, {pages} pages copied, {stale:?}");
    // A starved guest reads less, and yet there has to be something to miss.
    ensure!(reads > rounds as u64 / 4, "{way}: the guest ended {reads} reads in {rounds} rounds: no load");
    Ok(())
}

#[test]
fn direct_reads_are_missed_unless_the_guest_is_drained() -> Result<()> {
    let mut guest = Guest::boot()?;
    let stale = from_pauses(&mut guest)?;
    ensure!(stale.all == 0, "protection was renewed from pauses, and yet pages are stale: {stale:?}");
    let stale = live(&mut guest)?;
    ensure!(stale.read_directly > 0, "protection was renewed live, and no direct read was missed: {stale:?}");
    // It is not the scan that misses them: what the processor writes is found in either way.
    ensure!(stale.written == 0, "pages that the guest's processor wrote are stale: {stale:?}");
    Ok(())
}
