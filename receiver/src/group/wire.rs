//! What the `vmdr` command is told of groups.

use std::sync::Arc;

use tonic::Status;
use vmdr_proto::control::{
    GroupMember, GroupMemberPlan, GroupPlan, GroupPoint, GroupReport, GroupRequest, GroupsReply,
};

use super::begin::{Beginning, beginning, domains, member_request, order_of, planned, record_status};
use super::order::{self, State};
use super::record::Record;
use super::run::state;
use crate::control;
use crate::daemon::Receiver;
use crate::recovery;

/// What an activation of a group would do.
pub fn plan(receiver: &Arc<Receiver>, request: &GroupRequest) -> Result<GroupPlan, Status> {
    let (plan, group) = planned(receiver, &request.group)?;
    let Beginning { record, goes_on } = beginning(receiver, (&plan, &group), request, false)?;
    let domains = domains(&plan, &group);
    let states: Vec<State> = record.report.members.iter().map(|member| State::of(&member.state)).collect();
    let waves = order::waves(&order_of(&domains, &states));
    let mut members = Vec::new();
    for (index, domain) in domains.iter().enumerate() {
        let name = &domain.name.value;
        let made =
            (states[index] != State::Ready).then(|| control::make_plan(receiver, &member_request(&record, name)));
        let (made, error) = match made {
            None => (None, String::new()),
            Some(Ok(made)) => (Some(made), String::new()),
            // Without libvirt nothing can be said of anybody.
            Some(Err(status)) if status.code() == tonic::Code::Unavailable => return Err(status),
            Some(Err(status)) => (None, status.message().to_owned()),
        };
        members.push(GroupMemberPlan {
            name: name.clone(),
            priority: domain.place(),
            needs: domain.needs.iter().map(|needed| needed.value.clone()).collect(),
            ready: domain.ready.iter().map(|ready| ready.value.shown()).collect(),
            wave: u32::try_from(waves[index] + 1).unwrap_or(u32::MAX),
            state: states[index].word().to_owned(),
            plan: made,
            error,
        });
    }
    members.sort_by_key(|member| member.wave);
    let parallel = u32::try_from(group.parallel).unwrap_or(u32::MAX);
    let points = record.points.into_iter().map(|(domain, point)| GroupPoint { domain, point }).collect();
    Ok(GroupPlan {
        group: group.name.value.clone(),
        parallel,
        members,
        goes_on,
        at_unix_ns: record.at_unix_ns,
        points,
        damaged: record.damaged,
    })
}

/// How the last activation of a group went, or goes.
fn report(receiver: &Receiver, group: &str) -> Result<Option<GroupReport>, Status> {
    // One that has just been asked for has none yet.
    let live = receiver.groups.of(group).map(|live| live.report()).filter(|report| !report.group.is_empty());
    if live.is_some() {
        return Ok(live);
    }
    let record = Record::read(receiver.store.dir(), group).map_err(|error| record_status(&error))?;
    Ok(record.map(|record| {
        let mut report = record.report;
        if report.state == state::UNDER_WAY {
            // Whoever was at work on it is gone.
            state::INTERRUPTED.clone_into(&mut report.state);
        }
        report
    }))
}

/// How the last activations of groups went; empty: of all.
pub fn reports(receiver: &Receiver, group: &str) -> Result<GroupsReply, Status> {
    if !group.is_empty() {
        let shown: String = group.chars().take(64).collect();
        let never = || {
            Status::not_found(format!("no group {shown:?} was activated here; `vmdr group list` has those that were"))
        };
        return Ok(GroupsReply { groups: vec![report(receiver, group)?.ok_or_else(never)?] });
    }
    Ok(GroupsReply { groups: all(receiver) })
}

/// Those that were activated here, and those of the plan that were not; of one whose record cannot be read why.
pub fn all(receiver: &Receiver) -> Vec<GroupReport> {
    let names = Record::names(receiver.store.dir()).into_iter();
    let each = names.filter_map(|name| match report(receiver, &name) {
        Ok(report) => report,
        Err(status) => {
            let (state, error) = ("unknown".to_owned(), status.message().to_owned());
            Some(GroupReport { group: name, state, error, ..GroupReport::default() })
        }
    });
    let mut groups: Vec<GroupReport> = each.collect();
    // A plan that is wrong is told elsewhere.
    let plan = receiver.config.plan.as_deref().and_then(|path| recovery::load(path).ok()).unwrap_or_default();
    for group in &plan.groups {
        if groups.iter().any(|known| known.group == group.name.value) {
            continue;
        }
        let member = |domain: &&vmdr_plan::Domain| GroupMember {
            name: domain.name.value.clone(),
            state: State::Waiting.word().to_owned(),
            priority: domain.place(),
            needs: domain.needs.iter().map(|needed| needed.value.clone()).collect(),
            ..GroupMember::default()
        };
        let members = domains(&plan, group).iter().map(member).collect();
        let state = state::NONE.to_owned();
        groups.push(GroupReport { group: group.name.value.clone(), state, members, ..GroupReport::default() });
    }
    groups.sort_by(|a, b| a.group.cmp(&b.group));
    groups
}
