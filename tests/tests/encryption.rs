//! Encryption at rest with a real guest: nothing of it can be read from the state directory while it is protected, after the
//! receiver was killed, and under another master key; its activation is rehearsed; the site is lost, it is activated, and passes
//! its own check; it goes home.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vmdr_tests::daemon::Program;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::pair::Pair;
use vmdr_tests::rig::{At, Rig};
use vmdr_tests::scene::{ANSWER, PROGRESS_SECONDS_MAX, Scene};
use vmdr_tests::{daemon, exec};

const STATE: &str = "/var/lib/vmdr/receiver";
const CLEAR: &str = "/var/lib/vmdr/clear";
const KEY: &str = "/etc/vmdr/state.key";
const NEW_KEY: &str = "/etc/vmdr/state-2.key";
/// A drill on a busy machine.
const DRILL_SECONDS_MAX: u64 = 240;
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

/// Which of these a file has.
fn has<'a>(path: &Path, patterns: &[&'a [u8]]) -> Option<&'a [u8]> {
    // What the receiver removes meanwhile has nothing.
    let bytes = fs::read(path).unwrap_or_default();
    patterns.iter().find(|pattern| memchr::memmem::find(&bytes, pattern).is_some()).copied()
}

fn write_key(rig: &Rig, at: At, name: &str, key: &str) -> Result<()> {
    let path = rig.site(at).path(name);
    fs::write(&path, key).context("write the key")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("protect the key")
}

/// Looks through all files of the state directory.
fn assert_closed(rig: &Rig, at: At, name: &str, when: &str) -> Result<()> {
    let all = files(&rig.site(at).path(STATE));
    ensure!(all.len() > 10, "{when}: {all:?}");
    let name = format!("<name>{name}");
    for path in all {
        let found = has(&path, &[PATTERN, name.as_bytes(), b"<domain"]).map(String::from_utf8_lossy);
        ensure!(found.is_none(), "{when}: {} has {found:?}", path.display());
    }
    Ok(())
}

fn restart(scene: &mut Scene, config: &str) -> Result<()> {
    exec::signal(scene.receiver.as_ref().context("a receiver")?.pid(), Signal::KILL)?;
    scene.reconfigure_receiver("[encryption]", config);
    scene.start_receiver()
}

/// `vmdr drill`; its report.
fn drill(scene: &Scene) -> Result<serde_json::Value> {
    let words = ["drill", scene.guest.name.as_str(), "--wait", "--run", "2s", "-o", "json"];
    let output = daemon::vmdr_output(scene.rig.site(At::B), DRILL_SECONDS_MAX, &words)?;
    let out = String::from_utf8_lossy(&output.stdout);
    let document: serde_json::Value =
        serde_json::from_str(&out).with_context(|| format!("read what {output:?} says"))?;
    Ok(document["drill"].clone())
}

