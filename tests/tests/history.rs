//! Back to older points: a guest under load, cuts whose memory and disk an independent reading has hashed, and activations at
//! points before the newest.
//!
//! At each recorded cut the guest is held, QEMU's memory is read through /proc/PID/mem and the disk's file from where it lies.
//! When site A is lost, the receiver's state directory is read without the receiver: each recorded point must have those bytes.
//! Then the guest is activated at points of the past, one after another; each must pass the guest's own check of its RAM
//! against its disk. What is given up with an older point is not lost: the newest is activated last.

use anyhow::{Context, Result, bail};
use rand::Rng;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use vmdr_receiver::store::{Array, PointReader, Store, StoreOptions};
use vmdr_tests::client::Pong;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, Scene};
use vmdr_tests::{oracle, random};
use xxhash_rust::xxh3::xxh3_128;

/// What history may take up.
const BUDGET_BYTES: u64 = 1 << 30;
/// Three tiers: every epoch, then fewer, then fewer still.
const TIERS: [&str; 3] = ["epoch:5s", "2s:20s", "10s:1h"];

/// What was read of the guest at a cut.
struct Recorded {
    epoch: u64,
    blocks: BTreeMap<String, u128>,
    disk: u128,
    before: Pong,
    after: Option<Pong>,
}

/// Holds the guest, reads it, names the point, lets it go.
fn record(scene: &Scene, number: usize) -> Result<Recorded> {
    let (a, b, name) = (scene.rig.site(At::A), scene.rig.site(At::B), scene.guest.name.as_str());
    let client = scene.rig.client();
    let before = client.ping(scene.guest.address, ANSWER)?;
    let held = daemon::vmdr_json(a, &["hold", name])?;
    let epoch = held["epoch"].as_u64().context("hold names no epoch")?;
    let mut blocks = BTreeMap::new();
    for block in oracle::ram_blocks(a, &scene.guest)? {
        blocks.insert(block.name.clone(), xxh3_128(&oracle::read_block(a, &scene.guest, &block)?));
    }
    let disk = xxh3_128(&fs::read(a.path(scene.guest.disk_path(0))).context("read the guest's disk")?);
    let named = daemon::vmdr_json(b, &["point", "create", name, "--name", &format!("cut-{number}")])?;
    if named["point"]["epoch"].as_u64() != Some(epoch) {
        bail!("epoch {epoch} was held, named was {named}");
    }
    daemon::vmdr(a, &["release", name])?;
    let after = Some(client.ping(scene.guest.address, ANSWER)?);
    Ok(Recorded { epoch, blocks, disk, before, after })
}

fn hash(reader: &PointReader, array: Array, bytes: u64) -> Result<u128> {
    let mut all = vec![0; usize::try_from(bytes).context("larger than memory")?];
    for (i, piece) in all.chunks_mut(1 << 20).enumerate() {
        reader.read(array, (i as u64) << 20, piece)?;
    }
    Ok(xxh3_128(&all))
}

/// Reads every recorded point out of the state directory and compares.
fn compare(scene: &Scene, recorded: &[Recorded]) -> Result<()> {
    let state = scene.rig.site(At::B).path("/var/lib/vmdr/receiver");
    let store = Store::open(&state, StoreOptions::default()).context("open the receiver's state directory")?;
    let uuid = scene.guest.uuid();
    let points = store.points(&uuid)?;
    for cut in recorded {
        let epoch = cut.epoch;
        let point = points.iter().find(|point| point.epoch == epoch).with_context(|| format!("no point {epoch}"))?;
        let reader = store.read_point(&uuid, Some(point.id()))?;
        let mut compared = 0;
        for (number, block) in reader.layout().ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0) {
            let expected = cut.blocks.get(&block.name).with_context(|| format!("QEMU had no {}", block.name))?;
            let found = hash(&reader, Array::Ram(number as u16), block.used_bytes)?;
            if found != *expected {
                bail!("epoch {epoch}: RAM block {} is not what it was", block.name);
            }
            compared += 1;
        }
        let disk = hash(&reader, Array::Disk(0), reader.length(Array::Disk(0)))?;
        if disk != cut.disk || compared == 0 {
            bail!("epoch {epoch}: the disk is not what it was ({compared} RAM blocks are)");
        }
    }
    Ok(())
}

/// Activates with these words; gives the report.
fn activate(scene: &Scene, words: &[&str]) -> Result<Value> {
    let words = [&["activate", scene.guest.name.as_str(), "--yes", "--wait", "-o", "json"], words].concat();
    let output = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("vmdr {} ended with {}: {} {}", words.join(" "), output.status, err.trim(), out.trim());
    }
    let document: Value = serde_json::from_str(&out).with_context(|| format!("read the report: {out}"))?;
    Ok(document["report"].clone())
}

