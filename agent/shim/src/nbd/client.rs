//! A small blocking client: reads a disk, and asks where its data is, through an NBD export on a unix socket.
//!
//! Meant for QEMU's own read-only export of a guest's disk. Every exchange has a deadline, so that a server that hangs
//! costs [`ClientError::Io`] and not a thread; after any error but a server's error reply the connection is of no
//! use ([`ClientError::Broken`] from then on), because it is not known what it would say next. Nothing the server sends is
//! trusted: a reply must cover exactly what was asked for, each byte once.

use super::export::Extent;
use super::handshake::decode_error_chunk;
use super::message::{
    ContextQuery, ExportQuery, Fields, OptionReplyHead, ProtoError, ReplyHead, Request, decode_greeting, encode_option,
};
use super::proto::{
    BLOCK_BYTES_MIN_MAX, CONTEXT_ALLOCATION, ErrorCode, NAME_BYTES_MAX, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX,
    STATE_HOLE, STATE_ZERO, chunk, client_flag, command, handshake_flag, info, option, reply,
};
use super::stream::DeadlineStream;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest single BLOCK_STATUS question: the length has 32 bits, and this is a multiple of any block size.
const STATUS_BYTES_MAX: u64 = 2 << 30;
/// Largest answer to it that is accepted: QEMU sends up to 1 MiB of extents.
const STATUS_REPLY_BYTES_MAX: u32 = 2 << 20;
/// Longest error chunk: number, text of [`NAME_BYTES_MAX`], offset.
const ERROR_CHUNK_BYTES_MAX: u32 = 4 + 2 + NAME_BYTES_MAX as u32 + 8;
/// Pieces of one read: 32 MiB in sectors, the finest that QEMU tells data from holes.
const PIECES_MAX: usize = 64 << 10;
/// Replies to one option: a handful of information replies, and room.
const OPTION_REPLIES_MAX: usize = 64;

/// Why the client could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error("connect to NBD server at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection broke or ran into its time limit; connect anew.
    #[error("NBD {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The server sent what it must not; connect anew.
    #[error("NBD {doing}: the server broke the protocol: {source}")]
    Proto {
        /// What was being done.
        doing: &'static str,
        /// What it sent.
        source: ProtoError,
    },
    /// The server will not serve this export.
    #[error("NBD server refuses export {name:?}: {text} ({kind:#x})")]
    Export {
        /// The export.
        name: String,
        /// Which error, of [`reply`](super::proto::reply).
        kind: u32,
        /// What the server says to it.
        text: String,
    },
    /// The server could not do it; the connection is good for more.
    #[error("NBD {doing} of {length} bytes at {offset}: server answers {code:?} {text}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The error.
        code: ErrorCode,
        /// What the server says to it; empty with simple replies.
        text: String,
    },
    /// Asked for bytes that the export does not have; nothing was sent.
    #[error("{length} bytes at {offset} are beyond the {size} of NBD export")]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Size of the export.
        size: u64,
    },
    /// The server did not agree to `base:allocation`; nothing was sent.
    #[error("the NBD server does not tell where data is ({CONTEXT_ALLOCATION})")]
    NoBlockStatus,
    /// The connection failed before; connect anew.
    #[error("the NBD connection failed before")]
    Broken,
}

/// What goes wrong on the wire, before it is known what was being done.
enum Wire {
    Io(io::Error),
    Proto(ProtoError),
}

impl From<io::Error> for Wire {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ProtoError> for Wire {
    fn from(error: ProtoError) -> Self {
        Self::Proto(error)
    }
}

impl Wire {
    fn during(self, doing: &'static str) -> ClientError {
        match self {
            Self::Io(source) => ClientError::Io { doing, source },
            Self::Proto(source) => ClientError::Proto { doing, source },
        }
    }
}

fn unexpected<T>(what: &'static str, found: impl Into<u64>) -> Result<T, Wire> {
    Err(Wire::Proto(ProtoError::Unexpected { what, found: found.into() }))
}

/// An error reply to a request.
struct ErrorReply {
    code: ErrorCode,
    text: String,
}

/// What the server told about the export.
#[derive(Clone, Copy, Debug)]
struct Terms {
    size_bytes: u64,
    structured: bool,
    /// Id of `base:allocation`.
    context: Option<u32>,
    block_bytes_min: u32,
    payload_bytes_max: u32,
}

/// A connection to one export.
pub struct Client {
    stream: UnixStream,
    timeout: Duration,
    terms: Terms,
    cookie: u64,
    broken: bool,
}

impl Client {
    /// Connects and negotiates, within `timeout`, which later is the limit of each exchange with the server.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(path: &Path, export_name: &str, timeout: Duration) -> Result<Self, ClientError> {
        let stream = connect(path, timeout).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let terms = negotiate(&mut DeadlineStream::new(&stream, timeout), export_name)?;
        Ok(Self { stream, timeout, terms, cookie: 0, broken: false })
    }

