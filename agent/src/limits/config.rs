//! `[limits]` of agent.toml: what protection may cost this host.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::schedule::Schedule;

/// The least part of a processor: below it a guest of any size would never be copied.
const CPU_PERCENT_MIN: u32 = 1;
/// The most: 1,000 processors.
const CPU_PERCENT_MAX: u32 = 100_000;
/// The least memory for what is captured and not durable.
pub const ARENA_BYTES_MIN: u64 = 64 << 20;
/// The most guests that are paused at once, whatever is configured.
const CUTS_AT_ONCE_MAX: u32 = 1024;

/// One bandwidth, or several with their times.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
enum Bandwidth {
    One(String),
    Several(Vec<String>),
}

/// What a guest, or this host as a whole, may have. A key that is left out: no limit.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Caps {
    bandwidth: Option<Bandwidth>,
    /// Part of one processor, in per cent.
    pub cpu_percent: Option<u32>,
    /// Memory for what is captured and not durable.
    pub memory_bytes: Option<u64>,
    #[serde(skip)]
    pub(super) schedule: Schedule,
}

/// All of `[limits]`: of this host as a whole, and of its guests.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    bandwidth: Option<Bandwidth>,
    /// Part of one processor, in per cent, of the agent and all shims.
    pub cpu_percent: Option<u32>,
    /// Memory of all guests together.
    pub memory_bytes: Option<u64>,
    /// Guests that are paused at the same time; left out: half as many as there are processors.
    pub cuts_at_once: Option<u32>,
    /// Of each guest.
    pub guest: Caps,
    /// Of guests by name; what is left out here is as for each guest.
    pub domain: BTreeMap<String, Caps>,
    #[serde(skip)]
    pub(super) schedule: Schedule,
}

impl Limits {
    /// Checks it. An error names the key.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.schedule = schedule("limits", &self.bandwidth)?;
        check_cpu("limits", self.cpu_percent)?;
        check_memory("limits", self.memory_bytes)?;
        if self.cuts_at_once.is_some_and(|cuts| !(1..=CUTS_AT_ONCE_MAX).contains(&cuts)) {
            bail!("limits.cuts_at_once: 1 to {CUTS_AT_ONCE_MAX} are possible");
        }
        check_caps("limits.guest", &mut self.guest)?;
        for (name, caps) in &mut self.domain {
            check_caps(&format!("limits.domain.{name}"), caps)?;
        }
        Ok(())
    }

    /// What a guest may have: what is said of it, else what is said of every guest.
    pub fn of(&self, domain: &str) -> Caps {
        let own = self.domain.get(domain);
        let every = &self.guest;
        let schedule = own.filter(|caps| caps.bandwidth.is_some()).map_or(&every.schedule, |caps| &caps.schedule);
        Caps {
            bandwidth: None,
            cpu_percent: own.and_then(|caps| caps.cpu_percent).or(every.cpu_percent),
            memory_bytes: own.and_then(|caps| caps.memory_bytes).or(every.memory_bytes),
            schedule: schedule.clone(),
        }
    }
}

fn check_caps(key: &str, caps: &mut Caps) -> anyhow::Result<()> {
    caps.schedule = schedule(key, &caps.bandwidth)?;
    check_cpu(key, caps.cpu_percent)?;
    check_memory(key, caps.memory_bytes)
}

fn schedule(key: &str, bandwidth: &Option<Bandwidth>) -> anyhow::Result<Schedule> {
    let entries = match bandwidth {
        None => return Ok(Schedule::default()),
        Some(Bandwidth::One(entry)) => std::slice::from_ref(entry),
        Some(Bandwidth::Several(entries)) => entries,
    };
    Schedule::parse(entries).map_err(anyhow::Error::msg).with_context(|| format!("{key}.bandwidth"))
}

fn check_cpu(key: &str, percent: Option<u32>) -> anyhow::Result<()> {
    match percent {
        Some(percent) if !(CPU_PERCENT_MIN..=CPU_PERCENT_MAX).contains(&percent) => {
            bail!(
                "{key}.cpu_percent = {percent}: {CPU_PERCENT_MIN} to {CPU_PERCENT_MAX} per cent of one processor are possible"
            )
        }
        _ => Ok(()),
    }
}

fn check_memory(key: &str, bytes: Option<u64>) -> anyhow::Result<()> {
    match bytes {
        Some(bytes) if bytes < ARENA_BYTES_MIN => {
            bail!("{key}.memory_bytes = {bytes}: at least {ARENA_BYTES_MIN} (64 MiB) are needed")
        }
        _ => Ok(()),
    }
}
