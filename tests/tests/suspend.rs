//! `vmdr suspend` and `resume`, and everything else after which mirrors begin anew: what has not changed does not cross the
//! wire, and what has is compared with the guest byte for byte.

use anyhow::{Context, Result, ensure};
use rand::RngCore;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// Copying a whole guest, while others use the machine.
const COPY_LIMIT: Duration = Duration::from_secs(180);
/// Data on the second disk that nobody changes and nobody can compress.
const COLD_MIB: usize = 64;

fn guest() -> GuestSpec {
    let mut guest = GuestSpec::linux("web1").memory(160).workload("--ram-mib 32 --pages 20 --interval-ms 100");
    guest.disks_mib = vec![64, 96];
    guest
}

/// What the agent of site A has sent since it was started.
fn sent_bytes(scene: &Scene) -> Result<f64> {
    let metrics = scene.rig.site(At::A).run("curl", &["-sS", "--max-time", "10", "http://127.0.0.1:7422/metrics"])?;
    let line = metrics.lines().find(|line| line.starts_with("vmdr_sent_bytes_total{"));
    // Before its first part there is no such line.
    Ok(line.and_then(|line| line.rsplit(' ').next()).map_or(Ok(0.0), str::parse)?)
}

/// What the shims of site A have logged so far.
fn shim_log(scene: &Scene) -> String {
    let path = scene.rig.site(At::A).path("/var/log/vmdr").join(format!("shim-{}.log", scene.guest.uuid()));
    std::fs::read_to_string(path).unwrap_or_default()
}

/// How many disks a dirty bitmap has spared so far.
fn spared(scene: &Scene) -> usize {
    shim_log(scene).matches("dirty bitmap spares").count()
}

/// From here until the guest is protected again: the bytes that were sent.
fn until_protected(scene: &Scene, what: &str, before: f64, first_copy: f64) -> Result<f64> {
    scene.wait_protected(COPY_LIMIT).with_context(|| what.to_owned())?;
    scene.wait_durable()?;
    let sent = sent_bytes(scene)? - before;
    println!("{what}: {sent:.0} bytes, of {first_copy:.0} in the first copy ({:.1} %)", 100.0 * sent / first_copy);
    ensure!(sent < first_copy / 4.0, "{what}: {sent} bytes were sent, the first copy had {first_copy}");
    Ok(sent)
}

