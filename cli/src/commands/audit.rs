//! `audit`, `audit verify`: what was done and refused on this host, and whether the record of it is whole.

use std::path::Path;

use serde_json::Value;
use vmdr_proto::host::AuditRequest;

use super::Out;
use crate::args::Common;
use crate::client::{self, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{json, text};

/// The newest records of both daemons, by time.
pub async fn show(common: &Common, out: Out, lines: u32) -> Result<(), Failure> {
    let mut records: Vec<(String, Value)> = Vec::new();
    for daemon in client::there(common)? {
        let request = AuditRequest { lines, ..AuditRequest::default() };
        let reply = answer(daemon, "audit", client::host(daemon, common).await?.audit(request)).await?;
        let mut newest = String::new();
        for line in &reply.lines {
            // A line that is no record is shown as it stands, where it stands; `verify` says what is wrong with it.
            let record = serde_json::from_str(line).unwrap_or_else(|_| Value::String(line.clone()));
            if let Some(time) = record["time"].as_str() {
                time.clone_into(&mut newest);
            }
            records.push((newest.clone(), record));
        }
    }
    records.sort_by(|(one, _), (other, _)| one.cmp(other));
    let records: Vec<Value> = records.into_iter().map(|(_, record)| record).collect();
    let table = || {
        let line = |record: &Value| {
            if let Value::String(line) = record {
                return text::wrapped("no record: ", &out.paint(Tone::Bad, &text::one_line(line)));
            }
            let of = |key: &str| text::one_line(record[key].as_str().unwrap_or_default());
            let times = record["count"].as_u64().map(|count| format!(" ({count} times)")).unwrap_or_default();
            let (subject, detail) = (of("subject"), of("detail"));
            let subject = if subject.is_empty() { subject } else { format!(" {subject}") };
            let detail = if detail.is_empty() { detail } else { format!(": {detail}") };
            let outcome = of("outcome");
            let tone = if outcome == "refused" || outcome == "failed" { Tone::Bad } else { Tone::Bold };
            let line = format!("{} {:<8} ", of("time"), of("daemon"));
            let what = format!("{outcome} {}{subject}, by {}{times}{detail}", of("act"), of("actor"));
            text::wrapped(&line, &what).replacen(&outcome, &out.paint(tone, &outcome), 1)
        };
        records.iter().map(line).collect()
    };
    out.result("audit", || json::Audit { records: records.clone() }, table)
}

/// Reads the logs; fails when one is not whole.
pub async fn verify(common: &Common, out: Out, directory: Option<&Path>) -> Result<(), Failure> {
    let mut verdicts = Vec::new();
    if let Some(directory) = directory {
        let failed = |error: vmdr_audit::AuditError| Failure::Failed(error.to_string());
        for daemon in vmdr_audit::daemons(directory).map_err(failed)? {
            let verdict = vmdr_audit::verify(directory, &daemon).map_err(failed)?;
            verdicts.push(json::AuditVerdict {
                daemon: verdict.daemon,
                records: verdict.records,
                last: verdict.last,
                hash: verdict.hash,
                fault: verdict.fault.map(|fault| fault.to_string()),
            });
        }
        if verdicts.is_empty() {
            return Err(Failure::NotFound(format!("{} has no audit log", directory.display())));
        }
    } else {
        for daemon in client::there(common)? {
            let request = AuditRequest::default();
            let reply =
                answer(daemon, "audit verify", client::host(daemon, common).await?.verify_audit(request)).await?;
            verdicts.push(json::AuditVerdict {
                daemon: reply.daemon,
                records: reply.records,
                last: reply.last,
                hash: reply.hash,
                fault: (!reply.fault.is_empty()).then_some(reply.fault),
            });
        }
    }
    let faults = verdicts.iter().filter(|verdict| verdict.fault.is_some()).count();
    let table = || {
        let line = |verdict: &json::AuditVerdict| match &verdict.fault {
            None => format!(
                "{}: whole, {} records, the newest is {} with hash {}\n",
                verdict.daemon, verdict.records, verdict.last, verdict.hash
            ),
            Some(fault) => {
                let fault = format!("{} after {} good records", text::one_line(fault), verdict.records);
                text::wrapped(&format!("{}: ", verdict.daemon), &out.paint(Tone::Bad, &fault))
            }
        };
        verdicts.iter().map(line).collect()
    };
    out.result("audit-verify", || json::AuditVerify { ok: faults == 0, logs: &verdicts }, table)?;
    if faults > 0 {
        return Err(Failure::Failed("the audit log was changed".to_owned()));
    }
    Ok(())
}
