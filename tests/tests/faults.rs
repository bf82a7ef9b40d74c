//! What dies, and what is not lost: sites at random moments, daemons, the link.

use anyhow::{Context, Result};
use rustix::process::Signal;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use vmdr_tests::client::Client;
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random;
use vmdr_tests::relay::Shape;
use vmdr_tests::rig::{At, PORT, RELAY_ADDRESS};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

const WORKLOAD: &str = "--ram-mib 32 --pages 150 --interval-ms 25 --record-bytes 65536 --records 256 --readers 1";

fn guest() -> GuestSpec {
    GuestSpec::linux("web1").memory(160).workload(WORKLOAD)
}

/// The guest works: it is not paused, and its ticks go on.
fn works(client: &Client, guest: Ipv4Addr) -> Result<u64> {
    let now = client.ping(guest, ANSWER)?;
    Ok(client.wait_tick(guest, now.tick + 10, ANSWER)?.tick)
}

/// Site A is lost: the guest goes on at B, from `tick` at least, in the same boot.
fn lose_and_activate(scene: &mut Scene, tick: u64, epoch: u64) -> Result<()> {
    let client = scene.rig.client().clone();
    let address = scene.guest.address;
    let boot = client.ping(address, ANSWER)?.boot;
    scene.lose_site_a()?;
    check_activation(scene, &boot, tick, epoch)
}

fn check_activation(scene: &Scene, boot: &str, tick: u64, epoch: u64) -> Result<()> {
    let (client, address) = (scene.rig.client(), scene.guest.address);
    let begun = Instant::now();
    let report = scene.activate()?;
    let activate = begun.elapsed();
    let back = client.ping(address, ANSWER)?;
    println!("activate took {activate:.1?}, the first answer came after {:.1?}", begun.elapsed());
    let activated = report["point"]["epoch"].as_u64().context("the report names the epoch")?;
    assert!(activated >= epoch, "epoch {epoch} had been acknowledged, {activated} was activated: {report}");
    assert_eq!(back.boot, boot, "resumed, not booted");
    assert!(back.tick >= tick, "tick {tick} had been durable, it went on from {}", back.tick);
    client.self_check(address)?;
    works(client, address)?;
    client.self_check(address).map(|_| ())
}

#[test]
fn a_site_killed_at_random_moments_comes_back_never_older_than_acknowledged() -> Result<()> {
    let mut random = random::generator("killed at random moments");
    for round in 0..random::rounds(2, 20) {
        let mut scene = Scene::new("faults-kill", guest())?;
        let (client, address) = (scene.rig.client().clone(), scene.guest.address);
        let boot = client.ping(address, ANSWER)?.boot;
        scene.protect(&["--interval", if round % 2 == 0 { "100ms" } else { "50ms" }])?;
        let end = Instant::now() + random::below(&mut random, Duration::from_secs(4));
        // A tick that was seen before epoch N+1 was cut is in that epoch: what is acknowledged says which ticks are safe.
        let mut seen = Vec::new();
        let (mut tick, mut epoch) = (0, 0);
        while Instant::now() < end {
            let ping = client.ping(address, ANSWER)?;
            let status = scene.status(At::A)?;
            let number = |key: &str| status[key].as_u64().with_context(|| format!("{key} in {status}"));
            seen.push((number("epoch")? + 1, ping.tick));
            epoch = number("durable_epoch")?;
            tick = seen.iter().filter(|(cut, _)| *cut <= epoch).map(|(_, tick)| *tick).max().unwrap_or(tick);
        }
        std::thread::sleep(random::below(&mut random, Duration::from_millis(150)));
        scene.lose_site_a()?;
        check_activation(&scene, &boot, tick, epoch).with_context(|| format!("round {round}"))?;
        scene.rig.finish()?;
    }
    Ok(())
}

#[test]
fn a_site_killed_during_the_first_copy_leaves_nothing_that_could_be_activated() -> Result<()> {
    let receiver = format!("{RELAY_ADDRESS}:{PORT}");
    let mut scene = Scene::with_receiver_at("faults-seed", guest(), &receiver)?;
    // So slow that the first copy cannot end.
    let relay = scene.rig.relay(At::B, Shape { delay: Duration::ZERO, bytes_per_second: 200_000 })?;
    std::thread::scope(|scope| -> Result<()> {
        let protect = scope.spawn(|| scene.protect(&[]));
        wait_for("the first copy to be under way", 4 * ANSWER, || Ok((relay.passed() > 500_000).then_some(())))?;
        works(scene.rig.client(), scene.guest.address)?;
        assert_eq!(scene.status(At::A)?["state"], "seeding");
        let pid1 = scene.rig.site(At::A).namespace()?.pid1();
        exec::signal(pid1, Signal::KILL)?;
        assert!(protect.join().is_ok_and(|result| result.is_err()), "protect cannot have succeeded");
        Ok(())
    })?;
    scene.lose_site_a()?;
    let refused = scene.activate();
    assert!(refused.is_err(), "{refused:?}");
    assert!(scene.rig.site(At::B).processes_named("qemu-system-x86_64").is_empty());
    drop(relay);
    scene.rig.finish()
}

