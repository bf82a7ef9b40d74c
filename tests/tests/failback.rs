//! The guest goes home: after its site was lost, and as a planned move, with daemons that are killed on the way.

use anyhow::{Context, Result, ensure};
use rand::{Rng, RngCore};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmdr_tests::daemon::{self, Program};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::pair::Pair;
use vmdr_tests::random::{self, rounds};
use vmdr_tests::rig::At;
use vmdr_tests::scene::ANSWER;

/// How long a guest in doubt may take to run again once everything is back.
const SETTLE: Duration = Duration::from_secs(60);
/// Bytes of a granule's hash, for each 64 KiB of a disk.
const HASH_BYTES: f64 = 16.0;

fn guest() -> GuestSpec {
    GuestSpec::linux("web1").memory(160).workload("--ram-mib 24 --pages 20 --interval-ms 100")
}

fn seconds(document: &serde_json::Value, key: &str) -> Result<f64> {
    document[key].as_f64().with_context(|| format!("{key} is no number in {document}"))
}

/// Protect A to B, lose A, activate at B, write there, bring A back with autostart, reprotect, fail back, protected again.
#[test]
fn a_guest_goes_home_after_its_site_was_lost() -> Result<()> {
    let mut pair = Pair::new("failback-lost", guest(), |rig, guest| {
        rig.site(At::A).virsh(&["autostart", &guest.name]).map(|_| ())
    })?;
    let (client, address) = (pair.rig.client().clone(), pair.guest.address);
    pair.vmdr(At::A, "protect", &[])?;
    for round in 1..=rounds(1, 5) {
        pair.wait_durable(At::A)?;
        let seen = client.ping(address, ANSWER)?;
        pair.lose(At::A)?;
        let report = pair.activate(At::B)?;
        println!("round {round}: activated at B in {:.2} s", seconds(&report, "rto_seconds")?);
        let back = client.ping(address, ANSWER)?;
        ensure!(back.boot == seen.boot, "resumed, not booted");
        pair.check("after the activation at B")?;

        // A host that boots: libvirtd with its autostart, and only then the daemons.
        pair.rig.boot_site(At::A)?;
        std::thread::sleep(Duration::from_secs(2));
        let state = pair.guest.state(pair.rig.site(At::A))?;
        ensure!(state == "shut off", "autostart has the guest {state} at A while it runs at B");
        let started = pair.rig.site(At::A).virsh(&["start", &pair.guest.name]);
        let said = format!("{:#}", started.err().context("it was started by hand at A while it runs at B")?);
        ensure!(said.contains("vmdr"), "the refusal is not clear: {said}");
        pair.start(At::A, Program::Receiver)?;
        pair.start(At::A, Program::Agent)?;
        pair.wait_state(At::A, "fenced")?;
        ensure!(pair.guest.state(pair.rig.site(At::A))? == "shut off", "the agent started it");

        let begun = Instant::now();
        pair.vmdr(At::B, "reprotect", &[])?;
        println!(
            "round {round}: reprotected in {:.1} s, {:.1} MB on the wire, {:.1} MB of disk content before compression",
            begun.elapsed().as_secs_f64(),
            pair.metric(At::B, "vmdr_sent_bytes_total")? / 1e6,
            pair.metric(At::B, "vmdr_sent_disk_bytes_total")? / 1e6
        );
        let kept = pair.vmdr(At::A, "divergence", &[])?;
        let set = &kept["sets"][0]["files"][0];
        let path = pair.rig.site(At::A).path(set["path"].as_str().context("a path")?);
        ensure!(path.exists(), "what is said to be kept is not there: {kept}");
        pair.check("protected at B")?;

        let before = client.ping(address, ANSWER)?;
        let moved = pair.vmdr(At::B, "failback", &[])?;
        println!("round {round}: failback, downtime {:.2} s", seconds(&moved, "downtime_seconds")?);
        let after = client.ping(address, ANSWER)?;
        ensure!(after.boot == before.boot && after.tick >= before.tick, "{before:?}, then {after:?}");
        ensure!(pair.states() == ["running", "shut off"], "{:?}", pair.states());
        pair.check("at home")?;
        pair.wait_state(At::A, "protected")?;
        let standby = pair.status(At::B, "receiver")?;
        ensure!(standby["role"] == "standby", "{standby}");
        pair.check("at home, protected")?;
    }
    pair.rig.finish()
}

