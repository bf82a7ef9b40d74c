//! At which site a guest executes: looked at all the time, from outside.
//!
//! A guest that executes uses CPU time of its QEMU's threads for virtual CPUs, which the kernel counts in nanoseconds; those
//! of a guest that stands still sleep. So nothing has to be asked of anybody who could be stopped or lie.

use crate::rig::{At, Rig};
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);
/// CPU time of all virtual CPUs within one look, from which on the guest executes: a thread that is only woken up, as by each cut
/// and by the end of a restore, takes some tens of microseconds.
const EXECUTES: Duration = Duration::from_millis(1);

/// What was seen of one site.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// When the guest executed there first, at the earliest.
    pub first: Option<Instant>,
    /// When it executed there last, at the latest.
    pub last: Option<Instant>,
}

/// A thread that looks; it ends when this is dropped.
pub struct Observer {
    seen: Arc<Mutex<[Seen; 2]>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Watched {
    /// libvirt's note of the process of the guest, by the id that it has in the site.
    note: PathBuf,
    /// The site's pid namespace.
    namespace: PathBuf,
    /// What the note said, and which process that is here.
    process: Option<(u32, u32)>,
    /// CPU time that each virtual CPU has had, and when that was looked at.
    used: HashMap<String, u64>,
    looked: Instant,
}

impl Observer {
    /// Begins to look for the guest of this name at both sites, which are up.
    pub fn start(rig: &Rig, guest: &str) -> Result<Self> {
        let mut both = Vec::new();
        for at in At::ALL {
            let site = rig.site(at);
            let namespace = fs::read_link(format!("/proc/{}/ns/pid", site.namespace()?.pid1()));
            both.push(Watched {
                note: site.path(format!("/run/libvirt/qemu/{guest}.pid")),
                namespace: namespace.context("read a site's pid namespace")?,
                process: None,
                used: HashMap::new(),
                looked: Instant::now(),
            });
        }
        let (seen, ended) = (Arc::new(Mutex::new([Seen::default(); 2])), Arc::new(AtomicBool::new(false)));
        let (to, until) = (Arc::clone(&seen), Arc::clone(&ended));
        let thread = std::thread::Builder::new().name("observer".to_owned()).spawn(move || {
            while !until.load(SeqCst) {
                for (watched, at) in both.iter_mut().zip(At::ALL) {
                    let before = watched.looked;
                    if watched.executes() {
                        let seen = &mut to.lock().unwrap_or_else(PoisonError::into_inner)[at as usize];
                        seen.first.get_or_insert(before);
                        seen.last = Some(watched.looked);
                    }
                }
                std::thread::sleep(LOOK);
            }
        })?;
        Ok(Self { seen, ended, thread: Some(thread) })
    }

    /// What was seen of a site so far.
    pub fn seen(&self, at: At) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)[at as usize]
    }

    /// For how long both have executed: from the first at B to the last at A. Nothing: never.
    pub fn both(&self) -> Option<Duration> {
        let (a, b) = (self.seen(At::A).last?, self.seen(At::B).first?);
        (a > b).then(|| a - b)
    }

    /// Whether it has executed at a site within this time.
    pub fn executes(&self, at: At, within: Duration) -> bool {
        self.seen(at).last.is_some_and(|last| last.elapsed() < within)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.ended.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

impl Watched {
    fn executes(&mut self) -> bool {
        self.looked = Instant::now();
        let inside = fs::read_to_string(&self.note).ok().and_then(|text| text.trim().parse::<u32>().ok());
        if self.process.map(|(inside, _)| inside) != inside {
            self.process = inside.and_then(|inside| Some((inside, self.outside(inside)?)));
            self.used.clear();
        }
        let Some((_, pid)) = self.process else { return false };
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
            self.process = None;
            return false;
        };
        let mut more = 0;
        for task in tasks.flatten() {
            let name = task.file_name().to_string_lossy().into_owned();
            let Some(used) = cpu_time(&task.path()) else { continue };
            // One that was not there before begins at nothing.
            let before = self.used.insert(name, used).unwrap_or(0);
            more += used.saturating_sub(before);
        }
        u128::from(more) >= EXECUTES.as_nanos()
    }

    /// The id here of the process that has this one in the site.
    fn outside(&self, inside: u32) -> Option<u32> {
        let entries = fs::read_dir("/proc").ok()?;
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
        pids.into_iter().find(|pid| {
            fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|namespace| namespace == self.namespace)
                && fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| {
                    let ids = status.lines().find(|line| line.starts_with("NSpid:"));
                    ids.and_then(|ids| ids.split_whitespace().last()?.parse().ok()) == Some(inside)
                })
        })
    }
}

/// CPU time of a thread in nanoseconds; nothing: it is no virtual CPU's, or gone.
fn cpu_time(task: &Path) -> Option<u64> {
    // libvirt has QEMU name its threads: "CPU 0/KVM", "CPU 0/TCG", "ALL CPUs/TCG".
    let name = fs::read_to_string(task.join("comm")).ok()?;
    if !name.contains("CPU") {
        return None;
    }
    fs::read_to_string(task.join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
}
