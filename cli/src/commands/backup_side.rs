//! Commands to the receiver: `activate`, `forget`.

use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmdr_proto::control::{
    ActivateRequest, ActivationPlan, ActivationReport, DomainRequest, GivenUp, Mapped, Point, StatusRequest,
};

use super::{Out, findings_table, refused};
use crate::args::{Common, Domain, Which};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{confirm, json, progress, text};

/// The options of `activate`.
pub struct Activate<'a> {
    /// Only show the plan.
    pub dry_run: bool,
    /// Do not ask.
    pub yes: bool,
    /// Wait for everything.
    pub wait: bool,
    /// At which point.
    pub which: &'a Which,
    /// Also at one that is known to be damaged.
    pub damaged: bool,
}

impl Which {
    /// The time that it means; 0: none.
    pub fn at(&self) -> Result<u64, Failure> {
        at(self.before, self.at_unix_ns)
    }
}

/// The time that is meant by `--before` or `--at`; 0: none.
pub fn at(before: Option<Duration>, at_unix_ns: Option<u64>) -> Result<u64, Failure> {
    let Some(before) = before else { return Ok(at_unix_ns.unwrap_or(0)) };
    let then = SystemTime::now().checked_sub(before).and_then(|then| then.duration_since(UNIX_EPOCH).ok());
    let ns = then.and_then(|then| u64::try_from(then.as_nanos()).ok()).filter(|ns| *ns > 0);
    ns.ok_or_else(|| Failure::Usage("--before goes back to before there was anything".to_owned()))
}

/// Shows the plan, asks, activates, reports.
pub async fn activate(common: &Common, out: Out, domain: &Domain, options: Activate<'_>) -> Result<(), Failure> {
    if !options.dry_run {
        confirm::possible("activate", options.yes)?;
    }
    let mut receiver = client::receiver(common).await?;
    let mut request = ActivateRequest {
        domain: domain.0.clone(),
        dry_run: options.dry_run,
        wait: options.wait,
        point: options.which.point.clone().unwrap_or_default(),
        at_unix_ns: options.which.at()?,
        damaged: options.damaged,
    };
    let plan = answer(Daemon::Receiver, "activate", receiver.plan_activation(request.clone())).await?;
    let refused = refused(&plan.findings);
    if options.dry_run {
        out.result("activate-plan", || json::DryRun { plan: json::Plan::from(&plan) }, || plan_text(out, &plan))?;
    } else if out.is_json() {
        // Whoever is asked must see what about; stdout is for the document alone.
        if !options.yes || refused > 0 {
            // A stderr that is gone only means that nobody reads it.
            let _ = std::io::stderr().write_all(plan_text(out, &plan).as_bytes());
        }
    } else {
        super::write_stdout(plan_text(out, &plan).as_bytes())?;
    }
    let name = text::one_line(&plan.name);
    if refused > 0 {
        let findings = if refused == 1 { "1 finding refuses it" } else { "findings refuse it" };
        return Err(Failure::Failed(format!("{name} cannot be activated here: {findings}; nothing was done")));
    }
    if options.dry_run {
        return Ok(());
    }
    if !options.yes && !plan.already_active {
        let about = format!("This starts {name} here. Make sure that it no longer runs at the other site.\n");
        confirm::typed(&about, &plan.name).await?;
    }
    // What was shown and confirmed, however long that took; the newest stays the newest.
    if let Some(point) = plan.point.as_ref().filter(|_| plan.given_up.is_some()) {
        (request.point, request.at_unix_ns) = (point.id.clone(), 0);
    }
    let stream = receiver
        .activate(request)
        .await
        .map_err(|status| Failure::from_status(Daemon::Receiver, "activate", &status))?;
    let outcome = progress::follow(Daemon::Receiver, "activate", stream.into_inner()).await?;
    let report = outcome.report.as_ref().ok_or_else(|| {
        Failure::Failed(format!(
            "the receiver ended the activation of {name} without a report: run `vmdr activate {name}` again, which \
             never starts a second guest"
        ))
    })?;
    out.result(
        "activate",
        || json::Activation { plan: json::Plan::from(&plan), report: json::Report::from(report) },
        || {
            let messages: String = outcome.lasting().map(|message| text::wrapped("", message)).collect();
            messages + &report_text(out, report)
        },
    )?;
    match text::one_line(&report.failed) {
        failed if failed.is_empty() => Ok(()),
        failed => Err(Failure::Failed(format!("{name} runs here, but {failed}"))),
    }
}

fn plan_text(out: Out, plan: &ActivationPlan) -> String {
    let mut text = format!("Plan: activate {} ({})\n", text::one_line(&plan.name), text::one_line(&plan.uuid));
    if plan.already_active {
        text.push_str("  It is active here already: nothing will be done to a guest that runs.\n");
    } else {
        match &plan.point {
            Some(point) => {
                text.push_str(&format!("  recovery point: {}\n", point_text(point)));
                if point.damaged {
                    let damaged = "  DAMAGED:        some of its memory or disks is not what was written\n";
                    text.push_str(&out.paint(Tone::Bad, damaged));
                }
                let lost = format!(
                    "everything after that: {} until now, and more while you read this",
                    text::seconds(plan.lost_seconds)
                );
                text.push_str(&format!("  what is lost:   {}\n", out.paint(Tone::Bold, &lost)));
                text.push_str(&given_up_text(plan.given_up.as_ref()));
            }
            None => text.push_str("  recovery point: none\n"),
        }
        text.push_str(&mapping_text(&plan.mapping));
        for (number, step) in plan.steps.iter().enumerate() {
            text.push_str(&text::wrapped(&format!("  {}. ", number + 1), &text::one_line(step)));
        }
    }
    text + &findings_table(out, &plan.findings)
}

