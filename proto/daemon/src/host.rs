//! The service that both daemons have: about their host, not about guests.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tonic::{Request, Response, Status};
use vmdr_proto::host::host_server::Host;
use vmdr_proto::host::{
    AuditReply, AuditRequest, AuditVerdict, JoinRequest, LocateRequest, Peer, PeerRequest, PeersReply, PeersRequest,
    RotateReply, RotateRequest, TokenReply, TokenRequest,
};
use vmdr_trust::{TOKEN_LIFE, Token, Trust, TrustError, pair};

/// Records shown unless asked for otherwise, and at most.
const LINES: u32 = 100;
const LINES_MAX: u32 = 10_000;
/// The longest address taken.
const ADDRESS_BYTES_MAX: usize = 512;

/// The service of one daemon.
#[derive(Debug, Clone)]
pub struct HostService {
    daemon: &'static str,
    trust: Trust,
    listening: bool,
}

impl HostService {
    /// For the daemon of this name.
    pub fn new(daemon: &'static str, trust: Trust) -> Self {
        Self { daemon, trust, listening: false }
    }

    /// Other hosts connect to this daemon: it can show tokens.
    #[must_use]
    pub fn listening(self) -> Self {
        Self { listening: true, ..self }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<Response<T>, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Status::internal(format!("the request ended by itself: {error}")))?.map(Response::new)
}

fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

#[tonic::async_trait]
impl Host for HostService {
    async fn audit(&self, request: Request<AuditRequest>) -> Result<Response<AuditReply>, Status> {
        let lines = match request.into_inner().lines {
            0 => LINES,
            lines => lines.min(LINES_MAX),
        };
        let (directory, daemon) = (self.trust.audit().directory().to_owned(), self.daemon);
        blocking(move || {
            let lines = vmdr_audit::last_lines(&directory, daemon, lines as usize).map_err(internal)?;
            Ok(AuditReply { daemon: daemon.to_owned(), lines })
        })
        .await
    }

    async fn verify_audit(&self, _: Request<AuditRequest>) -> Result<Response<AuditVerdict>, Status> {
        let (directory, daemon) = (self.trust.audit().directory().to_owned(), self.daemon);
        blocking(move || {
            let verdict = vmdr_audit::verify(&directory, daemon).map_err(internal)?;
            Ok(AuditVerdict {
                daemon: verdict.daemon,
                records: verdict.records,
                first: verdict.first,
                last: verdict.last,
                hash: verdict.hash,
                fault: verdict.fault.map(|fault| fault.to_string()).unwrap_or_default(),
            })
        })
        .await
    }

