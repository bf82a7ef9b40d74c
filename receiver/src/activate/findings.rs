//! Short ways to say what was found: a subject, a fact, a remedy.

use vmdr_proto::control::{Finding, Severity};

fn finding(severity: Severity, subject: &str, fact: &str, remedy: &str) -> Finding {
    let (subject, fact, remedy) = (subject.to_owned(), fact.to_owned(), remedy.to_owned());
    Finding { severity: severity.into(), subject, fact, remedy }
}

/// Something that works, worth saying.
pub fn ok(subject: &str, fact: &str) -> Finding {
    finding(Severity::Ok, subject, fact, "")
}

/// Something that changes what the operator gets.
pub fn warning(subject: &str, fact: &str, remedy: &str) -> Finding {
    finding(Severity::Warning, subject, fact, remedy)
}

/// Something that must be put right first.
pub fn refused(subject: &str, fact: &str, remedy: &str) -> Finding {
    finding(Severity::Refused, subject, fact, remedy)
}

/// The findings that forbid going on.
pub fn refusals(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings.iter().filter(|f| f.severity() == Severity::Refused)
}
