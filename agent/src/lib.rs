//! The daemon on a protected host.
//!
//! | module | subject |
//! | --- | --- |
//! | [`daemon`] | the whole: sessions by domain |
//! | [`session`] | the protection of one domain |
//! | [`link`] | the stream to the receiver |
//! | [`resync`] | leaves out what the receiver has |
//! | [`limits`] | what protection may take of link, processors and memory, and which guests are paused when |
//! | [`quiesce`] | brings a guest's file systems to rest for a cut |
//! | [`encode`] | from what a shim captured to what goes over the wire |
//! | [`shim_client`], [`arena_map`], [`guard`] | the shim: asked, read, watched |
//! | [`preflight`] | what can be protected, and what cannot |
//! | [`control`], [`metrics`], [`config`], [`registry`] | the operator's side |

pub mod arena_map;
pub mod config;
pub mod control;
pub mod daemon;
pub mod encode;
pub mod failover;
pub mod guard;
pub mod limits;
pub mod link;
pub mod metrics;
pub mod preflight;
pub mod quiesce;
pub mod registry;
pub mod resync;
pub mod session;
pub mod shim_client;
