//! Two paired hosts and one receiver: what one may do with the other's domain, and what a paired client may not do at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Answer, Daemon, Stream, WAIT, delta, open, seed};
use tonic::Code;
use vmdr_proto::control::{DomainRequest, GrantRequest};
use vmdr_proto::replication::{DescribeRequest, HashesRequest, ProbeRequest, RefusedCode, hashes_request, to_receiver};

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
    daemon.control().await.grant(grant(true)).await.unwrap();
    assert_eq!(other.describe(describe()).await.unwrap_err().code(), Code::PermissionDenied);
    let nobody = GrantRequest { peer: "site-x".to_owned(), ..grant(false) };
    assert_eq!(daemon.control().await.grant(nobody).await.unwrap_err().code(), Code::NotFound);
    recorded(&daemon, &["\"Grant\"", "\"done\"", "\"web\""]).await;
    let points = daemon.control().await.points(DomainRequest { domain: "web".to_owned() }).await.unwrap().into_inner();
    assert_eq!(points.points[0].epoch, 3);
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