/// Throws away what the activated guest did, as the error message of a second activation says.
fn give_up(scene: &Scene, number: usize) -> Result<()> {
    let (b, name) = (scene.rig.site(At::B), scene.guest.name.as_str());
    b.virsh(&["destroy", name])?;
    let words = ["activate", name, "--yes"];
    let refused = daemon::vmdr_output(b, ACTIVATE_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    if refused.status.success() || !said.contains("move") {
        bail!("a guest that has run was activated again: {said}");
    }
    b.virsh(&["undefine", name])?;
    let domain = b.path("/var/lib/vmdr/receiver").join(scene.guest.uuid());
    fs::rename(domain.join("active"), aside(scene, number)).context("move the activation's directory away")
}

fn aside(scene: &Scene, number: usize) -> PathBuf {
    scene.rig.site(At::B).path("/var/lib/vmdr").join(format!("given-up-{number}"))
}

#[test]
fn a_guest_goes_back_to_points_of_its_past() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 100 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("history", guest)?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    let mut random = random::generator("history");
    scene.protect(&["--interval", "100ms"])?;
    let budget = BUDGET_BYTES.to_string();
    let mut words = vec!["retention", &name, "--budget", &budget];
    TIERS.iter().for_each(|tier| words.extend(["--tier", tier]));
    let policy = daemon::vmdr_json(scene.rig.site(At::B), &words)?;
    assert_eq!(policy["tiers"].as_array().map(Vec::len), Some(3), "{policy}");

    // Under load, some seconds between the recorded cuts: in a soak ten minutes in all.
    let cuts = random::rounds(3, 20);
    let apart = Duration::from_secs(random::rounds(4, 30) as u64);
    let mut recorded = Vec::new();
    for number in 0..cuts {
        std::thread::sleep(apart);
        recorded.push(record(&scene, number)?);
        let used = scene.status_number(At::B, "history_bytes")?;
        assert!(used > 0.0 && used <= BUDGET_BYTES as f64, "{used} bytes of history");
    }
    std::thread::sleep(apart);
    scene.wait_durable()?;
    let last = client.ping(address, ANSWER)?;
    let durable = scene.wait_durable()?;
    scene.lose_site_a()?;

    scene.receiver.as_mut().context("a receiver")?.terminate()?;
    compare(&scene, &recorded)?;
    scene.start_receiver()?;

    let document = daemon::vmdr_json(scene.rig.site(At::B), &["points", &name])?;
    let points = document["points"].as_array().context("points")?.clone();
    let epochs: Vec<u64> = points.iter().filter_map(|point| point["epoch"].as_u64()).collect();
    let newest = epochs[0];
    assert!(newest >= durable && points[0]["newest"] == true, "{document}");
    assert!(epochs.len() > cuts + 10, "{} points: {document}", epochs.len());

    // A point by its name, one by its time, the rest at random.
    let rounds = random::rounds(3, 20);
    for round in 0..rounds {
        let (words, expected) = match round {
            0 => {
                let number = random.random_range(0..recorded.len());
                (["--point".to_owned(), format!("cut-{number}")], recorded[number].epoch)
            }
            1 => {
                let point = &points[random.random_range(1..points.len())];
                let epoch = point["epoch"].as_u64().context("an epoch")?;
                (["--at".to_owned(), point["cut"].as_str().context("a time")?.to_owned()], epoch)
            }
            _ => {
                let point = &points[random.random_range(1..points.len())];
                let epoch = point["epoch"].as_u64().context("an epoch")?;
                (["--point".to_owned(), point["id"].as_str().context("an id")?.to_owned()], epoch)
            }
        };
        let words = words.each_ref().map(String::as_str);
        let report = activate(&scene, &words)?;
        println!("{words:?}: {} s until it ran, given up {}", report["rto_seconds"], report["given_up"]);
        assert_eq!(report["point"]["epoch"].as_u64(), Some(expected), "{words:?}: {report}");
        assert_eq!(report["given_up"]["epochs"].as_u64(), Some(newest - expected), "{report}");
        let pong = client.ping(address, ANSWER)?;
        assert_eq!(pong.boot, last.boot, "resumed, not booted");
        client.self_check(address).with_context(|| format!("{words:?}: RAM and disk of the past"))?;
        if let Some(cut) = recorded.iter().find(|cut| cut.epoch == expected) {
            // It goes on from the cut, which lay between these two answers.
            assert!(pong.tick >= cut.before.tick, "tick {} before the cut, {} after it", cut.before.tick, pong.tick);
            assert!(cut.after.as_ref().is_some_and(|after| after.boot == pong.boot));
        }
        client.wait_tick(address, pong.tick + 10, ANSWER)?;
        client.self_check(address).with_context(|| format!("{words:?}: after going on"))?;
        give_up(&scene, round)?;
    }

    // What was given up is still there.
    let report = scene.activate()?;
    assert_eq!(report["point"]["epoch"].as_u64(), Some(newest), "{report}");
    assert!(report["given_up"].is_null(), "{report}");
    let pong = client.ping(address, ANSWER)?;
    assert!(pong.tick >= last.tick, "tick {} was durable, it went on from {}", last.tick, pong.tick);
    client.self_check(address).context("RAM and disk of the newest point")?;
    scene.rig.finish()
}
