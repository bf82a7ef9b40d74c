//! Gets a shim for a domain: the one that runs already, or a new one with mirrors into it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use uuid::Uuid;
use vmdr_codec::Disk;
use vmdr_hypervisor::domain_xml::{DomainXml, own_qmp_socket};
use vmdr_hypervisor::libvirt::{Connection, Domain, DomainState};
use vmdr_hypervisor::xml::Element;
use vmdr_proto::shim::State;
use vmdr_shim::capture::{bitmaps, exports};
use vmdr_shim::config::{self as shim_config, Config as ShimConfig, DiskConfig};
use vmdr_shim::inject;
use vmdr_shim::monitor::{Address, Monitor};
use vmdr_shim::permission::{May, Permission};
use vmdr_shim::rescue;

use super::off::{NotRunning, Off};
use crate::arena_map::ArenaMap;
use crate::config::Config;
use crate::failover;
use crate::guard::{self, Guard};
use crate::preflight::{self, DomainOptions, HostFacts};
use crate::registry::Protection;
use crate::shim_client::ShimClient;

/// A shim's configuration, in its directory.
const CONFIG: &str = "config.json";
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long QEMU may take to take the connection by which a guest is let go on.
const GO_ON_LIMIT: Duration = Duration::from_secs(5);
/// How long a shim may take to end: it lets go of all of the guest's memory.
const DETACH_LIMIT: Duration = Duration::from_secs(20);
const ADOPT_LIMIT: Duration = Duration::from_millis(500);

/// A domain with a shim beside it.
pub struct Attached {
    /// Of libvirt.
    pub domain: Domain,
    /// Its QEMU.
    pub qemu_pid: u32,
    /// Its machine type, with version.
    pub machine: String,
    /// How its QEMU is talked to.
    pub monitor: Address,
    /// Its disks, as parts number them.
    pub disks: Vec<Disk>,
    /// The shim.
    pub shim: ShimClient,
    /// What the shim said of itself.
    pub state: State,
    /// The shim's arena.
    pub arena: ArenaMap,
    /// Watches the shim.
    pub guard: Guard,
    /// Whether the shim was there before: nothing of what it captured is lost.
    pub adopted: bool,
}

/// A shim's configuration.
pub fn config_file(directory: &Path) -> PathBuf {
    directory.join(CONFIG)
}

/// Directory of a domain's shim.
pub fn directory(config: &Config, uuid: &Uuid) -> PathBuf {
    config.runtime_dir.join(uuid.to_string())
}

/// See the module. The guest must be running, or have ended with a shim beside it that has what it wrote last; otherwise
/// the error is [`NotRunning`].
pub fn attach(
    config: &Config,
    connection: &Connection,
    uuid: &Uuid,
    protection: &Protection,
) -> anyhow::Result<Attached> {
    let permission = permission(config, protection)?;
    let domain = match connection.domain_by_uuid(uuid) {
        Ok(domain) => domain,
        Err(error) if error.is_no_such_domain() => {
            return Err(NotRunning { name: uuid.to_string(), off: Off::Undefined }.into());
        }
        Err(error) => return Err(error.into()),
    };
    let (state, reason) = domain.state()?;
    if let Some(off) = Off::of(state, reason) {
        let name = domain.name().to_owned();
        return adopt_ended(config, domain, uuid).ok_or_else(|| NotRunning { name, off }.into());
    }
    let live = domain.live_xml()?;
    let monitor = monitor_of(config, &domain, &live);
    let xml = DomainXml::from_element(&live)?;
    still_protectable(config, &domain, &live)?;
    let machine = xml.machine.clone();
    let disks = mirrored_disks(&domain, &xml)?;
    let directory = directory(config, uuid);
    let page = shim_config::state_page(&directory);
    let qemu_pid = domain.qemu_pid()?;
    if let Some((shim, state)) = adopt(&directory, &disks, qemu_pid) {
        ensure!(
            !protection.is_automatic() || state.may.is_some(),
            "the shim beside domain {} is of an older version, which does not look whether the guest may run: `vmdr protect \
             --failover manual`",
            domain.name()
        );
        let arena = ArenaMap::open(state.pid, state.arena_fd, state.arena_bytes)?;
        let guard = watch(&domain, page, permission, &monitor)?;
        tracing::info!(domain = domain.name(), pid = state.pid, "going on with the shim that runs");
        return Ok(Attached { domain, qemu_pid, machine, monitor, disks, shim, state, arena, guard, adopted: true });
    }
    clear(config, &domain, &live, &directory, &monitor, &disks)?;
    if state != DomainState::Running {
        go_on(&permission, &domain, &monitor, protection.fenced)?;
    }
    if state != DomainState::Running {
        bail!("domain {} is {state:?}: it has to be running to be protected", domain.name());
    }
    let shim_settings = ShimConfig {
        domain_name: domain.name().to_owned(),
        domain_uuid: uuid.to_string(),
        protection: protection.id.clone(),
        permission: Some(permission.clone()),
        qemu_pid: qemu_pid as i32,
        qemu_uid: std::fs::metadata(format!("/proc/{qemu_pid}")).context("find QEMU's user")?.uid(),
        monitor: monitor.clone(),
        directory: directory.clone(),
        disks: disks
            .iter()
            .map(|disk| DiskConfig { target: disk.target.clone(), size_bytes: disk.size_bytes })
            .collect(),
        arena_bytes: config.arena_bytes_of(domain.name()),
        cut_pages_max: config.cut_pages_max,
        cut_limit_ms: config.cut_limit_ms,
    };
    let pid = spawn(config, &shim_settings)?;
    let connected = ShimClient::connect(&shim_settings.control_socket(), START_LIMIT);
    if connected.is_err() {
        // It may have hung before it had a state page by which it would be found.
        kill_shim(pid, &directory);
    }
    let (shim, state) = connected.with_context(|| {
        format!("start the shim (its log: {})", log_file(config, &shim_settings.domain_uuid).display())
    })?;
    let arena = ArenaMap::open(state.pid, state.arena_fd, state.arena_bytes)?;
    let guard = watch(&domain, page, permission, &monitor)?;
    Ok(Attached { domain, qemu_pid, machine, monitor, disks, shim, state, arena, guard, adopted: false })
}

