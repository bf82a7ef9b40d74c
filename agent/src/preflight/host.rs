//! Whether this host can protect guests.

use std::fs;
use std::path::Path;

use vmdr_hypervisor::Error;
use vmdr_hypervisor::libvirt::Connection;

use super::kernel_probe::{Memory, dirty_log};
use super::{Finding, confinement, locks};

/// The oldest QEMU that will do: from 8.0 it says where guest memory is, from 8.2 whether a mirror is synced.
pub const QEMU_MIN: (u32, u32) = (8, 2);
/// CAP_SYS_PTRACE (capabilities(7)).
const CAP_SYS_PTRACE: u32 = 19;

/// What was found out about this host without libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// As `uname -r` has it.
    pub kernel_release: String,
    /// Whether the dirty log works on anonymous memory, or where it fails.
    pub dirty_log: Result<(), String>,
    /// The same on shared memory.
    pub dirty_log_shared: Result<(), String>,
    /// Whether this process may trace any other: its effective capabilities have CAP_SYS_PTRACE.
    pub may_trace: bool,
    /// Yama's `ptrace_scope`; `None`: there is no Yama.
    pub ptrace_scope: Option<u32>,
    /// KVM's API version, or why there is no KVM.
    pub kvm: Result<i32, String>,
    /// Memory that could be had without swapping, in bytes.
    pub memory_available_bytes: u64,
    /// The kernel can move a guest's packets itself (`/dev/vhost-net`).
    pub vhost_net: bool,
    /// The lock manager of libvirt's QEMU driver.
    pub lock_manager: Option<String>,
    /// Lock managers that run.
    pub lock_daemons: Vec<String>,
    /// AppArmor is told what vmdr needs ([`confinement::rules`]).
    pub apparmor_rules: bool,
}

impl HostFacts {
    /// Finds them out. Nothing outside of this process is changed.
    pub fn gather() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        HostFacts {
            kernel_release: read("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            dirty_log: dirty_log(Memory::Anonymous),
            dirty_log_shared: dirty_log(Memory::Shared),
            may_trace: read("/proc/self/status").is_some_and(|s| has_capability(&s, CAP_SYS_PTRACE)),
            ptrace_scope: read("/proc/sys/kernel/yama/ptrace_scope").and_then(|s| s.trim().parse().ok()),
            kvm: kvm(),
            memory_available_bytes: read("/proc/meminfo").and_then(|s| memory_available(&s)).unwrap_or(0),
            vhost_net: Path::new("/dev/vhost-net").exists(),
            lock_manager: read(locks::QEMU_CONF).and_then(|s| locks::configured(&s)),
            lock_daemons: locks::running(Path::new("/proc")),
            apparmor_rules: confinement::rules_present(Path::new(confinement::LOCAL_RULES)),
        }
    }
}

/// The host's findings. `connection`: the one to its libvirt, or why there is none. `arena_bytes`: memory that each
/// protected domain takes for checkpoints.
pub fn findings(facts: &HostFacts, connection: Result<&Connection, &Error>, arena_bytes: u64) -> Vec<Finding> {
    let mut findings = local(facts, arena_bytes);
    match connection {
        Ok(connection) => findings.extend(libvirt(connection)),
        Err(e) => findings.push(Finding::refused(
            "libvirt",
            e.to_string(),
            "start libvirtd (or virtqemud) and run vmdr-agent as root",
        )),
    }
    findings
}

/// What follows from the facts alone.
fn local(facts: &HostFacts, arena_bytes: u64) -> Vec<Finding> {
    let kernel = format!("kernel {}", facts.kernel_release);
    let mut findings = Vec::new();
    match (&facts.dirty_log, &facts.dirty_log_shared) {
        (Ok(()), Ok(())) => findings.push(Finding::ok(
            kernel,
            "reports written pages: PAGEMAP_SCAN and asynchronous write protection work, tried on memory of our own",
        )),
        (Err(e), _) => findings.push(Finding::refused(
            kernel,
            format!("cannot report written pages ({e})"),
            "boot a kernel >= 6.7 with CONFIG_USERFAULTFD and CONFIG_PROC_PAGE_MONITOR (Debian 13's, or Debian 12's \
             from backports)",
        )),
        (Ok(()), Err(e)) => findings.push(Finding::warning(
            kernel,
            format!("reports written pages of anonymous memory, but not of shared memory ({e})"),
            "protect domains without shared <memoryBacking> only, or boot another kernel",
        )),
    }
    findings.push(match (facts.may_trace, facts.ptrace_scope) {
        (_, Some(3)) => Finding::refused(
            "permission to trace QEMU",
            "kernel.yama.ptrace_scope is 3: nobody may trace any process until the next boot",
            "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and boot",
        ),
        (false, _) => Finding::refused(
            "permission to trace QEMU",
            "this process does not have CAP_SYS_PTRACE",
            "run vmdr-agent as root, with CAP_SYS_PTRACE in its unit's capability bounding set",
        ),
        (true, scope) => Finding::ok(
            "permission to trace QEMU",
            match scope {
                Some(scope) => format!("CAP_SYS_PTRACE; kernel.yama.ptrace_scope is {scope}"),
                None => "CAP_SYS_PTRACE; no Yama".to_owned(),
            },
        ),
    });
    findings.push(match &facts.kvm {
        Ok(version) => Finding::ok("/dev/kvm", format!("opens, API version {version}")),
        Err(e) => Finding::warning(
            "/dev/kvm",
            format!("cannot be used ({e}): domains of type kvm do not run here"),
            "load kvm_intel or kvm_amd; domains of type qemu (TCG) can be protected without",
        ),
    });
    findings.push(if facts.memory_available_bytes < arena_bytes {
        Finding::refused(
            "memory",
            format!(
                "{} available, but a protected domain takes {} for checkpoints",
                mib(facts.memory_available_bytes),
                mib(arena_bytes)
            ),
            "free memory, or lower the arena in /etc/vmdr/agent.toml",
        )
    } else {
        Finding::ok("memory", format!("{} available, {} a domain", mib(facts.memory_available_bytes), mib(arena_bytes)))
    });
    findings.extend(locks::findings(facts.lock_manager.as_deref(), &facts.lock_daemons));
    findings
}