    async fn show_token(&self, request: Request<TokenRequest>) -> Result<Response<TokenReply>, Status> {
        if !self.listening {
            let message = "other hosts connect to a receiver: `vmdr pair` on a host where one runs, and join from here";
            return Err(Status::failed_precondition(message));
        }
        let life = match request.into_inner().valid_seconds {
            0 => TOKEN_LIFE,
            seconds => Duration::from_secs(u64::from(seconds)),
        };
        let trust = self.trust.clone();
        blocking(move || {
            let token = trust.show_token(life).map_err(status)?;
            Ok(TokenReply { token: token.to_string(), expires_unix: unix(SystemTime::now() + life) })
        })
        .await
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Peer>, Status> {
        let request = request.into_inner();
        let token: Token = request.token.parse().map_err(Status::invalid_argument)?;
        let peer = pair::join(&self.trust, &token, &request.address).await.map_err(status)?;
        let trust = self.trust.clone();
        blocking(move || Ok(shown(&trust, &peer))).await
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersReply>, Status> {
        let trust = self.trust.clone();
        blocking(move || {
            let (leaf, authority) = trust.good_until().map_err(status)?;
            let peers = trust.peers().map_err(status)?;
            Ok(PeersReply {
                own_id: trust.id().map_err(status)?,
                own_expires_unix: unix(leaf),
                own_authority_expires_unix: unix(authority),
                peers: peers.iter().map(|peer| shown(&trust, peer)).collect(),
                notices: trust.notices(),
            })
        })
        .await
    }

    async fn revoke(&self, request: Request<PeerRequest>) -> Result<Response<Peer>, Status> {
        let (trust, wanted) = (self.trust.clone(), request.into_inner().peer);
        blocking(move || Ok(shown(&trust, &trust.revoke(&wanted).map_err(status)?))).await
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<Peer>, Status> {
        let (trust, LocateRequest { peer, address }) = (self.trust.clone(), request.into_inner());
        if address.is_empty() || address.len() > ADDRESS_BYTES_MAX {
            return Err(Status::invalid_argument("an address is HOST:PORT"));
        }
        blocking(move || Ok(shown(&trust, &trust.locate(&peer, &address).map_err(status)?))).await
    }

    async fn rotate(&self, _: Request<RotateRequest>) -> Result<Response<RotateReply>, Status> {
        let trust = self.trust.clone();
        blocking(move || Ok(RotateReply { expires_unix: unix(trust.rotate().map_err(status)?) })).await
    }
}

fn shown(trust: &Trust, peer: &vmdr_trust::Peer) -> Peer {
    Peer {
        id: peer.id.clone(),
        name: peer.name.clone(),
        paired_unix: peer.paired_unix,
        revoked_unix: peer.revoked_unix.unwrap_or(0),
        expires_unix: peer.good_until().map(unix).unwrap_or(0),
        addresses: peer.addresses.clone(),
        connections: u32::try_from(trust.connections(&peer.id)).unwrap_or(u32::MAX),
    }
}

fn unix(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn status(error: TrustError) -> Status {
    let message = error.to_string();
    match error {
        TrustError::NoPeer(_) => Status::not_found(message),
        TrustError::Refused(_) => Status::failed_precondition(message),
        _ => Status::internal(message),
    }
}

/// What Prometheus is told of the host: certificates that end, and the audit log.
pub fn metrics(trust: &Trust) -> String {
    let mut out = String::new();
    let mut family = |name: &str, help: &str, values: &[(String, f64)]| {
        out.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for (labels, value) in values {
            out.push_str(&format!("{name}{labels} {value}\n"));
        }
    };
    let now = SystemTime::now();
    // Negative once it is over.
    let left = |until: SystemTime| match until.duration_since(now) {
        Ok(left) => left.as_secs_f64(),
        Err(over) => -over.duration().as_secs_f64(),
    };
    let plain = |value: f64| vec![(String::new(), value)];
    let (own, authority) = match trust.good_until() {
        Ok((own, authority)) => (plain(left(own)), plain(left(authority))),
        Err(_) => (Vec::new(), Vec::new()),
    };
    family("vmdr_certificate_seconds_left", "Until this host's certificate ends.", &own);
    family("vmdr_authority_seconds_left", "Until this host's authority ends.", &authority);
    // Names of peers are letters, digits, dots, hyphens and underscores.
    let peers = trust.peers().unwrap_or_default();
    let peers = peers.iter().filter(|peer| peer.revoked_unix.is_none());
    let of_peers = peers.filter_map(|peer| {
        Some((format!("{{peer=\"{}\",id=\"{}\"}}", peer.name, peer.short()), left(peer.good_until().ok()?)))
    });
    let of_peers: Vec<(String, f64)> = of_peers.collect();
    family("vmdr_peer_authority_seconds_left", "Until the authority of a peer ends.", &of_peers);
    let audit = trust.audit();
    family("vmdr_audit_records", "Records written to the audit log.", &plain(audit.sequence() as f64));
    let failing = f64::from(u8::from(audit.trouble().is_some()));
    family("vmdr_audit_failing", "1 while the audit log cannot be written.", &plain(failing));
    out
}