/// A guest without a shim that was stopped because it might not run goes on if it may: nobody else would let it. An error where it
/// does not run, or has begun to just now.
fn go_on(permission: &Path, domain: &Domain, monitor: &Address, fenced: bool) -> anyhow::Result<()> {
    let name = domain.name();
    let permission = Permission::open(permission)?;
    if !permission.stopped() {
        return Ok(());
    }
    if fenced || !permission.allows() {
        bail!("domain {name} may not run now, and stands still");
    }
    rescue::go_on(&permission, &mut Monitor::connect(monitor, GO_ON_LIMIT)?)?;
    bail!("domain {name} stood still because it might not run, and goes on now");
}

fn watch(domain: &Domain, page: PathBuf, permission: PathBuf, monitor: &Address) -> anyhow::Result<Guard> {
    Guard::watch(domain.name().to_owned(), page, permission, monitor.clone()).context("watch the shim")
}

/// The file that says whether the guest may run. It always may where nobody takes it by himself; where somebody does, and there
/// is none, it may not.
fn permission(config: &Config, protection: &Protection) -> anyhow::Result<PathBuf> {
    let path = config.ownerships().permission(&protection.uuid);
    if protection.is_automatic() {
        failover::open(&path, May::Never)?;
    } else {
        let permission = failover::open(&path, May::Always)?;
        // Of one that another site owns nothing is widened.
        if !protection.fenced {
            permission.set(May::Always);
        }
    }
    Ok(path)
}

/// Devices may have come since `protect`.
pub fn still_protectable(config: &Config, domain: &Domain, live: &Element) -> anyhow::Result<()> {
    let options = DomainOptions { arena_bytes: config.arena_bytes_of(domain.name()), protected: true };
    let findings = preflight::domain::definition(live, &HostFacts::gather(), &options);
    let refused: Vec<String> = preflight::refusals(&findings).map(ToString::to_string).collect();
    if !refused.is_empty() {
        bail!("domain {} cannot be protected as it is now: {}", domain.name(), refused.join("; "));
    }
    Ok(())
}

/// Begins mirroring a disk into the shim.
pub fn mirror(config: &Config, domain: &Domain, uuid: &Uuid, target: &str) -> anyhow::Result<()> {
    let socket = shim_config::nbd_socket(&directory(config, uuid));
    domain.block_copy_to_nbd(target, &socket, target, config.disk_copy_bytes_per_second)?;
    Ok(())
}

