//! Which peer may have to do with which domain.
//!
//! The first peer that opens a stream of a domain owns it, durably, in the domain's own control record; the operator can let others in
//! (`vmdr peers grant`). Nobody else learns that the domain is there: not how far it has come, not what it consists of; and
//! nobody else can write to it. A domain of which nothing is durable belongs to nobody yet.

use tonic::Status;
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_hypervisor::libvirt::Connection;
use vmdr_proto::control::{GrantReply, GrantRequest};
use vmdr_trust::{Partner, PeerInfo};

use crate::control::{find, store_status};
use crate::daemon::Receiver;
use crate::store::{Access, StoreError};

impl Receiver {
    /// Whether a peer may ask this about a domain. Blocks.
    pub fn authorise(&self, peer: &PeerInfo, act: &str, uuid: &str) -> Result<(), Status> {
        match self.store.access(uuid) {
            Ok(access) if access.allows(&peer.id) => Ok(()),
            // A question without a domain, and a domain of which nothing is here: there is nothing to keep from anybody.
            Err(StoreError::BadUuid(_) | StoreError::Unknown(_)) => Ok(()),
            Ok(_) => Err(self.deny(peer, act, uuid)),
            // It is not known whose it is.
            Err(error) => Err(store_status(&error)),
        }
    }

    /// Whether a peer may have a domain that ran here fenced, and protect it to here. Blocks.
    ///
    /// What is stored here decides where there is something. Else the peer has to be the one to which this host protected the
    /// domain, or the one that the operator has named; a domain that this host has never had to do with is nobody's yet.
    pub fn authorise_reverse(&self, peer: &PeerInfo, uuid: Uuid) -> Result<(), Status> {
        let id = uuid.to_string();
        match self.store.access(&id) {
            Ok(access) if access.owner.is_some() || !access.empty => return self.authorise(peer, "Reverse", &id),
            Ok(_) | Err(StoreError::Unknown(_)) => {}
            Err(error) => return Err(store_status(&error)),
        }
        let internal = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
        let recorded = self.ownerships.get(&id).map_err(|error| internal(&error))?.is_some();
        let partner = self.trust.partner(&id).map_err(|error| internal(&error))?;
        let allowed = match partner {
            Some(partner) if recorded || partner.granted => partner.peer == peer.id,
            _ if recorded => false,
            _ => {
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
            "domain {uuid} does not belong to this host at the backup site: if it should, `vmdr peers grant` there lets it in"
        );
        let entry = Entry::new(act, &peer.shown(), uuid, Outcome::Refused);
        self.audit.refused(entry.because("the domain belongs to another peer"));
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
