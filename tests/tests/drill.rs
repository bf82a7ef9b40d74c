//! Drills beside replication: a loaded guest is protected, its activation is rehearsed again and again at the backup site, and
//! nothing of that is to be noticed anywhere else.
//!
//! Each copy is asked by commands that run beside it, in a network with nothing else in it: it has to take a connection, and to
//! find its own RAM and disk in agreement. Meanwhile the production networks of both sites are listened to, the age of the
//! newest recovery point is watched, and what is there at the backup site is counted before and after.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::leftovers::Inventory;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::sniff::Sniffer;
use vmdr_tests::wait::wait_for;

/// A drill on a busy machine.
const DRILL_SECONDS_MAX: u64 = 240;
/// How long what is being removed may take.
const GONE_MAX: Duration = Duration::from_secs(60);
/// Between two looks at the age of the newest recovery point.
const LOOK: Duration = Duration::from_millis(150);
/// How much older than usual the newest recovery point may be during drills. On two cores an emulated guest, its copy and
/// whatever else runs there share the processors: what is to be found is a drill that holds replication up.
const NOISE_FACTOR: f64 = 4.0;
/// The same in seconds, for a usual age that is very small.
const NOISE_SECONDS: f64 = 1.0;
/// Of the guest at 10.78.0.10.
const STATION: [u8; 6] = [0x52, 0x54, 0x00, 0x4e, 0x00, 0x0a];

/// Has the workload compare its RAM with its disk. A datagram is read at once or not at all.
const SELF_CHECK: &str = "cmd:bash -c 'exec 3<>/dev/udp/$VMDR_DRILL_ADDRESS/7000; printf \"check t1 \" >&3; \
    said=$(timeout 55 dd bs=4096 count=1 <&3 2>/dev/null); echo \"$said\"; [[ $said == *\" ok \"* ]]'";
/// What the production network has is not there: its client at the other end of the guests' network.
const ALONE: &str = "cmd:! timeout 3 bash -c 'exec 3<>/dev/tcp/10.77.0.1/22; exec 3<>/dev/tcp/10.78.0.1/22'";

fn guest() -> GuestSpec {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 100 --interval-ms 50 --readers 1").tools();
    GuestSpec { disks_mib: vec![64, 8], ..guest }
}

/// `vmdr drill` with these further words; its document.
fn drill(scene: &Scene, words: &[&str]) -> Result<Value> {
    let words = [&["drill", scene.guest.name.as_str(), "-o", "json"], words].concat();
    let output = daemon::vmdr_output(scene.rig.site(At::B), DRILL_SECONDS_MAX, &words)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("vmdr {} ended with {}: {} {}", words.join(" "), output.status, err.trim(), out.trim());
    }
    serde_json::from_str(&out).with_context(|| format!("read the document: {out}"))
}

/// Refused, with this among the reasons.
fn refused(scene: &Scene, words: &[&str], what: &str) -> Result<()> {
    let words = [&["drill", scene.guest.name.as_str()], words].concat();
    let output = daemon::vmdr_output(scene.rig.site(At::B), DRILL_SECONDS_MAX, &words)?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.contains(what), "vmdr {}: {err}", words.join(" "));
    Ok(())
}

/// What there is of drills at site B: domains, devices, files.
fn remains(scene: &Scene) -> Result<Vec<String>> {
    let site = scene.rig.site(At::B);
    let mut found: Vec<String> = site
        .virsh(&["list", "--all", "--name"])?
        .lines()
        .filter(|l| l.contains("-drill-"))
        .map(str::to_owned)
        .collect();
    let devices = site.run("ip", &["-o", "link"])?;
    found.extend(devices.lines().filter(|line| line.contains("vmdr-d")).map(str::to_owned));
    for place in ["/var/lib/libvirt", "/run/libvirt", "/var/log/libvirt", "/var/lib/vmdr"] {
        let files =
            site.run("find", &[place, "-path", "*drill*", "-not", "-name", "drill", "-not", "-name", "drills.json"])?;
        found.extend(files.lines().map(str::to_owned));
    }
    Ok(found)
}

