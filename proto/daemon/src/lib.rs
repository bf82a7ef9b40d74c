//! What both daemons share: the listener for metrics and the socket for the `vmdr` command.

pub mod scrape;
pub mod socket;
