//! Automatic failover with real daemons, guests and an etcd: whatever single thing fails, the guest runs on where it is; when its
//! host is lost, or cannot be told from one that is, it is taken; and at no moment does it execute at both sites, which somebody
//! looks for every 10 ms.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vmdr_tests::client::{Client, Pong};
use vmdr_tests::etcd::{self, Etcd};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::observer::Observer;
use vmdr_tests::rig::{At, RELAY_ADDRESS, Way};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;
use vmdr_tests::{exec, random};

const LEASE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(3);
/// Longer than any of the two, and what comes of them.
const LONG: Duration = Duration::from_secs(9);
/// Until a guest that may be taken runs at the other site.
const TAKEN: Duration = Duration::from_secs(90);
const ARMED: Duration = Duration::from_secs(120);
/// A host that was frozen and goes on: one look at the clock (50 ms) and the time that stopping takes (300 ms), and what a busy
/// machine adds to that.
const THAWED: Duration = Duration::from_millis(700);

/// A guest at site A whose failover is automatic, and armed.
struct Case {
    scene: Scene,
    etcd: Etcd,
    observer: Observer,
    client: Client,
}

fn guest() -> GuestSpec {
    let workload = "--ram-mib 24 --pages 100 --interval-ms 20 --record-bytes 65536 --records 64 --readers 1";
    GuestSpec::linux("web1").memory(128).workload(workload)
}

impl Case {
    fn new(name: &str) -> Result<Self> {
        let mut scene = Scene::new(name, guest())?;
        let etcd = Etcd::start(&scene.rig)?;
        let witness = format!("[witness]\nendpoints = [{:?}]\ntimeout_ms = 1000\n", etcd::url());
        scene.configure_agent(&format!("{witness}lease_seconds = {}\n", LEASE.as_secs()));
        scene.configure_receiver(&format!("{witness}[failover]\nafter_seconds = {}\n", SILENCE.as_secs()));
        scene.start_receiver()?;
        scene.start_agent()?;
        let observer = Observer::start(&scene.rig, &scene.guest.name)?;
        let client = scene.rig.client().clone();
        client.ping(scene.guest.address, ANSWER)?;
        scene.protect(&["--interval", "100ms", "--failover", "auto"])?;
        let case = Self { scene, etcd, observer, client };
        case.wait_armed(true)?;
        Ok(case)
    }

    /// Whether site B would take the guest, as its metrics say.
    fn armed(&self) -> Option<bool> {
        let words = ["-sS", "--max-time", "10", "http://127.0.0.1:7421/metrics"];
        let metrics = self.scene.rig.site(At::B).run("curl", &words).ok()?;
        let line = metrics.lines().find(|line| line.starts_with("vmdr_receiver_domain_failover_armed{"))?;
        Some(line.ends_with(" 1"))
    }

    fn wait_armed(&self, armed: bool) -> Result<()> {
        wait_for(&format!("site B armed: {armed}"), ARMED, || {
            self.runs_once()?;
            Ok((self.armed() == Some(armed)).then_some(()))
        })
        .with_context(|| format!("site A says {:?}", self.scene.status(At::A)))
    }

    /// At no moment at both sites.
    fn runs_once(&self) -> Result<()> {
        let both = self.observer.both();
        ensure!(both.is_none(), "IT EXECUTES AT BOTH SITES: {both:?}");
        Ok(())
    }