/// What a reprotect sends of a disk of which 1 % differs: found by comparing alone, since the old site was lost and nobody
/// knows what it had written.
#[test]
fn reprotecting_sends_what_differs_of_the_disks() -> Result<()> {
    // The figure is of 1 GiB.
    let disk_mib = rounds(128, 1024) as u64;
    let mut guest = guest();
    guest.disks_mib = vec![64, disk_mib];
    let cold = |rig: &vmdr_tests::rig::Rig, guest: &GuestSpec, at: u64, mib: u64| -> Result<()> {
        let disk = File::options().write(true).open(rig.site(At::A).path(guest.disk_path(1)))?;
        let mut data = vec![0; 1 << 20];
        for piece in 0..mib {
            rand::rng().fill_bytes(&mut data);
            disk.write_all_at(&data, (at + piece) << 20)?;
        }
        Ok(())
    };
    let mut pair = Pair::new("failback-bytes", guest, |rig, guest| cold(rig, guest, 0, disk_mib))?;
    pair.vmdr(At::A, "protect", &[])?;
    pair.wait_durable(At::A)?;
    let first = pair.metric(At::A, "vmdr_sent_disk_bytes_total")?;
    pair.lose(At::A)?;
    pair.activate(At::B)?;
    // What A wrote and nobody else has: 1 % of the disk, in one place of each eighth.
    let differing_mib = (disk_mib / 100).max(1);
    for piece in 0..differing_mib {
        cold(&pair.rig, &pair.guest, piece * (disk_mib / differing_mib), 1)?;
    }
    let old = pair.rig.site(At::A).path(pair.guest.disk_path(1));
    let hash = |path: &std::path::Path| vmdr_tests::exec::run(std::process::Command::new("sha256sum").arg(path));
    let diverged = hash(&old)?;
    pair.boot(At::A)?;
    pair.vmdr(At::B, "reprotect", &[])?;
    let sent = pair.metric(At::B, "vmdr_sent_disk_bytes_total")?;
    let all = (64.0 + disk_mib as f64) * f64::from(1 << 20);
    let hashes = all / 65_536.0 * HASH_BYTES;
    println!(
        "reprotect of {} MiB with {differing_mib} MiB changed: {:.2} MB of disk content ({:.2} % of the disks), {:.2} MB of \
         hashes, {:.2} MB in all with memory; the first copy had {:.1} MB of disk content",
        64 + disk_mib,
        sent / 1e6,
        100.0 * sent / all,
        hashes / 1e6,
        pair.metric(At::B, "vmdr_sent_bytes_total")? / 1e6,
        first / 1e6
    );
    // The first disk is written all the time: what of it was written meanwhile comes on top.
    let written = 2.0 * f64::from(1 << 20);
    ensure!(sent <= 0.02 * all + written, "{sent} bytes of disk content were sent, of {all}");
    ensure!(sent >= (differing_mib << 20) as f64, "less was sent than differs");
    ensure!(hash(&old)? == diverged, "the old disk was changed");
    pair.check("protected at B")?;
    pair.vmdr(At::B, "failback", &[])?;
    pair.check("at home")?;
    pair.rig.finish()
}

/// The other site is gone for good: the operator makes the fenced host the owner, and later protects to the site again.
#[test]
fn a_fenced_guest_is_owned_again_by_force() -> Result<()> {
    let mut pair = Pair::new("failback-own", guest(), |_, _| Ok(()))?;
    pair.vmdr(At::A, "protect", &[])?;
    pair.wait_durable(At::A)?;
    pair.activate(At::B)?;
    pair.wait_state(At::A, "fenced")?;
    ensure!(pair.states() == ["paused", "running"], "{:?}", pair.states());
    let refused = pair.vmdr(At::A, "own", &[]).err().context("a guest that runs elsewhere was given back")?;
    ensure!(format!("{refused:#}").contains("runs there"), "{refused:#}");
    pair.lose(At::B)?;
    let owned = pair.vmdr(At::A, "own", &["--force", "--reason", "site B is gone", "--yes"])?;
    ensure!(owned["running"] == true && owned["generation"] == 3, "{owned}");
    pair.check("owned by force")?;
    // It comes back after all, with the guest that was active there off. It must not fence this one.
    pair.boot(At::B)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(pair.states() == ["running", "shut off"], "{:?}", pair.states());
    reprotect(&pair, At::A)?;
    pair.check("protected again")?;
    pair.wait_state(At::A, "protected")?;
    pair.rig.finish()
}

/// What dies in the middle of a move.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Nothing,
    SenderAgent,
    TakerReceiver,
    TakerAgent,
    Link,
}

const LOSSES: [Loss; 5] = [Loss::Nothing, Loss::SenderAgent, Loss::TakerReceiver, Loss::Link, Loss::TakerAgent];

