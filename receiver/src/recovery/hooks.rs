//! Programs that a recovery plan has run before and after an activation.
//!
//! A hook gets nothing on its stdin, an environment of its own (`docs/plan.md`), a process group of its own and a time limit, at
//! which all of the group is killed. Of what it says the last lines are kept.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmdr_plan::{Hook, OnFailure};
use vmdr_proto::control::HookRun;

/// Where hooks find programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of what a hook says so much is kept, from the end.
const SAID_BYTES_MAX: usize = 4096;
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(10);
/// How long one that was killed is waited for.
const KILLED: Duration = Duration::from_secs(2);
/// How long its last words are waited for once it has ended: whoever it left behind may hold the pipe open.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Runs hooks one after another. The sentence is what a hook has failed with that is to end the activation; those behind it are
/// not run.
pub fn run(
    stage: &str,
    hooks: &[Hook],
    environment: &[(&'static str, String)],
    progress: &mut dyn FnMut(&str),
) -> (Vec<HookRun>, Option<String>) {
    let mut ran = Vec::new();
    for hook in hooks {
        let command = hook.argv.value.join(" ");
        progress(&format!("run {command}"));
        let begun = Instant::now();
        let error = run_one(stage, hook, environment).err().unwrap_or_default();
        let seconds = begun.elapsed().as_secs_f64();
        if error.is_empty() {
            tracing::info!(stage, command, seconds, "hook");
        } else {
            tracing::warn!(stage, command, seconds, "hook: {error}");
        }
        let failed = (!error.is_empty() && hook.on_failure == OnFailure::Abort)
            .then(|| format!("the hook {command} ({stage}) failed: {error}"));
        ran.push(HookRun { stage: stage.to_owned(), command, seconds, error });
        if failed.is_some() {
            return (ran, failed);
        }
    }
    (ran, None)
}

/// Runs one; the error is a sentence.
pub fn run_one(stage: &str, hook: &Hook, environment: &[(&'static str, String)]) -> Result<(), String> {
    let Some((program, arguments)) = hook.argv.value.split_first() else {
        return Err("it names no program".to_owned());
    };
    let (reader, writer) = io::pipe().map_err(|error| format!("make a pipe for it: {error}"))?;
    let both = writer.try_clone().map_err(|error| format!("make a pipe for it: {error}"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("VMDR_STAGE", stage)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(both)
        .stderr(writer)
        .process_group(0);
    let limit = Duration::from_secs(hook.timeout_seconds);
    let end_by = Instant::now() + limit;
    // The command goes with the closure, and with it the writing ends that are not the program's.
    let mut child = start(limit, move || command.spawn())?;
    let said = listen(reader);
    let ended = wait(&mut child, end_by, limit);
    if ended.is_err() {
        end(&mut child);
    }
    let words = said.wait();
    let words = if words.is_empty() { String::new() } else { format!("; it said: {words}") };
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("it ended with {status}{words}")),
        Err(why) => Err(format!("{why}{words}")),
    }
}

/// Starts a program on a thread of its own: one that lies on a file system that hangs holds up that thread and nobody else, and is
/// killed if it comes to run after all.
fn start(limit: Duration, spawn: impl FnOnce() -> io::Result<Child> + Send + 'static) -> Result<Child, String> {
    // Without a buffer: a child that nobody takes comes back to the thread.
    let (give, take) = sync_channel(0);
    let thread = std::thread::Builder::new().name("vmdr-hook-start".to_owned()).spawn(move || {
        if let Err(late) = give.send(spawn())
            && let Ok(mut child) = late.0
        {
            end(&mut child);
        }
    });
    thread.map_err(|error| format!("start a thread for it: {error}"))?;
    match take.recv_timeout(limit) {
        Ok(started) => started.map_err(|error| format!("start it: {error}")),
        Err(_) => Err(format!("it could not be started within {} s: its file system does not answer", limit.as_secs())),
    }
}

fn wait(child: &mut Child, end: Instant, limit: Duration) -> Result<std::process::ExitStatus, String> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() >= end => {
                return Err(format!("it took more than {} s and was killed", limit.as_secs()));
            }
            Ok(None) => std::thread::sleep(LOOK),
            Err(error) => return Err(format!("wait for it: {error}")),
        }
    }
}

/// Its whole process group.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended just now.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    // One that hangs in the kernel ends when that lets it go: nobody waits for it.
    let end = Instant::now() + KILLED;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        std::thread::sleep(LOOK);
    }
}

