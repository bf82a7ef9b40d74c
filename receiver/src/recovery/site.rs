//! Whether this site has what a recovery plan names: its networks, files and devices, and the domains that stand by here with the
//! NICs and disks that the plan speaks of. Changes nothing.

use std::io::{self, Read, Seek, SeekFrom};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use tonic::Status;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{self, DomainXml, Interface};
use vmdr_hypervisor::host::NetworkState;
use vmdr_hypervisor::xml::Element;
use vmdr_plan::{
    At, Disk, DiskSelector, Domain, Hook, Mistake, Nic, NicSelector, NicTarget, Place, Plan, ReadyCheck, Storage,
};
use vmdr_proto::control::{CheckPlanReply, CheckPlanRequest, PlanFinding, Severity};

use super::limits::{self, Means};
use crate::activate::host::Host;
use crate::control::{connect, hypervisor_status};
use crate::daemon::Receiver;
use crate::group::checks;

/// How long a portal may take to accept a connection.
const PORTAL_LIMIT: Duration = Duration::from_secs(2);
/// More findings than anybody reads.
const FINDINGS_MAX: usize = 1000;
/// The channel of vmdr's own tools in a guest.
const TOOLS_CHANNEL: &str = vmdr_guest_channel::PORT;

/// A standby, as far as a plan speaks of it.
pub struct Standby {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its definition; an error: why there is none.
    pub xml: Result<Element, String>,
    /// Sizes of its disks in bytes, by target.
    pub disks: Vec<(String, u64)>,
}

/// The standbys of this receiver. Blocks while what is durable is applied.
pub fn standbys(receiver: &Receiver) -> Vec<Standby> {
    let domains = receiver.store.domains().into_iter();
    let standby = |domain: crate::store::DomainSummary| {
        let point = receiver.store.recovery_point(&domain.uuid).map_err(|error| error.to_string());
        let disks = point.as_ref().map(|p| p.disks.iter().map(|d| (d.target.clone(), d.size_bytes)).collect());
        let xml = point.as_ref().map_err(Clone::clone);
        let xml = xml.and_then(|p| Element::parse(&p.domain_xml).map_err(|error| error.to_string()));
        Standby { name: domain.name, uuid: domain.uuid, xml, disks: disks.unwrap_or_default() }
    };
    domains.map(standby).collect()
}

/// Something that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The domain that it concerns, as the plan names it; empty: all.
    pub domain: String,
    /// What.
    pub finding: PlanFinding,
}

struct Check<'a> {
    host: &'a dyn Host,
    domain: String,
    found: Vec<Found>,
}

/// Everything that stands in the way of an activation by this plan here, in the order of its text. An error: libvirt does not
/// answer.
pub fn check(plan: &Plan, standbys: &[Standby], host: &dyn Host) -> Result<Vec<Found>, Error> {
    let mut check = Check { host, domain: String::new(), found: Vec::new() };
    // What is of all domains is said once, here.
    let mut general = Plan { domains: Vec::new(), ..plan.clone() }.unsupported();
    for mistake in &general {
        check.refused(mistake.place, mistake.message.clone());
    }
    general.sort();
    for nic in &plan.everyone.nics {
        check.target(nic)?;
    }
    check.hooks(&plan.everyone);
    if let Some(dns) = &plan.dns
        && let Err(error) = super::dns::read_key(&dns.value.key_file.value)
    {
        check.refused(dns.value.key_file.place, error);
    }
    for domain in &plan.domains {
        check.domain.clone_from(&domain.name.value);
        for mistake in domain.unsupported().into_iter().filter(|mistake| general.binary_search(mistake).is_err()) {
            check.refused(mistake.place, mistake.message);
        }
        check.domain(domain, standbys)?;
    }
    let mut found = check.found;
    let key = |f: &Found| (f.finding.line, f.finding.column, f.finding.message.clone());
    found.sort_by_key(key);
    // Hooks of the defaults are hooks of each domain.
    found.dedup_by_key(|f| key(f));
    found.truncate(FINDINGS_MAX);
    Ok(found)
}

