//! Connections to libvirt, and domains.
//!
//! Every call blocks until libvirt has answered. A connection sends keep-alive probes, so that a call ends with an error
//! when libvirtd hangs or is gone ([`KEEPALIVE_INTERVAL_S`] x [`KEEPALIVE_COUNT`] seconds); whoever holds it opens another
//! then ([`Error::is_connection`]). libvirt's own printing of errors is silenced.

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain as VirtDomain;

use crate::error::Error;
use crate::events::{EventStream, start_event_loop};
use crate::raw;
use crate::xml::Element;

/// The libvirt of this host.
pub const SYSTEM_URI: &str = "qemu:///system";
/// Seconds of silence after which libvirtd is probed.
pub const KEEPALIVE_INTERVAL_S: i32 = 5;
/// Probes without an answer after which the connection is given up.
pub const KEEPALIVE_COUNT: u32 = 3;
/// Where libvirt's QEMU driver keeps a file `DOMAIN.pid` for each running domain.
const PID_DIRECTORY: &str = "/run/libvirt/qemu";

/// A connection. Clones share it; it is closed with the last of them and of the domains from it.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

struct Inner {
    connect: Connect,
    uri: String,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(e) = self.connect.close() {
            tracing::debug!(error = %e, uri = %self.uri, "close the connection to libvirt");
        }
    }
}

/// A version as libvirt gives it: 1,000,000 x major + 1,000 x minor + release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub release: u32,
}

impl Version {
    fn from_number(number: u32) -> Self {
        Version { major: number / 1_000_000, minor: number / 1_000 % 1_000, release: number % 1_000 }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.release)
    }
}

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What is free without taking anything from the page cache.
    pub free_bytes: u64,
}

/// How this host's CPU compares with one that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuComparison {
    /// The host lacks something.
    Incompatible,
    /// The same.
    Identical,
    /// The host has more.
    Superset,
}

/// In which state a restored domain is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreState {
    /// As the image says.
    AsSaved,
    /// Running.
    Running,
    /// Paused.
    Paused,
}

/// Which domains are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainFilter {
    /// All of them.
    All,
    /// Those with a QEMU process.
    Active,
}

/// State of a domain (`virDomainState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// It runs.
    Running,
    /// It waits for a resource.
    Blocked,
    /// Paused.
    Paused,
    /// The guest shuts down.
    ShuttingDown,
    /// There is no QEMU process.
    ShutOff,
    /// The guest crashed.
    Crashed,
    /// The guest sleeps.
    PmSuspended,
    /// Something else.
    Other(u32),
}

impl DomainState {
    /// Whether there is a QEMU process.
    pub fn is_active(self) -> bool {
        !matches!(self, Self::ShutOff | Self::Other(_))
    }
}

impl std::fmt::Display for DomainState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match self {
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting down",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
            Self::PmSuspended => "suspended by the guest",
            Self::Other(state) => return write!(f, "in state {state}"),
        };
        f.write_str(word)
    }
}

