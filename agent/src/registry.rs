//! What is protected, on disk: a restarted agent goes on where its predecessor was.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use vmdr_daemon::durable;

/// Who activates a guest whose host is silent.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The operator.
    #[default]
    Manual,
    /// The backup site by itself.
    Auto,
}

impl Mode {
    /// As commands call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Auto => "auto",
        }
    }
}

/// One protected domain.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Protection {
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: String,
    /// `host:port` of the receiver.
    pub receiver: String,
    /// Time between cuts.
    pub interval_ms: u32,
    /// The generation in which this host runs the guest; 0: the receiver was not asked yet.
    pub generation: u64,
    /// The receiver answered that another site owns the guest now.
    pub fenced: bool,
    /// A UUID of the protection itself, from `protect` to `unprotect`; empty: it was made by an agent that gave none.
    #[serde(default)]
    pub id: String,
    /// It is suspended.
    #[serde(default)]
    pub suspended: Option<Suspended>,
    /// Seconds between application-consistent points; 0: only on request.
    #[serde(default)]
    pub application_every_seconds: u64,
    /// The guest was, or will be, held for a move, and nobody was asked to take it yet: whoever finds it held lets it go on.
    #[serde(default)]
    pub holds_to_move: bool,
    /// The guest is being moved to the receiver's site.
    #[serde(default)]
    pub moving: Option<Moving>,
    /// Who activates it at the backup site.
    #[serde(default)]
    pub failover: Mode,
}

impl Protection {
    /// Whether the backup site takes it by itself.
    pub fn is_automatic(&self) -> bool {
        self.failover == Mode::Auto
    }
}

/// A move that is not done. It is written before the receiver is asked.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Moving {
    /// The epoch at which the guest stands.
    pub epoch: u64,
    /// The wall clock at its cut.
    pub cut_unix_ns: u64,
    /// The generation that the receiver was asked to take it in.
    pub generation: u64,
    /// It is known to have taken it.
    pub taken: bool,
    /// The guest is then protected from there to here.
    pub protect_back: bool,
}

/// A protection that is suspended: what there is to know of it meanwhile.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Suspended {
    /// Since when, wall clock.
    pub since_unix_ns: u64,
    /// The recovery point at the receiver.
    pub epoch: u64,
    /// The wall clock at its cut; 0: not known.
    pub cut_unix_ns: u64,
}

/// A directory with one JSON file per protected domain.
#[derive(Clone, Debug)]
pub struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// Opens, and makes if need be.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        let directory = state_dir.join("protected");
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// All entries; one that cannot be read is reported, not fatal.
    pub fn load(&self) -> anyhow::Result<Vec<anyhow::Result<Protection>>> {
        let mut all = Vec::new();
        let entries = fs::read_dir(&self.directory).with_context(|| format!("list {}", self.directory.display()))?;
        for entry in entries {
            let path = entry.context("list what is protected")?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                all.push(read(&path));
            }
        }
        Ok(all)
    }

    /// The entry of a domain, as it was last written.
    pub fn get(&self, uuid: &str) -> anyhow::Result<Protection> {
        read(&self.path(uuid))
    }

    /// Writes an entry: whole or not at all.
    pub fn save(&self, protection: &Protection) -> anyhow::Result<()> {
        let path = self.path(&protection.uuid);
        durable::write(&path, &serde_json::to_vec_pretty(protection)?)
            .with_context(|| format!("write {}", path.display()))
    }

    /// Removes an entry; that there is none is no error.
    pub fn remove(&self, uuid: &str) -> anyhow::Result<()> {
        let path = self.path(uuid);
        durable::remove(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn path(&self, uuid: &str) -> PathBuf {
        self.directory.join(format!("{uuid}.json"))
    }
}

fn read(path: &Path) -> anyhow::Result<Protection> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_a_restart_and_a_damaged_neighbour() {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(directory.path()).unwrap();
        let one = Protection {
            name: "db".into(),
            uuid: "22222222-1111-4111-8111-111111111111".into(),
            receiver: "b:7420".into(),
            interval_ms: 100,
            generation: 1,
            fenced: false,
            id: "33333333-1111-4111-8111-111111111111".into(),
            suspended: Some(Suspended { since_unix_ns: 2, epoch: 7, cut_unix_ns: 1 }),
            holds_to_move: true,
            moving: Some(Moving { epoch: 7, cut_unix_ns: 1, generation: 2, taken: false, protect_back: true }),
            application_every_seconds: 900,
            failover: Mode::Auto,
        };
        registry.save(&one).unwrap();
        fs::write(directory.path().join("protected/x.json"), "{").unwrap();
        let all = Registry::open(directory.path()).unwrap().load().unwrap();
        assert_eq!(all.len(), 2);
        assert!(all.iter().any(|entry| entry.as_ref().is_ok_and(|entry| *entry == one)));
        assert_eq!(all.iter().filter(|entry| entry.is_err()).count(), 1);
        // What an agent wrote that knew less.
        let old = r#"{"name":"db","uuid":"u","receiver":"b:7420","interval_ms":100,"generation":1,"fenced":false}"#;
        let old: Protection = serde_json::from_str(old).unwrap();
        assert_eq!((old.id.as_str(), old.suspended, old.application_every_seconds), ("", None, 0));
        assert!(!old.is_automatic());
        assert_eq!(registry.get(&one.uuid).unwrap(), one);
        registry.remove(&one.uuid).unwrap();
        registry.remove(&one.uuid).unwrap();
        assert_eq!(registry.load().unwrap().len(), 1);
    }
}
