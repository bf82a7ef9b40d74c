//! `/etc/vmdr/receiver.toml`. Every key has a default, an unknown key is an error, and an error names file, line and
//! column, so that a typing mistake never means "the default".

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use vmdr_proto::{RECEIVER_PORT, RECEIVER_SOCKET};

use crate::cold::ColdConfig;
use crate::drill::checks;
use crate::encryption::EncryptionConfig;
use crate::failover::FailoverConfig;
use crate::history;
use crate::silence::AlarmConfig;
use crate::store::{Retention, StoreOptions};

/// Where the configuration is, unless given on the command line.
pub const CONFIG_FILE: &str = "/etc/vmdr/receiver.toml";
/// TCP port of the metrics, unless configured otherwise.
pub const METRICS_PORT: u16 = RECEIVER_PORT + 1;
/// The longest that a step of a drill can be told to take: a drill is no second site.
const DRILL_SECONDS_MAX: u64 = 24 * 3600;

/// The receiver's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port where agents connect, over TLS and with a certificate of a paired host.
    pub listen: SocketAddr,
    /// Directory of journals and standbys: an absolute path, on a file system with room for the memory and the disks of
    /// every protected guest, twice.
    pub state_dir: PathBuf,
    /// Where the `vmdr` command connects.
    pub control_socket: PathBuf,
    /// Address and port of the Prometheus metrics; "" turns them off.
    #[serde(deserialize_with = "address_or_nothing")]
    pub metrics_listen: Option<SocketAddr>,
    /// Which domains this host owns; the same as the agent's.
    pub ownership_dir: PathBuf,
    /// The agent of this host, which protects a guest back that was moved here.
    pub agent_socket: PathBuf,
    /// Days for which what a former owner's disks had is kept.
    pub divergence_days: u64,
    /// Who this host is and which hosts it trusts; both daemons of a host use the same directory.
    pub identity_dir: PathBuf,
    /// Append-only record of what was done and refused; the agent of this host uses the same directory.
    pub audit_dir: PathBuf,
    /// Group whose members may do everything on the control socket, as root may; none: root alone.
    pub operator_group: Option<String>,
    /// Group whose members may look.
    pub reader_group: Option<String>,
    /// The libvirt that guests are activated on.
    pub libvirt_uri: String,
    /// Bytes of the state directory's file system that are never used.
    pub space_reserve_bytes: u64,
    /// How long which recovery points are kept, of domains that have no policy of their own.
    pub retention: RetentionConfig,
    /// How points are read again.
    pub verify: VerifyConfig,
    /// How activations are rehearsed.
    pub drill: DrillConfig,
    /// When silence of an agent is an alarm, and who is told.
    pub alarm: AlarmConfig,
    /// The witness of automatic failover; without one no guest is taken by itself.
    pub witness: vmdr_etcd::Config,
    /// When a silent host's guest is taken, and what is done before.
    pub failover: FailoverConfig,
    /// Object storage for recovery points.
    pub cold: ColdConfig,
    /// Keys of the state directory.
    pub encryption: EncryptionConfig,
    /// The recovery plan: an absolute path. None: guests find what they had under the same names.
    pub plan: Option<PathBuf>,
    /// Bridges that have another name here, unless the plan says otherwise: `"br0" = "br-dr"`.
    pub bridges: BTreeMap<String, String>,
}

/// `[retention]`: which recovery points are kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Bytes that older points of a domain may take.
    pub budget_bytes: u64,
    /// The tiers.
    pub tiers: Vec<TierConfig>,
}

/// `{ every_seconds = 60, for_seconds = 86400 }`: one point a minute for a day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// One of every so many seconds; 0: every epoch.
    pub every_seconds: u64,
    /// Up to this age.
    pub for_seconds: u64,
}

/// `[verify]`: how recovery points are read again and compared with their checksums.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyConfig {
    /// Bytes read per second, of all domains together.
    pub bytes_per_second: u64,
    /// Each domain is verified so often; 0: only when it is asked for.
    pub every_seconds: u64,
    /// Then all points, not only the newest.
    pub all: bool,
}

