//! Anything, in any order, for a long time: after each operation the standby is the guest, byte for byte; after each
//! `unprotect` nothing is left over; and the daemons do not grow.
//!
//! Operations come from a deck that is shuffled anew when it is empty, so that all occur. The seed decides everything; a failure
//! names it. `VMDR_SOAK_OPERATIONS` sets how many.

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vmdr_tests::client::Client;
use vmdr_tests::daemon::{self, Daemon};
use vmdr_tests::exec;
use vmdr_tests::footprint::{AGENT_BYTES_MAX, Footprint, RECEIVER_BYTES_MAX};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::leftovers::Inventory;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;
use vmdr_tests::wire::{Weather, Wire};

const WORKLOAD: &str = "--ram-mib 24 --pages 100 --interval-ms 25 --record-bytes 32768 --records 128 --readers 1";
const OPERATIONS_VARIABLE: &str = "VMDR_SOAK_OPERATIONS";
/// How long an operation may take until the guest is protected again: a resync of an emulated guest on a busy machine.
const PROTECTED_LIMIT: Duration = Duration::from_secs(240);
/// How long a guest may take to boot, or to let go of a device.
const GUEST_LIMIT: Duration = Duration::from_secs(120);
/// How long what ends may take to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(30);
/// What a daemon may keep more in the last quarter of a run than it kept in the first half: the allocator keeps what it
/// once needed, and threads that wait for work come and go.
const GROWTH_BYTES_MAX: u64 = 16 << 20;
/// How long a daemon is watched for a moment between two pieces of work.
const REST_LIMIT: Duration = Duration::from_secs(10);
const GROWTH_DESCRIPTORS_MAX: usize = 12;
/// The NIC that comes and goes.
const NIC: [&str; 2] = ["--mac", "52:54:00:77:00:01"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Load,
    OperatorSuspends,
    Reboot,
    AgentKilled,
    AgentRestarted,
    AgentStopped,
    ShimKilled,
    ShimStopped,
    ReceiverKilled,
    ReceiverRestarted,
    Nic,
    LinkCut,
    LinkBad,
    SuspendAndResume,
    Unprotect,
}

const DECK: [Operation; 15] = [
    Operation::Load,
    Operation::OperatorSuspends,
    Operation::Reboot,
    Operation::AgentKilled,
    Operation::AgentRestarted,
    Operation::AgentStopped,
    Operation::ShimKilled,
    Operation::ShimStopped,
    Operation::ReceiverKilled,
    Operation::ReceiverRestarted,
    Operation::Nic,
    Operation::LinkCut,
    Operation::LinkBad,
    Operation::SuspendAndResume,
    Operation::Unprotect,
];

/// The scene, and what is needed to judge it.
struct Soak {
    scene: Scene,
    client: Client,
    wire: Wire,
    random: StdRng,
    before: Inventory,
    /// The guest has the second NIC.
    nic: bool,
    agents: Vec<Footprint>,
    receivers: Vec<Footprint>,
}

impl Soak {
    fn new(mut random: StdRng) -> Result<Self> {
        let mut guest = GuestSpec::linux("web1").memory(112).workload(WORKLOAD);
        // Any slot of its bus takes a NIC while it runs.
        guest.machine = "pc";
        let (scene, wire) = Scene::prepared("soak", guest, &At::B.receiver(), |rig, _| rig.wire(&mut random))?;
        let client = scene.rig.client().clone();
        let before = Inventory::take(&scene.rig, &scene.guest)?;
        let (agents, receivers) = (Vec::new(), Vec::new());
        let soak = Self { scene, client, wire, random, before, nic: false, agents, receivers };
        soak.protect()?;
        Ok(soak)
    }

    fn protect(&self) -> Result<()> {
        self.scene.protect(&["--interval", "50ms"])
    }

    fn below(&mut self, milliseconds: u64) -> Duration {
        random::below(&mut self.random, Duration::from_millis(milliseconds))
    }