/// What it says, as far as it is kept.
struct Said {
    tail: Arc<Mutex<Vec<u8>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn listen(mut reader: io::PipeReader) -> Said {
    let tail = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&tail);
    let thread = std::thread::Builder::new().name("vmdr-hook".to_owned()).spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            let mut tail = to.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend_from_slice(&buffer[..count]);
            let surplus = tail.len().saturating_sub(SAID_BYTES_MAX);
            tail.drain(..surplus);
        }
    });
    Said { tail, thread: thread.ok() }
}

impl Said {
    /// In one line.
    fn wait(self) -> String {
        let end = Instant::now() + LAST_WORDS;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&tail);
        let words: Vec<&str> = words.split_whitespace().collect();
        words.join(" ").chars().filter(|c| !c.is_control()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_plan::{At, Place};

    fn hook(script: &str, timeout_seconds: u64, on_failure: OnFailure) -> Hook {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        Hook { argv: At { value: argv, place: Place::default() }, timeout_seconds, on_failure }
    }

    fn run_all(hooks: &[Hook]) -> (Vec<HookRun>, Option<String>) {
        run("before", hooks, &[("VMDR_DOMAIN", "web 1".to_owned())], &mut |_| {})
    }

    #[test]
    fn a_hook_has_its_environment_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("seen");
        let script = format!("{{ env; pwd; cat; }} | sort > {}", file.display());
        let (ran, failed) = run_all(&[hook(&script, 20, OnFailure::Abort)]);
        assert_eq!((ran[0].error.as_str(), failed), ("", None));
        let seen = std::fs::read_to_string(file).unwrap();
        let mut names: Vec<&str> = seen.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        // The shell's own.
        names.retain(|name| !["PWD", "_", "SHLVL", "OLDPWD"].contains(name));
        assert_eq!(names, ["PATH", "VMDR_DOMAIN", "VMDR_STAGE"], "{seen}");
        assert!(seen.contains("VMDR_DOMAIN=web 1") && seen.contains("VMDR_STAGE=before"), "{seen}");
    }

    #[test]
    fn a_failure_follows_its_policy() {
        let warn = hook("echo no such network; exit 3", 20, OnFailure::Warn);
        let abort = hook("exit 4", 20, OnFailure::Abort);
        let (ran, failed) = run_all(&[warn, abort, hook("true", 20, OnFailure::Abort)]);
        assert_eq!(ran.len(), 2, "what is behind the one that ends it is not run: {ran:?}");
        assert!(ran[0].error.contains("exit status: 3; it said: no such network"), "{ran:?}");
        assert!(failed.is_some_and(|failed| failed.contains("exit status: 4")));
    }

    #[test]
    fn one_that_hangs_is_killed_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; echo waiting; wait", file.display());
        let begun = Instant::now();
        let (ran, failed) = run_all(&[hook(&script, 1, OnFailure::Abort)]);
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert!(ran[0].error.contains("more than 1 s") && ran[0].error.contains("waiting"), "{ran:?}");
        assert!(failed.is_some());
        let pid = std::fs::read_to_string(file).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }

    #[test]
    fn one_that_cannot_be_started_in_time_is_given_up_and_never_runs_on() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("echo $$ > {}; exec sleep 600", file.display());
        let begun = Instant::now();
        let said = start(Duration::from_secs(1), move || {
            std::thread::sleep(Duration::from_secs(2));
            Command::new("/bin/sh").arg("-c").arg(script).process_group(0).spawn()
        });
        assert!(said.is_err_and(|said| said.contains("file system does not answer")));
        assert!(begun.elapsed() < Duration::from_secs(60));
        let ran = |pid: &str| {
            std::fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).is_ok_and(|c| c.contains("600"))
        };
        let until = Instant::now() + Duration::from_secs(10);
        let mut pid = String::new();
        // It is killed at once, perhaps before it could say who it was.
        while Instant::now() < until && (begun.elapsed() < Duration::from_secs(4) || ran(&pid)) {
            pid = std::fs::read_to_string(&file).unwrap_or_default();
            std::thread::sleep(LOOK);
        }
        assert!(!ran(&pid), "{pid}");
    }

    #[test]
    fn what_is_left_behind_and_much_talk_do_no_harm() {
        let begun = Instant::now();
        let (ran, _) = run_all(&[hook("sleep 30 & yes | head -c 1000000; echo the end; exit 1", 25, OnFailure::Warn)]);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        assert!(ran[0].error.ends_with("the end") && ran[0].error.len() < SAID_BYTES_MAX + 100, "{}", ran[0].error);
        let missing = Hook {
            argv: At { value: vec!["/no/such".to_owned()], place: Place::default() },
            ..hook("", 1, OnFailure::Warn)
        };
        assert!(run_all(&[missing]).0[0].error.contains("start it: No such file"));
    }
}
