//! What an NBD server serves.
//!
//! The server checks every request (range, alignment, flags, direction) before it calls an [`Export`], so that an
//! export sees only requests that are inside its size and that its [`Capabilities`] allow. Several sessions may call
//! one export at the same time.

use super::proto::ErrorCode;
use std::io::{self, Read};

/// What an export can do; told to every client while it connects, and not expected to change afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// READ is answered. An export that only records writes says `false`: clients get EPERM.
    pub read: bool,
    /// WRITE, WRITE_ZEROES and TRIM are answered; otherwise the export is announced as read-only.
    pub write: bool,
    /// TRIM is announced.
    pub trim: bool,
    /// WRITE_ZEROES with FAST_ZERO is announced: [`Export::zero`] with `fast` never takes as long as writing would.
    pub fast_zero: bool,
    /// BLOCK_STATUS (`base:allocation`) is announced.
    pub block_status: bool,
    /// A flush on one session covers what every session has been told is written, and all sessions see the same data.
    pub multi_connection: bool,
    /// Requests are multiples of this, a power of two from 1 to 65,536 bytes; the size must be a multiple too.
    pub block_bytes_min: u32,
}

/// A run of bytes of the same kind (`base:allocation` in the spec).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub length: u64,
    /// Nothing is allocated: writing here may need space.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// Why an export could not do what was asked. The peer gets the matching NBD error and, where it agreed to
/// structured replies, this text.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The operation is not allowed on this export, now or ever.
    #[error("not permitted: {0}")]
    Permission(String),
    /// The export cannot do this: a fast zero that would be slow, for instance.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// No room for the data.
    #[error("no space: {0}")]
    NoSpace(String),
    /// The export is going away; the client should disconnect.
    #[error("shutting down: {0}")]
    Shutdown(String),
    /// A rule of the export itself was broken.
    #[error("{0}")]
    Failed(String),
    /// The system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl ExportError {
    /// The error number that goes over the wire.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Permission(_) => ErrorCode::Permission,
            Self::Unsupported(_) => ErrorCode::Unsupported,
            Self::NoSpace(_) => ErrorCode::NoSpace,
            Self::Shutdown(_) => ErrorCode::Shutdown,
            Self::Failed(_) => ErrorCode::Io,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    ErrorCode::NoSpace
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::Permission,
                io::ErrorKind::OutOfMemory => ErrorCode::Memory,
                _ => ErrorCode::Io,
            },
        }
    }
}

/// Why [`Export::write_from`] failed. The two are kept apart because they end differently: a broken source ends the
/// session, a failed export is answered with an error and the session goes on.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The payload could not be read from `source`.
    #[error("payload: {0}")]
    Source(io::Error),
    /// The export could not take the payload.
    #[error(transparent)]
    Export(#[from] ExportError),
}

/// One block device.
///
/// FUA needs nothing here: the server calls [`flush`](Export::flush) after the request, before it answers.
///
/// An implementation must not wait for another session or for the network in any method, and must hold no lock while
/// it reads from `source` in [`write_from`](Export::write_from): a client that stalls in the middle of a payload would
/// otherwise stall everybody.
pub trait Export: Send + Sync {
    /// The name clients ask for; at most [`NAME_BYTES_MAX`](super::proto::NAME_BYTES_MAX) bytes of UTF-8.
    fn name(&self) -> &str;

    /// Size of the device. Asked once per session.
    fn size_bytes(&self) -> u64;

    /// What clients are told this export can do. Asked once per session.
    fn capabilities(&self) -> Capabilities;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Any [`ExportError`]; nothing of `buf` is sent then.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError>;

    /// Writes `length` bytes at `offset`, reading them from `source` straight into where they belong.
    ///
    /// `source` yields exactly `length` bytes and fails (it never ends early) when the connection breaks. What arrived
    /// before that may or may not be written: the client was told nothing. On success all of `source` must have been
    /// read; after an [`WriteError::Export`] the server discards the rest, so that an export may refuse at once.
    ///
    /// # Errors
    /// [`WriteError::Source`] for an error of `source`, [`WriteError::Export`] for everything else.
    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError>;

    /// Makes `length` bytes from `offset` read as zeroes. With `may_unmap` they may become a hole, without they must
    /// stay (or become) allocated. With `fast`, fail with [`ExportError::Unsupported`] rather than write zeroes; it is
    /// only asked of exports that announce `fast_zero`.
    ///
    /// # Errors
    /// Any [`ExportError`].
    fn zero(&self, offset: u64, length: u64, may_unmap: bool, fast: bool) -> Result<(), ExportError>;

    /// The client does not need these bytes any more; what they read as afterwards is undefined.
    ///
    /// # Errors
    /// Any [`ExportError`].
    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError>;

    /// Everything answered before is on stable storage when this returns, whatever stable means for this export.
    ///
    /// # Errors
    /// Any [`ExportError`].
    fn flush(&self) -> Result<(), ExportError>;

    /// Kinds of the bytes from `offset`: at least one extent, at most `limit`, together at most `length` bytes (the
    /// server cuts off what is more), in order and without gaps. Fewer bytes than `length` are allowed.
    ///
    /// # Errors
    /// Any [`ExportError`].
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError>;

    /// A client chose this export and is about to be told that it may begin; `session` is never used twice by one server.
    fn connected(&self, session: u64);

    /// That session is over, however it ended; called exactly once after each [`connected`](Export::connected), when
    /// no request of the session is being worked on any more.
    fn disconnected(&self, session: u64);
}
