//! The server's half of the negotiation: which export, which kind of replies, which contexts.
//!
//! Works over any stream, so that it can be tested and fuzzed without a socket. It answers what it knows, says
//! `NBD_REP_ERR_UNSUP` to what it does not (TLS and extended headers among it), and gives up on bytes that are no NBD.

use super::export::{Capabilities, Export};
use super::message::{
    ContextQuery, ExportQuery, Fields, OptionHead, ProtoError, encode_greeting, encode_option_reply, encode_text,
};
use super::proto::{
    BLOCK_BYTES_PREFERRED, CONTEXT_ALLOCATION, EXPORT_NAME_PADDING, PAYLOAD_BYTES_MAX, client_flag, handshake_flag,
    info, option, reply, transmission_flag,
};
use super::stream::read_or_end;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// The context id of [`CONTEXT_ALLOCATION`] in this server's replies; any number would do.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
/// Options one client may send: a client that asks about every export, one by one, needs a handful each.
const OPTIONS_MAX: usize = 1024;

/// Why a session ended that did not end by itself.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection broke, or ran into its time limit.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The peer does not speak NBD.
    #[error("peer broke the protocol: {0}")]
    Proto(#[from] ProtoError),
    /// The peer chose, in a way that has no error reply, what is not there.
    #[error("no export is called {0:?}")]
    NoExport(String),
    /// The peer went on and on.
    #[error("more than {OPTIONS_MAX} options in one negotiation")]
    TooManyOptions,
}

/// A session as its export knows it: told of the beginning when this is made, and of the end when it is dropped,
/// also when a thread panics.
pub struct Attachment {
    export: Arc<dyn Export>,
    session: u64,
}

impl Attachment {
    fn new(export: Arc<dyn Export>, session: u64) -> Self {
        export.connected(session);
        Self { export, session }
    }

    /// The export.
    #[must_use]
    pub fn export(&self) -> &dyn Export {
        &*self.export
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.export.disconnected(self.session);
    }
}

/// What the two sides agreed on.
pub struct Agreed {
    /// Chosen export.
    pub attachment: Attachment,
    /// What the client was told of it.
    pub terms: Terms,
}

/// What a client is told of an export, and holds the server to.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Size of the export.
    pub size_bytes: u64,
    /// What it can do.
    pub capabilities: Capabilities,
    /// READ and BLOCK_STATUS are answered with structured replies.
    pub structured: bool,
    /// BLOCK_STATUS may be asked.
    pub allocation: bool,
}

/// Leads the negotiation; `None` when the client ended it properly without choosing an export. The export hears of
/// `session` before the client hears that it is accepted.
///
/// # Errors
/// [`SessionError`]; the connection is to be closed.
pub fn negotiate<S: Read + Write>(
    stream: &mut S,
    exports: &[Arc<dyn Export>],
    session: u64,
) -> Result<Option<Agreed>, SessionError> {
    stream.write_all(&encode_greeting(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES))?;
    let mut bytes = [0; 4];
    if !read_or_end(stream, &mut bytes)? {
        return Ok(None);
    }
    let flags = u32::from_be_bytes(bytes);
    if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
        return Err(ProtoError::Unexpected { what: "client flags", found: flags.into() }.into());
    }
    let mut negotiation = Negotiation {
        stream,
        exports,
        session,
        fixed: flags & client_flag::FIXED_NEWSTYLE != 0,
        padding: flags & client_flag::NO_ZEROES == 0,
        structured: false,
        allocation_of: None,
    };
    for _ in 0..OPTIONS_MAX {
        match negotiation.option()? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Start(agreed) => return Ok(Some(agreed)),
        }
    }
    Err(SessionError::TooManyOptions)
}

enum Next {
    Option,
    End,
    Start(Agreed),
}

struct Negotiation<'a, S> {
    stream: &'a mut S,
    exports: &'a [Arc<dyn Export>],
    session: u64,
    /// The client understands option replies.
    fixed: bool,
    padding: bool,
    structured: bool,
    /// Name for which `base:allocation` was chosen; it counts only if that export is then started.
    allocation_of: Option<String>,
}

