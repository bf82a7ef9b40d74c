//! A guest's own storage that stops answering: no cut is attempted, because `stop` would wait for it, with the guest paused and
//! QEMU's monitor dead. The guest is no worse off than it is without protection, and protection goes on by itself.
//!
//! The disk is behind `qemu-nbd`, which is stopped (SIGSTOP) while threads in the guest read it without a break.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vmdr_tests::exec;
use vmdr_tests::guest::{DiskShape, GuestSpec, Store};
use vmdr_tests::oracle;
use vmdr_tests::random;
use vmdr_tests::rig::{At, Rig};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

const WORKLOAD: &str = "--ram-mib 24 --pages 100 --interval-ms 20 --record-bytes 65536 --records 128 --readers 2";
/// A cut each second: storage that stops just after one is seen by the next.
const INTERVAL: &str = "1s";
/// How often guest, monitor and status are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// The least that a hanging guest is worse off by than it was without protection, to fail.
const SPEED_MIN: f64 = 0.5;

/// Serves the disk in the site for as long as the site lives. The socket is QEMU's to open.
const SERVE: &str = r#"
set -e
setsid qemu-nbd --persistent --shared=4 --format=raw --cache=none --aio=native --export-name=disk --socket="$1" "$2" \
    </dev/null >>"$3" 2>&1 &
echo $!
n=0
until [ -S "$1" ] || [ $n -ge 100 ]; do n=$((n + 1)); sleep 0.1; done
chmod 666 "$1"
"#;

/// Starts the server of the guest's disk and gives its process.
fn serve(rig: &Rig, guest: &GuestSpec) -> Result<u32> {
    let site = rig.site(At::A);
    // Its disk has to be there; it is made anew, in place, when the guest boots.
    guest.define(site)?;
    let words = ["-c", SERVE, "serve", &guest.nbd_socket(0), &guest.disk_path(0), "/var/log/vmdr/nbd.log"];
    let printed = site.run("bash", &words)?;
    let inside = printed.trim().parse().with_context(|| format!("read a process id from {printed:?}"))?;
    site.outside_pid(inside).context("find qemu-nbd")
}

/// How the guest fared while its storage hung.
#[derive(Debug)]
struct Fared {
    ticks_per_second: f64,
    /// The longest time in which the guest's counter stood still, or it did not answer.
    stood_still: Duration,
    /// The longest answer of QEMU's monitor, through libvirt.
    monitor: Duration,
    paused: bool,
    states: Vec<String>,
    epochs: u64,
}

fn hang(scene: &Scene, storage: u32, time: Duration, protected: bool) -> Result<Fared> {
    let (client, address, site) = (scene.rig.client().clone(), scene.guest.address, scene.rig.site(At::A));
    let epoch = |scene: &Scene| -> Result<u64> {
        if protected { Ok(scene.status_number(At::A, "epoch")? as u64) } else { Ok(0) }
    };
    let first = client.ping(address, ANSWER)?;
    exec::signal(storage, Signal::STOP)?;
    let begun = Instant::now();
    let cut_before = epoch(scene)?;
    let mut fared = Fared {
        ticks_per_second: 0.0,
        stood_still: Duration::ZERO,
        monitor: Duration::ZERO,
        paused: false,
        states: Vec::new(),
        epochs: 0,
    };
    let (mut tick, mut moved) = (first.tick, begun);
    let result = (|| {
        while begun.elapsed() < time {
            if let Ok(pong) = client.ping(address, LOOK)
                && pong.tick > tick
            {
                tick = pong.tick;
                fared.stood_still = fared.stood_still.max(moved.elapsed());
                moved = Instant::now();
            }
            let asked = Instant::now();
            let status = oracle::hmp(site, &scene.guest, "info status")?;
            fared.monitor = fared.monitor.max(asked.elapsed());
            fared.paused |= status.contains("paused");
            if protected {
                let state = scene.status(At::A)?["state"].as_str().unwrap_or_default().to_owned();
                if fared.states.last() != Some(&state) {
                    fared.states.push(state);
                }
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    })();
    fared.stood_still = fared.stood_still.max(moved.elapsed());
    fared.ticks_per_second = (tick - first.tick) as f64 / begun.elapsed().as_secs_f64();
    fared.epochs = epoch(scene).map_or(0, |now| now - cut_before);
    exec::signal(storage, Signal::CONT)?;
    result.map(|()| fared)
}

/// Waits for the next cut, so that the one after it is an interval away.
fn just_cut(scene: &Scene) -> Result<()> {
    let before = scene.status_number(At::A, "epoch")?;
    let limit = Duration::from_secs(30);
    wait_for("a cut", limit, || Ok((scene.status_number(At::A, "epoch")? > before).then_some(())))
}

#[test]
fn storage_that_hangs_is_no_worse_for_a_protected_guest() -> Result<()> {
    let mut random = random::generator("storage");
    let mut guest = GuestSpec::linux("web1").memory(128).workload(WORKLOAD);
    guest.disk_shapes = vec![DiskShape::in_store(Store::Nbd)];
    let (scene, storage) = Scene::prepared("storage", guest, &At::B.receiver(), serve)?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    // A record is written in every tick: without them the counter goes on while reads of the disk hang.
    client.set(address, "records=0", ANSWER)?;
    let tick = client.ping(address, ANSWER)?.tick;
    client.wait_tick(address, tick + 3, ANSWER)?;

    let time = Duration::from_secs(random::rounds(6, 20) as u64);
    let alone = hang(&scene, storage, time, false)?;
    println!("unprotected, storage hangs for {time:?}: {alone:?}");
    ensure!(alone.stood_still < time / 2, "the guest does not count while its storage hangs: nothing to compare with");
    scene.protect(&["--interval", INTERVAL])?;
    for round in 0..random::rounds(1, 5) {
        scene.wait_durable()?;
        just_cut(&scene)?;
        std::thread::sleep(random::below(&mut random, LOOK));
        let fared = hang(&scene, storage, time, true)?;
        println!("protected, storage hangs for {time:?}: {fared:?}");
        let told = format!("round {round}: {fared:?}, unprotected {alone:?}");
        ensure!(!fared.paused && fared.epochs == 0, "a cut was attempted: {told}");
        ensure!(fared.states.iter().any(|state| state == "stalled"), "it was not shown: {told}");
        ensure!(fared.ticks_per_second >= SPEED_MIN * alone.ticks_per_second, "the guest is slower: {told}");
        ensure!(fared.stood_still < time / 2 && fared.monitor < time / 2, "the guest or its monitor hung: {told}");
        let caught_up = scene.wait_protected(4 * ANSWER)?;
        scene.wait_durable()?;
        println!("protected again {caught_up:.1?} after its storage answered");
        scene.compare_held().with_context(|| format!("round {round}"))?;
    }
    client.set(address, "records=1", ANSWER)?;
    scene.wait_durable()?;
    client.self_check(address)?;
    scene.compare_held()?;
    scene.rig.finish()
}
