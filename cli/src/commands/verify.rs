//! Commands that look whether what is stored is sound: `verify`, and `inspect`, which is a program of its own because it
//! needs no daemon.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use vmdr_proto::control::{VerifyReport, VerifyRequest};

use super::Out;
use crate::args::{Common, Domain};
use crate::client::{self, Daemon};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{json, progress, text};

/// The offline tool, beside this program or in the search path.
const INSPECT: &str = "vmdr-inspect";

/// Has points read again.
pub async fn verify(
    common: &Common,
    out: Out,
    domain: &Domain,
    point: Option<&str>,
    all: bool,
    wait: bool,
) -> Result<(), Failure> {
    let point = point.unwrap_or_default().to_owned();
    let request = VerifyRequest { domain: domain.0.clone(), point, all, wait };
    let mut receiver = client::receiver(common).await?;
    let stream = receiver.verify(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Receiver, "verify", &status))?;
    let outcome = progress::follow(Daemon::Receiver, "verify", stream.into_inner()).await?;
    let report = outcome.verification.ok_or_else(|| {
        Failure::Failed(
            "the receiver ended without saying what it has found: `vmdr points` has what it noted".to_owned(),
        )
    })?;
    out.result("verify", || json::Verification::new(&domain.0, &report), || report_text(out, domain, &report))?;
    match report.damaged.len() {
        0 => Ok(()),
        n => Err(Failure::Failed(format!("{}: {n} recovery points are damaged", text::one_line(&domain.0)))),
    }
}

fn report_text(out: Out, domain: &Domain, report: &VerifyReport) -> String {
    let name = text::one_line(&domain.0);
    if !report.ended {
        return format!("{name} is being verified; `vmdr points {name}` shows what has been\n");
    }
    let mut said = String::new();
    if report.damaged.is_empty() {
        let points = match report.sound.as_slice() {
            [one] => format!("recovery point {} is", text::one_line(one)),
            many => format!("{} recovery points are", many.len()),
        };
        let read = text::bytes(report.bytes as f64);
        said.push_str(&format!("{}: {read} read\n", out.paint(Tone::Good, &format!("{name}: {points} sound"))));
    } else {
        let (sound, damaged) = (report.sound.len(), report.damaged.len());
        said.push_str(&format!("{}\n", out.paint(Tone::Bad, &format!("{name}: {damaged} damaged, {sound} sound"))));
    }
    for what in &report.damage {
        said.push_str(&text::wrapped("  damaged: ", &text::one_line(what)));
    }
    said
}

/// Becomes the offline tool.
pub fn inspect(arguments: &[OsString], json: bool) -> Failure {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(INSPECT)).filter(|path| path.exists());
    let program = beside.map_or_else(|| INSPECT.into(), |path| path.into_os_string());
    let json = json.then_some("--json");
    let error = Command::new(&program).args(json).args(arguments).exec();
    Failure::Failed(format!("cannot run {}: {error}; it is installed with the receiver", program.to_string_lossy()))
}
