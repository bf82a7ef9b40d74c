//! Brings a guest's file systems to rest for the moment of a cut: an application-consistent point.
//!
//! ```text
//!   session            thread "freeze NAME"        guest
//!      | begin ---------------> | ------ freeze ----> | hooks, write out, freeze
//!      |  (cuts go on)          | <----- frozen ----- |
//!      | <------- Frozen ------ |
//!      | cut; the guest runs again
//!      | ------------------- thaw ------------------> | thaw, hooks
//!      | <-------- thawed: all held until now ------- |
//!      | the epoch is shipped, marked
//! ```
//! - Through vmdr's tools in the guest ([`tools`]), which thaw by themselves whatever becomes of the host; or through the QEMU
//!   guest agent ([`helper`]), which does not: a process beside the agent then sees to it.
//! - A thaw follows every freeze: [`Frozen`] asks for it when it is dropped, whoever drops it.
//! - The mark says that the guest has answered, *after* the cut, that everything was frozen until it was asked to thaw. A guest
//!   that lies so spoils its own point and nothing else.
//! - Everything is waited for with a limit, and cuts go on meanwhile. The only wait of the session's is that for the answer
//!   to the thaw ([`THAW_LIMIT`]), once in a point.

pub mod helper;
pub mod stage;
pub mod tools;

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmdr_guest_channel::PORT;
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel};
use vmdr_hypervisor::libvirt::Connection;
use vmdr_hypervisor::xml::Element;

use crate::config::Config;
use vmdr_daemon::guest_channel::{Line, NoAnswer};

/// How long the answer to a thaw is waited for. Without one the point counts as crash-consistent.
pub const THAW_LIMIT: Duration = Duration::from_secs(2);
/// How much of the time for which a guest stays frozen may pass before the cut: what is left is for the thaw.
const CUT_WITHIN: f64 = 0.75;

/// How long what may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until all is frozen, hooks included.
    pub freeze: Duration,
    /// From then on.
    pub hold: Duration,
}

impl Limits {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        let ms = |ms: u32| Duration::from_millis(ms.into());
        Self { freeze: ms(config.freeze_limit_ms), hold: ms(config.frozen_limit_ms) }
    }
}

/// Who is asked to freeze.
#[derive(Clone, Debug)]
enum Way {
    Tools(Arc<Line>),
    Agent,
}

/// What a thaw has found.
#[derive(Clone, Debug, PartialEq)]
pub struct Thawed {
    /// All that was frozen was so until the thaw was asked for.
    pub held: bool,
    /// For how long the guest's file systems were frozen, as it claims.
    pub frozen: Duration,
    /// Why, for people; printable.
    pub text: String,
}

/// A guest at rest. Dropping it asks for the thaw, without waiting.
#[derive(Debug)]
pub struct Frozen {
    held: Option<Held>,
    /// A cut has to be made by then.
    pub until: Instant,
    /// How many file systems.
    pub file_systems: u32,
    /// What of it an operator should know; empty: nothing.
    pub note: String,
    /// Who did it.
    pub way: &'static str,
}

#[derive(Debug)]
enum Held {
    Tools(tools::Freeze),
    Agent(helper::Helper),
}

impl Frozen {
    fn new(held: Held, hold: Duration, file_systems: u32, note: String, way: &'static str) -> Self {
        Self { held: Some(held), until: Instant::now() + hold.mul_f64(CUT_WITHIN), file_systems, note, way }
    }

    /// Thaws, and waits for the answer for at most [`THAW_LIMIT`].
    pub fn thaw(mut self) -> Result<Thawed, String> {
        match self.held.take() {
            Some(Held::Tools(freeze)) => freeze.thaw(THAW_LIMIT),
            Some(Held::Agent(helper)) => helper.thaw(THAW_LIMIT),
            None => Err("it was thawed before".to_owned()),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        match self.held.take() {
            Some(Held::Tools(freeze)) => freeze.let_go(),
            // Its helper hears that nobody waits any more.
            Some(Held::Agent(_)) | None => {}
        }
    }
}

/// Whether a domain's definition has a channel to somebody who can freeze; else what it needs.
pub fn has_channel(live: &Element) -> bool {
    channel(live, PORT).is_some() || channel(live, GUEST_AGENT_CHANNEL).is_some()
}

/// What an operator can do for a guest that cannot be frozen.
pub const REMEDY: &str = "run `vmdr-guest-tools daemon` in the guest, with a virtio channel org.vmdr.guest.0 in the domain's definition, or \
     the QEMU guest agent (qemu-ga) with a channel org.qemu.guest_agent.0";

/// Freezes the guest on a thread of its own and tells what came of it. `tools`: its own tools, or why they are not asked.
pub fn begin(
    name: &str,
    uuid: Uuid,
    uri: &str,
    limits: Limits,
    tools: Result<Arc<Line>, String>,
    tell: impl FnOnce(Result<Frozen, String>) + Send + 'static,
) -> std::io::Result<()> {
    let uri = uri.to_owned();
    std::thread::Builder::new().name(format!("freeze {name}")).spawn(move || {
        tell(choose(&uri, &uuid, tools).and_then(|way| match way {
            Way::Tools(line) => tools::freeze(line, limits),
            Way::Agent => helper::freeze(&uri, &uuid, limits),
        }));
    })?;
    Ok(())
}

fn choose(uri: &str, uuid: &Uuid, tools: Result<Arc<Line>, String>) -> Result<Way, String> {
    let why = match tools {
        Ok(line) => return Ok(Way::Tools(line)),
        Err(why) => why,
    };
    let live = Connection::open(uri).and_then(|connection| connection.domain_by_uuid(uuid)?.live_xml());
    let live = live.map_err(|error| error.to_string())?;
    match channel(&live, GUEST_AGENT_CHANNEL).map(|channel| channel.attribute_at("target", "state")) {
        Some(Some("connected")) => Ok(Way::Agent),
        Some(_) => Err(refusal(&why, "it does not run in the guest")),
        None => Err(refusal(&why, "the domain has no channel to it")),
    }
}

fn refusal(tools: &str, agent: &str) -> String {
    format!(
        "nobody in the guest can freeze its file systems (vmdr's tools: {tools}; the QEMU guest agent: {agent}): {REMEDY}"
    )
}

fn unanswered(what: &str, limit: Duration, error: NoAnswer) -> String {
    match error {
        NoAnswer::Closed => format!("{error}, {what}"),
        NoAnswer::Late => format!("{error} ({limit:?}), {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_without_a_channel_is_told_both_ways() {
        let domain = |name: &str| {
            let text = format!(
                "<domain><devices><channel type='unix'><target type='virtio' name='{name}' state='disconnected'/></channel>\
                 </devices></domain>"
            );
            Element::parse(&text).unwrap()
        };
        assert!(
            has_channel(&domain(PORT)) && has_channel(&domain(GUEST_AGENT_CHANNEL)) && !has_channel(&domain("other"))
        );
        let said = refusal("they have not been heard of", "the domain has no channel to it");
        for part in
            ["vmdr-guest-tools daemon", "org.vmdr.guest.0", "qemu-ga", "org.qemu.guest_agent.0", "not been heard"]
        {
            assert!(said.contains(part), "{said}");
        }
    }
}
