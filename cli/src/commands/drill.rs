//! `drill`: rehearses an activation at the backup site.

use std::time::Duration;

use vmdr_proto::control::{DomainRequest, DrillReport, DrillRequest};

use super::Out;
use crate::args::{Common, Domain, Which};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{json, progress, text};

/// The options of `drill`.
pub struct Drill<'a> {
    /// At which point.
    pub which: &'a Which,
    /// The copy runs on.
    pub keep: bool,
    /// Wait for the end.
    pub wait: bool,
    /// What is checked.
    pub checks: Vec<String>,
    /// How long the copy has to run.
    pub run: Option<Duration>,
}

/// Begins a drill; shows how it went.
pub async fn drill(common: &Common, out: Out, domain: &Domain, options: Drill<'_>) -> Result<(), Failure> {
    // A part of a second counts as one.
    let run_seconds = options.run.map_or(0, |run| u32::try_from(run.as_millis().div_ceil(1000)).unwrap_or(u32::MAX));
    let request = DrillRequest {
        domain: domain.0.clone(),
        point: options.which.point.clone().unwrap_or_default(),
        at_unix_ns: options.which.at()?,
        keep: options.keep,
        wait: options.wait,
        checks: options.checks,
        run_seconds,
    };
    let mut receiver = client::receiver(common).await?;
    let stream = receiver.drill(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Receiver, "drill", &status))?;
    let outcome = progress::follow(Daemon::Receiver, "drill", stream.into_inner()).await?;
    let name = text::one_line(&domain.0);
    let report = outcome.drill.ok_or_else(|| {
        Failure::Failed(format!("the receiver ended without saying how the drill went: see `vmdr status {name}`"))
    })?;
    shown(out, &report)
}

/// Ends the drill that is under way or kept.
pub async fn end(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let mut receiver = client::receiver(common).await?;
    let request = DomainRequest { domain: domain.0.clone() };
    let report = answer(Daemon::Receiver, "end the drill", receiver.end_drill(request)).await?;
    out.result("drill", || json::DrillDocument::new(&report), || report_text(out, &report))
}

fn shown(out: Out, report: &DrillReport) -> Result<(), Failure> {
    out.result("drill", || json::DrillDocument::new(report), || report_text(out, report))?;
    match report.result.as_str() {
        "passed" | "under way" => Ok(()),
        other => {
            Err(Failure::Failed(format!("the drill of {}: {}", text::one_line(&report.name), text::one_line(other))))
        }
    }
}

fn report_text(out: Out, report: &DrillReport) -> String {
    let (name, id) = (text::one_line(&report.name), text::one_line(&report.id));
    if report.result == "under way" {
        return format!("drill {id} of {name} is under way; `vmdr status {name}` shows how it goes\n");
    }
    let tone = if report.result == "passed" { Tone::Good } else { Tone::Bad };
    let head = format!("drill {id} of {name}: {}", text::one_line(&report.result));
    let mut said = format!("{}\n", out.paint(tone, &head));
    if !report.error.is_empty() {
        said.push_str(&text::wrapped("  why:            ", &text::one_line(&report.error)));
    }
    if !report.point.is_empty() {
        let (point, cut) = (text::one_line(&report.point), text::instant_short(report.cut_unix_ns));
        said.push_str(&format!("  recovery point: {point}, cut {cut} UTC\n"));
    }
    if report.rto_seconds > 0.0 {
        said.push_str(&format!("  RTO:            {}\n", text::seconds(report.rto_seconds)));
    }
    if report.copy_seconds > 0.0 {
        said.push_str(&format!(
            "  copy:           {}, {} written, {} shared with the standby\n",
            text::seconds(report.copy_seconds),
            text::bytes(report.copied_bytes as f64),
            text::bytes(report.shared_bytes as f64)
        ));
    }
    for check in &report.checks {
        let word = if check.passed { "passed" } else { "failed" };
        let label = format!("  {word}:         ");
        let sentence = format!("{}: {}", text::one_line(&check.check), text::one_line(&check.said));
        let line = text::wrapped(&label, sentence.trim_end_matches([' ', ':']));
        said.push_str(&if check.passed { line } else { line.replacen(word, &out.paint(Tone::Bad, word), 1) });
    }
    if report.kept {
        let (copy, bridges) = (text::one_line(&report.copy_name), report.bridges.join(", "));
        let what = format!("{copy} runs on, on {}; `vmdr drill {name} --end` removes it", text::one_line(&bridges));
        said.push_str(&text::wrapped("  kept:           ", &what));
    }
    said
}
