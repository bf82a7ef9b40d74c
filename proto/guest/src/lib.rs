//! What the tools in a guest and the agent on its host say to each other over the virtio-serial port [`PORT`].
//!
//! The port is a stream of bytes that either end may join and leave at any moment: an agent is restarted, a guest goes on at
//! another site in the middle of a message. So every frame begins with a mark and ends with a checksum, and a reader that
//! has lost its place finds the next frame ([`Decoder`]). Neither end believes the other: a frame is at most
//! [`FRAME_BYTES_MAX`] long, a reader keeps no more than that, and no bytes make it fail.
//!
//! ```text
//! bytes  0..4   mark "vGST"
//!        4..6   kind, u16          all numbers little-endian
//!        6..8   n, bytes of the body, u16, at most 512
//!        8..12  number, u32: an answer has its question's
//!       12..12+n  body; a reader ignores what follows the fields that it knows
//!       12+n..16+n  FNV-1a, 32 bits, of all bytes before it
//! ```
//!
//! | kind | message | body |
//! | --- | --- | --- |
//! | 1 | hello | oldest and newest version spoken u16 each, features u32, answer wanted u8, software (UTF-8, the rest) |
//! | 2 | unsupported | the kind that was not understood u16 |
//! | 16 | clock ask | the guest's clock u64 (ns since 1970), offset last found i64 (ns), rate steered i32 (ppm) |
//! | 17 | clock is | the host's clock u64 (ns since 1970) |
//! | 32 | freeze | how long to stay frozen at most u32 (ms) |
//! | 33 | frozen | outcome u8 (see [`Outcome`]), file systems u16, skipped ones u16, how long it will stay frozen at most u32 (ms), text (UTF-8, the rest) |
//! | 34 | thaw | the number of the freeze that it ends u32 |
//! | 35 | thawed | whether all of them were frozen until now u8, how long they were u32 (ms), text (UTF-8, the rest) |
//! | 48 | heartbeat ask | |
//! | 49 | heartbeat | how long the tools run u32 (s), whether the guest is ready u8 |
//! | 64 | network put | bytes before this piece u16, bytes of the description u16, this piece of it (the rest, at most 480) |
//! | 65 | network ask | bytes of the report that have come u16 |
//! | 66 | network is | phase u8 (see [`network::Phase`]), at u16, total u16, bytes (the rest, at most 480) |
//!
//! A guest that can freeze says so in its hello ([`features::FREEZE`]); one that does not is not asked. *Frozen* answers *freeze*
//! when hooks have run and file systems are frozen, which may take some time; *thawed* answers *thaw*. A guest thaws by itself
//! when its own time is over, or the port has no other end any more, and then answers a late *thaw* with "not until now".
//!
//! A description of the guest's network ([`network`]) is put piece by piece; each *put* and each *ask* is answered with *network is*. The
//! last piece begins its application, which goes on while the host asks until it is done, and then for the pieces of the report. All
//! of it can be repeated: a piece that came already is left, and the same description applied again changes nothing.
//!
//! Kinds are given out in blocks of 16, so that what belongs together stays together: 0 to 15 this protocol itself, 16 to 31
//! the clock, 32 to 47 freeze and thaw, 48 to 63 heartbeat and readiness, 64 to 79 addresses. A kind that an end does not know
//! is answered with *unsupported*, so that who asks never waits in vain, and is otherwise ignored.

mod decode;
pub mod exchange;
pub mod network;

pub use decode::Decoder;

use network::{PIECE_BYTES_MAX, Phase};

