//! `group`: domains of the recovery plan that are activated together.

use std::io::Write;

use vmdr_proto::control::{
    GroupMember, GroupMemberPlan, GroupPlan, GroupPoint, GroupReport, GroupRequest, GroupsRequest,
};

use super::{Out, backup_side, findings_table, refused};
use crate::args::{Common, WhichOfEach};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::json::group as document;
use crate::style::Tone;
use crate::table::{Cell, Side, Table};
use crate::{confirm, progress, text};

/// The options of `group activate`.
pub struct Activate<'a> {
    /// Only show the plan.
    pub dry_run: bool,
    /// Do not ask.
    pub yes: bool,
    /// At which points.
    pub which: &'a WhichOfEach,
    /// Also at damaged ones.
    pub damaged: bool,
}

/// Shows the plan, asks, activates, reports.
pub async fn activate(common: &Common, out: Out, group: &str, options: Activate<'_>) -> Result<(), Failure> {
    if !options.dry_run {
        confirm::possible_of("group activate", "group", options.yes)?;
    }
    let which = options.which;
    let points = which.points.iter().map(|(domain, point)| GroupPoint { domain: domain.clone(), point: point.clone() });
    let request = GroupRequest {
        group: group.to_owned(),
        at_unix_ns: backup_side::at(which.before, which.at_unix_ns)?,
        points: points.collect(),
        damaged: options.damaged,
    };
    let mut receiver = client::receiver(common).await?;
    let plan = answer(Daemon::Receiver, "group activate", receiver.plan_group(request.clone())).await?;
    let lost = plan.members.iter().filter(|member| !member.error.is_empty() || is_refused(member)).count();
    if options.dry_run {
        out.result("group-plan", || document::GroupPlan::new(&plan, lost), || plan_text(out, &plan))?;
    } else if !out.is_json() {
        super::write_stdout(plan_text(out, &plan).as_bytes())?;
    } else if !options.yes || lost > 0 {
        // A stderr that is gone only means that nobody reads it.
        let _ = std::io::stderr().write_all(plan_text(out, &plan).as_bytes());
    }
    let name = text::one_line(&plan.group);
    if options.dry_run {
        let of = plan.members.len();
        return match lost {
            0 => Ok(()),
            n => Err(Failure::Failed(format!("{n} of the {of} members of {name} cannot be activated here"))),
        };
    }
    let runs = |member: &GroupMemberPlan| member.plan.as_ref().is_some_and(|plan| plan.already_active);
    let begins = plan.members.iter().any(|member| member.state != "ready" && !runs(member));
    if !options.yes && begins {
        let about = format!(
            "This starts the members of {name} here. Make sure that none of them runs at the other site any longer.\n{}",
            chosen_text(&plan)
        );
        confirm::typed_of(&about, "group", &plan.group).await?;
    }
    let stream = receiver.activate_group(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Receiver, "group activate", &status))?;
    let outcome = progress::follow_aloud(Daemon::Receiver, "group activate", stream.into_inner()).await?;
    let report = outcome.group.ok_or_else(|| {
        Failure::Failed(format!(
            "the receiver ended the activation of {name} without a report: run `vmdr group activate {name}` again, which \
             goes on from there"
        ))
    })?;
    out.result("group", || document::Group::from(&report), || report_text(out, &report))?;
    ended(&report)
}

fn is_refused(member: &GroupMemberPlan) -> bool {
    member.plan.as_ref().is_some_and(|plan| refused(&plan.findings) > 0)
}

/// Shows how the last activation went.
pub async fn report(common: &Common, out: Out, group: &str) -> Result<(), Failure> {
    let mut receiver = client::receiver(common).await?;
    let request = GroupsRequest { group: group.to_owned() };
    let reply = answer(Daemon::Receiver, "group report", receiver.groups(request)).await?;
    let [report] = reply.groups.as_slice() else {
        return Err(Failure::NotFound(format!(
            "{} is no group here; `vmdr group list` has them",
            text::one_line(group)
        )));
    };
    out.result("group", || document::Group::from(report), || report_text(out, report))
}