impl Connection {
    /// Connects; [`SYSTEM_URI`] is this host's libvirt. Keep-alive begins with the connection: while a libvirtd hangs that
    /// took the connection but does not answer, this waits.
    pub fn open(uri: &str) -> Result<Self, Error> {
        start_event_loop()?;
        no_nul("the libvirt URI", uri)?;
        let failed = |e: virt::error::Error| Error::Connect { uri: uri.to_owned(), message: e.message().to_owned() };
        let connect = Connect::open(Some(uri)).map_err(failed)?;
        let connection = Connection { inner: Arc::new(Inner { connect, uri: uri.to_owned() }) };
        match connection.virt().set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT) {
            // Drivers without a daemon between (test:///) have nothing to probe.
            Err(error) if error.code() != virt::error::ErrorNumber::NoSupport => Err(failed(error)),
            _ => Ok(connection),
        }
    }

    /// The URI it was opened with.
    pub fn uri(&self) -> &str {
        &self.inner.uri
    }

    pub(crate) fn virt(&self) -> &Connect {
        &self.inner.connect
    }

    /// Whether it still is one.
    pub fn is_alive(&self) -> bool {
        self.virt().is_alive().unwrap_or(false)
    }

    /// Version of libvirt.
    pub fn libvirt_version(&self) -> Result<Version, Error> {
        let number = self.virt().get_lib_version().map_err(|e| Error::libvirt("tell its version", &e))?;
        Ok(Version::from_number(number))
    }

    /// Version of the QEMU that libvirt starts domains with. A running domain may have an older one.
    pub fn qemu_version(&self) -> Result<Version, Error> {
        let number = self.virt().get_hyp_version().map_err(|e| Error::libvirt("tell QEMU's version", &e))?;
        Ok(Version::from_number(number))
    }

    /// The host's name.
    pub fn host_name(&self) -> Result<String, Error> {
        self.virt().get_hostname().map_err(|e| Error::libvirt("tell the host's name", &e))
    }

    /// The domain of this name or UUID. A name that looks like a UUID is taken for a UUID first.
    pub fn domain(&self, name_or_uuid: &str) -> Result<Domain, Error> {
        no_nul("the domain's name", name_or_uuid)?;
        let none = || Error::NoSuchDomain { wanted: name_or_uuid.to_owned(), uri: self.uri().to_owned() };
        if name_or_uuid.is_empty() {
            return Err(none());
        }
        if let Ok(uuid) = Uuid::parse_str(name_or_uuid) {
            match self.domain_by_uuid(&uuid) {
                Err(e) if e.is_no_such_domain() => {}
                found => return found,
            }
        }
        match VirtDomain::lookup_by_name(self.virt(), name_or_uuid) {
            Ok(domain) => Domain::new(self, domain),
            Err(e) => match Error::libvirt(format!("look up domain {name_or_uuid}"), &e) {
                e if e.is_no_such_domain() => Err(none()),
                e => Err(e),
            },
        }
    }

    /// The domain of this UUID.
    pub fn domain_by_uuid(&self, uuid: &Uuid) -> Result<Domain, Error> {
        match VirtDomain::lookup_by_uuid_string(self.virt(), &uuid.to_string()) {
            Ok(domain) => Domain::new(self, domain),
            Err(e) => match Error::libvirt(format!("look up domain {uuid}"), &e) {
                e if e.is_no_such_domain() => {
                    Err(Error::NoSuchDomain { wanted: uuid.to_string(), uri: self.uri().to_owned() })
                }
                e => Err(e),
            },
        }
    }

    /// Domains, in libvirt's order.
    pub fn domains(&self, filter: DomainFilter) -> Result<Vec<Domain>, Error> {
        let flags = match filter {
            DomainFilter::All => 0,
            DomainFilter::Active => virt_sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE,
        };
        let domains = self.virt().list_all_domains(flags).map_err(|e| Error::libvirt("list the domains", &e))?;
        domains.into_iter().map(|d| Domain::new(self, d)).collect()
    }

    /// Makes or replaces the persistent definition of a domain.
    pub fn define(&self, xml: &Element) -> Result<Domain, Error> {
        let document = xml.to_string();
        no_nul("the domain definition", &document)?;
        let name = xml.text_at("name").unwrap_or_default();
        let domain = VirtDomain::define_xml(self.virt(), &document)
            .map_err(|e| Error::libvirt(format!("define domain {name}"), &e))?;
        Domain::new(self, domain)
    }

    /// Starts a transient domain.
    pub fn create(&self, xml: &Element, paused: bool) -> Result<Domain, Error> {
        let document = xml.to_string();
        no_nul("the domain definition", &document)?;
        let name = xml.text_at("name").unwrap_or_default();
        let flags = if paused { virt_sys::VIR_DOMAIN_START_PAUSED } else { 0 };
        let domain = VirtDomain::create_xml(self.virt(), &document, flags)
            .map_err(|e| Error::libvirt(format!("start domain {name}"), &e))?;
        Domain::new(self, domain)
    }

    /// Starts a domain from a save image; `xml` replaces the definition that the image holds.
    pub fn restore(&self, image: &Path, xml: Option<&Element>, state: RestoreState) -> Result<(), Error> {
        let path = image.to_string_lossy();
        no_nul("the save image's path", &path)?;
        let document = xml.map(Element::to_string);
        if let Some(document) = &document {
            no_nul("the domain definition", document)?;
        }
        let flags = match state {
            RestoreState::AsSaved => 0,
            RestoreState::Running => virt_sys::VIR_DOMAIN_SAVE_RUNNING,
            RestoreState::Paused => virt_sys::VIR_DOMAIN_SAVE_PAUSED,
        };
        VirtDomain::domain_restore_flags(self.virt(), &path, document.as_deref(), flags)
            .map_err(|e| Error::libvirt(format!("restore the save image {path}"), &e))
    }

    /// What the host and its QEMUs can do: `<capabilities>`.
    pub fn capabilities(&self) -> Result<Element, Error> {
        let document =
            self.virt().get_capabilities().map_err(|e| Error::libvirt("tell the host's capabilities", &e))?;
        Ok(Element::parse(&document)?)
    }

    /// What a domain of this kind could have here: `<domainCapabilities>`. An unknown machine type is an error.
    pub fn domain_capabilities(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: Option<&str>,
        virt_type: &str,
    ) -> Result<Element, Error> {
        for value in [emulator, Some(arch), machine, Some(virt_type)].into_iter().flatten() {
            no_nul("a parameter of the domain capabilities", value)?;
        }
        let wanted = format!("tell what a {virt_type} domain of machine type {} can have", machine.unwrap_or("any"));
        let document = self
            .virt()
            .get_domain_capabilities(emulator, Some(arch), machine, Some(virt_type), 0)
            .map_err(|e| Error::libvirt(wanted, &e))?;
        Ok(Element::parse(&document)?)
    }

    /// Compares the host's CPU with a `<cpu>` (of a domain, or of a host's capabilities).
    pub fn compare_cpu(&self, cpu: &Element) -> Result<CpuComparison, Error> {
        let document = cpu.to_string();
        no_nul("the CPU definition", &document)?;
        let result = self.virt().compare_cpu(&document, 0).map_err(|e| Error::libvirt("compare CPUs", &e))?;
        Ok(match result {
            virt_sys::VIR_CPU_COMPARE_IDENTICAL => CpuComparison::Identical,
            virt_sys::VIR_CPU_COMPARE_SUPERSET => CpuComparison::Superset,
            _ => CpuComparison::Incompatible,
        })
    }

    /// The host's memory.
    pub fn node_memory(&self) -> Result<NodeMemory, Error> {
        let failed = |e| Error::libvirt("tell the host's memory", &e);
        let info = self.virt().get_node_info().map_err(failed)?;
        let free_bytes = self.virt().get_free_memory().map_err(failed)?;
        Ok(NodeMemory { total_bytes: info.memory.saturating_mul(1024), free_bytes })
    }

    /// Subscribes to events of all domains from now on. One stream per connection.
    pub fn events(&self) -> Result<EventStream, Error> {
        EventStream::new(self)
    }
}

