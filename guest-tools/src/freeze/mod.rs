//! A process that brings this guest's file systems to rest for a moment, and sees to it that they are used again.
//!
//! The daemon starts one for each freeze, and says "thaw" over a pipe. It is a process of its own so that each of the two
//! makes up for the other: when the daemon dies, the pipe ends, and this one thaws at once; when this one dies, the daemon
//! thaws what it had said it would freeze. Nothing else is needed for a thaw: not the host, not the channel, no file. In any
//! case it thaws when its time is over, also while freezing a further file system hangs ([`systems`]). (Not survived is
//! SIGKILL for both at once, in the middle of it: the next daemon thaws then, by a note in /run.)
//!
//! ```text
//!  hooks "freeze" --> write out --> note, freeze the innermost first --> "frozen" ... "thaw", pipe ended, time over
//!       | fails           | fails                | fails                                        |
//!       v                 v                      v                                              v
//!  hooks "thaw" <----------------- thaw in reverse, "failed"             thaw in reverse, "thawed"; hooks "thaw"; "ended"
//! ```
//! From the first freeze to the last thaw nothing is written to any file, nor to a log.

pub mod hooks;
pub mod plan;
pub mod process;
pub mod systems;
pub mod wire;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::plan::Target;
use self::process::Linux;
use self::systems::{Froze, Kernel, Systems};
use self::wire::Said;
use crate::cli::Freeze;

/// Names that are told of what could not be frozen, at most.
const NAMED_MAX: usize = 8;
/// Where it stands what is being frozen, for a daemon that is started after everything was killed. Not on a disk.
const NOTE: &str = "/run/vmdr-guest-tools.freezing";

enum Event {
    /// From here on its time counts.
    Begun,
    /// All is frozen: how many, and what was skipped.
    Done(Result<(usize, Vec<String>), String>),
    /// The daemon says so.
    Asked,
    /// The daemon is gone.
    Gone,
}

struct Work {
    options: Freeze,
    systems: Systems<Linux>,
    /// Hooks that were begun: they get their thaw.
    begun: Mutex<Vec<PathBuf>>,
}

/// Runs one freeze to its end.
pub fn run(options: Freeze) -> Result<()> {
    process::outlive_signals();
    let hold = Duration::from_millis(options.hold_ms.into());
    let hold_ms = options.hold_ms;
    let work = Arc::new(Work { options, systems: Systems::new(Linux), begun: Mutex::default() });
    let (events, received) = mpsc::channel();
    let (own, of) = (events.clone(), Arc::clone(&work));
    let freezing = std::thread::Builder::new().name("freeze".to_owned()).spawn(move || {
        let done = of.freeze(&own);
        let _ = own.send(Event::Done(done));
    });
    let freezing = freezing.context("start a thread")?;
    std::thread::Builder::new().name("daemon".to_owned()).spawn(move || listen(&events)).context("start a thread")?;

    let mut until: Option<Instant> = None;
    let (mut whole, mut over) = (false, false);
    loop {
        // Before anything is frozen, hooks have limits of their own.
        let wait =
            until.map_or(hold.max(Duration::from_secs(1)), |until| until.saturating_duration_since(Instant::now()));
        match received.recv_timeout(wait) {
            Ok(Event::Begun) => until = Some(Instant::now() + hold),
            Ok(Event::Done(Ok((file_systems, skipped)))) => {
                whole = true;
                let text = described(&skipped);
                wire::say(&Said::Frozen { file_systems, skipped: skipped.len(), hold_ms, text });
            }
            Ok(Event::Done(Err(why))) => {
                work.systems.thaw();
                unnote();
                wire::say(&Said::Failed(why));
                over = true;
                break;
            }
            Err(RecvTimeoutError::Timeout) if until.is_none() => {}
            ended => {
                let thawed = work.systems.thaw();
                let asked = matches!(ended, Ok(Event::Asked));
                if whole {
                    let text = if asked { String::new() } else { early(&ended, hold_ms) };
                    wire::say(&Said::Thawed { held: asked && thawed.held, frozen_ms: thawed.frozen_ms, text });
                } else {
                    wire::say(&Said::Failed("it was ended before all was frozen".to_owned()));
                }
                break;
            }
        }
    }
    // What is being frozen now is thawed by the thread that does it: this process must not end before.
    let _ = freezing.join();
    if !over {
        unnote();
    }
    // Only now: a hook must not be without limits in the middle of it.
    let begun = std::mem::take(&mut *work.begun.lock().unwrap_or_else(PoisonError::into_inner));
    let failed: Vec<String> =
        begun.iter().rev().filter_map(|hook| hooks::run(hook, "thaw", work.limit(), || false).err()).collect();
    wire::say(&Said::Ended(failed.join("; ")));
    Ok(())
}

fn early(ended: &Result<Event, RecvTimeoutError>, hold_ms: u32) -> String {
    match ended {
        Ok(_) => "the tools' daemon was gone, or the host".to_owned(),
        Err(_) => format!("the time of {hold_ms} ms was over"),
    }
}