fn wait_gone(scene: &Scene) -> Result<()> {
    let mut last = Vec::new();
    let gone = wait_for("everything of the drill to be gone", GONE_MAX, || {
        last = remains(scene)?;
        Ok(last.is_empty().then_some(()))
    });
    gone.with_context(|| format!("{last:?}"))
}

/// What is at site B now and was not before.
fn left_at_b(scene: &Scene, before: &Inventory) -> Result<()> {
    let mut last = Vec::new();
    // Processes that libvirtd runs for a moment are seen too.
    let same = wait_for("site B to be as it was", GONE_MAX, || {
        last = Inventory::take(&scene.rig, &scene.guest)?.beyond(before);
        last.retain(|thing| thing.starts_with("site B"));
        Ok(last.is_empty().then_some(()))
    });
    same.with_context(|| format!("{last:?}"))
}

/// Ages of the newest recovery point, one after another, while `during` is true or for a time.
fn ages(scene: &Scene, go_on: &dyn Fn() -> bool) -> Result<Vec<f64>> {
    let mut ages = Vec::new();
    while go_on() {
        ages.push(scene.status_number(At::A, "rpo_seconds")?);
        std::thread::sleep(LOOK);
    }
    ages.sort_by(f64::total_cmp);
    Ok(ages)
}

/// The median, and the age that nine in ten are below.
fn typical(ages: &[f64]) -> Result<(f64, f64)> {
    ensure!(ages.len() >= 10, "{} looks are too few", ages.len());
    Ok((ages[ages.len() / 2], ages[ages.len() * 9 / 10]))
}

fn untouched_disk(scene: &Scene) -> Result<String> {
    let path = scene.rig.site(At::A).path(scene.guest.disk_path(1));
    let sum = exec::run(exec::limited(60, "sha256sum").arg(path))?;
    Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
}

fn standby_disk(scene: &Scene) -> Result<String> {
    let find = format!("sha256sum /var/lib/vmdr/receiver/{}/standby.*/disk/vdb.raw", scene.guest.uuid());
    let sum = scene.rig.site(At::B).run("sh", &["-c", &find])?;
    Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
}

fn check<'a>(drill: &'a Value, name: &str) -> Result<&'a Value> {
    let mut checks = drill["checks"].as_array().context("checks")?.iter();
    checks
        .find(|check| check["check"].as_str().is_some_and(|of| of.starts_with(name)))
        .with_context(|| format!("no check {name} in {drill}"))
}