/// `[drill]`: how activations are rehearsed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrillConfig {
    /// Each domain is drilled so often; 0: only when it is asked for.
    pub every_seconds: u64,
    /// How long the copy has to run without a fault.
    pub run_seconds: u64,
    /// How long a check may take until it passes.
    pub check_seconds: u64,
    /// Checks, unless others are asked for: `"tcp:22"`, `"tcp:10.0.0.5:22"`, `"cmd:..."`.
    pub checks: Vec<String>,
    /// Bytes copied per second, where the file system cannot share them.
    pub copy_bytes_per_second: u64,
    /// What is otherwise for a domain, by its name or UUID.
    #[serde(rename = "domain")]
    pub domains: BTreeMap<String, DomainDrillConfig>,
}

/// `[drill.domain.web1]`: what is otherwise for a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DomainDrillConfig {
    /// See [`DrillConfig`].
    pub every_seconds: Option<u64>,
    /// The same.
    pub run_seconds: Option<u64>,
    /// The same.
    pub check_seconds: Option<u64>,
    /// The same.
    pub checks: Option<Vec<String>>,
}

impl Default for DrillConfig {
    fn default() -> Self {
        DrillConfig {
            every_seconds: 0,
            run_seconds: 5,
            check_seconds: 60,
            checks: Vec::new(),
            copy_bytes_per_second: 100 << 20,
            domains: BTreeMap::new(),
        }
    }
}

impl DrillConfig {
    /// What holds for a domain.
    pub fn of(&self, name: &str, uuid: &str) -> DrillConfig {
        let own = self.domains.get(uuid).or_else(|| self.domains.get(name)).cloned().unwrap_or_default();
        DrillConfig {
            every_seconds: own.every_seconds.unwrap_or(self.every_seconds),
            run_seconds: own.run_seconds.unwrap_or(self.run_seconds),
            check_seconds: own.check_seconds.unwrap_or(self.check_seconds),
            checks: own.checks.unwrap_or_else(|| self.checks.clone()),
            copy_bytes_per_second: self.copy_bytes_per_second,
            domains: BTreeMap::new(),
        }
    }

    /// How often without being asked.
    pub fn every(&self) -> Option<Duration> {
        (self.every_seconds > 0).then(|| Duration::from_secs(self.every_seconds))
    }

    /// How long the copy has to run.
    pub fn run(&self) -> Duration {
        Duration::from_secs(self.run_seconds)
    }

    /// How long a check may take.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.check_seconds)
    }

    /// What of it makes no sense.
    fn nonsense(&self) -> Option<String> {
        if self.copy_bytes_per_second == 0 {
            return Some("copy_bytes_per_second = 0: at least 1 is needed".to_owned());
        }
        let domains = self.domains.keys().map(|domain| self.of(domain, domain));
        for config in [self.clone()].into_iter().chain(domains) {
            if let Err(what) = checks::parse(&config.checks) {
                return Some(what);
            }
            for (key, seconds) in [("run_seconds", config.run_seconds), ("check_seconds", config.check_seconds)] {
                if !(1..=DRILL_SECONDS_MAX).contains(&seconds) {
                    return Some(format!("{key} = {seconds}: it is from 1 to {DRILL_SECONDS_MAX}"));
                }
            }
        }
        None
    }
}

impl Default for VerifyConfig {
    fn default() -> Self {
        VerifyConfig { bytes_per_second: 50 << 20, every_seconds: 0, all: false }
    }
}

impl VerifyConfig {
    /// How often without being asked.
    pub fn every(&self) -> Option<Duration> {
        (self.every_seconds > 0).then(|| Duration::from_secs(self.every_seconds))
    }
}

impl Default for RetentionConfig {
    fn default() -> Self {
        let Retention { budget_bytes, tiers } = Retention::default();
        let seconds = |ns: u64| Duration::from_nanos(ns).as_secs();
        let tiers = tiers
            .iter()
            .map(|tier| TierConfig { every_seconds: seconds(tier.every_ns), for_seconds: seconds(tier.for_ns) });
        RetentionConfig { budget_bytes, tiers: tiers.collect() }
    }
}