    fn virsh(&self, words: &[&str]) -> Result<String> {
        self.scene.rig.site(At::A).virsh(words)
    }

    fn run(&mut self, operation: Operation) -> Result<()> {
        let address = self.scene.guest.address;
        std::thread::sleep(self.below(300));
        match operation {
            Operation::Load => {
                let (pages, interval) = (self.random.random_range(1..800), self.random.random_range(10..60));
                self.client.set(address, &format!("pages={pages} interval={interval}"), ANSWER)?;
                std::thread::sleep(Duration::from_secs(1));
            }
            Operation::OperatorSuspends => self.operator_suspends()?,
            Operation::Reboot => {
                let boot = self.client.ping(address, ANSWER)?.boot;
                self.virsh(&["reset", &self.scene.guest.name])?;
                wait_for("the guest to boot anew", GUEST_LIMIT, || {
                    Ok(self
                        .client
                        .ping(address, Duration::from_secs(1))
                        .is_ok_and(|pong| pong.boot != boot)
                        .then_some(()))
                })?;
            }
            Operation::AgentKilled | Operation::AgentRestarted => {
                let agent = self.scene.agent.as_mut().context("an agent")?;
                if operation == Operation::AgentKilled {
                    agent.kill()?
                } else {
                    agent.terminate()?
                }
                std::thread::sleep(self.below(500));
                self.scene.start_agent()?;
            }
            Operation::AgentStopped => {
                self.scene.agent.as_ref().context("an agent")?.freeze()?;
                std::thread::sleep(self.below(3000));
                self.scene.agent.as_ref().context("an agent")?.thaw()?;
            }
            Operation::ShimKilled | Operation::ShimStopped => {
                let shim = self.scene.shim()?;
                // One that is stopped is ended by the agent.
                exec::signal(shim, if operation == Operation::ShimKilled { Signal::KILL } else { Signal::STOP })?;
                wait_for("the shim to be gone", GONE_LIMIT, || Ok((!exec::alive(shim)).then_some(())))?;
                wait_for("another shim", PROTECTED_LIMIT, || Ok((self.scene.shim()? != shim).then_some(())))?;
            }
            Operation::ReceiverKilled | Operation::ReceiverRestarted => {
                let receiver = self.scene.receiver.as_mut().context("a receiver")?;
                if operation == Operation::ReceiverKilled {
                    receiver.kill()?
                } else {
                    receiver.terminate()?
                }
                std::thread::sleep(self.below(1000));
                self.scene.start_receiver()?;
            }
            Operation::Nic => self.plug_or_unplug()?,
            Operation::LinkCut => {
                self.wire.weather(Weather { cut: true, ..Weather::default() });
                std::thread::sleep(self.below(3000));
                self.wire.weather(Weather::default());
            }
            Operation::LinkBad => {
                let (delay, loss) = (self.below(150), self.random.random_range(0.0..0.02));
                self.wire.weather(Weather { delay, loss, bytes_per_second: 4_000_000, cut: false });
                std::thread::sleep(self.below(3000));
                self.wire.weather(Weather::default());
            }
            Operation::SuspendAndResume => {
                let (site, name) = (self.scene.rig.site(At::A), &self.scene.guest.name);
                daemon::vmdr(site, &["suspend", name])?;
                ensure!(
                    site.processes_named("vmdr-shim").is_empty(),
                    "a shim stands beside a guest that is not protected"
                );
                self.scene.guest.expect_running(site)?;
                std::thread::sleep(random::below(&mut self.random, Duration::from_secs(1)));
                daemon::vmdr(site, &["resume", name])?;
            }
            Operation::Unprotect => {
                self.unprotect()?;
                self.protect()?;
            }
        }
        Ok(())
    }

