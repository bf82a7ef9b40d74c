//! Commands to the agent: `doctor`, `prepare`, `protect`, `hold`, `release`, `suspend`, `resume`, `unprotect`.

use vmdr_proto::control::{DoctorRequest, DomainRequest, ProtectRequest};

use super::{Out, findings_table, refused};
use crate::args::{Common, Domain, Interval};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{json, progress, text};

/// Shows the findings; fails when one of them is a refusal.
pub async fn doctor(common: &Common, out: Out, domain: Option<&Domain>) -> Result<(), Failure> {
    let name = domain.map(|domain| domain.0.clone());
    let request = DoctorRequest { domain: name.clone().unwrap_or_default() };
    let reply = answer(Daemon::Agent, "doctor", client::agent(common).await?.doctor(request)).await?;
    let refused = refused(&reply.findings);
    let subject = name.as_deref().map_or_else(|| "this host".to_owned(), text::one_line);
    out.result(
        "doctor",
        || json::Doctor {
            domain: name.clone(),
            ok: refused == 0,
            findings: reply.findings.iter().map(json::Finding::from).collect(),
        },
        || {
            let mut table = findings_table(out, &reply.findings);
            if refused == 0 {
                let verdict = format!("{subject} can be used for protection");
                let verdict = if name.is_some() { format!("{subject} can be protected") } else { verdict };
                table.push_str(&format!("{}\n", out.paint(Tone::Good, &verdict)));
            }
            table
        },
    )?;
    match refused {
        0 => Ok(()),
        1 => Err(Failure::Failed(format!("{subject} cannot be protected: 1 finding refuses it"))),
        n => Err(Failure::Failed(format!("{subject} cannot be protected: {n} findings refuse it"))),
    }
}

/// Adds the socket to the persistent XML.
pub async fn prepare(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Agent, "prepare", client::agent(common).await?.prepare(request)).await?;
    out.result(
        "prepare",
        || json::Prepare {
            domain: domain.0.clone(),
            changed: reply.changed,
            restart_needed: reply.restart_needed,
            qmp_socket: reply.qmp_socket.clone(),
        },
        || {
            let name = text::one_line(&domain.0);
            let socket = text::one_line(&reply.qmp_socket);
            let first = if reply.changed {
                format!("{name} is prepared: its control socket will be {socket}\n")
            } else {
                format!("{name} was prepared already: its control socket is {socket}\n")
            };
            let next = if reply.restart_needed {
                "It is there from the guest's next start: shut it down and start it (a reboot inside the guest is not enough). \
                 Until then `vmdr protect` takes its checkpoints through libvirt's monitor, 1 s and more apart."
            } else {
                "Nothing more is needed for `vmdr protect`."
            };
            first + &text::wrapped("", next)
        },
    )
}

/// What `protect` and `reprotect` ask for.
pub(super) fn protect_request(
    domain: &Domain,
    interval: Option<Interval>,
    receiver: Option<&str>,
    application_every: Option<u64>,
    failover: Option<&str>,
) -> ProtectRequest {
    ProtectRequest {
        domain: domain.0.clone(),
        interval_ms: interval.map_or(0, |interval| interval.ms),
        receiver: receiver.unwrap_or_default().to_owned(),
        application_every_seconds: application_every.unwrap_or(0),
        failover: failover.unwrap_or_default().to_owned(),
    }
}

/// What they say once the guest is protected: the warnings, and the last words.
pub(super) fn protected(
    out: Out,
    command: &str,
    domain: &Domain,
    outcome: &progress::Outcome,
    last: impl FnOnce() -> String,
) -> Result<(), Failure> {
    out.result(
        command,
        || json::Protect { domain: domain.0.clone(), protected: true, messages: outcome.messages.clone() },
        || outcome.lasting().map(|message| text::wrapped("", message)).collect::<String>() + &last(),
    )
}

/// Starts protection and waits for the first recovery point.
pub async fn protect(common: &Common, out: Out, domain: &Domain, request: ProtectRequest) -> Result<(), Failure> {
    let failover = request.failover.clone();
    let mut agent = client::agent(common).await?;
    let stream =
        agent.protect(request).await.map_err(|status| Failure::from_status(Daemon::Agent, "protect", &status))?;
    let outcome = progress::follow(Daemon::Agent, "protect", stream.into_inner()).await?;
    protected(out, "protect", domain, &outcome, || {
        let and = if failover.is_empty() { String::new() } else { format!(", its failover is {failover}") };
        format!("{}\n", out.paint(Tone::Good, &format!("{} is protected{and}", text::one_line(&domain.0))))
    })
}

/// Pauses the guest with a checkpoint that is durable when this ends.
pub async fn hold(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Agent, "hold", client::agent(common).await?.hold(request)).await?;
    out.result(
        "hold",
        || json::Hold { domain: domain.0.clone(), held: true, epoch: reply.epoch },
        || {
            let name = text::one_line(&domain.0);
            let held =
                format!("{name} is held: it is paused, and epoch {} at the receiver is level with it", reply.epoch);
            format!("{}\n", out.paint(Tone::Care, &held))
                + &text::wrapped("", &format!("`vmdr release {name}` lets it run on."))
        },
    )
}

/// Ends a hold.
pub async fn release(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    answer(Daemon::Agent, "release", client::agent(common).await?.release(request)).await?;
    out.result(
        "release",
        || json::Release { domain: domain.0.clone(), held: false },
        || format!("{}\n", out.paint(Tone::Good, &format!("{} runs again", text::one_line(&domain.0)))),
    )
}

/// Takes protection off for a while.
pub async fn suspend(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Agent, "suspend", client::agent(common).await?.suspend(request)).await?;
    out.result(
        "suspend",
        || json::Suspend { domain: domain.0.clone(), suspended: true, epoch: reply.epoch },
        || {
            let name = text::one_line(&domain.0);
            let line = format!("{name} is not protected for now; the recovery point of epoch {} stays", reply.epoch);
            format!("{}\n", out.paint(Tone::Care, &line))
                + &text::wrapped("", &format!("`vmdr resume {name}` goes on, with what changed meanwhile."))
        },
    )
}

/// Puts it back on.
pub async fn resume(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    answer(Daemon::Agent, "resume", client::agent(common).await?.resume(request)).await?;
    out.result(
        "resume",
        || json::Resume { domain: domain.0.clone(), suspended: false },
        || {
            let name = text::one_line(&domain.0);
            format!("{}\n", out.paint(Tone::Good, &format!("protection of {name} goes on")))
                + &text::wrapped(
                    "",
                    "What changed meanwhile is sent first: `vmdr status` shows when it is protected again.",
                )
        },
    )
}

/// Ends protection.
pub async fn unprotect(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Agent, "unprotect", client::agent(common).await?.unprotect(request)).await?;
    let name = if reply.domain.is_empty() { domain.0.clone() } else { reply.domain };
    out.result(
        "unprotect",
        || json::Unprotect { domain: name.clone(), protected: false },
        || format!("{} is no longer protected; its recovery points stay at the receiver\n", text::one_line(&name)),
    )
}
