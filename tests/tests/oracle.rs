//! The standby against an independent reading of the paused guest: byte for byte, RAM and disk.
//!
//! A round: the agent and the shim are frozen (SIGSTOP) at random until the shim is caught with the guest paused, that is,
//! within a cut. Now nothing moves: QEMU's `pmemsave`, /proc/PID/mem and the disk's file are read. The shim is let go, ends its
//! cut and lets the guest run; the guest is suspended through libvirt before the agent is let go, so that this cut is the newest
//! epoch. When it is durable, the standby must be what was read. vmdr knows nothing of this test.

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::{GuestSpec, Kind};
use vmdr_tests::oracle;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// How often freezing is tried until it hits a pause; a pause takes some per cent of the time.
const TRIES_MAX: u32 = 2000;
/// The shim must have beaten its heart before the agent, which watches it, is let go.
const HEARTBEAT_MS: u64 = 200;

/// What an independent reading found.
struct Reading {
    physical: Vec<u8>,
    blocks: Vec<(oracle::RamBlock, Vec<u8>)>,
    disks: Vec<(String, PathBuf)>,
}

fn shim(scene: &Scene) -> Result<u32> {
    let shims = scene.rig.site(At::A).processes_named("vmdr-shim");
    shims.first().copied().context("no shim runs")
}

/// The guest's run state, or none when QEMU does not answer at once (a `stop` that drains).
fn paused(scene: &Scene) -> Result<bool> {
    let mut command = scene.rig.site(At::A).command_within(2, "virsh");
    let words = ["-q", "-c", "qemu:///system", "qemu-monitor-command", &scene.guest.name, "--hmp", "info status"];
    let output = exec::output(command.args(words))?;
    Ok(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("paused"))
}

/// Freezes agent and shim within a pause, reads, and lets only the shim go.
fn catch(scene: &Scene, random: &mut rand::rngs::StdRng) -> Result<Reading> {
    let agent = scene.agent.as_ref().context("an agent")?;
    let shim = shim(scene)?;
    for _ in 0..TRIES_MAX {
        std::thread::sleep(random::below(random, Duration::from_millis(60)));
        agent.freeze()?;
        exec::signal(shim, Signal::STOP)?;
        let caught = paused(scene)?;
        let reading = if caught { Some(read(scene)) } else { None };
        exec::signal(shim, Signal::CONT)?;
        if let Some(reading) = reading {
            return reading;
        }
        std::thread::sleep(Duration::from_millis(HEARTBEAT_MS));
        agent.thaw()?;
    }
    bail!("no pause was hit in {TRIES_MAX} tries")
}

fn read(scene: &Scene) -> Result<Reading> {
    let (site, guest) = (scene.rig.site(At::A), &scene.guest);
    let physical = oracle::pmemsave(site, guest)?;
    let mut blocks = Vec::new();
    for block in oracle::ram_blocks(site, guest)? {
        let bytes = oracle::read_block(site, guest, &block)?;
        blocks.push((block, bytes));
    }
    let mut disks = Vec::new();
    for number in 0..guest.disks_mib.len() {
        let copy = scene.rig.directory().join(format!("oracle-{number}.raw"));
        oracle::copy_file(&site.path(guest.disk_path(number)), &copy)?;
        disks.push((format!("vd{}.raw", char::from(b'a' + number as u8)), copy));
    }
    Ok(Reading { physical, blocks, disks })
}

