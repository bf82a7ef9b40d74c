//! Documents of `group`.

use serde::Serialize;
use vmdr_proto::control;

use crate::text;

fn word(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// How an activation of a group went: `group activate`, `group report`, and part of `group list` and `status`.
#[derive(Serialize)]
pub struct Group {
    group: String,
    run: Option<String>,
    state: String,
    attempts: u32,
    requested: Option<String>,
    ended: Option<String>,
    seconds: Option<f64>,
    error: Option<String>,
    members: Vec<Member>,
}

/// A member of it.
#[derive(Serialize)]
pub struct Member {
    name: String,
    uuid: Option<String>,
    state: String,
    error: Option<String>,
    step: Option<String>,
    priority: u64,
    needs: Vec<String>,
    begun: Option<String>,
    ended: Option<String>,
    settled_seconds: Option<f64>,
    activation: Option<super::Report>,
    checks: Vec<Check>,
}

/// A readiness check.
#[derive(Serialize)]
pub struct Check {
    check: String,
    passed: bool,
    said: Option<String>,
    seconds: f64,
}

/// Seconds from the request for a group to something in the same attempt.
pub fn since(requested_unix_ns: u64, then_unix_ns: u64) -> Option<f64> {
    let since = then_unix_ns.checked_sub(requested_unix_ns).filter(|_| requested_unix_ns > 0);
    since.map(|ns| ns as f64 / 1e9)
}

impl From<&control::GroupReport> for Group {
    fn from(report: &control::GroupReport) -> Group {
        let member = |member: &control::GroupMember| Member {
            name: member.name.clone(),
            uuid: word(&member.uuid),
            state: member.state.clone(),
            error: word(&member.error),
            step: word(&member.step),
            priority: member.priority,
            needs: member.needs.clone(),
            begun: text::instant(member.begun_unix_ns),
            ended: text::instant(member.ended_unix_ns),
            settled_seconds: since(report.requested_unix_ns, member.ended_unix_ns),
            activation: member.activation.as_ref().map(super::Report::from),
            checks: member.checks.iter().map(check).collect(),
        };
        Group {
            group: report.group.clone(),
            run: word(&report.run),
            state: report.state.clone(),
            attempts: report.attempts,
            requested: text::instant(report.requested_unix_ns),
            ended: text::instant(report.ended_unix_ns),
            seconds: since(report.requested_unix_ns, report.ended_unix_ns),
            error: word(&report.error),
            members: report.members.iter().map(member).collect(),
        }
    }
}

fn check(check: &control::DrillCheck) -> Check {
    Check { check: check.check.clone(), passed: check.passed, said: word(&check.said), seconds: check.seconds }
}

/// `group list`.
#[derive(Serialize)]
pub struct Groups {
    /// By name.
    pub groups: Vec<Group>,
}

/// `group activate --dry-run`.
#[derive(Serialize)]
pub struct GroupPlan {
    group: String,
    /// Whether nothing is refused of any member.
    ok: bool,
    goes_on: bool,
    /// Each at its newest point that is not younger; null: the newest.
    at: Option<String>,
    points: Vec<Chosen>,
    damaged: bool,
    parallel: u32,
    members: Vec<MemberPlan>,
}

/// The point of a single member.
#[derive(Serialize)]
pub struct Chosen {
    name: String,
    point: String,
}

/// A member of it.
#[derive(Serialize)]
pub struct MemberPlan {
    name: String,
    wave: u32,
    state: String,
    priority: u64,
    needs: Vec<String>,
    ready: Vec<String>,
    error: Option<String>,
    plan: Option<super::Plan>,
}

impl GroupPlan {
    /// `refused`: members that would be.
    pub fn new(plan: &control::GroupPlan, refused: usize) -> GroupPlan {
        let member = |member: &control::GroupMemberPlan| MemberPlan {
            name: member.name.clone(),
            wave: member.wave,
            state: member.state.clone(),
            priority: member.priority,
            needs: member.needs.clone(),
            ready: member.ready.clone(),
            error: word(&member.error),
            plan: member.plan.as_ref().map(super::Plan::from),
        };
        let chosen = |of: &control::GroupPoint| Chosen { name: of.domain.clone(), point: of.point.clone() };
        GroupPlan {
            group: plan.group.clone(),
            ok: refused == 0,
            goes_on: plan.goes_on,
            at: text::instant(plan.at_unix_ns),
            points: plan.points.iter().map(chosen).collect(),
            damaged: plan.damaged,
            parallel: plan.parallel,
            members: plan.members.iter().map(member).collect(),
        }
    }
}
