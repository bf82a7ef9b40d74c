//! What an activation of a group begins with: the plan, what was asked for, and what of the last one still holds.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::Status;
use uuid::Uuid;
use vmdr_plan::{Domain, Group, Plan};
use vmdr_proto::control::{ActivateRequest, GroupMember, GroupRequest};

use super::order::{self, State};
use super::record::{Record, RecordError};
use super::run::{GOES_ON_MAX, now, state};
use crate::activate::host::{Host, LocalHost};
use crate::activate::record::{PointId, Step};
use crate::control::{self, connect, find_named};
use crate::daemon::Receiver;
use crate::history;
use crate::recovery;
use crate::store::PointId as StoredPoint;

pub(super) fn record_status(error: &RecordError) -> Status {
    Status::internal(error.to_string())
}

/// The plan, and the group of this name in it.
pub fn planned(receiver: &Receiver, name: &str) -> Result<(Plan, Group), Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument("no group is named"));
    }
    let Some(path) = &receiver.config.plan else {
        let message = "groups are in the recovery plan, and receiver.toml names none: plan = \"/etc/vmdr/plan.toml\"";
        return Err(Status::failed_precondition(message));
    };
    let file = path.display().to_string();
    let plan = recovery::load(path).map_err(|mistakes| {
        let first = mistakes.first().map(|mistake| recovery::line(&file, mistake)).unwrap_or_default();
        Status::failed_precondition(format!("the recovery plan is wrong ({first}): `vmdr plan check {file}`"))
    })?;
    let group = plan.group(name).cloned().ok_or_else(|| {
        let known: Vec<&str> = plan.groups.iter().map(|group| group.name.value.as_str()).collect();
        let known = if known.is_empty() { "it has none".to_owned() } else { format!("it has {}", known.join(", ")) };
        let shown: String = name.chars().take(64).collect();
        Status::not_found(format!("the recovery plan {file} has no group {shown:?}; {known}"))
    })?;
    Ok((plan, group))
}

/// Members with their tables of the plan, in the order of the group.
pub(super) fn domains<'a>(plan: &'a Plan, group: &Group) -> Vec<&'a Domain> {
    group.members.iter().map(|member| plan.domain(&member.value, &member.value)).collect()
}

/// Members as far as the order goes.
pub(super) fn order_of(domains: &[&Domain], states: &[State]) -> Vec<order::Member> {
    let index = |name: &str| domains.iter().position(|domain| domain.name.value == name);
    let member = |(domain, state): (&&Domain, &State)| order::Member {
        priority: domain.place(),
        needs: domain.needs.iter().filter_map(|needed| index(&needed.value)).collect(),
        state: *state,
    };
    domains.iter().zip(states).map(member).collect()
}

/// From which point, and in which generation, a domain was activated that still runs here.
fn running(receiver: &Receiver, host: &LocalHost, uuid: Uuid) -> Result<Option<(u64, PointId)>, Status> {
    let recorded = match receiver.active_directory(uuid).read(uuid) {
        Ok(recorded) => recorded,
        Err(error) => {
            // The others are brought up all the same; its own activation refuses, and says why.
            tracing::warn!(%uuid, %error, "a member of a group");
            return Ok(None);
        }
    };
    let Some(Step::Running { generation, point, .. }) = recorded.map(|record| record.step) else { return Ok(None) };
    let stored = receiver.store.position(&uuid.to_string()).map(|position| position.generation);
    if stored.ok() != Some(generation) {
        return Ok(None);
    }
    let guest = host.guest(uuid).map_err(control::hypervisor_status)?;
    Ok(guest.filter(|guest| guest.state.is_active()).map(|_| (generation, point)))
}

/// Whether what a record says of a member is so: it was activated, and still runs here from that.
fn still_active(receiver: &Receiver, host: &LocalHost, member: &GroupMember) -> Result<bool, Status> {
    let (Ok(uuid), Some(activation)) = (Uuid::parse_str(&member.uuid), &member.activation) else { return Ok(false) };
    Ok(running(receiver, host, uuid)?.is_some_and(|(generation, _)| generation == activation.generation))
}

/// What an activation of a group begins with, or goes on from.
pub(super) struct Beginning {
    pub(super) record: Record,
    /// An earlier one is gone on with.
    pub(super) goes_on: bool,
}

/// Makes the record for what is asked, of the last one as far as that still holds. Changes nothing. `resumed`: nobody has asked.
pub(super) fn beginning(
    receiver: &Receiver,
    (plan, group): (&Plan, &Group),
    request: &GroupRequest,
    resumed: bool,
) -> Result<Beginning, Status> {
    let name = &group.name.value;
    let mut points = BTreeMap::new();
    for of in &request.points {
        if !group.members.iter().any(|member| member.value == of.domain) {
            return Err(Status::invalid_argument(format!("{:?} is no member of {name}", of.domain)));
        }
        if points.insert(of.domain.clone(), of.point.clone()).is_some() {
            return Err(Status::invalid_argument(format!("{} is given two points", of.domain)));
        }
    }
    let last = Record::read(receiver.store.dir(), name).map_err(|error| record_status(&error))?;
    let host = connect(receiver)?;
    refuse_other_points(receiver, &host, group, request)?;
    let mut kept = 0;
    let mut members = Vec::new();
    for domain in domains(plan, group) {
        let its = |member: &&GroupMember| member.name == domain.name.value;
        let before = last.as_ref().and_then(|last| last.report.members.iter().find(its));
        let mut member = match before {
            Some(before) if still_active(receiver, &host, before)? => {
                kept += 1;
                active_member(before.clone(), resumed)
            }
            // It was taken home meanwhile, or has ended: whoever asks may have it started here again, and nobody has asked.
            Some(before) if resumed && before.activation.is_some() => GroupMember {
                state: State::Failed.word().to_owned(),
                error: format!("it does not run here any more: `vmdr group activate {name}` activates it again"),
                ..before.clone()
            },
            _ => GroupMember { state: State::Waiting.word().to_owned(), ..GroupMember::default() },
        };
        member.step.clear();
        domain.name.value.clone_into(&mut member.name);
        member.priority = domain.place();
        member.needs = domain.needs.iter().map(|needed| needed.value.clone()).collect();
        members.push(member);
    }
    let inherited = last.filter(|last| inherits(last, resumed, kept > 0, now()));
    let goes_on = kept > 0 || inherited.is_some();
    let mut record = inherited.unwrap_or_else(|| {
        let mut fresh = Record::default();
        fresh.report.run = Uuid::new_v4().simple().to_string().chars().take(12).collect();
        fresh
    });
    if request.at_unix_ns > 0 {
        // Asked anew: what was said of single members before that counts no more.
        record.at_unix_ns = request.at_unix_ns;
        record.points.clear();
    }
    record.points.append(&mut points);
    record.damaged |= request.damaged;
    name.clone_into(&mut record.report.group);
    record.report.members = members;
    Ok(Beginning { record, goes_on })
}

