//! A guest of a silent host: taken when its lease has ended and this site is armed, and only then. The activation itself ends at a
//! libvirt that is not there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../../witness/etcd/tests/common/mod.rs"]
mod etcd;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{AGENT, Answer, Daemon, Stream, WAIT, seed};
use etcd::Server;
use rustix::process::Signal;
use vmdr_etcd::Etcd;
use vmdr_proto::control::{DomainRequest, DomainStatus, FailoverStatus, GrantRequest, StatusRequest};
use vmdr_proto::replication::{Arm, Disarm, HandOver, Heartbeat, RefusedCode, RestRequest, to_receiver};
use vmdr_witness::{Allowed, Claim, Over, Owner, View};

const UUID: &str = "22222222-1111-4111-8111-111111111111";
const BOUND: Duration = Duration::from_secs(3);
/// Longer than it takes from silence to an owner in the witness.
const LONG: Duration = Duration::from_secs(6);

struct Case {
    server: Server,
    daemon: Daemon,
    etcd: Etcd,
}

impl Case {
    async fn new() -> Self {
        Self::with("").await
    }

    /// With further lines of `[failover]`.
    async fn with(lines: &str) -> Self {
        let server = Server::start();
        let config = format!(
            "[witness]\nendpoints = [{:?}]\n[failover]\nafter_seconds = {}\n{lines}",
            server.url(),
            BOUND.as_secs()
        );
        let daemon = Daemon::start_with(&config, &[]).await;
        let etcd = server.connect().await;
        Case { server, daemon, etcd }
    }

    /// The agent's host, or another that was introduced.
    fn id(&self, name: &str) -> String {
        self.daemon.trust(name).id().unwrap()
    }

    fn me(&self) -> String {
        self.id("identity")
    }

    fn book(&self) -> PathBuf {
        self.daemon.state().join(UUID).join("failover.json")
    }

    /// The agent's host has its lease, as its owner, for so long.
    async fn lease(&self, ttl: Duration) -> Allowed {
        let claim = Claim { holder: self.id(AGENT), generation: 1, over: Over::Anything };
        self.etcd.claim(UUID, &claim, ttl).await.unwrap()
    }

    /// The same, which has ended.
    async fn ended_lease(&self) {
        self.lease(Duration::from_secs(60)).await;
        self.etcd.release(UUID, &self.id(AGENT)).await.unwrap();
    }

    async fn view(&self) -> View {
        self.etcd.look(UUID).await.unwrap()
    }

    /// A stream with a recovery point, and whether its Welcome said that this site is disarmed.
    async fn stream(&self) -> (Stream, bool) {
        let (mut stream, disarmed) = self.open(AGENT).await;
        for part in seed(UUID, 1, 1, 7) {
            stream.send_part(part).await;
        }
        while !stream.durable().await.last {}
        (stream, disarmed)
    }

    async fn open(&self, name: &str) -> (Stream, bool) {
        let mut agent = self.daemon.agent_of(name).await;
        match Stream::open(&mut agent, UUID, 1).await {
            (stream, Answer::Welcome(welcome)) => (stream, welcome.failover.expect("there is a witness").disarmed),
            (_, other) => panic!("{other:?}"),
        }
    }

    async fn armed(&self) -> Stream {
        let (mut stream, disarmed) = self.stream().await;
        assert!(disarmed);
        assert!(arm(&mut stream, 1).await);
        stream
    }

    async fn status(&self) -> DomainStatus {
        let request = StatusRequest { domain: UUID.to_owned() };
        self.daemon.control().await.status(request).await.unwrap().into_inner().domains.remove(0)
    }

    async fn failover(&self) -> FailoverStatus {
        self.status().await.failover.unwrap_or_default()
    }