/// Files below a directory of which the parent's name is `folder`.
fn files(directory: &Path, folder: &str) -> Result<Vec<PathBuf>> {
    let found =
        exec::run(exec::limited(30, "find").arg(directory).args(["-type", "f", "-path", &format!("*/{folder}/*")]))?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// What of the standby differs from the reading; empty: nothing.
fn differences(scene: &Scene, reading: &Reading) -> Result<Vec<String>> {
    let directory = scene.rig.site(At::B).path("/var/lib/vmdr/receiver");
    let images = files(&directory, "ram")?;
    let mut differences = Vec::new();
    let image_of = |bytes: usize| -> Result<Vec<PathBuf>> {
        let sized = |path: &&PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.len() == bytes as u64);
        Ok(images.iter().filter(sized).cloned().collect())
    };
    let main = image_of(reading.physical.len())?;
    let [main] = main.as_slice() else { bail!("{} images have the size of the guest's memory", main.len()) };
    let standby = fs::read(main).context("read the standby's memory")?;
    let pages = oracle::differing_pages(&reading.physical, &standby);
    if !pages.is_empty() {
        let some: Vec<_> = pages.iter().take(8).collect();
        differences.push(format!("{} pages of guest-physical memory, first {some:x?}", pages.len()));
    }
    // Every other block must be among the images of its size.
    for (block, bytes) in &reading.blocks {
        let equal = |path: &PathBuf| {
            let mut image = vec![0; bytes.len()];
            fs::File::open(path).and_then(|file| file.read_exact_at(&mut image, 0)).is_ok() && image == *bytes
        };
        if !image_of(bytes.len())?.iter().any(equal) {
            differences.push(format!("RAM block {}", block.name));
        }
    }
    for (name, copy) in &reading.disks {
        let disks = files(&directory, "disk")?;
        let disk = disks.iter().find(|path| path.ends_with(name)).with_context(|| format!("find {name}"))?;
        let blocks = oracle::differing_blocks(copy, disk)?;
        if !blocks.is_empty() {
            differences.push(format!("{name} in {} MiB, first at {:#x}", blocks.len(), blocks[0]));
        }
    }
    Ok(differences)
}

/// The same with the guest held: `vmdr hold` pauses it at a cut and answers when that is durable. Much faster, so that a
/// thousand epochs can be compared.
fn compare_held(name: &str, guest: GuestSpec, rounds: usize) -> Result<()> {
    let mut random = random::generator(name);
    let scene = Scene::new(name, guest)?;
    scene.protect(&["--interval", "50ms"])?;
    let site = scene.rig.site(At::A);
    let mut epochs = (u64::MAX, 0);
    for round in 0..rounds {
        std::thread::sleep(random::below(&mut random, Duration::from_millis(150)));
        let held = daemon::vmdr_json(site, &["hold", &scene.guest.name]).with_context(|| format!("round {round}"))?;
        let epoch = held["epoch"].as_u64().context("the epoch it is held at")?;
        assert!(epoch > epochs.1, "epoch {epoch} after {}", epochs.1);
        epochs = (epochs.0.min(epoch), epoch);
        let reading = read(&scene)?;
        let mut last = Vec::new();
        let equal = wait_for("the standby to be what was read", ANSWER, || {
            last = differences(&scene, &reading)?;
            Ok(last.is_empty().then_some(()))
        });
        equal.with_context(|| format!("round {round}, epoch {epoch}: {last:?}"))?;
        daemon::vmdr(site, &["release", &scene.guest.name])?;
    }
    println!("{name}: {rounds} of the epochs {} to {} compared, no difference", epochs.0, epochs.1);
    scene.rig.finish()
}

fn compare(name: &str, guest: GuestSpec, rounds: usize) -> Result<()> {
    let mut random = random::generator(name);
    let mut scene = Scene::new(name, guest)?;
    // Reading takes longer than a pause ever should.
    scene.configure_agent("cut_limit_ms = 60000\n");
    scene.start_agent()?;
    let linux = matches!(scene.guest.kind, Kind::Linux { .. });
    scene.protect(&["--interval", "50ms"])?;
    for round in 0..rounds {
        scene.wait_durable()?;
        let reading = catch(&scene, &mut random).with_context(|| format!("round {round}"))?;
        wait_for("the cut to end", ANSWER, || Ok((!paused(&scene)?).then_some(())))?;
        oracle::pause(scene.rig.site(At::A), &scene.guest)?;
        std::thread::sleep(Duration::from_millis(HEARTBEAT_MS));
        scene.agent.as_ref().context("an agent")?.thaw()?;
        let mut last = Vec::new();
        let equal = wait_for("the standby to be what was read", ANSWER, || {
            last = differences(&scene, &reading)?;
            Ok(last.is_empty().then_some(()))
        });
        equal.with_context(|| format!("round {round}: {last:?}, at {:?}", scene.status(At::A)))?;
        oracle::resume(scene.rig.site(At::A), &scene.guest)?;
    }
    println!("{name}: {rounds} epochs compared, no difference");
    if linux {
        scene.rig.client().self_check(scene.guest.address)?;
    }
    scene.rig.finish()
}