/// Moves to and fro; something dies at a random moment of each. At most one copy runs, and there is always a way back to
/// "protected".
#[test]
fn a_move_that_is_disturbed_leaves_one_guest_and_a_way_on() -> Result<()> {
    let mut random = random::generator("failback moves");
    let mut pair = Pair::new("failback-moves", guest(), |_, _| Ok(()))?;
    pair.vmdr(At::A, "protect", &[])?;
    let mut home = At::A;
    let moves = rounds(3, 40);
    for number in 0..moves {
        let loss = if number == 0 { Loss::Nothing } else { LOSSES[1 + (number - 1 + random.random_range(0..2)) % 4] };
        let after = random::below(&mut random, Duration::from_millis(2500));
        pair.wait_durable(home)?;
        let seen = pair.rig.client().ping(pair.guest.address, ANSWER)?;
        let came = disturbed_move(&mut pair, home, loss, after)?;
        let runs = pair.wait_running(SETTLE).with_context(|| format!("{loss:?} after {after:?}"))?;
        let now = pair.rig.client().ping(pair.guest.address, ANSWER)?;
        ensure!(now.boot == seen.boot && now.tick >= seen.tick, "{loss:?}: {seen:?}, then {now:?}");
        pair.check(&format!("after {loss:?}"))?;
        println!("move {number} from {home:?}, {loss:?} after {after:?}: it runs at {runs:?}; {came}");
        if runs != home {
            home = runs;
            reprotect(&pair, home)?;
        }
        pair.wait_state(home, "protected").with_context(|| format!("after {loss:?}"))?;
    }
    pair.rig.finish()
}

/// Until nothing of the disturbed move is in its way any more.
fn reprotect(pair: &Pair, at: At) -> Result<()> {
    let begun = Instant::now();
    loop {
        match pair.vmdr(at, "reprotect", &[]) {
            Ok(_) => return Ok(()),
            Err(error) if begun.elapsed() > SETTLE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}

/// One move, and what dies in it; then everything is there again. What the command said.
fn disturbed_move(pair: &mut Pair, from: At, loss: Loss, after: Duration) -> Result<String> {
    let to = from.other();
    let over = AtomicBool::new(false);
    let twice = AtomicBool::new(false);
    let words = ["move", pair.guest.name.as_str(), "-o", "json"];
    let (said, lost) = std::thread::scope(|scope| -> Result<_> {
        // A look at where it goes to first: seen there, it must not run where it came from afterwards.
        let (rig, guest) = (&pair.rig, &pair.guest);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let running = |at| guest.state(rig.site(at)).is_ok_and(|state| state == "running");
                if running(to) && running(from) {
                    twice.store(true, Ordering::Relaxed);
                }
            }
        });
        // Where the receiver is gone its end is not waited for.
        let limit = if matches!(loss, Loss::TakerReceiver) { 6 } else { 60 };
        let command = scope.spawn(move || daemon::vmdr_output(rig.site(from), limit, &words));
        std::thread::sleep(after);
        let lost = match loss {
            Loss::Nothing => Ok(()),
            Loss::SenderAgent => kill(rig, from, "vmdr-agent"),
            Loss::TakerReceiver => kill(rig, to, "vmdr-receiver"),
            Loss::TakerAgent => kill(rig, to, "vmdr-agent"),
            Loss::Link => rig.set_link(false),
        };
        if matches!(loss, Loss::Link) {
            std::thread::sleep(Duration::from_secs(3));
            rig.set_link(true)?;
        }
        let output = command.join().map_err(|_| anyhow::anyhow!("the command's thread panicked"))??;
        let said = if output.status.success() { &output.stdout } else { &output.stderr };
        let said = String::from_utf8_lossy(said).replace('\n', " ");
        over.store(true, Ordering::Relaxed);
        Ok((said, lost))
    })?;
    lost?;
    match loss {
        Loss::SenderAgent => pair.start(from, Program::Agent)?,
        Loss::TakerReceiver => pair.start(to, Program::Receiver)?,
        Loss::TakerAgent => pair.start(to, Program::Agent)?,
        Loss::Nothing | Loss::Link => {}
    }
    ensure!(!twice.load(Ordering::Relaxed), "{loss:?} after {after:?}: the guest ran at both sites");
    Ok(said)
}

fn kill(rig: &vmdr_tests::rig::Rig, at: At, program: &str) -> Result<()> {
    for pid in rig.site(at).processes_named(program) {
        vmdr_tests::exec::signal(pid, rustix::process::Signal::KILL)?;
    }
    Ok(())
}
