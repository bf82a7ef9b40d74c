//! The NBD server and client against real tools (libnbd, QEMU), against each other, and against what no sane peer sends.

#[path = "nbd/client.rs"]
mod client;
#[path = "nbd/common.rs"]
mod common;
#[path = "nbd/server.rs"]
mod server;
#[path = "nbd/tools.rs"]
mod tools;
#[path = "nbd/wire.rs"]
mod wire;
