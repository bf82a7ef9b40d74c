//! What goes wrong with a bucket, and what to do next.

use crate::export::SourceError;
use crate::keys::KeyError;

/// Why something in a bucket cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ColdError {
    /// The URL or what belongs to it is not right.
    #[error("the object storage {url:?} cannot be used: {what}")]
    Location {
        /// As it was given.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// The object store does not do what it is asked, after all tries.
    #[error("{doing} {object} in the object storage: {}", cause(.source))]
    Store {
        /// A verb.
        doing: &'static str,
        /// Which object.
        object: String,
        /// What it says.
        source: object_store::Error,
    },
    /// An object that must be there is not.
    #[error("{object} is missing in the object storage{advice}")]
    Missing {
        /// Which.
        object: String,
        /// What to do.
        advice: &'static str,
    },
    /// An object is not what was written.
    #[error("{object} in the object storage is damaged: {what}")]
    Damaged {
        /// Which.
        object: String,
        /// In what way.
        what: String,
    },
    /// An object was written by a later version.
    #[error("{object} has format version {found}, this vmdr knows version {known}: use the one that wrote it", known = crate::sealed::VERSION)]
    Version {
        /// Which.
        object: String,
        /// What it says.
        found: u32,
    },
    /// A key is missing, or the wrong one.
    #[error("{object}: {source}")]
    Key {
        /// What it is about.
        object: String,
        /// What is wrong.
        source: KeyError,
    },
    /// Nothing is there of this domain.
    #[error("{url} has nothing of {domain}; `vmdr import --from URL --list` shows what is there")]
    NoDomain {
        /// The storage.
        url: String,
        /// As it was asked for.
        domain: String,
    },
    /// There is no such point.
    #[error("{url} has no {point} of {domain}; `vmdr import --from URL --list` shows which there are")]
    NoPoint {
        /// The storage.
        url: String,
        /// The domain.
        domain: String,
        /// As it was asked for.
        point: String,
    },
    /// The point cannot be read.
    #[error("read the recovery point: {0}")]
    Source(#[source] SourceError),
    /// A prune of another receiver came in between.
    #[error(
        "chunks that this export relies on are being pruned: run it again (what was sent is not sent again); if it stays so, \
         finish the prune with `vmdr export {domain} --prune`"
    )]
    Disturbed {
        /// The domain.
        domain: String,
    },
    /// Another receiver prunes.
    #[error("{domain} is being pruned by {owner} since {seconds} s: wait for it, or try again in two hours")]
    Busy {
        /// The domain.
        domain: String,
        /// Who.
        owner: String,
        /// Since when.
        seconds: u64,
    },
    /// The host that cut a point had its clock ahead.
    #[error(
        "{object} was cut {seconds} s ahead of the object storage's time, so no point's age can be told, and nothing is pruned: set \
         the clock of the host of {domain}; then wait until that time has come and another point was exported, or delete that \
         object if the point is of no use"
    )]
    Clock {
        /// The domain.
        domain: String,
        /// The point's manifest.
        object: String,
        /// By so much.
        seconds: u64,
    },
    /// To find out what is needed took too long.
    #[error(
        "nothing of {domain} was deleted for want of time: to read what its points need took {seconds} s. Say in `keep` that fewer \
         points stay, or prune where the object storage is nearer"
    )]
    Slow {
        /// The domain.
        domain: String,
        /// So long.
        seconds: u64,
    },
    /// More than this version handles.
    #[error("{0}")]
    Limit(String),
    /// It was ended from outside.
    #[error("it was ended before it was done; run it again: what was sent is not sent again")]
    Ended,
}

/// The whole chain of causes in one line: the object store's own messages name little.
fn cause(error: &object_store::Error) -> String {
    let mut said = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
        next = error.source();
    }
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}