    /// Size of the export.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.terms.size_bytes
    }

    /// [`block_status`](Client::block_status) can be asked.
    #[must_use]
    pub fn has_block_status(&self) -> bool {
        self.terms.context.is_some()
    }

    /// Fills `buf` from `offset`, in as many requests as the server's limits need. Any offset and length: what the server
    /// cannot address is cut out of whole blocks.
    ///
    /// # Errors
    /// [`ClientError`]; the content of `buf` is undefined then.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), ClientError> {
        self.check_range(offset, buf.len() as u64)?;
        let unit = u64::from(self.terms.block_bytes_min);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let whole = rest.len() as u64 / unit * unit;
            if at % unit == 0 && whole > 0 {
                let part = whole.min(self.terms.payload_bytes_max.into());
                let (piece, after) = rest.split_at_mut(part as usize);
                self.read_once(at, piece)?;
                (at, rest) = (at + part, after);
            } else {
                // A block of which only a part is wanted.
                let start = at / unit * unit;
                let skip = (at - start) as usize;
                let mut block = vec![0; unit.min(self.terms.size_bytes - start) as usize];
                self.read_once(start, &mut block)?;
                let part = (block.len() - skip).min(rest.len());
                let (piece, after) = rest.split_at_mut(part);
                piece.copy_from_slice(&block[skip..skip + part]);
                (at, rest) = (at + part as u64, after);
            }
        }
        Ok(())
    }

    /// What is allocated and what reads as zeroes, from `offset`: extents that together are exactly `length` bytes,
    /// neighbours of a kind as one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn block_status(&mut self, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        let context = self.terms.context.ok_or(ClientError::NoBlockStatus)?;
        self.check_range(offset, length)?;
        let unit = u64::from(self.terms.block_bytes_min);
        let end = offset + length;
        let last = end.next_multiple_of(unit).min(self.terms.size_bytes);
        let mut at = offset / unit * unit;
        let mut extents: Vec<Extent> = Vec::new();
        while at < end {
            for extent in self.status_once(at, (last - at).min(STATUS_BYTES_MAX), context)? {
                // Of a widened question only what was asked for counts.
                let from = at.max(offset);
                at += extent.length;
                let piece = Extent { length: at.min(end).saturating_sub(from), ..extent };
                match extents.last_mut() {
                    _ if piece.length == 0 => {}
                    Some(before) if (before.hole, before.zero) == (piece.hole, piece.zero) => {
                        before.length += piece.length;
                    }
                    _ => extents.push(piece),
                }
            }
        }
        Ok(extents)
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        let size = self.terms.size_bytes;
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(ClientError::Range { offset, length, size })
    }

    fn read_once(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), ClientError> {
        let length = buf.len() as u64;
        let terms = self.terms;
        self.exchange("read", command::READ, offset, length, |stream, cookie| {
            read_reply(stream, cookie, offset, buf, terms.structured)
        })
    }

    fn status_once(&mut self, offset: u64, length: u64, context: u32) -> Result<Vec<Extent>, ClientError> {
        self.exchange("block status", command::BLOCK_STATUS, offset, length, |stream, cookie| {
            status_reply(stream, cookie, length, context)
        })
    }

    /// One request and its reply, within the time limit.
    fn exchange<T>(
        &mut self,
        doing: &'static str,
        command: u16,
        offset: u64,
        length: u64,
        answer: impl FnOnce(&mut DeadlineStream<'_>, u64) -> Result<Result<T, ErrorReply>, Wire>,
    ) -> Result<T, ClientError> {
        if self.broken {
            return Err(ClientError::Broken);
        }
        // Until a whole reply has been understood.
        self.broken = true;
        self.cookie += 1;
        let wire_length = u32::try_from(length).unwrap_or(u32::MAX);
        let request = Request { flags: 0, command, cookie: self.cookie, offset, length: wire_length };
        let mut stream = DeadlineStream::new(&self.stream, self.timeout);
        let result = stream.write_all(&request.encode()).map_err(Wire::from);
        let result = result.and_then(|()| answer(&mut stream, self.cookie)).map_err(|wire| wire.during(doing))?;
        self.broken = false;
        result.map_err(|ErrorReply { code, text }| ClientError::Refused { doing, offset, length, code, text })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.broken {
            return;
        }
        // A courtesy: the server sees the end of the connection anyway, so this may neither wait nor fail.
        let goodbye = Request { flags: 0, command: command::DISC, cookie: self.cookie + 1, offset: 0, length: 0 };
        if self.stream.set_nonblocking(true).is_ok() {
            let _ = self.stream.write_all(&goodbye.encode());
        }
    }
}

fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On unix sockets this also limits connect, which waits while the server's backlog is full.
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn negotiate(stream: &mut DeadlineStream<'_>, name: &str) -> Result<Terms, ClientError> {
    const DOING: &str = "negotiation";
    let refused = |reply: OptionError| match reply {
        OptionError::Refused { kind, text } => ClientError::Export { name: name.to_owned(), kind, text },
        OptionError::Wire(wire) => wire.during(DOING),
    };
    greet(stream).map_err(|wire| wire.during(DOING))?;

    // Both are extras: a server that does not know them is used without.
    let mut structured = false;
    let mut context = None;
    match ask(stream, option::STRUCTURED_REPLY, &[], |kind, _| unexpected("reply to structured reply", kind)) {
        Ok(()) => structured = true,
        Err(OptionError::Refused { .. }) => {}
        Err(other) => return Err(refused(other)),
    }
    if structured {
        let query = ContextQuery { name: name.to_owned(), queries: vec![CONTEXT_ALLOCATION.to_owned()] };
        let asked = ask(stream, option::SET_META_CONTEXT, &query.encode(), |kind, data| {
            if kind != reply::META_CONTEXT {
                return unexpected("reply to set meta context", kind);
            }
            let mut fields = Fields::new("meta context", data);
            let id = fields.u32()?;
            if fields.rest() == CONTEXT_ALLOCATION.as_bytes() {
                context = Some(id);
            }
            Ok(())
        });
        match asked {
            Ok(()) => {}
            Err(OptionError::Refused { .. }) => context = None,
            Err(other) => return Err(refused(other)),
        }
    }

    let mut size_bytes = None;
    let mut sizes = (1, PAYLOAD_BYTES_MAX);
    let query = ExportQuery { name: name.to_owned(), infos: vec![info::BLOCK_SIZE] };
    ask(stream, option::GO, &query.encode(), |kind, data| {
        if kind != reply::INFO {
            return unexpected("reply to go", kind);
        }
        let mut fields = Fields::new("export information", data);
        match fields.u16()? {
            info::EXPORT => size_bytes = Some(fields.u64()?),
            info::BLOCK_SIZE => sizes = block_sizes(fields)?,
            _ => {}
        }
        Ok(())
    })
    .map_err(refused)?;
    let (block_bytes_min, payload_bytes_max) = sizes;
    let missing = || Wire::Proto(ProtoError::Truncated { what: "export information" }).during(DOING);
    let size_bytes = size_bytes.ok_or_else(missing)?;
    Ok(Terms { size_bytes, structured, context, block_bytes_min, payload_bytes_max })
}

fn greet(stream: &mut DeadlineStream<'_>) -> Result<(), Wire> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let flags = decode_greeting(&greeting)?;
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return unexpected("handshake flags without fixed newstyle", flags);
    }
    stream.write_all(&(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes())?;
    Ok(())
}

/// Minimum and maximum block size.
fn block_sizes(mut fields: Fields<'_>) -> Result<(u32, u32), Wire> {
    let (least, _preferred, most) = (fields.u32()?, fields.u32()?, fields.u32()?);
    if !least.is_power_of_two() || least > BLOCK_BYTES_MIN_MAX {
        return unexpected("minimum block size", least);
    }
    // Whole blocks, and no more than any server takes.
    let most = most.min(PAYLOAD_BYTES_MAX) / least * least;
    if most == 0 {
        return unexpected("maximum block size", most);
    }
    Ok((least, most))
}

