//! Looks after the shim: a guest whose permission has ended stands still, whatever its shim is doing, and also where it has none.
//! And one that was stopped for that alone, and has no shim, goes on when it may.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Signal, pidfd_send_signal};
use uuid::Uuid;
use vmdr_daemon::ownership::Role;
use vmdr_hypervisor::libvirt::Connection;
use vmdr_shim::config::{self as shim_config, Config as ShimConfig};
use vmdr_shim::deadline::{LIMIT, process};
use vmdr_shim::monitor::{Address, Monitor};
use vmdr_shim::permission::{May, Permission, Time, now};
use vmdr_shim::{deadline, rescue};

use crate::config::Config;
use crate::guard;
use crate::registry::Protection;
use crate::session::attach;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(200);
/// How long the shim has, from the deadline on: its look, and what it takes to stop the guest.
const GRACE: Duration = deadline::LOOK.saturating_add(LIMIT);
/// How long libvirt may take to say which process the guest is.
const LIBVIRT_LIMIT: Duration = Duration::from_secs(5);
/// How long a guest may take to go on before it is looked again whether it may.
const GO_ON_LIMIT: Duration = Duration::from_millis(500);

/// A running lookout; dropping it ends it.
#[derive(Debug)]
pub(super) struct Lookout {
    stop: Arc<AtomicBool>,
}

impl Lookout {
    pub(super) fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.end();
    }
}

/// A guest's process, and how it is talked to.
#[derive(Clone, Debug)]
struct Guest {
    pid: i32,
    monitor: Address,
}

struct Watch {
    config: Arc<Config>,
    domain: String,
    uuid: Uuid,
    directory: PathBuf,
    permission: Arc<Permission>,
    generation: u64,
    /// Since when it may not run, where there is no moment.
    never: Option<Time>,
}

impl Lookout {
    pub(super) fn start(config: Arc<Config>, protection: &Protection, permission: &Path) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let uuid: Uuid = protection.uuid.parse().context("the domain's UUID")?;
        let mut watch = Watch {
            directory: attach::directory(&config, &uuid),
            config,
            domain: protection.name.clone(),
            uuid,
            generation: protection.generation,
            permission: Arc::new(Permission::open(permission)?),
            never: None,
        };
        std::thread::Builder::new().name(format!("lookout {}", protection.name)).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                watch.look();
                std::thread::sleep(LOOK);
            }
        })?;
        Ok(Self { stop })
    }
}

impl Watch {
    fn look(&mut self) {
        let page = shim_config::state_page(&self.directory);
        let end = match self.permission.may() {
            may if may.at(now()) => {
                self.never = None;
                if self.permission.stopped() && !guard::alive(&page) {
                    self.go_on();
                }
                return;
            }
            May::Until(end) => end,
            May::Never | May::Always => *self.never.get_or_insert_with(now),
        };
        if now() < end + GRACE || guard::stands_still(&page) || self.is_anew() {
            return;
        }
        let guest = match self.guest() {
            Ok(Some(guest)) => guest,
            Ok(None) => return,
            Err(error) => {
                return tracing::error!(domain = self.domain, "the guest may not run, and is not found: {error:#}");
            }
        };
        let Ok(qemu) = process(guest.pid) else { return };
        if guard::alive(&page) {
            tracing::error!(domain = self.domain, "the guest may not run, and its shim has not stopped it: killing it");
            attach::kill_shim_of(&self.directory);
        }
        let (permission, monitor) = (self.permission.clone(), guest.monitor);
        let stopped = within(LIMIT, move || {
            let mut monitor = Monitor::connect(&monitor, LIMIT)?;
            Ok(rescue::stop(&permission, &mut monitor, LIMIT)?)
        });
        if let Err(error) = stopped
            && !self.permission.allows()
        {
            tracing::error!(
                domain = self.domain,
                "the guest may not run, and it is not known that it stands still: {error:#}. Its QEMU is killed"
            );
            let _ = pidfd_send_signal(&qemu, Signal::KILL);
        }
    }

    /// This host has become its owner anew since, so that this protection says nothing of it any more.
    fn is_anew(&self) -> bool {
        let record = self.config.ownerships().get(&self.uuid.to_string());
        matches!(record, Ok(Some(record)) if record.role == Role::Owner && record.generation > self.generation)
    }

    /// Nobody else would let it.
    fn go_on(&self) {
        let owner = self.config.ownerships().get(&self.uuid.to_string());
        if !matches!(owner, Ok(Some(record)) if record.role == Role::Owner) {
            return;
        }
        let went = self.guest().and_then(|guest| {
            let Some(guest) = guest else { return Ok(false) };
            let permission = self.permission.clone();
            within(GO_ON_LIMIT, move || {
                let mut monitor = Monitor::connect(&guest.monitor, GO_ON_LIMIT)?;
                Ok(rescue::go_on(&permission, &mut monitor)?)
            })
        });
        match went {
            Ok(true) => tracing::warn!(domain = self.domain, "the guest may run again, and goes on"),
            Ok(false) => {}
            Err(error) => tracing::warn!(domain = self.domain, "let the guest go on: {error:#}"),
        }
    }

    /// The guest, if it runs: as the shim was told, or else as libvirt says.
    fn guest(&self) -> anyhow::Result<Option<Guest>> {
        if let Ok(shim) = ShimConfig::read(&attach::config_file(&self.directory))
            && is_guest(shim.qemu_pid, &self.uuid)
        {
            return Ok(Some(Guest { pid: shim.qemu_pid, monitor: shim.monitor }));
        }
        let (config, uuid) = (self.config.clone(), self.uuid);
        within(LIBVIRT_LIMIT, move || {
            let connection = Connection::open(&config.libvirt_uri)?;
            let domain = match connection.domain_by_uuid(&uuid) {
                Ok(domain) => domain,
                Err(error) if error.is_no_such_domain() => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            if !domain.state()?.0.is_active() {
                return Ok(None);
            }
            let monitor = attach::monitor_of(&config, &domain, &domain.live_xml()?);
            Ok(Some(Guest { pid: domain.qemu_pid()? as i32, monitor }))
        })
    }
}

/// Whether a process is the guest's QEMU: its number may be another's by now.
fn is_guest(pid: i32, uuid: &Uuid) -> bool {
    let line = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(&uuid.to_string())
}

/// Does something that may hang, and waits for it so long.
fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (sender, answer) = channel();
    std::thread::Builder::new().name("stop".to_owned()).spawn(move || sender.send(work()))?;
    answer.recv_timeout(limit).unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {limit:?}")))
}