/// A member that runs from an earlier run. Whether it is still ready is looked at again when somebody asks.
fn active_member(before: GroupMember, resumed: bool) -> GroupMember {
    if resumed && State::of(&before.state) == State::Ready {
        return before;
    }
    GroupMember {
        state: State::Waiting.word().to_owned(),
        error: String::new(),
        checks: Vec::new(),
        begun_unix_ns: 0,
        ended_unix_ns: 0,
        ..before
    }
}

/// Whether what was chosen for the last one counts for this one: points of an earlier disaster, and the consent to damaged ones,
/// must not. `kept`: some of its members still run.
fn inherits(last: &Record, resumed: bool, kept: bool, now_unix_ns: u64) -> bool {
    let broken_off = [state::UNDER_WAY, state::INTERRUPTED, state::STOPPED].contains(&last.report.state.as_str());
    let away = Duration::from_nanos(now_unix_ns.saturating_sub(last.touched_unix_ns));
    resumed || ((kept || broken_off) && away <= GOES_ON_MAX)
}

/// A member that runs keeps the point that it came from: one that was to have another is said, and nothing is begun.
fn refuse_other_points(
    receiver: &Receiver,
    host: &LocalHost,
    group: &Group,
    request: &GroupRequest,
) -> Result<(), Status> {
    let points = request.points.iter().map(|of| (of.domain.clone(), of.point.clone())).collect();
    // Whether it is damaged makes no difference here.
    let asked = Record { at_unix_ns: request.at_unix_ns, points, damaged: true, ..Record::default() };
    let mut others = Vec::new();
    for member in &group.members {
        let wanted = member_request(&asked, &member.value);
        // What is not stored here fails when it is begun.
        let Ok((uuid, name)) = find_named(receiver, &member.value) else { continue };
        if wanted.point.is_empty() && wanted.at_unix_ns == 0 {
            continue;
        }
        let Some((_, of)) = running(receiver, host, uuid)? else { continue };
        let of = StoredPoint { generation: of.generation, epoch: of.epoch };
        // A name that is not known is another, too.
        let chosen = history::choose(&receiver.store, &uuid.to_string(), &wanted).ok().flatten();
        if chosen != Some(of) {
            others.push(format!("{name} (from {of})"));
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "these run here already, and would have another point: {}; nothing was begun. Choose points with --point for the other \
         members only, or stop these and activate them by themselves",
        others.join(", ")
    )))
}

/// What is asked of the activation of a member.
pub(super) fn member_request(record: &Record, name: &str) -> ActivateRequest {
    let point = record.points.get(name).cloned().unwrap_or_default();
    let at_unix_ns = if point.is_empty() { record.at_unix_ns } else { 0 };
    ActivateRequest { domain: name.to_owned(), wait: true, point, at_unix_ns, damaged: record.damaged, dry_run: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_chosen_long_ago_counts_no_more() {
        let minute = 60_000_000_000;
        let of = |state: &str, touched_unix_ns| {
            let mut record = Record { touched_unix_ns, ..Record::default() };
            state.clone_into(&mut record.report.state);
            record
        };
        let now = 1000 * minute;
        for (state, kept, ago, expected) in [
            (state::FAILED, true, 10, true),
            (state::FAILED, true, 16, false),
            (state::FAILED, false, 10, false),
            (state::UNDER_WAY, false, 10, true),
            (state::INTERRUPTED, false, 16, false),
            (state::STOPPED, false, 10, true),
            (state::READY, true, 600, false),
        ] {
            assert_eq!(inherits(&of(state, now - ago * minute), false, kept, now), expected, "{state} {kept} {ago}");
        }
        assert!(inherits(&of(state::UNDER_WAY, 0), true, false, now), "nobody has asked: it is the same");
    }

    #[test]
    fn who_was_ready_is_looked_at_again_when_somebody_asks() {
        let before = GroupMember { state: "ready".to_owned(), begun_unix_ns: 7, ..GroupMember::default() };
        assert_eq!(active_member(before.clone(), true), before);
        let again = active_member(before.clone(), false);
        assert_eq!((again.state.as_str(), again.begun_unix_ns), ("waiting", 0));
        let failed = GroupMember { state: "failed".to_owned(), error: "no".to_owned(), ..before };
        let again = active_member(failed, true);
        assert_eq!((again.state.as_str(), again.error.as_str()), ("waiting", ""));
    }
}
