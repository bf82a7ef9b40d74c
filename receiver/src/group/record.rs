//! The record of the last activation of a group: what was asked for, and how far each member has come. On disk as
//! `groups/NAME.json` in the state directory, written whole before each step.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmdr_daemon::durable;
use vmdr_proto::control::GroupReport;

use crate::store::GROUPS;

/// What a reader of the record must understand.
///
/// Version history, one sentence each:
///   1  first version.
const VERSION: u32 = 1;
const SUFFIX: &str = ".json";

/// The record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub(super) version: u32,
    /// Each member at its newest point that is not younger; 0: the newest.
    pub at_unix_ns: u64,
    /// The point of single members, by name.
    pub points: BTreeMap<String, String>,
    /// Also points that are known to be damaged.
    pub damaged: bool,
    /// When somebody was last at work on it.
    pub touched_unix_ns: u64,
    /// How it went, or how far it is.
    pub report: GroupReport,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The state directory failed.
    #[error("{what} {path:?}: {source}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It is damaged, or of a later version.
    #[error("the record of a group {path:?} cannot be used: {why}; move it away to begin anew")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The name has been looked at: it is that of a group, and so that of a file ([`vmdr_plan::group_name`]).
fn path(state_directory: &Path, group: &str) -> PathBuf {
    state_directory.join(GROUPS).join(format!("{group}{SUFFIX}"))
}

impl Record {
    /// The record of a group, if there is one.
    pub fn read(state_directory: &Path, group: &str) -> Result<Option<Record>, RecordError> {
        if vmdr_plan::group_name(group).is_err() {
            return Ok(None);
        }
        let path = path(state_directory, group);
        let bytes =
            durable::read(&path).map_err(|source| RecordError::Io { what: "read", path: path.clone(), source })?;
        let Some(bytes) = bytes else { return Ok(None) };
        let unusable = |why: String| RecordError::Unusable { path: path.clone(), why };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        if record.version != VERSION {
            return Err(unusable(format!("it has version {}, this receiver knows {VERSION}", record.version)));
        }
        if record.report.group != group {
            return Err(unusable(format!("it is of the group {:?}", record.report.group)));
        }
        Ok(Some(record))
    }

    /// Writes it, whole or not at all.
    pub fn write(&mut self, state_directory: &Path) -> Result<(), RecordError> {
        self.version = VERSION;
        let path = path(state_directory, &self.report.group);
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::from);
        let written = json.and_then(|json| durable::write(&path, &json));
        written.map_err(|source| RecordError::Io { what: "write", path, source })
    }

    /// The names of the groups of which there are records, in order.
    pub fn names(state_directory: &Path) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(state_directory.join(GROUPS)) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let name = name.strip_suffix(SUFFIX)?;
            vmdr_plan::group_name(name).is_ok().then(|| name.to_owned())
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use vmdr_proto::control::{ActivationReport, GroupMember, HookRun};

    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        assert!(Record::read(at, "shop").unwrap().is_none() && Record::names(at).is_empty());
        let hooks = vec![HookRun { stage: "before".to_owned(), seconds: 0.5, ..HookRun::default() }];
        let activation = ActivationReport { rto_seconds: 1.5, hooks, ..ActivationReport::default() };
        let member = GroupMember { name: "db1".to_owned(), activation: Some(activation), ..GroupMember::default() };
        let report = GroupReport { group: "shop".to_owned(), members: vec![member], ..GroupReport::default() };
        let mut record = Record {
            at_unix_ns: 7,
            points: [("db1".to_owned(), "3-9".to_owned())].into(),
            report,
            ..Record::default()
        };
        record.write(at).unwrap();
        assert_eq!(Record::read(at, "shop").unwrap(), Some(record.clone()));
        assert_eq!(Record::names(at), ["shop"]);
        for name in ["../shop", "", "sh/op", ".shop"] {
            assert!(Record::read(at, name).unwrap().is_none(), "{name}");
        }
        let file = path(at, "shop");
        let text = std::fs::read_to_string(&file).unwrap();
        // What this version added is missing in older ones, and what later ones add is passed over.
        let sparse = r#"{"version":1,"at_unix_ns":0,"points":{},"damaged":false,"touched_unix_ns":1,"new":2,"report":{"group":"shop","more":[]}}"#;
        for (text, wrong) in [
            (text.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (text.replace("\"shop\"", "\"mail\""), "of the group"),
            (text[..text.len() / 2].to_owned(), "move it away"),
            (sparse.to_owned(), ""),
        ] {
            std::fs::write(&file, &text).unwrap();
            match Record::read(at, "shop") {
                Ok(_) => assert!(wrong.is_empty(), "{text}"),
                Err(error) => assert!(!wrong.is_empty() && error.to_string().contains(wrong), "{error}"),
            }
        }
    }
}
