//! Failure detection: an alarm where nothing was heard of a protected host for too long.
//!
//! Agents say something each second. What comes in on a domain's newest stream counts ([`Watches::heard`]); a thread looks
//! twice a second whether that is too long ago, by the core that `vmdr-witness` has for it. An alarm is a line in the log and
//! in the audit log, a sentence in `status`, a metric, and a program of the operator's. It ends by itself when the agent is
//! heard again, or there is nothing to wait for any more: the guest was activated here, or its protection was ended or
//! suspended, of which the agent tells ([`Watches::rest`]). Nothing is activated because of it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver as Queue, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tonic::Status;
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_daemon::durable;
use vmdr_plan::{At, Hook, OnFailure, Place};
use vmdr_proto::replication::{RestReply, RestRequest};
use vmdr_witness::{Stance, Standby};

use crate::activate::run::{age_seconds, unix_ns};
use crate::daemon::Receiver;
use crate::recovery::hooks;
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
    standby: Standby,
    /// When it was heard last, wall clock; 0: not since this receiver was started.
    heard_unix_ns: u64,
    peer: String,
    rest: Option<String>,
    raised: bool,
}

/// An alarm that stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Silent {
    /// For how long nothing was heard.
    pub seconds: f64,
    /// All that is known, as a sentence.
    pub sentence: String,
}

/// All domains' agents.
#[derive(Debug)]
pub struct Watches {
    bound: Option<Duration>,
    watches: Mutex<HashMap<Uuid, Watch>>,
}

