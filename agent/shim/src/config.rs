//! What a shim is started with: a JSON file that the agent writes and the shim reads once.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// Bytes captured and not yet durable that a shim may hold, unless configured otherwise. At 100 ms epochs and 5 MB
/// an epoch this is five seconds of a receiver that does not answer.
pub const ARENA_BYTES: u64 = 256 << 20;
/// The most pages copied in one pause, unless configured otherwise: 64 MiB, some 20 ms. More are copied in passes
/// while the guest runs.
pub const CUT_PAGES_MAX: u64 = 16 << 10;
/// How long a cut may keep the guest paused, unless configured otherwise; then it is ended without a recovery point.
pub const CUT_LIMIT_MS: u64 = 2_000;

/// A disk that is mirrored into the shim.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Target name in the domain XML, `vda`; the name of its NBD export.
    pub target: String,
    /// Virtual size.
    pub size_bytes: u64,
}

/// Everything a shim needs to know.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The domain's name, for messages.
    pub domain_name: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// A UUID of the protection itself, made at `protect`: names what is left in QEMU for a successor of this shim.
    /// Empty: nothing is left.
    #[serde(default)]
    pub protection: String,
    /// The process whose memory is watched.
    pub qemu_pid: i32,
    /// The user that QEMU runs as: it must be able to open the NBD sockets.
    pub qemu_uid: u32,
    /// How QEMU is talked to.
    pub monitor: crate::monitor::Address,
    /// Directory of this shim's sockets and state page.
    pub directory: PathBuf,
    /// The disks, in the order in which parts number them.
    pub disks: Vec<DiskConfig>,
    /// Says whether the guest may run ([`crate::permission`]). None: it always may.
    #[serde(default)]
    pub permission: Option<PathBuf>,
    /// See [`ARENA_BYTES`].
    pub arena_bytes: u64,
    /// See [`CUT_PAGES_MAX`].
    pub cut_pages_max: u64,
    /// See [`CUT_LIMIT_MS`].
    pub cut_limit_ms: u64,
}

impl Config {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let config: Self = serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
        anyhow::ensure!(config.qemu_pid > 1, "{}: qemu_pid {} is no guest", path.display(), config.qemu_pid);
        Ok(config)
    }

    /// The socket that the agent connects to.
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.directory)
    }

    /// The socket on which the disks are exported to QEMU's mirror jobs.
    pub fn nbd_socket(&self) -> PathBuf {
        nbd_socket(&self.directory)
    }

    /// The file that tells a survivor whether this shim left the guest paused.
    pub fn state_page(&self) -> PathBuf {
        state_page(&self.directory)
    }

    /// A directory that QEMU may create sockets in.
    pub fn qemu_directory(&self) -> PathBuf {
        self.directory.join("qemu")
    }
}

/// See [`Config::control_socket`].
pub fn control_socket(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

/// See [`Config::nbd_socket`].
pub fn nbd_socket(directory: &Path) -> PathBuf {
    directory.join("nbd.sock")
}

/// See [`Config::state_page`].
pub fn state_page(directory: &Path) -> PathBuf {
    directory.join("state")
}
