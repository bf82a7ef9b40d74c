//! Alarms at the backup site, with real daemons and a guest: none where nothing is to be heard on purpose, one where a site is lost,
//! which ends when the guest runs here.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

const BOUND: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(120);

fn alarm(scene: &Scene) -> Result<Option<String>> {
    Ok(scene.status(At::B)?["silent"].as_str().map(str::to_owned))
}

/// No alarm for longer than the bound, seen every 100 ms.
fn quiet(scene: &Scene, when: &str) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < BOUND + Duration::from_secs(3) {
        let raised = alarm(scene)?;
        ensure!(raised.is_none(), "{when}: {raised:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_lost_site_is_an_alarm_and_a_guest_that_was_suspended_or_shut_off_is_none() -> Result<()> {
    let workload = "--ram-mib 24 --pages 100 --interval-ms 50 --record-bytes 65536 --records 64 --readers 1";
    let mut scene = Scene::new("alarm", GuestSpec::linux("web1").memory(128).workload(workload))?;
    scene.configure_receiver(&format!("[alarm]\nafter_seconds = {}\n", BOUND.as_secs()));
    scene.start_receiver()?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    client.ping(address, ANSWER)?;
    scene.protect(&[])?;
    quiet(&scene, "protected")?;

    daemon::vmdr(scene.rig.site(At::A), &["suspend", "web1"])?;
    quiet(&scene, "suspended")?;
    scene.start_receiver()?;
    quiet(&scene, "suspended, the receiver was started anew")?;
    daemon::vmdr(scene.rig.site(At::A), &["resume", "web1"])?;
    scene.wait_protected(LIMIT)?;
    quiet(&scene, "resumed")?;

    // Somebody shuts it off, while the receiver is away: it is told when it is back.
    scene.receiver = None;
    let site = scene.rig.site(At::A);
    site.virsh(&["destroy", "web1"])?;
    wait_for("the guest to be off", LIMIT, || Ok((scene.status(At::A)?["state"] == "shut off").then_some(())))?;
    scene.start_receiver()?;
    wait_for("the receiver to be told", LIMIT, || {
        let advice = scene.status(At::B)?["advice"].as_str().unwrap_or_default().to_owned();
        Ok(advice.contains("does not run, it was destroyed").then_some(()))
    })?;
    wait_for("no alarm", LIMIT, || Ok(alarm(&scene)?.is_none().then_some(())))?;
    quiet(&scene, "shut off")?;
    scene.rig.site(At::A).virsh(&["start", "web1"])?;
    scene.wait_protected(LIMIT)?;
    let boot = client.ping(address, ANSWER)?.boot;
    quiet(&scene, "started again")?;

    let epoch = scene.wait_durable()?;
    scene.lose_site_a()?;
    let raised = wait_for("an alarm", LIMIT, || alarm(&scene))?;
    ensure!(raised.contains("nothing was heard"), "{raised}");
    let report = scene.activate()?;
    ensure!(report["point"]["epoch"].as_u64().context("the report names the epoch")? >= epoch, "{report}");
    wait_for("the alarm to end", LIMIT, || Ok(alarm(&scene)?.is_none().then_some(())))?;
    ensure!(client.ping(address, ANSWER)?.boot == boot, "resumed, not booted");
    client.self_check(address)?;

    scene.rig.finish()
}
