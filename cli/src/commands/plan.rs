//! `plan check`: what is wrong with a recovery plan. Whether it makes sense by itself is found out here; whether it fits the site,
//! the receiver is asked.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmdr_plan::{Mistake, Plan};
use vmdr_proto::control::{CheckPlanRequest, PlanFinding, Severity};

use super::Out;
use crate::args::Common;
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{json, text};

/// Permission to write for others than the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Checks a plan.
pub async fn check(common: &Common, out: Out, file: &Path, offline: bool) -> Result<(), Failure> {
    let shown = text::one_line(&file.display().to_string());
    let plan_text = std::fs::read_to_string(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::Usage(format!("there is no plan {shown}")),
        _ => Failure::Usage(format!("read the plan {shown}: {error}")),
    })?;
    let refused = |mistake: Mistake| PlanFinding {
        severity: Severity::Refused.into(),
        line: mistake.place.line,
        column: mistake.place.column,
        message: mistake.message,
    };
    let (findings, domains, asked) = match Plan::parse(&plan_text) {
        Err(mistakes) => (mistakes.into_iter().map(refused).collect(), Vec::new(), false),
        Ok(plan) if offline => {
            let findings = plan.unsupported().into_iter().map(refused).collect();
            (findings, plan.domains.into_iter().map(|domain| domain.name.value).collect(), false)
        }
        Ok(_) => {
            let mut receiver = client::receiver(common).await?;
            let request = CheckPlanRequest { text: plan_text };
            let reply = answer(Daemon::Receiver, "plan check", receiver.check_plan(request)).await?;
            (reply.findings, reply.domains, true)
        }
    };
    let mut findings: Vec<PlanFinding> = findings;
    if let Some(finding) = open_to_others(file) {
        findings.insert(0, finding);
    }
    let count = findings.iter().filter(|finding| word(finding) == "refused").count();
    let document = || json::PlanCheck {
        file: file.display().to_string(),
        ok: count == 0,
        site_checked: asked,
        domains: domains.clone(),
        findings: findings.iter().map(|finding| json::PlanFinding::new(word(finding), finding)).collect(),
    };
    out.result("plan-check", document, || table(out, &shown, &findings, &domains, asked, count))?;
    match count {
        0 => Ok(()),
        1 => Err(Failure::Failed(format!("the plan {shown} is refused: 1 mistake"))),
        n => Err(Failure::Failed(format!("the plan {shown} is refused: {n} mistakes"))),
    }
}

/// The receiver refuses a file that others can write: the programs that it names run as root.
fn open_to_others(file: &Path) -> Option<PlanFinding> {
    let mode = std::fs::metadata(file).ok()?.mode();
    (mode & OTHERS_WRITE != 0).then(|| PlanFinding {
        severity: Severity::Refused.into(),
        message: format!("others than its owner can write it: `chmod go-w {}`", file.display()),
        ..PlanFinding::default()
    })
}

/// A severity that this version does not know is a refusal.
fn word(finding: &PlanFinding) -> &'static str {
    match Severity::try_from(finding.severity) {
        Ok(Severity::Ok) => "ok",
        Ok(Severity::Warning) => "warning",
        Ok(Severity::Refused) | Err(_) => "refused",
    }
}

/// `FILE:LINE:COLUMN: refused: message`, one a line, as editors take them: never wrapped.
fn table(out: Out, file: &str, findings: &[PlanFinding], domains: &[String], asked: bool, refused: usize) -> String {
    let mut lines = String::new();
    for finding in findings {
        let word = word(finding);
        let tone = if word == "refused" { Tone::Bad } else { Tone::Care };
        let place = if finding.line > 0 { format!(":{}:{}", finding.line, finding.column) } else { String::new() };
        let message = text::one_line(&finding.message);
        lines.push_str(&format!("{file}{place}: {}: {message}\n", out.paint(tone, word)));
    }
    if refused == 0 {
        let of = match domains.len() {
            0 => "names no domain".to_owned(),
            1 => "names 1 domain".to_owned(),
            n => format!("names {n} domains"),
        };
        let how =
            if asked { "fits this site" } else { "makes sense by itself; whether it fits the site was not asked" };
        lines.push_str(&format!("{}\n", out.paint(Tone::Good, &format!("the plan {file} {of} and {how}"))));
    }
    lines
}