#[test]
fn drills_are_not_noticed() -> Result<()> {
    let mut scene = Scene::new("drill", guest())?;
    // The copy gives way to everything else: on a machine that is busy its self-check takes long.
    scene.configure_receiver("[drill]\ncheck_seconds = 60\n");
    scene.start_receiver()?;
    let (address, name) = (scene.guest.address, scene.guest.name.clone());
    let client = scene.rig.client().clone();
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let pid = |at: At| Ok::<_, anyhow::Error>(scene.rig.site(at).namespace()?.pid1());
    let at_a = Sniffer::start(pid(At::A)?, "guest0", STATION)?;
    let at_b = Sniffer::start(pid(At::B)?, "guest0", STATION)?;
    let first = client.ping(address, ANSWER)?;
    let (disk, standby) = (untouched_disk(&scene)?, standby_disk(&scene)?);
    assert_eq!(disk, standby);
    let generation = scene.status_number(At::B, "generation")?;
    let before = Inventory::take(&scene.rig, &scene.guest)?;
    wait_gone(&scene)?;

    let begun = Instant::now();
    let usual = ages(&scene, &|| begun.elapsed() < Duration::from_secs(10))?;

    let drills = random::rounds(3, 20);
    let ended = Arc::new(AtomicBool::new(false));
    let during = std::thread::scope(|threads| {
        let watcher = threads.spawn(|| ages(&scene, &|| !ended.load(SeqCst)));
        let rehearsed = (0..drills).try_for_each(|number| {
            let document = drill(&scene, &["--wait", "--check", "tcp:7001", "--check", SELF_CHECK, "--check", ALONE])?;
            let report = &document["drill"];
            println!(
                "drill {number}: RTO {} s, copied in {} s: {} bytes written, {} shared",
                report["rto_seconds"], report["copy_seconds"], report["copied_bytes"], report["shared_bytes"]
            );
            assert_eq!(report["result"], "passed", "{document}");
            for check_name in ["runs", "heartbeat", "tcp:7001", "cmd:bash", "cmd:!"] {
                assert_eq!(check(report, check_name)?["passed"], true, "{document}");
            }
            let status = scene.status(At::B)?;
            assert_eq!(
                (&status["drill"]["id"], &status["drill"]["result"]),
                (&report["id"], &"passed".into()),
                "{status}"
            );
            client.ping(address, ANSWER).map(drop)
        });
        ended.store(true, SeqCst);
        rehearsed?;
        watcher.join().unwrap_or_else(|_| bail!("the watcher panicked"))
    })?;
    let ((usual_median, usual_most), (median, most)) = (typical(&usual)?, typical(&during)?);
    println!(
        "RPO: usually {usual_median:.3} s (9 of 10 below {usual_most:.3} s), during drills {median:.3} s ({most:.3} s)"
    );
    assert!(most <= usual_most * NOISE_FACTOR + NOISE_SECONDS, "replication was held up");

    wait_gone(&scene)?;
    left_at_b(&scene, &before)?;
    assert_eq!(scene.status_number(At::B, "generation")?, generation, "a drill changes no owner");
    assert_eq!((untouched_disk(&scene)?, standby_disk(&scene)?), (disk, standby));
    let now = client.ping(address, ANSWER)?;
    assert!(now.boot == first.boot && now.tick > first.tick);
    client.self_check(address).context("the guest in production")?;
    scene.compare_held()?;
    let (a, b) = (at_a.count(), at_b.count());
    println!("frames of the guest's address at site A {a:?}, at site B {b:?}");
    assert!(a.of_it_out > 0 && a.of_it_in == 0, "only production has this address at site A: {a:?}");
    assert!(b.all > 0 && b.of_it_out == 0, "the copy was heard at site B: {b:?}");

    // A check that fails is a drill that fails.
    let words = ["drill", &name, "--wait", "-o", "json", "--check", "cmd:exit 7"];
    let failing = daemon::vmdr_output(scene.rig.site(At::B), DRILL_SECONDS_MAX, &words)?;
    let document: Value = serde_json::from_slice(&failing.stdout).context("the document of a drill that fails")?;
    assert_eq!((failing.status.code(), &document["drill"]["result"]), (Some(1), &"failed".into()), "{document}");
    wait_gone(&scene)?;

    // SIGKILL in the middle: what is left is found and removed, and replication goes on.
    let begun = drill(&scene, &["--run", "10m"])?;
    assert_eq!(begun["drill"]["result"], "under way", "{begun}");
    let id = begun["drill"]["id"].as_str().context("an id")?.to_owned();
    wait_for("the copy to run", Duration::from_secs(DRILL_SECONDS_MAX), || {
        let listed = scene.rig.site(At::B).virsh(&["list", "--name"])?;
        Ok(listed.contains(&format!("{name}-drill-{id}")).then_some(()))
    })?;
    refused(&scene, &["--wait"], "--end")?;
    scene.receiver.as_mut().context("a receiver")?.kill()?;
    assert!(!remains(&scene)?.is_empty(), "nothing was there to be removed");
    scene.start_receiver()?;
    wait_gone(&scene)?;
    let status = scene.status(At::B)?;
    assert_eq!((&status["drill"]["id"], &status["drill"]["result"]), (&Value::from(id), &"ended".into()), "{status}");
    scene.wait_durable()?;
    client.self_check(address).context("the guest in production, after the receiver was killed")?;

    // One that is kept is ended by hand...
    let kept = drill(&scene, &["--keep", "--wait", "--check", SELF_CHECK])?;
    assert_eq!((&kept["drill"]["result"], &kept["drill"]["kept"]), (&"passed".into(), &true.into()), "{kept}");
    refused(&scene, &["--wait"], "is kept")?;
    scene.wait_durable()?;
    drill(&scene, &["--end"])?;
    wait_gone(&scene)?;
    left_at_b(&scene, &before)?;

    // ...or by an activation, which goes first.
    drill(&scene, &["--keep", "--wait"])?;
    let last = client.ping(address, ANSWER)?;
    scene.wait_durable()?;
    scene.lose_site_a()?;
    let report = scene.activate()?;
    println!("activated beside a kept drill: {} s", report["rto_seconds"]);
    wait_gone(&scene)?;
    let pong = client.ping(address, ANSWER)?;
    assert!(pong.boot == last.boot && pong.tick >= last.tick, "{pong:?} after {last:?}");
    client.self_check(address).context("the guest that was activated")?;
    assert!(at_b.count().of_it_out > 0, "what would have been heard of a copy is heard of the guest");
    refused(&scene, &["--wait"], "was activated here")?;
    scene.rig.finish()
}

