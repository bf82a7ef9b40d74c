//! Two paired hosts and one receiver: what one may do with the other's domain, and what a paired client may not do at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Answer, Daemon, Stream, WAIT, delta, open, seed};
use tonic::Code;
use vmdr_daemon::ownership::{Event, Ownerships};
use vmdr_journal::{Control, FsDisk};
use vmdr_proto::control::{DomainRequest, GrantRequest, StatusRequest};
use vmdr_proto::replication::{
    DescribeRequest, GiveBackRequest, HashesRequest, NamePointRequest, OwnerRequest, ProbeRequest, RefusedCode,
    ReverseRequest, SettleRequest, hashes_request, to_receiver,
};
use vmdr_trust::Partner;

const UUID: &str = "22222222-1111-4111-8111-111111111111";
const OTHER: &str = "site-c";

async fn seeded(daemon: &Daemon) -> Stream {
    let mut agent = daemon.agent().await;
    let (mut stream, _) = Stream::welcome(&mut agent, UUID, 1).await;
    for part in seed(UUID, 1, 1, 7) {
        stream.send_part(part).await;
        stream.durable().await;
    }
    stream
}

fn reverse(generation: u64) -> ReverseRequest {
    // The layout of a machine with nothing in it.
    let layout = vmdr_codec::Layout::default().to_bytes().unwrap();
    ReverseRequest {
        domain_uuid: UUID.to_owned(),
        domain_name: "web".to_owned(),
        generation,
        layout,
        ..Default::default()
    }
}

