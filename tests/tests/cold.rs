//! The cold tier with a real guest and an S3 server: protected, exported, the receiver killed within an export, the site lost,
//! the receiver's state lost too; a fresh receiver imports the guest from the bucket and activates it, and it passes its own
//! check. Before that, with the wrong key, with objects cut short, changed and gone, nothing becomes a standby.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmdr_test_s3::Server;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::{At, RELAY_ADDRESS};
use vmdr_tests::scene::{ANSWER, PROGRESS_SECONDS_MAX, Scene};
use vmdr_tests::wait::wait_for;
use vmdr_tests::{daemon, exec};

/// On the network between the sites.
const S3_PORT: u16 = 9000;
const URL: &str = "s3://bucket/vmdr";
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

/// The objects that are chunks.
fn chunks(server: &Server) -> Vec<PathBuf> {
    files(server.objects()).into_iter().filter(|path| path.to_string_lossy().contains("/chunks/")).collect()
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

/// Cuts a file's last byte off, and gives it.
fn cut_last(path: &Path) -> Result<u8> {
    let file = File::options().read(true).write(true).open(path).context("open a chunk")?;
    let length = file.metadata().context("look at a chunk")?.len().checked_sub(1).context("an empty chunk")?;
    let mut last = [0];
    file.read_exact_at(&mut last, length).context("read a chunk's end")?;
    file.set_len(length).context("cut a chunk short")?;
    Ok(last[0])
}

/// Makes a bit in a file's middle other; the second time it is as it was.
fn flip(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path).context("open a chunk")?;
    let middle = file.metadata().context("look at a chunk")?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).context("read a chunk")?;
    file.write_all_at(&[byte[0] ^ 1], middle).context("change a chunk")
}

/// An import that is refused, and leaves nothing; what it says.
fn refused(scene: &Scene, further: &[&str]) -> Result<String> {
    let (site, name) = (scene.rig.site(At::B), scene.guest.name.as_str());
    let words = [&["import", name], further].concat();
    let output = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{words:?} ended with {}: {said}", output.status);
    let points = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["points", name])?;
    ensure!(points.status.code() == Some(4), "{words:?} left something: {points:?}");
    Ok(said)
}

#[test]
fn a_fresh_receiver_runs_a_guest_from_nothing_but_the_bucket() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 40 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("cold", guest)?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    write_key(&scene, KEY, "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a\n")?;
    write_key(&scene, "/etc/vmdr/other.key", "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n")?;
    let directory = scene.rig.directory().join("s3");
    let server = Server::start(client.listen(SocketAddr::from((RELAY_ADDRESS, S3_PORT)))?, &directory)?;
    scene.set_receiver_environment("AWS_ACCESS_KEY_ID", vmdr_test_s3::ACCESS_KEY);
    scene.set_receiver_environment("AWS_SECRET_ACCESS_KEY", vmdr_test_s3::SECRET_KEY);
    let (endpoint, region) = (server.endpoint(), vmdr_test_s3::REGION);
    scene.configure_receiver(&format!(
        "[cold]\nurl = \"{URL}\"\nendpoint = \"{endpoint}\"\nregion = \"{region}\"\nkey_file = \"{KEY}\"\nbytes_per_second = {BYTES_PER_SECOND}\n"
    ));
    scene.start_receiver()?;
    scene.protect(&["--interval", "100ms"])?;
    let begun = client.ping(address, ANSWER)?;
    scene.wait_durable()?;

    // The receiver is killed within an export: nothing is offered, and what was sent is not sent again.
    let site = scene.rig.site(At::B);
    let broken = std::thread::scope(|scope| {
        let exporting = scope.spawn(|| daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["export", &name]));
        wait_for("some chunks in the bucket", ANSWER, || Ok((chunks(&server).len() >= 6).then_some(())))?;
        exec::signal(scene.receiver.as_ref().context("a receiver")?.pid(), Signal::KILL)?;
        exporting.join().map_err(|_| anyhow::anyhow!("the export's thread panicked"))?
    })?;
    assert!(!broken.status.success(), "an export ended well without its receiver");
    let there = chunks(&server).len();
    scene.start_receiver()?;
    let listed = daemon::vmdr_json(scene.rig.site(At::B), &["import", "--list"])?;
    assert_eq!(listed["domains"][0]["points"].as_array().map(Vec::len), Some(0), "{listed}");
    scene.wait_durable()?;
    let whole = export(&scene)?;
    let sent = whole["sent_chunks"].as_u64().context("sent_chunks")? as usize;
    let all = chunks(&server).len();
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

    // Without the key nothing of the guest can be read from the bucket.
    let state = scene.rig.site(At::B).path(STATE);
    let images = files(&state);
    let mut readable = false;
    for image in images.iter().filter(|path| path.extension().is_some_and(|extension| extension == "img")) {
        readable |= has(image, PATTERN)?;
    }
    assert!(readable, "the pattern is in the guest's memory");
    for path in files(server.objects()) {
        for pattern in [PATTERN, format!("<name>{name}").as_bytes(), b"<domain", b"\"domain\""] {
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

    // The wrong key; every chunk one byte too short; every chunk gone; one bit of each other.
    assert!(refused(&scene, &["--key-file", "/etc/vmdr/other.key"])?.contains("sealed under key"));
    let lasts = chunks(&server).iter().map(|path| cut_last(path)).collect::<Result<Vec<u8>>>()?;
    let said = refused(&scene, &[])?;
    assert!(said.contains("chunks/") && said.contains("damaged"), "{said}");
    for (path, last) in chunks(&server).iter().zip(lasts) {
        let file = File::options().write(true).open(path).context("open a chunk")?;
        file.write_all_at(&[last], file.metadata()?.len()).context("bring a chunk's last byte back")?;
    }
    let there = server.objects().join("vmdr").join(scene.guest.uuid()).join("chunks");
    let aside = directory.join("aside");
    fs::rename(&there, &aside).context("take the chunks away")?;
    assert!(refused(&scene, &[])?.contains("missing"));
    fs::rename(&aside, &there).context("bring the chunks back")?;
    for path in chunks(&server) {
        flip(&path)?;
    }
    let said = refused(&scene, &[])?;
    assert!(said.contains("chunks/") && said.contains("does not open"), "{said}");
    for path in chunks(&server) {
        flip(&path)?;
    }

    let point = next["point"].as_str().context("a point")?;
    let listed = daemon::vmdr_json(site, &["import", "--from", URL, "--key-file", KEY, "--list", &name])?;
    assert_eq!(listed["domains"][0]["points"].as_array().map(Vec::len), Some(2), "{listed}");
    let imported = daemon::vmdr_json(site, &["import", "--from", URL, "--key-file", KEY, &name, "--point", point])?;
    println!("import: {} bytes of chunks in {} s", imported["read_bytes"], imported["seconds"]);
    let points = daemon::vmdr_json(site, &["points", &name])?;
    assert_eq!((&points["points"][0]["id"], &points["points"][0]["cut"]), (&next["point"], &next["cut"]), "{points}");
    let again = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["import", &name])?;
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.code() == Some(1) && said.contains("vmdr forget"), "{said}");

    let report = scene.activate()?;
    assert_eq!(report["point"]["id"], next["point"], "{report}");
    scene.check_resumed(&begun)?;
    scene.rig.finish()
}