/// A file system with reflinks, on a loop device, under the receiver.
fn xfs(scene: &mut Scene) -> Result<()> {
    scene.receiver.as_mut().context("a receiver")?.terminate()?;
    let site = scene.rig.site(At::B);
    let image = site.path(Path::new("/var/lib/vmdr/state.xfs"));
    std::fs::File::create(&image).and_then(|file| file.set_len(2 << 30)).context("make a file for the file system")?;
    exec::run(exec::limited(60, "mkfs.xfs").arg("-q").arg(&image))?;
    site.run("mkdir", &["-p", "/var/lib/vmdr/receiver"])?;
    // Seen in the site only, and gone with it, the loop device too.
    site.run("mount", &["-o", "loop", "/var/lib/vmdr/state.xfs", "/var/lib/vmdr/receiver"])?;
    scene.start_receiver()
}

#[test]
fn with_reflinks_next_to_nothing_is_copied_and_drills_come_by_themselves() -> Result<()> {
    // Little is written, so that replication has room where a drill has none.
    let light = "--ram-mib 32 --pages 20 --interval-ms 300 --readers 1";
    let mut scene = Scene::new("drill-xfs", guest().workload(light))?;
    scene.configure_receiver("[drill]\nrun_seconds = 2\ncheck_seconds = 60\n");
    xfs(&mut scene)?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    // The newest point, which goes on being written over, and an older one.
    daemon::vmdr(scene.rig.site(At::B), &["point", "create", &scene.guest.name, "--name", "old"])?;
    std::thread::sleep(Duration::from_secs(5));
    for words in [&[][..], &["--point", "old"]] {
        let document = drill(&scene, &[&["--wait", "--check", SELF_CHECK], words].concat())?;
        let report = &document["drill"];
        println!("{words:?}: {} bytes written, {} shared", report["copied_bytes"], report["shared_bytes"]);
        assert_eq!(report["result"], "passed", "{document}");
        let (copied, shared) = (report["copied_bytes"].as_u64(), report["shared_bytes"].as_u64());
        assert!(shared > Some(32 << 20) && copied < shared, "{document}");
        wait_gone(&scene)?;
    }
    scene.wait_durable()?;

    // On schedule, and no further than there is room.
    scene.configure_receiver("every_seconds = 1\n");
    scene.start_receiver()?;
    let by_itself = |result: &'static str| {
        wait_for("a drill on schedule", Duration::from_secs(DRILL_SECONDS_MAX), || {
            std::thread::sleep(LOOK);
            let drill = scene.status(At::B)?["drill"].clone();
            Ok((drill["scheduled"] == true && drill["result"] == result).then_some(drill))
        })
    };
    by_itself("passed")?;
    let site = scene.rig.site(At::B);
    let full = "cd /var/lib/vmdr/receiver; free=$(($(stat -f -c %a .) * $(stat -f -c %S .))); \
        fallocate -l $((free - 312 * 1024 * 1024)) ballast";
    site.run("sh", &["-c", full])?;
    let drill = by_itself("failed")?;
    assert!(drill["error"].as_str().is_some_and(|error| error.contains("kept for replication")), "{drill}");
    site.run("rm", &["/var/lib/vmdr/receiver/ballast"])?;
    by_itself("passed")?;
    scene.wait_durable()?;
    scene.rig.finish()
}
