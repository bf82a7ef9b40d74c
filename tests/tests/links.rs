//! Links and receivers that do not keep up: the guest goes on at its own speed, `status` says so, memory stays bounded, and
//! afterwards the standby is level again, byte for byte, by itself.
//!
//! The link is a wire in this process ([`vmdr_tests::wire`]): frames are lost and delayed below TCP, which is that of the kernel
//! here (the congestion control in use is printed). The guest's speed is its workload's ticks, against the same guest before it
//! was protected, in the same run.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};
use vmdr_tests::client::Client;
use vmdr_tests::daemon::Daemon;
use vmdr_tests::footprint::{AGENT_BYTES_MAX, Footprint, RECEIVER_BYTES_MAX, SHIM_BYTES_MAX};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wire::Weather;

/// Writes some 20 MB/s where the machine lets it: 10 MB/s of memory that does not compress, and 10 MB/s of disk with a flush
/// for each record.
const WORKLOAD: &str = "--ram-mib 32 --pages 128 --interval-ms 50 --fill-bytes 3800 --record-bytes 524288 --records 48";
const PAGE_BYTES: u64 = 4096;
const RECORD_BYTES: u64 = 524_288;
/// As small as it may be, so that it is full within seconds.
const ARENA_BYTES: u64 = 64 << 20;
/// A guest slower than this part of its own unprotected speed is held up by vmdr. Half of it: the machine has two cores, of
/// which the guest is emulated on one, and may have others to serve.
const SPEED_MIN: f64 = 0.5;
/// How often status and memory are looked at.
const LOOK: Duration = Duration::from_millis(400);
const CAUGHT_UP_LIMIT: Duration = Duration::from_secs(240);

/// Ticks and bytes per second of the guest's workload.
#[derive(Clone, Copy, Debug)]
struct Speed {
    ticks: f64,
    megabytes: f64,
}

/// What was seen while something was wrong.
#[derive(Debug)]
struct Seen {
    speed: Speed,
    states: BTreeSet<String>,
    rpo_seconds_max: f64,
    shim: Footprint,
    agent: Footprint,
    receiver: Footprint,
}

fn speed_while<T>(
    client: &Client,
    scene: &Scene,
    time: Duration,
    mut look: impl FnMut() -> Result<T>,
) -> Result<Speed> {
    let address = scene.guest.address;
    let before = client.ping(address, ANSWER)?;
    let begun = Instant::now();
    while begun.elapsed() < time {
        look()?;
        std::thread::sleep(LOOK);
    }
    let after = client.ping(address, ANSWER)?;
    let seconds = begun.elapsed().as_secs_f64();
    let records = after.acknowledged - before.acknowledged;
    let bytes = (after.writes - before.writes) * PAGE_BYTES + records * RECORD_BYTES;
    ensure!(after.boot == before.boot, "the guest has booted anew");
    let ticks = (after.tick - before.tick) as f64 / seconds;
    Ok(Speed { ticks, megabytes: bytes as f64 / seconds / 1e6 })
}

fn watch(client: &Client, scene: &Scene, time: Duration) -> Result<Seen> {
    let pid = |daemon: &Option<Daemon>| daemon.as_ref().map(Daemon::pid).context("a daemon");
    let (agent, receiver, shim) = (pid(&scene.agent)?, pid(&scene.receiver)?, scene.shim()?);
    let mut seen = Seen {
        speed: Speed { ticks: 0.0, megabytes: 0.0 },
        states: BTreeSet::new(),
        rpo_seconds_max: 0.0,
        shim: Footprint::default(),
        agent: Footprint::default(),
        receiver: Footprint::default(),
    };
    let speed = speed_while(client, scene, time, || {
        let status = scene.status(At::A)?;
        seen.states.insert(status["state"].as_str().unwrap_or_default().to_owned());
        seen.rpo_seconds_max = seen.rpo_seconds_max.max(status["rpo_seconds"].as_f64().unwrap_or_default());
        seen.shim = seen.shim.max(Footprint::of(shim)?);
        seen.agent = seen.agent.max(Footprint::of(agent)?);
        seen.receiver = seen.receiver.max(Footprint::of(receiver)?);
        Ok(())
    })?;
    Ok(Seen { speed, ..seen })
}

