//! Network Block Device, both ends, over unix sockets.
//!
//! The [`server`] is what QEMU's mirror job writes to; the [`client`] reads a guest's disk through an export of
//! QEMU's own. Both speak the fixed newstyle protocol of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>
//! ("the spec" in these modules).
//!
//! What the server guarantees, because QEMU's `stop` drains *under its global lock* and a server that stops answering
//! takes the guest and every monitor with it:
//! - it waits for nobody: one thread a connection, and no lock of the server is held across I/O;
//! - whatever a peer sends, the worst that happens is that its own connection is closed;
//! - an error of an export reaches the peer as an error reply, never as a success, and never as silence.
//!
//! | module | subject |
//! | --- | --- |
//! | [`proto`], [`message`] | constants; messages to bytes and back; no I/O |
//! | [`export`] | what a server serves: the trait |
//! | [`handshake`] | server's half of the negotiation, over any stream |
//! | [`session`] | server's half of the transmission phase, over any stream |
//! | [`server`] | the listening socket, the threads, the end of both |
//! | [`mod@file`] | an export backed by a sparse file |
//! | [`client`] | a blocking client |

pub mod client;
mod client_wire;
pub mod export;
pub mod file;
pub mod handshake;
pub mod message;
pub mod proto;
pub mod server;
pub mod session;
mod stream;

pub use client::{Client, ClientError, Question};
pub use export::{Capabilities, Export, ExportError, Extent, WriteError};
pub use file::FileExport;
pub use server::{Server, ServerError};