/// The port's name, as in the domain's definition and in the guest's /sys/class/virtio-ports.
pub const PORT: &str = "org.vmdr.guest.0";
/// The newest version of the protocol spoken here.
pub const VERSION: u16 = 1;
/// The oldest.
pub const VERSION_MIN: u16 = 1;
/// The most bytes of a body: a name and some numbers are all that travels.
pub const BODY_BYTES_MAX: usize = 512;
/// The most bytes of a frame.
pub const FRAME_BYTES_MAX: usize = HEAD_BYTES + BODY_BYTES_MAX + SUM_BYTES;
/// The most bytes of a text that explains an outcome.
pub const TEXT_BYTES_MAX: usize = 400;
/// The most bytes of a software's name that are kept.
pub const SOFTWARE_BYTES_MAX: usize = 64;

const MARK: [u8; 4] = *b"vGST";
const HEAD_BYTES: usize = 12;
const SUM_BYTES: usize = 4;

/// What an end can do beside greeting; the bits of [`Hello::features`].
pub mod features {
    /// The host tells the time; the guest steers its clock by it.
    pub const CLOCK: u32 = 1;
    /// The guest freezes and thaws its file systems when it is asked to.
    pub const FREEZE: u32 = 2;
    /// The guest takes descriptions of its network.
    pub const NETWORK: u32 = 4;
    /// The guest says whether it is ready.
    pub const HEARTBEAT: u32 = 8;
}

/// What came of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is frozen.
    Frozen,
    /// It could not be: nothing is frozen, hooks have been undone.
    Failed,
    /// Another freeze has not ended yet.
    Busy,
    /// A guest of a later version says something else; nothing may be concluded from it.
    Other(u8),
}

impl Outcome {
    fn number(self) -> u8 {
        match self {
            Self::Frozen => 0,
            Self::Failed => 1,
            Self::Busy => 2,
            Self::Other(number) => number,
        }
    }

    fn of(number: u8) -> Self {
        match number {
            0 => Self::Frozen,
            1 => Self::Failed,
            2 => Self::Busy,
            other => Self::Other(other),
        }
    }
}

/// How an end introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest version it speaks.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
    /// See [`features`].
    pub features: u32,
    /// Whether the other end shall introduce itself as well.
    pub answer: bool,
    /// Name and version of the software, for people. Not to be believed, nor printed as it is.
    pub software: String,
}

impl Hello {
    /// Of this software.
    pub fn own(features: u32, answer: bool, software: &str) -> Self {
        Self { oldest: VERSION_MIN, newest: VERSION, features, answer, software: software.to_owned() }
    }

    /// The newest version that both speak.
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.newest.min(VERSION);
        (newest >= self.oldest.max(VERSION_MIN)).then_some(newest)
    }
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First in both directions.
    Hello(Hello),
    /// A message of this kind is not understood.
    Unsupported(u16),
    /// The guest asks for the time.
    ClockAsk {
        /// The guest's clock when it asked.
        guest_unix_ns: u64,
        /// How far the guest's clock was behind the host's when it last looked.
        offset_ns: i64,
        /// How much faster than by itself the guest has its clock run.
        rate_ppm: i32,
    },
    /// The time, as of the answer.
    ClockIs {
        /// The host's clock.
        host_unix_ns: u64,
    },
    /// The host asks the guest to bring its file systems to rest.
    Freeze {
        /// How long they may stay so; the guest may take less.
        hold_ms: u32,
    },
    /// They are, or why not.
    Frozen {
        /// What came of it.
        outcome: Outcome,
        /// How many are frozen.
        file_systems: u16,
        /// How many could not be, because they know no freezing.
        skipped: u16,
        /// How long they stay so at most.
        hold_ms: u32,
        /// For people. Not to be believed, nor printed as it is.
        text: String,
    },
    /// The host has what it wanted, or does not want it any more.
    Thaw {
        /// The number of the freeze.
        freeze: u32,
    },
    /// They are in use again.
    Thawed {
        /// Whether all were frozen until this was asked for.
        held: bool,
        /// How long the first of them was frozen.
        frozen_ms: u32,
        /// For people. Not to be believed, nor printed as it is.
        text: String,
    },
    /// The host wants to know whether the guest is alive and ready.
    HeartbeatAsk,
    /// It is alive.
    Heartbeat {
        /// How long the tools have been running.
        up_seconds: u32,
        /// Whether it is ready, by its own account.
        ready: bool,
    },
    /// A piece of a description of the guest's network.
    NetworkPut {
        /// Bytes of it before this piece.
        at: u16,
        /// Bytes of all of it.
        total: u16,
        /// The piece, at most [`PIECE_BYTES_MAX`].
        bytes: Vec<u8>,
    },
    /// The host wants to know how far it is, and the report from a byte on.
    NetworkAsk {
        /// Bytes of the report that it has.
        at: u16,
    },
    /// How far it is.
    NetworkIs {
        /// See there.
        phase: Phase,
        /// Receiving: bytes that have come. Else the bytes before these.
        at: u16,
        /// Done, refused: bytes of the text.
        total: u16,
        /// A piece of the report, or of why it was refused. Not to be believed, nor printed as it is.
        bytes: Vec<u8>,
    },
    /// Of a kind that is not known here, or with a body too short for its kind.
    Unknown(u16),
}

