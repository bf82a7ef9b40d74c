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
    /// Whether this peer may ask about it, and send it.
    pub fn allows(&self, peer: &str) -> bool {
        self.is_of(peer) || (self.owner.is_none() && self.empty)
    }

    /// Whether it is this peer's, or granted to it.
    pub fn is_of(&self, peer: &str) -> bool {
        self.owner.as_deref() == Some(peer) || self.granted.iter().any(|granted| granted == peer)
    }
}

impl Store {
    /// Whether a guest was begun to be activated on what is stored of a domain.
    pub fn is_frozen(&self, uuid: &str) -> Result<bool, StoreError> {
        Ok(self.domain(uuid)?.shared().frozen)
    }

    /// Who may have to do with a domain.
    pub fn access(&self, uuid: &str) -> Result<Access, StoreError> {
        Ok(self.domain(uuid)?.access())
    }

    /// Makes a peer the owner of a domain of which nothing is durable and that has none, durably. Whether it may have to do
    /// with it now.
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

    /// Lets a peer in, or no longer, durably. A domain that is nobody's becomes its; one whose owner is not let in any more
    /// becomes that of the peer that was let in first. Who is not let in any more has no stream when this returns.
    pub fn grant(&self, uuid: &str, peer: &str, granted: bool) -> Result<Access, StoreError> {
        let domain = self.domain(uuid)?;
        let before = domain.access().granted;
        if granted && before.len() >= GRANTED_MAX && !before.iter().any(|known| known == peer) {
            let what = format!("it is granted to {GRANTED_MAX} peers already");
            return Err(StoreError::Busy { domain: uuid.to_owned(), what });
        }
        domain.change_control(|control| {
            control.granted.retain(|known| known != peer);
            if !granted && control.owner.as_deref() == Some(peer) {
                // Whoever was let in first is next.
                control.owner = (!control.granted.is_empty()).then(|| control.granted.remove(0));
            } else if granted && control.owner.is_none() {
                control.owner = Some(peer.to_owned());
            } else if granted && control.owner.as_deref() != Some(peer) {
                control.granted.push(peer.to_owned());
            }
        })?;
        if !granted {
            // Whoever may go on connects again.
            domain.cut_stream();
        }
        Ok(domain.access())
    }
}

impl Domain {
    fn cut_stream(&self) {
        let mut shared = self.shared();
        shared.stream += 1;
        shared.stream_open = false;
        self.changed.notify_all();
    }

    fn access(&self) -> Access {
        let position = self.shared().position;
        let empty = position.epoch == 0 && position.open_epoch == 0;
        let control = self.control();
        Access { owner: control.owner.clone(), granted: control.granted.clone(), empty }
    }
}
