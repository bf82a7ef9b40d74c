//! What happens to a guest that vmdr has not done: each has the answer that docs/fault-model.md gives it.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use vmdr_shim::nbd::{ExportError, Server};
use vmdr_tests::client::Pong;
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::{DiskShape, GuestSpec, Store};
use vmdr_tests::nbd_store::{self, Asked};
use vmdr_tests::oracle;
use vmdr_tests::rig::{At, Rig};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

const WORKLOAD: &str = "--ram-mib 24 --pages 40 --interval-ms 50 --record-bytes 16384 --records 256 --readers 1";
/// Copying or booting a guest, while others use the machine.
const LIMIT: Duration = Duration::from_secs(180);
/// How long nothing may happen to a guest that somebody has stopped.
const STAYS: Duration = Duration::from_secs(2);

fn guest() -> GuestSpec {
    GuestSpec::linux("web1").memory(144).workload(WORKLOAD)
}

fn ping(scene: &Scene) -> Result<Pong> {
    scene.rig.client().ping(scene.guest.address, ANSWER)
}

fn works(scene: &Scene) -> Result<Pong> {
    let now = ping(scene)?;
    scene.rig.client().wait_tick(scene.guest.address, now.tick + 5, ANSWER)
}

/// Asks the guest to end itself, and waits until it is another boot, or no more there.
fn ask_to(scene: &Scene, word: &str) -> Result<()> {
    scene.rig.client().request(scene.guest.address, word, true, ANSWER).map(|_| ())
}

/// Waits for a state of the agent's, and gives the whole status.
fn wait_state(scene: &Scene, state: &str) -> Result<serde_json::Value> {
    wait_for(&format!("the state {state}"), LIMIT, || {
        let status = scene.status(At::A)?;
        Ok((status["state"] == state).then_some(status))
    })
    .with_context(|| format!("the status is {:?}", scene.status(At::A)))
}

/// `virsh suspend`, until it is one: libvirt takes a guest that a cut has stopped for paused already, and does nothing.
fn pause(scene: &Scene) -> Result<serde_json::Value> {
    wait_for("the operator's pause", LIMIT, || {
        virsh(scene, &["suspend", &scene.guest.name])?;
        std::thread::sleep(STAYS);
        let status = scene.status(At::A)?;
        Ok((status["state"] == "paused").then_some(status))
    })
}

fn no_shim(scene: &Scene) -> Result<()> {
    wait_for("the shim to be gone", ANSWER, || {
        Ok(scene.rig.site(At::A).processes_named("vmdr-shim").is_empty().then_some(()))
    })
}

/// Site A is lost; the guest goes on at B where it was.
fn goes_on_at_b(scene: &mut Scene, seen: &Pong) -> Result<()> {
    scene.lose_site_a()?;
    scene.activate()?;
    let back = ping(scene)?;
    ensure!(back.boot == seen.boot && back.tick >= seen.tick, "{seen:?} was durable, {back:?} came back");
    scene.rig.client().self_check(scene.guest.address).map(|_| ())
}

fn virsh(scene: &Scene, words: &[&str]) -> Result<String> {
    scene.rig.site(At::A).virsh(words)
}

/// How often the agent has copied the guest without comparing it with what the receiver has.
fn first_copies(scene: &Scene) -> usize {
    let log = daemon::log(scene.rig.site(At::A), daemon::Program::Agent);
    let copies = log.lines().filter(|line| line.contains("copying the whole guest"));
    copies.filter(|line| line.trim_end().ends_with("Seed")).count()
}

/// A file for a disk of this size in site A, in the site.
fn new_disk(scene: &Scene, mib: u64) -> Result<String> {
    let inside = "/var/lib/libvirt/images/extra.raw".to_owned();
    std::fs::File::create(scene.rig.site(At::A).path(&inside))?.set_len(mib << 20)?;
    Ok(inside)
}