    /// For so long it runs at site A, and nowhere else.
    fn stays(&self, when: &str, time: Duration) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < time {
            self.runs_once()?;
            ensure!(self.observer.seen(At::B).first.is_none(), "{when}: it was taken");
            ensure!(self.observer.executes(At::A, Duration::from_secs(3)), "{when}: it stands still");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// It goes on at site B, by itself, from where it was; gives how long that took.
    fn taken(&self, seen: &Pong) -> Result<Duration> {
        let begun = Instant::now();
        wait_for("the guest to be taken", TAKEN, || {
            self.runs_once()?;
            Ok(self.observer.executes(At::B, Duration::from_secs(1)).then_some(()))
        })
        .with_context(|| format!("site B says {:?}", self.scene.status(At::B)))?;
        let took = begun.elapsed();
        let back = self.client.ping(self.scene.guest.address, ANSWER)?;
        ensure!(back.boot == seen.boot && back.tick >= seen.tick, "{seen:?} was durable, {back:?} came back");
        self.client.self_check(self.scene.guest.address)?;
        Ok(took)
    }

    /// What the guest says, which is durable at site B.
    fn durable(&self) -> Result<Pong> {
        let seen = self.client.ping(self.scene.guest.address, ANSWER)?;
        self.scene.wait_durable()?;
        Ok(seen)
    }

    fn finish(mut self) -> Result<()> {
        self.runs_once()?;
        drop(self.observer);
        self.etcd.kill()?;
        self.scene.rig.finish()
    }
}

#[test]
fn whatever_single_thing_fails_it_runs_on_and_when_its_host_is_lost_it_is_taken() -> Result<()> {
    let mut case = Case::new("failover")?;
    let rig = |case: &Case, at: At, peer| case.scene.rig.cut(at, peer, Way::Both);

    rig(&case, At::A, At::B.address())?;
    case.stays("the link between the sites is cut", LONG)?;
    case.scene.rig.mend(At::A)?;
    case.scene.wait_protected(ARMED)?;

    case.scene.rig.cut(At::B, At::A.address(), Way::In)?;
    case.stays("what site A sends to site B is lost", LONG)?;
    case.scene.rig.mend(At::B)?;
    case.scene.wait_protected(ARMED)?;
    case.wait_armed(true)?;

    rig(&case, At::B, RELAY_ADDRESS)?;
    case.stays("site B does not reach the witness", LONG)?;
    case.scene.rig.mend(At::B)?;

    rig(&case, At::A, RELAY_ADDRESS)?;
    case.wait_armed(false)?;
    case.stays("site A does not reach the witness", LONG)?;
    case.scene.rig.mend(At::A)?;
    case.wait_armed(true)?;

    let seen = case.durable()?;
    case.scene.lose_site_a()?;
    let took = case.taken(&seen)?;
    println!("failover: {:.1} s from the loss of the site to the guest that runs", took.as_secs_f64());
    case.finish()
}

#[test]
fn an_etcd_that_is_killed_or_wiped_and_daemons_that_are_killed_do_not_stop_it() -> Result<()> {
    for _ in 0..random::rounds(1, 3) {
        kills()?;
    }
    Ok(())
}

fn kills() -> Result<()> {
    let mut case = Case::new("failover-kills")?;
    case.etcd.kill()?;
    case.wait_armed(false)?;
    case.stays("etcd is dead", LONG)?;
    // And then the link, too: site B had disarmed.
    case.scene.rig.cut(At::A, At::B.address(), Way::Both)?;
    case.stays("etcd is dead, and the link is cut", LONG)?;
    case.scene.rig.mend(At::A)?;
    case.etcd.up(&case.scene.rig)?;
    case.wait_armed(true)?;

    case.etcd.kill()?;
    case.etcd.wipe()?;
    case.etcd.up(&case.scene.rig)?;
    case.stays("etcd was wiped", LONG)?;
    case.wait_armed(true)?;

    let mut random = random::generator("failover-kills");
    for round in 0..random::rounds(1, 3) {
        for at in [At::A, At::B] {
            let daemon = if at == At::A { &mut case.scene.agent } else { &mut case.scene.receiver };
            daemon.as_mut().context("a daemon")?.kill()?;
            std::thread::sleep(random::below(&mut random, Duration::from_secs(1)));
            if at == At::A {
                case.scene.start_agent()?
            } else {
                case.scene.start_receiver()?
            }
            // While it is being armed, as often as not.
            case.stays(&format!("{at:?}'s daemon was killed, round {round}"), random::below(&mut random, LONG))?;
        }
    }
    case.scene.wait_protected(ARMED)?;
    case.wait_armed(true)?;

    // The receiver dies while it takes the guest, again and again.
    let seen = case.durable()?;
    case.scene.lose_site_a()?;
    for _ in 0..3 {
        std::thread::sleep(SILENCE + random::below(&mut random, LEASE));
        case.scene.receiver.as_mut().context("a receiver")?.kill()?;
        case.scene.start_receiver()?;
    }
    case.taken(&seen)?;
    case.finish()
}

#[test]
fn a_host_that_reaches_nobody_stops_its_guest_before_it_is_taken() -> Result<()> {
    let case = Case::new("failover-alone")?;
    let seen = case.durable()?;
    case.scene.rig.cut(At::A, At::B.address(), Way::Both)?;
    case.scene.rig.cut(At::A, RELAY_ADDRESS, Way::Both)?;
    let took = case.taken(&seen)?;
    let (a, b) = (case.observer.seen(At::A).last, case.observer.seen(At::B).first);
    let pause = b.context("it executes at B")?.duration_since(a.context("it executed at A")?);
    println!("failover: taken after {took:.1?}, it stood still for {pause:.1?}");
    // It hears of that, and stays as it is.
    case.scene.rig.mend(At::A)?;
    wait_for("site A to be fenced", ARMED, || {
        case.runs_once()?;
        let status = case.scene.status(At::A)?;
        Ok(status.to_string().contains("fenced").then_some(()))
    })
    .with_context(|| format!("site A says {:?}", case.scene.status(At::A)))?;
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        case.runs_once()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    case.finish()
}

/// What all of this rests on. An operator who activates while the host runs, and nobody hears of the other, has two.
#[test]
fn the_observer_sees_where_it_executes_and_that_two_do() -> Result<()> {
    let scene = Scene::new("failover-observer", guest())?;
    let observer = Observer::start(&scene.rig, &scene.guest.name)?;
    scene.rig.client().ping(scene.guest.address, ANSWER)?;
    let second = Duration::from_secs(1);
    ensure!(observer.executes(At::A, second) && observer.seen(At::B).first.is_none());
    // Before there are cuts: one that is under way at that moment ends its own pause.
    let site = scene.rig.site(At::A);
    site.virsh(&["suspend", &scene.guest.name])?;
    std::thread::sleep(3 * second);
    ensure!(!observer.executes(At::A, 2 * second), "a paused guest executes");
    site.virsh(&["resume", &scene.guest.name])?;
    wait_for("the guest to execute", ANSWER, || Ok(observer.executes(At::A, second).then_some(())))?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    ensure!(observer.both().is_none());
    scene.rig.set_link(false)?;
    scene.activate()?;
    wait_for("two that execute", ANSWER, || Ok(observer.both().filter(|both| *both > second)))?;
    drop(observer);
    scene.rig.finish()
}

/// The bound of the rule: user space cannot do better than to look at the clock first of all.
#[test]
fn a_host_that_was_frozen_runs_its_guest_for_no_longer_than_the_bound() -> Result<()> {
    for _ in 0..random::rounds(1, 3) {
        let case = Case::new("failover-frozen")?;
        let seen = case.durable()?;
        let site = case.scene.rig.site(At::A);
        let all = site.processes();
        for pid in &all {
            exec::signal(*pid, Signal::STOP)?;
        }
        case.taken(&seen)?;
        std::thread::sleep(Duration::from_secs(1));
        let thawed = Instant::now();
        for pid in &all {
            // Some may have been waited for by one that was stopped later.
            let _ = exec::signal(*pid, Signal::CONT);
        }
        std::thread::sleep(LONG);
        let last = case.observer.seen(At::A).last.context("it executed at A")?;
        let ran = last.saturating_duration_since(thawed);
        println!("failover: a host that was frozen ran its guest for {ran:?}");
        ensure!(ran < THAWED, "its guest ran for {ran:?} after it was thawed");
        drop(case.observer);
        case.scene.rig.finish()?;
    }
    Ok(())
}
