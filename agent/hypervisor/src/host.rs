//! What this host could give a domain that it does not have yet: networks, CPU features.

use crate::error::Error;
use crate::libvirt::{Connection, c_string};
use crate::raw;
use crate::xml::Element;

/// A libvirt network as a domain needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkState {
    /// It can be used.
    Active,
    /// It is defined but not started.
    Inactive,
    /// There is none of this name.
    Missing,
}

/// libvirt's number for "no such network" (`VIR_ERR_NO_NETWORK`).
const NO_NETWORK: u32 = 43;
/// libvirt's number for "the CPU lacks features" (`VIR_ERR_CPU_INCOMPATIBLE`).
const CPU_INCOMPATIBLE: u32 = 91;

impl Connection {
    /// The state of the libvirt network `name`.
    pub fn network_state(&self, name: &str) -> Result<NetworkState, Error> {
        // The `virt` crate makes a C string of it and panics on a NUL byte.
        c_string("the network's name", name)?;
        let failed = |e: &virt::error::Error| Error::libvirt(format!("look up network {name}"), e);
        let network = match virt::network::Network::lookup_by_name(self.virt(), name) {
            Ok(network) => network,
            Err(e) if e.code().to_raw() == NO_NETWORK => return Ok(NetworkState::Missing),
            Err(e) => return Err(failed(&e)),
        };
        let active = network.is_active().map_err(|e| failed(&e))?;
        Ok(if active { NetworkState::Active } else { NetworkState::Inactive })
    }

    /// What a guest's `<cpu>` wants that QEMU cannot give here, in libvirt's words; `None`: nothing.
    /// (`virConnectCompareHypervisorCPU`)
    pub fn lacking_cpu_features(
        &self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        virt_type: &str,
        cpu: &Element,
    ) -> Result<Option<String>, Error> {
        let emulator = emulator.map(|e| c_string("the emulator", e)).transpose()?;
        let arch = c_string("the architecture", arch)?;
        let machine = c_string("the machine type", machine)?;
        let virt_type = c_string("the domain type", virt_type)?;
        let cpu = c_string("the CPU definition", &cpu.to_string())?;
        match raw::compare_hypervisor_cpu(self.virt(), emulator.as_deref(), &arch, &machine, &virt_type, &cpu) {
            Ok(()) => Ok(None),
            Err(e) if e.code().to_raw() == CPU_INCOMPATIBLE => Ok(Some(e.message().to_owned())),
            Err(e) => Err(Error::libvirt("compare the guest's CPU with this host's", &e)),
        }
    }
}