/// Answers whether a plan, as its file has it, fits this site.
pub fn answer(receiver: &Receiver, request: &CheckPlanRequest) -> Result<CheckPlanReply, Status> {
    let refused = |m: &Mistake| PlanFinding {
        severity: Severity::Refused.into(),
        line: m.place.line,
        column: m.place.column,
        message: m.message.clone(),
    };
    match Plan::parse(&request.text) {
        Err(mistakes) => Ok(CheckPlanReply { findings: mistakes.iter().map(refused).collect(), domains: Vec::new() }),
        Ok(plan) => {
            let host = connect(receiver)?;
            let found = check(&plan, &standbys(receiver), &host).map_err(hypervisor_status)?;
            let domains = plan.domains.into_iter().map(|domain| domain.name.value).collect();
            Ok(CheckPlanReply { findings: found.into_iter().map(|found| found.finding).collect(), domains })
        }
    }
}

impl Check<'_> {
    fn say(&mut self, severity: Severity, place: Place, message: String) {
        let Place { line, column } = place;
        let finding = PlanFinding { severity: severity.into(), line, column, message };
        self.found.push(Found { domain: self.domain.clone(), finding });
    }

    fn refused(&mut self, place: Place, message: String) {
        self.say(Severity::Refused, place, message);
    }

    fn domain(&mut self, domain: &Domain, standbys: &[Standby]) -> Result<(), Error> {
        for nic in domain.nics.iter().filter(|nic| !nic.of_defaults) {
            self.target(nic)?;
        }
        self.hooks(domain);
        self.checks(domain);
        for disk in &domain.disks {
            self.storage(disk);
        }
        let name = &domain.name;
        let standby = standbys.iter().find(|s| s.name == name.value);
        let Some(standby) = standby.or_else(|| standbys.iter().find(|s| s.uuid == name.value)) else {
            if self.is_here(&name.value)? {
                // A plan for the way home is written where the guest still runs.
                let message =
                    format!("{} runs here and is not stored here: whether it fits is seen once it is", name.value);
                self.say(Severity::Warning, name.place, message);
            } else {
                let message = format!("nothing is stored here of {:?}; `vmdr status` lists what is", name.value);
                self.refused(name.place, message);
            }
            return Ok(());
        };
        let xml = match &standby.xml {
            Ok(xml) => xml,
            Err(error) => {
                let message = format!("whether it fits cannot be seen until {} can be activated: {error}", name.value);
                self.say(Severity::Warning, name.place, message);
                return Ok(());
            }
        };
        let Ok(known) = DomainXml::from_element(xml) else {
            self.refused(name.place, format!("the stored domain XML of {} cannot be read", name.value));
            return Ok(());
        };
        self.nics(domain, &known);
        for disk in &domain.disks {
            self.disk(disk, &known, standby);
        }
        self.limits(domain, &known);
        self.in_guest(domain, xml, &known);
        let tools = [TOOLS_CHANNEL, domain_xml::GUEST_AGENT_CHANNEL];
        if !tools.iter().any(|channel| domain_xml::channel(xml, channel).is_some()) {
            for ready in domain.ready.iter().filter(|ready| ready.value.check == ReadyCheck::Heartbeat) {
                let fact = format!(
                    "{} has neither vmdr's tools nor the QEMU guest agent, whose heartbeat it would be",
                    name.value
                );
                self.refused(ready.place, fact);
            }
        }
        Ok(())
    }

    /// Whether libvirt here has a domain of this name or UUID.
    fn is_here(&self, name: &str) -> Result<bool, Error> {
        let by_uuid = uuid::Uuid::parse_str(name).ok().map(|uuid| self.host.guest(uuid)).transpose()?.flatten();
        Ok(by_uuid.is_some() || self.host.uuid_of(name)?.is_some())
    }

    fn nics(&mut self, domain: &Domain, known: &DomainXml) {
        for nic in domain.nics.iter().filter(|nic| !nic.of_defaults) {
            let found = match &nic.selector.value {
                NicSelector::Mac(mac) => known
                    .interfaces
                    .iter()
                    .any(|i| i.mac.as_deref().is_some_and(|of| vmdr_plan::Mac::parse(of).is_ok_and(|of| of == *mac))),
                NicSelector::Source(source) => known.interfaces.iter().any(|i| i.source.as_deref() == Some(source)),
            };
            if !found {
                let has = known.interfaces.iter().map(|i| {
                    let (mac, source) = (i.mac.as_deref().unwrap_or("-"), i.source.as_deref().unwrap_or("-"));
                    format!("{mac} in {} {source}", i.kind)
                });
                let has: Vec<String> = has.collect();
                let has = if has.is_empty() { "no NIC".to_owned() } else { has.join(", ") };
                let message = format!("{} has no such NIC; it has {has}", known.name);
                self.refused(nic.selector.place, message);
            }
        }
    }

    /// Whether there is somebody in the guest who can change what is to be changed there.
    fn in_guest(&mut self, domain: &Domain, xml: &Element, known: &DomainXml) {
        for nic in domain.nics.iter().filter(|nic| nic.changed.is_some()) {
            let matches = |i: &&Interface| domain.nic(i.mac.as_deref(), i.source.as_deref()) == Some(nic);
            if known.interfaces.iter().filter(matches).count() > 1 {
                let message = format!(
                    "{} has several NICs there, and all would have the same addresses: say which by `mac`",
                    known.name
                );
                self.refused(nic.selector.place, message);
            }
        }
        if let Err(error) = super::guest::wanted(xml, domain).encode() {
            self.refused(domain.name.place, format!("its tools would not take what is to be changed: {error}"));
        }
        if domain_xml::channel(xml, TOOLS_CHANNEL).is_some() {
            return;
        }
        let name = &domain.name.value;
        let has_agent = domain_xml::channel(xml, domain_xml::GUEST_AGENT_CHANNEL).is_some();
        let changed: Vec<Place> =
            domain.nics.iter().filter_map(|nic| nic.changed.as_ref()).map(|at| at.place).collect();
        for place in changed {
            if has_agent {
                let message = format!(
                    "{name} has the QEMU guest agent and no channel to vmdr's tools: it is given the addresses, by the `ip` of the \
                     guest and if the agent may run it, but does not have them after a reboot"
                );
                self.say(Severity::Warning, place, message);
            } else {
                let fact = format!("{name} has neither vmdr's tools nor the QEMU guest agent, which would change it");
                self.refused(place, fact);
            }
        }
        let resolver = domain.dns_servers.first().map(|at| at.place).or(domain.dns_search.first().map(|at| at.place));
        for place in domain.hostname.iter().map(|at| at.place).chain(resolver) {
            let fact =
                format!("{name} has no channel to vmdr's tools, which would change it (the QEMU guest agent cannot)");
            self.refused(place, fact);
        }
    }

    fn disk(&mut self, disk: &Disk, known: &DomainXml, standby: &Standby) {
        let found = known.disks.iter().find(|of| match &disk.selector.value {
            DiskSelector::Target(target) => of.target == *target,
            DiskSelector::Serial(serial) => of.serial.as_deref() == Some(serial),
            DiskSelector::Wwn(wwn) => {
                of.wwn.as_deref().is_some_and(|of| of.trim_start_matches("0x").eq_ignore_ascii_case(wwn))
            }
        });
        let Some(found) = found else {
            let has: Vec<&str> = known.disks.iter().map(|d| d.target.as_str()).collect();
            let message = format!("{} has no such disk; it has {}", known.name, has.join(", "));
            self.refused(disk.selector.place, message);
            return;
        };
        let Some((_, needed)) = standby.disks.iter().find(|(target, _)| *target == found.target) else {
            let message = format!("disk {} of {} is not replicated", found.target, known.name);
            self.refused(disk.selector.place, message);
            return;
        };
        if let Storage::Device(path) = &disk.storage.value
            && let Ok(has) = device_bytes(Path::new(path))
            && has < *needed
        {
            let message = format!("{path} has {has} bytes, disk {} of {} has {needed}", found.target, known.name);
            self.refused(disk.storage.place, message);
        }
    }

    /// Whether what a disk is to lie on is there.
    fn storage(&mut self, disk: &Disk) {
        let place = disk.storage.place;
        match &disk.storage.value {
            Storage::File { path, .. } => {
                let directory = Path::new(path).parent().unwrap_or(Path::new("/"));
                if !directory.is_dir() {
                    self.refused(place, format!("{} is no directory of this host", directory.display()));
                }
            }
            Storage::Device(path) => match device_bytes(Path::new(path)) {
                Ok(_) => {}
                Err(error) => self.refused(place, format!("{path}: {error}")),
            },
            Storage::Iscsi(lun) => {
                if let Some((_, secret)) = &lun.chap {
                    self.secret(secret, "the CHAP secret");
                }
                if let Err(error) = reach(&lun.portal) {
                    self.refused(place, format!("the portal {} cannot be reached: {error}", lun.portal));
                }
            }
            Storage::Rbd(rbd) => {
                if let Some((_, secret)) = &rbd.user {
                    self.secret(secret, "the Ceph key");
                }
            }
            Storage::Nbd(_) => {}
        }
    }

    /// A file with a secret: there, and nobody else's to read.
    fn secret(&mut self, file: &At<String>, what: &str) {
        let path = Path::new(&file.value);
        match std::fs::metadata(path) {
            Ok(metadata) if !metadata.is_file() => self.refused(file.place, format!("{} is no file", file.value)),
            Ok(metadata) if metadata.mode() & 0o077 != 0 => {
                let message = format!("{what} in {} can be read by others: `chmod 600` it", file.value);
                self.say(Severity::Warning, file.place, message);
            }
            Ok(_) => {}
            Err(error) => self.refused(file.place, format!("{what} cannot be read from {}: {error}", file.value)),
        }
    }

    /// Whether the bridge or network is here, and can do what is wanted of it.
    fn target(&mut self, nic: &Nic) -> Result<(), Error> {
        let Some(target) = &nic.target else { return Ok(()) };
        match &target.value {
            NicTarget::Bridge(bridge) if !self.host.has_interface(bridge) => {
                self.refused(target.place, format!("bridge {bridge} is not on this host"));
            }
            NicTarget::Bridge(bridge) => {
                if let Some(vlan) = &nic.vlan
                    && let Some(why) = self.host.vlan_trouble(bridge)?
                {
                    self.refused(vlan.place, why);
                }
            }
            NicTarget::Network(network) => match self.host.network(network)? {
                NetworkState::Active => {}
                NetworkState::Inactive => {
                    let remedy = format!("`virsh net-start {network}` and net-autostart");
                    self.refused(target.place, format!("the libvirt network {network} is not started: {remedy}"));
                }
                NetworkState::Missing => {
                    self.refused(target.place, format!("the libvirt network {network} is not on this host"));
                }
            },
        }
        Ok(())
    }

    fn hooks(&mut self, domain: &Domain) {
        for Hook { argv, .. } in domain.before.iter().chain(&domain.after) {
            self.program(argv);
        }
    }

    /// A program that is run as root.
    fn program(&mut self, argv: &At<Vec<String>>) {
        let Some(program) = argv.value.first() else { return };
        match std::fs::metadata(program) {
            Ok(file) if file.is_file() && file.mode() & 0o111 != 0 => {
                if file.mode() & super::OTHERS_WRITE != 0 {
                    let message = format!("others than its owner can write {program}, which is run as root");
                    self.refused(argv.place, message);
                }
            }
            Ok(_) => self.refused(argv.place, format!("{program} is no program that can be run")),
            Err(error) => self.refused(argv.place, format!("{program}: {error}")),
        }
    }

    fn limits(&mut self, domain: &Domain, known: &DomainXml) {
        for (severity, mistake) in limits::trouble(&domain.limits, &known.name, known.memory_bytes, &Means::here()) {
            self.say(severity, mistake.place, mistake.message);
        }
    }

    /// What readiness checks need of this host.
    fn checks(&mut self, domain: &Domain) {
        for ready in &domain.ready {
            if let Some(name) = &ready.value.namespace
                && !checks::namespace(&name.value).exists()
            {
                let message = format!("the network namespace {} is not on this host: `ip netns add`", name.value);
                self.refused(name.place, message);
            }
            if let ReadyCheck::Command(argv) = &ready.value.check {
                self.program(argv);
            }
        }
    }
}

/// Bytes of a block device.
fn device_bytes(path: &Path) -> io::Result<u64> {
    if !std::fs::metadata(path)?.file_type().is_block_device() {
        return Err(io::Error::other("it is no block device"));
    }
    let mut device = std::fs::File::open(path)?;
    let bytes = device.seek(SeekFrom::End(0))?;
    device.seek(SeekFrom::Start(0))?;
    // One that does not answer is as good as none.
    device.take(1).read_to_end(&mut Vec::new())?;
    Ok(bytes)
}

fn reach(portal: &str) -> io::Result<()> {
    let mut last = io::Error::other("its name has no address");
    for address in portal.to_socket_addrs()?.take(4) {
        match TcpStream::connect_timeout(&address, PORTAL_LIMIT) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests;
