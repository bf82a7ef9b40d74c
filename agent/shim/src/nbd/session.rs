//! The server's half of the transmission phase: one request after the other, each checked, done and answered.
//!
//! Works over any stream, so that it can be tested and fuzzed without a socket. Requests are answered in the order they
//! came. A request that is wrong is answered with an error; only bytes that are no request, or a payload beyond
//! [`PAYLOAD_BYTES_MAX`], end the session, because the next request could not be found any more.

use super::export::{ExportError, Extent, WriteError};
use super::handshake::{ALLOCATION_CONTEXT_ID, Agreed, SessionError, bounded_text};
use super::message::{ChunkHead, ProtoError, Request, SimpleReply};
use super::proto::{ErrorCode, PAYLOAD_BYTES_MAX, STATE_HOLE, STATE_ZERO, chunk, command, command_flag};
use super::stream::read_or_end;
use std::io::{self, ErrorKind, Read, Write};

/// Extents in one answer to BLOCK_STATUS: 8 bytes each, so that a reply stays below 32 KiB.
const EXTENTS_MAX: usize = 4096;
/// Reply buffer a session keeps between requests; larger ones (up to [`PAYLOAD_BYTES_MAX`]) are given back.
const BUFFER_KEPT_BYTES: usize = 1 << 20;
/// Piece in which an unwanted payload is read and thrown away.
const DISCARD_BYTES: usize = 64 << 10;

/// How a session ended that ended as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client said so.
    Disconnect,
    /// The connection ended between two requests.
    Closed,
}

/// What a session did; counted whether it ended well or not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Requests that were read.
    pub requests: u64,
    /// Requests that were answered with an error of the export.
    pub failures: u64,
}

/// An error reply in the making.
struct Refusal {
    code: ErrorCode,
    text: String,
    /// The export failed, not the request.
    failure: bool,
}

impl Refusal {
    fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), failure: false }
    }
}

impl From<ExportError> for Refusal {
    fn from(error: ExportError) -> Self {
        Self { code: error.code(), text: error.to_string(), failure: true }
    }
}

/// Answers requests until the client disconnects.
///
/// # Errors
/// [`SessionError`]; the connection is to be closed.
pub fn transmit<S: Read + Write>(stream: &mut S, agreed: &Agreed, tally: &mut Tally) -> Result<End, SessionError> {
    let mut session = Session { stream, agreed, tally, buffer: Vec::new() };
    let mut bytes = [0; Request::BYTES];
    loop {
        if !read_or_end(session.stream, &mut bytes)? {
            return Ok(End::Closed);
        }
        let request = Request::decode(&bytes)?;
        session.tally.requests += 1;
        match request.command {
            command::DISC => return Ok(End::Disconnect),
            command::READ => session.read(&request)?,
            command::WRITE => session.write(&request)?,
            command::BLOCK_STATUS => session.block_status(&request)?,
            _ => {
                let result = session.act(&request);
                session.finish(&request, result)?;
            }
        }
    }
}

struct Session<'a, S> {
    stream: &'a mut S,
    agreed: &'a Agreed,
    tally: &'a mut Tally,
    /// Replies with data are assembled here, so that each is one write.
    buffer: Vec<u8>,
}

