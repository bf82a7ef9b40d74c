//! The NBD protocol's messages: to bytes and back, no I/O.
//!
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>; section names are quoted below. All
//! integers are big-endian. Decoding never panics and never trusts a length: [`Fields`] hands out only what is there.

use super::proto::{
    CHUNK_MAGIC, INIT_MAGIC, NAME_BYTES_MAX, OPTION_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
};

/// Bytes that do not follow the protocol. The connection they came from cannot be used any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    /// A message did not begin as it must.
    #[error("{what} begins with {found:#x}, which is no NBD")]
    Magic {
        /// Which message.
        what: &'static str,
        /// What it began with.
        found: u64,
    },
    /// A message ends before it should.
    #[error("{what} is too short")]
    Truncated {
        /// Which message.
        what: &'static str,
    },
    /// A message goes on after it should end.
    #[error("{what} has {extra} bytes too many")]
    Trailing {
        /// Which message.
        what: &'static str,
        /// How many.
        extra: usize,
    },
    /// A length beyond the limit.
    #[error("{what} of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// What was announced.
        length: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A string that is no UTF-8.
    #[error("{what} is not UTF-8")]
    NotUtf8 {
        /// Which string.
        what: &'static str,
    },
    /// A value that has no meaning where it was sent.
    #[error("{what} {found:#x} is not allowed here")]
    Unexpected {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
}

/// Takes a message apart, never beyond its end.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// `what` names the message in errors.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`ProtoError::Truncated`].
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], ProtoError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(ProtoError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtoError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(ProtoError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next 16 bits.
    ///
    /// # Errors
    /// [`ProtoError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, ProtoError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    ///
    /// # Errors
    /// [`ProtoError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, ProtoError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    ///
    /// # Errors
    /// [`ProtoError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, ProtoError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A 32-bit length and as many bytes of text.
    ///
    /// # Errors
    /// Any [`ProtoError`] about lengths and text.
    pub fn text(&mut self) -> Result<&'a str, ProtoError> {
        let length = self.u32()? as usize;
        if length > NAME_BYTES_MAX {
            return Err(ProtoError::TooLong { what: self.what, length: length as u64, limit: NAME_BYTES_MAX as u64 });
        }
        let bytes = self.bytes(length)?;
        std::str::from_utf8(bytes).map_err(|_| ProtoError::NotUtf8 { what: self.what })
    }

    /// All that is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Nothing is left.
    ///
    /// # Errors
    /// [`ProtoError::Trailing`].
    pub fn end(self) -> Result<(), ProtoError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(ProtoError::Trailing { what: self.what, extra }),
        }
    }
}

fn expect_magic(what: &'static str, found: u64, wanted: u64) -> Result<(), ProtoError> {
    if found == wanted { Ok(()) } else { Err(ProtoError::Magic { what, found }) }
}

/// Checks the 18 bytes a server begins with and returns its handshake flags.
///
/// # Errors
/// [`ProtoError`] when this is no newstyle server.
pub fn decode_greeting(bytes: &[u8]) -> Result<u16, ProtoError> {
    let mut fields = Fields::new("greeting", bytes);
    expect_magic("greeting", fields.u64()?, INIT_MAGIC)?;
    expect_magic("greeting's second half", fields.u64()?, OPTION_MAGIC)?;
    let flags = fields.u16()?;
    fields.end()?;
    Ok(flags)
}

/// What a server begins with.
#[must_use]
pub fn encode_greeting(flags: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(18);
    out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out
}

/// Head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// One of [`option`](super::proto::option).
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHead {
    /// Size on the wire.
    pub const BYTES: usize = 16;

    /// # Errors
    /// [`ProtoError`] when it is none, or announces more than [`OPTION_BYTES_MAX`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("option", bytes);
        expect_magic("option", fields.u64()?, OPTION_MAGIC)?;
        let head = Self { option: fields.u32()?, length: fields.u32()? };
        fields.end()?;
        within("option", head.length, OPTION_BYTES_MAX)?;
        Ok(head)
    }
}

