//! The NBD protocol's numbers, and the limits kept here.
//!
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>; section names are quoted below. The
//! messages made of them are in [`message`](super::message).

/// First eight bytes of a server: "NBDMAGIC" (section "Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a server, and first eight of each option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest string the spec lets a peer send (section "Values", 4096 bytes).
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest option, and option reply, that is accepted: name and contexts fit many times over.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Largest payload of a request or a read (section "Block size constraints": 32 MiB is what every peer may assume;
/// QEMU sends no more either).
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Block size a client should prefer: QEMU's own cluster size, and its mirror's default granularity.
pub const BLOCK_BYTES_PREFERRED: u32 = 64 << 10;
/// Largest minimum block size the spec allows (section "Block size constraints").
pub const BLOCK_BYTES_MIN_MAX: u32 = 64 << 10;
/// Zero bytes at the end of the answer to `NBD_OPT_EXPORT_NAME`, unless the client declined them.
pub const EXPORT_NAME_PADDING: usize = 124;

/// The one metadata context served (section "Metadata querying").
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// BLOCK_STATUS: nothing is allocated.
pub const STATE_HOLE: u32 = 1;
/// BLOCK_STATUS: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Handshake flags of the server (section "Handshake flags").
pub mod handshake_flag {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The server can leave [`EXPORT_NAME_PADDING`](super::EXPORT_NAME_PADDING) away.
    pub const NO_ZEROES: u16 = 2;
}

/// Flags a client answers the handshake flags with (section "Client flags").
pub mod client_flag {
    /// The client speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1;
    /// The client declines the padding.
    pub const NO_ZEROES: u32 = 2;
}

/// Options a client may send (section "Option types").
pub mod option {
    /// Choose an export and start; cannot fail politely.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of option replies (section "Option reply types"); those with the top bit set are errors.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The option makes no sense as sent.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
}

/// Kinds of `NBD_REP_INFO` (same section).
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do (section "Transmission flags").
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// No writing.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF, with structured replies only.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same device.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// FAST_ZERO.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands (section "Request types").
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// End the session; not answered.
    pub const DISC: u16 = 2;
    /// Make everything answered so far stable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for extents.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands (section "Command flags").
pub mod command_flag {
    /// Stable before it is answered; valid with every command.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES must allocate.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered in one piece.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS wants one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Structured reply chunks (section "Structured reply types").
pub mod chunk {
    /// Flag: the last chunk of this reply.
    pub const FLAG_DONE: u16 = 1;
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// Error number and text.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// Error number, text, and where.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Error numbers on the wire (section "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// EPERM
    Permission,
    /// EIO
    Io,
    /// ENOMEM
    Memory,
    /// EINVAL
    Invalid,
    /// ENOSPC
    NoSpace,
    /// EOVERFLOW
    Overflow,
    /// ENOTSUP
    Unsupported,
    /// ESHUTDOWN
    Shutdown,
}

impl ErrorCode {
    /// The number the spec gives it.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::Memory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::Unsupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// A number from a server; as the spec wants it, unknown ones count as EINVAL.
    #[must_use]
    pub fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::Permission,
            5 => Self::Io,
            12 => Self::Memory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::Unsupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        }
    }
}
