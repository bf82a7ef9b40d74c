//! Commands that change who owns a guest, or show what is left of an earlier owner: `move`, `failback`, `reprotect`, `own`,
//! `divergence`.

use serde::Serialize;
use vmdr_proto::control::{DivergenceRequest, MoveRequest, OwnRequest};

use super::Out;
use super::protected_side::{protect_request, protected};
use crate::args::{Common, Domain, Interval};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::{confirm, progress, text};

#[derive(Serialize)]
struct Moved {
    domain: String,
    uuid: String,
    generation: u64,
    epoch: u64,
    downtime_seconds: f64,
    protected_back: bool,
}

/// Moves a guest to the site that it is protected to; with `back` it is protected from there afterwards.
pub async fn move_away(common: &Common, out: Out, domain: &Domain, back: bool) -> Result<(), Failure> {
    let command = if back { "failback" } else { "move" };
    let request = MoveRequest { domain: domain.0.clone(), protect_back: back };
    let mut agent = client::agent(common).await?;
    let stream = agent.move_away(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Agent, command, &status))?;
    let outcome = progress::follow(Daemon::Agent, command, stream.into_inner()).await?;
    let moved =
        outcome.moved.ok_or_else(|| Failure::Failed(format!("the agent ended `{command}` without a report")))?;
    out.result(
        command,
        || Moved {
            domain: moved.name.clone(),
            uuid: moved.uuid.clone(),
            generation: moved.generation,
            epoch: moved.epoch,
            downtime_seconds: moved.downtime_seconds,
            protected_back: moved.protected_back,
        },
        || {
            let name = text::one_line(&moved.name);
            let line = format!(
                "{name} runs at the other site, from epoch {}, generation {}; it stood still for {:.2} s",
                moved.epoch, moved.generation, moved.downtime_seconds
            );
            let next = match moved.protected_back {
                true => "It is protected from there to here.".to_owned(),
                false => {
                    format!("It is not protected now: `vmdr reprotect {name}` at the other site protects it to here.")
                }
            };
            format!("{}\n", out.paint(Tone::Good, &line)) + &text::wrapped("", &next)
        },
    )
}

/// Protects a guest back to the site where it ran before.
pub async fn reprotect(
    common: &Common,
    out: Out,
    domain: &Domain,
    interval: Option<Interval>,
    receiver: Option<&str>,
) -> Result<(), Failure> {
    let request = protect_request(domain, interval, receiver, None, None);
    let mut agent = client::agent(common).await?;
    let stream = agent.reprotect(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Agent, "reprotect", &status))?;
    let outcome = progress::follow(Daemon::Agent, "reprotect", stream.into_inner()).await?;
    protected(out, "reprotect", domain, &outcome, || {
        let name = text::one_line(&domain.0);
        let line = out.paint(Tone::Good, &format!("{name} is protected to the other site"));
        format!("{line}\n") + &text::wrapped("", &format!("`vmdr failback {name}` takes it there."))
    })
}

#[derive(Serialize)]
struct Owned {
    domain: String,
    generation: u64,
    running: bool,
}

/// Makes this host the owner again.
pub async fn own(
    common: &Common,
    out: Out,
    domain: &Domain,
    force: bool,
    reason: Option<&str>,
    yes: bool,
) -> Result<(), Failure> {
    if force {
        confirm::possible("own --force", yes)?;
        if !yes {
            let name = text::one_line(&domain.0);
            let about = format!(
                "If {name} runs at the other site, it will run twice. Make sure that it does not, and never will again."
            );
            confirm::typed(&about, &domain.0).await?;
        }
    }
    let request = OwnRequest { domain: domain.0.clone(), force, reason: reason.unwrap_or_default().to_owned() };
    let reply = answer(Daemon::Agent, "own", client::agent(common).await?.own(request)).await?;
    out.result(
        "own",
        || Owned { domain: reply.name.clone(), generation: reply.generation, running: reply.running },
        || {
            let name = text::one_line(&reply.name);
            let line = format!("this host owns {name}, in generation {}", reply.generation);
            let next = match reply.running {
                true => format!("It runs. `vmdr status {name}` shows whether it is protected."),
                false => format!("It does not run: `virsh start {name}`."),
            };
            format!("{}\n", out.paint(Tone::Good, &line)) + &text::wrapped("", &next)
        },
    )
}

