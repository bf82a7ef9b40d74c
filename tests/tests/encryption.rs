//! Encryption at rest with a real guest: nothing of it can be read from the state directory while it is protected, after the
//! receiver was killed, and under another master key; the site is lost, it is activated, and passes its own check.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, PROGRESS_SECONDS_MAX, Scene};
use vmdr_tests::{daemon, exec};

const STATE: &str = "/var/lib/vmdr/receiver";
const CLEAR: &str = "/var/lib/vmdr/clear";
const KEY: &str = "/etc/vmdr/state.key";
const NEW_KEY: &str = "/etc/vmdr/state-2.key";
/// The guest's kernel has this in its memory.
const PATTERN: &[u8] = b"Linux version ";

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let below = |path: PathBuf| match path.is_dir() && !path.is_symlink() {
        true => files(&path),
        false => vec![path],
    };
    paths.flat_map(below).collect()
}

/// Whether a file has these bytes.
fn has(path: &Path, pattern: &[u8]) -> bool {
    // What the receiver removes meanwhile has nothing.
    fs::read(path).is_ok_and(|bytes| bytes.windows(pattern.len()).any(|window| window == pattern))
}

fn write_key(scene: &Scene, name: &str, key: &str) -> Result<()> {
    let path = scene.rig.site(At::B).path(name);
    fs::write(&path, key).context("write the key")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("protect the key")
}

/// Looks through all files of the state directory.
fn assert_closed(scene: &Scene, when: &str) -> Result<()> {
    let all = files(&scene.rig.site(At::B).path(STATE));
    ensure!(all.len() > 10, "{when}: {all:?}");
    let name = format!("<name>{}", scene.guest.name);
    for path in all {
        for pattern in [PATTERN, name.as_bytes(), b"<domain"] {
            let shown = String::from_utf8_lossy(pattern);
            ensure!(!has(&path, pattern), "{when}: {} has {shown:?}", path.display());
        }
    }
    Ok(())
}

fn restart(scene: &mut Scene, config: &str) -> Result<()> {
    exec::signal(scene.receiver.as_ref().context("a receiver")?.pid(), Signal::KILL)?;
    scene.reconfigure_receiver("[encryption]", config);
    scene.start_receiver()
}

#[test]
fn a_guest_that_is_encrypted_at_rest_is_activated_and_nothing_else_opens_it() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 40 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("encryption", guest)?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    write_key(&scene, KEY, "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a\n")?;
    write_key(&scene, NEW_KEY, "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n")?;
    let clear = scene.rig.site(At::B).path(CLEAR);
    scene.configure_receiver(&format!("[encryption]\nkey_file = \"{KEY}\"\nclear_dir = \"{CLEAR}\"\n"));
    scene.start_receiver()?;
    scene.protect(&["--interval", "100ms"])?;
    let begun = client.ping(address, ANSWER)?;
    scene.wait_durable()?;
    assert_closed(&scene, "while it is protected")?;

    // Without the key, with a wrong one, and with another one that knows the first.
    restart(&mut scene, "")?;
    let refused = daemon::vmdr_output(scene.rig.site(At::B), PROGRESS_SECONDS_MAX, &["points", &name])?;
    ensure!(!refused.status.success(), "{refused:?}");
    restart(&mut scene, &format!("[encryption]\nkey_file = \"{NEW_KEY}\"\n"))?;
    let status = daemon::vmdr_json(scene.rig.site(At::B), &["status"])?;
    ensure!(status.to_string().contains("sealed under key"), "{status}");
    let both =
        format!("[encryption]\nkey_file = \"{NEW_KEY}\"\nold_key_files = [\"{KEY}\"]\nclear_dir = \"{CLEAR}\"\n");
    restart(&mut scene, &both)?;
    scene.wait_durable()?;
    restart(&mut scene, &format!("[encryption]\nkey_file = \"{NEW_KEY}\"\nclear_dir = \"{CLEAR}\"\n"))?;
    scene.wait_durable()?;
    assert_closed(&scene, "under another key")?;

    scene.lose_site_a()?;
    // Nothing is written where something should have been mounted.
    let words = ["activate", &name, "--yes", "--wait"];
    let output = daemon::vmdr_output(scene.rig.site(At::B), PROGRESS_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("is no directory"), "{said}");
    fs::create_dir_all(&clear).context("make the directory for what is in the clear")?;
    let report = scene.activate()?;
    println!("activated in {} s", report["rto_seconds"]);
    let after = client.ping(address, ANSWER)?;
    ensure!(after.boot == begun.boot, "the guest was booted, not resumed");
    ensure!(begun.tick <= after.tick, "tick {} after {}", after.tick, begun.tick);
    client.self_check(address).context("RAM and disk as they were decrypted")?;
    let on = client.wait_tick(address, after.tick + 20, ANSWER)?;
    ensure!(on.acknowledged > after.acknowledged, "it does not write its disk");
    client.self_check(address).context("RAM and disk after going on")?;
    assert_closed(&scene, "while it runs")?;
    ensure!(files(&clear).iter().any(|path| has(path, PATTERN)), "it lies in the clear there");
    scene.rig.finish()
}
