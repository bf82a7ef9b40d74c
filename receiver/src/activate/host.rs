//! What is asked of the host on which a guest would be activated. Preflight, the plan and the activation ask the same
//! questions, so that what is refused at `protect` is what would fail on the day of the disaster.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::host::NetworkState;
use vmdr_hypervisor::libvirt::{Connection, CpuComparison, DomainState, RestoreState};
use vmdr_hypervisor::xml::Element;

/// Where libvirt keeps what its QEMUs say.
const QEMU_LOGS: &str = "/var/log/libvirt/qemu";
/// The first version that puts ports of a Linux bridge into VLANs.
const LIBVIRT_VLAN: u32 = 11;
/// As much of a log as is looked at: a command line and some complaints.
const LOG_BYTES_MAX: u64 = 64 << 10;

/// A guest as libvirt knows it here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its state.
    pub state: DomainState,
    /// Whether it has a persistent definition.
    pub persistent: bool,
    /// Files of its disks as it runs.
    pub disk_files: Vec<PathBuf>,
}

/// Whether this host could run a domain's CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuFit {
    /// It can.
    Fits,
    /// It lacks something, in libvirt's words.
    Lacks(String),
}

/// The host, its files, its network and its libvirt.
pub trait Host: Send + Sync {
    /// Whether a file, directory or device is here.
    fn exists(&self, path: &Path) -> bool;
    /// Whether a network interface or bridge of this name is here.
    fn has_interface(&self, name: &str) -> bool;
    /// Whether an address can be listened on here.
    fn is_local_address(&self, address: IpAddr) -> bool;
    /// Bytes of memory that programs can still get, page cache included; `None`: unknown.
    fn memory_available_bytes(&self) -> Option<u64>;
    /// The state of a libvirt network.
    fn network(&self, name: &str) -> Result<NetworkState, Error>;
    /// Why a port of a bridge that is here cannot be put into a VLAN, with what to do; `None`: it can.
    fn vlan_trouble(&self, bridge: &str) -> Result<Option<String>, Error>;
    /// `<capabilities>`.
    fn capabilities(&self) -> Result<Element, Error>;
    /// `<domainCapabilities>`; an unknown machine type is an error with libvirt's words.
    fn domain_capabilities(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        virt_type: &str,
    ) -> Result<Element, Error>;
    /// Compares `<cpu>` with what QEMU can give a guest here.
    fn cpu_fits(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        virt_type: &str,
        cpu: &Element,
    ) -> Result<CpuFit, Error>;
    /// Compares `<cpu>` of another host with this host's.
    fn host_cpu_fits(&self, cpu: &Element) -> Result<CpuFit, Error>;
    /// What the newest QEMU of a guest of this name has complained of, from libvirt's log of it.
    fn qemu_complaints(&self, name: &str) -> Option<String>;
    /// The guest of this UUID, if libvirt knows one.
    fn guest(&self, uuid: Uuid) -> Result<Option<Guest>, Error>;
    /// The UUID of the guest of this name, if libvirt knows one.
    fn uuid_of(&self, name: &str) -> Result<Option<Uuid>, Error>;
    /// Starts a guest from a save image.
    fn restore(&self, image: &Path) -> Result<(), Error>;
    /// Starts a guest anew, transient as a restored one is.
    fn boot(&self, xml: &Element) -> Result<(), Error>;
    /// Lets a paused guest go on.
    fn resume(&self, uuid: Uuid) -> Result<(), Error>;
    /// Defines a domain persistently, not to be started with the host.
    fn define(&self, xml: &Element) -> Result<(), Error>;
}

/// This host.
pub struct LocalHost {
    connection: Connection,
}

impl LocalHost {
    /// This host with the libvirt at `uri`. Opened for one task and dropped: a restarted libvirtd is no special case.
    pub fn connect(uri: &str) -> Result<Self, Error> {
        Ok(LocalHost { connection: Connection::open(uri)? })
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}

fn none_if_unknown<T>(found: Result<T, Error>) -> Result<Option<T>, Error> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.is_no_such_domain() => Ok(None),
        Err(e) => Err(e),
    }
}

impl Host for LocalHost {
    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn has_interface(&self, name: &str) -> bool {
        // A name with a slash is no interface's.
        !name.is_empty() && !name.contains('/') && !name.starts_with('.') && interface_index(name)
    }

    fn is_local_address(&self, address: IpAddr) -> bool {
        TcpListener::bind((address, 0)).is_ok()
    }

