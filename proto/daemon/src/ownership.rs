//! Which domains this host may run: the state machine of ownership, on disk, one record for each domain.
//!
//! Agent and receiver of a host share the records, and so does libvirt's hook ([`crate::hook`]), which reads them when
//! neither daemon runs. [`Ownerships::transition`] is the only function that changes one. It is durable when that returns,
//! and only then is anything done about it: so whoever finds a record after a crash knows at least what may have been done.
//!
//! ```text
//!            protected(g)                          hand over
//!   nothing ------------> owner, generation g ---------------> handing over (may not run: it is held)
//!      ^                   |  ^     ^     ^                      |      |
//!      +------ ended ------+  |     |     +----- kept here ------+      |
//!                             |     |                                   |
//!            activating(g'>g) |     | given back(g'>g), forced          |
//!                             |     |                                   |
//!                            fenced, generation g' <-- outdated(g'>g) --+
//! ```
//! `outdated` also leads there from `owner` and from nothing: another site has a newer generation. From every state
//! `forced` leads to `owner` in the next generation; it is the operator's word, and recorded with a reason.
//!
//! **Unconfirmed.** A host that was started anew does not know what happened meanwhile. So the record of a domain that is
//! protected elsewhere counts only with a mark that lies where it is lost with the host's memory (/run): it is set when a
//! receiver has said that this generation is the newest one. Without it the hook refuses the domain until the agent has
//! asked. A guest that was activated here and is not protected yet has no other site to ask about.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::durable;

/// What a reader of a record must understand.
///
/// Version history, one sentence each:
///   1  first version.
const VERSION: u32 = 1;
/// Where the records lie, unless configured otherwise.
pub const RECORDS: &str = "/var/lib/vmdr/domains";
/// Where the marks lie.
pub const CONFIRMED: &str = "/run/vmdr/confirmed";

/// What this host is to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It may run it.
    Owner,
    /// It has paused it and asked another site to take it; the answer is not known.
    HandingOver,
    /// Another site owns it.
    Fenced,
}

/// The record of one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    version: u32,
    /// The domain's UUID.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// What this host is to it.
    pub role: Role,
    /// The generation of that: the newest that this host knows of.
    pub generation: u64,
    /// Whether it may be started here. Said by the role already; this line is what the hook looks for.
    pub may_run: bool,
    /// Another site can have become the owner while this host was down: it asks before it starts the guest. The hook looks
    /// for this line too.
    pub ask_first: bool,
    /// Since when, wall clock.
    pub since_unix_ns: u64,
    /// Why, for people.
    pub reason: String,
}

/// What happens to an ownership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The domain is protected from here in this generation.
    Protected(u64),
    /// A receiver of this host is about to start the guest, in this generation.
    Activating(u64),
    /// The guest is held, and a receiver elsewhere will be asked to take it.
    HandOver,
    /// It has not been taken, and cannot be any more.
    KeptHere,
    /// Another site has this generation.
    Outdated(u64),
    /// The site that had it has given it back, in this generation.
    GivenBack(u64),
    /// The operator says so.
    Forced(String),
    /// It is not protected any more.
    Ended,
}

/// A transition that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("domain {name}: {event:?} is not possible while this host is {role}; see `vmdr status`")]
pub struct Illegal {
    name: String,
    event: Event,
    role: String,
}

