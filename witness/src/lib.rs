//! Failure detection: what each side of a protection decides when it does not hear of the other.
//!
//! Two cores without I/O and without a clock: [`Holder`] at the protected host, [`Standby`] at the backup site. Whoever
//! drives them passes the time in, does what they ask for, and tells them what came of it. So the same code runs in the
//! daemons and, with drifting clocks, crashes and partitions, in the simulation (`src/sim`), which is where the rule of
//! `docs/failover.md` is tried out.
//!
//! ```text
//!   protected host                      witness                         backup site
//!   Holder: may the guest run,      owner: generation, holder       Standby: is the host silent,
//!   and until when?            ---> lease: holder, expires    <---  may the guest be taken?
//!        |                                                              ^
//!        +-------- Arm, Disarm (over the stream of epochs) -------------+
//! ```

pub mod holder;
mod rule;
mod silence;
#[cfg(test)]
mod sim;
pub mod standby;
mod terms;

use std::time::Duration;

pub use holder::{Backup, Holder, May};
pub use rule::{Allowed, Claim, Over, Owner, View, allows};
pub use silence::Silence;
pub use standby::{Stance, Standby};
pub use terms::{DRIFT_PPM, TTL_MAX, Terms, TermsError};

/// A moment by the clock of one host: time since whatever that clock counts from. It has to go on while the host is
/// suspended (`CLOCK_BOOTTIME`), and is never compared with another host's.
pub type Time = Duration;
