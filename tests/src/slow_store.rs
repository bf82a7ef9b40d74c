//! A disk whose flushes take long: a raw file behind an NBD server of this process, as a guest's own storage.
//!
//! QEMU's `stop` waits for flushes, so that such a disk lengthens every pause at random.

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

/// Serves the disks of a guest that lie in [`Store::Nbd`], until it is dropped. Before the guest starts; the guest must
/// have been defined.
pub fn serve(site: &Site, guest: &GuestSpec) -> Result<Vec<Server>> {
    let owner = site.run("id", &["-u", QEMU_USER])?.trim().parse().context("the uid of QEMU's user")?;
    (0..guest.disks_mib.len())
        .filter(|number| guest.shape(*number).store == Store::Nbd)
        .map(|number| {
            let path: PathBuf = site.path(guest.disk_path(number));
            let file = FileExport::open(&path, "disk", false).with_context(|| format!("open {}", path.display()))?;
            let export: Arc<dyn Export> = Arc::new(Slow { file });
            Ok(Server::start(&site.path(guest.nbd_socket(number)), vec![export], Some(owner))?)
        })
        .collect()
}

struct Slow {
    file: FileExport,
}

impl Export for Slow {
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
        self.file.write_from(offset, length, source)
    }

    fn zero(&self, offset: u64, length: u64, may_unmap: bool, fast: bool) -> Result<(), ExportError> {
        self.file.zero(offset, length, may_unmap, fast)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.file.trim(offset, length)
    }

    fn flush(&self) -> Result<(), ExportError> {
        std::thread::sleep(rand::rng().random_range(Duration::ZERO..FLUSH_MAX));
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