    fn memory_available_bytes(&self) -> Option<u64> {
        parse_available(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn network(&self, name: &str) -> Result<NetworkState, Error> {
        self.connection.network_state(name)
    }

    fn vlan_trouble(&self, bridge: &str) -> Result<Option<String>, Error> {
        let filtering = match std::fs::read_to_string(format!("/sys/class/net/{bridge}/bridge/vlan_filtering")) {
            Ok(text) => text.trim() == "1",
            // No bridge of the kernel's: Open vSwitch has ports in VLANs since ever.
            Err(_) => return Ok(None),
        };
        let version = self.connection.libvirt_version()?;
        if version.major < LIBVIRT_VLAN {
            let what = "puts ports of a Linux bridge into VLANs";
            return Ok(Some(format!(
                "libvirt {LIBVIRT_VLAN} or later {what}, this is {version}: map it to a bridge of the VLAN"
            )));
        }
        let remedy = format!("`ip link set {bridge} type bridge vlan_filtering 1`");
        Ok((!filtering).then(|| format!("bridge {bridge} does not tell VLANs apart: {remedy}")))
    }

    fn capabilities(&self) -> Result<Element, Error> {
        self.connection.capabilities()
    }

    fn domain_capabilities(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        virt_type: &str,
    ) -> Result<Element, Error> {
        self.connection.domain_capabilities(emulator, arch, Some(machine), virt_type)
    }

    fn cpu_fits(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        virt_type: &str,
        cpu: &Element,
    ) -> Result<CpuFit, Error> {
        Ok(match self.connection.lacking_cpu_features(emulator, arch, machine, virt_type, cpu)? {
            None => CpuFit::Fits,
            Some(what) => CpuFit::Lacks(what),
        })
    }

    fn host_cpu_fits(&self, cpu: &Element) -> Result<CpuFit, Error> {
        Ok(match self.connection.compare_cpu(cpu)? {
            CpuComparison::Identical | CpuComparison::Superset => CpuFit::Fits,
            CpuComparison::Incompatible => {
                CpuFit::Lacks("this host's CPU lacks features of the other host's".to_owned())
            }
        })
    }

    fn qemu_complaints(&self, name: &str) -> Option<String> {
        // A domain's name may hold anything but a slash.
        let mut file = File::open(Path::new(QEMU_LOGS).join(format!("{name}.log"))).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES_MAX))).ok()?;
        let mut tail = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut tail).ok()?;
        complaints(&String::from_utf8_lossy(&tail))
    }

    fn guest(&self, uuid: Uuid) -> Result<Option<Guest>, Error> {
        let Some(domain) = none_if_unknown(self.connection.domain_by_uuid(&uuid))? else { return Ok(None) };
        let read = || {
            let (state, _) = domain.state()?;
            let xml = domain.live_xml()?;
            let disk_files = xml
                .find_all("devices/disk/source")
                .into_iter()
                .filter_map(|s| s.attribute("file").map(PathBuf::from))
                .collect();
            Ok(Guest { state, persistent: domain.is_persistent()?, disk_files })
        };
        // A transient domain may end between two questions.
        none_if_unknown(read())
    }

    fn uuid_of(&self, name: &str) -> Result<Option<Uuid>, Error> {
        let found = none_if_unknown(self.connection.domain(name))?;
        Ok(found.filter(|d| d.name() == name).map(|d| d.uuid()))
    }

    fn restore(&self, image: &Path) -> Result<(), Error> {
        self.connection.restore(image, None, RestoreState::Running)
    }

    fn boot(&self, xml: &Element) -> Result<(), Error> {
        self.connection.create(xml, false).map(drop)
    }

    fn resume(&self, uuid: Uuid) -> Result<(), Error> {
        self.connection.domain_by_uuid(&uuid)?.resume()
    }

    fn define(&self, xml: &Element) -> Result<(), Error> {
        self.connection.define(xml)?.set_autostart(false)
    }
}

/// The last complaints of the last QEMU in a log, in one line.
fn complaints(log: &str) -> Option<String> {
    const LINES_MAX: usize = 3;
    // libvirt writes this, and then the command line, before each start.
    let run = log.rfind(": starting up libvirt version").map_or(log, |at| &log[at..]);
    let said: Vec<&str> = run.lines().filter_map(|l| l.split_once(" qemu-system-").map(|(_, rest)| rest)).collect();
    let said: Vec<&str> = said.iter().filter_map(|l| l.split_once(": ").map(|(_, what)| what.trim())).collect();
    let last = &said[said.len().saturating_sub(LINES_MAX)..];
    (!last.is_empty()).then(|| last.join("; "))
}

/// Asked of the kernel and not of /sys, which may be that of another network namespace.
pub(crate) fn interface_index(name: &str) -> bool {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let Ok(any) = socket(AddressFamily::INET, SocketType::DGRAM, None) else { return false };
    netdevice::name_to_index(&any, name).is_ok()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
pub mod fake;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_those_of_the_last_run() {
        let log = "2026-01-01 00:00:00.0+0000: starting up libvirt version: 11.3.0, qemu version: 10.0.2\n\
            /usr/bin/qemu-system-x86_64 \\\n-name guest=a\n\
            2026-01-01T00:00:01.000000Z qemu-system-x86_64: an old one\n\
            2026-01-01 00:00:02.0+0000: starting up libvirt version: 11.3.0, qemu version: 10.0.2\n\
            LC_ALL=C \\\n/usr/bin/qemu-system-x86_64 \\\n-name guest=a\n";
        assert_eq!(complaints(log), None);
        let said = "2026-01-01T00:00:03.000000Z qemu-system-x86_64: error while loading state for device 'x'\n\
            2026-01-01T00:00:03.000001Z qemu-system-x86_64: load of migration failed: Invalid argument\n\
            2026-01-01 00:00:03.5+0000: shutting down, reason=failed\n";
        let both = "error while loading state for device 'x'; load of migration failed: Invalid argument";
        assert_eq!(complaints(&format!("{log}{said}")).as_deref(), Some(both));
        assert_eq!(complaints(""), None);
    }

    #[test]
    fn this_host_has_a_loopback_and_memory() {
        assert!(interface_index("lo"));
        assert!(!interface_index("vmdr-no-such-if"));
        assert_eq!(parse_available("MemFree: 1 kB\nMemAvailable:    12 kB\n"), Some(12288));
        assert_eq!(parse_available("MemFree: 1 kB\n"), None);
        assert!(parse_available(&std::fs::read_to_string("/proc/meminfo").unwrap()).unwrap() > 0);
    }
}
