//! The Debian package of guest-tools, installed by dpkg into a root directory of its own: what a guest has then, that an upgrade leaves
//! what an operator has set, and that nothing stays after a purge.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program and gives what it printed.
fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new("timeout").args(["-k", "5", "600", program]).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = Root(tempfile::tempdir().unwrap());
        for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "etc/systemd/system"] {
            std::fs::create_dir_all(root.at(directory)).unwrap();
        }
        std::fs::write(root.at("var/lib/dpkg/status"), "").unwrap();
        root
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn dpkg(&self, words: &[&str]) -> String {
        let root = format!("--root={}", self.0.path().display());
        // The root has no shell: scripts run outside of it, with DPKG_ROOT, as when an image is made.
        run("dpkg", &[&[root.as_str(), "--force-script-chrootless", "--force-confold"], words].concat())
    }

    fn has_wants(&self) -> bool {
        self.at("etc/systemd/system/multi-user.target.wants/vmdr-guest-tools.service").symlink_metadata().is_ok()
    }
}

fn files(directory: &Path) -> Vec<String> {
    let mut all: Vec<String> = run("find", &[directory.to_str().unwrap(), "!", "-type", "d", "-printf", "%P\n"])
        .lines()
        .map(str::to_owned)
        .collect();
    all.retain(|path| !path.starts_with("var/lib/dpkg") && !path.starts_with("var/log"));
    all.sort();
    all
}

#[test]
fn guest_tools_are_installed_upgraded_and_purged() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let out = tempfile::tempdir().unwrap();
    let script = workspace.join("scripts/package-guest-tools");
    let made = run(script.to_str().unwrap(), &[out.path().to_str().unwrap()]);
    let made: Vec<&str> = made.lines().collect();
    let [deb, archive] = made[..] else { panic!("{made:?}") };

    let root = Root::new();
    root.dpkg(&["-i", deb]);
    let program = root.at("usr/sbin/vmdr-guest-tools");
    let program = program.to_str().unwrap();
    assert!(!run("readelf", &["-lW", program]).contains("INTERP"), "it needs a loader, and so the guest's C library");
    let version = run(program, &["--version"]);
    assert_eq!(run("dpkg-deb", &["-f", deb, "Version"]).trim(), version.split_whitespace().nth(1).unwrap());
    assert!(root.has_wants(), "it does not start with the guest");
    let unit = root.at("usr/lib/systemd/system/vmdr-guest-tools.service");
    let text = std::fs::read_to_string(&unit).unwrap();
    // The program that the unit names is the one that is there, and takes these words.
    let words = text.lines().find_map(|line| line.strip_prefix("ExecStart=/")).unwrap();
    let (path, words) = words.split_once(' ').unwrap();
    let verb = words.split_whitespace().next().unwrap();
    run(root.at(path).to_str().unwrap(), &[verb, "--help"]);
    let checked = tempfile::tempdir().unwrap();
    let checked = checked.path().join("vmdr-guest-tools.service");
    std::fs::write(&checked, text.replace("/usr/sbin/vmdr-guest-tools", program)).unwrap();
    run("systemd-analyze", &["--man=no", "verify", checked.to_str().unwrap()]);
    // Hooks are run if nobody but root can write there.
    use std::os::unix::fs::MetadataExt;
    let hooks = root.at("etc/vmdr/freeze.d").metadata().unwrap();
    assert_eq!((hooks.uid(), hooks.mode() & 0o7777), (0, 0o755));

    // For other systems the same files.
    let other = tempfile::tempdir().unwrap();
    run("tar", &["-xzf", archive, "-C", other.path().to_str().unwrap()]);
    let here: Vec<String> = files(root.0.path()).into_iter().filter(|path| !path.starts_with("etc/systemd/")).collect();
    assert_eq!(files(other.path()), here);

    // An upgrade leaves what was set: options, and that the service is disabled.
    let options = root.at("etc/default/vmdr-guest-tools");
    std::fs::write(&options, "VMDR_GUEST_TOOLS_OPTIONS=\"--keep-clock\"\n").unwrap();
    let systemctl = format!("--root={}", root.0.path().display());
    run("systemctl", &[&systemctl, "--quiet", "disable", "vmdr-guest-tools.service"]);
    let state = root.at("var/lib/vmdr-guest-tools");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(state.join("network"), "what was there before\n").unwrap();
    root.dpkg(&["-i", deb]);
    assert!(!root.has_wants(), "an upgrade has enabled what was disabled");
    assert!(std::fs::read_to_string(&options).unwrap().contains("--keep-clock"));
    run("systemctl", &[&systemctl, "--quiet", "enable", "vmdr-guest-tools.service"]);

    // What a host has changed in the network can be undone until it is purged.
    root.dpkg(&["-r", "vmdr-guest-tools"]);
    assert!(!unit.exists() && options.exists() && state.join("network").exists());
    root.dpkg(&["-i", deb]);
    assert!(root.has_wants() && unit.exists(), "installed again it does not start with the guest");
    root.dpkg(&["-r", "vmdr-guest-tools"]);
    root.dpkg(&["-P", "vmdr-guest-tools"]);
    assert_eq!(files(root.0.path()), Vec::<String>::new());
    assert!(!state.exists());
}