/// Ends what protects a domain: mirrors, watch, shim. Does as much as is possible and reports the first failure.
/// `suspend`: a resync will follow.
pub fn detach(domain: &Domain, disks: &[Disk], shim: &mut ShimClient, suspend: bool) -> anyhow::Result<()> {
    if let Err(error) = shim.end_mirrors() {
        // The guest's storage hangs, perhaps. Then libvirt ends them as they are.
        tracing::warn!(domain = domain.name(), "end the mirrors in a pause: {error}");
    }
    let mut result = Ok(());
    for disk in disks {
        if let Err(error) = domain.block_job_abort(&disk.target, true) {
            result = result.and(Err(anyhow::Error::from(error)));
        }
    }
    let state = shim.detach(suspend).context("detach the shim")?;
    // It answers before it does; afterwards nothing of it is in QEMU any more.
    ensure!(guard::wait_end(state.pid as i32, DETACH_LIMIT), "the shim has not ended within {DETACH_LIMIT:?}");
    result
}

/// Ends a protection of which no session has the shim. `suspend`: a resync will follow, so that QEMU goes on noting what is
/// written to the disks.
pub fn remove(
    config: &Config,
    connection: &Connection,
    uuid: &Uuid,
    protection: &str,
    suspend: bool,
) -> anyhow::Result<()> {
    let domain = connection.domain_by_uuid(uuid)?;
    let directory = directory(config, uuid);
    if !domain.state()?.0.is_active() {
        // What was in QEMU went with it.
        if let Ok((mut shim, _)) = ShimClient::connect(&shim_config::control_socket(&directory), ADOPT_LIMIT) {
            let _ = shim.detach(false);
        }
        let _ = std::fs::remove_dir_all(&directory);
        return Ok(());
    }
    let live = domain.live_xml()?;
    let monitor = monitor_of(config, &domain, &live);
    let disks = mirrored_disks(&domain, &DomainXml::from_element(&live)?)?;
    if let Some((mut shim, _)) = adopt(&directory, &disks, domain.qemu_pid()?)
        && detach(&domain, &disks, &mut shim, suspend).is_ok()
    {
        return Ok(());
    }
    clear(config, &domain, &live, &directory, &monitor, &disks)?;
    inject::unwatch(domain.qemu_pid()? as i32, &config.shim_program()?)?;
    if !suspend {
        bitmaps::remove_all(&monitor, protection).context("take vmdr's dirty bitmaps out of QEMU")?;
    }
    Ok(())
}

/// A running domain's own QMP socket; libvirt where it has none.
pub fn monitor_of(config: &Config, domain: &Domain, live: &Element) -> Address {
    match own_qmp_socket(live) {
        Some(socket) => Address::Socket(socket),
        None => Address::Libvirt { uri: config.libvirt_uri.clone(), uuid: domain.uuid() },
    }
}

/// The writable disks of a running domain, in the order of its XML.
pub fn mirrored_disks(domain: &Domain, xml: &DomainXml) -> anyhow::Result<Vec<Disk>> {
    xml.disks
        .iter()
        .filter(|disk| disk.is_writable())
        .map(|disk| {
            let size_bytes = domain.disk_bytes(&disk.target)?;
            Ok(Disk { target: disk.target.clone(), size_bytes })
        })
        .collect()
}

/// The shim that runs for this domain, if it still fits: same disks.
fn adopt(directory: &Path, disks: &[Disk], qemu_pid: u32) -> Option<(ShimClient, State)> {
    let socket = shim_config::control_socket(directory);
    if !socket.exists() {
        return None;
    }
    // A domain that was started anew since is another process, with other memory.
    let config = ShimConfig::read(&directory.join(CONFIG)).ok()?;
    if config.qemu_pid != qemu_pid as i32 {
        tracing::info!(domain = config.domain_name, "the shim that runs belongs to a QEMU that is gone");
        return None;
    }
    let (mut shim, state) = match ShimClient::connect(&socket, ADOPT_LIMIT) {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!("the shim at {} cannot be used: {error:#}", socket.display());
            return None;
        }
    };
    let same = state.disks.len() == disks.len()
        && state
            .disks
            .iter()
            .zip(disks)
            .all(|(theirs, ours)| theirs.target == ours.target && theirs.size_bytes == ours.size_bytes);
    if !same && let Err(error) = shim.end_mirrors() {
        // It is about to be killed, with mirrors to it.
        tracing::warn!("end the mirrors of the shim at {}: {error}", socket.display());
    }
    same.then_some((shim, state))
}