#[test]
fn a_receiver_killed_again_and_again_loses_nothing_acknowledged() -> Result<()> {
    let mut random = random::generator("receiver killed");
    let mut scene = Scene::new("faults-receiver", guest())?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "50ms"])?;
    for round in 0..random::rounds(3, 30) {
        std::thread::sleep(random::below(&mut random, Duration::from_millis(700)));
        let durable = scene.status_number(At::A, "durable_epoch")? as u64;
        scene.receiver.as_mut().context("a receiver")?.kill()?;
        works(&client, address).with_context(|| format!("round {round}: the guest without a receiver"))?;
        scene.start_receiver()?;
        let stored = scene.status_number(At::B, "durable_epoch")? as u64;
        assert!(stored >= durable, "round {round}: epoch {durable} was acknowledged, {stored} is what it has now");
        scene.wait_durable().with_context(|| format!("round {round}: protection goes on"))?;
    }
    let tick = client.ping(address, ANSWER)?.tick;
    let epoch = scene.wait_durable()?;
    // The last time with the site lost while the receiver is down.
    scene.receiver.as_mut().context("a receiver")?.kill()?;
    let boot = client.ping(address, ANSWER)?.boot;
    scene.lose_site_a()?;
    scene.start_receiver()?;
    check_activation(&scene, &boot, tick, epoch)?;
    scene.rig.finish()
}

#[test]
fn an_agent_killed_again_and_again_leaves_the_guest_running_and_goes_on() -> Result<()> {
    let mut random = random::generator("agent killed");
    let mut scene = Scene::new("faults-agent", guest())?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "50ms"])?;
    for round in 0..random::rounds(3, 30) {
        std::thread::sleep(random::below(&mut random, Duration::from_millis(700)));
        let durable = scene.status_number(At::A, "durable_epoch")? as u64;
        scene.agent.as_mut().context("an agent")?.kill()?;
        works(&client, address).with_context(|| format!("round {round}: the guest without an agent"))?;
        scene.start_agent()?;
        let tick = client.ping(address, ANSWER)?.tick;
        let next = scene.wait_durable().with_context(|| format!("round {round}: protection goes on"))?;
        assert!(next > durable, "round {round}: epoch {durable} was acknowledged, {next} came later");
        works(&client, address).with_context(|| format!("round {round}: tick {tick}"))?;
    }
    let tick = client.ping(address, ANSWER)?.tick;
    let epoch = scene.wait_durable()?;
    lose_and_activate(&mut scene, tick, epoch)?;
    scene.rig.finish()
}

#[test]
fn a_link_that_is_cut_stalled_broken_or_garbled_delays_and_loses_nothing() -> Result<()> {
    let receiver = format!("{RELAY_ADDRESS}:{PORT}");
    let mut scene = Scene::with_receiver_at("faults-link", guest(), &receiver)?;
    let relay = scene.rig.relay(At::B, Shape::default())?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "100ms"])?;

    scene.rig.set_link(false)?;
    std::thread::sleep(Duration::from_secs(3));
    works(&client, address).context("the guest without a link")?;
    scene.rig.set_link(true)?;
    scene.wait_durable().context("after a cut")?;

    relay.stall(true);
    std::thread::sleep(Duration::from_secs(3));
    works(&client, address).context("the guest with a stalled link")?;
    relay.stall(false);
    scene.wait_durable().context("after a stall")?;

    scene.rig.set_deaf(At::A, true)?;
    std::thread::sleep(Duration::from_secs(2));
    works(&client, address).context("the guest with a link in one direction")?;
    scene.rig.set_deaf(At::A, false)?;
    scene.wait_durable().context("after a loss in one direction")?;

    for _ in 0..5 {
        relay.reset();
        scene.wait_durable().context("after a broken connection")?;
    }
    for _ in 0..5 {
        relay.flip_bits(1);
        wait_for("a full block to be garbled", ANSWER, || Ok((relay.flips_left() == 0).then_some(())))?;
        scene.wait_durable().context("after a flipped bit")?;
    }
    let tick = client.ping(address, ANSWER)?.tick;
    let epoch = scene.wait_durable()?;
    lose_and_activate(&mut scene, tick, epoch)?;
    drop(relay);
    scene.rig.finish()
}

#[test]
fn a_shim_that_dies_or_hangs_leaves_the_guest_running_and_the_old_point() -> Result<()> {
    for (how, what) in [(Signal::KILL, "dies"), (Signal::STOP, "hangs")] {
        let mut scene = Scene::new("faults-shim", guest())?;
        let (client, address) = (scene.rig.client().clone(), scene.guest.address);
        scene.protect(&["--interval", "50ms"])?;
        let tick = client.ping(address, ANSWER)?.tick;
        let epoch = scene.wait_durable()?;
        let shims = scene.rig.site(At::A).processes_named("vmdr-shim");
        assert!(!shims.is_empty(), "a shim stands beside the guest");
        for shim in shims {
            exec::signal(shim, how)?;
        }
        works(&client, address).with_context(|| format!("the guest when its shim {what}"))?;
        lose_and_activate(&mut scene, tick, epoch).with_context(|| format!("after a shim that {what}"))?;
        scene.rig.finish()?;
    }
    Ok(())
}
