//! Activations of groups, as far as they go without guests: what is refused, the order, the record, and what a receiver that was
//! killed does with it. (`tests/tests/group.rs` has guests.) The libvirt is one that runs nothing: its test driver.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use common::{Daemon, WAIT};
use tonic::{Code, Status};
use vmdr_proto::control::{GroupPoint, GroupReport, GroupRequest, GroupsRequest, StatusRequest};

const SHOP: &str = "[group.shop]\nmembers = [\"db1\", \"app1\", \"front1\", \"log1\"]\n[domain.db1]\n[domain.app1]\nneeds = [\"db1\"]\n\
                    [domain.front1]\nneeds = [\"app1\"]\n[domain.log1]\npriority = 200\n";

fn write(plan: &Path, text: &str) {
    std::fs::write(plan, text).unwrap();
    std::fs::set_permissions(plan, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn request(group: &str) -> GroupRequest {
    GroupRequest { group: group.to_owned(), ..GroupRequest::default() }
}

/// To its end: what was said on the way, and the report.
async fn activate(daemon: &Daemon, request: GroupRequest) -> Result<(Vec<String>, GroupReport), Status> {
    let mut stream = daemon.control().await.activate_group(request).await?.into_inner();
    let (mut said, mut report) = (Vec::new(), None);
    while let Some(progress) = tokio::time::timeout(WAIT, stream.message()).await.expect("an end")? {
        said.extend(Some(progress.message).filter(|message| !message.is_empty()));
        report = progress.group.or(report);
    }
    Ok((said, report.expect("a report")))
}

async fn reports(daemon: &Daemon, group: &str) -> Result<Vec<GroupReport>, Status> {
    let request = GroupsRequest { group: group.to_owned() };
    Ok(daemon.control().await.groups(request).await?.into_inner().groups)
}

fn states(report: &GroupReport) -> Vec<(&str, &str)> {
    report.members.iter().map(|member| (member.name.as_str(), member.state.as_str())).collect()
}

async fn with_plan(directory: &Path, libvirt: &str) -> Daemon {
    let plan = directory.join("plan.toml");
    write(&plan, SHOP);
    let config = format!("plan = \"{}\"\nlibvirt_uri = \"{libvirt}\"\n", plan.display());
    Daemon::start_with(&config, &[]).await
}

#[tokio::test]
async fn what_cannot_be_begun_is_refused_and_leaves_no_record() {
    let without = Daemon::start().await;
    let refused = activate(&without, request("shop")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("receiver.toml names none"), "{refused}");

    let directory = tempfile::tempdir().unwrap();
    let daemon = with_plan(directory.path(), "test:///default").await;
    let of = |domain: &str| GroupPoint { domain: domain.to_owned(), point: "1-1".to_owned() };
    let twice = GroupRequest { points: vec![of("db1"), of("db1")], ..request("shop") };
    let stranger = GroupRequest { points: vec![of("web1")], ..request("shop") };
    for (wrong, code, said) in [
        (request(""), Code::InvalidArgument, "no group is named"),
        (request("../shop"), Code::NotFound, "has no group"),
        (request("mail"), Code::NotFound, "it has shop"),
        (twice, Code::InvalidArgument, "two points"),
        (stranger, Code::InvalidArgument, "no member"),
    ] {
        let refused = activate(&daemon, wrong.clone()).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(said), "{wrong:?}: {refused}");
        let refused = daemon.control().await.plan_group(wrong.clone()).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(said), "{wrong:?}: {refused}");
    }
    let plan = directory.path().join("plan.toml");
    write(&plan, &SHOP.replace("\"db1\"]\n[domain.front1]", "\"gone\"]\n[domain.front1]"));
    let refused = activate(&daemon, request("shop")).await.unwrap_err();
    assert!(refused.message().contains("plan.toml:5:10: gone is needed"), "{refused}");
    assert!(!daemon.state().join("groups").exists());
    assert_eq!(reports(&daemon, "shop").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn who_needs_somebody_that_fails_is_held_back_and_the_others_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = with_plan(directory.path(), "test:///default").await;
    let plan = daemon.control().await.plan_group(request("shop")).await.unwrap().into_inner();
    let waves: Vec<(&str, u32)> = plan.members.iter().map(|member| (member.name.as_str(), member.wave)).collect();
    assert_eq!(waves, [("db1", 1), ("app1", 2), ("front1", 3), ("log1", 4)]);
    assert!(plan.members.iter().all(|member| member.error.contains("nothing is stored here")), "{plan:?}");
    let none = &reports(&daemon, "").await.unwrap()[0];
    assert_eq!((none.state.as_str(), none.members.len()), ("not activated", 4));

    let (said, report) = activate(&daemon, request("shop")).await.unwrap();
    let expected = [("db1", "failed"), ("app1", "held back"), ("front1", "held back"), ("log1", "failed")];
    assert_eq!((states(&report), report.state.as_str(), report.attempts), (expected.to_vec(), "failed", 1));
    let position = |of: &str| said.iter().position(|line| line.starts_with(of)).unwrap_or_else(|| panic!("{said:?}"));
    assert!(position("db1 is not ready: nothing is stored") < position("app1 is held back: it needs db1"));
    assert!(position("front1 is held back: it needs app1") < position("log1 is not ready"));
    assert_eq!(reports(&daemon, "shop").await.unwrap(), std::slice::from_ref(&report));

    // Kept over a restart, in the status too. Nothing of it is active: the next one is new.
    daemon.kill();
    daemon.start_again().await;
    let status = daemon.control().await.status(StatusRequest::default()).await.unwrap().into_inner();
    assert_eq!(status.groups, std::slice::from_ref(&report));
    let (_, next) = activate(&daemon, request("shop")).await.unwrap();
    assert!(next.run != report.run && next.attempts == 1, "{next:?}");
}

/// Changes the record of the group as if the receiver had been killed then.
fn interrupt(daemon: &Daemon, ago: Duration) {
    interrupt_as(daemon, ago, "under way");
}

fn interrupt_as(daemon: &Daemon, ago: Duration, state: &str) {
    let file = daemon.state().join("groups/shop.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let then = (SystemTime::now() - ago).duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    record["touched_unix_ns"] = then.into();
    record["report"]["state"] = state.into();
    record["at_unix_ns"] = 7.into();
    record["points"]["db1"] = "1-5".into();
    record["damaged"] = true.into();
    record["report"]["members"][0]["state"] = "activating".into();
    std::fs::write(&file, record.to_string()).unwrap();
}

#[tokio::test]
async fn what_was_interrupted_goes_on_by_itself_unless_that_was_long_ago() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = with_plan(directory.path(), "test:///default").await;
    let (_, first) = activate(&daemon, request("shop")).await.unwrap();
    daemon.kill();
    interrupt(&daemon, Duration::from_secs(7200));
    daemon.start_again().await;
    let waiting = reports(&daemon, "shop").await.unwrap().remove(0);
    assert_eq!((waiting.state.as_str(), waiting.attempts), ("interrupted", 1));
    assert!(daemon.log().contains("vmdr group activate shop"), "{}", daemon.log());
    let plan = daemon.control().await.plan_group(request("shop")).await.unwrap().into_inner();
    assert!(
        !plan.goes_on && plan.at_unix_ns == 0 && plan.points.is_empty(),
        "what was chosen then counts no more: {plan:?}"
    );

    daemon.kill();
    interrupt(&daemon, Duration::from_secs(60));
    daemon.start_again().await;
    let deadline = Instant::now() + WAIT;
    let report = loop {
        let report = reports(&daemon, "shop").await.unwrap().remove(0);
        if report.state == "failed" {
            break report;
        }
        assert!(Instant::now() < deadline, "{report:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((&report.run, report.attempts, report.requested_unix_ns), (&first.run, 2, first.requested_unix_ns));
    assert_eq!(states(&report), states(&first));
}

async fn stop(daemon: &Daemon) -> Result<GroupReport, Status> {
    let request = GroupsRequest { group: "shop".to_owned() };
    Ok(daemon.control().await.stop_group(request).await?.into_inner())
}

#[tokio::test]
async fn what_was_stopped_or_ended_in_order_goes_on_only_when_somebody_asks() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = with_plan(directory.path(), "test:///default").await;
    let refused = stop(&daemon).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("no activation"), "{refused}");
    let (_, first) = activate(&daemon, request("shop")).await.unwrap();
    for state in ["interrupted", "stopped"] {
        daemon.kill();
        interrupt_as(&daemon, Duration::from_secs(60), state);
        daemon.start_again().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let waiting = reports(&daemon, "shop").await.unwrap().remove(0);
        assert_eq!((waiting.state.as_str(), waiting.attempts), (state, 1));
        // What was chosen a minute ago still counts, and is shown.
        let plan = daemon.control().await.plan_group(request("shop")).await.unwrap().into_inner();
        assert!(plan.goes_on && plan.damaged && plan.at_unix_ns == 7 && plan.points.len() == 1, "{plan:?}");
        if state == "interrupted" {
            assert_eq!(stop(&daemon).await.unwrap().state, "stopped");
            assert_eq!(stop(&daemon).await.unwrap_err().code(), Code::FailedPrecondition);
        }
    }
    let (_, report) = activate(&daemon, request("shop")).await.unwrap();
    assert_eq!((&report.run, report.attempts), (&first.run, 2));
}

#[tokio::test]
async fn without_libvirt_nothing_is_begun() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = with_plan(directory.path(), "qemu+unix:///system?socket=/nonexistent/vmdr-test").await;
    assert_eq!(activate(&daemon, request("shop")).await.unwrap_err().code(), Code::Unavailable);
    assert!(!daemon.state().join("groups").exists());
    std::fs::create_dir(daemon.state().join("groups")).unwrap();
    std::fs::write(daemon.state().join("groups/shop.json"), "{").unwrap();
    let broken = reports(&daemon, "shop").await.unwrap_err();
    assert!(broken.message().contains("shop.json") && broken.message().contains("move it away"), "{broken}");
    let all = reports(&daemon, "").await.unwrap();
    assert!(all.len() == 1 && all[0].state == "unknown" && all[0].error.contains("shop.json"), "{all:?}");
}