/// Waits for a record of the receiver with all of these words.
async fn recorded(daemon: &Daemon, words: &[&str]) {
    let directory = daemon.directory.path().join("audit");
    let deadline = Instant::now() + WAIT;
    loop {
        let lines = vmdr_audit::last_lines(&directory, "receiver", 1000).unwrap();
        if lines.iter().any(|line| words.iter().all(|word| line.contains(word))) {
            return;
        }
        assert!(Instant::now() < deadline, "{words:?} is not in {lines:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_domain_is_its_owners_until_it_is_granted() {
    let mut daemon = Daemon::start().await;
    daemon.introduce(OTHER);
    let mut owners = seeded(&daemon).await;
    let mut other = daemon.agent_of(OTHER).await;
    // Neither read nor written nor told that it is there.
    let describe = || DescribeRequest { domain_uuid: UUID.to_owned() };
    assert_eq!(other.describe(describe()).await.unwrap_err().code(), Code::PermissionDenied);
    let hashes = HashesRequest {
        domain_uuid: UUID.to_owned(),
        epoch: 1,
        first: 0,
        units: 1,
        of: Some(hashes_request::Of::RamBlock(0)),
    };
    assert_eq!(other.hashes(hashes).await.unwrap_err().code(), Code::PermissionDenied);
    let probe = ProbeRequest { domain_uuid: UUID.to_owned(), ..ProbeRequest::default() };
    assert_eq!(other.probe(probe).await.unwrap_err().code(), Code::PermissionDenied);
    for plan in [false, true] {
        let owner = OwnerRequest { domain_uuid: UUID.to_owned(), plan };
        assert_eq!(other.owner(owner).await.unwrap_err().code(), Code::PermissionDenied);
    }
    for generation in [0, 1, 9] {
        let settle = SettleRequest { domain_uuid: UUID.to_owned(), generation, ..SettleRequest::default() };
        assert_eq!(other.settle(settle).await.unwrap_err().code(), Code::PermissionDenied);
        let back = GiveBackRequest { domain_uuid: UUID.to_owned(), generation };
        assert_eq!(other.give_back(back).await.unwrap_err().code(), Code::PermissionDenied);
        assert_eq!(other.reverse(reverse(generation)).await.unwrap_err().code(), Code::PermissionDenied);
    }
    let point = NamePointRequest { domain_uuid: UUID.to_owned(), name: "x".to_owned(), ..Default::default() };
    assert_eq!(other.name_point(point).await.unwrap_err().code(), Code::PermissionDenied);
    // Nor under another spelling of the same UUID.
    for spelt in [UUID.replace('-', ""), format!("{{{UUID}}}"), format!("urn:uuid:{UUID}")] {
        let refused = |code: Code| matches!(code, Code::PermissionDenied | Code::InvalidArgument);
        let settle = SettleRequest { domain_uuid: spelt.clone(), domain_name: "x".to_owned(), generation: 9 };
        let owner = OwnerRequest { domain_uuid: spelt.clone(), plan: true };
        let probe = ProbeRequest { domain_uuid: spelt.clone(), ..ProbeRequest::default() };
        for code in [
            other.settle(settle).await.unwrap_err().code(),
            other.owner(owner).await.unwrap_err().code(),
            other.probe(probe).await.unwrap_err().code(),
        ] {
            assert!(refused(code), "{spelt}: {code}");
        }
    }
    for generation in [0, 1, 9] {
        let (_, answer) = Stream::open(&mut other, UUID, generation).await;
        let Answer::Refused(refused) = answer else { panic!("{answer:?}") };
        assert_eq!((refused.code(), refused.position), (RefusedCode::Domain, None), "{}", refused.message);
    }
    recorded(&daemon, &["\"Describe\"", "\"refused\"", "site-c", UUID]).await;
    recorded(&daemon, &["\"Replicate\"", "\"refused\"", "site-c", UUID]).await;
    // The owner's stream, and its generation, are as they were.
    owners.send_part(delta(1, 2, 2)).await;
    assert_eq!(owners.durable().await.epoch, 2);
    drop(owners);

    // It is the owner's after a restart, too.
    daemon.kill();
    daemon.start_again().await;
    let mut other = daemon.agent_of(OTHER).await;
    assert_eq!(other.describe(describe()).await.unwrap_err().code(), Code::PermissionDenied);
    let grant = |withdraw| GrantRequest { domain: "web".to_owned(), peer: OTHER.to_owned(), withdraw };
    let granted = daemon.control().await.grant(grant(false)).await.unwrap().into_inner();
    assert!(granted.owner.starts_with("site-a (") && granted.granted[0].starts_with("site-c ("), "{granted:?}");
    assert_eq!(other.describe(describe()).await.unwrap().into_inner().position.unwrap().epoch, 2);
    let (mut stream, position) = Stream::welcome(&mut other, UUID, 1).await;
    assert_eq!(position.epoch, 2);
    stream.send_part(delta(1, 3, 3)).await;
    assert_eq!(stream.durable().await.epoch, 3);
    drop(stream);
    let (mut standing, _) = Stream::welcome(&mut other, UUID, 1).await;
    daemon.control().await.grant(grant(true)).await.unwrap();
    // What stood goes on no longer either.
    standing.send_part(delta(1, 4, 4)).await;
    assert_eq!(standing.refused().await.code(), RefusedCode::Sequence);
    assert_eq!(other.describe(describe()).await.unwrap_err().code(), Code::PermissionDenied);
    let nobody = GrantRequest { peer: "site-x".to_owned(), ..grant(false) };
    assert_eq!(daemon.control().await.grant(nobody).await.unwrap_err().code(), Code::NotFound);
    recorded(&daemon, &["\"Grant\"", "\"done\"", "\"web\""]).await;
    let points = daemon.control().await.points(DomainRequest { domain: "web".to_owned() }).await.unwrap().into_inner();
    assert_eq!(points.points[0].epoch, 3);
}

#[tokio::test]
async fn a_damaged_identity_or_audit_log_keeps_no_guest_from_being_activated() {
    let mut daemon = Daemon::start().await;
    drop(seeded(&daemon).await);
    daemon.kill();
    let identity = daemon.directory.path().join("identity");
    std::fs::write(identity.join("ca.pem"), "no key").unwrap();
    let audit = daemon.directory.path().join("audit");
    std::fs::remove_dir_all(&audit).unwrap();
    std::fs::write(&audit, "no directory").unwrap();
    daemon.start_again().await;
    let mut control = daemon.control().await;
    let status = control.status(StatusRequest::default()).await.unwrap().into_inner();
    for trouble in ["identity cannot be used", "audit log cannot be written"] {
        assert!(status.notices.iter().any(|notice| notice.contains(trouble)), "{:?}", status.notices);
    }
    let points = control.points(DomainRequest { domain: "web".to_owned() }).await.unwrap().into_inner();
    assert_eq!(points.points[0].epoch, 1);
    // Nothing of the old identity was replaced.
    assert_eq!(std::fs::read_to_string(identity.join("ca.pem")).unwrap(), "no key");
}

#[tokio::test]
async fn what_a_paired_client_forges_is_refused_and_recorded() {
    let daemon = Daemon::start().await;
    let mut stream = seeded(&daemon).await;
    stream.send_part(delta(1, 2, 2)).await;
    assert_eq!(stream.durable().await.epoch, 2);
    let mut agent = daemon.agent().await;
    // Replayed, reordered, forged, of an older generation; each ends its stream and changes nothing.
    for (part, code, word) in [
        (delta(1, 2, 9), RefusedCode::Sequence, "sequence"),
        (delta(1, 4, 9), RefusedCode::Sequence, "sequence"),
        (delta(1, 3, 9).damage(), RefusedCode::Corrupt, "corrupt"),
        (delta(0, 3, 9), RefusedCode::Fenced, "fenced"),
    ] {
        let (mut stream, position) = Stream::welcome(&mut agent, UUID, 1).await;
        assert_eq!(position.epoch, 2);
        stream.send_part(part).await;
        assert_eq!(stream.refused().await.code(), code);
        recorded(&daemon, &["\"Replicate\"", "\"refused\"", "site-a", UUID, &format!("{word}:")]).await;
    }
    // Truncated: the end says more chunks than there were.
    let (mut stream, _) = Stream::welcome(&mut agent, UUID, 1).await;
    let mut part = delta(1, 3, 9);
    let chunk = part.messages.iter().position(|message| matches!(message, to_receiver::Message::Chunk(_))).unwrap();
    part.messages.remove(chunk);
    stream.send_part(part).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Corrupt);
    // An opening that is none.
    let mut stream = Stream::bare(&mut agent).await;
    stream.send(to_receiver::Message::Open(open("../../etc/passwd", 1))).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Domain);
    recorded(&daemon, &["\"Replicate\"", "\"refused\"", "site-a", "domain:"]).await;
    let (mut stream, position) = Stream::welcome(&mut agent, UUID, 1).await;
    assert_eq!(position.epoch, 2);
    stream.send_part(delta(1, 3, 3)).await;
    assert_eq!(stream.durable().await.epoch, 3);
}

