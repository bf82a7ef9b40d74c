//! Writing the log.
//!
//! A thread of its own writes, because a disk that neither writes nor fails must not hold up an activation: whoever records waits
//! for that thread, but not for ever.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::chain::{Entry, Outcome};
use crate::files::{Chain, Limits, of};
use crate::{AuditError, FILE_BYTES_MAX, FILES_MAX};

/// Refusals of the same caller for the same reason within this time become one record with a count.
pub const REPEAT_WINDOW: Duration = Duration::from_secs(10);
/// How long [`Audit::record`] waits for the disk.
pub const RECORD_TIME_MAX: Duration = Duration::from_secs(5);
/// Characters that are kept of each part of a refused attempt.
const REFUSED_CHARS_MAX: usize = 256;
/// Callers and reasons counted apart; what is more is counted together.
const REPEATS_MAX: usize = 256;
/// How often counts that are due are looked for.
const REPEAT_LOOK: Duration = Duration::from_secs(1);
/// Records that wait for the disk; what comes then is counted as not recorded.
const WAITING_MAX: usize = 256;

/// A daemon's audit log. Clones share it.
#[derive(Debug, Clone)]
pub struct Audit {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    /// Taken at the end.
    queue: Option<SyncSender<Job>>,
    shared: Arc<Shared>,
    /// Says that the thread has ended.
    ended: Mutex<Receiver<()>>,
}

/// What the callers and the thread know.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    repeats: Mutex<HashMap<Entry, Repeat>>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    trouble: Option<String>,
    /// The disk has not answered in time, and not since.
    hangs: bool,
    /// Records that could not be written, and are not said in the log yet.
    lost: u64,
}

#[derive(Debug)]
struct Job {
    entry: Entry,
    done: SyncSender<()>,
}

/// A refusal that is counted.
#[derive(Debug)]
struct Repeat {
    since: Instant,
    /// Not written yet.
    count: u64,
}

impl Audit {
    /// Opens the chain of `daemon` (a word of letters) in this directory, which is made if need be.
    pub fn open(directory: &Path, daemon: &str) -> Result<Self, AuditError> {
        Self::open_limited(directory, daemon, Limits { file_bytes: FILE_BYTES_MAX, files: FILES_MAX })
    }

    pub(crate) fn open_limited(directory: &Path, daemon: &str, limits: Limits) -> Result<Self, AuditError> {
        let (chain, notes) = Chain::open(directory, daemon, limits)?;
        let state = State { sequence: chain.sequence(), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), repeats: Mutex::default() });
        let (queue, jobs) = mpsc::sync_channel(WAITING_MAX);
        let (end, ended) = mpsc::sync_channel(1);
        let mut writer = Writer { daemon: daemon.to_owned(), chain, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(move || {
            writer.run(&jobs);
            drop(writer);
            let _ = end.send(());
        });
        thread.map_err(of("start the thread of", directory))?;
        let inner = Inner { directory: directory.to_owned(), queue: Some(queue), shared, ended: Mutex::new(ended) };
        let audit = Self { inner: Arc::new(inner) };
        for detail in notes {
            audit.record(Entry::new("open", daemon, "", Outcome::Noted).because(detail));
        }
        Ok(audit)
    }

    /// Writes a record; it is durable when this returns, unless the disk fails or takes longer than [`RECORD_TIME_MAX`]: see
    /// [`Audit::trouble`]. Blocks for at most that time; not at all while the disk hangs.
    pub fn record(&self, entry: Entry) {
        self.inner.write(entry);
    }

    /// Records a refused attempt: at once, or as one of a count when the same has just been recorded. Blocks at most as long
    /// as [`Audit::record`].
    pub fn refused(&self, entry: Entry) {
        let mut entry = entry.with(Outcome::Refused);
        // Some of it is as those who were refused would have it.
        for text in [&mut entry.act, &mut entry.subject, &mut entry.detail] {
            if let Some((end, _)) = text.char_indices().nth(REFUSED_CHARS_MAX) {
                text.truncate(end);
            }
        }
        let mut repeats = self.inner.shared.repeats();
        if !repeats.contains_key(&entry) && repeats.len() >= REPEATS_MAX {
            "others".clone_into(&mut entry.actor);
            "several".clone_into(&mut entry.act);
            entry.subject.clear();
            "more callers than are counted apart".clone_into(&mut entry.detail);
        }
        if let Some(repeat) = repeats.get_mut(&entry) {
            repeat.count += 1;
            return;
        }
        repeats.insert(entry.clone(), Repeat { since: Instant::now(), count: 0 });
        drop(repeats);
        self.inner.write(entry);
    }

    /// Why the newest record could not be written; none: it could.
    pub fn trouble(&self) -> Option<String> {
        self.inner.shared.state().trouble.clone()
    }

    /// Number of the newest record.
    pub fn sequence(&self) -> u64 {
        self.inner.shared.state().sequence
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn repeats(&self) -> MutexGuard<'_, HashMap<Entry, Repeat>> {
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record that is not in the log, or may not be.
    fn not_recorded(&self, entry: &Entry, why: &str) {
        let Entry { act, actor, subject, outcome, detail } = entry;
        tracing::error!(target: "audit", %outcome, actor, subject, "{act}: {detail}: NOT RECORDED: {why}");
        self.state().trouble = Some(why.to_owned());
    }
}