/// This host's clock that goes on while the host is suspended.
fn clock() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Watches {
    /// Nobody was heard of yet.
    pub fn new(config: &AlarmConfig) -> Self {
        Watches { bound: config.bound(), watches: Mutex::default() }
    }

    fn watches(&self) -> MutexGuard<'_, HashMap<Uuid, Watch>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self, rest: Option<String>) -> Watch {
        let bound = self.bound.unwrap_or(Duration::MAX);
        let standby = Standby::new("", Stance::Disarmed, bound, false, clock());
        Watch { standby, heard_unix_ns: 0, peer: String::new(), rest, raised: false }
    }

    /// One that is stored here: from now on it is waited for.
    fn expect(&self, uuid: Uuid, rest: Option<String>) {
        let fresh = self.fresh(rest);
        self.watches().entry(uuid).or_insert(fresh);
    }

    /// A stream was opened, the `stream`th of the domain, by this peer.
    pub fn opened(&self, uuid: Uuid, stream: u64, peer: &str) {
        let fresh = self.fresh(None);
        let mut watches = self.watches();
        let watch = watches.entry(uuid).or_insert(fresh);
        watch.standby.opened(stream, clock());
        (watch.heard_unix_ns, watch.rest) = (unix_ns(SystemTime::now()), None);
        peer.clone_into(&mut watch.peer);
    }

    /// Something came in on that stream.
    pub fn heard(&self, uuid: Uuid, stream: u64) {
        if let Some(watch) = self.watches().get_mut(&uuid)
            && watch.standby.heard(stream, clock())
        {
            watch.heard_unix_ns = unix_ns(SystemTime::now());
        }
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

    /// A domain is not stored here any more.
    pub fn forget(&self, uuid: Uuid) {
        self.watches().remove(&uuid);
    }

    /// For how long nothing was heard of a domain's agent, in seconds; nothing: it is not waited for.
    pub fn seconds(&self, uuid: Uuid) -> Option<f64> {
        let watches = self.watches();
        let watch = watches.get(&uuid).filter(|watch| watch.rest.is_none())?;
        Some(watch.standby.silence(clock()).as_secs_f64())
    }

    /// The alarm of a domain, if there is one.
    pub fn alarm(&self, domain: &DomainSummary, last_error: &str) -> Option<Silent> {
        let uuid = Uuid::parse_str(&domain.uuid).ok()?;
        let watches = self.watches();
        let watch = watches.get(&uuid).filter(|watch| watch.raised)?;
        Some(self.silent(watch, domain, last_error))
    }

    fn silent(&self, watch: &Watch, domain: &DomainSummary, last_error: &str) -> Silent {
        let silence = watch.standby.silence(clock());
        let now = unix_ns(SystemTime::now());
        let host = if watch.peer.is_empty() { String::new() } else { format!(" on {}", watch.peer) };
        let bound = self.bound.unwrap_or_default().as_secs();
        let mut sentence =
            format!("nothing was heard of the agent{host} for {} s (bound {bound} s)", silence.as_secs());
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
    if path.exists()
        && let Err(error) = durable::remove(&path)
    {
        tracing::warn!(%uuid, %error, "remove the note that its agent rests");
    }
    receiver.silence.opened(uuid, stream, peer);
}

/// An agent says that it will not send, on purpose: kept, so that no restart of this receiver makes an alarm of it.
pub fn rest(receiver: &Receiver, request: &RestRequest) -> Result<RestReply, Status> {
    let uuid = takeover::parse(&request.domain_uuid)?;
    let why: String = request.why.chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect();
    let directory = receiver.domain_directory(uuid);
    if !directory.is_dir() {
        return Ok(RestReply {});
    }
    let text = serde_json::to_vec(&Rest { why: why.clone() }).map_err(|error| Status::internal(error.to_string()))?;
    durable::write(&rest_path(&directory), &text).map_err(|error| Status::internal(error.to_string()))?;
    receiver.silence.rests(uuid, &why);
    tracing::info!(%uuid, why, "the agent rests");
    Ok(RestReply {})
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
    let of = Arc::downgrade(receiver);
    std::thread::Builder::new()
        .name("vmdr-alarm".to_owned())
        .spawn(move || look_for_ever(&of, hooks.as_ref()))
        .map(drop)
}

type Environment = Vec<(&'static str, String)>;

fn run_hooks(hook: &Hook, queue: &Queue<Environment>) {
    while let Ok(environment) = queue.recv() {
        // What it says and how it ends is in the log.
        let _ = hooks::run("alarm", std::slice::from_ref(hook), &environment, &mut |_| {});
    }
}

fn look_for_ever(of: &Weak<Receiver>, hooks: Option<&SyncSender<Environment>>) {
    while let Some(receiver) = of.upgrade() {
        if receiver.is_ending() {
            return;
        }
        look(&receiver, hooks);
        drop(receiver);
        std::thread::sleep(LOOK);
    }
}

/// Raises and ends alarms.
fn look(receiver: &Receiver, hooks: Option<&SyncSender<Environment>>) {
    let now = clock();
    let concerned = receiver.silence.watches().values().any(|watch| watch.raised || watch.standby.alarm(now));
    if !concerned {
        return;
    }
    let domains = receiver.store.domains();
    let mut changed = Vec::new();
    {
        let mut watches = receiver.silence.watches();
        for (uuid, watch) in watches.iter_mut() {
            let id = uuid.to_string();
            let domain = domains.iter().find(|domain| domain.uuid == id);
            // Without a recovery point there is nothing to decide.
            let stands_by = domain.is_some_and(|domain| !domain.frozen && domain.position.epoch > 0);
            let awaited = stands_by && watch.rest.is_none();
            if !awaited {
                watch.standby.wait_from(now);
            }
            let alarm = awaited && watch.standby.alarm(now);
            if alarm != watch.raised
                && let Some(domain) = domain
            {
                changed.push((*uuid, domain.clone(), alarm));
            }
        }
    }
    for (uuid, domain, alarm) in changed {
        // Nobody's: it was imported, or its peer has to be named anew (`vmdr peers grant`).
        if alarm && receiver.store.access(&domain.uuid).is_ok_and(|access| access.owner.is_none()) {
            continue;
        }
        let last_error = receiver.session(uuid, |session| session.last_error.clone());
        let silent = {
            let mut watches = receiver.silence.watches();
            let Some(watch) = watches.get_mut(&uuid) else { continue };
            watch.raised = alarm;
            let heard = watch.heard_unix_ns / 1_000_000_000;
            (receiver.silence.silent(watch, &domain, &last_error), heard, watch.peer.clone())
        };
        tell(receiver, hooks, &domain, alarm, &silent);
    }
}

fn tell(
    receiver: &Receiver,
    hooks: Option<&SyncSender<Environment>>,
    domain: &DomainSummary,
    alarm: bool,
    (silent, heard, peer): &(Silent, u64, String),
) {
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
        ("VMDR_HEARD_UNIX", if *heard == 0 { String::new() } else { heard.to_string() }),
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
        watches.opened(uuid, 2, "a");
        assert_eq!((watches.seconds(uuid).is_some(), watches.rest(uuid)), (true, None));
    }
}
