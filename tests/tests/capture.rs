//! The shim's capture of a real QEMU, compared to the byte: what was captured, against what an independent path reads
//! from the paused guest. No libvirt: QEMU is started directly, with a monitor for the capture and one for the oracle.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::shim::Part;
use vmdr_shim::arena::Arena;
use vmdr_shim::capture::{Capture, Whole};
use vmdr_shim::config::{CUT_LIMIT_MS, CUT_PAGES_MAX, Config};
use vmdr_shim::qmp::Qmp;
use vmdr_shim::ramblock;
use vmdr_shim::state_page::StatePage;
use vmdr_tests::images::Images;
use vmdr_tests::{daemon, random};

const MEMORY_MIB: u64 = 64;
/// How long a guest may take to start on a machine that others use too.
const ANSWER: Duration = Duration::from_secs(120);

/// A QEMU with the bare-metal guest, which writes stamped pages all over its memory for ever.
struct Guest {
    qemu: Child,
    directory: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Guest {
    fn start(accelerator: &str, extra: &[&str]) -> Result<Self> {
        let images = Images::get()?;
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", path(name));
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", accelerator, "-m", &format!("{MEMORY_MIB}M"), "-display", "none", "-nodefaults"])
            .args(["-machine", "q35", "-device", "VGA", "-device", "virtio-rng-pci"])
            .args(["-serial", &format!("file:{}", path("serial"))])
            .args(["-qmp", &monitor("capture.qmp"), "-qmp", &monitor("oracle.qmp")])
            .arg("-kernel")
            .arg(images.bare_metal())
            .args(extra)
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("stderr"))?)
            .spawn()
            .context("start qemu-system-x86_64")?;
        let guest = Self { qemu, directory };
        let until = Instant::now() + ANSWER;
        while std::fs::read_to_string(guest.path("serial")).unwrap_or_default().lines().count() < 3 {
            let said = std::fs::read_to_string(guest.path("stderr")).unwrap_or_default();
            ensure!(Instant::now() < until, "the guest did not begin to count: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(guest)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn capture(&self) -> Result<Capture> {
        let config = Config {
            domain_name: "bare-metal".to_owned(),
            domain_uuid: "00000000-0000-4000-8000-000000000000".to_owned(),
            permission: None,
            protection: String::new(),
            qemu_pid: self.qemu.id() as i32,
            qemu_uid: 0,
            monitor: vmdr_shim::monitor::Address::Socket(self.path("capture.qmp")),
            directory: self.path("shim"),
            disks: Vec::new(),
            arena_bytes: 256 << 20,
            cut_pages_max: CUT_PAGES_MAX,
            cut_limit_ms: CUT_LIMIT_MS,
        };
        let page = Arc::new(StatePage::create(&self.path("state"))?);
        let capture = Capture::new(config, page, None, Arena::new(256 << 20)?, Vec::new())?;
        Ok(capture.with_helper(daemon::binary("vmdr-shim")?))
    }

    /// Every RAM block, read from the paused guest through `/proc/PID/mem`; main memory also through `pmemsave`.
    fn memory(&self, oracle: &mut Qmp) -> Result<Vec<(String, Vec<u8>)>> {
        let process = File::open(format!("/proc/{}/mem", self.qemu.id()))?;
        let mut blocks = Vec::new();
        for block in ramblock::parse(&oracle.human("info ramblock")?)? {
            let mut bytes = vec![0; block.used_bytes as usize];
            process.read_exact_at(&mut bytes, block.host_address).with_context(|| format!("read {}", block.name))?;
            blocks.push((block.name, bytes));
        }
        let file = self.path("pmemsave");
        let said = oracle.human(&format!("pmemsave 0x100000 {} \"{}\"", (MEMORY_MIB - 1) << 20, file.display()))?;
        ensure!(said.trim().is_empty(), "pmemsave: {said}");
        let physical = std::fs::read(file)?;
        let (_, main) = blocks.iter().max_by_key(|(_, bytes)| bytes.len()).context("no RAM block")?;
        ensure!(main[1 << 20..] == physical[..], "the oracle's two paths differ");
        Ok(blocks)
    }
}

/// What a receiver would have: blocks by number.
#[derive(Default)]
struct Standby {
    blocks: Vec<(String, Vec<u8>)>,
}

impl Standby {
    fn apply(&mut self, part: &Part, arena: &File) -> Result<()> {
        for (index, block) in part.blocks.iter().enumerate() {
            if index == self.blocks.len() {
                self.blocks.push((block.name.clone(), Vec::new()));
            }
            self.blocks[index].0.clone_from(&block.name);
            self.blocks[index].1.resize(block.used_bytes as usize, 0);
        }
        for run in &part.runs {
            let memory = &mut self.blocks[run.block as usize].1;
            let start = run.first as usize * PAGE_BYTES;
            let end = (start + run.pages as usize * PAGE_BYTES).min(memory.len());
            arena.read_exact_at(&mut memory[start..end], run.arena_offset)?;
        }
        Ok(())
    }