impl Seen {
    fn check(&self, unprotected: Speed) -> Result<()> {
        let ratio = self.speed.ticks / unprotected.ticks;
        ensure!(ratio >= SPEED_MIN, "the guest had {ratio:.2} of its speed: {self:?}");
        ensure!(self.shim.private_bytes <= SHIM_BYTES_MAX, "the shim's memory: {self:?}");
        ensure!(self.agent.private_bytes <= AGENT_BYTES_MAX, "the agent's memory: {self:?}");
        ensure!(self.receiver.private_bytes <= RECEIVER_BYTES_MAX, "the receiver's memory: {self:?}");
        let arena = self.shim.shared_bytes + self.agent.shared_bytes;
        // The state page, and what device state is written into.
        ensure!(arena <= ARENA_BYTES + (4 << 20), "shared memory: {self:?}");
        Ok(())
    }

    fn line(&self, unprotected: Speed) -> String {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "speed {:.2} of unprotected ({:.1} MB/s), states {:?}, RPO up to {:.1} s, MiB: shim {} + arena {}, agent {}, \
             receiver {}",
            self.speed.ticks / unprotected.ticks,
            self.speed.megabytes,
            self.states,
            self.rpo_seconds_max,
            mib(self.shim.private_bytes),
            mib(self.shim.shared_bytes + self.agent.shared_bytes),
            mib(self.agent.private_bytes),
            mib(self.receiver.private_bytes)
        )
    }
}

fn seconds(usual: u64, soak: u64) -> Duration {
    Duration::from_secs(random::rounds(usual as usize, soak as usize) as u64)
}

#[test]
fn a_link_or_receiver_that_does_not_keep_up_costs_recovery_points_and_nothing_else() -> Result<()> {
    let mut random = random::generator("links");
    let guest = GuestSpec::linux("web1").memory(160).workload(WORKLOAD);
    let (mut scene, wire) = Scene::prepared("links", guest, &At::B.receiver(), |rig, _| rig.wire(&mut random))?;
    scene.configure_agent(&format!("arena_bytes = {ARENA_BYTES}\n"));
    scene.start_agent()?;
    let client = scene.rig.client().clone();
    let control = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();

    if random::rounds(0, 1) == 0 {
        // Half as fast: the usual run has to catch up within seconds, also on a busy machine.
        client.set(scene.guest.address, "interval=100", ANSWER)?;
    }
    let unprotected = speed_while(&client, &scene, seconds(4, 20), || Ok(()))?;
    println!(
        "unprotected: {:.1} ticks/s, {:.1} MB/s; TCP: {}",
        unprotected.ticks,
        unprotected.megabytes,
        control.trim()
    );
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let good = watch(&client, &scene, seconds(3, 20))?;
    println!("good link: {}", good.line(unprotected));
    good.check(unprotected)?;

    let troubles = [
        ("link cut", seconds(5, 10), Weather { cut: true, ..Weather::default() }),
        ("link of 1 MB/s", seconds(8, 60), Weather { bytes_per_second: 1_000_000, ..Weather::default() }),
        ("receiver stopped", seconds(6, 60), Weather::default()),
        (
            "200 ms and 1 % loss",
            seconds(6, 60),
            Weather { delay: Duration::from_millis(200), loss: 0.01, ..Weather::default() },
        ),
    ];
    for (what, time, weather) in troubles {
        let receiver = scene.receiver.as_ref().context("a receiver")?;
        let (_, lost_before) = wire.passed_and_lost();
        let stopped = what == "receiver stopped";
        wire.weather(weather);
        if stopped {
            receiver.freeze()?;
        }
        let seen = watch(&client, &scene, time).with_context(|| what.to_owned());
        wire.weather(Weather::default());
        if stopped {
            receiver.thaw()?;
        }
        let seen = seen?;
        let caught_up = scene.wait_protected(CAUGHT_UP_LIMIT).context(what)?;
        scene.wait_durable().context(what)?;
        let (_, lost) = wire.passed_and_lost();
        println!(
            "{what} for {time:?}: {}; protected {caught_up:.1?} later; {} frames lost",
            seen.line(unprotected),
            lost - lost_before
        );
        seen.check(unprotected).context(what)?;
        if weather.loss > 0.0 {
            ensure!(lost > lost_before, "no frame was lost");
            ensure!(seen.rpo_seconds_max > weather.delay.as_secs_f64(), "{what}: {seen:?}");
        } else {
            let shown = seen.states.contains("behind") || seen.states.contains("disconnected");
            ensure!(shown, "{what} is not shown: {seen:?}");
            // Nothing at all came through, or a twentieth of what was written.
            ensure!(seen.rpo_seconds_max > time.as_secs_f64() / 2.0, "the RPO does not grow: {what}: {seen:?}");
        }
        scene.compare_held().with_context(|| format!("after: {what}"))?;
    }
    client.self_check(scene.guest.address)?;
    drop(wire);
    scene.rig.finish()
}