/// A length that is within its limit.
fn within(what: &'static str, length: u32, limit: u32) -> Result<(), ProtoError> {
    if length <= limit {
        return Ok(());
    }
    Err(ProtoError::TooLong { what, length: length.into(), limit: limit.into() })
}

/// An option with its data.
#[must_use]
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OptionHead::BYTES + data.len());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&length_u32(data).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Head of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The option it answers.
    pub option: u32,
    /// One of [`reply`](super::proto::reply).
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReplyHead {
    /// Size on the wire.
    pub const BYTES: usize = 20;

    /// # Errors
    /// [`ProtoError`] when it is none, or announces more than [`OPTION_BYTES_MAX`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("option reply", bytes);
        expect_magic("option reply", fields.u64()?, OPTION_REPLY_MAGIC)?;
        let head = Self { option: fields.u32()?, kind: fields.u32()?, length: fields.u32()? };
        fields.end()?;
        within("option reply", head.length, OPTION_BYTES_MAX)?;
        Ok(head)
    }
}

/// An option reply with its data.
#[must_use]
pub fn encode_option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OptionReplyHead::BYTES + data.len());
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length_u32(data).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Length of data that is bounded by what precedes it: names, contexts, payloads.
fn length_u32(data: &[u8]) -> u32 {
    debug_assert!(u32::try_from(data.len()).is_ok(), "a message of {} bytes", data.len());
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery {
    /// Export; empty for the default one.
    pub name: String,
    /// Wanted kinds of [`info`](super::proto::info).
    pub infos: Vec<u16>,
}

impl ExportQuery {
    /// # Errors
    /// [`ProtoError`] when a length does not fit.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("export query", bytes);
        let name = fields.text()?.to_owned();
        let count = fields.u16()?;
        let infos = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { name, infos })
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = encode_text(&self.name);
        out.extend_from_slice(&u16::try_from(self.infos.len()).unwrap_or(u16::MAX).to_be_bytes());
        for info in self.infos.iter().take(u16::MAX.into()) {
            out.extend_from_slice(&info.to_be_bytes());
        }
        out
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery {
    /// Export the contexts are for.
    pub name: String,
    /// Wanted contexts.
    pub queries: Vec<String>,
}

impl ContextQuery {
    /// # Errors
    /// [`ProtoError`] when a length does not fit.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("context query", bytes);
        let name = fields.text()?.to_owned();
        let count = fields.u32()?;
        // Not reserved ahead: the count is the peer's word, the bytes are what is there.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.text()?.to_owned());
        }
        fields.end()?;
        Ok(Self { name, queries })
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = encode_text(&self.name);
        out.extend_from_slice(&u32::try_from(self.queries.len()).unwrap_or(u32::MAX).to_be_bytes());
        for query in &self.queries {
            out.extend_from_slice(&encode_text(query));
        }
        out
    }
}

/// A 32-bit length and the text.
#[must_use]
pub fn encode_text(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + text.len());
    out.extend_from_slice(&length_u32(text.as_bytes()).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    out
}

/// A request (section "Request message"); the payload of a WRITE follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`command_flag`](super::proto::command_flag).
    pub flags: u16,
    /// One of [`command`](super::proto::command).
    pub command: u16,
    /// Given back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Size on the wire.
    pub const BYTES: usize = 28;

    /// # Errors
    /// [`ProtoError`] when it is none; the values themselves are not checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("request", bytes);
        expect_magic("request", fields.u32()?.into(), REQUEST_MAGIC.into())?;
        let request = Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        };
        fields.end()?;
        Ok(request)
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.length.to_be_bytes());
        out
    }
}

/// A simple reply (section "Simple reply message"); the data of a successful READ follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an error number.
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// Size on the wire.
    pub const BYTES: usize = 16;

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }
}

/// Head of a chunk of a structured reply (section "Structured reply chunk message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHead {
    /// [`FLAG_DONE`](super::proto::chunk::FLAG_DONE) or nothing.
    pub flags: u16,
    /// One of [`chunk`](super::proto::chunk).
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl ChunkHead {
    /// Size on the wire.
    pub const BYTES: usize = 20;

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..20].copy_from_slice(&self.length.to_be_bytes());
        out
    }
}

