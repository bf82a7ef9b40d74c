//! The audit log: who did what to this host's protection, and who was refused.
//!
//! One JSON object a line, in files of a directory of its own; each daemon has a chain of its own there. What it guarantees:
//!
//! - **A record is on the disk when [`Audit::record`] returns** (fsynced), if the disk works. Repeated refusals of the same caller are counted
//!   and written as one record each [`REPEAT_WINDOW`], so that a flood can fill neither the disk nor the log.
//! - **Changes show.** Each record carries the hash of the one before and its own (SHA-256), and a sequence number.
//!   [`verify`] names the first line that is wrong. The newest record's number and hash stand in a file beside the log
//!   and in the daemon's ordinary log, so that a log that was cut short is noticed too.
//! - **It is bounded.** Files are closed at [`FILE_BYTES_MAX`], and the oldest of more than [`FILES_MAX`] is deleted, after a
//!   record that says up to where, so that the chain still begins at a known place.
//!
//! It does not keep root from rewriting all of it: whoever needs that ships the daemon's log, with its hashes, elsewhere.
//! A log that cannot be written does not stop an administrative act: an activation on the day of the disaster counts for
//! more. It is said as loudly as possible instead ([`Audit::trouble`]), and in the log itself, by number, as soon as that can be
//! written again. Nor does a disk that hangs stop one for longer than [`RECORD_TIME_MAX`], once.

/// Where the log is, unless configured otherwise; both daemons of a host use the same directory.
pub const DIRECTORY: &str = "/var/lib/vmdr/audit";

mod chain;
mod files;
mod log;
mod verify;

pub use chain::{Entry, Outcome, ZERO_HASH};
pub use files::{AuditError, FILE_BYTES_MAX, FILES_MAX};
pub use log::{Audit, RECORD_TIME_MAX, REPEAT_WINDOW};
pub use verify::{Fault, Verdict, daemons, last_lines, verify};