#[test]
fn a_reboot_a_pause_and_a_restart_of_libvirtd_leave_the_stream_as_it_is() -> Result<()> {
    let mut scene = Scene::new("events-stream", guest())?;
    let name = scene.guest.name.clone();
    scene.protect(&["--interval", "100ms"])?;
    let shim = scene.shim()?;
    let before = scene.wait_durable()?;

    let boot = ping(&scene)?.boot;
    ask_to(&scene, "reboot")?;
    wait_for("another boot", LIMIT, || {
        let pong = scene.rig.client().ping(scene.guest.address, Duration::from_secs(1));
        Ok(pong.ok().filter(|pong| pong.boot != boot))
    })?;
    let rebooted = scene.wait_durable()?;
    ensure!(rebooted > before && scene.shim()? == shim, "the stream goes on with the same shim");

    // The operator's word: it stays paused, and nothing is cut.
    let status = pause(&scene)?;
    ensure!(status["last_error"].as_str().is_some_and(|text| text.contains("virsh resume")), "{status}");
    ensure!(status["since"].is_string(), "{status}");
    std::thread::sleep(STAYS);
    ensure!(scene.guest.state(scene.rig.site(At::A))? == "paused", "somebody has resumed it");
    ensure!(scene.status(At::A)?["epoch"] == status["epoch"], "a guest that stands still was cut");
    virsh(&scene, &["resume", &name])?;
    scene.wait_protected(LIMIT)?;
    works(&scene)?;

    // libvirtd away: cuts go on. Back again: so does everything.
    let site = scene.rig.site(At::A);
    for pid in site.processes_named("libvirtd") {
        exec::signal(pid, Signal::KILL)?;
    }
    let away = scene.wait_durable()?;
    scene.wait_durable_epoch(away + 5)?;
    works(&scene)?;
    site.start_services()?;
    scene.wait_durable()?;
    ensure!(scene.shim()? == shim, "another shim after a restart of libvirtd");
    // Its events are heard again: a network card that comes is in the next recovery point.
    wait_for("libvirt's events", LIMIT, || {
        let log = daemon::log(scene.rig.site(At::A), daemon::Program::Agent);
        Ok((log.matches("libvirt closed the connection").count() > 0).then_some(()))
    })?;
    let nic =
        ["attach-interface", &name, "bridge", "vmbr0", "--model", "virtio", "--mac", "52:54:00:4e:00:99", "--live"];
    virsh(&scene, &nic)?;
    let with_nic = scene.wait_durable()?;
    scene.wait_durable_epoch(with_nic + 2)?;
    ensure!(scene.shim()? == shim, "another shim after a network card was plugged in");
    virsh(&scene, &["detach-interface", &name, "bridge", "--mac", "52:54:00:4e:00:99", "--live"])?;
    virsh(&scene, &nic)?;
    let seen = works(&scene)?;
    let last = scene.wait_durable()?;
    scene.wait_durable_epoch(last + 10)?;
    goes_on_at_b(&mut scene, &seen)?;
    let devices = scene.rig.site(At::B).virsh(&["dumpxml", &name])?;
    ensure!(devices.contains("52:54:00:4e:00:99"), "the guest at B has no such card: {devices}");
    scene.rig.finish()
}