impl<S: Read + Write> Negotiation<'_, S> {
    fn option(&mut self) -> Result<Next, SessionError> {
        let mut head = [0; OptionHead::BYTES];
        if !read_or_end(self.stream, &mut head)? {
            return Ok(Next::End);
        }
        let head = OptionHead::decode(&head)?;
        let mut data = vec![0; head.length as usize];
        self.stream.read_exact(&mut data)?;
        if !self.fixed && head.option != option::EXPORT_NAME {
            return Err(
                ProtoError::Unexpected { what: "option without fixed newstyle", found: head.option.into() }.into()
            );
        }
        match head.option {
            option::EXPORT_NAME => self.export_name(&data).map(Next::Start),
            option::ABORT => {
                // The client may be gone already: that is what it said.
                let _ = self.reply(option::ABORT, reply::ACK, &[]);
                Ok(Next::End)
            }
            option::LIST => self.list(&data),
            option::INFO | option::GO => self.info(head.option, &data),
            option::STRUCTURED_REPLY => self.structured_reply(&data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(head.option, &data),
            other => self.refuse(other, reply::ERR_UNSUP, "not an option of this server"),
        }
    }

    fn export_name(&mut self, data: &[u8]) -> Result<Agreed, SessionError> {
        let name = std::str::from_utf8(data).map_err(|_| ProtoError::NotUtf8 { what: "export name" })?;
        let export = self.find(name).ok_or_else(|| SessionError::NoExport(name.to_owned()))?;
        let terms = self.terms(&export, name);
        let attachment = Attachment::new(export, self.session);
        let mut out = terms.size_bytes.to_be_bytes().to_vec();
        out.extend_from_slice(&terms.transmission_flags().to_be_bytes());
        if self.padding {
            out.resize(out.len() + EXPORT_NAME_PADDING, 0);
        }
        self.stream.write_all(&out)?;
        Ok(Agreed { attachment, terms })
    }

    fn list(&mut self, data: &[u8]) -> Result<Next, SessionError> {
        if !data.is_empty() {
            return self.refuse(option::LIST, reply::ERR_INVALID, "takes no data");
        }
        let exports = self.exports;
        for export in exports {
            self.reply(option::LIST, reply::SERVER, &encode_text(export.name()))?;
        }
        self.acknowledge(option::LIST)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Next, SessionError> {
        let query = match ExportQuery::decode(data) {
            Ok(query) => query,
            Err(e) => return self.refuse(option, reply::ERR_INVALID, &e.to_string()),
        };
        let Some(found) = self.find(&query.name) else {
            return self.refuse(option, reply::ERR_UNKNOWN, &SessionError::NoExport(query.name).to_string());
        };
        let terms = self.terms(&found, &query.name);
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&terms.size_bytes.to_be_bytes());
        export.extend_from_slice(&terms.transmission_flags().to_be_bytes());
        self.reply(option, reply::INFO, &export)?;
        if query.infos.contains(&info::NAME) {
            let mut name = info::NAME.to_be_bytes().to_vec();
            name.extend_from_slice(found.name().as_bytes());
            self.reply(option, reply::INFO, &name)?;
        }
        // Sent unasked too: a client that then sends something else is answered EINVAL, not misunderstood.
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [terms.capabilities.block_bytes_min, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, reply::INFO, &sizes)?;
        if option == option::INFO {
            return self.acknowledge(option);
        }
        let attachment = Attachment::new(found, self.session);
        self.reply(option, reply::ACK, &[])?;
        Ok(Next::Start(Agreed { attachment, terms }))
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<Next, SessionError> {
        if !data.is_empty() {
            return self.refuse(option::STRUCTURED_REPLY, reply::ERR_INVALID, "takes no data");
        }
        self.structured = true;
        self.acknowledge(option::STRUCTURED_REPLY)
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> Result<Next, SessionError> {
        // Whatever becomes of it, a new choice ends the one before.
        if option == option::SET_META_CONTEXT {
            self.allocation_of = None;
        }
        if !self.structured {
            return self.refuse(option, reply::ERR_INVALID, "needs structured replies first");
        }
        let query = match ContextQuery::decode(data) {
            Ok(query) => query,
            Err(e) => return self.refuse(option, reply::ERR_INVALID, &e.to_string()),
        };
        let Some(export) = self.find(&query.name) else {
            return self.refuse(option, reply::ERR_UNKNOWN, &SessionError::NoExport(query.name).to_string());
        };
        let listing = option == option::LIST_META_CONTEXT;
        let wanted = query.queries.iter().any(|q| q == CONTEXT_ALLOCATION || listing && q == "base:")
            || listing && query.queries.is_empty();
        if wanted && export.capabilities().block_status {
            // "MUST be 0" in a listing, where there is no context to refer to yet.
            let id = if listing { 0 } else { ALLOCATION_CONTEXT_ID };
            let mut context = id.to_be_bytes().to_vec();
            context.extend_from_slice(CONTEXT_ALLOCATION.as_bytes());
            self.reply(option, reply::META_CONTEXT, &context)?;
            if !listing {
                self.allocation_of = Some(query.name);
            }
        }
        self.acknowledge(option)
    }

    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let found = match self.exports {
            // The empty name asks for the default export, which exists only where there is no choice.
            [only] if name.is_empty() => Some(only),
            exports => exports.iter().find(|export| export.name() == name),
        };
        found.cloned()
    }

    /// `name` as the client wrote it.
    fn terms(&self, export: &Arc<dyn Export>, name: &str) -> Terms {
        Terms {
            size_bytes: export.size_bytes(),
            capabilities: export.capabilities(),
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), SessionError> {
        Ok(self.stream.write_all(&encode_option_reply(option, kind, data))?)
    }

    fn acknowledge(&mut self, option: u32) -> Result<Next, SessionError> {
        self.reply(option, reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn refuse(&mut self, option: u32, kind: u32, why: &str) -> Result<Next, SessionError> {
        self.reply(option, kind, bounded_text(why).as_bytes())?;
        Ok(Next::Option)
    }
}

/// A text for a peer, within what the spec lets a string be.
pub(super) fn bounded_text(text: &str) -> &str {
    let end = text.floor_char_boundary(super::proto::NAME_BYTES_MAX);
    &text[..end]
}

impl Terms {
    /// What the client is told it may ask for.
    #[must_use]
    pub fn transmission_flags(&self) -> u16 {
        use transmission_flag as flag;
        let can = self.capabilities;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA;
        let mut set = |condition: bool, bits: u16| {
            if condition {
                flags |= bits;
            }
        };
        set(!can.write, flag::READ_ONLY);
        set(can.write, flag::SEND_WRITE_ZEROES);
        set(can.write && can.trim, flag::SEND_TRIM);
        set(can.write && can.fast_zero, flag::SEND_FAST_ZERO);
        set(can.multi_connection, flag::CAN_MULTI_CONN);
        set(self.structured, flag::SEND_DF);
        flags
    }
}

/// The payload of an error reply, for tests and clients: number and text.
///
/// # Errors
/// [`ProtoError`] when it is too short for what it announces.
pub fn decode_error_chunk(bytes: &[u8]) -> Result<(u32, String), ProtoError> {
    let mut fields = Fields::new("error chunk", bytes);
    let number = fields.u32()?;
    let length = fields.u16()?;
    let text = String::from_utf8_lossy(fields.bytes(length.into())?).into_owned();
    Ok((number, text))
}
