//! Lock managers: virtlockd and sanlock.
//!
//! libvirt releases a domain's leases when it sees QEMU stop, and does not take them back on a resume that it did not
//! issue itself. A cut is such a stop, so that the disks of a domain under a lock manager would be unlocked after the
//! first epoch. Such domains are refused.

use std::path::Path;

use super::Finding;

/// Where the QEMU driver of libvirt is told which lock manager to use.
pub const QEMU_CONF: &str = "/etc/libvirt/qemu.conf";
/// Processes of lock managers.
const DAEMONS: [&str; 2] = ["virtlockd", "sanlock"];
/// Processes looked at; there never are more than the kernel's largest pid_max.
const PROCESSES_MAX: usize = 4 << 20;

/// The lock manager that a qemu.conf asks for; `None`: none.
pub fn configured(conf: &str) -> Option<String> {
    let mut found = None;
    for line in conf.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let Some((key, value)) = line.split_once('=') else { continue };
        if key.trim() == "lock_manager" {
            let value = value.trim().trim_matches(['"', '\'']).to_owned();
            found = Some(value);
        }
    }
    found.filter(|name| !name.is_empty() && name != "nop")
}

/// Which lock managers run on this host.
pub fn running(proc: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(proc) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.take(PROCESSES_MAX).flatten() {
        // A process may end while its entry is looked at.
        let Ok(name) = std::fs::read_to_string(entry.path().join("comm")) else { continue };
        let name = name.trim();
        if DAEMONS.contains(&name) && !found.iter().any(|f| f == name) {
            found.push(name.to_owned());
        }
    }
    found
}

/// What follows from both.
pub fn findings(configured: Option<&str>, running: &[String]) -> Vec<Finding> {
    if let Some(manager) = configured {
        return vec![Finding::refused(
            "lock manager",
            format!("{QEMU_CONF} says lock_manager = {manager:?}: libvirt gives the disks' leases up at every pause"),
            "remove lock_manager from qemu.conf, restart libvirtd, and start the domain anew",
        )];
    }
    let warning = |name: &String| {
        Finding::warning(
            "lock manager",
            format!("{name} is running, although qemu.conf sets no lock_manager"),
            "if domains were started under a lock manager, start them anew",
        )
    };
    if running.is_empty() {
        return vec![Finding::ok("lock manager", "none")];
    }
    running.iter().map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn qemu_conf() {
        for (conf, wanted) in [
            ("", None),
            ("#lock_manager = \"lockd\"\n", None),
            ("lock_manager = \"nop\"", None),
            ("user = \"root\"\n  lock_manager = \"sanlock\" # why\n", Some("sanlock")),
            ("lock_manager='lockd'", Some("lockd")),
            ("lock_manager_x = \"lockd\"", None),
        ] {
            assert_eq!(configured(conf).as_deref(), wanted, "{conf:?}");
        }
    }

    #[test]
    fn processes() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, name) in [("1", "init"), ("77", "virtlockd"), ("78", "virtlockd"), ("sys", "")] {
            std::fs::create_dir(proc.path().join(pid)).unwrap();
            std::fs::write(proc.path().join(pid).join("comm"), format!("{name}\n")).unwrap();
        }
        assert_eq!(running(proc.path()), ["virtlockd"]);
        assert_eq!(findings(None, &running(proc.path()))[0].severity, Severity::Warning);
        assert_eq!(findings(Some("lockd"), &[])[0].severity, Severity::Refused);
        assert_eq!(findings(None, &[])[0].severity, Severity::Ok);
    }
}
