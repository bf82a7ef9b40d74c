//! Block jobs: mirroring a running domain's disk into an NBD server on a unix socket.
//!
//! The mirror is libvirt's `virDomainBlockCopy` with synchronous writes: once it is ready, the guest sees a write done
//! only after the server acknowledged it. Jobs are transient: they end with the domain, and libvirt then allows them for
//! persistent domains. The target is taken as it is (`REUSE_EXT`): the server offers an export of the disk's size.

use std::path::Path;

use crate::error::Error;
use crate::libvirt::{Domain, c_string};
use crate::raw;
use crate::xml::Element;

/// A block job that runs on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// What it does.
    pub kind: BlockJobKind,
    /// Its limit in bytes per second; 0: none.
    pub bandwidth_bytes: u64,
    /// How far it is. Equal to `end` when a mirror has caught up; only QEMU's `query-block-jobs` tells whether it is
    /// `actively-synced`.
    pub current: u64,
    /// How far it has to go.
    pub end: u64,
}

/// What a block job does (`virDomainBlockJobType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockJobKind {
    /// Pulls a backing chain into the disk.
    Pull,
    /// Mirrors: vmdr's kind.
    Copy,
    /// Commits an image into the one below it.
    Commit,
    /// Commits the image in use.
    ActiveCommit,
    /// A backup.
    Backup,
    /// Something else.
    Other(i32),
}

impl BlockJobKind {
    fn from_raw(kind: i32) -> Self {
        match kind {
            1 => Self::Pull,
            2 => Self::Copy,
            3 => Self::Commit,
            4 => Self::ActiveCommit,
            5 => Self::Backup,
            other => Self::Other(other),
        }
    }
}

impl std::fmt::Display for BlockJobKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pull => f.write_str("pull"),
            Self::Copy => f.write_str("copy"),
            Self::Commit => f.write_str("commit"),
            Self::ActiveCommit => f.write_str("active commit"),
            Self::Backup => f.write_str("backup"),
            Self::Other(kind) => write!(f, "type {kind}"),
        }
    }
}

impl Domain {
    /// Mirrors the disk `target` into the export of an NBD server at `socket`, with synchronous writes.
    ///
    /// `bandwidth_bytes`: a limit for the initial copy in bytes per second, 0 for none. The server must be there: QEMU
    /// connects before this returns, as the user it runs as.
    pub fn block_copy_to_nbd(
        &self,
        target: &str,
        socket: &Path,
        export: &str,
        bandwidth_bytes: u64,
    ) -> Result<(), Error> {
        let flags = virt_sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
            | virt_sys::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
            | virt_sys::VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES;
        let destination = nbd_destination(socket, export).to_string();
        let what = || format!("mirror disk {target} of {} to the NBD server at {}", self.name(), socket.display());
        let disk = c_string("the disk's target", target)?;
        let destination = c_string("the NBD export", &destination)?;
        raw::block_copy(self.virt(), &disk, &destination, bandwidth_bytes, flags)
            .map_err(|e| Error::libvirt(what(), &e))
    }

    /// The block job of a disk; `None`: there is none.
    pub fn block_job(&self, target: &str) -> Result<Option<BlockJobInfo>, Error> {
        let disk = c_string("the disk's target", target)?;
        let job = raw::block_job_info(self.virt(), &disk)
            .map_err(|e| Error::libvirt(format!("ask for the block job on {target} of {}", self.name()), &e))?;
        Ok(job.map(|job| BlockJobInfo {
            kind: BlockJobKind::from_raw(job.kind),
            bandwidth_bytes: job.bandwidth,
            current: job.current,
            end: job.end,
        }))
    }

    /// Ends the block job of a disk; the domain stays on its disk. `wait`: until the job is gone, otherwise a
    /// [`BlockJob`](crate::events::DomainEvent::BlockJob) event tells. There being no job is not an error.
    pub fn block_job_abort(&self, target: &str, wait: bool) -> Result<(), Error> {
        let disk = c_string("the disk's target", target)?;
        let flags = if wait { 0 } else { virt_sys::VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC };
        match raw::block_job_abort(self.virt(), &disk, flags) {
            Ok(()) => Ok(()),
            Err(e) => {
                if matches!(self.block_job(target), Ok(None)) {
                    return Ok(());
                }
                Err(Error::libvirt(format!("end the block job on {target} of {}", self.name()), &e))
            }
        }
    }
}

/// The destination of a mirror, as libvirt takes it.
fn nbd_destination(socket: &Path, export: &str) -> Element {
    let host =
        Element::new("host").with_attribute("transport", "unix").with_attribute("socket", socket.to_string_lossy());
    Element::new("disk")
        .with_attribute("type", "network")
        .with_attribute("device", "disk")
        .with_child(Element::new("driver").with_attribute("name", "qemu").with_attribute("type", "raw"))
        .with_child(
            Element::new("source").with_attribute("protocol", "nbd").with_attribute("name", export).with_child(host),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destination_is_what_libvirt_takes() {
        let xml = nbd_destination(Path::new("/run/vmdr/a&b.nbd"), "vda").to_string();
        assert_eq!(
            xml,
            "<disk type=\"network\" device=\"disk\"><driver name=\"qemu\" type=\"raw\"/>\
             <source protocol=\"nbd\" name=\"vda\"><host transport=\"unix\" socket=\"/run/vmdr/a&amp;b.nbd\"/></source></disk>"
        );
    }
}