/// Has no further member begun.
pub async fn stop(common: &Common, out: Out, group: &str) -> Result<(), Failure> {
    let mut receiver = client::receiver(common).await?;
    let request = GroupsRequest { group: group.to_owned() };
    let report = answer(Daemon::Receiver, "group stop", receiver.stop_group(request)).await?;
    out.result("group", || document::Group::from(&report), || stopped_text(&report))
}

fn stopped_text(report: &GroupReport) -> String {
    let name = text::one_line(&report.group);
    let under_way = report.members.iter().filter(|member| ["activating", "checking"].contains(&member.state.as_str()));
    let under_way: Vec<String> = under_way.map(|member| text::one_line(&member.name)).collect();
    let end =
        if under_way.is_empty() { String::new() } else { format!(" {} come to their end;", under_way.join(", ")) };
    format!("no further member of {name} is begun;{end} `vmdr group activate {name}` goes on\n")
}

/// Lists all.
pub async fn list(common: &Common, out: Out) -> Result<(), Failure> {
    let mut receiver = client::receiver(common).await?;
    let reply = answer(Daemon::Receiver, "group list", receiver.groups(GroupsRequest::default())).await?;
    let groups = reply.groups;
    out.result(
        "groups",
        || document::Groups { groups: groups.iter().map(document::Group::from).collect() },
        || match groups.is_empty() {
            true => "no group is in the recovery plan, and none was activated here\n".to_owned(),
            false => groups.iter().map(|group| line(out, group)).collect(),
        },
    )
}

fn ended(report: &GroupReport) -> Result<(), Failure> {
    let name = text::one_line(&report.group);
    match report.state.as_str() {
        "ready" => Ok(()),
        "stopped" => Err(Failure::Failed(format!(
            "the activation of {name} was stopped; `vmdr group activate {name}` goes on from there"
        ))),
        _ => Err(Failure::Failed(format!(
            "not all members of {name} are ready; put right what is said, and run it again: it goes on from there"
        ))),
    }
}

fn count(report: &GroupReport, state: &str) -> usize {
    report.members.iter().filter(|member| member.state == state).count()
}

fn tone(state: &str) -> Tone {
    match state {
        "ready" => Tone::Good,
        "failed" | "held back" | "interrupted" | "stopped" | "unknown" => Tone::Bad,
        _ => Tone::Plain,
    }
}

/// A group in a sentence, for `status` and `group list`.
pub fn line(out: Out, report: &GroupReport) -> String {
    let name = text::one_line(&report.group);
    let ready = format!("{} of {} members ready", count(report, "ready"), report.members.len());
    let mut said = format!("{}: {ready}", text::one_line(&report.state));
    if report.state == "not activated" {
        said = format!("{} members, not activated", report.members.len());
    }
    if report.requested_unix_ns > 0 {
        said.push_str(&format!(", asked for at {} UTC", text::instant_short(report.requested_unix_ns)));
    }
    if !report.error.is_empty() {
        said.push_str(&format!("; {}", text::one_line(&report.error)));
    }
    for member in report.members.iter().filter(|member| member.state == "failed") {
        said.push_str(&format!("; {}: {}", text::one_line(&member.name), text::one_line(&member.error)));
    }
    if matches!(report.state.as_str(), "failed" | "interrupted" | "stopped") {
        said.push_str(&format!("; `vmdr group activate {name}` goes on"));
    }
    let line = text::wrapped(&format!("group {name}: "), &said);
    out.paint(tone(&report.state), &line)
}

/// Which points, unless they are the newest; of the last time where it goes on.
fn chosen_text(plan: &GroupPlan) -> String {
    let mut said = Vec::new();
    if plan.at_unix_ns > 0 {
        said.push(format!("each as it was at {} UTC or before", text::instant_short(plan.at_unix_ns)));
    }
    said.extend(
        plan.points.iter().map(|of| format!("{} at {}", text::one_line(&of.domain), text::one_line(&of.point))),
    );
    if plan.damaged {
        said.push("also points that are known to be damaged".to_owned());
    }
    match said.is_empty() {
        true => String::new(),
        false => text::wrapped("Points: ", &said.join(", ")),
    }
}