#[test]
fn a_disk_that_comes_is_taken_in_and_one_that_goes_is_let_go() -> Result<()> {
    let mut scene = Scene::new("events-disk", guest())?;
    let name = scene.guest.name.clone();
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let old = scene.status(At::A)?["durable_epoch"].as_u64().context("an epoch")?;

    let disk = new_disk(&scene, 24)?;
    std::fs::write(scene.rig.site(At::A).path(&disk), vec![0xa5; 24 << 20])?;
    virsh(&scene, &["attach-disk", &name, &disk, "vdb", "--live", "--cache", "none", "--targetbus", "virtio"])?;
    // Points without it are not silently made: another shim, and what it brings is a resync.
    let resynced = wait_for("the disk to be protected", LIMIT, || {
        let standby = scene.rig.site(At::B).path("/var/lib/vmdr/receiver").join(scene.guest.uuid());
        let images = std::fs::read_dir(&standby)?.flatten().map(|entry| entry.path().join("disk/vdb.raw"));
        Ok(images.into_iter().find(|image| image.exists()))
    });
    let image = resynced.with_context(|| format!("the status is {:?}", scene.status(At::A)))?;
    let epoch = scene.wait_durable()?;
    ensure!(epoch > old);
    let log = daemon::log(scene.rig.site(At::A), daemon::Program::Agent);
    ensure!(log.contains("the disks of domain web1 have changed"), "{log}");
    ensure!(first_copies(&scene) == 1, "the disk that comes is no reason for another first copy: {log}");
    let standby = || oracle::differing_blocks(&scene.rig.site(At::A).path(&disk), &image);
    wait_for("the standby to have the disk's content", ANSWER, || Ok(standby()?.is_empty().then_some(())))?;

    let detach = ["detach-disk", &name, "vdb", "--live"];
    ensure!(virsh(&scene, &detach).is_err(), "libvirt lets a mirrored disk go now");
    daemon::vmdr(scene.rig.site(At::A), &["suspend", &name])?;
    virsh(&scene, &detach)?;
    wait_for("the disk to be gone", ANSWER, || {
        Ok((!virsh(&scene, &["domblklist", &name])?.contains("vdb")).then_some(()))
    })?;
    daemon::vmdr(scene.rig.site(At::A), &["resume", &name])?;
    scene.wait_protected(LIMIT)?;
    let seen = works(&scene)?;
    scene.wait_durable()?;
    goes_on_at_b(&mut scene, &seen)?;
    scene.rig.finish()
}

#[test]
fn a_guest_that_shuts_down_leaves_its_disks_at_the_receiver() -> Result<()> {
    let mut scene = Scene::new("events-shutdown", guest())?;
    let name = scene.guest.name.clone();
    scene.protect(&["--interval", "1s"])?;
    scene.wait_durable()?;
    let same_disks = |scene: &Scene| -> Result<()> {
        let standby = scene.rig.site(At::B).path("/var/lib/vmdr/receiver").join(scene.guest.uuid());
        let disk = scene.rig.site(At::A).path(scene.guest.disk_path(0));
        let mut differing = Vec::new();
        let same = wait_for("the standby to have the disk as the guest left it", ANSWER, || {
            for entry in std::fs::read_dir(&standby)?.flatten() {
                let image = entry.path().join("disk/vda.raw");
                if image.exists() {
                    differing = oracle::differing_blocks(&disk, &image)?;
                    return Ok(differing.is_empty().then_some(()));
                }
            }
            Ok(None)
        });
        same.with_context(|| format!("MiB that differ: {differing:?}"))
    };

    ask_to(&scene, "poweroff")?;
    let off = wait_state(&scene, "shut off")?;
    ensure!(off["last_error"].is_null(), "a shutdown is no disaster: {off}");
    no_shim(&scene)?;
    same_disks(&scene)?;
    let epoch = scene.status(At::B)?["durable_epoch"].as_u64().context("a point at B")?;

    // Started again, it is protected again, in the same generation.
    virsh(&scene, &["start", &name])?;
    let next = scene.wait_durable()?;
    ensure!(next > epoch, "epoch {next} came after {epoch}");
    ensure!(first_copies(&scene) == 1, "starting it again was another first copy");

    // The link is away when it shuts down: what it wrote last waits, also for another agent.
    works(&scene)?;
    scene.rig.set_link(false)?;
    wait_state(&scene, "disconnected")?;
    ask_to(&scene, "poweroff")?;
    wait_state(&scene, "shut off")?;
    scene.agent.as_mut().context("an agent")?.kill()?;
    scene.start_agent()?;
    scene.rig.set_link(true)?;
    no_shim(&scene)?;
    same_disks(&scene)?;
    let off = wait_state(&scene, "shut off")?;
    ensure!(off["last_error"].is_null(), "{off}");

    // At B it boots, on its disks.
    scene.lose_site_a()?;
    let plan = daemon::vmdr_json(scene.rig.site(At::B), &["activate", &name, "--dry-run"])?;
    let steps = plan["plan"]["steps"].to_string();
    ensure!(steps.contains("boot web1 from its disks"), "{steps}");
    scene.activate()?;
    let booted = scene.rig.client().ping(scene.guest.address, LIMIT)?;
    ensure!(booted.acknowledged > 0, "its records are those of before: {booted:?}");
    scene.rig.client().self_check(scene.guest.address)?;
    scene.rig.finish()
}

