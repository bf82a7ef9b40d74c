//! A bit flips in the standby's copy of a disk: it is found, told, kept from being activated, and mended by the agent.
//!
//! The second disk has data that the guest never touches, so that nothing but a repair can bring back what was there.

use anyhow::{Context, Result, ensure};
use rand::RngCore;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// Comparing a whole guest, while others use the machine.
const MEND_LIMIT: Duration = Duration::from_secs(180);
/// How long a verification of a small guest may take.
const VERIFY_SECONDS_MAX: u64 = 180;
/// Data on the second disk that nobody changes.
const COLD_BYTES: usize = 8 << 20;
/// Where in it a bit flips.
const FLIPPED: u64 = (4 << 20) + 12_345;

/// `vmdr verify` to its end: the exit code and what it found.
fn verify(scene: &Scene, words: &[&str]) -> Result<(Option<i32>, Value)> {
    let words = [&["verify", scene.guest.name.as_str(), "--wait", "-o", "json"], words].concat();
    let output = daemon::vmdr_output(scene.rig.site(At::B), VERIFY_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let document = serde_json::from_slice(&output.stdout).with_context(|| format!("what verify found: {said}"))?;
    Ok((output.status.code(), document))
}

fn image(scene: &Scene) -> Result<PathBuf> {
    let standby = scene.rig.site(At::B).path("/var/lib/vmdr/receiver").join(scene.guest.uuid());
    let target = format!("disk/{}.raw", scene.guest.disk_target(1));
    let images = std::fs::read_dir(&standby)?.flatten().map(|entry| entry.path().join(&target));
    images.into_iter().find(|image| image.exists()).context("the standby's second disk")
}

fn byte(path: &PathBuf) -> Result<u8> {
    let mut byte = [0];
    File::open(path)?.read_exact_at(&mut byte, FLIPPED)?;
    Ok(byte[0])
}

#[test]
fn a_flipped_bit_is_found_and_mended() -> Result<()> {
    let mut guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 50 --interval-ms 100");
    guest.disks_mib = vec![64, 16];
    let mut scene = Scene::new("verify", guest)?;
    let name = scene.guest.name.clone();
    let target = scene.guest.disk_target(1);
    let mut cold = vec![0; COLD_BYTES];
    random::generator("cold data").fill_bytes(&mut cold);
    let disk = File::options().write(true).open(scene.rig.site(At::A).path(scene.guest.disk_path(1)))?;
    disk.write_all_at(&cold, 0)?;
    disk.sync_all()?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;

    let (code, found) = verify(&scene, &["--all"])?;
    ensure!(code == Some(0) && found["ended"] == true, "a standby that is in order: {found}");
    ensure!(found["sound"].as_array().is_some_and(|sound| !sound.is_empty()), "{found}");
    let points = daemon::vmdr_json(scene.rig.site(At::B), &["points", &name])?;
    let verified = points["points"].as_array().context("points")?.iter().any(|point| point["verified"].is_string());
    ensure!(verified, "no point was verified: {points}");

    // Without the agent, which would mend it at once.
    scene.rig.set_link(false)?;
    let image = image(&scene)?;
    let right = byte(&image)?;
    ensure!(right == cold[FLIPPED as usize], "the cold data is not in the standby");
    File::options().write(true).open(&image)?.write_all_at(&[right ^ 4], FLIPPED)?;
    let (code, found) = verify(&scene, &[])?;
    ensure!(code == Some(1), "not found: {found}");
    let damage = found["damage"][0].as_str().unwrap_or_default();
    let offset = FLIPPED / 4096 * 4096;
    ensure!(damage.contains(&target) && damage.contains(&format!("offset {offset}")), "not named: {found}");
    let status = scene.status(At::B)?;
    ensure!(status["damaged_points"].as_u64().is_some_and(|points| points > 0), "{status}");
    ensure!(status["damage"].as_str().is_some_and(|damage| damage.contains(&target)), "{status}");
    let points = daemon::vmdr_json(scene.rig.site(At::B), &["points", &name])?;
    ensure!(points["points"][0]["newest"] == true && points["points"][0]["damaged"] == true, "{points}");
    // Also after a restart.
    scene.start_receiver()?;
    let status = scene.status(At::B)?;
    ensure!(status["damage"].as_str().is_some_and(|damage| damage.contains(&target)), "forgotten: {status}");
    let words = ["activate", &name, "--dry-run"];
    let refused = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && said.contains("damaged"), "not refused: {said}");
    let words = ["activate", &name, "--dry-run", "--damaged"];
    let forced = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    ensure!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));

    // The agent compares everything with the standby and sends what is damaged again.
    scene.rig.set_link(true)?;
    wait_for("the damage to be mended", MEND_LIMIT, || {
        let status = scene.status(At::B)?;
        Ok(status["damage"].is_null().then_some(()))
    })
    .with_context(|| format!("the receiver says {:?}, the agent {:?}", scene.status(At::B), scene.status(At::A)))?;
    scene.wait_protected(MEND_LIMIT)?;
    scene.wait_durable()?;
    ensure!(byte(&image)? == right, "it is not what it was");
    let (code, found) = verify(&scene, &[])?;
    ensure!(code == Some(0), "still damaged: {found}");
    scene.compare_held()?;
    let client = scene.rig.client().clone();
    let last = client.ping(scene.guest.address, ANSWER)?;
    scene.wait_durable()?;
    scene.lose_site_a()?;

    // What lies there says the same without the receiver.
    scene.receiver.as_mut().context("a receiver")?.terminate()?;
    let site = scene.rig.site(At::B);
    let words = ["inspect", "/var/lib/vmdr/receiver", "--json"];
    let output = daemon::vmdr_output(site, VERIFY_SECONDS_MAX, &words)?;
    let document: Value = serde_json::from_slice(&output.stdout).context("what inspect says")?;
    let newest = &document["domains"][0]["points"][0];
    ensure!(
        newest["soundness"] == "sound",
        "the newest point is not sound: {newest} {}",
        document["domains"][0]["damage"]
    );
    scene.start_receiver()?;
    scene.activate()?;
    let pong = client.ping(scene.guest.address, ANSWER)?;
    ensure!(pong.boot == last.boot && pong.tick >= last.tick, "resumed, not booted: {pong:?} after {last:?}");
    client.self_check(scene.guest.address).context("RAM and disk after the repair")?;
    scene.rig.finish()
}