    fn compare(&self, guest: &[(String, Vec<u8>)], when: &str) -> Result<()> {
        ensure!(self.blocks.len() == guest.len(), "{when}: {} blocks, QEMU has {}", self.blocks.len(), guest.len());
        for (name, expected) in guest {
            let (_, found) = self.blocks.iter().find(|(n, _)| n == name).with_context(|| format!("no block {name}"))?;
            ensure!(found.len() == expected.len(), "{when}: {name} has {} bytes, not {}", found.len(), expected.len());
            let differ: Vec<usize> = (0..expected.len() / PAGE_BYTES)
                .filter(|page| {
                    let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
                    found[range.clone()] != expected[range]
                })
                .collect();
            ensure!(
                differ.is_empty(),
                "{when}: {} pages of {name} differ: {:?}",
                differ.len(),
                &differ[..differ.len().min(8)]
            );
        }
        Ok(())
    }
}

/// Seeds while the guest runs, then cuts at random moments; at each cut every page is compared.
fn every_epoch_is_the_guest(accelerator: &str, extra: &[&str]) -> Result<()> {
    let guest = Guest::start(accelerator, extra)?;
    let mut oracle = Qmp::connect(&guest.path("oracle.qmp"), ANSWER)?;
    let mut capture = guest.capture()?;
    capture.arm(1, 1, Whole::Seed)?;
    let state = capture.state()?;
    let arena = File::open(format!("/proc/self/fd/{}", state.arena_fd))?;
    let mut standby = Standby::default();
    // The first pass comes before the first copy: arming was done while the guest ran.
    let mut passes = 0;
    loop {
        let passed = capture.pass()?.context("pass")?;
        passes += 1;
        if passed.pending_pages <= 4096 || passes > 5 {
            break;
        }
        while let Some(part) = capture.fill(8 << 20)? {
            ensure!(!part.last, "a part copied while the guest runs is no recovery point");
            standby.apply(&part, &arena)?;
            capture.release(part.epoch, part.part);
        }
    }
    let mut random = random::generator("capture");
    let rounds = random::rounds(60, 1000);
    let mut captured = 0;
    for round in 0..rounds {
        let part = capture.cut(u64::MAX, true)?.map_err(|no| anyhow::anyhow!("no cut: {no}"))?;
        ensure!(part.last && part.epoch == round as u64 + 1, "epoch {} where {} was due", part.epoch, round + 1);
        standby.apply(&part, &arena)?;
        captured += part.dirty_pages;
        standby.compare(&guest.memory(&mut oracle)?, &format!("{accelerator}, epoch {}", part.epoch))?;
        capture.release(part.epoch, part.part);
        capture.end_hold()?;
        std::thread::sleep(random::below(&mut random, Duration::from_millis(60)));
    }
    ensure!(captured > 100 * rounds as u64, "the guest wrote only {captured} pages in {rounds} epochs: no test");
    println!("{accelerator}: {rounds} epochs, {captured} pages, no difference");
    let lines = std::fs::read_to_string(guest.path("serial"))?.lines().count();
    capture.detach();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(std::fs::read_to_string(guest.path("serial"))?.lines().count() >= lines, "the guest stopped counting");
    Ok(())
}

#[test]
fn every_epoch_is_the_guest_under_kvm() -> Result<()> {
    File::open("/dev/kvm").context("open /dev/kvm: this test needs it")?;
    every_epoch_is_the_guest("kvm", &[])
}

#[test]
fn every_epoch_is_the_guest_under_tcg() -> Result<()> {
    every_epoch_is_the_guest("tcg", &[])
}

#[test]
fn every_epoch_is_the_guest_in_shared_memory() -> Result<()> {
    let memory = format!("memory-backend-memfd,id=m0,size={MEMORY_MIB}M,share=on");
    every_epoch_is_the_guest("tcg", &["-object", &memory, "-machine", "memory-backend=m0"])
}

/// A guest that somebody else has stopped is left alone, and so is one that runs when there is nothing to resume.
#[test]
fn a_guest_that_somebody_stopped_stays_stopped() -> Result<()> {
    let guest = Guest::start("tcg", &[])?;
    let mut oracle = Qmp::connect(&guest.path("oracle.qmp"), ANSWER)?;
    let mut capture = guest.capture()?;
    capture.arm(1, 1, Whole::Seed)?;
    let status = |oracle: &mut Qmp| -> Result<String> {
        Ok(oracle.execute("query-status", None)?["status"].as_str().unwrap_or_default().to_owned())
    };
    oracle.execute("stop", None)?;
    for _ in 0..3 {
        let no = capture.cut(u64::MAX, false)?.err().context("a cut of a stopped guest")?;
        ensure!(no.reason == vmdr_proto::shim::NoPartReason::NotRunning, "{no}");
        ensure!(capture.pass()?.is_err());
        ensure!(status(&mut oracle)? == "paused", "vmdr resumed a guest that it had not stopped");
    }
    oracle.execute("cont", None)?;
    capture.cut(u64::MAX, false)?.map_err(|no| anyhow::anyhow!("{no}"))?;
    ensure!(status(&mut oracle)? == "running");
    ensure!(capture.end_hold().is_err(), "there was no hold");
    Ok(())
}

/// A successor finds the userfaultfd in QEMU: no second one is made, and it can go on.
#[test]
fn a_successor_takes_over_the_dirty_log() -> Result<()> {
    let guest = Guest::start("tcg", &[])?;
    let descriptors = |pid: u32| -> Result<usize> {
        let mut count = 0;
        for entry in Path::new(&format!("/proc/{pid}/fd")).read_dir()? {
            let link = std::fs::read_link(entry?.path()).unwrap_or_default();
            count += usize::from(link.to_string_lossy().contains("userfaultfd"));
        }
        Ok(count)
    };
    for _ in 0..3 {
        let mut capture = guest.capture()?;
        capture.arm(1, 1, Whole::Seed)?;
        capture.cut(u64::MAX, false)?.map_err(|no| anyhow::anyhow!("{no}"))?;
        ensure!(descriptors(guest.qemu.id())? == 1);
    }
    Ok(())
}