#[test]
fn a_guest_that_is_destroyed_or_whose_qemu_dies_keeps_its_recovery_point() -> Result<()> {
    let mut scene = Scene::new("events-crash", guest())?;
    let name = scene.guest.name.clone();
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    virsh(&scene, &["destroy", &name])?;
    let off = wait_state(&scene, "shut off")?;
    ensure!(off["last_error"].as_str().is_some_and(|text| text.contains("destroyed")), "{off}");
    let point = off["durable_epoch"].as_u64().context("a point")?;
    ensure!(scene.status(At::B)?["durable_epoch"].as_u64() == Some(point), "the point with its memory stays: {off}");
    no_shim(&scene)?;

    virsh(&scene, &["start", &name])?;
    scene.wait_protected(LIMIT)?;
    let seen = works(&scene)?;
    let epoch = scene.wait_durable()?;
    exec::signal(scene.rig.site(At::A).qemu(&name)?, Signal::KILL)?;
    let crashed = wait_state(&scene, "crashed")?;
    ensure!(crashed["last_error"].as_str().is_some_and(|text| text.contains("crashed or was killed")), "{crashed}");
    ensure!(crashed["durable_epoch"].as_u64() >= Some(epoch), "{crashed}");
    // An agent that comes later sees it, too.
    scene.agent.as_mut().context("an agent")?.kill()?;
    scene.start_agent()?;
    wait_state(&scene, "crashed")?;
    goes_on_at_b(&mut scene, &seen)?;
    scene.rig.finish()
}

/// Serves a disk that can be made full.
fn serve(rig: &Rig, guest: &GuestSpec, full: Arc<AtomicBool>) -> Result<Vec<Server>> {
    let site = rig.site(At::A);
    // Its disk has to be there; it is made anew, in place, when the guest boots.
    guest.define(site)?;
    nbd_store::serve(site, guest, move |asked| {
        let refused = asked == Asked::Write && full.load(SeqCst);
        if refused { Err(ExportError::NoSpace("the test's disk is full".to_owned())) } else { Ok(()) }
    })
}

#[test]
fn a_guest_that_an_io_error_has_stopped_goes_on_when_somebody_has_mended_it() -> Result<()> {
    let mut guest = guest();
    guest.disk_shapes = vec![DiskShape::in_store(Store::Nbd)];
    let full = Arc::new(AtomicBool::new(false));
    let flag = full.clone();
    let receiver = At::B.receiver();
    let (mut scene, server) = Scene::prepared("events-io", guest, &receiver, |rig, guest| serve(rig, guest, flag))?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    full.store(true, SeqCst);
    let status = wait_state(&scene, "paused")?;
    let told = wait_for("the status to say why", ANSWER, || {
        let status = scene.status(At::A)?;
        let text = status["last_error"].as_str().unwrap_or_default().to_owned();
        Ok((text.contains("I/O error") && text.contains("enospc")).then_some(text))
    });
    println!("{}", told.with_context(|| format!("{status}"))?);
    std::thread::sleep(STAYS);
    ensure!(scene.guest.state(scene.rig.site(At::A))? == "paused", "somebody has resumed it");
    full.store(false, SeqCst);
    virsh(&scene, &["resume", &scene.guest.name])?;
    scene.wait_protected(LIMIT)?;
    let seen = works(&scene)?;
    scene.wait_durable()?;
    goes_on_at_b(&mut scene, &seen)?;
    drop(server);
    scene.rig.finish()
}
