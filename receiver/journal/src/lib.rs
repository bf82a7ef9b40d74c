//! The receiver's journal of epochs, and its control record.
//!
//! Nothing here touches files but through [`Disk`], so that tests run the same code on disks that fail and crash.
//! What this crate guarantees, of a disk that keeps what was synced:
//!
//! - A part is durable when [`Journal::end`] has returned, and is found again, whole and unchanged, by [`Journal::open`]
//!   after a crash at any instant. One that was not ended is not found.
//! - Damage is never taken for data: every record carries checksums of its header, which covers its place, and its body.
//! - What a crash can have torn, the end of the newest segment, is cut off at open. Other damage is left as it is and
//!   reported, with what is whole before and behind it.
//! - After a failed sync nothing is appended or acknowledged until the journal has been opened again.
//! - The control record ([`Control`]) is either the old or the new one after a crash, never a mixture.
//!
//! The formats are documented byte by byte in `docs/journal.md`.

mod control;
mod disk;
mod error;
mod history;
mod journal;
mod record;
mod scan;
mod survey;

pub use control::{CONTROL_FILE, Chain, Control, HistoryMark, Pin, Seed, SmallSums, Standby, Tier};
pub use disk::{Disk, File, FsDisk, LockGuard, Mode, write_all};
pub use error::JournalError;
pub use history::{
    Array, Entry, HISTORY_SEGMENT_BYTES, HistoryLog, HistoryScan, Key, Place, PointTail, Set, UNIT_BYTES, read_back,
    read_set, read_unit, read_unit_as_kept, segments, unit_sum,
};
pub use journal::{Journal, read_chunk, remove_segments_before, segment_path};
pub use record::{ChunkAt, Kind, Part, PartHead, PartTail};
pub use scan::{Damage, Recovered, Torn};
pub use survey::{RecordSeen, SegmentSeen, survey_journal, survey_segment};

/// A part is put into a new segment when the newest one is this long, so that applied epochs can be deleted in steps.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// The longest record body accepted: twice the longest payload of the codec.
pub const BODY_BYTES_MAX: u32 = 4 << 20;
/// The version of the formats of this crate.
pub const FORMAT_VERSION: u32 = 1;
