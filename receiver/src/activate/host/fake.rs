//! A host that has what a test gives it, and a libvirt that does what a test wants.
#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use uuid::Uuid;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::host::NetworkState;
use vmdr_hypervisor::libvirt::DomainState;
use vmdr_hypervisor::xml::Element;

use super::{CpuFit, Guest, Host};

/// What libvirt does when it is asked to restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnRestore {
    /// The guest runs afterwards.
    Run,
    /// The guest is paused afterwards, until it is resumed.
    Pause,
    /// It refuses.
    Refuse,
    /// The connection breaks, but libvirt goes on and the guest runs.
    LoseConnection,
    /// The caller is killed while libvirt works: nothing after this call happens. The guest runs.
    Killed,
    /// The caller is killed before libvirt has heard of it.
    KilledBefore,
}

/// What libvirt knows.
#[derive(Debug, Default)]
pub struct Libvirt {
    pub guest: Option<Guest>,
    pub restores: Vec<PathBuf>,
    pub defined: Vec<Element>,
    pub resumes: u32,
}

pub struct FakeHost {
    pub files: BTreeSet<PathBuf>,
    pub interfaces: BTreeSet<String>,
    pub vlans: bool,
    pub addresses: BTreeSet<IpAddr>,
    pub networks: BTreeMap<String, NetworkState>,
    pub memory_available_bytes: Option<u64>,
    pub machines: BTreeSet<String>,
    pub cpu: CpuFit,
    pub host_cpu: CpuFit,
    pub names: BTreeMap<String, Uuid>,
    pub capabilities: String,
    pub on_restore: Mutex<OnRestore>,
    pub libvirt: Mutex<Libvirt>,
}

pub const CAPABILITIES: &str = "<capabilities><host><secmodel><model>none</model></secmodel><secmodel><model>dac</model>\
    <baselabel type='kvm'>+64055:+993</baselabel><baselabel type='qemu'>+64056:+994</baselabel></secmodel></host></capabilities>";

impl Default for FakeHost {
    fn default() -> Self {
        FakeHost {
            files: BTreeSet::new(),
            interfaces: BTreeSet::new(),
            vlans: true,
            addresses: BTreeSet::from([IpAddr::from([127, 0, 0, 1])]),
            networks: BTreeMap::new(),
            memory_available_bytes: Some(64 << 30),
            machines: ["pc-q35-10.0", "pc-i440fx-8.2"].map(str::to_owned).into(),
            cpu: CpuFit::Fits,
            host_cpu: CpuFit::Fits,
            names: BTreeMap::new(),
            capabilities: CAPABILITIES.to_owned(),
            on_restore: Mutex::new(OnRestore::Run),
            libvirt: Mutex::default(),
        }
    }
}

fn libvirt_error(message: &str) -> Error {
    Error::Libvirt { what: "do it".to_owned(), message: message.to_owned(), code: 1 }
}

/// The definition in a save image.
fn xml_of(image: &Path) -> Element {
    let bytes = std::fs::read(image).unwrap();
    let end = bytes[92..].iter().position(|&b| b == 0).unwrap();
    Element::parse(std::str::from_utf8(&bytes[92..92 + end]).unwrap()).unwrap()
}

/// What `restores` has of a guest that was started anew.
pub const BOOT: &str = "boot";

impl FakeHost {
    /// A guest is there, or not, as the test wants.
    fn come_up(&self, from: PathBuf, xml: &Element) -> Result<(), Error> {
        let what = self.on_restore.lock().unwrap().clone();
        let mut libvirt = self.libvirt.lock().unwrap();
        assert!(libvirt.guest.as_ref().is_none_or(|g| !g.state.is_active()), "a second guest");
        libvirt.restores.push(from);
        let state = match what {
            OnRestore::Refuse => return Err(libvirt_error("unable to execute QEMU command")),
            OnRestore::KilledBefore => {
                drop(libvirt);
                panic!("killed before the restore");
            }
            OnRestore::Pause => DomainState::Paused,
            _ => DomainState::Running,
        };
        let disk_files =
            xml.find_all("devices/disk/source").iter().map(|s| s.attribute("file").unwrap().into()).collect();
        libvirt.guest = Some(Guest { state, persistent: false, disk_files });
        match what {
            OnRestore::LoseConnection => Err(libvirt_error("End of file while reading data: client socket is closed")),
            OnRestore::Killed => {
                drop(libvirt);
                panic!("killed during the restore");
            }
            _ => Ok(()),
        }
    }
}

impl Host for FakeHost {
    fn exists(&self, path: &Path) -> bool {
        self.files.contains(path)
    }
    fn has_interface(&self, name: &str) -> bool {
        self.interfaces.contains(name)
    }
    fn is_local_address(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }
    fn memory_available_bytes(&self) -> Option<u64> {
        self.memory_available_bytes
    }
    fn network(&self, name: &str) -> Result<NetworkState, Error> {
        Ok(self.networks.get(name).copied().unwrap_or(NetworkState::Missing))
    }
    fn vlan_trouble(&self, bridge: &str) -> Result<Option<String>, Error> {
        Ok((!self.vlans).then(|| format!("bridge {bridge} does not tell VLANs apart")))
    }
    fn capabilities(&self) -> Result<Element, Error> {
        Ok(Element::parse(&self.capabilities)?)
    }
    fn domain_capabilities(&self, _: Option<&str>, _: &str, machine: &str, _: &str) -> Result<Element, Error> {
        if !self.machines.contains(machine) {
            return Err(libvirt_error(&format!("the machine '{machine}' is not supported by emulator")));
        }
        Ok(Element::new("domainCapabilities"))
    }
    fn cpu_fits(&self, _: Option<&str>, _: &str, _: &str, _: &str, _: &Element) -> Result<CpuFit, Error> {
        Ok(self.cpu.clone())
    }
    fn host_cpu_fits(&self, _: &Element) -> Result<CpuFit, Error> {
        Ok(self.host_cpu.clone())
    }
    fn qemu_complaints(&self, _: &str) -> Option<String> {
        Some("error while loading state".to_owned())
    }
    fn guest(&self, _: Uuid) -> Result<Option<Guest>, Error> {
        Ok(self.libvirt.lock().unwrap().guest.clone())
    }
    fn uuid_of(&self, name: &str) -> Result<Option<Uuid>, Error> {
        Ok(self.names.get(name).copied())
    }
    fn restore(&self, image: &Path) -> Result<(), Error> {
        self.come_up(image.to_owned(), &xml_of(image))
    }
    fn boot(&self, xml: &Element) -> Result<(), Error> {
        self.come_up(PathBuf::from(BOOT), xml)
    }
    fn resume(&self, _: Uuid) -> Result<(), Error> {
        let mut libvirt = self.libvirt.lock().unwrap();
        libvirt.resumes += 1;
        libvirt.guest.as_mut().unwrap().state = DomainState::Running;
        Ok(())
    }
    fn define(&self, xml: &Element) -> Result<(), Error> {
        let mut libvirt = self.libvirt.lock().unwrap();
        libvirt.defined.push(xml.clone());
        libvirt.guest.as_mut().unwrap().persistent = true;
        Ok(())
    }
}