#[derive(Serialize)]
struct Divergence {
    domain: String,
    dropped: bool,
    freed_bytes: u64,
    sets: Vec<Set>,
}

#[derive(Serialize)]
struct Set {
    generation: u64,
    since: Option<String>,
    until: Option<String>,
    files: Vec<File>,
}

#[derive(Serialize)]
struct File {
    target: String,
    path: String,
    format: String,
    bytes: u64,
    differing_bytes: Option<u64>,
    own: bool,
}

/// Lists what is kept aside of a domain's old disks here, or drops it.
pub async fn divergence(common: &Common, out: Out, domain: &Domain, drop: bool, yes: bool) -> Result<(), Failure> {
    if drop {
        confirm::possible("divergence --drop", yes)?;
    }
    let mut receiver = client::receiver(common).await?;
    let list = DivergenceRequest { domain: domain.0.clone(), drop: false };
    let mut reply = answer(Daemon::Receiver, "divergence", receiver.divergence(list)).await?;
    let name = text::one_line(&domain.0);
    if drop {
        if !yes && !reply.sets.is_empty() {
            let paths = reply.sets.iter().flat_map(|set| &set.files).map(|file| text::one_line(&file.path));
            let about = format!("These are deleted: {}.", paths.collect::<Vec<_>>().join(", "));
            confirm::typed(&about, &domain.0).await?;
        }
        let drop = DivergenceRequest { domain: domain.0.clone(), drop: true };
        reply = answer(Daemon::Receiver, "divergence --drop", receiver.divergence(drop)).await?;
    }
    out.result(
        "divergence",
        || Divergence {
            domain: domain.0.clone(),
            dropped: drop,
            freed_bytes: reply.freed_bytes,
            sets: reply
                .sets
                .iter()
                .map(|set| Set {
                    generation: set.generation,
                    since: text::instant(set.since_unix_ns),
                    until: text::instant(set.until_unix_ns),
                    files: set
                        .files
                        .iter()
                        .map(|file| File {
                            target: file.target.clone(),
                            path: file.path.clone(),
                            format: file.format.clone(),
                            bytes: file.bytes,
                            differing_bytes: (file.differing_bytes > 0).then_some(file.differing_bytes),
                            own: file.own,
                        })
                        .collect(),
                })
                .collect(),
        },
        || {
            if reply.sets.is_empty() {
                return format!("nothing of {name} is kept aside here\n");
            }
            let mut table = String::new();
            for set in &reply.sets {
                let since = text::instant(set.since_unix_ns).unwrap_or_default();
                let until = text::instant(set.until_unix_ns).unwrap_or_default();
                let what = if drop { "dropped" } else { "kept" };
                table.push_str(&format!(
                    "{what}: before generation {} went on elsewhere, since {since}, until {until}\n",
                    set.generation
                ));
                for file in &set.files {
                    let differs = match file.differing_bytes {
                        0 => String::new(),
                        bytes => format!(", {} written here", text::bytes(bytes as f64)),
                    };
                    let whose = if file.own { "" } else { ", not vmdr's: removed by --drop only" };
                    table.push_str(&text::wrapped(
                        "  ",
                        &format!(
                            "{} {} ({}, {}{differs}{whose})",
                            text::one_line(&file.target),
                            text::one_line(&file.path),
                            text::one_line(&file.format),
                            text::bytes(file.bytes as f64)
                        ),
                    ));
                }
            }
            table
        },
    )
}
