//! Verification in the background: one thread for all domains, at a limited rate.
//!
//! - What is asked for goes first, one after another; then checksums that are missing are made; then, where a schedule is
//!   configured, points whose turn it is.
//! - The rate holds for all of it together. A step reads at most [`STEP_BYTES`], and only for that long a batch of the same
//!   domain waits.
//! - A verification ends by itself when its domain is activated or forgotten.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;
use tonic::Status;
use vmdr_proto::control::{Progress as Message, VerifyReport};

use crate::control::store_status;
use crate::daemon::Receiver;
use crate::store::{Progress, Scope, StoreError, Verdict, Verification};

/// Read at once. A batch of the same domain waits for so much.
pub const STEP_BYTES: usize = 1 << 20;
/// How often it is looked whether there is something to do that nobody asked for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a standby that is between epochs is waited for at once.
const WAIT: Duration = Duration::from_millis(200);
/// Verifications that wait for their turn, at most.
const QUEUE_MAX: usize = 1024;
/// Between verifications that nobody asked for, because it is not known what is damaged.
const UNKNOWN_REST: Duration = Duration::from_secs(60);
/// How long a domain is left alone of which something could not be looked after.
const TEND_REST: Duration = Duration::from_secs(60);
/// How often somebody who waits is told how far it has come.
const TELL: Duration = Duration::from_millis(500);

/// Where messages for somebody who waits go.
pub type Waiter = mpsc::Sender<Result<Message, Status>>;

/// What is being done, and what waits.
#[derive(Debug, Default)]
pub struct Verifier {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    /// What is being verified: the domain's UUID, and how far it is.
    doing: Option<(String, String)>,
    /// When domains were last verified because it was their turn.
    scheduled: HashMap<String, Instant>,
}

#[derive(Debug)]
struct Job {
    uuid: String,
    scope: Scope,
    waiter: Option<Waiter>,
}

impl Verifier {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a verification behind those that wait.
    pub fn ask(&self, uuid: &str, scope: Scope, waiter: Option<Waiter>) -> Result<(), Status> {
        let mut state = self.state();
        if state.queue.len() >= QUEUE_MAX {
            return Err(Status::resource_exhausted(format!("{QUEUE_MAX} verifications are waiting already")));
        }
        let known = |job: &Job| job.uuid == uuid && job.scope == scope && job.waiter.is_none();
        if waiter.is_some() || !state.queue.iter().any(known) {
            state.queue.push_back(Job { uuid: uuid.to_owned(), scope, waiter });
        }
        self.changed.notify_all();
        Ok(())
    }

    /// What is being done for a domain, in words.
    pub fn doing(&self, uuid: &str) -> Option<String> {
        let state = self.state();
        if let Some((of, what)) = &state.doing
            && of == uuid
        {
            return Some(what.clone());
        }
        state.queue.iter().any(|job| job.uuid == uuid).then(|| "waits to be verified".to_owned())
    }
}

/// Starts the thread. It ends with the receiver.
pub fn start(receiver: &Arc<Receiver>) -> std::io::Result<()> {
    let of = Arc::downgrade(receiver);
    std::thread::Builder::new().name("vmdr-verify".to_owned()).spawn(move || run(&of)).map(|_| ())
}

fn run(of: &Weak<Receiver>) {
    let mut pace = Pace::default();
    while let Some(receiver) = of.upgrade() {
        if *receiver.ending().borrow() {
            return;
        }
        let asked = receiver.verifier.state().queue.pop_front();
        match asked.or_else(|| scheduled(&receiver)) {
            Some(job) => verify(&receiver, job, &mut pace),
            None if tend(&receiver, &mut pace) => {}
            None => {
                let state = receiver.verifier.state();
                // Also when the lock is poisoned there is nothing but to look again.
                let _ = receiver.verifier.changed.wait_timeout(state, LOOK);
            }
        }
    }
}

/// Rests so that no more than the limit is read.
#[derive(Debug, Default)]
struct Pace {
    due: Option<Instant>,
    /// Domains that are left alone, until then.
    rest: HashMap<String, Instant>,
}

impl Pace {
    fn read(&mut self, bytes: u64, per_second: u64) {
        let now = Instant::now();
        let took = Duration::from_secs_f64(bytes as f64 / per_second.max(1) as f64);
        // What was not used is not saved up.
        let due = self.due.map_or(now, |due| due.max(now)) + took;
        self.due = Some(due);
        std::thread::sleep(due.saturating_duration_since(now));
    }
}

