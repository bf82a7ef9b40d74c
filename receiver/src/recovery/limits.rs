//! Whether a guest that comes with its memory can be limited as the plan says: the same at `plan check` and at an activation.

use vmdr_plan::{At, Limits, Mistake};
use vmdr_proto::control::Severity;

/// What this host can do about it.
#[derive(Debug, Clone, Default)]
pub struct Means {
    /// The controllers of its control groups; `None`: they are of the first version, where libvirt says so itself.
    controllers: Option<String>,
    swap_bytes: u64,
}

impl Means {
    /// Those of this host.
    pub fn here() -> Self {
        let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok();
        Means { controllers, swap_bytes: swap_bytes().unwrap_or(0) }
    }

    fn lacks(&self, controller: &str) -> bool {
        self.controllers.as_ref().is_some_and(|all| !all.split_whitespace().any(|c| c == controller))
    }
}

/// What stands in the way of the limits of a domain with so much memory.
pub fn trouble(limits: &Limits, name: &str, memory_bytes: u64, means: &Means) -> Vec<(Severity, Mistake)> {
    let mut found = Vec::new();
    let lacking = "this host's control groups have no controller for it";
    for at in limits.cpu_percent.iter().chain(&limits.cpu_shares).filter(|_| means.lacks("cpu")) {
        let message = format!("it cannot be limited: {lacking} (cpu)");
        found.push((Severity::Refused, Mistake { place: at.place, message }));
    }
    let Some(memory) = &limits.memory_bytes else { return found };
    if means.lacks("memory") {
        let message = format!("it cannot be limited: {lacking} (memory)");
        found.push((Severity::Refused, Mistake { place: memory.place, message }));
    }
    let limit = memory.value;
    if limit < memory_bytes {
        let facts = format!("{name} has {} MiB of memory, the limit is {} MiB", memory_bytes >> 20, limit >> 20);
        let (severity, message) = if memory_bytes - limit > means.swap_bytes {
            (Severity::Refused, format!("{facts}, and this host has no swap for the rest: its QEMU would be killed"))
        } else {
            (Severity::Warning, format!("{facts}: the rest will be swapped out"))
        };
        found.push((severity, Mistake { place: memory.place, message }));
    }
    found
}

/// The limits that can be set here, and what keeps the others from it: an activation goes on without those.
pub fn fitting(limits: &Limits, name: &str, memory_bytes: u64, means: &Means) -> (Limits, Vec<Mistake>) {
    let found = trouble(limits, name, memory_bytes, means).into_iter();
    let unfit: Vec<Mistake> = found.filter(|(severity, _)| *severity == Severity::Refused).map(|(_, of)| of).collect();
    let fits = |at: &Option<At<u64>>| at.clone().filter(|at| unfit.iter().all(|mistake| mistake.place != at.place));
    let Limits { cpu_percent, cpu_shares, memory_bytes } = limits;
    let fit = Limits { cpu_percent: fits(cpu_percent), cpu_shares: fits(cpu_shares), memory_bytes: fits(memory_bytes) };
    (fit, unfit)
}

/// `SwapTotal` of /proc/meminfo, in bytes.
fn swap_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("SwapTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use vmdr_plan::Plan;

    use super::*;

    #[test]
    fn a_limit_below_the_guests_memory_needs_swap() {
        let plan = Plan::parse("[domain.web1]\ncpu_percent = 50\nmemory_limit = \"512MiB\"\n").unwrap();
        let limits = &plan.domain("web1", "").limits;
        let said = |mib: u64, controllers: Option<&str>, swap_mib: u64| {
            let means = Means { controllers: controllers.map(str::to_owned), swap_bytes: swap_mib << 20 };
            let found = trouble(limits, "web1", mib << 20, &means).into_iter();
            found.map(|(severity, m)| format!("{} {}", severity == Severity::Refused, m)).collect::<Vec<_>>()
        };
        assert_eq!(said(512, Some("cpu memory"), 0), [] as [&str; 0]);
        assert!(said(1024, Some("cpu memory"), 511)[0].starts_with("true 3:16: web1 has 1024 MiB of memory"));
        assert!(said(1024, None, 512)[0].starts_with("false 3:16: web1 has 1024 MiB of memory"));
        let means = Means { controllers: None, swap_bytes: 0 };
        let (fit, unfit) = fitting(limits, "web1", 1024 << 20, &means);
        assert!(fit.cpu_percent == limits.cpu_percent && fit.memory_bytes.is_none() && unfit.len() == 1, "{fit:?}");
        assert_eq!(fitting(limits, "web1", 512 << 20, &means), (limits.clone(), Vec::new()));
        let without = said(512, Some("io"), 0);
        assert!(without.len() == 2 && without[0].contains("(cpu)") && without[1].contains("(memory)"), "{without:?}");
    }
}