enum OptionError {
    Refused { kind: u32, text: String },
    Wire(Wire),
}

impl<E: Into<Wire>> From<E> for OptionError {
    fn from(error: E) -> Self {
        Self::Wire(error.into())
    }
}

/// Sends an option and hands each reply before the acknowledgement to `each`.
fn ask(
    stream: &mut DeadlineStream<'_>,
    option: u32,
    data: &[u8],
    mut each: impl FnMut(u32, &[u8]) -> Result<(), Wire>,
) -> Result<(), OptionError> {
    stream.write_all(&encode_option(option, data))?;
    for _ in 0..OPTION_REPLIES_MAX {
        let mut head = [0; OptionReplyHead::BYTES];
        stream.read_exact(&mut head)?;
        let head = OptionReplyHead::decode(&head)?;
        if head.option != option {
            return Err(ProtoError::Unexpected { what: "reply to option", found: head.option.into() }.into());
        }
        // Decoding made sure that this is at most OPTION_BYTES_MAX.
        debug_assert!(head.length <= OPTION_BYTES_MAX);
        let mut data = vec![0; head.length as usize];
        stream.read_exact(&mut data)?;
        match head.kind {
            reply::ACK => return Ok(()),
            kind if kind & reply::ERROR_BIT != 0 => {
                return Err(OptionError::Refused { kind, text: String::from_utf8_lossy(&data).into_owned() });
            }
            kind => each(kind, &data)?,
        }
    }
    Err(ProtoError::Unexpected { what: "number of replies to option", found: option.into() }.into())
}

/// Heads of the reply to `cookie`.
fn reply_head(stream: &mut DeadlineStream<'_>, cookie: u64) -> Result<ReplyHead, Wire> {
    let mut bytes = [0; ReplyHead::BYTES];
    stream.read_exact(&mut bytes)?;
    let head = ReplyHead::decode(&bytes)?;
    let (ReplyHead::Simple(super::message::SimpleReply { cookie: found, .. }) | ReplyHead::Chunk { cookie: found, .. }) =
        head;
    if found == cookie { Ok(head) } else { unexpected("cookie of reply", found) }
}