/// Hears what the daemon says.
fn listen(events: &Sender<Event>) {
    let mut word = [0; 16];
    // Anything that comes is "thaw"; the end of the pipe is the end of the daemon.
    let event = match std::io::stdin().read(&mut word) {
        Ok(1..) => Event::Asked,
        _ => Event::Gone,
    };
    let _ = events.send(event);
}

fn described(skipped: &[String]) -> String {
    let more = skipped.len().saturating_sub(NAMED_MAX);
    let mut text = skipped[..skipped.len() - more].join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    if text.is_empty() { text } else { format!("not frozen, they cannot be: {text}") }
}

impl Work {
    fn limit(&self) -> Duration {
        Duration::from_secs(self.options.hook_seconds.into())
    }

    fn freeze(&self, events: &Sender<Event>) -> Result<(usize, Vec<String>), String> {
        let ended = || self.systems.ended();
        let hooks = hooks::list(&self.options.hooks)?;
        for hook in &hooks {
            self.begun.lock().unwrap_or_else(PoisonError::into_inner).push(hook.clone());
            hooks::run(hook, "freeze", self.limit(), ended)?;
        }
        let targets = mounted()?;
        if targets.is_empty() && hooks.is_empty() {
            return Err("nothing can be frozen: there is no file system over a block device, and no hook".to_owned());
        }
        let mut opened = Vec::new();
        for target in &targets {
            opened.push((target, open(target)?));
        }
        // Most is written out while everybody can still write, so that little is left for the freeze itself.
        for (target, (file, point)) in &opened {
            if ended() {
                return Err("it was ended".to_owned());
            }
            process::sync(file).map_err(|e| format!("write out {} ({}): {e}", point.display(), target.kind))?;
        }
        note(&opened.iter().map(|(_, (_, point))| point.as_path()).collect::<Vec<_>>());
        for (_, (_, point)) in &opened {
            wire::say(&Said::Freezing(point.clone()));
        }
        let _ = events.send(Event::Begun);
        let mut skipped = Vec::new();
        let mut frozen = 0;
        for (target, (file, point)) in opened {
            let named = || format!("{} ({})", point.display(), target.kind);
            match self.systems.freeze(file) {
                Ok(Froze::Done) => frozen += 1,
                Ok(Froze::Skipped) => skipped.push(named()),
                Ok(Froze::Ended) => return Err("it was ended".to_owned()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(format!("{} is frozen already, by somebody else", named()));
                }
                Err(error) => return Err(format!("freeze {}: {error}", named())),
            }
        }
        if frozen == 0 && hooks.is_empty() {
            return Err(format!("nothing can be frozen: {}", described(&skipped)));
        }
        // All of it took a while.
        let known = |target: &Target| targets.iter().any(|known| known.device == target.device);
        if let Some(new) = mounted()?.into_iter().find(|target| !known(target)) {
            let points: Vec<String> = new.mount_points.iter().map(|point| point.display().to_string()).collect();
            return Err(format!("{} ({}) was mounted meanwhile", points.join(", "), new.kind));
        }
        Ok((frozen, skipped))
    }
}

/// What is to be frozen, in order.
fn mounted() -> Result<Vec<Target>, String> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("list what is mounted: {e}"))?;
    plan::plan(&mountinfo, loop_file)
}

/// The file behind a loop device.
fn loop_file(device: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/sys/dev/block/{device}/loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// Opens a file system at a place where nothing else hides it.
fn open(target: &Target) -> Result<(File, PathBuf), String> {
    for point in &target.mount_points {
        // Mounted may also be a file, and a FIFO must not be waited for.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(point);
        let Ok(file) = file else { continue };
        let Ok(data) = file.metadata() else { continue };
        let device = format!("{}:{}", libc::major(data.dev()), libc::minor(data.dev()));
        if device == target.device || target.device.starts_with("0:") {
            return Ok((file, point.clone()));
        }
    }
    let points: Vec<String> = target.mount_points.iter().map(|point| point.display().to_string()).collect();
    Err(format!("file system {} ({}) cannot be reached at {}", target.device, target.kind, points.join(", ")))
}

fn note(points: &[&Path]) {
    let text: Vec<String> = points.iter().map(|point| format!("{}\n", wire::escape(point))).collect();
    // Without /run there is none: it is for the case that both processes are killed.
    let _ = fs::write(NOTE, text.concat());
}

fn unnote() {
    let _ = fs::remove_file(NOTE);
}

/// Thaws what predecessors have left frozen that were killed in the middle of it.
pub fn thaw_what_was_left() {
    let Ok(text) = fs::read_to_string(NOTE) else { return };
    let points: Vec<PathBuf> = text.lines().map(wire::unescape).collect();
    thaw(&points);
    unnote();
}

/// Thaws these as far as they are frozen, the last first.
pub fn thaw(points: &[PathBuf]) {
    for point in points.iter().rev() {
        if let Ok(file) = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(point) {
            let _ = Linux.thaw(&file);
        }
    }
}
