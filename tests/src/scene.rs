//! The scene most end-to-end cases begin with: a guest with a workload at site A, an agent there, a receiver at site B.

use crate::client::Pong;
use crate::daemon::{self, Daemon, Program};
use crate::guest::GuestSpec;
use crate::oracle;
use crate::rig::{self, At, Rig};
use crate::wait::wait_for;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long the first copy of a test guest may take on a busy machine.
pub const PROTECT_SECONDS_MAX: u64 = 240;
/// How long an activation of a test guest may take.
pub const ACTIVATE_SECONDS_MAX: u64 = 120;
/// How long an epoch may take until it is durable, or a reconnection until it is done.
pub const PROGRESS_SECONDS_MAX: u64 = 60;
/// Rest between two looks at the status: each is three processes, which would take a good part of a small machine.
const STATUS_LOOK: Duration = Duration::from_millis(100);
/// How long a guest that runs may take to answer.
pub const ANSWER: Duration = Duration::from_secs(30);

/// Rig, guest and daemons. Fields are dropped in this order.
pub struct Scene {
    /// The agent at site A.
    pub agent: Option<Daemon>,
    /// The receiver at site B.
    pub receiver: Option<Daemon>,
    /// The sites.
    pub rig: Rig,
    /// The guest, which runs at site A at first.
    pub guest: GuestSpec,
    agent_config: String,
    receiver_config: String,
    receiver_environment: Vec<(&'static str, &'static str)>,
}

impl Scene {
    /// Sites up, daemons up, the guest booted.
    pub fn new(name: &str, guest: GuestSpec) -> Result<Self> {
        Self::with_receiver_at(name, guest, &At::B.receiver())
    }

    /// The same with the agent connecting to another address, such as a relay's.
    pub fn with_receiver_at(name: &str, guest: GuestSpec, receiver: &str) -> Result<Self> {
        Self::prepared(name, guest, receiver, |_, _| Ok(())).map(|(scene, ())| scene)
    }

    /// The same with something that the guest needs made before it boots.
    pub fn prepared<T>(
        name: &str,
        guest: GuestSpec,
        receiver: &str,
        prepare: impl FnOnce(&Rig, &GuestSpec) -> Result<T>,
    ) -> Result<(Self, T)> {
        Self::on(Rig::new(name)?, guest, receiver, prepare)
    }

    /// The same with sites that have never met: nothing can be protected before they are paired.
    pub fn strangers(name: &str, guest: GuestSpec) -> Result<Self> {
        let rig = Rig::new(name)?;
        rig::unpair(&rig)?;
        Self::on(rig, guest, &At::B.receiver(), |_, _| Ok(())).map(|(scene, ())| scene)
    }

    fn on<T>(
        rig: Rig,
        guest: GuestSpec,
        receiver: &str,
        prepare: impl FnOnce(&Rig, &GuestSpec) -> Result<T>,
    ) -> Result<(Self, T)> {
        let agent_config = format!("receiver = \"{receiver}\"\n");
        let (receiver_config, receiver_environment) = (String::new(), Vec::new());
        let mut scene =
            Self { agent: None, receiver: None, rig, guest, agent_config, receiver_config, receiver_environment };
        scene.start_receiver()?;
        scene.start_agent()?;
        let prepared = prepare(&scene.rig, &scene.guest)?;
        scene.guest.boot(scene.rig.site(At::A))?;
        Ok((scene, prepared))
    }

    /// Adds lines to the agent's configuration, for its next start.
    pub fn configure_agent(&mut self, lines: &str) {
        self.agent_config.push_str(lines);
    }

    /// Adds lines to the receiver's configuration, for its next start.
    pub fn configure_receiver(&mut self, lines: &str) {
        self.receiver_config.push_str(lines);
    }

    /// Puts lines in place of a section of the receiver's configuration, which must be its last, for its next start.
    pub fn reconfigure_receiver(&mut self, section: &str, lines: &str) {
        let end = self.receiver_config.find(section).unwrap_or(self.receiver_config.len());
        self.receiver_config.truncate(end);
        self.receiver_config.push_str(lines);
    }

