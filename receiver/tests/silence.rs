//! Alarms where nothing is heard of an agent: raised, told, ended; and when there is none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{AGENT, Daemon, Stream, WAIT, delta, seed};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmdr_proto::control::{DomainRequest, DomainStatus, StatusRequest};
use vmdr_proto::replication::{Heartbeat, RestReply, RestRequest, to_receiver};

const UUID: &str = "22222222-1111-4111-8111-111111111111";
const BOUND: Duration = Duration::from_secs(3);

/// A receiver whose alarms run a program that writes what it is told into a file, one run after another.
async fn receiver(directory: &tempfile::TempDir) -> (Daemon, PathBuf) {
    let (program, told) = (directory.path().join("hook"), directory.path().join("told"));
    std::fs::write(&program, format!("#!/bin/sh\nenv | grep ^VMDR_ | sort >> {told:?}\necho end >> {told:?}\n"))
        .unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = format!("[alarm]\nafter_seconds = {}\nhook = [{program:?}]\n", BOUND.as_secs());
    (Daemon::start_with(&config, &[]).await, told)
}

async fn status(daemon: &Daemon) -> DomainStatus {
    let request = StatusRequest { domain: UUID.to_owned() };
    daemon.control().await.status(request).await.unwrap().into_inner().domains.remove(0)
}

async fn wait_for(daemon: &Daemon, what: &str, wanted: impl Fn(&DomainStatus) -> bool) -> DomainStatus {
    let deadline = Instant::now() + WAIT;
    loop {
        let now = status(daemon).await;
        if wanted(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "not {what}: {now:?}\n{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the program was told, once it has run so often.
async fn told(file: &PathBuf, runs: usize) -> String {
    let deadline = Instant::now() + WAIT;
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text.lines().filter(|line| *line == "end").count() >= runs {
            return text;
        }
        assert!(Instant::now() < deadline, "the hook has not run {runs} times: {text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn metric(daemon: &Daemon, name: &str) -> Option<f64> {
    let mut scrape = tokio::net::TcpStream::connect(daemon.metrics).await.unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    scrape.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find(|line| line.starts_with(name) && line.contains(UUID))?;
    line.rsplit(' ').next()?.parse().ok()
}

async fn protected(daemon: &Daemon) -> Stream {
    let mut agent = daemon.agent().await;
    let (mut stream, _) = Stream::welcome(&mut agent, UUID, 1).await;
    for part in seed(UUID, 1, 1, 7) {
        stream.send_part(part).await;
    }
    while !stream.durable().await.last {}
    stream
}

fn resting(why: &str, token: u64) -> RestRequest {
    RestRequest { domain_uuid: UUID.to_owned(), why: why.to_owned(), token }
}

async fn rest(daemon: &Daemon, token: u64) -> RestReply {
    daemon.agent().await.rest(resting("its protection is suspended", token)).await.unwrap().into_inner()
}

async fn beat(stream: &mut Stream) {
    stream.send(to_receiver::Message::Heartbeat(Heartbeat::default())).await;
    stream.answer().await;
}

#[tokio::test]
async fn silence_is_an_alarm_that_ends_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, file) = receiver(&directory).await;
    let mut stream = protected(&daemon).await;
    // Heard for longer than the bound: no alarm, whether there is an epoch or not.
    let begun = Instant::now();
    while begun.elapsed() < BOUND + Duration::from_secs(2) {
        beat(&mut stream).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(status(&daemon).await.silent, "");
    assert_eq!(metric(&daemon, "vmdr_receiver_domain_alarm").await, Some(0.0));
    assert!(!file.exists());

    // The connection stands and says nothing: silent all the same.
    let silent = wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
    assert!(silent.silent_seconds >= BOUND.as_secs_f64(), "{silent:?}");
    for words in ["nothing was heard", "(bound 3 s)", "newest recovery point is 1-1", "not known"] {
        assert!(silent.silent.contains(words), "{}", silent.silent);
    }
    assert!(silent.advice.contains("vmdr activate") && silent.state == "ready", "{silent:?}");
    assert_eq!(metric(&daemon, "vmdr_receiver_domain_alarm").await, Some(1.0));
    assert!(metric(&daemon, "vmdr_receiver_domain_silent_seconds").await.unwrap() >= BOUND.as_secs_f64());
    let text = told(&file, 1).await;
    for line in ["VMDR_ALARM=raised", &format!("VMDR_UUID={UUID}"), "VMDR_POINT=1-1", "VMDR_STAGE=alarm"] {
        assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
    }
    for name in ["VMDR_DOMAIN=", "VMDR_REASON=", "VMDR_PEER=", "VMDR_HEARD_UNIX=1", "VMDR_SILENT_SECONDS="] {
        assert!(text.lines().any(|l| l.starts_with(name)), "{name} is not in {text}");
    }

    stream.send_part(delta(1, 2, 2)).await;
    stream.durable().await;
    wait_for(&daemon, "heard again", |s| s.silent.is_empty()).await;
    let text = told(&file, 2).await;
    assert!(text.contains("VMDR_ALARM=ended"), "{text}");
    let audit = vmdr_audit::last_lines(&daemon.directory.path().join("audit"), "receiver", 1000).unwrap();
    for word in ["raised: nothing was heard", "ended: "] {
        assert!(audit.iter().any(|line| line.contains("Alarm") && line.contains(word)), "{audit:?}");
    }
}

#[tokio::test]
async fn a_restart_does_not_forget_to_wait() {
    let directory = tempfile::tempdir().unwrap();
    let (mut daemon, _) = receiver(&directory).await;
    drop(protected(&daemon).await);
    daemon.kill();
    daemon.start_again().await;
    let silent = wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
    assert!(silent.silent.contains("since this receiver was started"), "{}", silent.silent);
}

#[tokio::test]
async fn who_says_that_it_rests_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let (mut daemon, file) = receiver(&directory).await;
    drop(protected(&daemon).await);
    daemon.introduce("other");
    let denied = daemon.agent_of("other").await.rest(resting("no", 0)).await.unwrap_err();
    assert_eq!(denied.code(), tonic::Code::PermissionDenied, "{AGENT}'s alone: {denied:?}");
    let token = rest(&daemon, 0).await.token;
    assert!(rest(&daemon, token).await.applied);
    for again in [false, true] {
        if again {
            daemon.kill();
            daemon.start_again().await;
        }
        tokio::time::sleep(BOUND + Duration::from_secs(2)).await;
        let now = status(&daemon).await;
        assert!(now.silent.is_empty() && now.advice.contains("its protection is suspended"), "{now:?}");
        assert_eq!(metric(&daemon, "vmdr_receiver_domain_silent_seconds").await, None);
    }
    assert!(!file.exists());
    // It sends again, and is waited for again.
    let mut agent = daemon.agent().await;
    drop(Stream::welcome(&mut agent, UUID, 1).await);
    wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
}

/// What an agent said before it opened a stream, and arrives after it.
#[tokio::test]
async fn a_word_of_resting_that_comes_late_silences_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, _) = receiver(&directory).await;
    drop(protected(&daemon).await);
    let token = rest(&daemon, 0).await.token;
    let mut agent = daemon.agent().await;
    let (stream, _) = Stream::welcome(&mut agent, UUID, 1).await;
    for late in [0, token] {
        let reply = rest(&daemon, late).await;
        assert!(!reply.applied && reply.token != token, "{reply:?}");
    }
    drop(stream);
    let silent = wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
    assert!(silent.advice.contains("vmdr activate"), "{silent:?}");
    // What is said now ends it.
    let token = rest(&daemon, 0).await.token;
    assert!(rest(&daemon, token).await.applied);
    wait_for(&daemon, "over", |s| s.silent.is_empty()).await;
}

