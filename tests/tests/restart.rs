//! Protection goes on after a restart of its parts without copying again what is there, on a domain without a QMP socket
//! of its own too, and stands still when it is told to.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// Copying a whole guest, while others use the machine.
const COPY_LIMIT: Duration = Duration::from_secs(120);

fn guest() -> GuestSpec {
    // Little is dirtied, most of memory and disk stays as it is.
    GuestSpec::linux("web1").memory(192).workload("--ram-mib 64 --pages 20 --interval-ms 100 --readers 1")
}

/// What the agent of site A has sent since it was started.
fn sent_bytes(scene: &Scene) -> Result<f64> {
    let metrics = scene.rig.site(At::A).run("curl", &["-sS", "--max-time", "10", "http://127.0.0.1:7422/metrics"])?;
    let line = metrics.lines().find(|line| line.starts_with("vmdr_sent_bytes_total{"));
    let value = line.and_then(|line| line.rsplit(' ').next()).context("no vmdr_sent_bytes_total")?;
    Ok(value.parse()?)
}

fn wait_state(scene: &Scene, state: &str) -> Result<()> {
    wait_for(&format!("the state {state}"), COPY_LIMIT, || Ok((scene.status(At::A)?["state"] == state).then_some(())))
        .with_context(|| format!("the status is {:?}", scene.status(At::A)))
}

/// The site is lost, and the guest goes on at the other: its self-check passes.
fn goes_on_elsewhere(scene: &mut Scene) -> Result<()> {
    let client = scene.rig.client().clone();
    let address = scene.guest.address;
    let seen = client.ping(address, ANSWER)?;
    let epoch = scene.wait_durable()?;
    scene.lose_site_a()?;
    let report = scene.activate()?;
    ensure!(report["point"]["epoch"].as_u64() >= Some(epoch), "epoch {epoch} was acknowledged: {report}");
    let back = client.ping(address, ANSWER)?;
    ensure!(back.boot == seen.boot && back.tick >= seen.tick, "{seen:?} was durable, {back:?} came back");
    client.self_check(address)?;
    client.wait_tick(address, back.tick + 5, ANSWER)?;
    client.self_check(address).map(|_| ())
}

#[test]
fn after_a_restart_of_the_agent_or_the_loss_of_the_shim_what_is_there_is_not_sent_again() -> Result<()> {
    let mut scene = Scene::new("restart", guest())?;
    scene.protect(&["--interval", "100ms"])?;
    let epoch = scene.wait_durable()?;
    let first_copy = sent_bytes(&scene)?;

    scene.agent.as_mut().context("an agent")?.kill()?;
    scene.start_agent()?;
    wait_state(&scene, "protected")?;
    let again = scene.wait_durable_epoch(epoch + 3)?;
    let after_restart = sent_bytes(&scene)?;
    println!(
        "first copy {first_copy} bytes; after a restart of the agent {after_restart} bytes, epoch {epoch} -> {again}"
    );
    ensure!(after_restart < first_copy / 4.0, "the agent's restart copied: {after_restart} of {first_copy} bytes");

    let before = sent_bytes(&scene)?;
    let shims = scene.rig.site(At::A).processes_named("vmdr-shim");
    let [shim] = shims.as_slice() else { anyhow::bail!("{} shims", shims.len()) };
    let old = scene.status(At::B)?["durable_epoch"].as_u64().context("a point at site B")?;
    exec::signal(*shim, Signal::KILL)?;
    wait_for("another shim", COPY_LIMIT, || {
        let shims = scene.rig.site(At::A).processes_named("vmdr-shim");
        Ok(shims.first().is_some_and(|new| new != shim).then_some(()))
    })?;
    // Until the resync is whole, the old point is there.
    let points = daemon::vmdr_json(scene.rig.site(At::B), &["points", &scene.guest.name])?;
    let kept = points["points"][0]["epoch"].as_u64().context("no point while resyncing")?;
    ensure!(kept >= old, "epoch {old} was durable, {kept} is offered");
    wait_state(&scene, "protected")?;
    scene.wait_durable()?;
    let resync = sent_bytes(&scene)? - before;
    println!("after the loss of the shim {resync} bytes");
    ensure!(resync < first_copy / 3.0, "the resync sent {resync} of {first_copy} bytes");
    goes_on_elsewhere(&mut scene)?;
    scene.rig.finish()
}

#[test]
fn a_guest_without_a_socket_of_its_own_is_protected_through_libvirt() -> Result<()> {
    let mut guest = guest();
    guest.own_qmp = false;
    let mut scene = Scene::new("passthrough", guest)?;
    let words = ["protect", scene.guest.name.as_str(), "--interval", "100ms"];
    let refused = daemon::vmdr_output(scene.rig.site(At::A), 60, &words)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(2) && said.contains("vmdr prepare"), "{:?}: {said}", refused.status);
    scene.protect(&[])?;
    let status = scene.status(At::A)?;
    ensure!(status["monitor"] == "passthrough" && status["interval_ms"] == 1000, "{status}");
    let epoch = scene.wait_durable()?;
    scene.wait_durable_epoch(epoch + 3)?;
    goes_on_elsewhere(&mut scene)?;
    scene.rig.finish()
}

#[test]
fn a_held_guest_stands_still_until_it_is_released() -> Result<()> {
    let mut scene = Scene::new("hold", guest())?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "100ms"])?;
    let name = scene.guest.name.clone();
    let held = daemon::vmdr_json(scene.rig.site(At::A), &["hold", &name])?;
    let epoch = held["epoch"].as_u64().context("the epoch it is held at")?;
    ensure!(scene.status(At::A)?["state"] == "held");
    ensure!(client.ping(address, Duration::from_secs(1)).is_err(), "a held guest answers");
    // Nobody lets it go by mistake: neither a restart of the agent nor the loss of the link.
    scene.agent.as_mut().context("an agent")?.kill()?;
    scene.start_agent()?;
    wait_state(&scene, "held")?;
    scene.rig.set_link(false)?;
    ensure!(client.ping(address, Duration::from_secs(1)).is_err(), "a held guest answers");
    scene.rig.set_link(true)?;
    daemon::vmdr(scene.rig.site(At::A), &["release", &name])?;
    let now = client.ping(address, ANSWER)?;
    client.wait_tick(address, now.tick + 5, ANSWER)?;
    scene.wait_durable_epoch(epoch + 2)?;
    goes_on_elsewhere(&mut scene)?;
    scene.rig.finish()
}