/// A domain. Its name and UUID are those at the time it was looked up.
#[derive(Clone)]
pub struct Domain {
    domain: VirtDomain,
    name: String,
    uuid: Uuid,
    connection: Connection,
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Domain").field("name", &self.name).field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("uri", &self.uri()).finish_non_exhaustive()
    }
}

impl Domain {
    fn new(connection: &Connection, domain: VirtDomain) -> Result<Self, Error> {
        let name = domain.get_name().map_err(|e| Error::libvirt("tell a domain's name", &e))?;
        let uuid = domain.get_uuid().map_err(|e| Error::libvirt(format!("tell the UUID of {name}"), &e))?;
        Ok(Domain { domain, name, uuid: Uuid::from_bytes(*uuid.as_bytes()), connection: connection.clone() })
    }

    pub(crate) fn virt(&self) -> &VirtDomain {
        &self.domain
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The connection it was looked up on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    fn failed(&self, verb: &str, error: &virt::error::Error) -> Error {
        Error::libvirt(format!("{verb} domain {}", self.name), error)
    }

    /// Its state, and why it is in it (`virDomain<State>Reason`).
    pub fn state(&self) -> Result<(DomainState, i32), Error> {
        let (state, reason) = self.domain.get_state().map_err(|e| self.failed("tell the state of", &e))?;
        let state = match state {
            virt_sys::VIR_DOMAIN_RUNNING => DomainState::Running,
            virt_sys::VIR_DOMAIN_BLOCKED => DomainState::Blocked,
            virt_sys::VIR_DOMAIN_PAUSED => DomainState::Paused,
            virt_sys::VIR_DOMAIN_SHUTDOWN => DomainState::ShuttingDown,
            virt_sys::VIR_DOMAIN_SHUTOFF => DomainState::ShutOff,
            virt_sys::VIR_DOMAIN_CRASHED => DomainState::Crashed,
            virt_sys::VIR_DOMAIN_PMSUSPENDED => DomainState::PmSuspended,
            other => DomainState::Other(other),
        };
        Ok((state, reason))
    }

    /// libvirt's number for this run of it; `None`: it does not run. Asked for anew: a handle remembers an old one.
    pub fn id(&self) -> Result<Option<u32>, Error> {
        Ok(self.connection.domain_by_uuid(&self.uuid)?.domain.get_id())
    }

    /// Whether it has a persistent definition.
    pub fn is_persistent(&self) -> Result<bool, Error> {
        self.domain.is_persistent().map_err(|e| self.failed("tell about the definition of", &e))
    }

    fn xml(&self, flags: u32) -> Result<Element, Error> {
        let document = self.domain.get_xml_desc(flags).map_err(|e| self.failed("dump the definition of", &e))?;
        Ok(Element::parse(&document)?)
    }

    /// The definition of the running domain (of the persistent one, if it does not run).
    pub fn live_xml(&self) -> Result<Element, Error> {
        self.xml(0)
    }

    /// What another host needs to run this guest, passwords included: what is shipped.
    pub fn migratable_xml(&self) -> Result<Element, Error> {
        self.xml(virt_sys::VIR_DOMAIN_XML_MIGRATABLE | virt_sys::VIR_DOMAIN_XML_SECURE)
    }

    /// The definition for its next start, passwords included, so that it can be defined again.
    pub fn inactive_xml(&self) -> Result<Element, Error> {
        self.xml(virt_sys::VIR_DOMAIN_XML_INACTIVE | virt_sys::VIR_DOMAIN_XML_SECURE)
    }

    /// Starts it from its persistent definition.
    pub fn start(&self, paused: bool) -> Result<(), Error> {
        let flags = if paused { virt_sys::VIR_DOMAIN_START_PAUSED } else { 0 };
        self.domain.create_with_flags(flags).map(drop).map_err(|e| self.failed("start", &e))
    }

    /// Pauses it.
    pub fn suspend(&self) -> Result<(), Error> {
        self.domain.suspend().map(drop).map_err(|e| self.failed("pause", &e))
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<(), Error> {
        self.domain.resume().map(drop).map_err(|e| self.failed("resume", &e))
    }

    /// Ends its QEMU process at once.
    pub fn destroy(&self) -> Result<(), Error> {
        self.domain.destroy().map_err(|e| self.failed("destroy", &e))
    }

    /// Removes its persistent definition; snapshots' metadata go, UEFI variables and TPM state stay.
    pub fn undefine(&self) -> Result<(), Error> {
        let flags = virt_sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | virt_sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | virt_sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | virt_sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;
        self.domain.undefine_flags(flags).map_err(|e| self.failed("undefine", &e))
    }

    /// Whether libvirt starts it with the host.
    pub fn autostart(&self) -> Result<bool, Error> {
        self.domain.get_autostart().map_err(|e| self.failed("tell about the autostart of", &e))
    }

    /// Has libvirt start it with the host, or not.
    pub fn set_autostart(&self, on: bool) -> Result<(), Error> {
        self.domain.set_autostart(on).map(drop).map_err(|e| self.failed("set the autostart of", &e))
    }

    /// Limits what it takes of this host, now and at later starts: processor time in per cent of one processor (`percent`), its
    /// weight against other guests, bytes of memory. `None`: as it is. libvirt does it with control groups and refuses without.
    pub fn limit(&self, percent: Option<u64>, shares: Option<u64>, memory_bytes: Option<u64>) -> Result<(), Error> {
        /// Microseconds over which processor time is counted.
        const PERIOD_US: u64 = 100_000;
        let where_to = virt_sys::VIR_DOMAIN_AFFECT_LIVE | virt_sys::VIR_DOMAIN_AFFECT_CONFIG;
        if percent.is_some() || shares.is_some() {
            let mut wanted = virt::domain::SchedulerInfo { cpu_shares: shares, ..Default::default() };
            wanted.global_bw.period = percent.map(|_| PERIOD_US);
            wanted.global_bw.quota = percent.and_then(|percent| i64::try_from(percent * (PERIOD_US / 100)).ok());
            let set = self.domain.set_scheduler_parameters_flags(&wanted, where_to);
            set.map_err(|e| self.failed("limit the processor time of", &e))?;
        }
        if let Some(bytes) = memory_bytes {
            let wanted = virt::domain::MemoryParameters { hard_limit: Some(bytes >> 10), ..Default::default() };
            let set = self.domain.set_memory_parameters(wanted, where_to);
            set.map_err(|e| self.failed("limit the memory of", &e))?;
        }
        Ok(())
    }

    /// Bytes of a disk as the guest sees it (`target`: vda).
    pub fn disk_bytes(&self, target: &str) -> Result<u64, Error> {
        no_nul("the disk's target", target)?;
        let info = self
            .domain
            .get_block_info(target, 0)
            .map_err(|e| Error::libvirt(format!("tell the size of {target} of {}", self.name), &e))?;
        Ok(info.capacity)
    }

    /// A QMP command through libvirt's monitor. libvirt takes a domain job for it and marks the domain tainted.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.qmp_with_files(command, arguments, &[])
    }

    /// A QMP command with descriptors, which QEMU gets with it (`add-fd`, one descriptor).
    pub fn qmp_with_files(&self, command: &str, arguments: Value, files: &[BorrowedFd<'_>]) -> Result<Value, Error> {
        let request = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        };
        let request = c_string("the QMP command", &request.to_string())?;
        let reply = raw::monitor_command(&self.domain, &request, files, 0)
            .map_err(|e| Error::libvirt(format!("send {command} to the monitor of {}", self.name), &e))?;
        let unclear = |message: String| Error::Answer { domain: self.name.clone(), what: command.to_owned(), message };
        let mut reply: Value = serde_json::from_str(&reply).map_err(|e| unclear(e.to_string()))?;
        if let Some(error) = reply.get("error") {
            let word = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
            return Err(Error::Monitor {
                domain: self.name.clone(),
                command: command.to_owned(),
                class: word("class"),
                message: word("desc"),
            });
        }
        reply.get_mut("return").map(Value::take).ok_or_else(|| unclear("neither return nor error".to_owned()))
    }

    /// A command to the QEMU guest agent, for whose answer is waited for so many seconds. libvirt marks the domain tainted.
    pub fn guest_agent(&self, command: &str, seconds: i32) -> Result<Value, Error> {
        self.guest_agent_with(command, &json!({}), seconds)
    }

    /// The same with arguments, an object.
    pub fn guest_agent_with(&self, command: &str, arguments: &Value, seconds: i32) -> Result<Value, Error> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let reply = self
            .domain
            .qemu_agent_command(&request, seconds.max(1), 0)
            .map_err(|e| Error::libvirt(format!("send {command} to the guest agent of {}", self.name), &e))?;
        let unclear = |message: String| Error::Answer { domain: self.name.clone(), what: command.to_owned(), message };
        let mut reply: Value = serde_json::from_str(&reply).map_err(|e| unclear(e.to_string()))?;
        reply.get_mut("return").map(Value::take).ok_or_else(|| unclear("it has no return".to_owned()))
    }

