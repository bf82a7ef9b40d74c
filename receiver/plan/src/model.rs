//! A plan, read. Everything that can be wrong at the backup site keeps its place in the file.

use std::net::IpAddr;

use crate::place::At;
use crate::values::{Cidr, Mac};

/// A plan that makes sense by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What holds for a domain that the plan does not name: the defaults.
    pub everyone: Domain,
    /// Dynamic updates of names.
    pub dns: Option<At<Dns>>,
    /// The domains, by name.
    pub domains: Vec<Domain>,
    /// The groups, by name.
    pub groups: Vec<Group>,
}

/// `[group.NAME]`: domains that are activated together, in the order that they need each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: At<String>,
    /// Names of domains of the plan; each is in one group at most.
    pub members: Vec<At<String>>,
    /// Activations at once, at most.
    pub parallel: usize,
}

/// What a guest may take of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of one processor.
    pub cpu_percent: Option<At<u64>>,
    /// Weight against other guests.
    pub cpu_shares: Option<At<u64>>,
    /// Bytes of memory, as libvirt's hard limit.
    pub memory_bytes: Option<At<u64>>,
}

impl Limits {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.cpu_percent.is_none() && self.cpu_shares.is_none() && self.memory_bytes.is_none()
    }
}

/// `[domain.NAME]`, with what it has of the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Domain {
    /// Name or UUID; empty: of every domain that the plan does not name.
    pub name: At<String>,
    /// Whether addresses of NICs that are not described are announced, as far as its guest agent tells them.
    pub announce: bool,
    /// Limits.
    pub limits: Limits,
    /// Its NICs, then those of the defaults.
    pub nics: Vec<Nic>,
    /// Places of its disks.
    pub disks: Vec<Disk>,
    /// Run before the guest is fenced and started; those of the defaults first.
    pub before: Vec<Hook>,
    /// Run when the guest runs; its own first.
    pub after: Vec<Hook>,
    /// What the guest's own name is to be.
    pub hostname: Option<At<String>>,
    /// What its resolver is to ask.
    pub dns_servers: Vec<At<IpAddr>>,
    /// What its resolver is to append.
    pub dns_search: Vec<At<String>>,
    /// Names that are to lead to its new addresses.
    pub dns_names: Vec<At<String>>,
    /// Its place in an activation of its group.
    pub priority: Option<At<u64>>,
    /// Whether it is in a group of the plan.
    pub in_group: bool,
    /// Domains that have to be ready before.
    pub needs: Vec<At<String>>,
    /// When it is ready.
    pub ready: Vec<At<Ready>>,
}

/// The place of a domain of which the plan does not say it.
const PRIORITY: u64 = 100;

impl Domain {
    /// Its place in an activation of its group, the lowest first.
    pub fn place(&self) -> u64 {
        self.priority.as_ref().map_or(PRIORITY, |at| at.value)
    }
}

/// Which of a domain's NICs is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NicSelector {
    /// The one with this address.
    Mac(Mac),
    /// All that are in this network or bridge at the protected host.
    Source(String),
}

/// Where a NIC is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicTarget {
    /// A bridge of this host.
    Bridge(String),
    /// A network of this host's libvirt.
    Network(String),
}

/// `[[domain.NAME.nic]]`, `[[defaults.nic]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Which.
    pub selector: At<NicSelector>,
    /// Whether it is of the defaults, which may concern no NIC at all.
    pub of_defaults: bool,
    /// Where it is here; `None`: in what has the same name.
    pub target: Option<At<NicTarget>>,
    /// VLAN of the bridge's port.
    pub vlan: Option<At<u16>>,
    /// Another MAC address.
    pub new_mac: Option<At<Mac>>,
    /// Whether the guest's addresses are announced at its start.
    pub announce: bool,
    /// The guest's addresses here.
    pub addresses: Vec<At<Cidr>>,
    /// `addressing = "changed"`: the guest is to be given the addresses, which it does not have yet.
    pub changed: Option<At<()>>,
    /// The way to everything else.
    pub gateway: Option<At<IpAddr>>,
    /// Further routes.
    pub routes: Vec<Route>,
}

