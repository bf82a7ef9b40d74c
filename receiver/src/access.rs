//! Which peer may have to do with which domain.
//!
//! The first peer that opens a stream of a domain owns it, durably, in the domain's own control record; the operator can let others in
//! (`vmdr peers grant`). Nobody else learns how far the domain has come or what it consists of, and nobody else can write to
//! it. A domain of which nothing is stored belongs to nobody yet. One that was imported, or received before hosts were paired, is
//! nobody's, and nobody's stream is taken, until the operator has said whose it is: it could be any peer's.

use tonic::Status;
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_daemon::ownership::Role;
use vmdr_hypervisor::libvirt::Connection;
use vmdr_proto::control::{GrantReply, GrantRequest};
use vmdr_trust::{Partner, PeerInfo};

use crate::control::{find, store_status};
use crate::daemon::Receiver;
use crate::store::{Access, DomainSummary, StoreError};

impl Receiver {
    /// Whether a peer may ask this about a domain. Blocks.
    pub fn authorise(&self, peer: &PeerInfo, act: &str, uuid: &str) -> Result<(), Status> {
        match self.store.access(uuid) {
            Ok(access) if access.allows(&peer.id) => Ok(()),
            // A question without a domain, and a domain of which nothing is here: there is nothing to keep from anybody.
            Err(StoreError::Unknown(_)) => Ok(()),
            Err(StoreError::BadUuid(_)) if uuid.is_empty() => Ok(()),
            Ok(_) => Err(self.deny(peer, act, uuid)),
            // It is not known whose it is.
            Err(error) => Err(store_status(&error)),
        }
    }

    /// The same of what changes which host runs a domain: something of it has to be stored here, and be the peer's. Blocks.
    pub fn authorise_stored(&self, peer: &PeerInfo, act: &str, uuid: &str) -> Result<(), Status> {
        match self.store.access(uuid) {
            Ok(access) if access.is_of(&peer.id) => Ok(()),
            Ok(_) | Err(StoreError::Unknown(_)) => Err(self.deny(peer, act, uuid)),
            Err(error) => Err(store_status(&error)),
        }
    }

    /// Whether a peer may have a domain that ran here fenced, and protect it to here. Blocks.
    ///
    /// It has to be the one to which this host protected the domain, or the one that the operator has named. Where this host
    /// has a guest because it activated what was stored here, it has to be the one that sent that. What is stored is not enough
    /// otherwise: any peer can be the first to send something of this UUID. A domain that is only defined here, and that vmdr
    /// has never had to do with, is nobody's to ask for; one that is not here at all is.
    pub fn authorise_reverse(&self, peer: &PeerInfo, uuid: Uuid) -> Result<(), Status> {
        let id = uuid.to_string();
        // It is going to send it.
        self.authorise(peer, "Reverse", &id)?;
        let stored = match self.store.access(&id) {
            Ok(access) => access.is_of(&peer.id),
            Err(StoreError::Unknown(_)) => false,
            Err(error) => return Err(store_status(&error)),
        };
        let internal = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
        let record = self.ownerships.get(&id).map_err(|error| internal(&error))?;
        let partner = self.trust.partner(&id).map_err(|error| internal(&error))?;
        let allowed = match (&record, partner) {
            (None, Some(partner)) if partner.granted => partner.peer == peer.id,
            (Some(_), Some(partner)) => partner.peer == peer.id,
            (Some(record), None) => {
                let activated = self.active_directory(uuid).read(uuid).map_err(|error| internal(&error))?.is_some();
                stored && (activated || record.role == Role::Fenced)
            }
            (None, _) => {
                let connection = Connection::open(&self.config.libvirt_uri)
                    .map_err(|error| Status::unavailable(format!("libvirt at the old site: {error}")))?;
                match connection.domain_by_uuid(&uuid) {
                    Ok(_) => false,
                    Err(error) if error.is_no_such_domain() => true,
                    Err(error) => return Err(internal(&error)),
                }
            }
        };
        if allowed { Ok(()) } else { Err(self.deny(peer, "Reverse", &id)) }
    }

    /// Makes a peer the owner of a domain that has none. Blocks.
    pub fn claim(&self, peer: &PeerInfo, uuid: &str) -> Result<(), Status> {
        match self.store.claim(uuid, &peer.id) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.deny(peer, "Replicate", uuid)),
            Err(error) => Err(store_status(&error)),
        }
    }

    fn deny(&self, peer: &PeerInfo, act: &str, uuid: &str) -> Status {
        let message = format!(
            "domain {uuid} does not belong to this host at the other site: if it should, `vmdr peers grant` there lets it in"
        );
        let entry = Entry::new(act, &peer.shown(), uuid, Outcome::Refused);
        self.audit.refused(entry.because("the domain is not this peer's"));
        Status::permission_denied(message)
    }

    /// A peer by its id, for people.
    pub fn peer_shown(&self, id: &str) -> String {
        let known = self.trust.peers().unwrap_or_default().into_iter().find(|peer| peer.id == id);
        known.map_or_else(|| format!("unknown ({})", id.get(..12).unwrap_or(id)), |peer| peer.shown())
    }
}

/// Lets a peer in, or no longer.
pub fn grant(receiver: &Receiver, request: &GrantRequest) -> Result<GrantReply, Status> {
    let peer = receiver.trust.find(&request.peer).map_err(|error| Status::not_found(error.to_string()))?;
    if peer.revoked_unix.is_some() && !request.withdraw {
        return Err(Status::failed_precondition(format!("peer {} is revoked", peer.shown())));
    }
    let stored = find(receiver, &request.domain);
    // Nothing of it is here: that peer may bring it.
    if let (Err(status), Ok(uuid)) = (&stored, Uuid::parse_str(&request.domain))
        && status.code() == tonic::Code::NotFound
    {
        let partner = Partner { peer: peer.id.clone(), granted: true };
        let noted = receiver.trust.set_partner(&uuid.to_string(), (!request.withdraw).then_some(&partner));
        noted.map_err(|error| Status::internal(error.to_string()))?;
        let granted = if request.withdraw { Vec::new() } else { vec![peer.shown()] };
        return Ok(GrantReply { owner: String::new(), granted });
    }
    let (uuid, summary) = stored?;
    let access = receiver.store.grant(&uuid.to_string(), &peer.id, !request.withdraw);
    let Access { owner, granted, .. } = access.map_err(|error: StoreError| store_status(&error))?;
    tracing::info!(domain = %summary.name, %uuid, peer = %peer.shown(), withdraw = request.withdraw, "granted");
    Ok(GrantReply {
        owner: owner.map(|id| receiver.peer_shown(&id)).unwrap_or_default(),
        granted: granted.iter().map(|id| receiver.peer_shown(id)).collect(),
    })
}

/// Domains that are nobody's, for an operator.
pub fn notices(receiver: &Receiver, domains: &[DomainSummary]) -> Vec<String> {
    let nobodys = |domain: &&DomainSummary| {
        domain.position.epoch > 0 && receiver.store.access(&domain.uuid).is_ok_and(|access| access.owner.is_none())
    };
    let say = |domain: &DomainSummary| {
        let name = if domain.name.is_empty() { &domain.uuid } else { &domain.name };
        format!(
            "{name} is no peer's (imported, or received before hosts were paired), and none may send it: \
             `vmdr peers grant {name} PEER` says whose it is"
        )
    };
    domains.iter().filter(nobodys).map(say).collect()
}
