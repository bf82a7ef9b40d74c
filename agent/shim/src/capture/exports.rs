//! Read-only NBD exports of the guest's disks by QEMU itself: through them remembered places are read, and storage is asked
//! whether it answers.
//!
//! QEMU has one NBD server. It is used if it is ours: started here, or left by a predecessor, which shows in that it has no
//! exports but ours. Anybody else's (a pull backup of libvirt's) is left alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::fs::{Gid, Uid, chown};
use serde_json::{Value, json};

use super::{Capture, job_prefix, mirror_of};
use crate::monitor::{Address, Monitor};
use crate::nbd::Client;
use crate::qmp::QmpError;

/// What the ids of our exports begin with.
const ID_PREFIX: &str = "vmdr-";
/// How long QEMU's monitor may take to greet.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

impl Capture {
    /// A connection to the export of a disk, which is made if need be. Each exchange on it may take `limit`.
    ///
    /// Adding an export changes QEMU's block graph, which waits for I/O in flight: not to be done while storage hangs.
    pub(super) fn open_export(&mut self, target: &str, limit: Duration) -> anyhow::Result<Client> {
        let node = self.node_of(target)?.with_context(|| format!("disk {target} has no mirror job"))?;
        let path = self.export_socket()?;
        if !self.nbd_server {
            let address = json!({ "addr": { "type": "unix", "data": { "path": path } } });
            if let Err(error) = self.qmp.execute("nbd-server-start", Some(&address)) {
                if error.is_fatal() || !end_leftover(&mut self.qmp)? {
                    return Err(error).context("start QEMU's NBD server, which somebody else may be using");
                }
                self.qmp.execute("nbd-server-start", Some(&address)).context("start QEMU's NBD server")?;
            }
            self.nbd_server = true;
        }
        let export = json!({
            "type": "nbd", "id": export_id(target), "node-name": node, "name": target, "writable": false
        });
        // It may be there from before.
        let added = self.qmp.execute("block-export-add", Some(&export));
        Client::connect(&path, target, limit).map_err(|error| {
            let told = added.err().map(|error| format!(" ({error})")).unwrap_or_default();
            anyhow!("connect to QEMU's export of disk {target}: {error}{told}")
        })
    }

    /// Ends QEMU's exports, if there are any.
    pub(super) fn close_exports(&mut self) {
        for catch_up in &mut self.catch_up {
            catch_up.disconnect();
        }
        self.storage.disconnect();
        if std::mem::take(&mut self.nbd_server)
            && let Err(error) = self.qmp.execute("nbd-server-stop", None)
        {
            tracing::warn!(domain = self.config.domain_name, "end QEMU's exports: {error}");
        }
    }

    /// The node below a disk's mirror; nothing: it has no mirror now.
    pub(super) fn node_of(&mut self, target: &str) -> anyhow::Result<Option<String>> {
        let jobs = self.qmp.execute("query-block-jobs", None)?;
        Ok(mirrored_node(&jobs, target).map(str::to_owned))
    }

    pub(super) fn export_socket(&self) -> anyhow::Result<PathBuf> {
        let directory: &Path = &self.config.qemu_directory();
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let owner = Uid::from_raw(self.config.qemu_uid);
        chown(directory, Some(owner), None::<Gid>).with_context(|| format!("chown {}", directory.display()))?;
        Ok(directory.join("export.sock"))
    }
}

/// Ends what a shim that is gone has left in QEMU: its NBD server. Where there is none, or somebody else's, nothing is done.
pub fn end_leftovers(monitor: &Address) -> Result<(), QmpError> {
    end_leftover(&mut Monitor::connect(monitor, CONNECT_LIMIT)?).map(|_| ())
}

/// Stops QEMU's NBD server if it has exports, and all are ours. Whether it did.
fn end_leftover(qmp: &mut Monitor) -> Result<bool, QmpError> {
    let exports = qmp.execute("query-block-exports", None)?;
    if !only_ours(&exports) {
        return Ok(false);
    }
    qmp.execute("nbd-server-stop", None)?;
    Ok(true)
}

fn only_ours(exports: &Value) -> bool {
    let ours = |export: &Value| export["id"].as_str().is_some_and(|id| id.starts_with(ID_PREFIX));
    exports.as_array().is_some_and(|exports| !exports.is_empty() && exports.iter().all(ours))
}

/// The node that a disk's mirror copies: the disk's format. From `query-block-jobs`.
pub(super) fn mirrored_node<'a>(jobs: &'a Value, target: &str) -> Option<&'a str> {
    let job = mirror_of(jobs, target).ok()?;
    job["device"].as_str()?.strip_prefix(&job_prefix(target))
}

fn export_id(target: &str) -> String {
    format!("{ID_PREFIX}{target}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anybody_elses_exports_are_left_alone() {
        assert!(only_ours(&json!([{ "id": "vmdr-vda" }, { "id": "vmdr-vdb" }])));
        assert!(!only_ours(&json!([{ "id": "vmdr-vda" }, { "id": "libvirt-nbd-sda" }])));
        assert!(!only_ours(&json!([])));
    }
}
