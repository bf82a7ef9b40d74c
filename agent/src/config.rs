//! `/etc/vmdr/agent.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;
use vmdr_daemon::ownership::{CONFIRMED, Ownerships};
use vmdr_shim::config::{ARENA_BYTES, CUT_LIMIT_MS, CUT_PAGES_MAX};

use crate::limits::config::{ARENA_BYTES_MIN, Limits};

/// The shortest interval between cuts.
pub const INTERVAL_MS_MIN: u32 = 25;
/// The longest interval between cuts.
pub const INTERVAL_MS_MAX: u32 = 60_000;

/// Configuration of an agent. Every key has a default but the receiver, which `vmdr protect --receiver` can give.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `host:port` of the receiver.
    pub receiver: Option<String>,
    /// Time between cuts in milliseconds, 25 to 60,000.
    pub interval_ms: u32,
    /// libvirt of this host.
    pub libvirt_uri: String,
    /// Unix socket for the `vmdr` command.
    pub control_socket: PathBuf,
    /// Address of the metrics; empty: none.
    #[serde(deserialize_with = "address_or_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// What is protected is remembered here, so that a restarted agent goes on.
    pub state_dir: PathBuf,
    /// Which domains this host owns; the same as the receiver's.
    pub ownership_dir: PathBuf,
    /// libvirt's hook that keeps what this host does not own from being started; empty: it is not installed.
    pub libvirt_hook: PathBuf,
    /// Sockets and state pages of the shims.
    pub runtime_dir: PathBuf,
    /// Log files of the shims.
    pub log_dir: PathBuf,
    /// The shim's program; by default it lies beside the agent's.
    pub shim_program: Option<PathBuf>,
    /// Memory per guest for what is captured and not yet durable, in bytes (at least 64 MiB).
    pub arena_bytes: u64,
    /// The most pages of 4 KiB to copy in one pause.
    pub cut_pages_max: u64,
    /// How long a cut may keep a guest paused, in milliseconds.
    pub cut_limit_ms: u64,
    /// Bytes per second at which disks are copied first; 0: no limit.
    pub disk_copy_bytes_per_second: u64,
    /// Who this host is and which hosts it trusts; both daemons of a host use the same directory.
    pub identity_dir: PathBuf,
    /// Append-only record of what was done and refused; the receiver of this host uses the same directory.
    pub audit_dir: PathBuf,
    /// Group whose members may do everything on the control socket, as root may; none: root alone.
    pub operator_group: Option<String>,
    /// Group whose members may look.
    pub reader_group: Option<String>,
    /// The clocks of guests with vmdr's tools are kept with this host's.
    pub guest_clock: bool,
    /// How long a guest may take to bring its file systems to rest for an application-consistent point, in milliseconds.
    pub freeze_limit_ms: u32,
    /// How long it may keep them so, in milliseconds.
    pub frozen_limit_ms: u32,
    /// What protection may cost this host.
    pub limits: Limits,
    /// The witness of automatic failover.
    pub witness: vmdr_etcd::Config,
}

/// What is possible for `freeze_limit_ms`: the `vmdr` command waits for 60 s.
const FREEZE_LIMIT_MS: std::ops::RangeInclusive<u32> = 1_000..=30_000;
/// What is possible for `frozen_limit_ms`.
const FROZEN_LIMIT_MS: std::ops::RangeInclusive<u32> = 500..=30_000;

impl Default for Config {
    fn default() -> Self {
        Self {
            receiver: None,
            interval_ms: 100,
            libvirt_uri: "qemu:///system".to_owned(),
            control_socket: vmdr_proto::AGENT_SOCKET.into(),
            metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 7422))),
            state_dir: "/var/lib/vmdr/agent".into(),
            ownership_dir: vmdr_daemon::ownership::RECORDS.into(),
            libvirt_hook: vmdr_daemon::hook::HOOK.into(),
            runtime_dir: "/run/vmdr/shim".into(),
            log_dir: "/var/log/vmdr".into(),
            shim_program: None,
            arena_bytes: ARENA_BYTES,
            cut_pages_max: CUT_PAGES_MAX,
            cut_limit_ms: CUT_LIMIT_MS,
            disk_copy_bytes_per_second: 0,
            identity_dir: vmdr_trust::DIRECTORY.into(),
            audit_dir: vmdr_audit::DIRECTORY.into(),
            operator_group: None,
            reader_group: None,
            guest_clock: true,
            freeze_limit_ms: 20_000,
            frozen_limit_ms: 5_000,
            limits: Limits::default(),
            witness: vmdr_etcd::Config::default(),
        }
    }
}

