//! Two sites of which either protects to the other: agent and receiver at both, and a guest that moves between them.

use crate::daemon::{self, Daemon, Program};
use crate::guest::GuestSpec;
use crate::rig::{At, Rig};
use crate::scene::{ANSWER, PROTECT_SECONDS_MAX};
use crate::wait::wait_for;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Rest between two looks at a status.
const LOOK: Duration = Duration::from_millis(100);

/// Rig, guest and daemons. Fields are dropped in this order.
pub struct Pair {
    agents: [Option<Daemon>; 2],
    receivers: [Option<Daemon>; 2],
    receiver_configs: [String; 2],
    /// The sites.
    pub rig: Rig,
    /// The guest, which runs at site A at first.
    pub guest: GuestSpec,
}

impl Pair {
    /// Sites up, daemons up at both; the guest is booted at A, after `prepare`.
    pub fn new(name: &str, guest: GuestSpec, prepare: impl FnOnce(&Rig, &GuestSpec) -> Result<()>) -> Result<Self> {
        let rig = Rig::new(name)?;
        let receiver_configs = [String::new(), String::new()];
        let mut pair = Self { agents: [None, None], receivers: [None, None], receiver_configs, rig, guest };
        for at in At::ALL {
            pair.start(at, Program::Receiver)?;
            pair.start(at, Program::Agent)?;
        }
        pair.guest.define(pair.rig.site(At::A))?;
        prepare(&pair.rig, &pair.guest)?;
        pair.rig.site(At::A).virsh(&["start", &pair.guest.name])?;
        let limit = Duration::from_secs(crate::guest::BOOT_SECONDS_MAX);
        pair.guest.wait_console(pair.rig.site(At::A), "workload ready", limit)?;
        Ok(pair)
    }

    fn slot(&mut self, at: At, program: Program) -> &mut Option<Daemon> {
        match program {
            Program::Agent => &mut self.agents[at as usize],
            Program::Receiver => &mut self.receivers[at as usize],
        }
    }

    /// Gives a receiver this configuration, from its next start on.
    pub fn configure_receiver(&mut self, at: At, lines: &str) {
        lines.clone_into(&mut self.receiver_configs[at as usize]);
    }

    /// Starts a daemon, or starts it again.
    pub fn start(&mut self, at: At, program: Program) -> Result<()> {
        let config = match program {
            Program::Agent => format!("receiver = \"{}\"\n", at.other().receiver()),
            Program::Receiver => self.receiver_configs[at as usize].clone(),
        };
        *self.slot(at, program) = None;
        let daemon = Daemon::start(self.rig.site(at), program, &config)?;
        *self.slot(at, program) = Some(daemon);
        Ok(())
    }

    /// SIGKILL for everything at a site.
    pub fn lose(&mut self, at: At) -> Result<()> {
        self.rig.kill_site(at)?;
        *self.slot(at, Program::Agent) = None;
        *self.slot(at, Program::Receiver) = None;
        Ok(())
    }

    /// Powers a lost site on: libvirtd first, the daemons after it, as on a host that boots.
    pub fn boot(&mut self, at: At) -> Result<()> {
        self.rig.boot_site(at)?;
        self.start(at, Program::Receiver)?;
        self.start(at, Program::Agent)
    }

    /// A `vmdr` command about the guest, which has to succeed; its document.
    pub fn vmdr(&self, at: At, command: &str, words: &[&str]) -> Result<Value> {
        let words = [&[command, self.guest.name.as_str()], words, &["-o", "json"]].concat();
        let output = daemon::vmdr_output(self.rig.site(at), PROTECT_SECONDS_MAX, &words)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "vmdr {} ended with {}: {}", words.join(" "), output.status, err.trim());
        serde_json::from_str(&out).with_context(|| format!("read the document of vmdr {}: {out}", words.join(" ")))
    }

    /// What a daemon of a site says of the guest: the agent, if it knows it.
    pub fn status(&self, at: At, daemon: &str) -> Result<Value> {
        let document = daemon::vmdr_json(self.rig.site(at), &["status"])?;
        let domains = document["domains"].as_array().context("status has no domains")?;
        let mut ours = domains.iter().filter(|d| d["name"] == self.guest.name.as_str() && d["daemon"] == daemon);
        ours.next().cloned().with_context(|| format!("the {daemon} of {:?} knows nothing of the guest", at))
    }

    /// Waits for a state of the guest at an agent.
    pub fn wait_state(&self, at: At, state: &str) -> Result<()> {
        wait_for(&format!("state {state} at {at:?}"), Duration::from_secs(PROTECT_SECONDS_MAX), || {
            std::thread::sleep(LOOK);
            Ok(self.status(at, "agent").is_ok_and(|status| status["state"] == state).then_some(()))
        })
        .with_context(|| format!("the status is {:?}", self.status(at, "agent")))
    }

    /// Waits until something cut after this call is durable.
    pub fn wait_durable(&self, at: At) -> Result<()> {
        self.wait_state(at, "protected")?;
        let number = |key: &str| Ok::<_, anyhow::Error>(self.status(at, "agent")?[key].as_u64().unwrap_or(0));
        let cut = number("epoch")?;
        wait_for("a durable epoch", ANSWER, || {
            std::thread::sleep(LOOK);
            Ok((number("durable_epoch")? > cut).then_some(()))
        })
    }

    /// `vmdr activate` at a site.
    pub fn activate(&self, at: At) -> Result<Value> {
        Ok(self.vmdr(at, "activate", &["--yes", "--wait"])?["report"].clone())
    }

    /// Where libvirt has the guest running or paused, by site; a site that is down has nothing.
    pub fn states(&self) -> [String; 2] {
        At::ALL.map(|at| match self.rig.site(at).is_up() {
            true => self.guest.state(self.rig.site(at)).unwrap_or_default(),
            false => String::new(),
        })
    }

    /// What an agent has counted for the guest since it was started.
    pub fn metric(&self, at: At, name: &str) -> Result<f64> {
        let url = "http://127.0.0.1:7422/metrics";
        let metrics = self.rig.site(at).run("curl", &["-sS", "--max-time", "10", url])?;
        let line = metrics.lines().find(|line| line.starts_with(&format!("{name}{{")));
        // Before its first part there is no such line.
        Ok(line.and_then(|line| line.rsplit(' ').next()).map_or(Ok(0.0), str::parse)?)
    }

    /// The guest's own self-check, and that it goes on, also with its disk.
    pub fn check(&self, what: &str) -> Result<()> {
        let (client, address) = (self.rig.client(), self.guest.address);
        let now = client.ping(address, ANSWER).with_context(|| what.to_owned())?;
        client.self_check(address).with_context(|| what.to_owned())?;
        let on = client.wait_tick(address, now.tick + 5, ANSWER).with_context(|| what.to_owned())?;
        ensure!(on.boot == now.boot, "{what}: the guest was booted anew");
        Ok(())
    }

    /// Waits until the guest runs at exactly one site, and says which.
    pub fn wait_running(&self, limit: Duration) -> Result<At> {
        let begun = Instant::now();
        loop {
            let states = self.states();
            match states.each_ref().map(|state| state == "running") {
                [true, false] => return Ok(At::A),
                [false, true] => return Ok(At::B),
                [true, true] => bail!("the guest runs at both sites"),
                [false, false] if begun.elapsed() > limit => {
                    let status = At::ALL.map(|at| self.status(at, "agent"));
                    bail!("the guest runs nowhere: {states:?}, {status:?}");
                }
                [false, false] => std::thread::sleep(LOOK),
            }
        }
    }
}
