//! Messages that vmdr's processes exchange, and the constants both ends must agree on.
//!
//! - [`replication`]: agent to receiver, over the network.
//! - [`control`]: the `vmdr` command to a daemon, over a unix socket.
//! - [`host`]: the same, about the host itself: the audit log.
//! - [`shim`]: agent to shim, over a unix socket ([`frame`]).

pub mod frame;

/// Generated from `proto/replication.proto`.
#[allow(missing_docs, clippy::all)]
pub mod replication {
    tonic::include_proto!("vmdr.replication.v1");
}
/// Generated from `proto/control.proto`.
#[allow(missing_docs, clippy::all)]
pub mod control {
    tonic::include_proto!("vmdr.control.v1");
}
/// Generated from `proto/host.proto`.
#[allow(missing_docs, clippy::all)]
pub mod host {
    tonic::include_proto!("vmdr.host.v1");
}
/// Generated from `proto/shim.proto`.
#[allow(missing_docs, clippy::all)]
pub mod shim {
    tonic::include_proto!("vmdr.shim.v1");
}

/// The version of the agent-receiver protocol spoken here (history in `replication.proto`).
pub const REPLICATION_VERSION: u32 = 1;
/// The version of the agent-shim protocol spoken here (history in `shim.proto`).
pub const SHIM_VERSION: u32 = 4;
/// The oldest version of the agent-shim protocol that is still spoken: the one before, because a shim outlives the agent
/// that started it.
pub const SHIM_VERSION_MIN: u32 = SHIM_VERSION - 1;

/// Bytes of a page of guest memory, the unit of the dirty log and of RAM records, whatever the host maps it with.
pub const PAGE_BYTES: usize = 4096;
/// Unit of a disk in which contents are compared by hash, and in which a shim remembers written places.
pub const GRANULE_BYTES: u64 = 64 << 10;
/// The most units whose hashes are asked for at once: 1 MiB of hashes.
pub const HASHES_MAX: u32 = 64 << 10;
/// Bytes of a hash: XXH3-128.
pub const HASH_BYTES: usize = 16;

/// The most a chunk's payload may hold before it is closed; one more record may pass it.
pub const CHUNK_BYTES: usize = 1 << 20;
/// The largest gRPC message accepted: a chunk, the record that passed its limit, and the framing.
pub const MESSAGE_BYTES_MAX: usize = 4 * CHUNK_BYTES;

/// Where the agent listens for the `vmdr` command, unless configured otherwise.
pub const AGENT_SOCKET: &str = "/run/vmdr/agent.sock";
/// Where the receiver listens for the `vmdr` command, unless configured otherwise.
pub const RECEIVER_SOCKET: &str = "/run/vmdr/receiver.sock";
/// TCP port of a receiver's replication service, unless configured otherwise.
pub const RECEIVER_PORT: u16 = 7420;
