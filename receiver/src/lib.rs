//! `vmdr-receiver`: the daemon at the backup site. It stores what agents send of their guests, and activates a guest when its
//! host is lost.
//!
//! - [`store`]: journal, standby, recovery points; synchronous.
//! - [`replication`]: agents' streams into the store; [`probe`]: whether a guest could run here;
//!   [`hashes`]: what an agent that resyncs compares with.
//! - [`activate`]: from a recovery point to a running guest, once.
//! - [`takeover`]: a guest that its owner hands over; [`reverse`]: a standby made of a former owner's disks.
//! - [`cold`]: recovery points to and from object storage.
//! - [`recovery`]: the recovery plan: hooks, announcements, and whether it fits this site.
//! - [`group`]: domains that are activated together, in order; [`ready`]: whether a guest does its work again.
//! - [`control`]: the `vmdr` command's requests.
//! - [`verify`]: points are read again in the background.
//! - [`drill`]: an activation rehearsed on a copy, cut off from everything.
//! - [`silence`]: alarms where nothing is heard of a protected host; [`running`]: the clock for that.
//! - [`failover`]: guests are taken when their host is silent and has no lease any more.
//! - [`daemon`]: all of it together; [`config`], [`metrics`], [`stats`].

pub mod access;
pub mod activate;
pub mod cold;
pub mod config;
pub mod control;
pub mod daemon;
pub mod drill;
pub mod encryption;
pub mod failover;
pub mod group;
pub mod hashes;
pub mod history;
pub mod metrics;
pub mod probe;
pub mod ready;
pub mod recovery;
pub mod replication;
pub mod reverse;
pub mod running;
pub mod silence;
pub mod stats;
pub mod store;
pub mod takeover;
pub mod verify;
