//! The commands: one function each, from the parsed command line to what stands on stdout.

use std::io::{ErrorKind, Write};

use vmdr_proto::control;

use crate::args::{
    self, AuditAction, Cli, Command, Failover, GroupAction, Output, PeersAction, PlanAction, PointAction,
};
use crate::failure::Failure;
use crate::json;
use crate::style::{Style, Tone};
use crate::text;

mod audit;
mod backup_side;
mod cold;
mod drill;
mod group;
mod history;
mod ownership;
mod peers;
mod plan;
mod protected_side;
mod status;
mod verify;

/// Does what the command line says.
pub async fn run(cli: &Cli) -> Result<(), Failure> {
    let out = Out { output: cli.common.output, style: Style::of(&std::io::stdout()) };
    let common = &cli.common;
    match &cli.command {
        Command::Doctor { domain } => protected_side::doctor(common, out, domain.as_ref()).await,
        Command::Prepare { domain } => protected_side::prepare(common, out, domain).await,
        Command::Protect { domain, interval, receiver, application_every, failover } => {
            let request = protected_side::protect_request(
                domain,
                *interval,
                receiver.as_deref(),
                *application_every,
                failover.map(Failover::name),
            );
            protected_side::protect(common, out, domain, request).await
        }
        Command::Hold { domain } => protected_side::hold(common, out, domain).await,
        Command::Release { domain } => protected_side::release(common, out, domain).await,
        Command::Suspend { domain } => protected_side::suspend(common, out, domain).await,
        Command::Resume { domain } => protected_side::resume(common, out, domain).await,
        Command::Unprotect { domain } => protected_side::unprotect(common, out, domain).await,
        Command::Move { domain } => ownership::move_away(common, out, domain, false).await,
        Command::Failback { domain } => ownership::move_away(common, out, domain, true).await,
        Command::Reprotect { domain, interval, receiver } => {
            ownership::reprotect(common, out, domain, *interval, receiver.as_deref()).await
        }
        Command::Own { domain, force, reason, yes } => {
            ownership::own(common, out, domain, *force, reason.as_deref(), *yes).await
        }
        Command::Divergence { domain, drop, yes } => ownership::divergence(common, out, domain, *drop, *yes).await,
        Command::Status { domain } => status::status(common, out, domain.as_ref()).await,
        Command::Points { domain } => history::points(common, out, domain).await,
        Command::Point { action: PointAction::Create { domain, name, application: true, .. } } => {
            history::create_application(common, out, domain, name).await
        }
        Command::Point { action: PointAction::Create { domain, name, point, .. } } => {
            history::create(common, out, domain, name, point.as_deref()).await
        }
        Command::Point { action: PointAction::Release { domain, name } } => {
            history::release(common, out, domain, name).await
        }
        Command::Retention { domain, tiers, budget, reset } => {
            history::retention(common, out, domain, tiers, *budget, *reset).await
        }
        Command::Verify { domain, point, all, wait } => {
            verify::verify(common, out, domain, point.as_deref(), *all, *wait).await
        }
        Command::Inspect { arguments } => Err(verify::inspect(arguments, out.is_json())),
        Command::Activate { domain, dry_run, yes, wait, which, damaged } => {
            let options = backup_side::Activate { dry_run: *dry_run, yes: *yes, wait: *wait, which, damaged: *damaged };
            backup_side::activate(common, out, domain, options).await
        }
        Command::Drill { domain, end: true, .. } => drill::end(common, out, domain).await,
        Command::Drill { domain, which, keep, wait, checks, run, end: false } => {
            let options = drill::Drill { which, keep: *keep, wait: *wait, checks: checks.clone(), run: *run };
            drill::drill(common, out, domain, options).await
        }
        Command::Export { domain, point, prune } => cold::export(common, out, domain, point.as_deref(), *prune).await,
        Command::Import { domain, from, key_file, list, point } => {
            let (from, key_file) = (from.as_deref(), key_file.as_deref());
            match domain {
                Some(domain) if !*list => cold::import(common, out, domain, from, key_file, point.as_deref()).await,
                domain => cold::list(common, out, domain.as_ref(), from, key_file).await,
            }
        }
        Command::Group { action: GroupAction::List } => group::list(common, out).await,
        Command::Group { action: GroupAction::Report { group } } => group::report(common, out, group).await,
        Command::Group { action: GroupAction::Stop { group } } => group::stop(common, out, group).await,
        Command::Group { action: GroupAction::Activate { group, dry_run, yes, which, damaged } } => {
            let options = group::Activate { dry_run: *dry_run, yes: *yes, which, damaged: *damaged };
            group::activate(common, out, group, options).await
        }
        Command::Plan { action: PlanAction::Check { file, offline } } => plan::check(common, out, file, *offline).await,
        Command::Forget { domain, yes } => backup_side::forget(common, out, domain, *yes).await,
        Command::Pair { with: None, valid } => peers::show_token(common, out, *valid).await,
        Command::Pair { with: Some(address), .. } => peers::join(common, out, address).await,
        Command::Peers { action: None | Some(PeersAction::List) } => peers::list(common, out).await,
        Command::Peers { action: Some(PeersAction::Revoke { peer }) } => peers::revoke(common, out, peer).await,
        Command::Peers { action: Some(PeersAction::At { peer, address }) } => {
            peers::locate(common, out, peer, address).await
        }
        Command::Peers { action: Some(PeersAction::Rotate) } => peers::rotate(common, out).await,
        Command::Peers { action: Some(PeersAction::Grant { domain, peer, withdraw }) } => {
            peers::grant(common, out, domain, peer, *withdraw).await
        }
        Command::Audit { lines, action: None } => audit::show(common, out, *lines).await,
        Command::Audit { action: Some(AuditAction::Verify { dir }), .. } => {
            audit::verify(common, out, dir.as_deref()).await
        }
        Command::Completions { shell } => write_stdout(&args::completions(*shell)),
    }
}

/// How results are written.
#[derive(Clone, Copy)]
struct Out {
    output: Output,
    style: Style,
}

impl Out {
    fn is_json(self) -> bool {
        self.output == Output::Json
    }

    fn paint(self, tone: Tone, text: &str) -> String {
        self.style.paint(tone, text)
    }

    /// The result in the form that was asked for; only that one is made.
    fn result<T: serde::Serialize>(
        self,
        kind: &str,
        document: impl FnOnce() -> T,
        table: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let text = if self.is_json() { json::document(kind, document())? } else { table() };
        write_stdout(text.as_bytes())
    }
}

fn write_stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        // The reader has seen enough (`vmdr points web1 | head`).
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Failure::Failed(format!("cannot write the result: {e}"))),
    }
}

fn refused(findings: &[control::Finding]) -> usize {
    findings.iter().filter(|finding| json::severity(finding) == "refused").count()
}

/// `refused  hostdev  fact` with its remedy below, for each finding.
fn findings_table(out: Out, findings: &[control::Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let word = json::severity(finding);
        let tone = match word {
            "ok" => Tone::Good,
            "warning" => Tone::Care,
            _ => Tone::Bad,
        };
        let (subject, fact) = (text::one_line(&finding.subject), text::one_line(&finding.fact));
        let line = text::wrapped(&format!("{word:<7}  "), &format!("{subject}: {fact}"));
        text.push_str(&line.replacen(word, &out.paint(tone, word), 1));
        let remedy = text::one_line(&finding.remedy);
        if !remedy.is_empty() && word != "ok" {
            text.push_str(&text::wrapped("         -> ", &remedy));
        }
    }
    text
}