impl Config {
    /// Reads the file; one that does not exist gives the defaults.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses and checks.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut config: Self = toml::from_str(text).map_err(|error| {
            let place = error.span().map(|span| position(text, span.start)).unwrap_or_default();
            anyhow::anyhow!("{place}{}", error.message())
        })?;
        check_interval(config.interval_ms)?;
        if config.arena_bytes < ARENA_BYTES_MIN {
            bail!("arena_bytes = {}: at least {ARENA_BYTES_MIN} (64 MiB) are needed", config.arena_bytes);
        }
        if config.cut_limit_ms == 0 || config.cut_pages_max == 0 {
            bail!("cut_limit_ms and cut_pages_max must not be 0");
        }
        for (name, value, range) in [
            ("freeze_limit_ms", config.freeze_limit_ms, FREEZE_LIMIT_MS),
            ("frozen_limit_ms", config.frozen_limit_ms, FROZEN_LIMIT_MS),
        ] {
            if !range.contains(&value) {
                bail!("{name} = {value} is out of range: {} to {} are possible", range.start(), range.end());
            }
        }
        config.limits.check()?;
        config.witness.check()?;
        Ok(config)
    }

    /// Which domains this host owns.
    pub fn ownerships(&self) -> Ownerships {
        Ownerships::new(&self.ownership_dir, Path::new(CONFIRMED))
    }

    /// Bytes of memory for what is captured of a domain and not yet durable.
    pub fn arena_bytes_of(&self, domain: &str) -> u64 {
        self.limits.of(domain).memory_bytes.unwrap_or(self.arena_bytes)
    }

    /// The shim's program.
    pub fn shim_program(&self) -> anyhow::Result<PathBuf> {
        if let Some(program) = &self.shim_program {
            return Ok(program.clone());
        }
        let own = std::env::current_exe().context("find this program's own file")?;
        Ok(own.with_file_name("vmdr-shim"))
    }
}

/// An address, or the empty string for none.
fn address_or_none<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| serde::de::Error::custom(format!("{text:?} is not ADDRESS:PORT")))
}

/// Checks an interval from the file or from a request.
pub fn check_interval(interval_ms: u32) -> anyhow::Result<()> {
    if !(INTERVAL_MS_MIN..=INTERVAL_MS_MAX).contains(&interval_ms) {
        bail!("interval {interval_ms} ms is out of range: {INTERVAL_MS_MIN} ms to {INTERVAL_MS_MAX} ms are possible");
    }
    Ok(())
}

fn position(text: &str, at: usize) -> String {
    let before = &text[..at.min(text.len())];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, str::len) + 1;
    format!("line {line}, column {column}: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_named_with_their_place() {
        let error = Config::parse("receiver = \"b:7420\"\ninterval = 5\n").unwrap_err().to_string();
        assert!(error.starts_with("line 2, column 1: unknown field `interval`"), "{error}");
        let error = Config::parse("interval_ms = 5").unwrap_err().to_string();
        assert!(error.contains("25 ms to 60000 ms"), "{error}");
        assert!(Config::parse("interval_ms = \n").unwrap_err().to_string().starts_with("line 1"));
        assert!(Config::parse("arena_bytes = 1").is_err());
        let error = Config::parse("frozen_limit_ms = 60000").unwrap_err().to_string();
        assert!(error.contains("500 to 30000"), "{error}");
        assert!(Config::parse("metrics_listen = \"x\"").is_err());
        assert_eq!(Config::parse("metrics_listen = \"\"").unwrap().metrics_listen, None);
        assert_eq!(Config::parse("").unwrap().interval_ms, 100);
        let error = format!("{:#}", Config::parse("[limits.guest]\nbandwidth = \"slow\"").unwrap_err());
        assert!(error.starts_with("limits.guest.bandwidth: \"slow\" is no bandwidth"), "{error}");
        let error =
            Config::parse("[witness]\nendpoints = [\"http://e:1\"]\nlease_seconds = 2").unwrap_err().to_string();
        assert!(error.contains("[witness]: lease_seconds = 2: it is from 5 to 600"), "{error}");
        let error = Config::parse("[witness]\nendpoint = \"http://e:1\"").unwrap_err().to_string();
        assert!(error.starts_with("line 2, column 1: unknown field `endpoint`"), "{error}");
        let config = Config::parse("[limits.domain.db1]\nmemory_bytes = 134217728").unwrap();
        assert_eq!([config.arena_bytes_of("db1"), config.arena_bytes_of("web1")], [128 << 20, 256 << 20]);
    }
}