/// The shim of a guest that has shut down, if it still has what the guest wrote last.
fn adopt_ended(config: &Config, domain: Domain, uuid: &Uuid) -> Option<Attached> {
    let directory = directory(config, uuid);
    let settings = ShimConfig::read(&directory.join(CONFIG)).ok()?;
    let (mut shim, state) = ShimClient::connect(&shim_config::control_socket(&directory), ADOPT_LIMIT).ok()?;
    if !state.gone {
        return None;
    }
    let attached = || -> anyhow::Result<_> {
        let arena = ArenaMap::open(state.pid, state.arena_fd, state.arena_bytes)?;
        let page = shim_config::state_page(&directory);
        let permission = config.ownerships().permission(&uuid.to_string());
        let guard = watch(&domain, page, permission, &settings.monitor)?;
        Ok((DomainXml::from_element(&domain.live_xml()?)?.machine, arena, guard))
    };
    let (machine, arena, guard) = match attached() {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(domain = domain.name(), "what the guest wrote last cannot be had: {error:#}");
            let _ = shim.detach(false);
            return None;
        }
    };
    let disks = state.disks.iter().map(|disk| Disk { target: disk.target.clone(), size_bytes: disk.size_bytes });
    Some(Attached {
        qemu_pid: settings.qemu_pid as u32,
        monitor: settings.monitor,
        disks: disks.collect(),
        domain,
        machine,
        shim,
        state,
        arena,
        guard,
        adopted: true,
    })
}

/// A block job that is not vmdr's is left alone: it has to end before the disk can be mirrored.
fn refuse_foreign_jobs(domain: &Domain, live: &Element, directory: &Path) -> anyhow::Result<()> {
    for disk in live.find_all("devices/disk") {
        let Some(mirror) = disk.find("mirror") else { continue };
        let socket = mirror.attribute_at("source/host", "socket").unwrap_or_default();
        ensure!(
            Path::new(socket).starts_with(directory),
            "a block job ({}) runs on disk {} of domain {}: wait for it, or end it (virsh blockjob)",
            mirror.attribute("job").unwrap_or("of another kind"),
            disk.attribute_at("target", "dev").unwrap_or_default(),
            domain.name()
        );
    }
    Ok(())
}

/// Removes what a shim that is dead or unusable left behind.
fn clear(
    config: &Config,
    domain: &Domain,
    live: &Element,
    directory: &Path,
    monitor: &Address,
    disks: &[Disk],
) -> anyhow::Result<()> {
    refuse_foreign_jobs(domain, live, directory)?;
    let page = shim_config::state_page(directory);
    if let Ok(state) = vmdr_shim::state_page::StatePage::open(&page) {
        kill_shim(state.pid(), directory);
        let permission = config.ownerships().permission(&domain.uuid().to_string());
        if !guard::resume_if_left_paused(domain.name(), &page, &permission, monitor) {
            bail!("domain {} was left paused by a shim and cannot be resumed yet", domain.name());
        }
        if let Err(error) = exports::end_leftovers(monitor) {
            tracing::warn!(domain = domain.name(), "end the exports that a shim has left in QEMU: {error}");
        }
    }
    for disk in disks {
        if let Err(error) = domain.block_job_abort(&disk.target, true) {
            tracing::warn!(domain = domain.name(), "{error}");
        }
    }
    let _ = std::fs::remove_dir_all(directory);
    Ok(())
}

/// Ends the shim of this directory.
pub fn kill_shim_of(directory: &Path) {
    if let Ok(state) = vmdr_shim::state_page::StatePage::open(&shim_config::state_page(directory)) {
        kill_shim(state.pid(), directory);
    }
}

/// Ends a shim. Its pid may have been given to another process since: only one that has its directory's name is it.
fn kill_shim(pid: i32, directory: &Path) {
    let name = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&name).contains(&*directory.to_string_lossy()) {
        guard::kill(pid);
    }
}

/// Starts a shim and returns its pid.
fn spawn(config: &Config, shim: &ShimConfig) -> anyhow::Result<i32> {
    std::fs::create_dir_all(&shim.directory).with_context(|| format!("make {}", shim.directory.display()))?;
    let file = shim.directory.join(CONFIG);
    std::fs::write(&file, serde_json::to_vec_pretty(shim)?).with_context(|| format!("write {}", file.display()))?;
    std::fs::create_dir_all(&config.log_dir).with_context(|| format!("make {}", config.log_dir.display()))?;
    let log = log_file(config, &shim.domain_uuid);
    let log = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open the shim's log {}", log.display()))?;
    let program = config.shim_program()?;
    // A process group of its own: what ends the agent (a terminal, a service manager told so) leaves it running.
    let mut child = Command::new(&program)
        .arg("run")
        .arg("--config")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let pid = child.id() as i32;
    std::thread::spawn(move || child.wait());
    Ok(pid)
}

fn log_file(config: &Config, uuid: &str) -> PathBuf {
    config.log_dir.join(format!("shim-{uuid}.log"))
}
