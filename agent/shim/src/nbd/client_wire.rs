//! The client's half of the conversation, over a connection that is there already: what to say, and whether what comes
//! back is an answer to it.
//!
//! Nothing the server sends is trusted: a reply must cover exactly what was asked for, each byte once.

use super::client::ClientError;
use super::export::Extent;
use super::handshake::decode_error_chunk;
use super::message::{
    ContextQuery, ExportQuery, Fields, OptionReplyHead, ProtoError, ReplyHead, SimpleReply, decode_greeting,
    encode_option,
};
use super::proto::{
    BLOCK_BYTES_MIN_MAX, ErrorCode, NAME_BYTES_MAX, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, STATE_HOLE, STATE_ZERO, chunk,
    client_flag, handshake_flag, info, option, reply,
};
use super::stream::DeadlineStream;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// Largest answer to BLOCK_STATUS that is accepted: QEMU sends up to 1 MiB of extents.
const STATUS_REPLY_BYTES_MAX: u32 = 2 << 20;
/// Longest error chunk: number, text of [`NAME_BYTES_MAX`], offset.
const ERROR_CHUNK_BYTES_MAX: u32 = 4 + 2 + NAME_BYTES_MAX as u32 + 8;
/// Pieces of one read: 32 MiB in sectors, the finest that QEMU tells data from holes.
const PIECES_MAX: usize = 64 << 10;
/// Replies to one option: a handful of information replies, and room.
const OPTION_REPLIES_MAX: usize = 64;

/// What goes wrong on the wire, before it is known what was being done.
pub(super) enum Wire {
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
    pub(super) fn during(self, doing: &'static str) -> ClientError {
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
pub(super) struct ErrorReply {
    pub(super) code: ErrorCode,
    pub(super) text: String,
}

/// What the server told about the export.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) size_bytes: u64,
    pub(super) structured: bool,
    /// Id of the metadata context that was asked for.
    pub(super) context: Option<u32>,
    pub(super) block_bytes_min: u32,
    pub(super) payload_bytes_max: u32,
}

pub(super) fn negotiate(stream: &mut DeadlineStream<'_>, name: &str, context_name: &str) -> Result<Terms, ClientError> {
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
        let query = ContextQuery { name: name.to_owned(), queries: vec![context_name.to_owned()] };
        let asked = ask(stream, option::SET_META_CONTEXT, &query.encode(), |kind, data| {
            if kind != reply::META_CONTEXT {
                return unexpected("reply to set meta context", kind);
            }
            let mut fields = Fields::new("meta context", data);
            let id = fields.u32()?;
            if fields.rest() == context_name.as_bytes() {
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
    let gone = ask(stream, option::GO, &query.encode(), |kind, data| {
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
    });
    if let Err(OptionError::Refused { .. }) = gone {
        // A courtesy: the server would otherwise take the end of the connection for a fault.
        let _ = stream.write_all(&encode_option(option::ABORT, &[]));
    }
    gone.map_err(refused)?;
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
    let (ReplyHead::Simple(SimpleReply { cookie: found, .. }) | ReplyHead::Chunk { cookie: found, .. }) = head;
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

pub(super) fn read_reply(
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

pub(super) fn flush_reply(stream: &mut DeadlineStream<'_>, cookie: u64) -> Result<Result<(), ErrorReply>, Wire> {
    match reply_head(stream, cookie)? {
        ReplyHead::Simple(reply) if reply.error != 0 => Ok(Err(simple_error(reply.error))),
        ReplyHead::Simple(_) => Ok(Ok(())),
        ReplyHead::Chunk { flags, kind, .. } => {
            let length = chunk_length(stream)?;
            if flags & chunk::FLAG_DONE == 0 {
                return unexpected("reply to a flush that goes on", kind);
            }
            match kind {
                chunk::NONE if length == 0 => Ok(Ok(())),
                kind if kind & chunk::ERROR_BIT != 0 => Ok(Err(error_reply(stream, length)?)),
                other => unexpected("kind of reply chunk to a flush", other),
            }
        }
    }
}

pub(super) fn status_reply(
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