#[tokio::test]
async fn a_peer_cannot_have_a_guest_of_this_host_fenced() {
    let daemon = Daemon::start().await;
    daemon.introduce(OTHER);
    let ownerships = Ownerships::new(&daemon.ownerships(), &daemon.directory.path().join("marks"));
    let mut other = daemon.agent_of(OTHER).await;
    // Nothing of it is here, and nothing comes to be noted of it.
    for generation in [0, 1] {
        let back = GiveBackRequest { domain_uuid: UUID.to_owned(), generation };
        assert_eq!(other.give_back(back).await.unwrap_err().code(), Code::PermissionDenied);
    }
    assert_eq!(ownerships.get(UUID).unwrap(), None);
    // A guest that this host runs and protects elsewhere; the other is the first to send something of its UUID.
    ownerships.transition(UUID, "web", &Event::Protected(1), "protect").unwrap();
    let (mut stream, _) = Stream::welcome(&mut other, UUID, 1).await;
    for part in seed(UUID, 1, 1, 7) {
        stream.send_part(part).await;
        stream.durable().await;
    }
    drop(stream);
    assert_eq!(other.reverse(reverse(9)).await.unwrap_err().code(), Code::PermissionDenied);
    let own = |name: &str| daemon.trust(name).id().unwrap();
    let trust = vmdr_trust::Trust::open(
        &daemon.directory.path().join("identity"),
        vmdr_audit::Audit::open(&daemon.directory.path().join("another-audit"), "agent").unwrap(),
    )
    .unwrap();
    trust.set_partner(UUID, Some(&Partner { peer: own(common::AGENT), granted: false })).unwrap();
    assert_eq!(other.reverse(reverse(9)).await.unwrap_err().code(), Code::PermissionDenied);
    let record = ownerships.get(UUID).unwrap().unwrap();
    assert_eq!((record.may_run, record.generation), (true, 1));
    recorded(&daemon, &["\"Reverse\"", "\"refused\"", "site-c", UUID]).await;
    // The one that this host protects it to gets further: to libvirt, which is away. Not while another's is stored, though.
    let mut partner = daemon.agent().await;
    assert_eq!(partner.reverse(reverse(9)).await.unwrap_err().code(), Code::PermissionDenied);
    daemon.control().await.forget(DomainRequest { domain: UUID.to_owned() }).await.unwrap();
    assert_eq!(partner.reverse(reverse(9)).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(other.reverse(reverse(9)).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn what_was_received_before_hosts_were_paired_is_nobodys_until_it_is_said_whose() {
    let mut daemon = Daemon::start().await;
    drop(seeded(&daemon).await);
    daemon.kill();
    // As a version that knew of no peers has left it.
    let control = daemon.state().join(UUID);
    let uuid = uuid::Uuid::parse_str(UUID).unwrap();
    let mut record = Control::load(&FsDisk, &control, uuid.as_bytes()).unwrap();
    assert_eq!(record.owner, Some(daemon.trust(common::AGENT).id().unwrap()));
    record.owner = None;
    record.store(&FsDisk, &control).unwrap();
    daemon.start_again().await;
    let status = daemon.control().await.status(StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.notices.iter().any(|notice| notice.contains("vmdr peers grant web PEER")), "{:?}", status.notices);
    assert_eq!((status.domains[0].durable_epoch, status.domains[0].belongs_to.as_str()), (1, ""));
    let mut agent = daemon.agent().await;
    let (_, answer) = Stream::open(&mut agent, UUID, 1).await;
    let Answer::Refused(refused) = answer else { panic!("{answer:?}") };
    assert!(
        refused.code() == RefusedCode::Domain && refused.message.contains("vmdr peers grant"),
        "{}",
        refused.message
    );
    // Its points are there for the operator all the time.
    let points = daemon.control().await.points(DomainRequest { domain: "web".to_owned() }).await.unwrap().into_inner();
    assert_eq!(points.points.len(), 1);
    let grant = GrantRequest { domain: "web".to_owned(), peer: common::AGENT.to_owned(), withdraw: false };
    let granted = daemon.control().await.grant(grant).await.unwrap().into_inner();
    assert!(granted.owner.starts_with("site-a (") && granted.granted.is_empty(), "{granted:?}");
    let (mut stream, position) = Stream::welcome(&mut agent, UUID, 1).await;
    assert_eq!(position.epoch, 1);
    stream.send_part(delta(1, 2, 2)).await;
    assert_eq!(stream.durable().await.epoch, 2);
    // Its host is replaced: another peer is let in, and the one before no longer.
    daemon.introduce(OTHER);
    let grant = |peer: &str, withdraw| GrantRequest { domain: "web".to_owned(), peer: peer.to_owned(), withdraw };
    daemon.control().await.grant(grant(OTHER, false)).await.unwrap();
    let granted = daemon.control().await.grant(grant(common::AGENT, true)).await.unwrap().into_inner();
    assert!(granted.owner.starts_with("site-c (") && granted.granted.is_empty(), "{granted:?}");
    stream.send_part(delta(1, 3, 3)).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Sequence);
    let (_, answer) = Stream::open(&mut agent, UUID, 1).await;
    assert!(matches!(&answer, Answer::Refused(refused) if refused.code() == RefusedCode::Domain), "{answer:?}");
    daemon.control().await.grant(grant(common::AGENT, false)).await.unwrap();
    daemon.control().await.grant(grant(OTHER, true)).await.unwrap();
    let status = daemon.control().await.status(StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.notices.is_empty() && status.domains[0].belongs_to.starts_with("site-a ("), "{status:?}");
}
