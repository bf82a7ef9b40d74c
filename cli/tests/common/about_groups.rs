//! What a receiver says of groups.

use vmdr_proto::control::*;

use super::{CUT_UNIX_NS, UUID, finding, hook, point};

/// A group of three of which the second is not ready, and the third is held back; `ready`: all are.
pub fn report(group: &str, ready: bool) -> GroupReport {
    let activation = ActivationReport {
        name: "db1".into(),
        uuid: UUID.into(),
        point: Some(point(1000, true)),
        rto_seconds: 0.9,
        lost_seconds: 1.25,
        generation: 4,
        mapping: vec![Mapped {
            device: "NIC 52:54:00:12:34:56".into(),
            from: "bridge br0".into(),
            to: "bridge br-dr".into(),
        }],
        hooks: vec![hook("before", "")],
        ..ActivationReport::default()
    };
    let check = |check: &str, passed: bool, said: &str| DrillCheck {
        check: check.into(),
        passed,
        said: said.into(),
        seconds: 1.5,
    };
    let db1 = GroupMember {
        name: "db1".into(),
        uuid: UUID.into(),
        state: "ready".into(),
        priority: 100,
        begun_unix_ns: CUT_UNIX_NS,
        ended_unix_ns: CUT_UNIX_NS + 2_500_000_000,
        activation: Some(activation.clone()),
        checks: vec![check("tcp:192.0.2.11:5432", true, "192.0.2.11:5432 takes connections")],
        ..GroupMember::default()
    };
    let failed =
        if ready { "" } else { "it runs here, but its check heartbeat did not pass: its tools\u{1b}[2J do not answer" };
    let app1 = GroupMember {
        name: "app1".into(),
        state: if ready { "ready" } else { "failed" }.into(),
        error: failed.into(),
        needs: vec!["db1".into()],
        checks: vec![check("heartbeat", ready, "its tools")],
        activation: Some(ActivationReport {
            name: "app1".into(),
            mapping: Vec::new(),
            hooks: Vec::new(),
            ..activation
        }),
        ..db1.clone()
    };
    let front1 = GroupMember {
        name: "front1".into(),
        state: if ready { "ready" } else { "held back" }.into(),
        error: if ready { "" } else { "it needs app1, which is not ready" }.into(),
        needs: vec!["app1".into()],
        priority: 200,
        ..GroupMember::default()
    };
    GroupReport {
        group: group.into(),
        run: "0a1b2c3d4e5f".into(),
        state: if ready { "ready" } else { "failed" }.into(),
        attempts: 2,
        requested_unix_ns: CUT_UNIX_NS,
        ended_unix_ns: CUT_UNIX_NS + 4_000_000_000,
        members: vec![db1, app1, front1],
        ..GroupReport::default()
    }
}

/// What would be done; `refused`: not of the last one.
pub fn plan(group: &str, refused: bool) -> GroupPlan {
    let plan = ActivationPlan {
        name: "db1".into(),
        uuid: UUID.into(),
        point: Some(point(1000, true)),
        lost_seconds: 12.5,
        steps: vec!["restore the guest".into()],
        findings: vec![finding(Severity::Warning, "network", "bridge br1 has no uplink", "check it")],
        ..ActivationPlan::default()
    };
    let member = |name: &str, wave: u32, needs: &[&str]| GroupMemberPlan {
        name: name.into(),
        priority: 100,
        wave,
        state: "waiting".into(),
        needs: needs.iter().map(|name| (*name).to_owned()).collect(),
        ready: vec!["heartbeat".into()],
        plan: Some(plan.clone()),
        error: String::new(),
    };
    let last = GroupMemberPlan {
        plan: None,
        error: if refused { "nothing is stored here of \"front1\"".into() } else { String::new() },
        state: if refused { "waiting" } else { "ready" }.into(),
        ready: Vec::new(),
        ..member("front1", 2, &["db1"])
    };
    let points = vec![GroupPoint { domain: "db1".into(), point: "before\u{1b}[2J".into() }];
    let chosen = if refused {
        GroupPlan::default()
    } else {
        GroupPlan { at_unix_ns: CUT_UNIX_NS, points, damaged: true, ..GroupPlan::default() }
    };
    GroupPlan {
        group: group.into(),
        parallel: 4,
        members: vec![member("db1", 1, &[]), last],
        goes_on: !refused,
        ..chosen
    }
}
