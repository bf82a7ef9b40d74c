//! What the daemons answer about their host.

use vmdr_proto::host::host_server::Host;
use vmdr_proto::host::*;

use super::*;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const CUT_UNIX: u64 = CUT_UNIX_NS / 1_000_000_000;

fn peer(name: &str, revoked_unix: u64) -> Peer {
    Peer {
        id: ID.into(),
        name: name.into(),
        paired_unix: CUT_UNIX,
        revoked_unix,
        expires_unix: CUT_UNIX + 1_000_000,
        addresses: vec!["a.example:7420".into()],
        connections: 2,
    }
}

#[tonic::async_trait]
impl Host for Daemon {
    async fn audit(&self, request: Request<AuditRequest>) -> Result<Response<AuditReply>, Status> {
        self.asked("audit", &request.into_inner().lines.to_string())?;
        let line = |second: u8, act: &str, outcome: &str, rest: &str| {
            format!(
                r#"{{"seq":{second},"time":"2026-01-31T12:00:0{second}.123Z","prev":"0","daemon":"{}","act":"{act}","actor":"uid 0 (pid 77)","outcome":"{outcome}"{rest},"hash":"f"}}"#,
                self.who
            )
        };
        let lines = match self.who {
            "agent" => vec![line(2, "Protect", "begun", r#","subject":"web1""#), "torn".to_owned()],
            _ => vec![
                line(1, "pair", "done", r#","detail":"with the token shown here""#),
                line(3, "connect", "refused", r#","detail":"site-c is revoked","count":7"#),
            ],
        };
        Ok(Response::new(AuditReply { daemon: self.who.into(), lines }))
    }

    async fn verify_audit(&self, _: Request<AuditRequest>) -> Result<Response<AuditVerdict>, Status> {
        self.asked("verify-audit", "")?;
        let fault =
            if self.who == "agent" { "" } else { "receiver-1.jsonl line 8: its hash does not match what it says" };
        let (daemon, hash, fault) = (self.who.into(), "ab".repeat(32), fault.into());
        Ok(Response::new(AuditVerdict { daemon, records: 7, first: 1, last: 7, hash, fault }))
    }

    async fn show_token(&self, request: Request<TokenRequest>) -> Result<Response<TokenReply>, Status> {
        self.asked("token", &request.into_inner().valid_seconds.to_string())?;
        Ok(Response::new(TokenReply { token: "AAAAAA-BBBBBB".into(), expires_unix: CUT_UNIX + 600 }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Peer>, Status> {
        let JoinRequest { address, token } = request.into_inner();
        self.asked("join", &format!("{address} {token}"))?;
        if token == "USED" {
            return Err(Status::failed_precondition(format!(
                "the host at {address} refused: the token was used already"
            )));
        }
        Ok(Response::new(peer("site-b", 0)))
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersReply>, Status> {
        self.asked("peers", "")?;
        Ok(Response::new(PeersReply {
            own_id: "f".repeat(64),
            own_expires_unix: CUT_UNIX + 7_776_000,
            own_authority_expires_unix: CUT_UNIX + 630_720_000,
            peers: vec![peer("site-a", 0), peer("site-c", CUT_UNIX + 5)],
            notices: vec!["the authority of peer site-a (0123456789ab) ends in 11 days".into()],
        }))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<Peer>, Status> {
        let LocateRequest { peer: wanted, address } = request.into_inner();
        self.asked("locate", &format!("{wanted} {address}"))?;
        Ok(Response::new(peer(&wanted, 0)))
    }

    async fn revoke(&self, request: Request<PeerRequest>) -> Result<Response<Peer>, Status> {
        let wanted = request.into_inner().peer;
        self.asked("revoke", &wanted)?;
        Ok(Response::new(peer(&wanted, CUT_UNIX)))
    }

    async fn rotate(&self, _: Request<RotateRequest>) -> Result<Response<RotateReply>, Status> {
        self.asked("rotate", "")?;
        Ok(Response::new(RotateReply { expires_unix: CUT_UNIX + 7_776_000 }))
    }
}