/// Why a record could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipError {
    /// There is no such transition.
    #[error(transparent)]
    Illegal(#[from] Illegal),
    /// The record cannot be read or written.
    #[error("ownership record {path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It does not say what a record says. It counts as fenced.
    #[error("ownership record {path:?} cannot be understood ({why}); `vmdr own --force` writes it anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// What an event makes of a state; nothing: there is no record any more.
pub fn next(now: Option<(Role, u64)>, event: &Event) -> Option<Option<(Role, u64)>> {
    use Role::{Fenced, HandingOver, Owner};
    let generation = now.map_or(0, |(_, generation)| generation);
    Some(match (now.map(|(role, _)| role), event) {
        (None | Some(Owner), Event::Protected(g)) if *g >= generation => Some((Owner, *g)),
        // Once more: what was interrupted goes on.
        (None | Some(Owner), Event::Activating(g)) if *g >= generation => Some((Owner, *g)),
        (Some(Fenced), Event::Activating(g)) if *g > generation => Some((Owner, *g)),
        (Some(Owner | HandingOver), Event::HandOver) => Some((HandingOver, generation)),
        (Some(Owner | HandingOver), Event::KeptHere) => Some((Owner, generation)),
        (None | Some(Owner | HandingOver), Event::Outdated(g)) if *g > generation => Some((Fenced, *g)),
        (Some(Fenced), Event::Outdated(g)) => Some((Fenced, generation.max(*g))),
        (Some(Fenced | HandingOver), Event::GivenBack(g)) if *g > generation => Some((Owner, *g)),
        // The next one may have been taken at the other site.
        (Some(HandingOver), Event::Forced(_)) => Some((Owner, generation.checked_add(2)?)),
        (_, Event::Forced(_)) => Some((Owner, generation.checked_add(1)?)),
        (None | Some(Owner), Event::Ended) => None,
        // What another site owns it owns, whoever stops being interested here.
        (Some(Fenced), Event::Ended) => Some((Fenced, generation)),
        _ => return None,
    })
}

/// The records of a host.
#[derive(Clone, Debug)]
pub struct Ownerships {
    records: PathBuf,
    confirmed: PathBuf,
}

impl Ownerships {
    /// Those in these directories.
    pub fn new(records: &Path, confirmed: &Path) -> Self {
        Self { records: records.to_owned(), confirmed: confirmed.to_owned() }
    }

    /// Directories of records and of marks.
    pub fn directories(&self) -> (&Path, &Path) {
        (&self.records, &self.confirmed)
    }

    /// The record of a domain, if there is one.
    pub fn get(&self, uuid: &str) -> Result<Option<Ownership>, OwnershipError> {
        let path = self.path(uuid);
        let damaged = |why: String| OwnershipError::Damaged { path: path.clone(), why };
        let bytes = durable::read(&path).map_err(|source| OwnershipError::Io { path: path.clone(), source })?;
        let Some(bytes) = bytes else { return Ok(None) };
        let record: Ownership = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("it has version {}, this vmdr knows {VERSION}", record.version)));
        }
        if record.uuid != uuid {
            return Err(damaged(format!("it is of {}", record.uuid)));
        }
        Ok(Some(record))
    }

    /// Changes the record of a domain, durably, and gives what it is then. An event that changes nothing writes nothing.
    pub fn transition(
        &self,
        uuid: &str,
        name: &str,
        event: &Event,
        reason: &str,
    ) -> Result<Option<Ownership>, OwnershipError> {
        let path = self.path(uuid);
        let io = |source| OwnershipError::Io { path: path.clone(), source };
        fs::create_dir_all(&self.records).map_err(io)?;
        let lock = File::create(self.records.join("lock")).map_err(io)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| io(error.into()))?;
        let now = match self.get(uuid) {
            Err(OwnershipError::Damaged { .. }) if matches!(event, Event::Forced(_)) => None,
            now => now?,
        };
        let state = now.as_ref().map(|record| (record.role, record.generation));
        let to = next(state, event).ok_or_else(|| Illegal {
            name: name.to_owned(),
            event: event.clone(),
            role: now.as_ref().map_or_else(|| "nothing to it".to_owned(), Ownership::describe),
        })?;
        let ask_first = match event {
            Event::Protected(_) => true,
            Event::Activating(_) | Event::GivenBack(_) | Event::Forced(_) => false,
            _ => now.as_ref().is_some_and(|now| now.ask_first),
        };
        if to == state && now.as_ref().is_none_or(|now| now.ask_first == ask_first) {
            return Ok(now);
        }
        let Some((role, generation)) = to else {
            durable::remove(&path).map_err(io)?;
            self.unconfirm(uuid).map_err(io)?;
            return Ok(None);
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = Ownership {
            version: VERSION,
            uuid: uuid.to_owned(),
            name: name.to_owned(),
            role,
            generation,
            may_run: role == Role::Owner,
            ask_first,
            since_unix_ns: since.as_nanos() as u64,
            reason: reason.to_owned(),
        };
        let mut text = serde_json::to_vec_pretty(&record).map_err(|error| io(error.into()))?;
        text.push(b'\n');
        durable::write(&path, &text).map_err(io)?;
        tracing::info!(domain = name, from = ?state, to = ?to, reason, "ownership");
        if role == Role::Fenced {
            self.unconfirm(uuid).map_err(io)?;
        }
        Ok(Some(record))
    }

    /// Whether this host knows, since it was started, that it owns the domain, or has nobody to ask.
    pub fn is_confirmed(&self, uuid: &str) -> bool {
        self.confirmed.join(uuid).exists() || matches!(self.get(uuid), Ok(Some(now)) if now.may_run && !now.ask_first)
    }

    /// Notes that a receiver knows of no newer generation.
    pub fn confirm(&self, uuid: &str) -> io::Result<()> {
        if self.confirmed.join(uuid).exists() {
            return Ok(());
        }
        fs::create_dir_all(&self.confirmed)?;
        File::create(self.confirmed.join(uuid)).map(|_| ())
    }

    /// The file that says until when a guest may run whose backup site takes it by itself: where the mark is, and lost with it.
    pub fn permission(&self, uuid: &str) -> PathBuf {
        self.confirmed.join(format!("{uuid}.may"))
    }

    fn unconfirm(&self, uuid: &str) -> io::Result<()> {
        match fs::remove_file(self.confirmed.join(uuid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All records that can be read.
    pub fn all(&self) -> Vec<Ownership> {
        let Ok(entries) = fs::read_dir(&self.records) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| self.get(name.strip_suffix(".json")?).ok().flatten()).collect()
    }

    fn path(&self, uuid: &str) -> PathBuf {
        self.records.join(format!("{uuid}.json"))
    }
}

impl Ownership {
    /// In a word, as `status` has it.
    pub fn describe(&self) -> String {
        let role = match self.role {
            Role::Owner => "owner",
            Role::HandingOver => "handing over",
            Role::Fenced => "fenced",
        };
        role.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "22222222-1111-4111-8111-111111111111";

    fn ownerships(directory: &tempfile::TempDir) -> Ownerships {
        Ownerships::new(&directory.path().join("domains"), &directory.path().join("confirmed"))
    }

    /// Every event in every state, so that no way to run a guest is there by accident.
    #[test]
    fn only_these_transitions_make_a_host_an_owner() {
        use Role::{Fenced, HandingOver, Owner};
        let states = [None, Some((Owner, 5)), Some((HandingOver, 5)), Some((Fenced, 5))];
        let events = [
            Event::Protected(5),
            Event::Protected(6),
            Event::Activating(5),
            Event::Activating(6),
            Event::HandOver,
            Event::KeptHere,
            Event::Outdated(5),
            Event::Outdated(6),
            Event::GivenBack(5),
            Event::GivenBack(6),
            Event::Forced(String::new()),
            Event::Ended,
        ];
        let owner = |g| Some(Some((Owner, g)));
        let fenced = |g| Some(Some((Fenced, g)));
        let handing = Some(Some((HandingOver, 5)));
        let gone = Some(None);
        let table = [
            // nothing, owner, handing over, fenced
            [owner(5), owner(5), None, None],
            [owner(6), owner(6), None, None],
            [owner(5), owner(5), None, None],
            [owner(6), owner(6), None, owner(6)],
            [None, handing, handing, None],
            [None, owner(5), owner(5), None],
            [fenced(5), None, None, fenced(5)],
            [fenced(6), fenced(6), fenced(6), fenced(6)],
            [None, None, None, None],
            [None, None, owner(6), owner(6)],
            [owner(1), owner(6), owner(7), owner(6)],
            [gone, gone, None, fenced(5)],
        ];
        for (event, row) in events.iter().zip(table) {
            for (state, expected) in states.iter().zip(row) {
                assert_eq!(next(*state, event), expected, "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn a_record_is_durable_and_says_what_the_hook_looks_for() {
        let directory = tempfile::tempdir().unwrap();
        let all = ownerships(&directory);
        assert_eq!(all.get(UUID).unwrap(), None);
        let owner = all.transition(UUID, "web", &Event::Protected(1), "protect").unwrap().unwrap();
        assert!(owner.may_run && !all.is_confirmed(UUID));
        all.confirm(UUID).unwrap();
        let file = directory.path().join("domains").join(format!("{UUID}.json"));
        assert!(fs::read_to_string(&file).unwrap().contains("\"may_run\": true"));
        all.transition(UUID, "web", &Event::Outdated(2), "told").unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("\"may_run\": false"));
        assert!(!all.is_confirmed(UUID));
        let error = all.transition(UUID, "web", &Event::Protected(2), "protect").unwrap_err().to_string();
        assert!(error.contains("web") && error.contains("fenced"), "{error}");
        all.transition(UUID, "web", &Event::Activating(3), "activate").unwrap();
        assert!(all.is_confirmed(UUID));
        assert_eq!(all.all().len(), 1);
        all.transition(UUID, "web", &Event::Ended, "unprotect").unwrap();
        assert_eq!((all.get(UUID).unwrap(), all.is_confirmed(UUID)), (None, false));
    }

    #[test]
    fn a_damaged_record_is_no_permission() {
        let directory = tempfile::tempdir().unwrap();
        let all = ownerships(&directory);
        all.transition(UUID, "web", &Event::Protected(1), "protect").unwrap();
        fs::write(directory.path().join("domains").join(format!("{UUID}.json")), "{").unwrap();
        assert!(matches!(all.get(UUID), Err(OwnershipError::Damaged { .. })));
        assert!(all.transition(UUID, "web", &Event::Activating(9), "activate").is_err());
        let forced = all.transition(UUID, "web", &Event::Forced("mended".to_owned()), "mended").unwrap().unwrap();
        assert_eq!((forced.role, forced.generation), (Role::Owner, 1));
    }
}