/// A domain whose turn it is.
fn scheduled(receiver: &Receiver) -> Option<Job> {
    let every = receiver.config.verify.every();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    for uuid in receiver.store.uuids() {
        let Some((verified, unknown)) = receiver.store.last_verified(&uuid) else { continue };
        let mut state = receiver.verifier.state();
        let rested = |rest: Duration| state.scheduled.get(&uuid).is_none_or(|at| at.elapsed() >= rest);
        let due = every.is_some_and(|every| {
            rested(every) && verified.is_none_or(|at| now.saturating_sub(at) >= every.as_nanos() as u64)
        });
        // Damage of which it is not known where it is: found out without being asked.
        let unknown = unknown.filter(|_| rested(UNKNOWN_REST));
        if due || unknown.is_some() {
            state.scheduled.insert(uuid.clone(), Instant::now());
            let usual = if receiver.config.verify.all { Scope::All } else { Scope::Newest };
            let scope = unknown.filter(|scope| *scope == Scope::All).unwrap_or(usual);
            return Some(Job { uuid, scope, waiter: None });
        }
    }
    None
}

/// One step of what is to be done anyway; false: there is nothing.
fn tend(receiver: &Receiver, pace: &mut Pace) -> bool {
    let mut worked = false;
    let now = Instant::now();
    pace.rest.retain(|_, until| *until > now);
    for uuid in receiver.store.uuids() {
        if pace.rest.contains_key(&uuid) {
            continue;
        }
        match receiver.store.tend(&uuid, STEP_BYTES) {
            Ok(0) => {}
            Ok(bytes) => {
                worked = true;
                pace.read(bytes, receiver.config.verify.bytes_per_second);
            }
            Err(error) => {
                tracing::debug!(domain = %uuid, %error, "cannot look after its checksums now");
                pace.rest.insert(uuid, now + TEND_REST);
            }
        }
    }
    worked
}

fn verify(receiver: &Receiver, job: Job, pace: &mut Pace) {
    let Job { uuid, scope, waiter } = job;
    let result = receiver.store.begin_verification(&uuid, scope).and_then(|mut verification| {
        let result = steps(receiver, &uuid, &mut verification, waiter.as_ref(), pace);
        receiver.verifier.state().doing = None;
        result
    });
    let last = match result {
        Ok(verdict) => {
            log(&uuid, &verdict);
            let ids = |points: &[crate::store::PointId]| points.iter().map(ToString::to_string).collect();
            let report = VerifyReport {
                ended: true,
                sound: ids(&verdict.sound),
                damaged: ids(&verdict.damaged),
                damage: verdict.damage,
                bytes: verdict.bytes,
            };
            Ok(Message { step: "verify".to_owned(), verification: Some(report), ..Message::default() })
        }
        Err(error) => {
            tracing::warn!(domain = %uuid, %error, "a verification has ended early");
            Err(store_status(&error))
        }
    };
    if let Some(waiter) = waiter {
        // Somebody who is gone need not be told.
        let _ = waiter.try_send(last);
    }
}

fn steps(
    receiver: &Receiver,
    uuid: &str,
    verification: &mut Verification,
    waiter: Option<&Waiter>,
    pace: &mut Pace,
) -> Result<Verdict, StoreError> {
    let mut told = Instant::now();
    loop {
        if *receiver.ending().borrow() {
            let what = "this receiver ends".to_owned();
            return Err(StoreError::Refused { domain: uuid.to_owned(), what });
        }
        match verification.step(STEP_BYTES)? {
            Progress::Done(verdict) => return Ok(verdict),
            Progress::Wait => std::thread::sleep(WAIT),
            Progress::Read(bytes) => {
                receiver.metrics.verified_bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
                pace.read(bytes, receiver.config.verify.bytes_per_second);
            }
        }
        let (done, total) = verification.progress();
        let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0);
        receiver.verifier.state().doing = Some((uuid.to_owned(), format!("is being verified: {percent} %")));
        if let Some(waiter) = waiter.filter(|_| told.elapsed() >= TELL) {
            told = Instant::now();
            let unit = "bytes".to_owned();
            let message = Message { step: "verify".to_owned(), done, total, unit, ..Message::default() };
            // One who does not read misses some.
            let _ = waiter.try_send(Ok(message));
        }
    }
}

fn log(uuid: &str, verdict: &Verdict) {
    let Verdict { sound, damaged, damage, bytes } = verdict;
    if damaged.is_empty() {
        tracing::info!(domain = %uuid, sound = sound.len(), bytes, "verified");
    } else {
        let (points, damage) = (damaged.len(), damage.join("; "));
        tracing::error!(domain = %uuid, sound = sound.len(), points, damage, "damaged recovery points were found");
    }
}