fn libvirt(connection: &Connection) -> Vec<Finding> {
    let mut findings = Vec::new();
    match connection.libvirt_version() {
        Ok(version) => findings.push(Finding::ok("libvirt", format!("{version} at {}", connection.uri()))),
        Err(e) => findings.push(Finding::refused("libvirt", e.to_string(), "restart libvirtd")),
    }
    findings.push(match connection.qemu_version() {
        Ok(version) if (version.major, version.minor) < QEMU_MIN => Finding::refused(
            "QEMU",
            format!(
                "libvirt starts QEMU {version}, which does not say where guest memory is or whether a mirror is synced"
            ),
            "install QEMU >= 8.2 (on Debian 12 from bookworm-backports)",
        ),
        Ok(version) => Finding::ok("QEMU", format!("libvirt starts version {version}")),
        Err(e) => Finding::refused("QEMU", e.to_string(), "install qemu-system-x86 and restart libvirtd"),
    });
    findings
}

fn kvm() -> Result<i32, String> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|e| e.to_string())?;
    // The API is stable since version 12; a larger one is another API.
    match kvm.get_api_version() {
        12 => Ok(12),
        other => Err(format!("its API version is {other}, not 12")),
    }
}

fn has_capability(status: &str, capability: u32) -> bool {
    let Some(line) = status.lines().find_map(|l| l.strip_prefix("CapEff:")) else { return false };
    u64::from_str_radix(line.trim(), 16).is_ok_and(|set| set >> capability & 1 == 1)
}

fn memory_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes, for people.
pub(super) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::super::{Severity, refusals};
    use super::*;

    fn good() -> HostFacts {
        HostFacts {
            kernel_release: "6.12.0".into(),
            dirty_log: Ok(()),
            dirty_log_shared: Ok(()),
            may_trace: true,
            ptrace_scope: Some(1),
            kvm: Ok(12),
            memory_available_bytes: 1 << 30,
            vhost_net: true,
            lock_manager: None,
            lock_daemons: vec![],
            apparmor_rules: false,
        }
    }

    fn refused(change: impl FnOnce(&mut HostFacts)) -> Vec<String> {
        let mut facts = good();
        change(&mut facts);
        let findings = local(&facts, 256 << 20);
        assert!(refusals(&findings).all(|f| !f.remedy.is_empty()));
        refusals(&findings).map(|f| f.subject.clone()).collect()
    }

    #[test]
    fn each_fact_refuses() {
        assert!(refused(|_| ()).is_empty());
        assert_eq!(refused(|f| f.dirty_log = Err("userfaultfd: ENOSYS".into())), ["kernel 6.12.0"]);
        assert_eq!(refused(|f| f.may_trace = false), ["permission to trace QEMU"]);
        assert_eq!(refused(|f| f.ptrace_scope = Some(3)), ["permission to trace QEMU"]);
        assert_eq!(refused(|f| f.memory_available_bytes = 1), ["memory"]);
        assert_eq!(refused(|f| f.lock_manager = Some("lockd".into())), ["lock manager"]);
        assert!(refused(|f| f.kvm = Err("ENOENT".into())).is_empty());
        assert!(refused(|f| f.ptrace_scope = Some(2)).is_empty());
        assert!(refused(|f| f.dirty_log_shared = Err("EINVAL".into())).is_empty());
    }

    #[test]
    fn warnings_are_there() {
        let facts = HostFacts { kvm: Err("ENOENT".into()), dirty_log_shared: Err("EINVAL".into()), ..good() };
        let findings = local(&facts, 0);
        assert_eq!(findings.iter().filter(|f| f.severity == Severity::Warning).count(), 2);
    }

    #[test]
    fn proc_files() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_SYS_PTRACE));
        assert!(!has_capability("CapEff:\t0000000000000000\n", CAP_SYS_PTRACE));
        assert!(!has_capability("CapPrm:\t000001ffffffffff\n", CAP_SYS_PTRACE));
        assert_eq!(memory_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(memory_available("MemAvailable: much"), None);
    }

    #[test]
    fn this_host() {
        let facts = HostFacts::gather();
        assert!(!facts.kernel_release.is_empty());
        assert!(facts.memory_available_bytes > 0);
        let error = Error::Connect { uri: "qemu:///system".into(), message: "no socket".into() };
        let findings = super::findings(&facts, Err(&error), 0);
        assert!(refusals(&findings).any(|f| f.subject == "libvirt" && f.fact.contains("no socket")));
    }
}
