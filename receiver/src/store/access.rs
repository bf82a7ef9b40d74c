//! Whose domain it is, as the control record has it.

use super::domain::Domain;
use super::{Store, StoreError};

/// The most peers that a domain is granted to.
const GRANTED_MAX: usize = 64;

/// Who may have to do with a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// The peer that seeded it.
    pub owner: Option<String>,
    /// Others.
    pub granted: Vec<String>,
    /// Nothing of it is durable.
    pub empty: bool,
}

impl Access {
    /// Whether this peer may.
    pub fn allows(&self, peer: &str) -> bool {
        match &self.owner {
            Some(owner) => owner == peer || self.granted.iter().any(|granted| granted == peer),
            None => self.empty || self.granted.iter().any(|granted| granted == peer),
        }
    }
}

impl Store {
    /// Who may have to do with a domain.
    pub fn access(&self, uuid: &str) -> Result<Access, StoreError> {
        Ok(self.domain(uuid)?.access())
    }

    /// Makes a peer the owner of a domain that has none, durably. Whether it may have to do with it now.
    pub fn claim(&self, uuid: &str, peer: &str) -> Result<bool, StoreError> {
        let domain = self.domain(uuid)?;
        let mut allowed = false;
        let access = domain.access();
        if access.owner.is_none() && access.empty {
            domain.change_control(|control| {
                // Somebody else may have been first.
                allowed = control.owner.get_or_insert_with(|| peer.to_owned()) == peer;
            })?;
            return Ok(allowed);
        }
        Ok(access.allows(peer))
    }

    /// Lets a peer in, or no longer, durably.
    pub fn grant(&self, uuid: &str, peer: &str, granted: bool) -> Result<Access, StoreError> {
        let domain = self.domain(uuid)?;
        let before = domain.access().granted;
        if granted && before.len() >= GRANTED_MAX && !before.iter().any(|known| known == peer) {
            let what = format!("it is granted to {GRANTED_MAX} peers already");
            return Err(StoreError::Busy { domain: uuid.to_owned(), what });
        }
        domain.change_control(|control| {
            control.granted.retain(|known| known != peer);
            if granted {
                control.granted.push(peer.to_owned());
            }
        })?;
        Ok(domain.access())
    }
}

impl Domain {
    fn access(&self) -> Access {
        let position = self.shared().position;
        let empty = position.epoch == 0 && position.open_epoch == 0;
        let control = self.control();
        Access { owner: control.owner.clone(), granted: control.granted.clone(), empty }
    }
}
