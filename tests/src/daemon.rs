//! vmdr's own processes in a site, and the `vmdr` command.

use crate::exec;
use crate::site::Site;
use crate::wait::wait_for;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

/// How long a daemon may take until its control socket is there.
const START_SECONDS_MAX: u64 = 30;
/// The limit of a `vmdr` command, unless another is given.
const COMMAND_SECONDS_MAX: u64 = 120;

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `vmdr-agent`.
    Agent,
    /// `vmdr-receiver`.
    Receiver,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Program::Agent => "vmdr-agent",
            Program::Receiver => "vmdr-receiver",
        }
    }

    fn socket(self) -> &'static str {
        match self {
            Program::Agent => vmdr_proto::AGENT_SOCKET,
            Program::Receiver => vmdr_proto::RECEIVER_SOCKET,
        }
    }

    fn config(self) -> &'static str {
        match self {
            Program::Agent => "/etc/vmdr/agent.toml",
            Program::Receiver => "/etc/vmdr/receiver.toml",
        }
    }
}

/// Where cargo put a program of the workspace.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program")?;
    let directory = own.parent().context("find this program's directory")?;
    let directory = if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory };
    let path = directory.join(name);
    if !path.exists() {
        bail!("{} is missing: run `cargo build --workspace` first", path.display());
    }
    Ok(path)
}

/// Starts "$@" apart from this shell and prints its process id. What it was started from is the site's pid 1 then, which
/// also learns of its end: nothing outside has to, and a site can be killed whole.
const DETACH: &str = r#"setsid "$@" </dev/null >>"$LOG" 2>&1 & echo $!"#;

/// A daemon that runs in a site. Dropping it kills it.
pub struct Daemon {
    program: Program,
    pid: u32,
}

impl Daemon {
    /// Starts a daemon with this configuration file (TOML) and waits until its control socket is there.
    pub fn start(site: &Site, program: Program, config: &str) -> Result<Self> {
        Self::start_with(site, program, config, &[])
    }

    /// The same with these variables in its environment.
    pub fn start_with(site: &Site, program: Program, config: &str, environment: &[(&str, &str)]) -> Result<Self> {
        let path = site.path(program.config());
        fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
        let socket = site.path(program.socket());
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("remove a socket"),
            _ => {}
        }
        let binary = binary(program.name())?;
        let mut command = site.command("bash");
        command.env("LOG", log_path(site, program)).args(["-c", DETACH, "vmdr-rig-detach"]).arg(&binary);
        command.envs(environment.iter().copied());
        let printed = exec::run(command.args(["--config", program.config()]))?;
        let inside = printed.trim().parse().with_context(|| format!("read a process id from {printed:?}"))?;
        // One that ended at once is found below by what it logged.
        let daemon = Self { program, pid: site.outside_pid(inside).unwrap_or(0) };
        wait_for(&format!("{} in {}", program.name(), site.name()), Duration::from_secs(START_SECONDS_MAX), || {
            if !daemon.is_running() {
                let log = log(site, program);
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                bail!("{} ended at once; its log ends with {tail:?} (newest first)", program.name());
            }
            // A socket is there a moment before somebody listens.
            Ok(UnixStream::connect(&socket).is_ok().then_some(()))
        })?;
        Ok(daemon)
    }

    /// Its process, by the id it has outside.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGKILL, and waits until it is gone. What it started stays.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::KILL)
    }

    /// SIGTERM, and waits until it is gone.
    pub fn terminate(&mut self) -> Result<()> {
        self.end(Signal::TERM)
    }

    fn end(&mut self, how: Signal) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let sent = exec::signal(self.pid, how);
        if self.is_running() {
            // Otherwise it was just ending by itself.
            sent?;
        }
        let name = self.program.name();
        wait_for(&format!("the end of {name}"), Duration::from_secs(START_SECONDS_MAX), || {
            Ok((!self.is_running()).then_some(()))
        })
    }

    /// SIGSTOP: it is there and does nothing.
    pub fn freeze(&self) -> Result<()> {
        exec::signal(self.pid, Signal::STOP)
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        exec::signal(self.pid, Signal::CONT)
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.pid != 0 && exec::alive(self.pid)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("rig: {} could not be ended: {error:#}", self.program.name());
        }
    }
}

/// Where a daemon of a site logs to, outside.
pub fn log_path(site: &Site, program: Program) -> PathBuf {
    site.path("/var/log/vmdr").join(format!("{}.log", program.name()))
}

/// What a daemon of a site has logged so far.
pub fn log(site: &Site, program: Program) -> String {
    fs::read(log_path(site, program)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Runs the `vmdr` command in a site, for at most `seconds`, and gives what came of it.
pub fn vmdr_output(site: &Site, seconds: u64, words: &[&str]) -> Result<Output> {
    let binary = binary("vmdr")?;
    let mut command = site.command_within(seconds, &binary.to_string_lossy());
    exec::output(command.env("NO_COLOR", "1").args(words))
}

/// The same with something typed on its standard input.
pub fn vmdr_typed(site: &Site, words: &[&str], typed: &str) -> Result<Output> {
    let binary = binary("vmdr")?;
    let mut command = site.command("bash");
    command.env("NO_COLOR", "1").env("TYPED", typed);
    command.args(["-c", r#"printf '%s\n' "$TYPED" | "$@""#, "vmdr-rig-type"]).arg(&binary);
    exec::output(command.args(words))
}

/// Runs the `vmdr` command in a site; a non-zero exit is an error.
pub fn vmdr(site: &Site, words: &[&str]) -> Result<String> {
    let binary = binary("vmdr")?;
    let mut command = site.command_within(COMMAND_SECONDS_MAX, &binary.to_string_lossy());
    exec::run(command.env("NO_COLOR", "1").args(words)).with_context(|| format!("in {}", site.name()))
}

/// Runs the `vmdr` command with JSON output and gives the document.
pub fn vmdr_json(site: &Site, words: &[&str]) -> Result<Value> {
    let words = [words, &["-o", "json"]].concat();
    let text = vmdr(site, &words)?;
    serde_json::from_str(&text).with_context(|| format!("read the JSON of `vmdr {}`: {text}", words.join(" ")))
}