fn chunk_length(stream: &mut DeadlineStream<'_>) -> Result<u32, Wire> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

/// Payload of a chunk that may be at most `limit` bytes.
fn payload(stream: &mut DeadlineStream<'_>, length: u32, limit: u32) -> Result<Vec<u8>, Wire> {
    if length > limit {
        return Err(ProtoError::TooLong { what: "reply chunk", length: length.into(), limit: limit.into() }.into());
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn error_reply(stream: &mut DeadlineStream<'_>, length: u32) -> Result<ErrorReply, Wire> {
    let (number, text) = decode_error_chunk(&payload(stream, length, ERROR_CHUNK_BYTES_MAX)?)?;
    Ok(ErrorReply { code: ErrorCode::from_wire(number), text })
}

fn simple_error(error: u32) -> ErrorReply {
    ErrorReply { code: ErrorCode::from_wire(error), text: String::new() }
}

/// Which bytes of a read have arrived.
struct Coverage {
    /// Start to end, relative to the read.
    ranges: BTreeMap<usize, usize>,
    missing: usize,
}

impl Coverage {
    fn add(&mut self, start: usize, end: usize) -> Result<(), Wire> {
        let before = self.ranges.range(..end).next_back();
        if start == end || before.is_some_and(|(_, before_end)| *before_end > start) {
            return unexpected("offset of data that is empty or sent before", start as u64);
        }
        if self.ranges.len() == PIECES_MAX {
            return unexpected("number of pieces in the reply to a read", PIECES_MAX as u64 + 1);
        }
        self.ranges.insert(start, end);
        // No overlap, all inside: cannot underflow.
        self.missing -= end - start;
        Ok(())
    }
}

fn read_reply(
    stream: &mut DeadlineStream<'_>,
    cookie: u64,
    offset: u64,
    buf: &mut [u8],
    structured: bool,
) -> Result<Result<(), ErrorReply>, Wire> {
    let mut coverage = Coverage { ranges: BTreeMap::new(), missing: buf.len() };
    let mut error = None;
    loop {
        let (flags, kind) = match reply_head(stream, cookie)? {
            ReplyHead::Simple(reply) if structured => return unexpected("simple reply to a read", reply.error),
            ReplyHead::Simple(reply) if reply.error != 0 => return Ok(Err(simple_error(reply.error))),
            ReplyHead::Simple(_) => {
                stream.read_exact(buf)?;
                return Ok(Ok(()));
            }
            ReplyHead::Chunk { kind, .. } if !structured => return unexpected("structured reply", kind),
            ReplyHead::Chunk { flags, kind, .. } => (flags, kind),
        };
        let length = chunk_length(stream)?;
        match kind {
            chunk::NONE if length == 0 => {}
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE if length >= 8 => {
                let mut at = [0; 8];
                stream.read_exact(&mut at)?;
                let data = kind == chunk::OFFSET_DATA;
                let count = match (data, length) {
                    (true, _) => length - 8,
                    (false, 12) => chunk_length(stream)?,
                    (false, other) => return unexpected("length of a hole chunk", other),
                };
                let start = u64::from_be_bytes(at).checked_sub(offset).and_then(|s| usize::try_from(s).ok());
                let end = start.and_then(|s| s.checked_add(count as usize)).filter(|end| *end <= buf.len());
                let (Some(start), Some(end)) = (start, end) else {
                    return unexpected("offset of data that was not asked for", u64::from_be_bytes(at));
                };
                coverage.add(start, end)?;
                if data {
                    stream.read_exact(&mut buf[start..end])?;
                } else {
                    buf[start..end].fill(0);
                }
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let reply = error_reply(stream, length)?;
                error.get_or_insert(reply);
            }
            other => return unexpected("kind of reply chunk to a read", other),
        }
        if flags & chunk::FLAG_DONE != 0 {
            return match error {
                Some(error) => Ok(Err(error)),
                None if coverage.missing == 0 => Ok(Ok(())),
                None => unexpected("number of bytes missing in a read", coverage.missing as u64),
            };
        }
    }
}

fn status_reply(
    stream: &mut DeadlineStream<'_>,
    cookie: u64,
    length: u64,
    context: u32,
) -> Result<Result<Vec<Extent>, ErrorReply>, Wire> {
    let mut found = None;
    let mut error = None;
    loop {
        let (flags, kind) = match reply_head(stream, cookie)? {
            ReplyHead::Simple(reply) if reply.error != 0 => return Ok(Err(simple_error(reply.error))),
            ReplyHead::Simple(_) => return unexpected("simple reply to block status", 0u32),
            ReplyHead::Chunk { flags, kind, .. } => (flags, kind),
        };
        let bytes = chunk_length(stream)?;
        match kind {
            chunk::NONE if bytes == 0 => {}
            chunk::BLOCK_STATUS if found.is_none() => {
                let data = payload(stream, bytes, STATUS_REPLY_BYTES_MAX)?;
                found = Some(decode_extents(&data, length, context)?);
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let reply = error_reply(stream, bytes)?;
                error.get_or_insert(reply);
            }
            other => return unexpected("kind of reply chunk to block status", other),
        }
        if flags & chunk::FLAG_DONE != 0 {
            return match (error, found) {
                (Some(error), _) => Ok(Err(error)),
                (None, Some(extents)) => Ok(Ok(extents)),
                (None, None) => unexpected("block status without extents", 0u32),
            };
        }
    }
}

/// At least one extent, none empty, none beyond `length` (the last may be reported longer and is cut off).
fn decode_extents(data: &[u8], length: u64, context: u32) -> Result<Vec<Extent>, Wire> {
    let mut fields = Fields::new("block status", data);
    let id = fields.u32()?;
    if id != context {
        return unexpected("metadata context", id);
    }
    let mut extents = Vec::new();
    let mut left = length;
    let descriptors = data.len().saturating_sub(4) / 8;
    for _ in 0..descriptors {
        let (run, state) = (u64::from(fields.u32()?), fields.u32()?);
        if run == 0 || left == 0 {
            return unexpected("length of an extent", run);
        }
        let run = run.min(left);
        left -= run;
        extents.push(Extent { length: run, hole: state & STATE_HOLE != 0, zero: state & STATE_ZERO != 0 });
    }
    fields.end()?;
    if extents.is_empty() {
        return Err(ProtoError::Truncated { what: "block status" }.into());
    }
    Ok(extents)
}
