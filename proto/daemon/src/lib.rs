//! What both daemons share: the listener for metrics, the socket for the `vmdr` command with who may ask what on it,
//! which domains this host owns, and the channel to a guest's tools.

pub mod caller;
mod credentials;
pub mod durable;
pub mod guard;
pub mod guest_channel;
pub mod hook;
pub mod host;
pub mod ownership;
pub mod scrape;
pub mod socket;
