//! Two sites and a witness in virtual time: the cores of this crate and the state machine of ownership, with clocks that
//! drift, partitions, delays, crashes, freezes and operators. Everything follows from a seed.
//!
//! What is real here: [`Holder`], [`Standby`], [`allows`](crate::allows) and [`vmdr_daemon::ownership::next`]. What is
//! modelled: the network, etcd (leases that go on for their whole life after a restart, answers that are lost), the shim (it
//! looks at the deadline each 50 ms and needs up to 300 ms to stop the guest) and the guests.

mod faults;
mod random;
mod tests;
mod witness;
mod world;

pub(crate) use random::Random;
pub(crate) use world::{Mutant, World};
