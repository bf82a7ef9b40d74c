//! Activation: brings a guest up from its standby, once.
//!
//! What it guarantees, also when it is killed at any instant and run again:
//! - The old host is fenced on disk before the guest can run here.
//! - There is never a second guest: a guest that runs is found and kept, one that has run is not restored again.
//! - The recovery point is not changed: the guest writes to overlays and to private memory.
//! - It takes no longer for a guest with much memory, which is mapped and not read ([`memory`]).
//!
//! An older recovery point is activated in the same way; [`content`] has what is different.
//!
//! [`plan`] decides, [`run`] does, [`record`] is what survives; [`xml`] and [`save_image`] are the formats, [`checks`] the
//! questions to the host, which preflight asks as well; [`thaw`] comes after it. [`mapping`] is how its NICs map onto this site.

pub mod checks;
pub mod clear;
pub mod content;
pub mod files;
pub mod findings;
pub mod host;
pub mod mapping;
pub mod memory;
pub mod plan;
pub mod qcow2;
pub mod record;
pub mod run;
pub mod save_image;
pub mod thaw;
pub mod xml;

use std::path::PathBuf;

/// What the receiver's configuration says about activation.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The receiver's state directory: QEMU's user is let through from here on.
    pub state_directory: PathBuf,
    /// Where guests that are encrypted at rest lie in the clear when they run.
    pub clear_directory: Option<PathBuf>,
    /// How its NICs map onto this site.
    pub mapping: mapping::Mapping,
}

/// Why a guest was not activated. The recovery point is as it was, whatever the error.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The stored definition is no use.
    #[error("the stored domain XML cannot be read: {0}")]
    DomainXml(String),
    /// It cannot be changed for this host.
    #[error(transparent)]
    Transform(#[from] xml::TransformError),
    /// Memory and definition do not fit.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// This host lacks something; nothing was changed.
    #[error("{name} cannot be activated here: {reasons}")]
    Refused {
        /// The guest.
        name: String,
        /// Facts and remedies, in one line.
        reasons: String,
    },
    /// An encrypted recovery point does not come into the clear; nothing of it is left there.
    #[error("the recovery point cannot be decrypted: {0}")]
    Decrypt(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The guest ran here and does not run now.
    #[error(
        "{name} was activated here from recovery point {point} and is not running now, so it is not restored again: \
         `virsh start {name}` goes on with its disks as it left them. To throw away what it did since and return to the \
         recovery point: `virsh undefine {name}`, move {directory:?} away, and activate again"
    )]
    HasRun {
        /// The guest.
        name: String,
        /// GENERATION-EPOCH.
        point: String,
        /// Its directory of overlays.
        directory: PathBuf,
    },
    /// It does not come to run.
    #[error(
        "{name} is restored but {state} instead of running; see /var/log/libvirt/qemu/{name}.log, then run activate again"
    )]
    NotRunning {
        /// The guest.
        name: String,
        /// The state it is in.
        state: String,
    },
    /// libvirt refused the restore; everything made for it is removed.
    #[error(
        "{name} was not restored: {said}. The recovery point is untouched, the old host is fenced: put right what libvirt \
         names and run activate again (its QEMU's log: /var/log/libvirt/qemu/{name}.log)"
    )]
    Restore {
        /// The guest.
        name: String,
        /// libvirt's words, and QEMU's if there are any.
        said: String,
    },
    /// Another step of libvirt's failed.
    #[error(transparent)]
    Hypervisor(#[from] vmdr_hypervisor::Error),
    /// Which site owns the guest cannot be recorded.
    #[error(transparent)]
    Ownership(#[from] vmdr_daemon::ownership::OwnershipError),
    /// The record cannot be read or written.
    #[error(transparent)]
    Record(#[from] record::RecordError),
    /// A file cannot be made ready.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// The save image cannot be made.
    #[error(transparent)]
    SaveImage(#[from] save_image::SaveImageError),
}