impl<S: Read + Write> Session<'_, S> {
    /// Requests without payload in either direction.
    fn act(&self, request: &Request) -> Result<(), Refusal> {
        let export = self.agreed.attachment.export();
        let can = self.agreed.terms.capabilities;
        match request.command {
            command::FLUSH => {
                // The spec reserves offset and length here: nothing to check, nothing to refuse.
                self.check_flags(request, 0)?;
                export.flush()?;
                return Ok(());
            }
            command::TRIM => {
                self.check_flags(request, 0)?;
                self.check_writable()?;
                if !can.trim {
                    return Err(Refusal::new(ErrorCode::Invalid, "TRIM was not announced"));
                }
                self.check_range(request)?;
                if request.length > 0 {
                    export.trim(request.offset, request.length.into())?;
                }
            }
            command::WRITE_ZEROES => {
                let fast = if can.fast_zero { command_flag::FAST_ZERO } else { 0 };
                self.check_flags(request, command_flag::NO_HOLE | fast)?;
                self.check_writable()?;
                self.check_range(request)?;
                if request.length > 0 {
                    let may_unmap = request.flags & command_flag::NO_HOLE == 0;
                    let fast = request.flags & command_flag::FAST_ZERO != 0;
                    export.zero(request.offset, request.length.into(), may_unmap, fast)?;
                }
            }
            other => return Err(Refusal::new(ErrorCode::Invalid, format!("command {other} is not known"))),
        }
        self.settle(request)
    }

    /// FUA: stable before it is answered.
    fn settle(&self, request: &Request) -> Result<(), Refusal> {
        if request.flags & command_flag::FUA != 0 {
            self.agreed.attachment.export().flush()?;
        }
        Ok(())
    }

    fn write(&mut self, request: &Request) -> Result<(), SessionError> {
        if request.length > PAYLOAD_BYTES_MAX {
            return Err(ProtoError::TooLong {
                what: "write",
                length: request.length.into(),
                limit: PAYLOAD_BYTES_MAX.into(),
            }
            .into());
        }
        let checked =
            self.check_flags(request, 0).and_then(|()| self.check_writable()).and_then(|()| self.check_range(request));
        let mut payload = Payload { stream: &mut *self.stream, left: request.length, broken: None };
        let written = match checked {
            Ok(()) if request.length == 0 => Ok(()),
            Ok(()) => match self.agreed.attachment.export().write_from(request.offset, request.length, &mut payload) {
                Ok(()) if payload.left == 0 => Ok(()),
                Ok(()) => Err(Refusal::from(ExportError::Failed(format!(
                    "the export left {} of {} bytes unread",
                    payload.left, request.length
                )))),
                Err(WriteError::Export(e)) => Err(e.into()),
                Err(WriteError::Source(e)) => return Err(payload.broken.unwrap_or(e).into()),
            },
            Err(refusal) => Err(refusal),
        };
        payload.discard()?;
        let result = written.and_then(|()| self.settle(request));
        self.finish(request, result)
    }

    fn read(&mut self, request: &Request) -> Result<(), SessionError> {
        if let Err(refusal) = self.check_read(request) {
            return self.finish(request, Err(refusal));
        }
        let length = request.length as usize;
        if length == 0 {
            return self.finish(request, Ok(()));
        }
        let head = if self.agreed.terms.structured { ChunkHead::BYTES + 8 } else { SimpleReply::BYTES };
        self.buffer.resize(head + length, 0);
        if let Err(e) = self.agreed.attachment.export().read(request.offset, &mut self.buffer[head..]) {
            return self.finish(request, Err(e.into()));
        }
        if self.agreed.terms.structured {
            let chunk = ChunkHead {
                flags: chunk::FLAG_DONE,
                kind: chunk::OFFSET_DATA,
                cookie: request.cookie,
                length: request.length + 8,
            };
            self.buffer[..ChunkHead::BYTES].copy_from_slice(&chunk.encode());
            self.buffer[ChunkHead::BYTES..head].copy_from_slice(&request.offset.to_be_bytes());
        } else {
            self.buffer[..head].copy_from_slice(&SimpleReply { error: 0, cookie: request.cookie }.encode());
        }
        self.stream.write_all(&self.buffer)?;
        if self.buffer.len() > BUFFER_KEPT_BYTES {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    fn check_read(&self, request: &Request) -> Result<(), Refusal> {
        let df = if self.agreed.terms.structured { command_flag::DF } else { 0 };
        self.check_flags(request, df)?;
        if !self.agreed.terms.capabilities.read {
            return Err(Refusal::new(ErrorCode::Permission, "this export takes writes only"));
        }
        if request.length > PAYLOAD_BYTES_MAX {
            return Err(Refusal::new(ErrorCode::Invalid, format!("reads are limited to {PAYLOAD_BYTES_MAX} bytes")));
        }
        self.check_range(request)
    }

    fn block_status(&mut self, request: &Request) -> Result<(), SessionError> {
        let extents = match self.query_extents(request) {
            Ok(extents) => extents,
            Err(refusal) => return self.finish(request, Err(refusal)),
        };
        let payload = 4 + 8 * extents.len();
        let chunk = ChunkHead {
            flags: chunk::FLAG_DONE,
            kind: chunk::BLOCK_STATUS,
            cookie: request.cookie,
            length: u32::try_from(payload).unwrap_or(u32::MAX),
        };
        self.buffer.clear();
        self.buffer.extend_from_slice(&chunk.encode());
        self.buffer.extend_from_slice(&ALLOCATION_CONTEXT_ID.to_be_bytes());
        for (length, state) in extents {
            self.buffer.extend_from_slice(&length.to_be_bytes());
            self.buffer.extend_from_slice(&state.to_be_bytes());
        }
        Ok(self.stream.write_all(&self.buffer)?)
    }

    fn query_extents(&self, request: &Request) -> Result<Vec<(u32, u32)>, Refusal> {
        self.check_flags(request, command_flag::REQ_ONE)?;
        if !self.agreed.terms.allocation {
            return Err(Refusal::new(ErrorCode::Invalid, "no metadata context was chosen"));
        }
        self.check_range(request)?;
        if request.length == 0 {
            return Err(Refusal::new(ErrorCode::Invalid, "BLOCK_STATUS of no bytes"));
        }
        let one = request.flags & command_flag::REQ_ONE != 0;
        let limit = if one { 1 } else { EXTENTS_MAX };
        let found = self.agreed.attachment.export().extents(request.offset, request.length.into(), limit)?;
        let extents = to_wire(&found, request.length, limit);
        if extents.is_empty() {
            return Err(ExportError::Failed("the export gave no extents".into()).into());
        }
        Ok(extents)
    }

    fn check_flags(&self, request: &Request, allowed: u16) -> Result<(), Refusal> {
        // FUA is valid with every command once announced, and it always is.
        let unknown = request.flags & !(allowed | command_flag::FUA);
        if unknown == 0 {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::Invalid, format!("flags {unknown:#x} are not allowed with this command")))
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.agreed.terms.capabilities.write {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::Permission, "this export is read-only"))
    }

    fn check_range(&self, request: &Request) -> Result<(), Refusal> {
        let size = self.agreed.terms.size_bytes;
        let inside = request.offset.checked_add(request.length.into()).is_some_and(|end| end <= size);
        if !inside {
            let code = match request.command {
                command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpace,
                _ => ErrorCode::Invalid,
            };
            let text = format!("{} bytes at {} are beyond the {size} of this export", request.length, request.offset);
            return Err(Refusal::new(code, text));
        }
        let unit = self.agreed.terms.capabilities.block_bytes_min;
        if !request.offset.is_multiple_of(unit.into()) || !request.length.is_multiple_of(unit) {
            return Err(Refusal::new(ErrorCode::Invalid, format!("not a multiple of {unit} bytes")));
        }
        Ok(())
    }

    /// The reply to a request whose success has no data.
    fn finish(&mut self, request: &Request, result: Result<(), Refusal>) -> Result<(), SessionError> {
        let code = result.as_ref().map_or_else(|refusal| refusal.code.to_wire(), |()| 0);
        if let Err(refusal) = &result
            && refusal.failure
        {
            self.tally.failures += 1;
            // The first only: a disk that is full fails every write, and the client is told each time.
            if self.tally.failures == 1 {
                let export = self.agreed.attachment.export().name();
                tracing::warn!(export, command = request.command, error = refusal.text, "NBD request failed");
            }
        }
        // Only these two must be answered with chunks, and then always; for the rest a simple reply is shorter.
        let structured =
            self.agreed.terms.structured && matches!(request.command, command::READ | command::BLOCK_STATUS);
        if !structured {
            return Ok(self.stream.write_all(&SimpleReply { error: code, cookie: request.cookie }.encode())?);
        }
        let mut payload = Vec::new();
        let kind = match &result {
            Ok(()) => chunk::NONE,
            Err(refusal) => {
                let text = bounded_text(&refusal.text);
                payload.extend_from_slice(&code.to_be_bytes());
                payload.extend_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
                payload.extend_from_slice(text.as_bytes());
                chunk::ERROR
            }
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let head = ChunkHead { flags: chunk::FLAG_DONE, kind, cookie: request.cookie, length };
        let mut out = head.encode().to_vec();
        out.extend_from_slice(&payload);
        Ok(self.stream.write_all(&out)?)
    }
}

