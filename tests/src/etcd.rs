//! A witness in the network between the sites: an etcd of one member.

use crate::exec;
use crate::rig::{RELAY_ADDRESS, Rig};
use crate::wait::wait_for;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

const PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
const LIMIT: Duration = Duration::from_secs(60);

/// A running etcd; dropping it kills it.
pub struct Etcd {
    data: PathBuf,
    process: Option<Child>,
}

/// Its endpoint, for both daemons.
pub fn url() -> String {
    format!("http://{RELAY_ADDRESS}:{PORT}")
}

impl Etcd {
    /// Starts one that has nothing.
    pub fn start(rig: &Rig) -> Result<Self> {
        let mut etcd = Self { data: rig.directory().join("etcd"), process: None };
        etcd.up(rig)?;
        Ok(etcd)
    }

    /// Starts it again, with what it had.
    pub fn up(&mut self, rig: &Rig) -> Result<()> {
        let (client, peer) = (url(), format!("http://{RELAY_ADDRESS}:{PEER_PORT}"));
        let log = File::options().create(true).append(true).open(self.data.with_extension("log"))?;
        let child = rig
            .wan_program("etcd")
            .arg("--data-dir")
            .arg(&self.data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--heartbeat-interval", "100"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share etcd's log")?)
            .stderr(log)
            .spawn()
            .context("run etcd (package etcd-server)")?;
        self.process = Some(child);
        let at = SocketAddr::from((RELAY_ADDRESS, PORT));
        wait_for("etcd", LIMIT, || {
            if let Some(process) = &mut self.process
                && let Some(status) = process.try_wait().context("look at etcd")?
            {
                let log = fs::read_to_string(self.data.with_extension("log")).unwrap_or_default();
                bail!("etcd ended with {status}: {}", log.lines().last().unwrap_or_default());
            }
            Ok(rig.client().tcp(at, Duration::from_secs(1)).ok().map(|_| ()))
        })
    }

    /// SIGKILL. What it has stays.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        // What was started is nsenter, whose only child is etcd.
        for pid in exec::children(process.id()) {
            // It may be ending already: the wait below decides.
            let _ = exec::signal(pid, Signal::KILL);
        }
        wait_for("the end of etcd", LIMIT, || Ok(process.try_wait().context("look at etcd")?.map(|_| ())))
    }

    /// It has nothing any more; it must not run.
    pub fn wipe(&self) -> Result<()> {
        remove(&self.data)
    }
}

fn remove(data: &Path) -> Result<()> {
    fs::remove_dir_all(data).with_context(|| format!("remove {}", data.display()))
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("rig: etcd could not be ended: {error:#}");
        }
    }
}
