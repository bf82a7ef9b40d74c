//! The receiver as a process: agents' streams, kills, refusals, the control socket, metrics.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Answer, DISK_BYTES, Daemon, PAGE, Part, Stream, WAIT, delta, open, page_of, program, seed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use vmdr_proto::control::{ActivateRequest, DomainRequest, StatusRequest};
use vmdr_proto::replication::{Heartbeat, Open, Position, ProbeRequest, RefusedCode, to_receiver};

const UUID: &str = "22222222-1111-4111-8111-111111111111";

async fn status(daemon: &Daemon) -> vmdr_proto::control::DomainStatus {
    let request = StatusRequest { domain: "web".to_owned() };
    let mut reply = daemon.control().await.status(request).await.unwrap().into_inner();
    assert_eq!(reply.domains.len(), 1);
    reply.domains.remove(0)
}

/// Waits until a status is as wanted.
async fn wait_for(daemon: &Daemon, what: &str, wanted: impl Fn(&vmdr_proto::control::DomainStatus) -> bool) {
    let deadline = Instant::now() + WAIT;
    loop {
        let now = status(daemon).await;
        if wanted(&now) {
            return;
        }
        assert!(Instant::now() < deadline, "not {what}: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn seeded(daemon: &Daemon) -> Stream {
    let mut agent = daemon.agent().await;
    let (mut stream, position) = Stream::welcome(&mut agent, UUID, 1).await;
    assert_eq!(position, Position { generation: 1, ..Position::default() });
    for part in seed(UUID, 1, 1, 7) {
        stream.send_part(part).await;
    }
    assert!(!stream.durable().await.last);
    let durable = stream.durable().await;
    assert_eq!((durable.generation, durable.epoch, durable.part, durable.last), (1, 1, 1, true));
    stream
}

#[tokio::test]
async fn what_is_acknowledged_survives_sigkill_and_is_in_the_standby() {
    let mut daemon = Daemon::start().await;
    let mut stream = seeded(&daemon).await;
    for epoch in 2..=4 {
        stream.send_part(delta(1, epoch, epoch as u8)).await;
        assert_eq!(stream.durable().await.epoch, epoch);
    }
    // An epoch of which the end never comes.
    let mut torn = delta(1, 5, 5).messages;
    torn.pop();
    stream.send_part(Part { messages: torn }).await;
    stream.send(to_receiver::Message::Heartbeat(Heartbeat { sent_unix_ns: 99 })).await;
    assert!(matches!(stream.answer().await, Answer::Heartbeat(Heartbeat { sent_unix_ns: 99 })));
    daemon.kill();
    daemon.start_again().await;

    let mut agent = daemon.agent().await;
    let (mut stream, position) = Stream::welcome(&mut agent, UUID, 0).await;
    assert_eq!((position.generation, position.epoch, position.open_epoch), (1, 4, 0));
    stream.send_part(delta(1, 5, 55)).await;
    assert_eq!(stream.durable().await.epoch, 5);

    let points = daemon.control().await.points(DomainRequest { domain: UUID.to_owned() }).await.unwrap().into_inner();
    assert_eq!(points.points[0].id, "1-5");
    assert_eq!(points.points[0].cut_unix_ns, common::CUT_UNIX_NS);
    drop(stream);
    assert_eq!(daemon.terminate().await, Some(0), "{}", daemon.log());
    daemon.start_again().await;
    wait_for(&daemon, "applied", |s| s.durable_epoch == 5).await;
    // A plan waits for everything durable to be applied, then fails because this libvirt does not exist.
    let request = ActivateRequest { domain: UUID.to_owned(), ..ActivateRequest::default() };
    let planned = daemon.control().await.plan_activation(request).await.unwrap_err();
    assert_eq!(planned.code(), Code::Unavailable, "{planned:?}");
    let images = daemon.images(UUID);
    let (ram, disk) = (images.join("ram/0.img"), images.join("disk/vda.raw"));
    let deadline = Instant::now() + WAIT;
    while page_of(&ram, 5) != [55; PAGE] && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (page, fill) in [(0, 7), (1, 7), (2, 2), (3, 3), (4, 4), (5, 55), (6, 7)] {
        assert_eq!(page_of(&ram, page), [fill; PAGE], "page {page}");
        let on_disk = if page == 1 || page == 6 { 0 } else { fill };
        assert_eq!(page_of(&disk, page), [on_disk; PAGE], "disk block {page}");
    }
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), DISK_BYTES);
}

#[tokio::test]
async fn what_is_wrong_is_refused_and_the_stream_ends() {
    let daemon = Daemon::start().await;
    let mut agent = daemon.agent().await;
    let cases = [
        (Open { protocol_version: 99, ..open(UUID, 1) }, RefusedCode::Version, "99"),
        (open("../../etc/passwd", 1), RefusedCode::Domain, "not the UUID"),
        (open("", 1), RefusedCode::Domain, "not the UUID"),
    ];
    for (open, code, word) in cases {
        let mut stream = Stream::bare(&mut agent).await;
        stream.send(to_receiver::Message::Open(open)).await;
        let refused = stream.refused().await;
        assert_eq!(refused.code(), code);
        assert!(refused.message.contains(word), "{}", refused.message);
        assert!(matches!(stream.answer().await, Answer::End(None)));
    }
    let mut stream = Stream::bare(&mut agent).await;
    stream.send(to_receiver::Message::Heartbeat(Heartbeat::default())).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Corrupt);

    let mut stream = seeded(&daemon).await;
    stream.send_part(delta(1, 2, 2).damage()).await;
    let refused = stream.refused().await;
    assert_eq!(refused.code(), RefusedCode::Corrupt, "{}", refused.message);
    assert_eq!(refused.position.unwrap().epoch, 1);
    assert!(matches!(stream.answer().await, Answer::End(_)));
    wait_for(&daemon, "in trouble", |s| s.last_error.contains("epoch 2")).await;

    let (mut stream, _) = Stream::welcome(&mut agent, UUID, 1).await;
    stream.send_part(delta(1, 3, 3)).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Sequence);
    // The same again, undamaged and in order.
    let (mut stream, position) = Stream::welcome(&mut agent, UUID, 1).await;
    assert_eq!(position.epoch, 1);
    stream.send_part(delta(1, 2, 2)).await;
    assert_eq!(stream.durable().await.epoch, 2);
}

