//! The operator's hooks: programs that bring applications to rest before file systems are, and let them go on afterwards.
//!
//! Each executable file of the directory is run with the word `freeze`, in the order of their names, and afterwards with
//! `thaw`, in reverse. One that fails, or takes too long (it is killed then, with what it started), ends the freeze; those that
//! were begun get their `thaw` all the same. Not run is what somebody else than root could have written.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process;

/// Hooks at most.
pub const HOOKS_MAX: usize = 32;
/// How often it is looked whether a hook has ended.
const LOOK: Duration = Duration::from_millis(10);

/// The hooks of a directory, in the order in which they freeze. One that is not there has none.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("list the hooks in {}: {error}", directory.display())),
    };
    let mut hooks = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(data) = fs::metadata(&path) else { continue };
        if !data.is_file() || data.permissions().mode() & 0o111 == 0 {
            continue;
        }
        if data.permissions().mode() & 0o022 != 0 || data.uid() != process::own_uid() {
            return Err(format!("hook {}: others can write it; it has to be root's alone", path.display()));
        }
        hooks.push(path);
        if hooks.len() > HOOKS_MAX {
            return Err(format!("more than {HOOKS_MAX} hooks are in {}", directory.display()));
        }
    }
    hooks.sort();
    Ok(hooks)
}

/// Runs one, for at most `limit`, and no longer than `ended` says no.
pub fn run(hook: &Path, word: &str, limit: Duration, ended: impl Fn() -> bool) -> Result<(), String> {
    let name = hook.file_name().unwrap_or_default().to_string_lossy();
    let begun = Instant::now();
    let mut command = Command::new(hook);
    // A group of its own, so that what it has started can be ended with it.
    command.arg(word).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn().map_err(|error| format!("hook {name} {word}: {error}"))?;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("hook {name} {word} ended with {status}")),
            Ok(None) => {}
            Err(error) => return Err(format!("hook {name} {word}: {error}")),
        }
        let over = begun.elapsed() >= limit;
        if over || ended() {
            process::kill_group(child.id());
            let _ = child.wait();
            let why = if over { format!("took more than {limit:?}") } else { "was ended".to_owned() };
            return Err(format!("hook {name} {word} {why}"));
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(directory: &Path, name: &str, mode: u32, text: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn hooks_are_what_is_executable_in_the_order_of_names() {
        let directory = tempfile::tempdir().unwrap();
        assert!(list(&directory.path().join("none")).unwrap().is_empty());
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("README", 0o644)] {
            hook(directory.path(), name, mode, "");
        }
        let names = |hooks: &[PathBuf]| hooks.iter().map(|h| h.file_name().unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&list(directory.path()).unwrap()), ["10-a", "20-b"]);
        hook(directory.path(), "30-c", 0o777, "");
        assert!(list(directory.path()).unwrap_err().contains("others can write it"));
    }

    #[test]
    fn a_hook_that_fails_or_hangs_or_is_ended_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(20);
        let good = hook(directory.path(), "good", 0o755, r#"[ "$1" = freeze ]"#);
        run(&good, "freeze", limit, || false).unwrap();
        assert!(run(&good, "thaw", limit, || false).unwrap_err().contains("hook good thaw ended with"));
        let slow = hook(directory.path(), "slow", 0o755, "sleep 600 & wait");
        let error = run(&slow, "freeze", Duration::from_millis(50), || false).unwrap_err();
        assert!(error.contains("took more than"), "{error}");
        assert!(run(&slow, "freeze", limit, || true).unwrap_err().contains("was ended"));
        assert!(run(&directory.path().join("none"), "freeze", limit, || false).is_err());
    }
}
