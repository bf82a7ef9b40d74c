//! The driver with a real etcd; the backup site is played by the test.

use std::sync::mpsc::{Receiver, channel};

use tokio::sync::mpsc::Receiver as Sent;
use vmdr_witness::Time;

use self::common::{Server, WAIT};
use super::*;
use crate::registry::Mode;

#[path = "../../../witness/etcd/tests/common/mod.rs"]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod common;

const UUID: &str = "22222222-1111-4111-8111-111111111111";

struct Site {
    directory: tempfile::TempDir,
    config: Arc<Config>,
}

impl Site {
    fn new(etcd: &Server) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let witness = vmdr_etcd::Config { lease_seconds: 5, timeout_ms: 500, ..etcd.config() };
        let config = Config {
            ownership_dir: directory.path().join("domains"),
            runtime_dir: directory.path().join("shim"),
            libvirt_uri: "test:///default".to_owned(),
            witness,
            ..Config::default()
        };
        Self { directory, config: Arc::new(config) }
    }

    fn permission(&self, may: May) -> Permission {
        open(&self.directory.path().join("one.may"), may).unwrap()
    }

    fn start(&self) -> (Failover, Receiver<Input>) {
        let protection = Protection {
            name: "one".to_owned(),
            uuid: UUID.to_owned(),
            receiver: "b:7420".to_owned(),
            interval_ms: 100,
            generation: 1,
            fenced: false,
            id: String::new(),
            suspended: None,
            application_every_seconds: 0,
            holds_to_move: false,
            moving: None,
            failover: Mode::Auto,
        };
        let (inputs, heard) = channel();
        let runtime = tokio::runtime::Handle::current();
        let path = self.directory.path().join("one.may");
        let failover =
            Failover::start_with(&self.config, &protection, "a".to_owned(), inputs, &runtime, &path, false).unwrap();
        (failover, heard)
    }
}

/// The backup's end of a stream.
struct Backup {
    stream: u64,
    sent: Sent<ToReceiver>,
}

impl Backup {
    fn open(failover: &Failover, disarmed: bool) -> Self {
        let stream = failover.opening();
        let (sender, sent) = mpsc::channel(8);
        failover.opened(stream, Some(disarmed), sender);
        Self { stream, sent }
    }

    async fn next(&mut self) -> to_receiver::Message {
        let sent = tokio::time::timeout(WAIT, self.sent.recv()).await.expect("nothing was sent");
        sent.expect("the driver is gone").message.unwrap()
    }