impl Inner {
    fn write(&self, entry: Entry) {
        let Some(queue) = &self.queue else { return };
        let (done, written) = mpsc::sync_channel(1);
        match queue.try_send(Job { entry: entry.clone(), done }) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.shared.state().lost += 1;
                return self.shared.not_recorded(&entry, "too many records wait for the disk");
            }
        }
        let hangs = self.shared.state().hangs;
        let patience = if hangs { Duration::ZERO } else { RECORD_TIME_MAX };
        if written.recv_timeout(patience).is_err() {
            let mut state = self.shared.state();
            // It may have been just now: that is said, and `hangs` is cleared, under this lock.
            if written.try_recv().is_ok() {
                return;
            }
            state.hangs = true;
            drop(state);
            let why = format!("the disk of {} does not answer; the record waits", self.directory.display());
            self.shared.not_recorded(&entry, &why);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The thread writes what waits, and lets go of the chain.
        self.queue = None;
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = ended.recv_timeout(RECORD_TIME_MAX); // A disk that hangs holds up no end either.
    }
}

/// The thread that writes.
struct Writer {
    daemon: String,
    chain: Chain,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(&mut self, jobs: &Receiver<Job>) {
        let mut looked = Instant::now();
        loop {
            match jobs.recv_timeout(REPEAT_LOOK.saturating_sub(looked.elapsed())) {
                Ok(Job { entry, done }) => {
                    self.write(&entry, 1, Some(&done));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.due(true),
            }
            if looked.elapsed() >= REPEAT_LOOK {
                self.due(false);
                looked = Instant::now();
            }
        }
    }

    fn write(&mut self, entry: &Entry, count: u64, done: Option<&SyncSender<()>>) {
        let Entry { act, actor, subject, outcome, detail } = entry;
        let result = self.own_up().and_then(|()| self.chain.append(entry, count));
        let mut state = self.shared.state();
        // It has answered.
        state.hangs = false;
        if let Some(done) = done {
            let _ = done.try_send(()); // Nobody may wait any more.
        }
        match result {
            Ok(()) => {
                (state.sequence, state.trouble) = (self.chain.sequence(), None);
                let (seq, hash) = (self.chain.sequence(), self.chain.hash());
                tracing::info!(target: "audit", seq, %hash, %outcome, actor, subject, count, "{act}: {detail}");
            }
            Err(error) => {
                state.lost += 1;
                drop(state);
                self.shared.not_recorded(entry, &error.to_string());
            }
        }
    }

    /// Says in the log how many records are missing before the next.
    fn own_up(&mut self) -> Result<(), AuditError> {
        let lost = self.shared.state().lost;
        if lost > 0 {
            let detail = format!("{lost} records could not be written; the daemon's ordinary log has them");
            self.chain.append(&Entry::new("missing", &self.daemon, "", Outcome::Noted).because(detail), 1)?;
            self.shared.state().lost -= lost;
        }
        Ok(())
    }

    /// Writes counts whose window is over; all of them at the end.
    fn due(&mut self, all: bool) {
        let mut due = Vec::new();
        self.shared.repeats().retain(|entry, repeat| {
            if !all && repeat.since.elapsed() < REPEAT_WINDOW {
                return true;
            }
            let again = repeat.count > 0;
            if again {
                due.push((entry.clone(), repeat.count));
                *repeat = Repeat { since: Instant::now(), count: 0 };
            }
            again
        });
        for (entry, count) in due {
            self.write(&entry, count, None);
        }
    }
}
