//! Agent and shim watch each other: whichever is killed or hangs, at whatever moment, with disk writes in flight, the guest
//! runs again at once.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vmdr_tests::client::Client;
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// What is promised, on a machine that has time for it.
const PROMISE: Duration = Duration::from_secs(1);
/// What fails the test: the machine may have others to serve, and the guest ticks a few times a second under TCG.
const LIMIT: Duration = Duration::from_secs(5);
const PROTECTED_LIMIT: Duration = Duration::from_secs(120);

/// From now to the guest's next tick.
fn until_next_tick(client: &Client, scene: &Scene) -> Result<Duration> {
    let begun = Instant::now();
    let address = scene.guest.address;
    let first = client.ping(address, LIMIT).context("the guest does not answer")?.tick;
    client.wait_tick(address, first + 1, LIMIT).context("the guest does not tick")?;
    Ok(begun.elapsed())
}

fn protected(scene: &Scene) -> Result<()> {
    wait_for("the guest to be protected", PROTECTED_LIMIT, || {
        Ok((scene.status(At::A)?["state"] == "protected").then_some(()))
    })
    .with_context(|| format!("the status is {:?}", scene.status(At::A)))
}

fn shim(scene: &Scene) -> Result<u32> {
    wait_for("a shim", PROTECTED_LIMIT, || Ok(scene.rig.site(At::A).processes_named("vmdr-shim").first().copied()))
}

#[test]
fn the_guest_runs_on_when_agent_or_shim_dies_or_hangs() -> Result<()> {
    let mut random = random::generator("guard");
    let workload = "--ram-mib 24 --pages 100 --interval-ms 20 --record-bytes 131072 --records 128 --readers 2";
    let mut scene = Scene::new("guard", GuestSpec::linux("web1").memory(128).workload(workload))?;
    let client = scene.rig.client().clone();
    scene.protect(&["--interval", "25ms"])?;
    let mut worst = Vec::new();
    for (what, signal) in
        [("agent", Signal::KILL), ("agent", Signal::STOP), ("shim", Signal::KILL), ("shim", Signal::STOP)]
    {
        let mut times = Vec::new();
        for round in 0..random::rounds(3, 50) {
            protected(&scene)?;
            std::thread::sleep(random::below(&mut random, Duration::from_millis(500)));
            let pid = if what == "agent" { scene.agent.as_ref().context("an agent")?.pid() } else { shim(&scene)? };
            exec::signal(pid, signal)?;
            let took =
                until_next_tick(&client, &scene).with_context(|| format!("{signal:?} to the {what}, {round}"))?;
            times.push(took);
            if what == "agent" {
                // One that hangs is ended by being replaced.
                scene.start_agent()?;
            } else {
                wait_for("the shim to be gone", PROTECTED_LIMIT, || Ok((!exec::alive(pid)).then_some(())))?;
            }
        }
        times.sort_unstable();
        let late = times.iter().filter(|took| **took > PROMISE).count();
        worst.push(format!(
            "{signal:?} to the {what}: {} times, longest {:?}, {late} above {PROMISE:?}",
            times.len(),
            times[times.len() - 1]
        ));
    }
    println!("from the signal to the guest's next tick: {}", worst.join("; "));
    protected(&scene)?;
    let seen = client.ping(scene.guest.address, ANSWER)?;
    scene.wait_durable()?;
    ensure!(client.self_check(scene.guest.address)? >= seen.tick);
    scene.lose_site_a()?;
    scene.activate()?;
    let back = client.ping(scene.guest.address, ANSWER)?;
    ensure!(back.boot == seen.boot && back.tick >= seen.tick, "{seen:?} was durable, {back:?} came back");
    client.self_check(scene.guest.address)?;
    scene.rig.finish()
}
