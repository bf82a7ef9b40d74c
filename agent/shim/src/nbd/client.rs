//! A small blocking client: reads a disk, and asks where its data is, through an NBD export on a unix socket.
//!
//! Meant for QEMU's own read-only export of a guest's disk. Every exchange has a deadline, so that a server that hangs
//! costs [`ClientError::Io`] and not a thread; after any error but a server's error reply the connection is of no
//! use ([`ClientError::Broken`] from then on), because it is not known what it would say next. Nothing the server sends is
//! trusted: a reply must cover exactly what was asked for, each byte once.

use super::client_wire::{ErrorReply, Terms, Wire, flush_reply, negotiate, read_reply, status_reply};
use super::export::Extent;
use super::message::{ProtoError, Request};
use super::proto::{CONTEXT_ALLOCATION, ErrorCode, command};
use super::stream::DeadlineStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest single BLOCK_STATUS question: the length has 32 bits, and this is a multiple of any block size.
const STATUS_BYTES_MAX: u64 = 2 << 30;

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
    /// The server did not agree to the metadata context; nothing was sent.
    #[error("the NBD server does not have the metadata context that was asked for ({CONTEXT_ALLOCATION} by default)")]
    NoBlockStatus,
    /// The connection failed before; connect anew.
    #[error("the NBD connection failed before")]
    Broken,
}

/// What can be asked without waiting for the answer: see [`Client::ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Whether these bytes can be read; what they are is not told.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Whether what was written is on stable storage.
    Flush,
}

/// A connection to one export.
pub struct Client {
    stream: UnixStream,
    timeout: Duration,
    terms: Terms,
    cookie: u64,
    broken: bool,
    asked: Option<Question>,
}

impl Client {
    /// Connects and negotiates, within `timeout`, which later is the limit of each exchange with the server.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(path: &Path, export_name: &str, timeout: Duration) -> Result<Self, ClientError> {
        Self::connect_with(path, export_name, timeout, None)
    }

    /// The same with another metadata context than `base:allocation` for [`block_status`](Client::block_status): the two
    /// lowest bits of its flags are then what an [`Extent`] calls `hole` and `zero`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect_with(
        path: &Path,
        export_name: &str,
        timeout: Duration,
        context: Option<&str>,
    ) -> Result<Self, ClientError> {
        let stream = connect(path, timeout).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let context = context.unwrap_or(CONTEXT_ALLOCATION);
        let terms = negotiate(&mut DeadlineStream::new(&stream, timeout), export_name, context)?;
        Ok(Self { stream, timeout, terms, cookie: 0, broken: false, asked: None })
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

    /// Sends a question and does not wait. Until [`answered`](Client::answered) says so nothing else can be asked.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask(&mut self, question: Question) -> Result<(), ClientError> {
        let (doing, command, offset, length) = match question {
            Question::Read { offset, length } => ("read", command::READ, offset, length),
            Question::Flush => ("flush", command::FLUSH, 0, 0),
        };
        self.check_range(offset, length.into())?;
        if self.broken {
            return Err(ClientError::Broken);
        }
        // Until the answer has been understood.
        self.broken = true;
        self.cookie += 1;
        let request = Request { flags: 0, command, cookie: self.cookie, offset, length };
        let sent = DeadlineStream::new(&self.stream, self.timeout).write_all(&request.encode());
        sent.map_err(|source| ClientError::Io { doing, source })?;
        self.asked = Some(question);
        Ok(())
    }

    /// Waits up to `limit` for the answer to what was asked, and says whether it came. That the server could not do it is an
    /// answer too.
    ///
    /// # Errors
    /// [`ClientError`] of a connection that is of no use any more.
    pub fn answered(&mut self, limit: Duration) -> Result<bool, ClientError> {
        let Some(question) = self.asked else { return Ok(true) };
        if !readable(&self.stream, limit).map_err(|source| ClientError::Io { doing: "wait", source })? {
            return Ok(false);
        }
        // It has begun to arrive: the rest is on its way.
        self.asked = None;
        let mut stream = DeadlineStream::new(&self.stream, self.timeout);
        match question {
            Question::Read { offset, length } => {
                let mut bytes = vec![0; length as usize];
                let reply = read_reply(&mut stream, self.cookie, offset, &mut bytes, self.terms.structured);
                reply.map_err(|wire| wire.during("read"))?.err()
            }
            Question::Flush => flush_reply(&mut stream, self.cookie).map_err(|wire| wire.during("flush"))?.err(),
        };
        self.broken = false;
        Ok(true)
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

fn readable(stream: &UnixStream, limit: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&limit)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
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