    /// Adds a variable to the receiver's environment, for its next start.
    pub fn set_receiver_environment(&mut self, name: &'static str, value: &'static str) {
        self.receiver_environment.push((name, value));
    }

    /// Starts the agent, or starts it again.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = None;
        self.agent = Some(Daemon::start(self.rig.site(At::A), Program::Agent, &self.agent_config)?);
        Ok(())
    }

    /// Starts the receiver, or starts it again.
    pub fn start_receiver(&mut self) -> Result<()> {
        self.receiver = None;
        let (site, environment) = (self.rig.site(At::B), &self.receiver_environment);
        self.receiver = Some(Daemon::start_with(site, Program::Receiver, &self.receiver_config, environment)?);
        Ok(())
    }

    /// `vmdr pair` at site B, and at site A with the token that it shows.
    pub fn pair(&self) -> Result<()> {
        let shown = daemon::vmdr_json(self.rig.site(At::B), &["pair"])?;
        let token = shown["token"].as_str().context("no token is shown")?;
        let joined = daemon::vmdr_typed(self.rig.site(At::A), &["pair", "--with", &At::B.receiver()], token)?;
        if !joined.status.success() {
            bail!("vmdr pair --with ended with {}: {}", joined.status, String::from_utf8_lossy(&joined.stderr).trim());
        }
        Ok(())
    }

    /// `vmdr protect` with these further words, to its end.
    pub fn protect(&self, words: &[&str]) -> Result<()> {
        let words = [&["protect", self.guest.name.as_str()], words].concat();
        let output = daemon::vmdr_output(self.rig.site(At::A), PROTECT_SECONDS_MAX, &words)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("vmdr {} ended with {}: {}", words.join(" "), output.status, said.trim());
        }
        Ok(())
    }

    /// What the daemon of a site says of the guest.
    pub fn status(&self, at: At) -> Result<Value> {
        let document = daemon::vmdr_json(self.rig.site(at), &["status", &self.guest.name])?;
        let domains = document["domains"].as_array().context("status has no domains")?;
        domains.first().cloned().with_context(|| format!("{} knows nothing of the guest", self.rig.site(at).name()))
    }

    /// A number out of the status.
    pub fn status_number(&self, at: At, key: &str) -> Result<f64> {
        let status = self.status(at)?;
        status[key].as_f64().with_context(|| format!("{key} is no number in {status}"))
    }

    /// Waits until a recovery point exists that was cut after this call, and gives its epoch.
    pub fn wait_durable(&self) -> Result<u64> {
        // An agent that has just started does not know yet how far the shim has cut.
        let limit = Duration::from_secs(PROTECT_SECONDS_MAX);
        let cut = wait_for("the guest to be protected", limit, || {
            std::thread::sleep(STATUS_LOOK);
            let status = self.status(At::A)?;
            let durable = status["durable_epoch"].as_u64();
            Ok(status["epoch"].as_u64().filter(|cut| status["state"] == "protected" && Some(*cut) >= durable))
        })
        .with_context(|| format!("the agent's status is {:?}", self.status(At::A)))?;
        // Whatever had been cut before is of no use: the next one was cut after.
        self.wait_durable_epoch(cut + 1)
    }

    /// Waits until this epoch, or a later one, is acknowledged; gives the one that is.
    pub fn wait_durable_epoch(&self, epoch: u64) -> Result<u64> {
        let limit = Duration::from_secs(PROGRESS_SECONDS_MAX);
        let what = format!("epoch {epoch} to be durable");
        wait_for(&what, limit, || {
            std::thread::sleep(STATUS_LOOK);
            let durable = self.status_number(At::A, "durable_epoch")? as u64;
            Ok((durable >= epoch).then_some(durable))
        })
        .with_context(|| format!("the agent's status is {:?}", self.status(At::A)))
    }

    /// The process id of the guest's shim, outside.
    pub fn shim(&self) -> Result<u32> {
        let site = self.rig.site(At::A);
        let limit = Duration::from_secs(PROGRESS_SECONDS_MAX);
        wait_for("a shim", limit, || Ok(site.processes_named("vmdr-shim").first().copied()))
    }

    /// Waits until the guest is in state `protected`, and gives how long that took.
    pub fn wait_protected(&self, limit: Duration) -> Result<Duration> {
        let begun = Instant::now();
        wait_for("the guest to be protected", limit, || {
            std::thread::sleep(STATUS_LOOK);
            // An agent or receiver that is being restarted does not answer.
            Ok(self.status(At::A).is_ok_and(|status| status["state"] == "protected").then_some(()))
        })
        .with_context(|| format!("the agent's status is {:?}", self.status(At::A)))?;
        Ok(begun.elapsed())
    }

    /// The oracle: the guest is held, what it and its disks hold is read by paths that share nothing with vmdr's, and the
    /// standby must be that, byte for byte. Then it is released. Gives the epoch.
    pub fn compare_held(&self) -> Result<u64> {
        let site = self.rig.site(At::A);
        let limit = Duration::from_secs(PROTECT_SECONDS_MAX);
        let held = wait_for("the guest to be held", limit, || {
            let output = daemon::vmdr_output(site, PROGRESS_SECONDS_MAX, &["hold", &self.guest.name, "-o", "json"])?;
            let said = String::from_utf8_lossy(&output.stderr);
            match output.status.success() {
                true => Ok(Some(serde_json::from_slice::<Value>(&output.stdout).context("read the answer to hold")?)),
                // A writer at the limit of what the machine carries is behind again and again.
                false if said.contains("not protected") => Ok(None),
                false => bail!("vmdr hold: {}", said.trim()),
            }
        })?;
        let epoch = held["epoch"].as_u64().context("the epoch it is held at")?;
        let standby = self.rig.site(At::B).path("/var/lib/vmdr/receiver");
        let mut last = Vec::new();
        // Applying an epoch to the standby may take a moment after it is durable.
        let equal = wait_for("the standby to be what was read", ANSWER, || {
            last = oracle::differences(site, &self.guest, &standby)?;
            Ok(last.is_empty().then_some(()))
        });
        equal.with_context(|| format!("epoch {epoch}: {last:?}"))?;
        daemon::vmdr(site, &["release", &self.guest.name])?;
        Ok(epoch)
    }

    /// SIGKILL for everything at site A.
    pub fn lose_site_a(&mut self) -> Result<()> {
        self.rig.kill_site(At::A)?;
        self.agent = None;
        Ok(())
    }

    /// `vmdr activate --yes --wait` at site B; gives the report.
    pub fn activate(&self) -> Result<Value> {
        let words = ["activate", self.guest.name.as_str(), "--yes", "--wait", "-o", "json"];
        let output = daemon::vmdr_output(self.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("vmdr {} ended with {}: {} {}", words.join(" "), output.status, err.trim(), out.trim());
        }
        let document: Value = serde_json::from_str(&out).with_context(|| format!("read the report: {out}"))?;
        Ok(document["report"].clone())
    }

    /// Checks that the guest, which was activated, goes on from where it was: not booted, no tick older than at `begun`, RAM and disk as
    /// they were, and writing.
    pub fn check_resumed(&self, begun: &Pong) -> Result<()> {
        let (client, address) = (self.rig.client(), self.guest.address);
        let after = client.ping(address, ANSWER)?;
        ensure!(after.boot == begun.boot, "the guest was booted, not resumed");
        ensure!(begun.tick <= after.tick, "tick {} after {}", after.tick, begun.tick);
        client.self_check(address).context("RAM and disk as they were restored")?;
        let on = client.wait_tick(address, after.tick + 20, ANSWER)?;
        ensure!(on.acknowledged > after.acknowledged, "it does not write its disk");
        client.self_check(address).context("RAM and disk after going on")?;
        Ok(())
    }
}
