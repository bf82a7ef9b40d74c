//! What both daemons share: the listener for metrics, the socket for the `vmdr` command, and which domains this host owns.

pub mod durable;
pub mod hook;
pub mod ownership;
pub mod scrape;
pub mod socket;