impl RetentionConfig {
    /// As the store has it.
    pub fn policy(&self) -> Result<Retention, String> {
        history::policy(self.budget_bytes, self.tiers.iter().map(|tier| (tier.every_seconds, tier.for_seconds)))
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([0u16; 8], RECEIVER_PORT)),
            state_dir: PathBuf::from("/var/lib/vmdr/receiver"),
            control_socket: PathBuf::from(RECEIVER_SOCKET),
            metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], METRICS_PORT))),
            ownership_dir: PathBuf::from(vmdr_daemon::ownership::RECORDS),
            agent_socket: PathBuf::from(vmdr_proto::AGENT_SOCKET),
            divergence_days: 30,
            identity_dir: PathBuf::from(vmdr_trust::DIRECTORY),
            audit_dir: PathBuf::from(vmdr_audit::DIRECTORY),
            operator_group: None,
            reader_group: None,
            libvirt_uri: vmdr_hypervisor::libvirt::SYSTEM_URI.to_owned(),
            space_reserve_bytes: StoreOptions::default().space_reserve_bytes,
            retention: RetentionConfig::default(),
            verify: VerifyConfig::default(),
            drill: DrillConfig::default(),
            alarm: AlarmConfig::default(),
            witness: vmdr_etcd::Config::default(),
            failover: FailoverConfig::default(),
            cold: ColdConfig::default(),
            encryption: EncryptionConfig::default(),
            plan: None,
            bridges: BTreeMap::new(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It does not say what a configuration says.
    #[error("{path}:{place}: {message}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong there.
        message: String,
    },
}

/// A place in a text, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    line: usize,
    column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

fn address_or_nothing<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    let wanted = "an address with a port, as \"127.0.0.1:7421\", or \"\"";
    text.parse().map(Some).map_err(|_| serde::de::Error::custom(format!("{text:?} is not {wanted}")))
}

impl Config {
    /// Bytes that whatever can wait leaves free: below twice the reserve the store gives up its oldest recovery points for space.
    pub fn space_floor_bytes(&self) -> u64 {
        crate::store::floor_bytes(self.space_reserve_bytes)
    }

