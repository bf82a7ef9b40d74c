//! `vmdr prepare`: a QMP socket of vmdr's own, from the domain's next start.
//!
//! libvirt's monitor passthrough takes a domain job for each command and lets other API calls in between; a socket of
//! one's own does not, and is faster. It is an argument on QEMU's command line, in the persistent definition.

use std::path::{Path, PathBuf};

use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{add_own_qmp_socket, own_qmp_socket, qmp_socket_path};
use vmdr_hypervisor::libvirt::{Connection, Domain};

use super::confinement;

/// What `prepare` did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The persistent definition got the socket now; `false`: it had it.
    pub changed: bool,
    /// The domain runs without the socket until it is shut down and started (a reboot from within is not enough).
    pub restart_needed: bool,
    /// The socket.
    pub socket: PathBuf,
}

/// Why a domain was not prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// There is no definition that could be changed.
    #[error("{0} is transient, it has no persistent definition: `virsh define` one, then prepare it")]
    Transient(String),
    /// The guest could not be started with the socket.
    #[error("AppArmor would keep {domain} from starting with a socket of vmdr's: {remedy}")]
    Confined {
        /// The domain.
        domain: String,
        /// What to do.
        remedy: String,
    },
    /// libvirt refused.
    #[error(transparent)]
    Hypervisor(#[from] Error),
}

/// Adds the socket to the domain's persistent definition, unless it is there. The running guest is not touched.
pub fn prepare(connection: &Connection, domain: &Domain) -> Result<Prepared, PrepareError> {
    if !domain.is_persistent()? {
        return Err(PrepareError::Transient(domain.name().to_owned()));
    }
    let mut definition = domain.inactive_xml()?;
    let changed = add_own_qmp_socket(&mut definition).map_err(Error::from)?;
    if changed {
        let drivers = confinement::drivers(&connection.capabilities()?);
        let rules = || confinement::rules_present(Path::new(confinement::LOCAL_RULES));
        if drivers.iter().any(|d| d == "apparmor") && !rules() {
            return Err(PrepareError::Confined { domain: domain.name().to_owned(), remedy: confinement::remedy() });
        }
        connection.define(&definition)?;
    }
    let active = domain.state()?.0.is_active();
    let restart_needed = active && own_qmp_socket(&domain.live_xml()?).is_none();
    Ok(Prepared { changed, restart_needed, socket: qmp_socket_path(&domain.uuid()) })
}