impl Message {
    /// Its number on the wire.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Unsupported(_) => 2,
            Self::ClockAsk { .. } => 16,
            Self::ClockIs { .. } => 17,
            Self::Freeze { .. } => 32,
            Self::Frozen { .. } => 33,
            Self::Thaw { .. } => 34,
            Self::Thawed { .. } => 35,
            Self::HeartbeatAsk => 48,
            Self::Heartbeat { .. } => 49,
            Self::NetworkPut { .. } => 64,
            Self::NetworkAsk { .. } => 65,
            Self::NetworkIs { .. } => 66,
            Self::Unknown(kind) => *kind,
        }
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::new();
        match self {
            Self::Hello(hello) => {
                body.extend(hello.oldest.to_le_bytes());
                body.extend(hello.newest.to_le_bytes());
                body.extend(hello.features.to_le_bytes());
                body.push(u8::from(hello.answer));
                body.extend(cut(&hello.software, SOFTWARE_BYTES_MAX));
            }
            Self::Unsupported(kind) => body.extend(kind.to_le_bytes()),
            Self::ClockAsk { guest_unix_ns, offset_ns, rate_ppm } => {
                body.extend(guest_unix_ns.to_le_bytes());
                body.extend(offset_ns.to_le_bytes());
                body.extend(rate_ppm.to_le_bytes());
            }
            Self::ClockIs { host_unix_ns } => body.extend(host_unix_ns.to_le_bytes()),
            Self::Freeze { hold_ms } => body.extend(hold_ms.to_le_bytes()),
            Self::Frozen { outcome, file_systems, skipped, hold_ms, text } => {
                body.push(outcome.number());
                body.extend(file_systems.to_le_bytes());
                body.extend(skipped.to_le_bytes());
                body.extend(hold_ms.to_le_bytes());
                body.extend(cut(text, TEXT_BYTES_MAX));
            }
            Self::Thaw { freeze } => body.extend(freeze.to_le_bytes()),
            Self::Thawed { held, frozen_ms, text } => {
                body.push(u8::from(*held));
                body.extend(frozen_ms.to_le_bytes());
                body.extend(cut(text, TEXT_BYTES_MAX));
            }
            Self::Heartbeat { up_seconds, ready } => {
                body.extend(up_seconds.to_le_bytes());
                body.push(u8::from(*ready));
            }
            Self::NetworkPut { at, total, bytes } => {
                body.extend(at.to_le_bytes());
                body.extend(total.to_le_bytes());
                body.extend(&bytes[..bytes.len().min(PIECE_BYTES_MAX)]);
            }
            Self::NetworkAsk { at } => body.extend(at.to_le_bytes()),
            Self::NetworkIs { phase, at, total, bytes } => {
                body.push(phase.number());
                body.extend(at.to_le_bytes());
                body.extend(total.to_le_bytes());
                body.extend(&bytes[..bytes.len().min(PIECE_BYTES_MAX)]);
            }
            Self::HeartbeatAsk | Self::Unknown(_) => {}
        }
        body
    }

    fn parse(kind: u16, body: &[u8]) -> Self {
        Self::known(kind, body).unwrap_or(Self::Unknown(kind))
    }

    fn known(kind: u16, body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        Some(match kind {
            1 => Self::Hello(Hello {
                oldest: u16::from_le_bytes(fields.take()?),
                newest: u16::from_le_bytes(fields.take()?),
                features: u32::from_le_bytes(fields.take()?),
                answer: fields.take::<1>()? != [0],
                software: fields.text(SOFTWARE_BYTES_MAX),
            }),
            2 => Self::Unsupported(u16::from_le_bytes(fields.take()?)),
            16 => Self::ClockAsk {
                guest_unix_ns: u64::from_le_bytes(fields.take()?),
                offset_ns: i64::from_le_bytes(fields.take()?),
                rate_ppm: i32::from_le_bytes(fields.take()?),
            },
            17 => Self::ClockIs { host_unix_ns: u64::from_le_bytes(fields.take()?) },
            32 => Self::Freeze { hold_ms: u32::from_le_bytes(fields.take()?) },
            33 => Self::Frozen {
                outcome: Outcome::of(u8::from_le_bytes(fields.take()?)),
                file_systems: u16::from_le_bytes(fields.take()?),
                skipped: u16::from_le_bytes(fields.take()?),
                hold_ms: u32::from_le_bytes(fields.take()?),
                text: fields.text(TEXT_BYTES_MAX),
            },
            34 => Self::Thaw { freeze: u32::from_le_bytes(fields.take()?) },
            35 => Self::Thawed {
                held: fields.take::<1>()? == [1],
                frozen_ms: u32::from_le_bytes(fields.take()?),
                text: fields.text(TEXT_BYTES_MAX),
            },
            48 => Self::HeartbeatAsk,
            49 => Self::Heartbeat { up_seconds: u32::from_le_bytes(fields.take()?), ready: fields.take::<1>()? == [1] },
            64 => Self::NetworkPut {
                at: u16::from_le_bytes(fields.take()?),
                total: u16::from_le_bytes(fields.take()?),
                bytes: fields.bytes(),
            },
            65 => Self::NetworkAsk { at: u16::from_le_bytes(fields.take()?) },
            66 => Self::NetworkIs {
                phase: Phase::of(u8::from_le_bytes(fields.take()?)),
                at: u16::from_le_bytes(fields.take()?),
                total: u16::from_le_bytes(fields.take()?),
                bytes: fields.bytes(),
            },
            _ => return None,
        })
    }
}

/// A message with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Of the question.
    pub number: u32,
    /// What is said.
    pub message: Message,
}

impl Frame {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let body = self.message.body();
        debug_assert!(body.len() <= BODY_BYTES_MAX);
        let mut bytes = Vec::with_capacity(HEAD_BYTES + body.len() + SUM_BYTES);
        bytes.extend(MARK);
        bytes.extend(self.message.kind().to_le_bytes());
        bytes.extend((body.len() as u16).to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(body);
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    /// What is left, as much as a piece may be.
    fn bytes(&self) -> Vec<u8> {
        self.0[..self.0.len().min(PIECE_BYTES_MAX)].to_vec()
    }

    /// What is left, up to a limit, which holds for what it has become too: a byte that is no UTF-8 becomes three.
    fn text(&self, bytes_max: usize) -> String {
        let text = String::from_utf8_lossy(self.0);
        text[..text.floor_char_boundary(bytes_max)].to_owned()
    }
}

/// The beginning of a text, whole characters of it.
fn cut(text: &str, bytes_max: usize) -> &[u8] {
    &text.as_bytes()[..text.floor_char_boundary(bytes_max)]
}

/// FNV-1a: tells a frame from bytes that look like one; it is no protection against forgery.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}
