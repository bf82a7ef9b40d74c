//! The two-site rig, for the end-to-end cases, the benchmarks and the demo.
//!
//! - [`rig`]: two sites on one machine, each with a libvirtd of its own, a link between them that can be cut, and a client.
//! - [`guest`]: test guests: what they are made of, and how to ask them from outside.
//! - [`daemon`]: vmdr's own processes in a site, and the `vmdr` command.
//! - [`random`]: random choices that can be repeated.
//! - [`relay`]: a TCP relay on the link that delays, limits and stalls.
//! - [`oracle`]: what a guest's memory and disks hold, read by a path that shares nothing with vmdr's.
//! - [`huge_pages`]: lets guests have huge pages.
//! - [`wire`]: the link as a long and bad cable, for the sites' own TCP.
//! - [`sniff`]: what passes a network device, by its sender.
//! - [`footprint`]: what a process takes of the machine.
//! - [`leftovers`]: what a protection may leave behind: nothing.
//! - [`images`]: what guests boot.
//! - [`scene`]: what most end-to-end cases begin with.
//! - [`pair`]: the same where either site protects to the other.
//! - [`nbd_store`]: a guest's own storage that can be disturbed: flushes that take long, writes that are refused.
//! - [`etcd`]: a witness in the network between the sites.
//! - [`observer`]: at which site the guest executes, all the time.
//! - [`knot`]: a name server that takes signed updates.
//! - [`wait`]: waiting with a limit.
//!
//! Everything here needs root. Nothing outlives the process that made it: see [`rig`] for how.

pub mod client;
pub mod daemon;
pub mod etcd;
pub mod exec;
pub mod footprint;
pub mod guest;
pub mod huge_pages;
pub mod images;
pub mod knot;
pub mod leftovers;
pub mod nbd_store;
pub mod observer;
pub mod oracle;
pub mod pair;
pub mod random;
pub mod relay;
pub mod rig;
pub mod scene;
pub mod site;
pub mod sniff;
mod tap;
pub mod wait;
pub mod wire;
