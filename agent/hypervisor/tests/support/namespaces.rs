//! A libvirtd for one test alone.
//!
//! The test's program runs itself again within `unshare`: own mount, network and PID namespace, private /run,
//! /etc/libvirt, /var/lib/libvirt and /var/log/libvirt, where libvirtd and virtlogd are started. When that process ends, for
//! whatever reason, the kernel ends everything in its PID namespace: libvirtd, every QEMU, whatever else was started. It
//! needs root, libvirtd, virtlogd and QEMU with its tools.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the process within the namespaces.
const INSIDE: &str = "VMDR_TEST_INSIDE_NAMESPACES";
/// No wait takes as long, by far.
pub const LIMIT: Duration = Duration::from_secs(60);

const SETUP: &str = r#"
set -eu
mount --make-rprivate /
cp -a /etc/libvirt/. "$D/etc/"; rm -rf "$D"/etc/qemu/*.xml "$D"/etc/qemu/networks/* "$D"/etc/qemu/autostart
mount --bind "$D/lib" /var/lib/libvirt; mount --bind "$D/etc" /etc/libvirt; mount --bind "$D/log" /var/log/libvirt
mkdir -p /var/lib/libvirt/qemu /var/lib/libvirt/images /var/log/libvirt/qemu
chown libvirt-qemu /var/lib/libvirt/qemu
mount --bind "$D/run" /run; mkdir -p /run/libvirt /run/lock
ip link set lo up
virtlogd -d >"$D/virtlogd" 2>&1; libvirtd -d >"$D/libvirtd" 2>&1
# Not exec: this shell is process 1 here, and reaps the QEMUs that libvirtd leaves to it.
"$@" || exit 1
exit 0
"#;

/// Runs `inside` within the namespaces; `test` is the name of the test that calls this.
pub fn run(test: &str, inside: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let directory = tempfile::Builder::new().prefix("vmdr-libvirt-").tempdir().unwrap();
    for name in ["run", "lib", "etc", "log"] {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    // QEMU, another user, must get at its files.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), mode).unwrap();
    let status = Command::new("unshare")
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", SETUP, "setup"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .env("D", directory.path())
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "the test within the namespaces failed: {status}");
}

/// Asks until there is an answer.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(started.elapsed() < LIMIT, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
