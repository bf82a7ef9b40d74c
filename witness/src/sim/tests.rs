//! What the simulation has to show.

use super::faults::Fault;
use super::{Mutant, World};
use crate::{holder, standby};

/// Schedules in an ordinary run.
const SEEDS: u64 = 6_000;
/// A mutant that is not found among so many is not found.
const MUTANT_SEEDS: u64 = 60_000;
const SECOND: u64 = 1_000_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

fn replay(seed: u64) -> String {
    format!("VMDR_SIM_SEED={seed} cargo nextest run -p vmdr-witness --no-capture never_two_sites")
}

#[test]
fn never_two_sites_run_a_guest() {
    if let Some(seed) = number("VMDR_SIM_SEED") {
        let mut world = World::new(seed, None, true);
        let came = world.run();
        println!("{}", world.trace.join("\n"));
        return came.unwrap();
    }
    let (mut taken, mut stayed) = (0, 0);
    for seed in 0..number("VMDR_SIM_SEEDS").unwrap_or(SEEDS) {
        let mut world = World::new(seed, None, false);
        if let Err(what) = world.run() {
            panic!("seed {seed}: {what}\nreplay: {}", replay(seed));
        }
        taken += u64::from(world.taken > 0);
        stayed += u64::from(world.taken == 0);
    }
    // A simulation in which nothing happens shows nothing.
    assert!(taken > 200 && stayed > 200, "taken {taken}, stayed {stayed}");
    println!("{taken} schedules in which the backup site took the guest, {stayed} in which it stayed");
}

#[test]
fn every_check_is_needed() {
    use Mutant::{Holder, Standby};
    for mutant in [
        Holder(holder::Without::SentAt),
        Holder(holder::Without::Margin),
        Holder(holder::Without::Narrowing),
        Holder(holder::Without::Number),
        Holder(holder::Without::Opening),
        Holder(holder::Without::Confirmed),
        Standby(standby::Without::Durable),
        Standby(standby::Without::Dirty),
        Standby(standby::Without::Taking),
        Standby(standby::Without::Armed),
        Standby(standby::Without::Stream),
        Standby(standby::Without::Granted),
        Mutant::WitnessLease,
        Mutant::WitnessGeneration,
        Mutant::WitnessEmpty,
        Mutant::Shim,
        Mutant::Guard,
        Mutant::Boot,
    ] {
        let found = (0..MUTANT_SEEDS).find_map(|seed| {
            let what = World::new(seed, Some(mutant), false).run().err()?;
            what.contains("both sites").then_some((seed, what))
        });
        let (seed, what) = found.unwrap_or_else(|| panic!("nothing goes wrong without {mutant:?}"));
        println!("{mutant:?}: seed {seed}: {what}");
    }
}

fn quiet() -> World {
    let mut world = World::new(7, None, true).quiet();
    world.run_until(10_000).unwrap();
    assert!(world.a_runs() && !world.b_runs());
    world.stopped_us = 0;
    world
}

/// What nobody has to pause for.
#[test]
fn one_thing_that_fails_stops_no_guest() {
    let long = 60 * SECOND;
    for faults in [
        vec![Fault::Witness { length: long }],
        vec![Fault::Cut { way: 0, length: long }, Fault::Cut { way: 1, length: long }],
        vec![Fault::Cut { way: 0, length: long }],
        vec![Fault::Cut { way: 2, length: long }],
        vec![Fault::Cut { way: 3, length: long }],
        vec![Fault::Receiver { length: long }],
        vec![Fault::Agent { length: SECOND }],
        vec![Fault::Wipe],
        vec![Fault::Shim { length: long }],
        vec![Fault::Disk { length: long }],
        vec![Fault::Automatic(false)],
    ] {
        let mut world = quiet();
        for fault in &faults {
            world.inject(*fault);
        }
        world.run_until(100_000).unwrap();
        let trace = world.trace.join("\n");
        assert!(world.a_runs() && !world.b_runs() && world.stopped_us == 0, "{faults:?}\n{trace}");
    }
}

/// The witness first, then the backup too: it had stood down.
#[test]
fn a_backup_that_has_stood_down_may_go_away() {
    let mut world = quiet();
    world.inject(Fault::Witness { length: 70 * SECOND });
    world.run_until(25_000).unwrap();
    world.inject(Fault::Receiver { length: 40 * SECOND });
    world.run_until(150_000).unwrap();
    assert!(world.a_runs() && world.stopped_us == 0, "{}", world.trace.join("\n"));
}

#[test]
fn a_host_that_is_cut_off_stops_its_guest_and_the_backup_takes_it() {
    let mut world = quiet();
    for way in [0, 1, 2] {
        world.inject(Fault::Cut { way, length: 60 * SECOND });
    }
    world.run_until(30_000).unwrap();
    assert!(!world.a_runs() && world.b_runs(), "{}", world.trace.join("\n"));
}

#[test]
fn a_host_that_is_lost_is_taken_over_within_bounds() {
    let mut world = quiet();
    world.inject(Fault::Host { length: 70 * SECOND });
    world.run_until(60_000).unwrap();
    // The lease, a look at the witness, an activation.
    let since = world.running_since_b.map(|at| at / 1000).unwrap();
    assert!((10_000..19_000).contains(&since), "{since}\n{}", world.trace.join("\n"));
}