    /// A command for people, through the monitor: what it prints.
    pub fn hmp(&self, line: &str) -> Result<String, Error> {
        let reply = self.qmp("human-monitor-command", json!({ "command-line": line }))?;
        match reply {
            Value::String(text) => Ok(text),
            other => Err(Error::Answer {
                domain: self.name.clone(),
                what: line.to_owned(),
                message: format!("it is {other}, not a text"),
            }),
        }
    }

    /// The process of its QEMU, on this host and in this mount and PID namespace. That the process is the domain's is
    /// checked by the UUID on its command line.
    pub fn qemu_pid(&self) -> Result<u32, Error> {
        qemu_pid(Path::new(PID_DIRECTORY), &self.name, &self.uuid)
    }
}

fn qemu_pid(directory: &Path, name: &str, uuid: &Uuid) -> Result<u32, Error> {
    let lost = |message: String| Error::Process { domain: name.to_owned(), message };
    let file: PathBuf = directory.join(format!("{name}.pid"));
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(lost(format!("{} does not exist: it is not running", file.display())));
        }
        Err(e) => return Err(lost(format!("read {}: {e}", file.display()))),
    };
    let pid: u32 =
        text.trim().parse().map_err(|_| lost(format!("{} holds {:?}, not a number", file.display(), text.trim())))?;
    let path = format!("/proc/{pid}/cmdline");
    let line = std::fs::read(&path).map_err(|e| lost(format!("{} says {pid}; read {path}: {e}", file.display())))?;
    let uuid = uuid.to_string();
    let arguments: Vec<&[u8]> = line.split(|&b| b == 0).collect();
    if !arguments.windows(2).any(|pair| pair[0] == b"-uuid" && pair[1] == uuid.as_bytes()) {
        return Err(lost(format!("{} says {pid}, which is a process without `-uuid {uuid}`", file.display())));
    }
    Ok(pid)
}

fn no_nul(what: &str, text: &str) -> Result<(), Error> {
    if text.contains('\0') { Err(Error::Nul { what: what.to_owned() }) } else { Ok(()) }
}

pub(crate) fn c_string(what: &str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Nul { what: what.to_owned() })
}