fn suspend(scene: &Scene) -> Result<u64> {
    let said = daemon::vmdr_json(scene.rig.site(At::A), &["suspend", &scene.guest.name])?;
    let epoch = said["epoch"].as_u64().context("the recovery point that stays")?;
    let status = scene.status(At::A)?;
    ensure!(status["state"] == "suspended" && status["since"].is_string(), "{status}");
    ensure!(scene.rig.site(At::A).processes_named("vmdr-shim").is_empty(), "a shim of a suspended protection");
    let jobs = scene.rig.site(At::A).virsh(&[
        "qemu-monitor-command",
        &scene.guest.name,
        r#"{"execute":"query-block-jobs"}"#,
    ])?;
    ensure!(jobs.contains(r#""return":[]"#), "block jobs of a suspended protection: {jobs}");
    Ok(epoch)
}

fn resume(scene: &Scene) -> Result<()> {
    daemon::vmdr(scene.rig.site(At::A), &["resume", &scene.guest.name]).map(|_| ())
}

/// The held guest's first disk, of which the newest is in an overlay, is what the standby has.
fn same_as_overlay(scene: &Scene) -> Result<()> {
    let site = scene.rig.site(At::A);
    daemon::vmdr(site, &["hold", &scene.guest.name])?;
    let standby = scene.rig.site(At::B).path("/var/lib/vmdr/receiver").join(scene.guest.uuid());
    let image = std::fs::read_dir(&standby)?.flatten().map(|entry| entry.path().join("disk/vda.raw"));
    let image =
        image.into_iter().find(|image| image.exists()).context("the standby's disk")?.to_string_lossy().into_owned();
    let compare = ["compare", "-U", "-f", "qcow2", "-F", "raw", "/var/lib/libvirt/images/overlay.qcow2", &image];
    // Applying an epoch to the standby may take a moment after it is durable.
    let same = wait_for("the standby to be what the overlay holds", ANSWER, || Ok(site.run("qemu-img", &compare).ok()));
    same.with_context(|| format!("{:?}", site.run("qemu-img", &compare)))?;
    daemon::vmdr(site, &["release", &scene.guest.name]).map(|_| ())
}

/// The guest works; gives its tick.
fn works(scene: &Scene) -> Result<u64> {
    let (client, address) = (scene.rig.client(), scene.guest.address);
    let now = client.ping(address, ANSWER)?;
    Ok(client.wait_tick(address, now.tick + 5, ANSWER)?.tick)
}

#[test]
fn what_has_not_changed_is_not_sent_again_when_mirrors_begin_anew() -> Result<()> {
    let mut scene = Scene::new("suspend", guest())?;
    let name = scene.guest.name.clone();
    let mut noise = vec![0; COLD_MIB << 20];
    random::generator("cold data").fill_bytes(&mut noise);
    let cold = File::options().write(true).open(scene.rig.site(At::A).path(scene.guest.disk_path(1)))?;
    cold.write_all_at(&noise, 8 << 20)?;
    cold.sync_all()?;
    let refused = daemon::vmdr_output(scene.rig.site(At::A), 60, &["suspend", &name])?;
    ensure!(refused.status.code() == Some(4), "not protected yet: {refused:?}");

    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let first_copy = sent_bytes(&scene)?;
    let site = scene.rig.site(At::A);

    // A mirror that is lost, with the guest and the shim as they were.
    let before = sent_bytes(&scene)?;
    site.virsh(&["blockjob", &name, "vdb", "--abort"])?;
    wait_for(
        "the loss to be noticed",
        COPY_LIMIT,
        || Ok((scene.status(At::A)?["state"] != "protected").then_some(())),
    )?;
    until_protected(&scene, "after the loss of a mirror", before, first_copy)?;

    // What libvirt refuses while the guest is protected.
    let overlay = "vda,snapshot=external,file=/var/lib/libvirt/images/overlay.qcow2";
    let snapshot =
        ["snapshot-create-as", &name, "s1", "--disk-only", "--no-metadata", "--diskspec", overlay, "--diskspec"];
    let snapshot = [&snapshot[..], &["vdb,snapshot=no"]].concat();
    ensure!(site.virsh(&snapshot).is_err(), "libvirt allows snapshots of mirrored disks now");

    let epoch = suspend(&scene)?;
    ensure!(works(&scene)? > 0);
    let spared_before = spared(&scene);
    // It stays so, whatever becomes of the agent; the recovery point can be activated, and grows older.
    scene.agent.as_mut().context("an agent")?.kill()?;
    scene.start_agent()?;
    let status = wait_for("the state suspended", ANSWER, || {
        let status = scene.status(At::A)?;
        Ok((status["state"] == "suspended").then_some(status))
    })?;
    ensure!(status["durable_epoch"].as_u64() == Some(epoch), "{status}");
    let age = |scene: &Scene| scene.status_number(At::A, "rpo_seconds");
    let young = age(&scene)?;
    wait_for("the recovery point to grow older", ANSWER, || Ok((age(&scene)? > young + 0.5).then_some(())))?;
    let points = daemon::vmdr_json(scene.rig.site(At::B), &["points", &name])?;
    ensure!(points["points"][0]["epoch"].as_u64() >= Some(epoch), "{points}");
    let twice = daemon::vmdr_output(scene.rig.site(At::A), 60, &["suspend", &name])?;
    ensure!(twice.status.code() == Some(1), "suspended twice: {twice:?}");
    let before = sent_bytes(&scene)?;
    resume(&scene)?;
    until_protected(&scene, "after suspend and resume", before, first_copy)?;
    ensure!(spared(&scene) >= spared_before + 2, "both disks have a dirty bitmap: {}", shim_log(&scene));

    // What it is there for: a snapshot and a larger disk.
    suspend(&scene)?;
    let site = scene.rig.site(At::A);
    site.virsh(&snapshot)?;
    site.virsh(&["blockresize", &name, "vdb", "104M"])?;
    works(&scene)?;
    let before = sent_bytes(&scene)?;
    resume(&scene)?;
    until_protected(&scene, "after a snapshot of one disk and with the other resized", before, first_copy)?;
    same_as_overlay(&scene)?;

    // The snapshot is merged again: the disk is the file that it was, and QEMU has noted what came into it.
    suspend(&scene)?;
    let site = scene.rig.site(At::A);
    site.virsh(&["blockcommit", &name, "vda", "--active", "--pivot", "--wait"])?;
    let before = sent_bytes(&scene)?;
    resume(&scene)?;
    until_protected(&scene, "after the snapshot was merged", before, first_copy)?;
    scene.compare_held()?;

    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    let seen = client.ping(address, ANSWER)?;
    scene.wait_durable()?;
    scene.lose_site_a()?;
    scene.activate()?;
    let back = client.ping(address, ANSWER)?;
    ensure!(back.boot == seen.boot && back.tick >= seen.tick, "{seen:?} was durable, {back:?} came back");
    client.self_check(address)?;
    scene.rig.finish()
}
