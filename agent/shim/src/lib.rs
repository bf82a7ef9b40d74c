//! The process beside each protected guest.
//!
//! `vmdr-shim` holds what must survive an agent's restart or upgrade and must never hang: the dirty log of the
//! guest's memory, the domain's own QMP socket, the NBD server that the disks are mirrored into, and the cut. It
//! hands checkpoints to the agent through shared memory ([`arena`]) and a unix socket ([`server`]).
//!
//! ```text
//!   QEMU --- QMP ------------> capture (the only owner of the guest's state) <---- server <---- agent
//!     \----- NBD: disk writes --> disk (log of the open epoch) --/                                 |
//!     \----- pages: uffd, PAGEMAP_SCAN, process_vm_readv --------/----> arena (memfd) <--- read ---/
//! ```

pub mod arena;
pub use vmdr_bitmap as bitmap;
pub mod capture;
pub mod config;
pub mod deadline;
pub mod dirty_log;
pub mod disk;
pub mod inject;
pub mod monitor;
pub mod nbd;
pub mod permission;
pub mod procmem;
pub mod qmp;
pub mod ramblock;
pub mod rescue;
pub mod server;
pub mod state_page;
pub mod uffd;