/// The first bytes of any reply, which tell the two kinds apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead {
    /// A simple reply, whole.
    Simple(SimpleReply),
    /// A chunk; the 32-bit length of its payload comes next.
    Chunk {
        /// [`FLAG_DONE`](super::proto::chunk::FLAG_DONE) or nothing.
        flags: u16,
        /// One of [`chunk`](super::proto::chunk).
        kind: u16,
        /// The request's.
        cookie: u64,
    },
}

impl ReplyHead {
    /// Size on the wire.
    pub const BYTES: usize = SimpleReply::BYTES;

    /// # Errors
    /// [`ProtoError`] when it is neither.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("reply", bytes);
        let head = match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Self::Simple(SimpleReply { error: fields.u32()?, cookie: fields.u64()? }),
            CHUNK_MAGIC => Self::Chunk { flags: fields.u16()?, kind: fields.u16()?, cookie: fields.u64()? },
            other => return Err(ProtoError::Magic { what: "reply", found: other.into() }),
        };
        fields.end()?;
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_greeting(&bytes);
            let _ = OptionHead::decode(&bytes);
            let _ = OptionReplyHead::decode(&bytes);
            let _ = ExportQuery::decode(&bytes);
            let _ = ContextQuery::decode(&bytes);
            let _ = Request::decode(&bytes);
            let _ = ReplyHead::decode(&bytes);
        }

        #[test]
        fn requests_survive(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let request = Request { flags, command, cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn replies_survive(error: u32, flags: u16, kind: u16, cookie: u64, length: u32) {
            let simple = SimpleReply { error, cookie };
            prop_assert_eq!(ReplyHead::decode(&simple.encode()), Ok(ReplyHead::Simple(simple)));
            let bytes = ChunkHead { flags, kind, cookie, length }.encode();
            prop_assert_eq!(ReplyHead::decode(&bytes[..16]), Ok(ReplyHead::Chunk { flags, kind, cookie }));
            prop_assert_eq!(&bytes[16..], &length.to_be_bytes());
        }

        #[test]
        fn queries_survive_and_every_shorter_or_longer_form_is_refused(
            name in ".{0,40}", infos in proptest::collection::vec(any::<u16>(), 0..5),
            queries in proptest::collection::vec(".{0,40}", 0..4),
        ) {
            let export = ExportQuery { name: name.clone(), infos };
            let mut bytes = export.encode();
            prop_assert_eq!(ExportQuery::decode(&bytes), Ok(export));
            prop_assert!((0..bytes.len()).all(|n| ExportQuery::decode(&bytes[..n]).is_err()));
            bytes.push(0);
            prop_assert!(ExportQuery::decode(&bytes).is_err());

            let context = ContextQuery { name, queries };
            let mut bytes = context.encode();
            prop_assert_eq!(ContextQuery::decode(&bytes), Ok(context));
            prop_assert!((0..bytes.len()).all(|n| ContextQuery::decode(&bytes[..n]).is_err()));
            bytes.push(0);
            prop_assert!(ContextQuery::decode(&bytes).is_err());
        }
    }

    #[test]
    fn an_option_may_not_announce_more_than_the_limit() {
        let mut bytes = encode_option(7, &[]);
        bytes[12..16].copy_from_slice(&OPTION_BYTES_MAX.to_be_bytes());
        assert!(OptionHead::decode(&bytes).is_ok());
        bytes[12..16].copy_from_slice(&(OPTION_BYTES_MAX + 1).to_be_bytes());
        assert!(matches!(OptionHead::decode(&bytes), Err(ProtoError::TooLong { .. })));
    }

    #[test]
    fn a_count_of_contexts_reserves_no_memory() {
        let mut bytes = encode_text("x");
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(ContextQuery::decode(&bytes), Err(ProtoError::Truncated { what: "context query" }));
    }
}