#[tokio::test]
async fn an_older_generation_is_fenced_and_an_older_stream_cut_off() {
    let daemon = Daemon::start().await;
    let mut old = seeded(&daemon).await;
    let mut agent = daemon.agent().await;
    // The same host again, whose first connection is only half dead.
    let (mut newer, _) = Stream::welcome(&mut agent, UUID, 1).await;
    old.send_part(delta(1, 2, 2)).await;
    assert_eq!(old.refused().await.code(), RefusedCode::Sequence);
    newer.send_part(delta(1, 2, 2)).await;
    assert_eq!(newer.durable().await.epoch, 2);
    // Another host that owns the guest now.
    let (_owner, position) = Stream::welcome(&mut agent, UUID, 2).await;
    assert_eq!((position.generation, position.epoch), (2, 2));
    newer.send_part(delta(1, 3, 3)).await;
    assert_eq!(newer.refused().await.code(), RefusedCode::Fenced);
    let (_, answer) = Stream::open(&mut agent, UUID, 1).await;
    let Answer::Refused(refused) = answer else { panic!("{answer:?}") };
    assert_eq!(refused.code(), RefusedCode::Fenced);
    assert_eq!(refused.position.unwrap().generation, 2);
}

#[tokio::test]
async fn the_operator_sees_what_is_stored_and_forgets_it() {
    let daemon = Daemon::start().await;
    let mut control = daemon.control().await;
    let web = || DomainRequest { domain: "web".to_owned() };
    assert_eq!(control.points(web()).await.unwrap_err().code(), Code::NotFound);
    let none = control.status(StatusRequest::default()).await.unwrap().into_inner();
    assert_eq!(none.domains, []);
    assert_eq!(control.points(DomainRequest::default()).await.unwrap_err().code(), Code::InvalidArgument);

    let stream = seeded(&daemon).await;
    let now = status(&daemon).await;
    assert_eq!((now.role.as_str(), now.state.as_str(), now.uuid.as_str()), ("standby", "ready", UUID));
    assert_eq!((now.generation, now.durable_epoch), (1, 1));
    assert!(now.peer.starts_with("site-a (127.0.0.1:"), "{}", now.peer);
    assert!(now.stored_bytes > 0 && now.last_error.is_empty(), "{now:?}");

    let mut scrape = tokio::net::TcpStream::connect(daemon.metrics).await.unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut text = String::new();
    tokio::time::timeout(WAIT, scrape.read_to_string(&mut text)).await.unwrap().unwrap();
    for line in [
        format!("vmdr_receiver_domain_durable_epoch{{domain=\"web\",uuid=\"{UUID}\"}} 1"),
        format!("vmdr_receiver_domain_receiving{{domain=\"web\",uuid=\"{UUID}\"}} 1"),
        "vmdr_receiver_durable_parts_total 2".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }

    let busy = control.forget(web()).await.unwrap_err();
    assert_eq!(busy.code(), Code::FailedPrecondition, "{busy:?}");
    drop(stream);
    wait_for(&daemon, "disconnected", |s| s.peer.is_empty()).await;
    let freed = control.forget(web()).await.unwrap().into_inner();
    assert!(freed.freed_bytes > 0);
    assert!(!daemon.state().join(UUID).exists());
    assert_eq!(control.forget(web()).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn without_libvirt_a_probe_says_so() {
    let daemon = Daemon::start().await;
    let request = ProbeRequest { domain_uuid: UUID.to_owned(), ..ProbeRequest::default() };
    let error = daemon.agent().await.probe(request.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("libvirt"), "{}", error.message());
    let request = ProbeRequest { domain_uuid: "x".to_owned(), ..request };
    assert_eq!(daemon.agent().await.probe(request).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn one_receiver_per_state_directory_and_a_clean_end() {
    let mut daemon = Daemon::start().await;
    let second = daemon.start_beside();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1));
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("vmdr-receiver: ") && last.contains("in use by another receiver"), "{said}");
    // The first one is as it was.
    let reply = daemon.control().await.status(StatusRequest::default()).await.unwrap();
    assert_eq!(reply.into_inner().domains, []);

    let mut stream = seeded(&daemon).await;
    assert_eq!(daemon.terminate().await, Some(0), "{}", daemon.log());
    assert!(!daemon.socket().exists());
    assert!(matches!(stream.answer().await, Answer::End(_)));
    // One that was killed leaves its socket behind.
    daemon.start_again().await;
    daemon.kill();
    assert!(daemon.socket().exists());
    daemon.start_again().await;
}

#[test]
fn a_wrong_configuration_is_one_line_and_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("receiver.toml");
    for (text, part) in [
        ("listen = 7420\n", "receiver.toml:1:10: "),
        ("# all right so far\nspace_reserve = 1\n", "receiver.toml:2:1: unknown field `space_reserve`"),
        ("state_dir = \"/nowhere\n", "receiver.toml:1:"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = program().arg("--config").arg(&file).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.lines().count() == 1 && said.contains(part), "{text:?}: {said}");
    }
    std::fs::write(&file, "").unwrap();
    let output = program().arg("--check").arg("--config").arg(&file).output().unwrap();
    assert!(output.status.success());
}