    async fn wait_for(&self, what: &str, wanted: impl Fn(&FailoverStatus) -> bool) -> FailoverStatus {
        let deadline = Instant::now() + WAIT;
        loop {
            let now = self.failover().await;
            if wanted(&now) {
                return now;
            }
            assert!(Instant::now() < deadline, "not {what}: {now:?}\n{}", self.daemon.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the witness has given the guest to this site.
    async fn wait_taken(&self) {
        let owner = Some(Owner { generation: 2, holder: self.me() });
        let deadline = Instant::now() + WAIT;
        while self.view().await.owner != owner {
            assert!(Instant::now() < deadline, "not taken: {:?}\n{}", self.failover().await, self.daemon.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The stance, and that the witness has the agent's host as the owner.
    async fn assert_not_taken(&self, stance: &str) {
        let (view, now) = (self.view().await, self.failover().await);
        assert_eq!(view.owner, Some(Owner { generation: 1, holder: self.id(AGENT) }), "{now:?}");
        assert_eq!(now.stance, stance, "{now:?}");
    }

    async fn kill_and_start(&mut self) {
        self.daemon.kill();
        self.daemon.start_again().await;
    }
}

/// Whether it was done: what comes before the answer to a heartbeat behind it.
async fn ask(stream: &mut Stream, message: to_receiver::Message, number: u64, arm: bool) -> bool {
    stream.send(message).await;
    stream.send(to_receiver::Message::Heartbeat(Heartbeat { sent_unix_ns: number })).await;
    let mut done = false;
    loop {
        match stream.answer().await {
            Answer::Armed(n) if arm && n == number => done = true,
            Answer::Disarmed(n) if !arm && n == number => done = true,
            Answer::Heartbeat(_) => return done,
            other => panic!("{other:?}"),
        }
    }
}

async fn arm(stream: &mut Stream, number: u64) -> bool {
    ask(stream, to_receiver::Message::Arm(Arm { number }), number, true).await
}

async fn disarm(stream: &mut Stream, number: u64) -> bool {
    ask(stream, to_receiver::Message::Disarm(Disarm { number }), number, false).await
}

/// Says something for so long.
async fn beat(stream: &mut Stream, time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        stream.send(to_receiver::Message::Heartbeat(Heartbeat::default())).await;
        assert!(matches!(stream.answer().await, Answer::Heartbeat(_)));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_guest_is_taken_when_its_host_is_silent_and_its_lease_has_ended() {
    let mut case = Case::new().await;
    case.lease(Duration::from_secs(60)).await;
    let mut stream = case.armed().await;
    // Heard, and with a lease.
    beat(&mut stream, LONG).await;
    case.assert_not_taken("armed").await;
    // Silent, and with a lease.
    drop(stream);
    let held = case.wait_for("held up by the lease", |now| now.message.contains("has its lease")).await;
    assert!(held.message.contains(AGENT), "{held:?}");
    tokio::time::sleep(BOUND).await;
    case.assert_not_taken("armed").await;
    // Silent, and without.
    case.etcd.release(UUID, &case.id(AGENT)).await.unwrap();
    case.wait_taken().await;
    assert_eq!(case.view().await.lease, Some(case.me()));
    let now = case.wait_for("at libvirt", |now| now.message.contains("tried again")).await;
    assert_eq!(now.stance, "taking", "{now:?}");
    assert!(case.status().await.silent.is_empty() || case.status().await.silent.contains("automatic failover"));
    // Its host is out.
    assert_eq!(case.lease(Duration::from_secs(60)).await, Allowed::Outdated(2));
    // It does not stand down any more, and whoever kills it finds it going on.
    for _ in 0..2 {
        let (mut late, disarmed) = case.open(AGENT).await;
        assert!(!disarmed && !disarm(&mut late, 9).await && !arm(&mut late, 10).await);
        drop(late);
        case.kill_and_start().await;
        case.wait_for("at libvirt again", |now| now.stance == "taking" && now.message.contains("tried again")).await;
    }
    // Nobody forgets it by mistake.
    let refused = case.daemon.control().await.forget(DomainRequest { domain: UUID.to_owned() }).await.unwrap_err();
    assert!(refused.message().contains("being taken"), "{refused:?}");
    let audit = vmdr_audit::last_lines(&case.daemon.directory.path().join("audit"), "receiver", 1000).unwrap();
    for words in [["\"Failover\"", "armed by"], ["\"Failover\"", "taking: "], ["\"Activate\"", "automatic failover"]] {
        assert!(audit.iter().any(|line| words.iter().all(|word| line.contains(word))), "{words:?}: {audit:?}");
    }
}

#[tokio::test]
async fn one_that_is_disarmed_takes_nothing() {
    let mut case = Case::new().await;
    case.ended_lease().await;
    let mut stream = case.armed().await;
    assert!(disarm(&mut stream, 2).await);
    for again in [false, true] {
        if again {
            case.kill_and_start().await;
        }
        drop(stream);
        tokio::time::sleep(LONG).await;
        case.assert_not_taken("disarmed").await;
        let (next, disarmed) = case.open(AGENT).await;
        assert!(disarmed);
        stream = next;
    }
    // Armed again, also across a restart.
    assert!(arm(&mut stream, 3).await);
    case.kill_and_start().await;
    case.wait_taken().await;
}

#[tokio::test]
async fn an_older_stream_and_one_without_a_point_arm_nothing() {
    let case = Case::new().await;
    case.ended_lease().await;
    let (mut empty, disarmed) = case.open(AGENT).await;
    assert!(disarmed && !arm(&mut empty, 1).await, "nothing could be taken");
    let (mut old, _) = case.stream().await;
    let (mut new, _) = case.open(AGENT).await;
    old.send(to_receiver::Message::Arm(Arm { number: 2 })).await;
    assert_eq!(old.refused().await.code(), RefusedCode::Sequence);
    assert!(arm(&mut new, 3).await && disarm(&mut new, 4).await);
    case.assert_not_taken("disarmed").await;
}

/// What a host was told it goes by: another one that may send does not change that.
#[tokio::test]
async fn the_word_is_one_hosts() {
    let case = Case::new().await;
    case.daemon.introduce("other");
    let mut stream = case.armed().await;
    let grant = |withdraw, peer: &str| GrantRequest { domain: UUID.to_owned(), peer: peer.to_owned(), withdraw };
    case.daemon.control().await.grant(grant(false, "other")).await.unwrap();
    let (mut other, disarmed) = case.open("other").await;
    assert!(!disarmed && !disarm(&mut other, 1).await);
    drop(stream);
    (stream, _) = case.open(AGENT).await;
    assert!(disarm(&mut stream, 2).await);
    let (mut other, disarmed) = case.open("other").await;
    assert!(!disarmed && !arm(&mut other, 1).await, "the first runs its guest because this site is disarmed");
    // The operator says that it is the other's.
    case.daemon.control().await.grant(grant(true, AGENT)).await.unwrap();
    let (mut other, disarmed) = case.open("other").await;
    assert!(disarmed && arm(&mut other, 1).await);
}

#[tokio::test]
async fn a_witness_that_has_forgotten_gives_nothing_away() {
    let case = Case::new().await;
    let stream = case.armed().await;
    drop(stream);
    case.wait_for("a missing owner", |now| now.message.contains("wiped")).await;
    tokio::time::sleep(BOUND).await;
    assert_eq!((case.view().await, case.failover().await.stance.as_str()), (View::default(), "armed"));
}

#[tokio::test]
async fn an_etcd_that_is_away_is_waited_for() {
    let mut case = Case::new().await;
    case.ended_lease().await;
    let stream = case.armed().await;
    case.server.kill();
    drop(stream);
    let now = case.wait_for("an error", |now| now.message.contains("witness http")).await;
    assert_eq!(now.stance, "armed", "{now:?}");
    case.server.up();
    case.wait_taken().await;
}

/// A receiver that died when it had decided and the witness had not answered.
#[tokio::test]
async fn a_claim_of_before_a_restart_is_made_again_and_may_be_refused() {
    let mut case = Case::new().await;
    case.lease(Duration::from_secs(120)).await;
    drop(case.armed().await);
    case.daemon.kill();
    let armed = std::fs::read_to_string(case.book()).unwrap();
    std::fs::write(case.book(), armed.replace("\"armed\"", "\"taking\"")).unwrap();
    case.server.kill();
    case.daemon.start_again().await;
    let (mut stream, disarmed) = case.open(AGENT).await;
    assert!(!disarmed && !disarm(&mut stream, 1).await, "it may have been granted");
    case.wait_for("claiming", |now| now.stance == "taking" && now.message.contains("witness http")).await;
    // Its host has its lease: refused.
    case.server.up();
    case.wait_for("armed again", |now| now.stance == "armed").await;
    assert!(disarm(&mut stream, 2).await);
    case.assert_not_taken("disarmed").await;
}

#[tokio::test]
async fn a_fence_command_that_fails_holds_the_activation_back() {
    let directory = tempfile::tempdir().unwrap();
    let (program, told, open) =
        (directory.path().join("fence"), directory.path().join("told"), directory.path().join("open"));
    let script = format!(
        "#!/bin/sh\nenv | grep ^VMDR_ | sort > {told:?}\ntest -e {open:?} || {{ echo no power switch; exit 3; }}\n"
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut case = Case::with(&format!("fence_command = [{program:?}]\n")).await;
    case.ended_lease().await;
    drop(case.armed().await);
    for again in [false, true] {
        if again {
            case.kill_and_start().await;
        }
        let now = case.wait_for("a failure", |now| now.message.contains("no power switch")).await;
        assert_eq!(now.stance, "taking", "{now:?}");
        let deadline = Instant::now() + WAIT;
        while !case.status().await.silent.contains("no power switch") {
            assert!(Instant::now() < deadline, "no alarm: {:?}", case.status().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!case.daemon.log().contains("libvirt"), "{}", case.daemon.log());
    }
    let text = std::fs::read_to_string(&told).unwrap();
    for line in
        ["VMDR_DOMAIN=web", "VMDR_GENERATION=2", "VMDR_POINT=1-1", "VMDR_STAGE=fence", &format!("VMDR_UUID={UUID}")]
    {
        assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
    }
    for name in ["VMDR_PEER=", "VMDR_PEER_ID=", "VMDR_ATTEMPT=", "VMDR_POINT_AGE_SECONDS="] {
        assert!(text.lines().any(|l| l.starts_with(name)), "{name} is not in {text}");
    }
    std::fs::write(&open, "").unwrap();
    case.wait_for("at libvirt", |now| now.message.contains("libvirt")).await;
}

/// It could be anything: then nothing is promised, and nothing taken.
#[tokio::test]
async fn a_book_that_cannot_be_read_promises_nothing() {
    let mut case = Case::new().await;
    case.ended_lease().await;
    drop(case.armed().await);
    case.daemon.kill();
    std::fs::write(case.book(), "{").unwrap();
    case.daemon.start_again().await;
    let (mut stream, disarmed) = case.open(AGENT).await;
    assert!(!disarmed && !disarm(&mut stream, 1).await && !arm(&mut stream, 2).await);
    drop(stream);
    tokio::time::sleep(LONG).await;
    case.assert_not_taken("unknown").await;
    assert!(case.failover().await.message.contains("failover.json"));
    std::fs::remove_file(case.book()).unwrap();
    let (mut stream, _) = case.open(AGENT).await;
    assert!(disarm(&mut stream, 1).await && arm(&mut stream, 2).await);
}

#[tokio::test]
async fn who_rests_is_not_taken_and_who_was_not_read_is_not_silent() {
    let case = Case::new().await;
    case.ended_lease().await;
    let mut stream = case.armed().await;
    case.daemon.signal(Signal::STOP);
    tokio::time::sleep(LONG).await;
    case.daemon.signal(Signal::CONT);
    beat(&mut stream, Duration::from_secs(1)).await;
    case.assert_not_taken("armed").await;
    let mut agent = case.daemon.agent().await;
    let rest = |token| RestRequest { domain_uuid: UUID.to_owned(), why: "it was shut off".to_owned(), token };
    let token = agent.rest(rest(0)).await.unwrap().into_inner().token;
    assert!(agent.rest(rest(token)).await.unwrap().into_inner().applied);
    drop(stream);
    tokio::time::sleep(LONG).await;
    case.assert_not_taken("armed").await;
    assert!(case.failover().await.message.contains("on purpose"));
    // It sends again, and is silent again.
    drop(case.open(AGENT).await);
    case.wait_taken().await;
}

/// The witness learns of what was handed over when nobody holds its lease any more, also across a restart.
#[tokio::test]
async fn what_is_handed_over_is_not_taken_and_the_witness_learns_of_it() {
    let mut case = Case::new().await;
    case.lease(Duration::from_secs(60)).await;
    let mut stream = case.armed().await;
    stream.send(to_receiver::Message::HandOver(HandOver { generation: 2, epoch: 1, protect_back: false })).await;
    assert!(matches!(stream.answer().await, Answer::Taken(2)));
    stream.send(to_receiver::Message::Disarm(Disarm { number: 7 })).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Fenced);
    drop(stream);
    for again in [false, true] {
        if again {
            case.kill_and_start().await;
        }
        let now = case.wait_for("waiting for the lease", |now| now.message.contains("holds a lease")).await;
        assert!(now.stance == "disarmed" && now.message.contains("generation 2"), "{now:?}");
        case.assert_not_taken("disarmed").await;
    }
    case.etcd.release(UUID, &case.id(AGENT)).await.unwrap();
    case.wait_taken().await;
    let deadline = Instant::now() + WAIT;
    while case.book().exists() {
        assert!(Instant::now() < deadline, "{:?}", case.failover().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn without_a_witness_nothing_is_offered() {
    let daemon = Daemon::start().await;
    let mut agent = daemon.agent().await;
    let (mut stream, answer) = Stream::open(&mut agent, UUID, 1).await;
    assert!(matches!(answer, Answer::Welcome(welcome) if welcome.failover.is_none()));
    stream.send(to_receiver::Message::Arm(Arm { number: 1 })).await;
    assert_eq!(stream.refused().await.code(), RefusedCode::Corrupt);
}
