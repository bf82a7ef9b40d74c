//! A disk that neither writes nor fails: a frozen file system. As root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vmdr_audit::{Audit, Entry, Outcome, RECORD_TIME_MAX, verify};

/// An ext4 file system of its own on a loop device, thawed, unmounted and gone at the end.
struct Disk {
    directory: tempfile::TempDir,
}

fn run(program: &str, words: &[&Path]) {
    let output = Command::new(program).args(words).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    fn new() -> Self {
        let disk = Disk { directory: tempfile::tempdir().unwrap() };
        let image = disk.directory.path().join("image");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(disk.mounted()).unwrap();
        run("mkfs.ext4", &[Path::new("-q"), &image]);
        run("mount", &[Path::new("-o"), Path::new("loop"), &image, &disk.mounted()]);
        disk
    }

    fn mounted(&self) -> PathBuf {
        self.directory.path().join("mounted")
    }

    fn freeze(&self) {
        run("fsfreeze", &[Path::new("--freeze"), &self.mounted()]);
    }

    fn thaw(&self) {
        run("fsfreeze", &[Path::new("--unfreeze"), &self.mounted()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(self.mounted()).output();
        let _ = Command::new("umount").arg("--lazy").arg(self.mounted()).output();
    }
}

fn entry(subject: &str) -> Entry {
    Entry::new("Activate", "uid 0", subject, Outcome::Done)
}

#[test]
fn a_disk_that_hangs_holds_up_one_act_for_a_moment_and_loses_none() {
    let disk = Disk::new();
    let directory = disk.mounted().join("audit");
    let audit = Audit::open(&directory, "receiver").unwrap();
    audit.record(entry("before"));
    assert_eq!((audit.trouble(), audit.sequence()), (None, 1));
    disk.freeze();
    let begun = Instant::now();
    audit.record(entry("first"));
    assert!(begun.elapsed() >= RECORD_TIME_MAX, "it was not waited for");
    assert!(audit.trouble().unwrap().contains("does not answer"));
    // From here on nobody waits: were it otherwise, these would take more than twenty minutes.
    let begun = Instant::now();
    (0..300).for_each(|_| audit.record(entry("more")));
    assert!(begun.elapsed() < RECORD_TIME_MAX * 4);
    disk.thaw();
    // Until the disk has answered, and it is known.
    let begun = Instant::now();
    while audit.trouble().is_some() || audit.sequence() < 250 {
        assert!(begun.elapsed().as_secs() < 60, "{:?} {}", audit.trouble(), audit.sequence());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    audit.record(entry("after"));
    assert_eq!(audit.trouble(), None);
    drop(audit);
    let verdict = verify(&directory, "receiver").unwrap();
    assert_eq!(verdict.fault, None);
    let mut text = String::new();
    for file in fs::read_dir(&directory).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|end| end == "jsonl") {
            text += &fs::read_to_string(path).unwrap();
        }
    }
    let count = |what: &str| text.matches(&format!("\"subject\":\"{what}\"")).count();
    assert_eq!((count("before"), count("first"), count("after")), (1, 1, 1), "{text}");
    // What found no place in memory is said by number.
    let lost = 300 - count("more");
    assert!(lost > 0 && text.contains(&format!("{lost} records could not be written")), "{lost}: {text}");
}