#[test]
fn a_guest_that_is_encrypted_at_rest_is_activated_and_nothing_else_opens_it() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 40 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("encryption", guest)?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    let guest = name.clone();
    let closed = |scene: &Scene, when| assert_closed(&scene.rig, At::B, &guest, when);
    write_key(&scene.rig, At::B, KEY, "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a\n")?;
    write_key(&scene.rig, At::B, NEW_KEY, "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n")?;
    let clear = scene.rig.site(At::B).path(CLEAR);
    scene.configure_receiver(&format!("[encryption]\nkey_file = \"{KEY}\"\nclear_dir = \"{CLEAR}\"\n"));
    scene.start_receiver()?;
    scene.protect(&["--interval", "100ms"])?;
    let begun = client.ping(address, ANSWER)?;
    scene.wait_durable()?;
    closed(&scene, "while it is protected")?;

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
    closed(&scene, "under another key")?;
    let inspect = |words: &[&str]| {
        let words = [&["inspect", STATE][..], words].concat();
        daemon::vmdr_output(scene.rig.site(At::B), PROGRESS_SECONDS_MAX, &words)
    };
    let output = inspect(&[])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(3) && said.contains("--key-file"), "{output:?}");
    let output = inspect(&["--key-file", NEW_KEY])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("can be restored") && said.contains(&name), "{output:?}");

    // Rehearsed, in the clear where it may be, and nothing of that stays.
    let unmounted = drill(&scene)?;
    ensure!(
        unmounted["result"] == "failed" && unmounted["error"].to_string().contains("is no directory"),
        "{unmounted}"
    );
    fs::create_dir_all(&clear).context("make the directory for what is in the clear")?;
    let rehearsed = drill(&scene)?;
    println!("drill: copied in {} s, ran after {} s", rehearsed["copy_seconds"], rehearsed["rto_seconds"]);
    ensure!(rehearsed["result"] == "passed", "{rehearsed}");
    closed(&scene, "after a drill")?;
    ensure!(files(&clear).is_empty(), "a drill has left {:?}", files(&clear));
    fs::remove_dir(&clear).context("remove the directory for what is in the clear")?;

    scene.lose_site_a()?;
    // Nothing is written where something should have been mounted.
    let words = ["activate", &name, "--yes", "--wait"];
    let output = daemon::vmdr_output(scene.rig.site(At::B), PROGRESS_SECONDS_MAX, &words)?;
    // The findings are in the plan, which is shown first.
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!output.status.success() && said.contains("is no directory"), "{said}");
    fs::create_dir_all(&clear).context("make the directory for what is in the clear")?;
    let report = scene.activate()?;
    println!("activated in {} s, decrypted: {}", report["rto_seconds"], report["decrypted"]);
    ensure!(report["decrypted"]["bytes"].as_u64() > Some(16 << 20), "{report}");
    scene.check_resumed(&begun)?;
    closed(&scene, "while it runs")?;
    ensure!(files(&clear).iter().any(|path| has(path, &[PATTERN]).is_some()), "it lies in the clear there");
    scene.rig.finish()
}

/// Encrypted at both sites: protected to B, A lost, activated at B, protected to A, home again.
#[test]
fn a_guest_that_is_encrypted_at_both_sites_goes_home() -> Result<()> {
    let guest = GuestSpec::linux("web1").memory(160).workload("--ram-mib 24 --pages 20 --interval-ms 100");
    let mut pair = Pair::new("encryption-home", guest, |_, _| Ok(()))?;
    let (client, address, name) = (pair.rig.client().clone(), pair.guest.address, pair.guest.name.clone());
    let keys = [
        "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a",
        "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
    ];
    for (at, key) in At::ALL.into_iter().zip(keys) {
        write_key(&pair.rig, at, KEY, key)?;
        fs::create_dir_all(pair.rig.site(at).path(CLEAR)).context("make the directory for what is in the clear")?;
        pair.configure_receiver(at, &format!("[encryption]\nkey_file = \"{KEY}\"\nclear_dir = \"{CLEAR}\"\n"));
        pair.start(at, Program::Receiver)?;
    }
    pair.vmdr(At::A, "protect", &[])?;
    pair.wait_durable(At::A)?;
    let seen = client.ping(address, ANSWER)?;
    pair.lose(At::A)?;
    let report = pair.activate(At::B)?;
    println!("activated in {} s, decrypted: {}", report["rto_seconds"], report["decrypted"]);
    ensure!(client.ping(address, ANSWER)?.boot == seen.boot, "resumed, not booted");
    pair.check("after the activation at B")?;
    assert_closed(&pair.rig, At::B, &name, "while it runs at B")?;

    pair.boot(At::A)?;
    pair.wait_state(At::A, "fenced")?;
    pair.vmdr(At::B, "reprotect", &[])?;
    pair.check("protected at B")?;
    pair.wait_durable(At::B)?;
    assert_closed(&pair.rig, At::A, &name, "while it is protected to A")?;
    let moved = pair.vmdr(At::B, "failback", &[])?;
    println!("failback, downtime {} s", moved["downtime_seconds"]);
    pair.check("at home")?;
    pair.wait_state(At::A, "protected")?;
    pair.wait_durable(At::A)?;
    assert_closed(&pair.rig, At::B, &name, "while it is protected to B again")?;
    pair.rig.finish()
}
