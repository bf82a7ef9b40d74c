//! The cold tier with a real guest: protected, exported, the receiver killed within an export, the site lost, the receiver's
//! state lost too; a fresh receiver imports the guest from the bucket and activates it, and it passes its own check.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, PROGRESS_SECONDS_MAX, Scene};
use vmdr_tests::wait::wait_for;

const BUCKET: &str = "/var/lib/vmdr/bucket";
const STATE: &str = "/var/lib/vmdr/receiver";
const KEY: &str = "/etc/vmdr/cold.key";
/// The guest's kernel has this in its memory.
const PATTERN: &[u8] = b"Linux version ";
/// So that an export takes seconds, and can be interrupted.
const BYTES_PER_SECOND: u64 = 12_000_000;

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn chunks(scene: &Scene) -> usize {
    let all = files(&scene.rig.site(At::B).path(BUCKET));
    all.iter()
        .filter(|path| path.to_string_lossy().contains("/chunks/") && !path.to_string_lossy().contains('#'))
        .count()
}

/// Whether a file has these bytes.
fn has(path: &Path, pattern: &[u8]) -> Result<bool> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(bytes.windows(pattern.len()).any(|window| window == pattern))
}

fn write_key(scene: &Scene, name: &str, key: &str) -> Result<()> {
    let path = scene.rig.site(At::B).path(name);
    fs::write(&path, key).context("write the key")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("protect the key")
}

fn export(scene: &Scene) -> Result<Value> {
    let report = daemon::vmdr_json(scene.rig.site(At::B), &["export", &scene.guest.name])?;
    println!(
        "export {}: read {} of {}, sent {} bytes in {} chunks, {:.1} s, on {}",
        report["point"],
        report["read_bytes"],
        report["total_bytes"],
        report["sent_bytes"],
        report["sent_chunks"],
        report["seconds"].as_f64().unwrap_or(0.0),
        report["base"]
    );
    Ok(report)
}

#[test]
fn a_fresh_receiver_runs_a_guest_from_nothing_but_the_bucket() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 40 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("cold", guest)?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    write_key(&scene, KEY, "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a\n")?;
    write_key(&scene, "/etc/vmdr/other.key", "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n")?;
    scene.configure_receiver(&format!(
        "[cold]\nurl = \"file://{BUCKET}\"\nkey_file = \"{KEY}\"\nbytes_per_second = {BYTES_PER_SECOND}\n"
    ));
    scene.start_receiver()?;
    scene.protect(&["--interval", "100ms"])?;
    let begun = client.ping(address, ANSWER)?;
    scene.wait_durable()?;

    // The receiver is killed within an export: nothing is offered, and what was sent is not sent again.
    let site = scene.rig.site(At::B);
    let broken = std::thread::scope(|scope| {
        let exporting = scope.spawn(|| daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["export", &name]));
        wait_for("some chunks in the bucket", ANSWER, || Ok((chunks(&scene) >= 6).then_some(())))?;
        exec_kill(scene.receiver.as_ref().context("a receiver")?.pid())?;
        exporting.join().map_err(|_| anyhow::anyhow!("the export's thread panicked"))?
    })?;
    assert!(!broken.status.success(), "an export ended well without its receiver");
    let there = chunks(&scene);
    scene.start_receiver()?;
    let listed = daemon::vmdr_json(scene.rig.site(At::B), &["import", "--list"])?;
    assert_eq!(listed["domains"][0]["points"].as_array().map(Vec::len), Some(0), "{listed}");
    scene.wait_durable()?;
    let whole = export(&scene)?;
    let sent = whole["sent_chunks"].as_u64().context("sent_chunks")? as usize;
    let all = chunks(&scene);
    println!("{there} chunks were there when the receiver was killed, {sent} were sent then, {all} are there");
    assert!(sent < all && all <= there + sent, "what was there was sent again");

    // The second sends what changed, and reads little more.
    std::thread::sleep(Duration::from_secs(1));
    scene.wait_durable()?;
    let next = export(&scene)?;
    let bytes = |report: &Value, key: &str| report[key].as_u64().with_context(|| format!("{key} in {report}"));
    assert_eq!(next["base"], whole["point"], "{next}");
    assert!(bytes(&next, "read_bytes")? < bytes(&whole, "read_bytes")?, "{next}");
    assert!(bytes(&next, "sent_bytes")? < bytes(&whole, "sent_bytes")?, "{next}");
    let status = scene.status(At::B)?;
    assert_eq!(status["exported"]["point"], next["point"], "{status}");
    let seen = client.ping(address, ANSWER)?;

    // Without the key nothing of the guest can be read from the bucket.
    let state = scene.rig.site(At::B).path(STATE);
    let images = files(&state);
    let mut readable = false;
    for image in images.iter().filter(|path| path.extension().is_some_and(|extension| extension == "img")) {
        readable |= has(image, PATTERN)?;
    }
    assert!(readable, "the pattern is in the guest's memory");
    let bucket = scene.rig.site(At::B).path(BUCKET);
    for path in files(&bucket) {
        for pattern in [PATTERN, name.as_bytes(), b"<domain"] {
            assert!(!has(&path, pattern)?, "{} has {:?}", path.display(), String::from_utf8_lossy(pattern));
        }
    }

    // Site A is lost, and all that the receiver knew.
    scene.lose_site_a()?;
    scene.receiver.as_mut().context("a receiver")?.terminate()?;
    fs::remove_dir_all(&state).context("remove the receiver's state")?;
    scene.start_receiver()?;
    let site = scene.rig.site(At::B);
    let gone = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["points", &name])?;
    assert_eq!(gone.status.code(), Some(4), "{gone:?}");

    let url = format!("file://{BUCKET}");
    let words = ["import", "--from", &url, "--key-file", "/etc/vmdr/other.key", &name];
    let refused = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("sealed under key"), "{said}");
    let point = next["point"].as_str().context("a point")?;
    let listed = daemon::vmdr_json(site, &["import", "--from", &url, "--key-file", KEY, "--list", &name])?;
    assert_eq!(listed["domains"][0]["points"].as_array().map(Vec::len), Some(2), "{listed}");
    let imported = daemon::vmdr_json(site, &["import", "--from", &url, "--key-file", KEY, &name, "--point", point])?;
    println!("import: {} bytes of chunks in {} s", imported["read_bytes"], imported["seconds"]);
    let points = daemon::vmdr_json(site, &["points", &name])?;
    assert_eq!((&points["points"][0]["id"], &points["points"][0]["cut"]), (&next["point"], &next["cut"]), "{points}");
    let again = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["import", &name])?;
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.code() == Some(1) && said.contains("vmdr forget"), "{said}");

    let report = scene.activate()?;
    assert_eq!(report["point"]["id"], next["point"], "{report}");
    let after = client.ping(address, ANSWER)?;
    ensure!(after.boot == begun.boot, "the guest was booted, not resumed");
    // Cut before the ping that followed the export, and after the first.
    ensure!(begun.tick <= after.tick && after.tick <= seen.tick + 400, "tick {} after {}", after.tick, seen.tick);
    client.self_check(address).context("RAM and disk out of the bucket")?;
    let on = client.wait_tick(address, after.tick + 20, ANSWER)?;
    ensure!(on.acknowledged > after.acknowledged, "it does not write its disk");
    client.self_check(address).context("RAM and disk after going on")?;
    scene.rig.finish()
}

/// SIGKILL for the receiver; its end is waited for when it is started again.
fn exec_kill(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("a process id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).context("kill the receiver")
}
