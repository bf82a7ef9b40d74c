//! What the store refuses, and why.

use vmdr_journal::JournalError;
use vmdr_proto::replication::RefusedCode;

/// What the store refuses, and why. [`StoreError::code`] is what the wire says.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not a UUID.
    #[error("{0:?} is not the UUID of a domain")]
    BadUuid(String),
    /// Nothing is stored of the domain.
    #[error("domain {0}: nothing is stored here")]
    Unknown(String),
    /// Another receiver works in the state directory.
    #[error("{0} is in use by another receiver: stop that one, or configure another state directory")]
    Locked(String),
    /// The sender's generation is older than the stored one.
    #[error("domain {domain}: generation {offered} is fenced, this site has {stored}: another site owns the guest")]
    Fenced {
        /// The domain.
        domain: String,
        /// What the sender has.
        offered: u64,
        /// What is stored.
        stored: u64,
    },
    /// A guest runs on the standby.
    #[error("domain {0}: it is active at this site, its standby must not change")]
    Frozen(String),
    /// Not the next epoch or part.
    #[error("domain {domain}: {got} does not follow, expected is {expected}")]
    Sequence {
        /// The domain.
        domain: String,
        /// What came.
        got: String,
        /// What could have.
        expected: String,
    },
    /// A newer stream of the same domain has taken over.
    #[error("domain {0}: a newer connection of the same domain has taken over")]
    Superseded(String),
    /// A checksum, count or record is wrong. The part is given up; those before it stay.
    #[error("domain {domain}, epoch {epoch} part {part}: {what}; send this part again")]
    Corrupt {
        /// The domain.
        domain: String,
        /// The epoch.
        epoch: u64,
        /// The part.
        part: u32,
        /// What is wrong.
        what: String,
    },
    /// No space. What was acknowledged stays.
    #[error("domain {domain}: {what}; free space in the state directory")]
    Full {
        /// The domain.
        domain: String,
        /// What did not fit.
        what: String,
    },
    /// The state directory failed. The domain is opened anew with the next stream.
    #[error("domain {domain}: {what}")]
    Io {
        /// The domain, or what else is concerned.
        domain: String,
        /// What failed.
        what: String,
    },
    /// What is stored of the domain cannot be used.
    #[error("domain {domain}: {what}; repair the directory, or remove it with `vmdr forget` and protect anew")]
    Damaged {
        /// The domain.
        domain: String,
        /// What is wrong with it.
        what: String,
    },
    /// It is encrypted and does not open, or is not encrypted and should be.
    #[error("domain {domain}: {what}")]
    Sealed {
        /// The domain.
        domain: String,
        /// What is missing, and what to do.
        what: String,
    },
    /// A point that is known to be damaged.
    #[error(
        "domain {domain}: recovery point {point} is damaged; `vmdr points` lists those that are sound, and `--damaged` takes \
         this one as it is"
    )]
    Flawed {
        /// The domain.
        domain: String,
        /// The point.
        point: String,
    },
    /// What is stored belongs to another domain.
    #[error("domain {domain}: {what}: move the directory to where it belongs")]
    WrongDomain {
        /// The domain that the directory is of.
        domain: String,
        /// Which file, and of which domain it is.
        what: String,
    },
    /// No epoch is whole yet.
    #[error("domain {0}: there is no recovery point yet")]
    NoPoint(String),
    /// There is no such point, or not any more.
    #[error("domain {domain}: there is no recovery point {point}; `vmdr points` lists those that there are")]
    NoSuchPoint {
        /// The domain.
        domain: String,
        /// What was asked for.
        point: String,
    },
    /// What was asked for cannot be done.
    #[error("domain {domain}: {what}")]
    Refused {
        /// The domain.
        domain: String,
        /// Why.
        what: String,
    },
    /// A stream is open, or a guest runs.
    #[error("domain {domain}: {what}")]
    Busy {
        /// The domain.
        domain: String,
        /// What keeps it.
        what: String,
    },
}

impl StoreError {
    /// What the wire says.
    pub fn code(&self) -> RefusedCode {
        match self {
            StoreError::BadUuid(_) | StoreError::WrongDomain { .. } | StoreError::Unknown(_) => RefusedCode::Domain,
            StoreError::Fenced { .. } | StoreError::Frozen(_) => RefusedCode::Fenced,
            StoreError::Sequence { .. } | StoreError::Superseded(_) => RefusedCode::Sequence,
            StoreError::NoPoint(_) | StoreError::Busy { .. } => RefusedCode::Sequence,
            StoreError::NoSuchPoint { .. } | StoreError::Refused { .. } => RefusedCode::Sequence,
            StoreError::Corrupt { .. } => RefusedCode::Corrupt,
            StoreError::Full { .. } => RefusedCode::Full,
            StoreError::Sealed { .. } => RefusedCode::Io,
            StoreError::Locked(_) | StoreError::Io { .. } | StoreError::Damaged { .. } | StoreError::Flawed { .. } => {
                RefusedCode::Io
            }
        }
    }

    /// What a journal or disk says, about `domain`.
    pub(super) fn of(domain: &str, error: JournalError) -> Self {
        let (domain, what) = (domain.to_owned(), error.to_string());
        match error {
            full if full.is_full() => StoreError::Full { domain, what },
            JournalError::WrongDomain { .. } => StoreError::WrongDomain { domain, what },
            JournalError::Damaged { .. } | JournalError::Version { .. } => StoreError::Damaged { domain, what },
            JournalError::Io { .. } | JournalError::Poisoned { .. } => StoreError::Io { domain, what },
        }
    }
}