#[test]
fn the_standby_is_byte_for_byte_what_the_held_guest_is() -> Result<()> {
    let workload = "--ram-mib 24 --pages 200 --interval-ms 20 --record-bytes 65536 --records 128 --readers 2";
    compare_held("oracle-held", GuestSpec::linux("web1").memory(112).workload(workload), random::rounds(20, 1000))
}

#[test]
fn the_standby_is_byte_for_byte_what_the_held_guest_is_under_kvm() -> Result<()> {
    fs::File::options().read(true).write(true).open("/dev/kvm").context("open /dev/kvm: this test needs it")?;
    compare_held("oracle-held-kvm", GuestSpec::bare_metal("metal", true), random::rounds(20, 1000))
}

/// `virsh resume` at any moment, as after a `virsh suspend` that fell into a cut: the guest runs while it is being captured.
#[test]
fn a_guest_that_somebody_else_resumes_within_a_cut_yields_no_torn_recovery_point() -> Result<()> {
    let mut random = random::generator("oracle-resumed");
    let workload = "--ram-mib 24 --pages 200 --interval-ms 20 --record-bytes 65536 --records 128 --readers 2";
    let mut scene = Scene::new("oracle-resumed", GuestSpec::linux("web1").memory(112).workload(workload))?;
    scene.configure_agent("cut_limit_ms = 60000\n");
    scene.start_agent()?;
    scene.protect(&["--interval", "50ms"])?;
    let (site, shim) = (scene.rig.site(At::A), shim(&scene)?);
    for round in 0..random::rounds(2, 30) {
        scene.wait_durable()?;
        let before = log_of_shim(&scene)?.matches(RESUMED).count();
        let mut resumed = false;
        for _ in 0..TRIES_MAX {
            std::thread::sleep(random::below(&mut random, Duration::from_millis(60)));
            let agent = scene.agent.as_ref().context("an agent")?;
            agent.freeze()?;
            exec::signal(shim, Signal::STOP)?;
            resumed = paused(&scene)?;
            if resumed {
                oracle::resume(site, &scene.guest)?;
                // It runs, and writes memory; its disk waits for the shim.
                std::thread::sleep(Duration::from_millis(HEARTBEAT_MS));
            }
            exec::signal(shim, Signal::CONT)?;
            std::thread::sleep(Duration::from_millis(HEARTBEAT_MS));
            agent.thaw()?;
            if resumed {
                break;
            }
        }
        assert!(resumed, "no pause was hit in {TRIES_MAX} tries");
        wait_for("the shim to notice", ANSWER, || {
            Ok((log_of_shim(&scene)?.matches(RESUMED).count() > before).then_some(()))
        })?;
        scene.compare_held().with_context(|| format!("round {round}"))?;
    }
    scene.rig.client().self_check(scene.guest.address)?;
    scene.rig.finish()
}

/// What the shim says of a guest that was resumed within a cut (or within a pass, which is no recovery point anyway).
const RESUMED: &str = "somebody else has resumed the guest within a pause";

fn log_of_shim(scene: &Scene) -> Result<String> {
    let path = scene.rig.site(At::A).path(format!("/var/log/vmdr/shim-{}.log", scene.guest.uuid()));
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

#[test]
fn the_standby_is_byte_for_byte_what_the_paused_guest_was() -> Result<()> {
    let workload = "--ram-mib 24 --pages 200 --interval-ms 20 --record-bytes 65536 --records 128 --readers 2";
    compare("oracle", GuestSpec::linux("web1").memory(112).workload(workload), random::rounds(5, 50))
}

#[test]
fn the_standby_is_byte_for_byte_what_the_paused_guest_was_under_kvm() -> Result<()> {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !kvm {
        println!("oracle-kvm: /dev/kvm does not open here: the same guest is emulated");
    }
    compare("oracle-kvm", GuestSpec::bare_metal("metal", kvm), random::rounds(5, 50))
}