/// Extents as the wire wants them: none empty, neighbours of a kind as one, within `length` and `limit`.
fn to_wire(extents: &[Extent], length: u32, limit: usize) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::with_capacity(extents.len().min(limit));
    let mut left = length;
    for extent in extents {
        let part = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        if part == 0 {
            continue;
        }
        let state = if extent.hole { STATE_HOLE } else { 0 } | if extent.zero { STATE_ZERO } else { 0 };
        let full = out.len() == limit;
        match out.last_mut() {
            // Cannot overflow: all parts together are at most `length`.
            Some((last, same)) if *same == state => *last += part,
            _ if full => break,
            _ => out.push((part, state)),
        }
        left -= part;
    }
    out
}

/// The payload of one WRITE: yields exactly so many bytes or fails.
struct Payload<'a, S> {
    stream: &'a mut S,
    left: u32,
    /// Remembered here because the export may not hand it on.
    broken: Option<io::Error>,
}

impl<S: Read> Payload<'_, S> {
    /// Reads what nobody wants, so that the next request can be found.
    fn discard(mut self) -> Result<(), SessionError> {
        if let Some(error) = self.broken.take() {
            return Err(error.into());
        }
        let mut sink = vec![0; DISCARD_BYTES.min(self.left as usize)];
        while self.left > 0 {
            let part = sink.len().min(self.left as usize);
            self.read_exact(&mut sink[..part])?;
        }
        Ok(())
    }
}

impl<S: Read> Read for Payload<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(error) = &self.broken {
            return Err(io::Error::new(error.kind(), "the connection broke before"));
        }
        let wanted = buf.len().min(self.left as usize);
        if wanted == 0 {
            return Ok(0);
        }
        match self.stream.read(&mut buf[..wanted]) {
            Ok(0) => {
                self.broken = Some(ErrorKind::UnexpectedEof.into());
                Err(ErrorKind::UnexpectedEof.into())
            }
            Ok(n) => {
                // `n` is at most `wanted`, which is at most `left`.
                self.left -= u32::try_from(n).unwrap_or(self.left);
                Ok(n)
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
            Err(e) => {
                self.broken = Some(io::Error::new(e.kind(), e.to_string()));
                Err(e)
            }
        }
    }
}
