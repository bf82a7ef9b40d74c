//! Failure detection: an alarm where nothing was heard of a protected host for too long.
//!
//! Agents say something each second. What comes in on a domain's newest stream counts ([`Watches::heard`]); a thread looks
//! twice a second whether that is too long ago, by the core that `vmdr-witness` has for it and by a clock that stands still
//! while this receiver does ([`crate::running`]). An alarm is a line in the log and in the audit log, a sentence in `status`, a
//! metric, and a program of the operator's. It ends by itself when the agent is heard again, or there is nothing to wait for
//! any more: the guest was activated here or does not run, the domain was forgotten, its protection was ended or suspended, of
//! which the agent tells ([`rest`]). Nothing is activated because of it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver as Queue, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tonic::Status;
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_daemon::durable;
use vmdr_plan::{At, Hook, OnFailure, Place};
use vmdr_proto::replication::{RestReply, RestRequest};
use vmdr_witness::Silence;

use crate::activate::run::{age_seconds, unix_ns};
use crate::daemon::Receiver;
use crate::recovery::hooks;
use crate::running::RunningClock;
use crate::store::DomainSummary;
use crate::takeover;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Alarms that wait for the operator's program; more are in the log only.
const HOOKS_MAX: usize = 64;
/// Beside a domain's standby: its agent does not send on purpose.
const REST_FILE: &str = "rest.json";
/// The longest reason that is taken over from a peer.
const WHY_CHARS_MAX: usize = 256;

/// `[alarm]`: when silence is one, and who is told.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlarmConfig {
    /// Seconds of silence; 0: no alarms.
    pub after_seconds: u64,
    /// A program and its arguments, run when an alarm is raised and when it ends; empty: none.
    pub hook: Vec<String>,
    /// How long it may take.
    pub hook_timeout_seconds: u64,
}

impl Default for AlarmConfig {
    fn default() -> Self {
        AlarmConfig { after_seconds: 30, hook: Vec::new(), hook_timeout_seconds: 30 }
    }
}

impl AlarmConfig {
    /// What of it makes no sense.
    pub fn nonsense(&self) -> Option<String> {
        if self.after_seconds != 0 && !(3..=86_400).contains(&self.after_seconds) {
            return Some(format!("after_seconds = {}: it is 0 (no alarms), or from 3 to 86400", self.after_seconds));
        }
        if !(1..=3600).contains(&self.hook_timeout_seconds) {
            return Some(format!("hook_timeout_seconds = {}: it is from 1 to 3600", self.hook_timeout_seconds));
        }
        let relative = self.hook.first().filter(|program| !Path::new(program).is_absolute());
        relative.map(|program| format!("hook = [{program:?}, ...]: the program is named by an absolute path"))
    }

    fn bound(&self) -> Option<Duration> {
        (self.after_seconds > 0).then(|| Duration::from_secs(self.after_seconds))
    }
}

/// Why an agent does not send, as it has said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Rest {
    why: String,
}

/// What is known of a domain's agent.
#[derive(Debug)]
struct Watch {
    silence: Silence,
    /// When it was heard last, wall clock; 0: not since this receiver was started.
    heard_unix_ns: u64,
    peer: String,
    rest: Option<String>,
    /// Another one with each stream that is opened, and each start of this receiver.
    token: u64,
    /// The domain as it was when its alarm was raised.
    raised: Option<DomainSummary>,
    /// Why automatic failover has not brought the guest up here, as it was last looked at; empty: nothing is known of that.
    trouble: String,
}

/// An alarm that stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Silent {
    /// For how long nothing was heard.
    pub seconds: f64,
    /// All that is known, as a sentence.
    pub sentence: String,
}

/// What is told when an alarm is raised, or ends.
#[derive(Debug)]
struct Notice {
    domain: DomainSummary,
    silent: Silent,
    /// Seconds since 1970; 0: not since this receiver was started.
    heard_unix: u64,
    peer: String,
}