#[tokio::test]
async fn an_alarm_ends_with_its_domain() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, file) = receiver(&directory).await;
    drop(protected(&daemon).await);
    wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
    daemon.control().await.forget(DomainRequest { domain: UUID.to_owned() }).await.unwrap();
    let text = told(&file, 2).await;
    assert!(text.contains("VMDR_ALARM=ended"), "{text}");
    let audit = vmdr_audit::last_lines(&daemon.directory.path().join("audit"), "receiver", 1000).unwrap();
    assert!(audit.iter().any(|line| line.contains("Alarm") && line.contains("ended: ")), "{audit:?}");
}

/// While the receiver stands still nobody can be heard.
#[tokio::test]
async fn a_receiver_that_was_stopped_does_not_blame_its_agents() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, file) = receiver(&directory).await;
    let mut stream = protected(&daemon).await;
    for _ in 0..2 {
        beat(&mut stream).await;
        daemon.signal(Signal::STOP);
        tokio::time::sleep(BOUND + Duration::from_secs(2)).await;
        daemon.signal(Signal::CONT);
        // Long enough that it has looked.
        tokio::time::sleep(Duration::from_millis(800)).await;
        assert_eq!(status(&daemon).await.silent, "");
    }
    assert!(!file.exists(), "{}", std::fs::read_to_string(&file).unwrap());
    // It counts all the same.
    wait_for(&daemon, "an alarm", |s| !s.silent.is_empty()).await;
}