    /// Reads a file. Without one at the place where it is by default, the defaults hold.
    pub fn load(given: Option<&Path>) -> Result<Self, ConfigError> {
        let path = given.unwrap_or(Path::new(CONFIG_FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(e) if e.kind() == io::ErrorKind::NotFound && given.is_none() => Ok(Config::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Reads a text that came from `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let invalid = |at: usize, message: String| {
            let place = place(text, at);
            ConfigError::Invalid { path: path.to_owned(), place, message }
        };
        let config: Config = toml::from_str(text).map_err(|e| {
            let message = e.message().lines().collect::<Vec<_>>().join(", ");
            invalid(e.span().map_or(0, |s| s.start), message)
        })?;
        let paths = [
            ("state_dir", Some(&config.state_dir)),
            ("control_socket", Some(&config.control_socket)),
            ("plan", config.plan.as_ref()),
        ];
        for (key, value) in paths.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            if !value.is_absolute() {
                let at = text.find(key).unwrap_or(0);
                return Err(invalid(at, format!("{key} = {value:?} is not an absolute path")));
            }
        }
        if config.libvirt_uri.is_empty() {
            let at = text.find("libvirt_uri").unwrap_or(0);
            return Err(invalid(at, "libvirt_uri is empty; this host's own is \"qemu:///system\"".to_owned()));
        }
        if config.verify.bytes_per_second == 0 {
            let at = text.find("bytes_per_second").unwrap_or(0);
            return Err(invalid(at, "bytes_per_second = 0: at least 1 is needed".to_owned()));
        }
        if let Some(what) = config.drill.nonsense() {
            return Err(invalid(text.find("[drill").unwrap_or(0), what));
        }
        if let Some(what) = config.alarm.nonsense() {
            return Err(invalid(text.find("[alarm]").unwrap_or(0), what));
        }
        if let Err(error) = config.witness.check() {
            return Err(invalid(text.find("[witness]").unwrap_or(0), error.to_string()));
        }
        if let Some(what) = config.failover.nonsense(config.witness.is_set()) {
            return Err(invalid(text.find("[failover]").unwrap_or(0), what));
        }
        if let Err(what) = config.retention.policy() {
            return Err(invalid(text.find("retention").unwrap_or(0), what));
        }
        if let Err(what) = config.encryption.check(&config.state_dir) {
            return Err(invalid(text.find("[encryption]").unwrap_or(0), what));
        }
        if let Err(what) = config.cold.check() {
            return Err(invalid(text.find("[cold]").unwrap_or(0), what));
        }
        Ok(config)
    }
}

fn place(text: &str, at: usize) -> Place {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |n| n + 1);
    Place { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/etc/vmdr/receiver.toml"), text)
    }

    #[test]
    fn nothing_means_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.listen.to_string(), "[::]:7420");
        assert_eq!(config.metrics_listen.unwrap().to_string(), "127.0.0.1:7421");
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            "listen = \"10.0.9.2:7000\"\nstate_dir = \"/srv/vmdr\"\ncontrol_socket = \"/run/x.sock\"\nmetrics_listen = \"\"\n\
             libvirt_uri = \"test:///default\"\nspace_reserve_bytes = 5\nownership_dir = \"/srv/own\"\n\
             agent_socket = \"/run/a.sock\"\ndivergence_days = 7\nidentity_dir = \"/srv/id\"\naudit_dir = \"/srv/audit\"\n\
             operator_group = \"vmdr\"\nreader_group = \"users\"\nplan = \"/etc/vmdr/plan.toml\"\n\
             [bridges]\n\"br0\" = \"br-dr\"\n\
             [verify]\nbytes_per_second = 1000\nevery_seconds = 86400\nall = true\n\
             [drill]\nevery_seconds = 604800\nrun_seconds = 9\ncheck_seconds = 8\nchecks = [\"tcp:22\"]\n\
             copy_bytes_per_second = 7\n[drill.domain.web1]\nevery_seconds = 0\nchecks = []\n\
             [retention]\nbudget_bytes = 2097152\ntiers = [{ every_seconds = 0, for_seconds = 60 }]\n\
             [alarm]\nafter_seconds = 9\nhook = [\"/bin/page\", \"oncall\"]\nhook_timeout_seconds = 4\n\
             [witness]\nendpoints = [\"http://e:1\"]\n[failover]\nafter_seconds = 5\n\
             fence_command = [\"/bin/fence\", \"a\"]\nfence_timeout_seconds = 6\n\
             [cold]\nurl = \"s3://b/p\"\nendpoint = \"https://s\"\nregion = \"r\"\nkey_file = \"/k\"\nold_key_files = [\"/o\"]\n\
             every_seconds = 3600\ndomains = [\"web1\"]\nkeep = [{ every_seconds = 1, for_seconds = 2 }]\n\
             grace_seconds = 7\nbytes_per_second = 8\nparallel = 9\n\
             [encryption]\nkey_file = \"/e\"\nold_key_files = [\"/f\"]\nclear_dir = \"/run/clear\"\n",
        )
        .unwrap();
        let expected = Config {
            listen: "10.0.9.2:7000".parse().unwrap(),
            state_dir: "/srv/vmdr".into(),
            control_socket: "/run/x.sock".into(),
            metrics_listen: None,
            ownership_dir: "/srv/own".into(),
            agent_socket: "/run/a.sock".into(),
            divergence_days: 7,
            identity_dir: "/srv/id".into(),
            audit_dir: "/srv/audit".into(),
            operator_group: Some("vmdr".to_owned()),
            reader_group: Some("users".to_owned()),
            libvirt_uri: "test:///default".to_owned(),
            space_reserve_bytes: 5,
            retention: RetentionConfig {
                budget_bytes: 2 << 20,
                tiers: vec![TierConfig { every_seconds: 0, for_seconds: 60 }],
            },
            verify: VerifyConfig { bytes_per_second: 1000, every_seconds: 86400, all: true },
            drill: DrillConfig {
                every_seconds: 604_800,
                run_seconds: 9,
                check_seconds: 8,
                checks: vec!["tcp:22".to_owned()],
                copy_bytes_per_second: 7,
                domains: BTreeMap::from([(
                    "web1".to_owned(),
                    DomainDrillConfig {
                        every_seconds: Some(0),
                        checks: Some(Vec::new()),
                        ..DomainDrillConfig::default()
                    },
                )]),
            },
            alarm: AlarmConfig {
                after_seconds: 9,
                hook: vec!["/bin/page".to_owned(), "oncall".to_owned()],
                hook_timeout_seconds: 4,
            },
            witness: vmdr_etcd::Config { endpoints: vec!["http://e:1".to_owned()], ..vmdr_etcd::Config::default() },
            failover: FailoverConfig {
                after_seconds: 5,
                fence_command: vec!["/bin/fence".to_owned(), "a".to_owned()],
                fence_timeout_seconds: 6,
            },
            cold: ColdConfig {
                url: "s3://b/p".to_owned(),
                endpoint: "https://s".to_owned(),
                region: "r".to_owned(),
                key_file: Some("/k".into()),
                key_credential: String::new(),
                old_key_files: vec!["/o".into()],
                every_seconds: 3600,
                domains: vec!["web1".to_owned()],
                keep: vec![TierConfig { every_seconds: 1, for_seconds: 2 }],
                grace_seconds: 7,
                bytes_per_second: 8,
                parallel: 9,
            },
            encryption: EncryptionConfig {
                key_file: Some("/e".into()),
                key_credential: String::new(),
                old_key_files: vec!["/f".into()],
                clear_dir: Some("/run/clear".into()),
            },
            plan: Some("/etc/vmdr/plan.toml".into()),
            bridges: BTreeMap::from([("br0".to_owned(), "br-dr".to_owned())]),
        };
        assert_eq!(config, expected);
        let (web1, other) = (config.drill.of("web1", "u"), config.drill.of("web2", "u"));
        assert_eq!((web1.every(), web1.checks.len(), web1.run_seconds), (None, 0, 9));
        assert_eq!((other.every(), other.checks.len()), (Some(Duration::from_secs(604_800)), 1));
    }

    #[test]
    fn an_error_is_one_line_with_its_place() {
        for (text, start, word) in [
            ("listen = \"nowhere\"", "1:10: ", "invalid socket address"),
            ("\n  state = \"/x\"\n", "2:3: ", "unknown field `state`"),
            ("listen = ", "1:10: ", ""),
            ("space_reserve_bytes = -1", "1:23: ", "-1"),
            ("libvirt_uri = \"a\"\nlibvirt_uri = \"b\"", "2:1: ", "duplicate key"),
            ("# d\u{e4}\nmetrics_listen = \"7421\"", "2:18: ", "is not an address with a port"),
            ("state_dir = \"var\"", "1:1: ", "not an absolute path"),
            ("plan = \"plan.toml\"", "1:1: ", "not an absolute path"),
            ("libvirt_uri = \"\"", "1:1: ", "empty"),
            ("[verify]\nbytes_per_second = 0", "2:1: ", "at least"),
            ("[bridges]\nbr0 = 3", "2:7: ", "string"),
            ("[retention]\nbudget_bytes = 5", "1:2: ", "at least"),
            ("[drill]\nchecks = [\"udp:5\"]", "1:1: ", "known are"),
            ("[drill.domain.a]\nrun_seconds = 0", "1:1: ", "from 1 to"),
            ("[retention]\ntiers = [{ every_seconds = 9, for_seconds = 8 }]", "1:2: ", "no sense"),
            ("[cold]\nurl = \"s3://b\"", "1:1: ", "without a key"),
            ("[encryption]\nkey_file = \"k\"", "1:1: ", "absolute"),
            ("[cold]\nkey_file = \"k\"", "1:1: ", "absolute"),
            ("[cold]\nurl = \"s3://b\"\nkey_file = \"/k\"\nevery_seconds = 3", "1:1: ", "at least"),
            ("[witness]\nuser = \"u\"", "1:1: ", "endpoints are missing"),
            ("[failover]\nafter_seconds = 5", "1:1: ", "[witness] is missing"),
            ("\n[failover]\nfence_command = [\"x\"]\n[witness]\nendpoints = [\"http://e\"]", "2:1: ", "absolute"),
            ("[cold]\nkeep = [{ every_seconds = 9, for_seconds = 8 }]", "1:1: ", "no sense"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            let rest = error.strip_prefix("/etc/vmdr/receiver.toml:").unwrap();
            assert!(rest.starts_with(start) && rest.contains(word) && !error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let error = Config::load(Some(Path::new("/nonexistent/vmdr.toml"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/vmdr.toml") && error.contains("No such file"), "{error}");
    }
}