fn plan_text(out: Out, plan: &GroupPlan) -> String {
    let goes_on = if plan.goes_on { ", going on from the last time" } else { "" };
    let mut said =
        format!("Plan: activate group {}, at most {} at once{goes_on}\n", text::one_line(&plan.group), plan.parallel);
    said.push_str(&chosen_text(plan));
    let mut table = Table::new([
        ("WAVE", Side::Right),
        ("MEMBER", Side::Left),
        ("STATE", Side::Left),
        ("POINT", Side::Left),
        ("LOST", Side::Right),
    ]);
    for member in &plan.members {
        let mut below = String::new();
        for (label, words) in [("  needs: ", &member.needs), ("  ready: ", &member.ready)] {
            if !words.is_empty() {
                below.push_str(&text::wrapped(label, &text::one_line(&words.join(", "))));
            }
        }
        let mut point = ("-".to_owned(), "-".to_owned());
        if let Some(plan) = &member.plan {
            if let Some(of) = plan.point.as_ref().filter(|_| !plan.already_active) {
                point = (text::one_line(&of.id), text::seconds(plan.lost_seconds));
            }
            below.push_str(&backup_side::mapping_text(&plan.mapping));
            below.push_str(&findings_table(out, &plan.findings));
        }
        if !member.error.is_empty() {
            below.push_str(&out.paint(Tone::Bad, &text::wrapped("  refused: ", &text::one_line(&member.error))));
        }
        let state = if member.plan.as_ref().is_some_and(|plan| plan.already_active) {
            "runs here"
        } else {
            member.state.as_str()
        };
        let cells = [
            member.wave.to_string().into(),
            text::one_line(&member.name).into(),
            Cell::toned(text::one_line(state), tone(state)),
            point.0.into(),
            point.1.into(),
        ];
        table.row(cells, below);
    }
    said.push_str(&table.render(out.style));
    said
}

fn report_text(out: Out, report: &GroupReport) -> String {
    let after = document::since(report.requested_unix_ns, report.ended_unix_ns);
    let after = after.map(|seconds| format!(" after {}", text::seconds(seconds))).unwrap_or_default();
    let head = format!("group {}: {}{after}", text::one_line(&report.group), text::one_line(&report.state));
    let mut said = format!("{}\n", out.paint(tone(&report.state), &head));
    if !report.error.is_empty() {
        said.push_str(&text::wrapped("  error: ", &text::one_line(&report.error)));
    }
    let mut table = Table::new([
        ("MEMBER", Side::Left),
        ("STATE", Side::Left),
        ("POINT", Side::Left),
        ("LOST", Side::Right),
        ("RTO", Side::Right),
        ("READY AFTER", Side::Right),
    ]);
    for member in &report.members {
        table.row(cells(report, member), below(out, member));
    }
    said.push_str(&table.render(out.style));
    said
}

fn cells(report: &GroupReport, member: &GroupMember) -> [Cell; 6] {
    let none = || "-".to_owned();
    let activation = member.activation.as_ref();
    let point = activation.and_then(|of| of.point.as_ref()).map(|point| text::one_line(&point.id));
    let rto = activation.filter(|of| of.rto_seconds > 0.0).map(|of| text::seconds(of.rto_seconds));
    let ready = document::since(report.requested_unix_ns, member.ended_unix_ns).filter(|_| member.state == "ready");
    [
        text::one_line(&member.name).into(),
        Cell::toned(text::one_line(&member.state), tone(&member.state)),
        point.unwrap_or_else(none).into(),
        activation.map_or_else(none, |of| text::seconds(of.lost_seconds)).into(),
        rto.unwrap_or_else(none).into(),
        ready.map_or_else(none, text::seconds).into(),
    ]
}

fn below(out: Out, member: &GroupMember) -> String {
    let mut below = String::new();
    if !member.error.is_empty() {
        below.push_str(&out.paint(Tone::Bad, &text::wrapped("  why:            ", &text::one_line(&member.error))));
    }
    if let Some(activation) = &member.activation {
        below.push_str(&backup_side::applied_text(out, activation));
    }
    for check in &member.checks {
        let word = if check.passed { "passed" } else { "failed" };
        let said = format!("{}: {}", text::one_line(&check.check), text::one_line(&check.said));
        let line = text::wrapped(&format!("  {word}:         "), said.trim_end_matches([' ', ':']));
        below.push_str(&if check.passed { line } else { line.replacen(word, &out.paint(Tone::Bad, word), 1) });
    }
    below
}
