//! Dirty logs and checkpoints for VMMs built on rust-vmm: for guests whose KVM descriptors are the caller's own.
//!
//! vmdr's shim protects a guest of a QEMU that it does not control: it reads that process's page tables. A VMM that holds the
//! `/dev/kvm` descriptors itself can ask KVM which pages the guest wrote. This crate has both of KVM's logs behind one trait
//! ([`DirtyLog`]): the bitmap ([`BitmapLog`]) and the ring ([`RingLog`]); what else a checkpoint needs ([`GuestState`]); and
//! epochs as a stream of bytes in the encoding of `vmdr-codec`, from which another process goes on ([`Source`], [`Writer`],
//! [`Reader`]).
//!
//! ```text
//!   vCPUs --write--> guest memory --copy--> Part --Writer--> bytes --Reader--> Epoch --apply--> memory, state
//!               \--> KVM's log ---collect----/
//! ```
//!
//! Units: pages are of 4 KiB ([`PAGE_BYTES`]) whatever the host maps the memory with, and numbered within their slot;
//! addresses and lengths are bytes.

mod bitmap_log;
mod log;
mod ring_log;
mod state;
mod stream;
mod sys;

pub use bitmap_log::BitmapLog;
pub use log::{DirtyLog, LogError, Slot};
pub use ring_log::{EXIT_RING_FULL, RingLog};
pub use state::{GuestState, StateError, VcpuState};
pub use stream::{Epoch, Part, Reader, Source, StreamError, Writer};
pub use vmdr_bitmap::Bitmap;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = vmdr_codec::PAGE_BYTES as u64;
