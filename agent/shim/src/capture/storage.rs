//! Whether the guest's storage answers, asked before the guest is stopped.
//!
//! QEMU's `stop` waits for the I/O in flight, under its global lock: with storage that hangs, guest and monitors stand still
//! until it answers again. QEMU does not tell what is in flight, so each disk is asked through an export of QEMU's own: a read
//! at the place that the guest wrote last (which has data in any format), and, where the host's page cache may answer that, a
//! flush. Only if all disks have answered is the guest stopped. A question that is not answered stays asked: no other comes
//! before its answer, and no cut.
//!
//! What this cannot see is storage that stops answering in the moment between the answer and `stop`, or that answers reads
//! while writes hang.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::shim::{NoPartReason, Timing};

use super::{Capture, NoCut};
use crate::disk::Disk;
use crate::nbd::{Client, Question};

/// How long an answer is waited for before this cut is left out; the guest runs meanwhile. Storage that takes longer would
/// have kept it paused for as long. What a flush has brought to the disk, the next one need not: slow disks converge.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// How long QEMU may take to open an export, and to send an answer that has begun to arrive.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(1);
/// How soon an export that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// What is known of the storage of each disk.
#[derive(Default)]
pub(super) struct Storage {
    /// In the order of the disks.
    probes: Vec<Probe>,
}

#[derive(Default)]
struct Probe {
    client: Option<Client>,
    /// Reads are not answered by the host's page cache.
    direct: bool,
    /// When the question was asked that has no answer yet.
    asked: Option<Instant>,
    /// An export could not be opened: not tried before.
    retry: Option<Instant>,
}

impl Storage {
    /// For so many disks.
    pub(super) fn new(disks: usize) -> Self {
        Self { probes: (0..disks).map(|_| Probe::default()).collect() }
    }

    /// Whether some disk has not answered when last looked at.
    pub(super) fn is_silent(&self) -> bool {
        self.probes.iter().any(|probe| probe.asked.is_some())
    }

    /// Lets go of all connections.
    pub(super) fn disconnect(&mut self) {
        self.probes.iter_mut().for_each(|probe| *probe = Probe::default());
    }
}

impl Probe {
    /// Asks, unless something is asked already. A connection that fails is given up.
    fn ask(&mut self, question: Question) {
        let Some(client) = self.client.as_mut().filter(|_| self.asked.is_none()) else { return };
        match client.ask(question) {
            Ok(()) => self.asked = Some(Instant::now()),
            Err(_) => self.client = None,
        }
    }

    /// Whether everything asked is answered by `until`.
    fn answered(&mut self, until: Instant) -> bool {
        let (Some(client), Some(_)) = (&mut self.client, self.asked) else { return true };
        match client.answered(until.saturating_duration_since(Instant::now())) {
            Ok(true) => self.asked = None,
            Ok(false) => return false,
            Err(_) => {
                // The connection is gone, not the storage: the next cut opens another one.
                (self.client, self.asked) = (None, None);
            }
        }
        true
    }
}

impl Capture {
    /// The reason why the guest must not be stopped now, if there is one.
    pub(super) fn storage_hangs(&mut self) -> anyhow::Result<Option<NoCut>> {
        // A disk that is known to hang is looked at, not waited for again: others may wait for this guest's turn to end.
        let asked = self.storage.probes.iter().filter_map(|probe| probe.asked);
        let hangs = asked.map(|asked| asked.elapsed()).max().is_some_and(|longest| longest > ANSWER_LIMIT);
        let mut until = Instant::now() + if hangs { Duration::ZERO } else { ANSWER_LIMIT };
        // What was asked before: while that is not answered nothing is opened, which would wait for it as `stop` does.
        if let Some(no) = self.first_silent(until) {
            return Ok(Some(no));
        }
        for index in 0..self.disks.len() {
            self.open_probe(index)?;
        }
        until = until.max(Instant::now() + ANSWER_LIMIT / 2);
        for (probe, disk) in self.storage.probes.iter_mut().zip(&self.disks) {
            probe.ask(place(disk));
        }
        if let Some(no) = self.first_silent(until) {
            return Ok(Some(no));
        }
        for probe in self.storage.probes.iter_mut().filter(|probe| !probe.direct) {
            probe.ask(Question::Flush);
        }
        Ok(self.first_silent(until))
    }

    fn first_silent(&mut self, until: Instant) -> Option<NoCut> {
        let probes = self.storage.probes.iter_mut().zip(&self.disks);
        let silent = probes.filter_map(|(probe, disk)| (!probe.answered(until)).then_some((probe.asked, disk)));
        let (asked, disk) = silent.last()?;
        let seconds = asked.map_or(0.0, |asked| asked.elapsed().as_secs_f64());
        let message = format!(
            "disk {}: its storage has not answered for {seconds:.1} s; stopping the guest for a cut would wait for it",
            disk.target()
        );
        Some(NoCut { reason: NoPartReason::Storage, message, timing: Timing::default() })
    }

    fn open_probe(&mut self, index: usize) -> anyhow::Result<()> {
        let probe = &self.storage.probes[index];
        if probe.client.is_some() || probe.retry.is_some_and(|retry| Instant::now() < retry) {
            return Ok(());
        }
        let target = self.disks[index].target().to_owned();
        // Without a mirror there is no recovery point anyhow.
        let Some(node) = self.node_of(&target)? else { return Ok(()) };
        let nodes = self.qmp.execute("query-named-block-nodes", Some(&json!({ "flat": true })))?;
        let direct = is_direct(&nodes, &node);
        let opened = self.open_export(&target, EXCHANGE_LIMIT);
        let probe = &mut self.storage.probes[index];
        match opened {
            Ok(client) => *probe = Probe { client: Some(client), direct, asked: None, retry: None },
            Err(error) => {
                probe.retry = Some(Instant::now() + RETRY);
                tracing::warn!(
                    domain = self.config.domain_name,
                    disk = target,
                    "the guest is stopped without asking its storage first: {error:#}"
                );
            }
        }
        Ok(())
    }
}

/// A page that has data.
fn place(disk: &Disk) -> Question {
    let page = PAGE_BYTES as u64;
    let offset = disk.last_written() / page * page;
    Question::Read { offset, length: page.min(disk.size().saturating_sub(offset)) as u32 }
}

/// Whether QEMU has this node open past the host's page cache.
fn is_direct(nodes: &Value, name: &str) -> bool {
    let node = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == name);
    node.is_some_and(|node| node["cache"]["direct"] == true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_not_known_to_be_direct_is_flushed() {
        let nodes = json!([
            { "node-name": "a", "cache": { "direct": true } },
            { "node-name": "b", "cache": { "direct": false } }
        ]);
        assert!(is_direct(&nodes, "a"));
        assert!(!is_direct(&nodes, "b") && !is_direct(&nodes, "c") && !is_direct(&Value::Null, "a"));
    }
}
