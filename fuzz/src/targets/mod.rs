//! The targets. Each takes any bytes; a panic, too much memory or too long a time is a finding.

mod codec;
mod control;
mod guest;
mod history;
mod ingest;
mod journal;
mod shim;
mod state;

use std::path::Path;
use std::process::Command;

/// A target.
pub struct Target {
    /// As in `scripts/fuzz NAME`.
    pub name: &'static str,
    /// Takes an input.
    pub run: fn(&[u8]),
    /// The first inputs, made of real files where there are some.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub static ALL: [Target; 8] = [
    Target { name: "journal", run: journal::run, seeds: journal::seeds },
    Target { name: "control", run: control::run, seeds: control::seeds },
    Target { name: "history", run: history::run, seeds: history::seeds },
    Target { name: "state", run: state::run, seeds: state::seeds },
    Target { name: "codec", run: codec::run, seeds: codec::seeds },
    Target { name: "ingest", run: ingest::run, seeds: ingest::seeds },
    Target { name: "guest", run: guest::run, seeds: guest::seeds },
    Target { name: "shim", run: shim::run, seeds: shim::seeds },
];

/// Where the fixtures are: state directories that this and earlier versions have written.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../receiver/fixtures");
/// The domain's directory in each.
const DOMAIN: &str = crate::archive::UUID;

/// Shows the domain's directory of each fixture.
fn with_fixtures(mut show: impl FnMut(&Path)) {
    let entries = std::fs::read_dir(FIXTURES).unwrap_or_else(|e| panic!("{FIXTURES}: {e}"));
    let mut archives: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    archives.retain(|path| path.extension().is_some_and(|extension| extension == "xz"));
    archives.sort();
    assert!(!archives.is_empty(), "there is no fixture in {FIXTURES}");
    for archive in archives {
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("a directory for a fixture: {e}"));
        let mut tar = Command::new("tar");
        let status = tar.arg("-xJf").arg(&archive).arg("-C").arg(dir.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "cannot unpack {}", archive.display());
        show(&dir.path().join(DOMAIN));
    }
}

/// What is in a directory, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if let (Ok(bytes), Ok(name)) = (std::fs::read(entry.path()), entry.file_name().into_string()) {
            files.push((name, bytes));
        }
    }
    files.sort();
    files
}

/// The byte in front that says whether an input is sealed, and the rest. With one more bit for the target.
fn split(bytes: &[u8]) -> Option<(bool, bool, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((first & 1 != 0, first & 2 != 0, rest))
}
