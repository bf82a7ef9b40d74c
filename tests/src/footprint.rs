//! What a process takes of the machine.

use anyhow::{Context, Result};
use std::fs;

/// What docs/design.md allows a shim for one guest, beside the arena ("Memory").
pub const SHIM_BYTES_MAX: u64 = 64 << 20;
/// The same, an agent.
pub const AGENT_BYTES_MAX: u64 = 96 << 20;
/// The same, a receiver.
pub const RECEIVER_BYTES_MAX: u64 = 256 << 20;

/// Memory, descriptors and threads of a process at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Anonymous memory: heap and stacks.
    pub private_bytes: u64,
    /// Its share of shared memory (PSS), as of a shim's arena.
    pub shared_bytes: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
}

impl Footprint {
    /// Of a process, by its id here.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let count = |name: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{name}");
            Ok(fs::read_dir(&path).with_context(|| format!("list {path}"))?.count())
        };
        Ok(Self {
            private_bytes: field(&text, "Pss_Anon:").context("Pss_Anon in smaps_rollup")?,
            shared_bytes: field(&text, "Pss_Shmem:").context("Pss_Shmem in smaps_rollup")?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// The larger of each.
    pub fn max(self, other: Self) -> Self {
        Self {
            private_bytes: self.private_bytes.max(other.private_bytes),
            shared_bytes: self.shared_bytes.max(other.shared_bytes),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }

    /// The smaller of each.
    pub fn min(self, other: Self) -> Self {
        Self {
            private_bytes: self.private_bytes.min(other.private_bytes),
            shared_bytes: self.shared_bytes.min(other.shared_bytes),
            descriptors: self.descriptors.min(other.descriptors),
            threads: self.threads.min(other.threads),
        }
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_descriptors_and_threads() {
        let own = Footprint::of(std::process::id()).unwrap();
        assert!(own.private_bytes > 0 && own.descriptors > 2 && own.threads > 0, "{own:?}");
        assert_eq!(field("Pss_Anon:        12 kB\n", "Pss_Anon:"), Some(12 * 1024));
    }
}
