//! A guest's own storage that can be disturbed: raw files behind an NBD server of this process.

use crate::guest::{GuestSpec, Store};
use crate::site::Site;
use anyhow::{Context, Result};
use rand::Rng;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmdr_shim::nbd::{Capabilities, Export, ExportError, Extent, FileExport, Server, WriteError};

/// The user that QEMU runs as.
const QEMU_USER: &str = "libvirt-qemu";
/// A flush takes up to this long. Two of them (one in flight, one by `stop`) are well below a cut's limit.
const FLUSH_MAX: Duration = Duration::from_millis(300);

/// What a guest asks of its storage, as far as it can be disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Bytes, or zeroes, are to be written.
    Write,
    /// What was written is to be safe.
    Flush,
}

/// Serves the disks of a guest that lie in [`Store::Nbd`], until it is dropped. Before the guest starts; the guest must
/// have been defined. `before` each request is called, and what it refuses is refused.
pub fn serve<F>(site: &Site, guest: &GuestSpec, before: F) -> Result<Vec<Server>>
where
    F: Fn(Asked) -> Result<(), ExportError> + Clone + Send + Sync + 'static,
{
    let owner = site.run("id", &["-u", QEMU_USER])?.trim().parse().context("the uid of QEMU's user")?;
    (0..guest.disks_mib.len())
        .filter(|number| guest.shape(*number).store == Store::Nbd)
        .map(|number| {
            let path: PathBuf = site.path(guest.disk_path(number));
            let file = FileExport::open(&path, "disk", false).with_context(|| format!("open {}", path.display()))?;
            let export: Arc<dyn Export> = Arc::new(Disturbed { file, before: before.clone() });
            Ok(Server::start(&site.path(guest.nbd_socket(number)), vec![export], Some(owner))?)
        })
        .collect()
}

/// Makes flushes take long. QEMU's `stop` waits for them, so that such a disk lengthens every pause at random.
pub fn slow_flushes(asked: Asked) -> Result<(), ExportError> {
    if asked == Asked::Flush {
        std::thread::sleep(rand::rng().random_range(Duration::ZERO..FLUSH_MAX));
    }
    Ok(())
}

struct Disturbed<F> {
    file: FileExport,
    before: F,
}

impl<F: Fn(Asked) -> Result<(), ExportError> + Send + Sync> Export for Disturbed<F> {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn capabilities(&self) -> Capabilities {
        self.file.capabilities()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.file.read(offset, buf)
    }

    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        (self.before)(Asked::Write)?;
        self.file.write_from(offset, length, source)
    }

    fn zero(&self, offset: u64, length: u64, may_unmap: bool, fast: bool) -> Result<(), ExportError> {
        (self.before)(Asked::Write)?;
        self.file.zero(offset, length, may_unmap, fast)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.file.trim(offset, length)
    }

    fn flush(&self) -> Result<(), ExportError> {
        (self.before)(Asked::Flush)?;
        self.file.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.file.extents(offset, length, limit)
    }

    fn connected(&self, session: u64) {
        self.file.connected(session);
    }

    fn disconnected(&self, session: u64) {
        self.file.disconnected(session);
    }
}