    /// The guest is paused through libvirt, stays so, and goes on when it is resumed.
    fn operator_suspends(&mut self) -> Result<()> {
        let name = self.scene.guest.name.clone();
        let state = || self.scene.guest.state(self.scene.rig.site(At::A));
        wait_for("the guest to stay paused", GUEST_LIMIT, || {
            // Within a cut it does nothing (docs/design.md, Traps), so that it may have to be said again.
            self.virsh(&["suspend", &name])?;
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(150));
                if state()? != "paused" {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        wait_for("status to show it", GUEST_LIMIT, || {
            Ok((self.scene.status(At::A)?["state"] == "paused").then_some(()))
        })?;
        ensure!(state()? == "paused", "somebody has resumed a guest that the operator had suspended");
        self.virsh(&["resume", &name]).map(|_| ())
    }

    fn plug_or_unplug(&mut self) -> Result<()> {
        let name = self.scene.guest.name.clone();
        let mac = NIC[1];
        let has = |soak: &Self| -> Result<bool> { Ok(soak.virsh(&["domiflist", &name])?.contains(mac)) };
        if self.nic {
            wait_for("the guest to let go of the NIC", GUEST_LIMIT, || {
                // A guest that is paused, or boots, may miss it; one that is letting go already makes it an error.
                let _ = self.virsh(&["detach-interface", &name, "bridge", NIC[0], mac, "--live"]);
                std::thread::sleep(Duration::from_millis(500));
                Ok((!has(self)?).then_some(()))
            })?;
        } else {
            let words = ["attach-interface", &name, "bridge", "vmbr0", NIC[0], mac, "--model", "virtio", "--live"];
            self.virsh(&words)?;
        }
        self.nic = !self.nic;
        ensure!(has(self)? == self.nic, "the NIC is not what was asked for");
        Ok(())
    }

    /// Ends the protection: nothing may be left over.
    fn unprotect(&mut self) -> Result<()> {
        if self.nic {
            self.plug_or_unplug()?;
        }
        daemon::vmdr(self.scene.rig.site(At::A), &["unprotect", &self.scene.guest.name])?;
        let mut left = Vec::new();
        let gone = wait_for("nothing to be left over", GONE_LIMIT, || {
            left = Inventory::take(&self.scene.rig, &self.scene.guest)?.beyond(&self.before);
            Ok(left.is_empty().then_some(()))
        });
        gone.with_context(|| format!("after unprotect there is more than before protect: {left:#?}"))?;
        self.scene.guest.expect_running(self.scene.rig.site(At::A))
    }

    /// After each operation.
    fn judge(&mut self, self_check: bool) -> Result<()> {
        self.scene.wait_protected(PROTECTED_LIMIT)?;
        self.scene.wait_durable()?;
        self.scene.compare_held()?;
        if self_check {
            self.client.self_check(self.scene.guest.address)?;
        }
        let pid = |daemon: &Option<Daemon>| daemon.as_ref().map(Daemon::pid).context("a daemon");
        let (agent, receiver) = (pid(&self.scene.agent)?, pid(&self.scene.receiver)?);
        let (agent, receiver) = (at_rest(agent, least(&self.agents))?, at_rest(receiver, least(&self.receivers))?);
        self.agents.push(agent);
        self.receivers.push(receiver);
        Ok(())
    }

    /// At the end: nothing left over at all, and nothing has grown.
    fn finish(mut self) -> Result<()> {
        self.unprotect()?;
        let daemons = [("agent", &self.agents, AGENT_BYTES_MAX), ("receiver", &self.receivers, RECEIVER_BYTES_MAX)];
        for (what, taken, limit) in daemons {
            let most = taken.iter().copied().reduce(Footprint::max).unwrap_or_default();
            ensure!(most.private_bytes <= limit, "the {what}'s memory is beyond its limit: {taken:?}");
            let early = least(&taken[..taken.len().div_ceil(2)]);
            let late = least(&taken[taken.len() - taken.len().div_ceil(4)..]);
            println!("{what}: at most {most:?}; in the first half at least {early:?}, in the last quarter {late:?}");
            ensure!(
                late.private_bytes <= early.private_bytes + GROWTH_BYTES_MAX,
                "the {what}'s memory grows: {taken:?}"
            );
            ensure!(
                late.descriptors <= early.descriptors + GROWTH_DESCRIPTORS_MAX,
                "the {what}'s descriptors become more: {taken:?}"
            );
        }
        self.scene.agent.as_mut().context("an agent")?.terminate()?;
        self.scene.receiver.as_mut().context("a receiver")?.terminate()?;
        for at in At::ALL {
            for program in ["vmdr-agent", "vmdr-receiver", "vmdr-shim"] {
                let left = self.scene.rig.site(at).processes_named(program);
                ensure!(left.is_empty(), "{program} {left:?} still runs");
            }
        }
        for (at, socket) in [(At::A, vmdr_proto::AGENT_SOCKET), (At::B, vmdr_proto::RECEIVER_SOCKET)] {
            ensure!(!self.scene.rig.site(at).path(socket).exists(), "{socket} is left over");
        }
        drop(self.wire);
        self.scene.rig.finish()
    }
}

/// What it has at the least in a while is what a daemon keeps; more is the work at hand.
fn least(samples: &[Footprint]) -> Footprint {
    samples.iter().copied().reduce(Footprint::min).unwrap_or_default()
}

/// What a process has between two pieces of work: the least that it is seen with, until that is no more than before.
fn at_rest(pid: u32, before: Footprint) -> Result<Footprint> {
    let begun = Instant::now();
    let mut seen = Footprint::of(pid)?;
    while seen.private_bytes > before.private_bytes + GROWTH_BYTES_MAX && begun.elapsed() < REST_LIMIT {
        std::thread::sleep(Duration::from_millis(200));
        seen = seen.min(Footprint::of(pid)?);
    }
    Ok(seen)
}

fn operations() -> Result<usize> {
    match std::env::var(OPERATIONS_VARIABLE) {
        Ok(count) => count.parse().with_context(|| format!("{OPERATIONS_VARIABLE}={count} is no number")),
        Err(_) => Ok(random::rounds(7, 300)),
    }
}

fn soak(seed: u64, random: StdRng, count: usize) -> Result<()> {
    let begun = Instant::now();
    let mut soak = Soak::new(random)?;
    let mut deck: Vec<Operation> = Vec::new();
    let mut done: Vec<Operation> = Vec::new();
    for number in 1..=count {
        if deck.is_empty() {
            deck.extend(DECK);
            deck.shuffle(&mut soak.random);
        }
        let Some(operation) = deck.pop() else { bail!("an empty deck") };
        let started = Instant::now();
        done.push(operation);
        soak.run(operation).and_then(|()| soak.judge(number % 5 == 0 || number == count)).with_context(|| {
            format!("operation {number} of seed {seed}, {operation:?}; the last were {:?}", tail(&done))
        })?;
        println!("{number}/{count} {operation:?}: {:.1?}", started.elapsed());
    }
    soak.finish().with_context(|| format!("the end of seed {seed}, after {:?}", tail(&done)))?;
    println!("soak: {count} operations in {:.0?}, seed {seed}", begun.elapsed());
    Ok(())
}

fn tail(done: &[Operation]) -> &[Operation] {
    &done[done.len().saturating_sub(6)..]
}

#[test]
fn whatever_happens_in_whatever_order_the_standby_is_the_guest_and_nothing_is_left_over() -> Result<()> {
    let count = operations()?;
    let (seed, random) = random::seeded("soak");
    soak(seed, random, count).with_context(|| {
        format!(
            "replay it with: {}={seed} {OPERATIONS_VARIABLE}={count} cargo nextest run -p vmdr-tests --test soak --no-capture",
            random::SEED_VARIABLE
        )
    })
}