/// All domains' agents.
#[derive(Debug)]
pub struct Watches {
    bound: Option<Duration>,
    clock: RunningClock,
    watches: Mutex<HashMap<Uuid, Watch>>,
    /// Alarms of domains that were forgotten since it was last looked.
    forgotten: Mutex<Vec<Notice>>,
    /// What is kept of an agent that rests, and what is known of it, change together.
    order: Mutex<()>,
}

impl Watches {
    /// Nobody was heard of yet.
    pub fn new(config: &AlarmConfig) -> Self {
        Watches {
            bound: config.bound(),
            clock: RunningClock::default(),
            watches: Mutex::default(),
            forgotten: Mutex::default(),
            order: Mutex::default(),
        }
    }

    fn watches(&self) -> MutexGuard<'_, HashMap<Uuid, Watch>> {
        locked(&self.watches)
    }

    fn fresh(&self, rest: Option<String>) -> Watch {
        let silence = Silence::new(self.bound.unwrap_or(Duration::MAX), self.clock.now());
        Watch {
            silence,
            heard_unix_ns: 0,
            peer: String::new(),
            rest,
            token: token(),
            raised: None,
            trouble: String::new(),
        }
    }

    /// One that is stored here: from now on it is waited for.
    fn expect(&self, uuid: Uuid, rest: Option<String>) {
        let fresh = self.fresh(rest);
        self.watches().entry(uuid).or_insert(fresh);
    }

    /// A stream was opened, the `stream`th of the domain, by this peer. What the agent had said of resting counts no more.
    fn opened(&self, uuid: Uuid, stream: u64, peer: &str) {
        let fresh = self.fresh(None);
        let mut watches = self.watches();
        let watch = watches.entry(uuid).or_insert(fresh);
        watch.silence.opened(stream, self.clock.now());
        (watch.heard_unix_ns, watch.rest, watch.token) = (unix_ns(SystemTime::now()), None, token());
        peer.clone_into(&mut watch.peer);
    }

    /// Something came in on that stream.
    pub fn heard(&self, uuid: Uuid, stream: u64) {
        if let Some(watch) = self.watches().get_mut(&uuid)
            && watch.silence.heard(stream, self.clock.now())
        {
            watch.heard_unix_ns = unix_ns(SystemTime::now());
        }
    }

    /// Nothing is read from that stream for the time being: its silence is this receiver's own.
    pub fn not_read(&self, uuid: Uuid, stream: u64) {
        if let Some(watch) = self.watches().get_mut(&uuid) {
            watch.silence.heard(stream, self.clock.now());
        }
    }

    /// What names all that was opened so far.
    fn token(&self, uuid: Uuid) -> u64 {
        let fresh = self.fresh(None);
        self.watches().entry(uuid).or_insert(fresh).token
    }

    /// The agent does not send for the time being, on purpose.
    fn rests(&self, uuid: Uuid, why: &str) {
        if let Some(watch) = self.watches().get_mut(&uuid) {
            watch.rest = Some(why.to_owned());
        }
    }

    /// Why a domain's agent does not send, as it has said; nothing: it is expected to.
    pub fn rest(&self, uuid: Uuid) -> Option<String> {
        self.watches().get(&uuid)?.rest.clone()
    }

    /// A domain is not stored here any more: an alarm of its ends.
    pub fn forget(&self, uuid: Uuid) {
        let watch = self.watches().remove(&uuid);
        if let Some(watch) = watch
            && let Some(domain) = &watch.raised
        {
            locked(&self.forgotten).push(self.notice(&watch, domain, ""));
        }
    }

    /// For how long nothing was heard of a domain's agent, in seconds; nothing: it is not waited for.
    pub fn seconds(&self, uuid: Uuid) -> Option<f64> {
        let watches = self.watches();
        let watch = watches.get(&uuid).filter(|watch| watch.rest.is_none())?;
        Some(watch.silence.lasts(self.clock.now()).as_secs_f64())
    }

    /// The alarm of a domain, if there is one.
    pub fn alarm(&self, domain: &DomainSummary, last_error: &str) -> Option<Silent> {
        let uuid = Uuid::parse_str(&domain.uuid).ok()?;
        let watches = self.watches();
        let watch = watches.get(&uuid).filter(|watch| watch.raised.is_some())?;
        Some(self.silent(watch, domain, last_error))
    }

    fn notice(&self, watch: &Watch, domain: &DomainSummary, last_error: &str) -> Notice {
        Notice {
            domain: domain.clone(),
            silent: self.silent(watch, domain, last_error),
            heard_unix: watch.heard_unix_ns / 1_000_000_000,
            peer: watch.peer.clone(),
        }
    }

    fn silent(&self, watch: &Watch, domain: &DomainSummary, last_error: &str) -> Silent {
        let silence = watch.silence.lasts(self.clock.now());
        let now = unix_ns(SystemTime::now());
        let host = if watch.peer.is_empty() { String::new() } else { format!(" on {}", watch.peer) };
        let bound = self.bound.unwrap_or_default().as_secs();
        let mut sentence = String::new();
        if !watch.trouble.is_empty() {
            sentence.push_str(&format!("{}; ", watch.trouble));
        }
        sentence
            .push_str(&format!("nothing was heard of the agent{host} for {} s (bound {bound} s)", silence.as_secs()));
        if watch.heard_unix_ns == 0 {
            sentence.push_str(", which is since this receiver was started");
        }
        if !last_error.is_empty() {
            sentence.push_str(&format!("; {last_error}"));
        }
        let age = age_seconds(domain.cut_unix_ns, now);
        sentence.push_str(&format!(
            "; the newest recovery point is {}-{}, cut {age:.0} s ago",
            domain.point_generation, domain.position.epoch
        ));
        sentence.push_str("; whether the guest runs there is not known here");
        Silent { seconds: silence.as_secs_f64(), sentence }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Never 0, which is nobody's.
fn token() -> u64 {
    Uuid::new_v4().as_u64_pair().0 | 1
}

fn rest_path(directory: &Path) -> PathBuf {
    directory.join(REST_FILE)
}

fn read_rest(directory: &Path) -> Option<String> {
    let bytes = durable::read(&rest_path(directory)).ok().flatten()?;
    serde_json::from_slice::<Rest>(&bytes).ok().map(|rest| rest.why)
}

/// A stream was opened: what the agent had said before counts no more.
pub fn opened(receiver: &Receiver, uuid: Uuid, stream: u64, peer: &str) {
    let path = rest_path(&receiver.domain_directory(uuid));
    let _both = locked(&receiver.silence.order);
    if path.exists()
        && let Err(error) = durable::remove(&path)
    {
        tracing::warn!(%uuid, %error, "remove the note that its agent rests");
    }
    receiver.silence.opened(uuid, stream, peer);
}

/// An agent says that it will not send, on purpose: kept, so that no restart of this receiver makes an alarm of it.
///
/// It counts only with the token of the newest stream, which an agent gets by asking without: what was said before a stream was
/// opened and arrives afterwards silences nothing.
pub fn rest(receiver: &Receiver, request: &RestRequest) -> Result<RestReply, Status> {
    let uuid = takeover::parse(&request.domain_uuid)?;
    let why: String = request.why.chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect();
    let directory = receiver.domain_directory(uuid);
    if !directory.is_dir() {
        return Ok(RestReply { applied: true, token: 0 });
    }
    let _both = locked(&receiver.silence.order);
    let token = receiver.silence.token(uuid);
    if request.token != token {
        return Ok(RestReply { applied: false, token });
    }
    let text = serde_json::to_vec(&Rest { why: why.clone() }).map_err(|error| Status::internal(error.to_string()))?;
    durable::write(&rest_path(&directory), &text).map_err(|error| Status::internal(error.to_string()))?;
    receiver.silence.rests(uuid, &why);
    tracing::info!(%uuid, why, "the agent rests");
    Ok(RestReply { applied: true, token })
}

/// Starts the thread that looks, and the one that runs the operator's program. They end with the receiver.
pub fn start(receiver: &Arc<Receiver>) -> io::Result<()> {
    for domain in receiver.store.domains() {
        if let Ok(uuid) = Uuid::parse_str(&domain.uuid) {
            receiver.silence.expect(uuid, read_rest(&receiver.domain_directory(uuid)));
        }
    }
    if receiver.silence.bound.is_none() {
        return Ok(());
    }
    let config = &receiver.config.alarm;
    let hook = (!config.hook.is_empty()).then(|| Hook {
        argv: At { value: config.hook.clone(), place: Place::default() },
        timeout_seconds: config.hook_timeout_seconds,
        on_failure: OnFailure::Warn,
    });
    let hooks = match hook {
        None => None,
        Some(hook) => {
            let (sender, queue) = sync_channel(HOOKS_MAX);
            let name = "vmdr-alarm-hook".to_owned();
            std::thread::Builder::new().name(name).spawn(move || run_hooks(&hook, &queue))?;
            Some(sender)
        }
    };
    let (of, runtime) = (Arc::downgrade(receiver), Handle::current());
    std::thread::Builder::new()
        .name("vmdr-alarm".to_owned())
        .spawn(move || look_for_ever(&of, &runtime, hooks.as_ref()))
        .map(drop)
}

type Environment = Vec<(&'static str, String)>;

fn run_hooks(hook: &Hook, queue: &Queue<Environment>) {
    while let Ok(environment) = queue.recv() {
        // What it says and how it ends is in the log.
        let _ = hooks::run("alarm", std::slice::from_ref(hook), &environment, &mut |_| {});
    }
}

fn look_for_ever(of: &Weak<Receiver>, runtime: &Handle, hooks: Option<&SyncSender<Environment>>) {
    while let Some(receiver) = of.upgrade() {
        if receiver.is_ending() || !receiver.silence.clock.step(runtime) {
            return;
        }
        look(&receiver, hooks);
        drop(receiver);
        std::thread::sleep(LOOK);
    }
}

/// Raises and ends alarms.
fn look(receiver: &Receiver, hooks: Option<&SyncSender<Environment>>) {
    let silence = &receiver.silence;
    let now = silence.clock.now();
    let mut notices: Vec<_> = locked(&silence.forgotten).drain(..).map(|notice| (false, notice)).collect();
    let concerned = |watch: &Watch| watch.raised.is_some() || watch.silence.is_too_long(now);
    // One lock after the other.
    let concerned = silence.watches().values().any(concerned);
    if concerned || receiver.failover.is_in_trouble() {
        notices.extend(changes(receiver, now));
    }
    for (alarm, notice) in notices {
        tell(receiver, hooks, alarm, &notice);
    }
}

/// Which alarms have to be raised, and which have ended.
fn changes(receiver: &Receiver, now: Duration) -> Vec<(bool, Notice)> {
    let silence = &receiver.silence;
    let domains = receiver.store.domains();
    let mut troubles = receiver.failover.troubles();
    let mut changed = Vec::new();
    for (uuid, watch) in silence.watches().iter_mut() {
        let id = uuid.to_string();
        let domain = domains.iter().find(|domain| domain.uuid == id);
        // Without a recovery point there is nothing to decide.
        let stands_by = domain.is_some_and(|domain| !domain.frozen && domain.position.epoch > 0);
        let awaited = stands_by && watch.rest.is_none();
        if !awaited {
            watch.silence.wait_from(now);
        }
        let trouble = troubles.remove(uuid).unwrap_or_default();
        // Told once more where it is silent and known already: that it is not taken is news.
        let news = !trouble.is_empty() && watch.trouble.is_empty();
        watch.trouble = trouble;
        let alarm = !watch.trouble.is_empty() || (awaited && watch.silence.is_too_long(now));
        if (alarm != watch.raised.is_some() || news)
            && let Some(domain) = domain.or(watch.raised.as_ref())
        {
            changed.push((*uuid, domain.clone(), alarm));
        }
    }
    let mut notices = Vec::new();
    for (uuid, domain, alarm) in changed {
        // Nobody's: it was imported, or its peer has to be named anew (`vmdr peers grant`).
        if alarm && receiver.store.access(&domain.uuid).is_ok_and(|access| access.owner.is_none()) {
            continue;
        }
        let last_error = receiver.session(uuid, |session| session.last_error.clone());
        let mut watches = silence.watches();
        let Some(watch) = watches.get_mut(&uuid) else { continue };
        // It may have been heard, or have said that it rests, since.
        if alarm && watch.trouble.is_empty() && (watch.rest.is_some() || !watch.silence.is_too_long(now)) {
            continue;
        }
        watch.raised = alarm.then(|| domain.clone());
        notices.push((alarm, silence.notice(watch, &domain, &last_error)));
    }
    notices
}

fn tell(receiver: &Receiver, hooks: Option<&SyncSender<Environment>>, alarm: bool, notice: &Notice) {
    let Notice { domain, silent, heard_unix, peer } = notice;
    let name = if domain.name.is_empty() { &domain.uuid } else { &domain.name };
    let (word, sentence) = if alarm {
        tracing::error!(domain = %name, "ALARM: {}", silent.sentence);
        ("raised", silent.sentence.clone())
    } else {
        tracing::warn!(domain = %name, "the alarm has ended");
        ("ended", "it is heard again, or not waited for any more".to_owned())
    };
    let entry = Entry::new("Alarm", "receiver", &domain.uuid, Outcome::Noted).because(format!("{word}: {sentence}"));
    receiver.audit.record(entry);
    let Some(hooks) = hooks else { return };
    let environment = vec![
        ("VMDR_ALARM", word.to_owned()),
        ("VMDR_DOMAIN", name.clone()),
        ("VMDR_UUID", domain.uuid.clone()),
        ("VMDR_REASON", sentence),
        ("VMDR_PEER", peer.clone()),
        ("VMDR_SILENT_SECONDS", format!("{:.0}", silent.seconds)),
        ("VMDR_HEARD_UNIX", if *heard_unix == 0 { String::new() } else { heard_unix.to_string() }),
        ("VMDR_POINT", format!("{}-{}", domain.point_generation, domain.position.epoch)),
        ("VMDR_POINT_AGE_SECONDS", format!("{:.0}", age_seconds(domain.cut_unix_ns, unix_ns(SystemTime::now())))),
    ];
    if hooks.try_send(environment).is_err() {
        tracing::error!(domain = %name, "{HOOKS_MAX} alarms wait for the hook already: it is not run for this one");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_make_no_sense_are_named() {
        assert_eq!(AlarmConfig::default().nonsense(), None);
        let off = AlarmConfig { after_seconds: 0, ..AlarmConfig::default() };
        assert_eq!((off.nonsense(), off.bound()), (None, None));
        let with = |after_seconds, hook: &str, hook_timeout_seconds| {
            let hook = vec![hook.to_owned()];
            AlarmConfig { after_seconds, hook, hook_timeout_seconds }.nonsense().unwrap_or_default()
        };
        assert!(with(1, "/x", 5).contains("after_seconds"));
        assert!(with(5, "x", 5).contains("absolute"));
        assert!(with(5, "/x", 0).contains("hook_timeout_seconds"));
    }

    #[test]
    fn who_rests_is_not_waited_for_until_it_sends_again() {
        let watches = Watches::new(&AlarmConfig::default());
        let uuid = Uuid::new_v4();
        assert_eq!(watches.seconds(uuid), None);
        watches.opened(uuid, 1, "a");
        assert!(watches.seconds(uuid).is_some_and(|seconds| seconds < 30.0));
        watches.rests(uuid, "suspended");
        assert_eq!((watches.seconds(uuid), watches.rest(uuid).as_deref()), (None, Some("suspended")));
        let before = watches.token(uuid);
        watches.opened(uuid, 2, "a");
        assert_eq!((watches.seconds(uuid).is_some(), watches.rest(uuid)), (true, None));
        assert_ne!(watches.token(uuid), before);
    }

    #[test]
    fn while_nothing_is_read_silence_is_this_receivers_own() {
        let watches = Watches::new(&AlarmConfig::default());
        let uuid = Uuid::new_v4();
        watches.opened(uuid, 1, "a");
        std::thread::sleep(Duration::from_millis(20));
        watches.not_read(uuid, 0);
        let silent = watches.seconds(uuid).unwrap();
        assert!(silent >= 0.02, "an older stream says nothing: {silent}");
        watches.not_read(uuid, 1);
        assert!(watches.seconds(uuid).unwrap() < silent);
    }
}
