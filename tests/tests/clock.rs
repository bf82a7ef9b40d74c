//! The guest's clock: what pauses take from it, and that the tools in the guest make up for it.
//!
//! The guest is asked for its clock from outside; half the time that the answer took is how wrong that can be, so the
//! fastest of some answers counts. The same guest, first with `guest_clock = false`, then with the agent telling it the time.
//!
//! A single pause that is longer than the limit (they come on a machine that others use) puts any clock off by its length,
//! until the guest has asked again. So single looks may be beyond the limit, few of all and no two in a row.

use anyhow::{Context, Result, ensure};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmdr_tests::client::Client;
use vmdr_tests::daemon::{Daemon, Program};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random::rounds;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// Within this of the host's clock (issue 3).
const OFF_SECONDS_MAX: f64 = 0.05;
/// No clock can be run faster than by a tenth; while pauses take more, it can only be stepped after the fact.
const STEERABLE: f64 = 0.1;
/// An answer that took longer does not show whether a clock is within that.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(20);
/// How long a steered clock may take to be right on a busy machine.
const SETTLE: Duration = Duration::from_secs(60);
/// How often a clock is looked at.
const LOOK: Duration = Duration::from_millis(500);

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// How far the guest's clock is behind the host's, in seconds, and how far off that can be.
fn look(client: &Client, guest: Ipv4Addr) -> Result<(f64, f64)> {
    let mut best: Option<(f64, f64)> = None;
    let until = Instant::now() + ANSWER;
    // Of those that were fast enough the fastest of a few; a busy machine needs more tries.
    let mut good = 0;
    while good < 3 && (Instant::now() < until || best.is_none()) {
        let (begun, before) = (Instant::now(), unix_seconds());
        let answer = client.request(guest, "clock", true, Duration::from_secs(2));
        let round_trip = begun.elapsed();
        let Ok(answer) = answer else { continue };
        let clock = answer.split_whitespace().find_map(|word| word.strip_prefix("unix_ns=")?.parse::<f64>().ok());
        let clock = clock.with_context(|| format!("the guest answered {answer:?}"))? / 1e9;
        let half = round_trip.as_secs_f64() / 2.0;
        if best.is_none_or(|(_, known)| half < known) {
            best = Some((before + half - clock, half));
        }
        good += u32::from(round_trip < ROUND_TRIP_MAX);
        ensure!(Instant::now() < until + ANSWER, "the guest does not answer");
    }
    best.context("no answer")
}

/// What was seen of the clock over some time.
struct Watched {
    drift_ppm: f64,
    /// The largest offset, less what the look may be off by.
    worst_seconds: f64,
    paused: f64,
    looks: usize,
    /// The largest offset as it was seen.
    seen_seconds: f64,
    /// Looks at which it was beyond the limit, and the most of them in a row.
    beyond: usize,
    beyond_in_a_row: usize,
}

fn watch(scene: &Scene, seconds: u64) -> Result<Watched> {
    let (client, address) = (scene.rig.client(), scene.guest.address);
    let (begun, (first, _)) = (Instant::now(), look(client, address)?);
    let mut watched = Watched {
        drift_ppm: 0.0,
        worst_seconds: 0.0,
        paused: 0.0,
        looks: 0,
        seen_seconds: 0.0,
        beyond: 0,
        beyond_in_a_row: 0,
    };
    let mut in_a_row = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(LOOK);
        let (offset, doubt) = look(client, address)?;
        watched.drift_ppm = (offset - first) / begun.elapsed().as_secs_f64() * 1e6;
        watched.worst_seconds = watched.worst_seconds.max(offset.abs() - doubt);
        watched.seen_seconds = watched.seen_seconds.max(offset.abs());
        watched.looks += 1;
        in_a_row = if offset.abs() - doubt > OFF_SECONDS_MAX { in_a_row + 1 } else { 0 };
        watched.beyond += usize::from(in_a_row > 0);
        watched.beyond_in_a_row = watched.beyond_in_a_row.max(in_a_row);
    }
    watched.paused = scene.status_number(At::A, "paused_ratio")?;
    Ok(watched)
}

#[test]
fn the_tools_keep_the_clock_of_a_guest_that_loses_time_in_pauses() -> Result<()> {
    // Ten minutes each (issue 3), or a quick look.
    let seconds = rounds(12, 600) as u64;
    let guest = GuestSpec::linux("clock").workload("--ram-mib 16 --pages 50 --interval-ms 50").tools();
    let mut scene = Scene::new("clock", guest)?;
    scene.configure_agent("guest_clock = false\n");
    scene.start_agent()?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let free = watch(&scene, seconds)?;
    println!(
        "not steered: {:.0} ppm lost over {seconds} s, paused {:.2} % ({} looks)",
        free.drift_ppm,
        free.paused * 100.0,
        free.looks
    );
    let status = scene.status(At::A)?;
    ensure!(status["guest_tools"].as_str().is_some_and(|tools| tools.starts_with("vmdr-guest-tools")), "{status}");
    ensure!(status["guest_clock_offset_seconds"].is_null(), "{status}");
    // Otherwise there would be nothing to steer against, and the rest would prove nothing.
    ensure!(free.drift_ppm > 1_000.0, "the pauses took only {:.0} ppm", free.drift_ppm);

    scene.agent = None;
    let config = format!("receiver = \"{}\"\n", At::B.receiver());
    scene.agent = Some(Daemon::start(scene.rig.site(At::A), Program::Agent, &config)?);
    scene.wait_durable()?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    wait_for("the guest's clock to be with the host's", SETTLE, || {
        let (offset, doubt) = look(&client, address)?;
        Ok((offset.abs() - doubt < OFF_SECONDS_MAX / 2.0).then_some(()))
    })?;
    let steered = watch(&scene, seconds)?;
    println!(
        "steered: at most {:.1} ms off (as seen {:.1} ms) over {seconds} s, {} of {} looks beyond {:.0} ms, {} in a row, paused {:.2} %",
        steered.worst_seconds * 1e3,
        steered.seen_seconds * 1e3,
        steered.beyond,
        steered.looks,
        OFF_SECONDS_MAX * 1e3,
        steered.beyond_in_a_row,
        steered.paused * 100.0,
    );
    let lost = free.drift_ppm / 1e6;
    if lost.max(steered.paused) <= STEERABLE {
        ensure!(steered.beyond <= steered.looks.div_ceil(50), "{} of {} looks", steered.beyond, steered.looks);
        ensure!(steered.beyond_in_a_row <= 1, "{} looks in a row", steered.beyond_in_a_row);
    } else {
        // An overloaded machine: the 50 ms were not tested, only that the clock is held at all.
        println!("pauses take more than {STEERABLE} of the time here: the limit of 50 ms was NOT tested");
        let free_seconds = lost * seconds as f64;
        ensure!(steered.worst_seconds < free_seconds / 2.0, "{} s off", steered.worst_seconds);
    }
    let offset = scene.status_number(At::A, "guest_clock_offset_seconds")?;
    ensure!(offset.abs() < 1.0, "the guest says that it is {offset} s off");

    // The channel goes along to the other site, and its tools with it.
    scene.wait_durable()?;
    scene.lose_site_a()?;
    scene.activate()?;
    let back = client.ping(address, ANSWER)?;
    client.wait_tick(address, back.tick + 5, ANSWER)?;
    client.self_check(address)?;
    scene.rig.finish()
}