    async fn arm(&mut self) -> u64 {
        loop {
            match self.next().await {
                to_receiver::Message::Arm(arm) => return arm.number,
                to_receiver::Message::Disarm(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn disarm(&mut self) -> u64 {
        loop {
            match self.next().await {
                to_receiver::Message::Disarm(disarm) => return disarm.number,
                to_receiver::Message::Arm(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < until, "waited for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backup_is_armed_with_a_lease_and_stands_down_without_one() {
    let mut etcd = Server::start();
    let site = Site::new(&etcd);
    let (failover, _heard) = site.start();
    let permission = site.permission(May::Always);
    // A lease alone is no permission for a host that has not asked since it was started.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(permission.may(), May::Never);
    assert!(failover.status().message.contains("stands still"), "{:?}", failover.status());
    let mut backup = Backup::open(&failover, true);
    let number = backup.arm().await;
    // It was in force before that was sent.
    let end = match permission.may() {
        May::Until(end) => end,
        other => panic!("{other:?}"),
    };
    assert!(end > now() && end < now() + Duration::from_secs(5) - MARGIN);
    failover.armed(backup.stream, number);
    wait_for("armed", || failover.status().stance == "armed").await;
    assert!(failover.lease_seconds() > 0.0);
    wait_for("the lease to be renewed", || matches!(permission.may(), May::Until(later) if later > end)).await;
    assert!(failover.allows());
    // The witness is lost: the backup is asked to stand down, and the guest runs on.
    etcd.kill();
    let number = backup.disarm().await;
    assert!(failover.allows());
    failover.disarmed(backup.stream, number);
    wait_for("permission without a bound", || permission.may() == May::Always).await;
    wait_for("why", || failover.status().message.contains("witness http://")).await;
    assert_eq!(failover.status().stance, "disarmed");
    // And back.
    etcd.up();
    let number = backup.arm().await;
    assert!(matches!(permission.may(), May::Until(_)));
    failover.armed(backup.stream, number);
    // Neither the witness nor the backup: the lease ends, and with it the permission.
    etcd.kill();
    failover.closed(backup.stream);
    wait_for("the end", || !failover.allows()).await;
    // Either will do.
    let mut backup = Backup::open(&failover, false);
    let number = backup.disarm().await;
    failover.disarmed(backup.stream, number - 1);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!failover.allows());
    let mut number = backup.disarm().await;
    while permission.may() != May::Always {
        failover.disarmed(backup.stream, number);
        if let Ok(Some(ToReceiver { message: Some(to_receiver::Message::Disarm(disarm)) })) =
            tokio::time::timeout(Duration::from_millis(200), backup.sent.recv()).await
        {
            number = disarm.number;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_restarted_goes_by_what_was_in_force() {
    let etcd = Server::start();
    let site = Site::new(&etcd);
    let end = now() + Time::from_secs(30);
    let permission = site.permission(May::Until(end));
    let (failover, _heard) = site.start();
    tokio::time::sleep(Duration::from_millis(500)).await;
    // The key is not there: a claim over its own is not granted, and what was stands.
    assert_eq!(permission.may(), May::Until(end));
    wait_for("why", || failover.status().message.contains("keys were deleted")).await;
    // What ended says nothing any more.
    failover.end();
    permission.set(May::Always);
    failover.taken(2);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(permission.may(), May::Always);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_owner_at_the_witness_fences_this_host() {
    let etcd = Server::start();
    let client = etcd.connect().await;
    let taken = client.claim(UUID, &common::claim("b", 2), Duration::from_secs(60)).await.unwrap();
    assert_eq!(taken, Allowed::Yes);
    let site = Site::new(&etcd);
    let permission = site.permission(May::Until(now() + Time::from_secs(60)));
    let (failover, heard) = site.start();
    let told = tokio::task::spawn_blocking(move || heard.recv_timeout(WAIT)).await.unwrap();
    assert!(matches!(told, Ok(Input::Outdated(2))), "{told:?}");
    assert_eq!((permission.may(), failover.fenced()), (May::Never, Some(2)));
    // There is nothing to be asked of the other site.
    failover.stand_down(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backup_stands_down_for_good_or_all_stays_as_it_was() {
    let etcd = Server::start();
    let site = Site::new(&etcd);
    let permission = site.permission(May::Always);
    let (failover, _heard) = site.start();
    let mut backup = Backup::open(&failover, true);
    let number = backup.arm().await;
    failover.armed(backup.stream, number);
    wait_for("armed", || failover.status().stance == "armed").await;
    let refused = failover.stand_down(Duration::from_secs(1)).await.unwrap_err();
    assert!(refused.contains("has not answered"), "{refused}");
    // It was asked, and is armed again.
    backup.disarm().await;
    backup.arm().await;
    let asked = failover.clone();
    let standing = tokio::spawn(async move { asked.stand_down(WAIT).await });
    let mut number = backup.disarm().await;
    assert!(matches!(permission.may(), May::Until(_)) && !standing.is_finished());
    loop {
        failover.disarmed(backup.stream, number);
        // An answer that came too late for its request does not count; the next one is.
        match tokio::time::timeout(Duration::from_secs(1), backup.sent.recv()).await {
            Ok(Some(ToReceiver { message: Some(to_receiver::Message::Disarm(disarm)) })) => number = disarm.number,
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    standing.await.unwrap().unwrap();
    assert_eq!(permission.may(), May::Always);
    // And it stays so.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(backup.sent.try_recv().is_err());
    assert_eq!(permission.may(), May::Always);
    // A guest that was ended is not taken, whatever else is wished; one that runs again is.
    failover.set_automatic(true);
    backup.arm().await;
    let asked = failover.clone();
    let resting = tokio::spawn(async move { asked.rests(WAIT).await });
    while !resting.is_finished() {
        if let Ok(number) = tokio::time::timeout(Duration::from_millis(200), backup.disarm()).await {
            failover.disarmed(backup.stream, number);
        }
    }
    resting.await.unwrap().unwrap();
    assert!(failover.status().message.contains("was ended here"), "{:?}", failover.status());
    failover.runs();
    backup.arm().await;
    // A receiver that knows of no such messages is sent none.
    let stream = failover.opening();
    let (sender, mut sent) = mpsc::channel(8);
    failover.opened(stream, None, sender);
    failover.set_automatic(true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(sent.try_recv().is_err());
    assert!(failover.status().message.contains("has no [witness]"), "{:?}", failover.status());
}