/// `routes = [{ to = ..., via = ... }]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// A network.
    pub to: At<Cidr>,
    /// Through whom.
    pub via: At<IpAddr>,
}

/// Which of a domain's disks is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskSelector {
    /// By its name at the guest, `vda`.
    Target(String),
    /// By its serial number.
    Serial(String),
    /// By its WWN, lower case, without 0x.
    Wwn(String),
}

/// `[[domain.NAME.disk]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Which.
    pub selector: At<DiskSelector>,
    /// Where it is to lie.
    pub storage: At<Storage>,
}

/// Where a disk lies at this site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// A file.
    File {
        /// Its path.
        path: String,
        /// qcow2, else raw.
        qcow2: bool,
    },
    /// A block device.
    Device(String),
    /// An iSCSI LUN.
    Iscsi(Iscsi),
    /// A Ceph block device.
    Rbd(Rbd),
    /// An NBD export.
    Nbd(Nbd),
}

/// `iscsi = { ... }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iscsi {
    /// HOST:PORT.
    pub portal: String,
    /// The target's name.
    pub iqn: String,
    /// The LUN.
    pub lun: u64,
    /// CHAP: the user and a file with the secret.
    pub chap: Option<(String, At<String>)>,
}

/// `rbd = { ... }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rbd {
    /// HOST:PORT of each; none: as the host's Ceph configuration says.
    pub monitors: Vec<String>,
    /// The pool.
    pub pool: String,
    /// The image.
    pub image: String,
    /// The user and a file with the key.
    pub user: Option<(String, At<String>)>,
}

/// `nbd = { ... }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nbd {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The export.
    pub export: String,
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// The activation ends.
    Abort,
    /// It goes on and says so.
    Warn,
}

/// A program that is run before or after an activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Program and arguments; the program by its absolute path.
    pub argv: At<Vec<String>>,
    /// How long it may take.
    pub timeout_seconds: u64,
    /// What follows when it fails.
    pub on_failure: OnFailure,
}

/// How it is found out that a guest does its work again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// What is asked.
    pub check: ReadyCheck,
    /// From where: this named network namespace of the host; `None`: the host itself.
    pub namespace: Option<At<String>>,
    /// How long it may take until the answer is right.
    pub timeout_seconds: u64,
    /// Between two tries.
    pub interval_seconds: u64,
    /// How often it is tried again; `None`: until its time is over.
    pub retries: Option<u64>,
    /// What follows when it does not come right: `Abort` keeps those from being started that need the domain.
    pub on_failure: OnFailure,
}

impl Ready {
    /// In a word or two, as it is written.
    pub fn shown(&self) -> String {
        match &self.check {
            ReadyCheck::Tcp(at) => format!("tcp:{at}"),
            ReadyCheck::Heartbeat => "heartbeat".to_owned(),
            ReadyCheck::Command(argv) => format!("cmd:{}", argv.value.join(" ")),
        }
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyCheck {
    /// A TCP port takes a connection: HOST:PORT.
    Tcp(String),
    /// The tools in the guest are heard.
    Heartbeat,
    /// A program ends with 0.
    Command(At<Vec<String>>),
}

/// `[dns]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// HOST:PORT.
    pub server: String,
    /// The zone.
    pub zone: String,
    /// A file with the TSIG key.
    pub key_file: At<String>,
    /// Zones of names of addresses (`in-addr.arpa`, `ip6.arpa`) that are updated, too.
    pub reverse_zones: Vec<At<String>>,
    /// Time to live of what is written.
    pub ttl_seconds: u64,
    /// How long one attempt may take.
    pub timeout_seconds: u64,
    /// How often it is tried.
    pub tries: u64,
    /// What follows when it fails.
    pub on_failure: OnFailure,
}