fn point_text(point: &Point) -> String {
    format!("{}, cut {} UTC, {}", text::one_line(&point.id), text::instant_short(point.cut_unix_ns), {
        match text::one_line(&point.consistency) {
            consistency if consistency.is_empty() => "crash-consistent".to_owned(),
            consistency => format!("{consistency}-consistent"),
        }
    })
}

/// What is somewhere else here.
pub(super) fn mapping_text(mapping: &[Mapped]) -> String {
    let line = |mapped: &Mapped| {
        let said = format!("{}: {} -> {}", mapped.device, mapped.from, mapped.to);
        text::wrapped("  mapped:         ", &text::one_line(&said))
    };
    mapping.iter().map(line).collect()
}

/// What was done by the recovery plan.
pub(super) fn applied_text(out: Out, report: &ActivationReport) -> String {
    let mut applied = mapping_text(&report.mapping);
    for announced in &report.announced {
        applied.push_str(&format!("  announced:      {}\n", text::one_line(announced)));
    }
    for (label, changes) in [("  in the guest:   ", &report.network), ("  names:          ", &report.dns)] {
        for change in changes {
            let how = if change.error.is_empty() { &change.done } else { &change.error };
            let said = text::wrapped(label, &text::one_line(&format!("{}: {how}", change.subject)));
            applied.push_str(&if change.error.is_empty() { said } else { out.paint(Tone::Bad, &said) });
        }
    }
    for hook in &report.hooks {
        let how = if hook.error.is_empty() { "done".to_owned() } else { text::one_line(&hook.error) };
        let said =
            format!("{}: {} ({}): {how}", hook.stage, text::one_line(&hook.command), text::seconds(hook.seconds));
        applied.push_str(&text::wrapped("  hook:           ", &said));
    }
    for warning in &report.warnings {
        let label = "  warning:        ";
        applied.push_str(&out.paint(Tone::Care, &text::wrapped(label, &text::one_line(warning))));
    }
    applied
}

/// What going back gives up, beside what the newest point has lost.
fn given_up_text(given_up: Option<&GivenUp>) -> String {
    given_up.map_or_else(String::new, |given| {
        format!(
            "  given up:       {} epochs that are newer ({} of the guest, {} written to disks); they stay here\n",
            given.epochs,
            text::seconds(given.seconds),
            text::bytes(given.disk_bytes as f64)
        )
    })
}

fn report_text(out: Out, report: &ActivationReport) -> String {
    let name = text::one_line(&report.name);
    if report.was_active {
        let said =
            format!("{}\n", out.paint(Tone::Good, &format!("{name} was running here already: nothing was done")));
        return said + &applied_text(out, report);
    }
    let mut text = format!("{}\n", out.paint(Tone::Good, &format!("{name} runs here")));
    text.push_str(&format!(
        "  RTO:            {}, from the request to the running guest\n",
        text::seconds(report.rto_seconds)
    ));
    if report.decrypted_bytes > 0 {
        text.push_str(&format!(
            "  decrypted:      {} in {} of that\n",
            text::bytes(report.decrypted_bytes as f64),
            text::seconds(report.decrypt_seconds)
        ));
    }
    if let Some(point) = &report.point {
        text.push_str(&format!("  recovery point: {}\n", point_text(point)));
    }
    text.push_str(&format!("  lost:           {}\n", text::seconds(report.lost_seconds)));
    text.push_str(&given_up_text(report.given_up.as_ref()));
    text.push_str(&format!("  generation:     {}\n", report.generation));
    text + &applied_text(out, report)
}

/// Asks, then deletes what is stored.
pub async fn forget(common: &Common, out: Out, domain: &Domain, yes: bool) -> Result<(), Failure> {
    confirm::possible("forget", yes)?;
    let mut receiver = client::receiver(common).await?;
    if !yes {
        let request = StatusRequest { domain: domain.0.clone() };
        let reply = answer(Daemon::Receiver, "status", receiver.status(request)).await?;
        let [status] = reply.domains.as_slice() else {
            return Err(Failure::NotFound(format!(
                "nothing is stored here of {}; `vmdr status` lists what is",
                text::one_line(&domain.0)
            )));
        };
        let about = format!(
            "This deletes all recovery points of {} ({}) at this site: {}.\n",
            text::one_line(&status.name),
            text::one_line(&status.uuid),
            text::bytes(status.stored_bytes as f64)
        );
        confirm::typed(&about, &status.name).await?;
    }
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Receiver, "forget", receiver.forget(request)).await?;
    out.result(
        "forget",
        || json::Forget { domain: domain.0.clone(), freed_bytes: reply.freed_bytes },
        || format!("{} is forgotten: {} freed\n", text::one_line(&domain.0), text::bytes(reply.freed_bytes as f64)),
    )
}
