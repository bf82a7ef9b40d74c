//! The oracle over every kind of guest: the held guest and the standby, byte for byte, RAM and disks, for each kind of memory,
//! firmware, disk and event that vmdr protects. What it does not protect is in `refusals.rs`.
//!
//! A round: something happens to the guest (it is reset, suspended and resumed, gets a device, loses one), then `vmdr hold`
//! pauses it at a cut, and all of it is compared. Kinds of which the activation does something of its own are lost and
//! activated at the end, and must pass their self-check.
//!
//! All kinds take a quarter of an hour. A usual run takes those that are most likely to break, and some at random; the seed
//! is printed. `VMDR_KINDS=name,name` names them instead. A soak takes all, with many rounds each.

#[path = "kinds/act.rs"]
mod act;
#[path = "kinds/table.rs"]
mod table;

use anyhow::{Context, Result, bail};
use rand::seq::IndexedRandom;
use std::time::{Duration, Instant};
use table::{KINDS, Kind};
use vmdr_tests::guest::{GuestSpec, Kind as System};
use vmdr_tests::huge_pages::HugePages;
use vmdr_tests::nbd_store;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};

/// Names the kinds to run.
const VARIABLE: &str = "VMDR_KINDS";
/// In every usual run: what the most is built for.
const ALWAYS: [&str; 2] = ["uefi", "disks"];
/// How many others a usual run takes.
const SOME: usize = 1;
/// Rounds of a kind: usually, and in a soak.
const ROUNDS: [usize; 2] = [3, 60];
/// How long the guest runs between two rounds at most.
const RUN_MAX: Duration = Duration::from_millis(300);

fn run(kind: &Kind, rounds: usize) -> Result<()> {
    let name = format!("kind-{}", kind.name);
    let mut random = random::generator(&name);
    let begun = Instant::now();
    let guest = (kind.make)(GuestSpec::linux("web1").memory(128));
    let _huge_pages = kind.huge.then(HugePages::allow).transpose()?;
    let (mut scene, stores) = Scene::prepared(&name, guest, &At::B.receiver(), |rig, guest| {
        guest.define(rig.site(At::A))?;
        nbd_store::serve(rig.site(At::A), guest, nbd_store::slow_flushes)
    })?;
    (kind.expect)(&scene).context("the guest is not of the kind that it should be")?;
    let booted = begun.elapsed();
    scene.protect(&["--interval", "50ms"])?;
    let protected = begun.elapsed();
    let mut epochs = (u64::MAX, 0);
    for round in 0..rounds {
        let act = kind.acts[round % kind.acts.len()];
        std::thread::sleep(random::below(&mut random, RUN_MAX));
        act.happen(&scene, &mut random).with_context(|| format!("{act:?} in round {round}"))?;
        std::thread::sleep(random::below(&mut random, RUN_MAX));
        let epoch = scene.compare_held().with_context(|| format!("round {round}, after {act:?}"))?;
        assert!(epoch > epochs.1, "epoch {epoch} after {}", epochs.1);
        epochs = (epochs.0.min(epoch), epoch);
    }
    let linux = matches!(scene.guest.kind, System::Linux { .. });
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    if linux {
        act::wait_up(&scene)?;
        client.self_check(address).context("the protected guest")?;
    }
    let compared = begun.elapsed();
    if kind.activate {
        scene.wait_durable()?;
        let tick = client.ping(address, ANSWER)?.tick;
        scene.wait_durable()?;
        scene.lose_site_a()?;
        drop(stores);
        scene.activate()?;
        let back = client.ping(address, ANSWER)?.tick;
        assert!(back >= tick, "the activated guest is at tick {back}, a recovery point was made after {tick}");
        client.wait_tick(address, back + 5, ANSWER)?;
        client.self_check(address).context("the activated guest")?;
        (kind.after)(&scene).context("after the activation")?;
    }
    println!(
        "{name}: {rounds} of the epochs {} to {} compared, no difference; booted after {:.1} s, protected after {:.1} s, \
         compared after {:.1} s, done after {:.1} s",
        epochs.0,
        epochs.1,
        booted.as_secs_f64(),
        protected.as_secs_f64(),
        compared.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    );
    scene.rig.finish()
}

/// Those that this run takes.
fn chosen() -> Result<Vec<&'static Kind>> {
    if let Ok(names) = std::env::var(VARIABLE) {
        let find =
            |name| KINDS.iter().find(|kind| kind.name == name).with_context(|| format!("no kind is named {name}"));
        return names.split(',').map(find).collect();
    }
    if random::rounds(0, 1) == 1 {
        return Ok(KINDS.iter().collect());
    }
    let (always, others): (Vec<&Kind>, Vec<&Kind>) = KINDS.iter().partition(|kind| ALWAYS.contains(&kind.name));
    let mut random = random::generator("kinds");
    Ok(always.into_iter().chain(others.choose_multiple(&mut random, SOME).copied()).collect())
}

#[test]
fn the_standby_is_byte_for_byte_what_a_guest_of_each_kind_is() -> Result<()> {
    let chosen = chosen()?;
    println!("kinds: {}", chosen.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", "));
    let mut failed = Vec::new();
    for kind in &chosen {
        // All of them, so that one that fails does not hide the others.
        if let Err(error) = run(kind, random::rounds(ROUNDS[0], ROUNDS[1])) {
            println!("kind {}: {error:#}", kind.name);
            failed.push(kind.name);
        }
    }
    if !failed.is_empty() {
        bail!("of {} kinds of guests these failed: {}", chosen.len(), failed.join(", "));
    }
    Ok(())
}
