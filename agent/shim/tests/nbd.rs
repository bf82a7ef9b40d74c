//! The NBD server and client against real tools (libnbd, QEMU), against each other, and against what no sane peer sends.

// A helper of a test fails as a test does.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "nbd/client.rs"]
mod client;
#[path = "nbd/common.rs"]
mod common;
#[path = "nbd/mirror.rs"]
mod mirror;
#[path = "nbd/server.rs"]
mod server;
#[path = "nbd/tools.rs"]
mod tools;
#[path = "nbd/wire.rs"]
mod wire;
