//! The agent as a whole: sessions by domain, what is remembered of them, and libvirt's events for them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use vmdr_audit::Audit;
use vmdr_daemon::caller::Groups;
use vmdr_daemon::hook;
use vmdr_daemon::ownership;
use vmdr_hypervisor::events::{DomainEvent, Event, IoErrorAction};
use vmdr_hypervisor::libvirt::Connection;
use vmdr_trust::Trust;

use crate::config::Config;
use crate::control;
use crate::failover::END_LIMIT;
use crate::limits;
use crate::registry::{Protection, Registry};
use crate::session::{Input, Session};

const EVENT_RETRY: Duration = Duration::from_secs(2);
const EVENT_LOOK: Duration = Duration::from_millis(500);

/// See the module. Clones share it.
#[derive(Clone)]
pub struct Agent {
    /// The configuration.
    pub config: Arc<Config>,
    /// What protection may take of this host.
    pub limits: limits::Host,
    /// What is protected, on disk.
    pub registry: Registry,
    /// What was done here, and refused.
    pub audit: Audit,
    /// Who this host is, and which hosts it trusts.
    pub trust: Trust,
    /// Held while something is being protected or unprotected.
    pub administration: Arc<tokio::sync::Mutex<()>>,
    sessions: Arc<Mutex<BTreeMap<String, Session>>>,
}

impl Agent {
    /// An agent without sessions.
    pub fn new(config: Config) -> anyhow::Result<Self> {
        let registry = Registry::open(&config.state_dir)?;
        let limits = limits::Host::new(config.limits.clone());
        let audit = Audit::open(&config.audit_dir, "agent")?;
        let trust = Trust::open(&config.identity_dir, audit.clone()).context("this host's identity")?;
        Ok(Self {
            config: Arc::new(config),
            limits,
            registry,
            audit,
            trust,
            administration: Arc::default(),
            sessions: Arc::default(),
        })
    }

    /// Sessions by domain UUID.
    pub fn sessions(&self) -> MutexGuard<'_, BTreeMap<String, Session>> {
        // A map is valid after a panic between its calls.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The UUID of the protected domain of this name or UUID.
    pub fn find(&self, name: &str) -> Option<String> {
        let sessions = self.sessions();
        let found = sessions.iter().find(|(uuid, session)| *uuid == name || session.protection.name == name);
        found.map(|(uuid, _)| uuid.clone())
    }

    /// Starts a session. `first`: see [`Session::start`].
    pub fn start(&self, protection: Protection, first: bool) -> anyhow::Result<()> {
        let uuid = protection.uuid.clone();
        let runtime = tokio::runtime::Handle::current();
        let limits = self.limits.guest(&protection.name);
        let session = Session::start(
            self.config.clone(),
            self.registry.clone(),
            self.trust.clone(),
            limits,
            protection,
            first,
            runtime,
        )?;
        self.sessions().insert(uuid, session);
        Ok(())
    }

    /// A protection has ended: of a guest that is this host's nothing is recorded any more.
    pub fn ended(&self, protection: &Protection) -> anyhow::Result<()> {
        let ownerships = self.config.ownerships();
        ownerships.transition(
            &protection.uuid,
            &protection.name,
            &ownership::Event::Ended,
            "not protected any more",
        )?;
        Ok(())
    }

    /// This agent ends, as it was told to. Its guests are not to be taken because of that: whoever starts it again arms their
    /// backups again. One that does not answer may take its guest, which is stopped before.
    async fn stand_down(&self) {
        let automatic: Vec<_> = self
            .sessions()
            .values()
            .filter_map(|session| Some((session.protection.name.clone(), session.failover.clone()?)))
            .collect();
        let standing = automatic.into_iter().map(|(domain, failover)| {
            tokio::spawn(async move {
                if let Err(error) = failover.stand_down(END_LIMIT).await {
                    tracing::warn!(domain, "the guest is stopped when its lease ends: {error}");
                }
            })
        });
        for one in standing.collect::<Vec<_>>() {
            let _ = one.await;
        }
    }

    /// Reads the limits again (SIGHUP). A file with a mistake changes nothing.
    fn reload(&self, path: &Path) {
        match Config::read(path) {
            Ok(config) => {
                self.limits.set(config.limits);
                tracing::info!("limits read again from {}", path.display());
            }
            Err(error) => tracing::error!("the limits stay as they are: {error:#}"),
        }
    }

    /// Takes up everything that was protected when the agent last ran.
    fn restore(&self) -> anyhow::Result<()> {
        for entry in self.registry.load()? {
            match entry {
                Ok(protection) => {
                    let name = protection.name.clone();
                    if let Err(error) = self.start(protection, false) {
                        tracing::error!(domain = name, "it is NOT protected: {error:#}");
                    }
                }
                Err(error) => {
                    tracing::error!("an entry of what is protected is damaged, that domain is NOT protected: {error:#}")
                }
            }
        }
        Ok(())
    }

    /// Hands libvirt's events to the sessions, for ever.
    fn watch_events(&self) {
        loop {
            if let Err(error) = self.events_until_disconnected() {
                tracing::warn!("libvirt's events: {error:#}");
            }
            std::thread::sleep(EVENT_RETRY);
        }
    }

    fn events_until_disconnected(&self) -> anyhow::Result<()> {
        let connection = Connection::open(&self.config.libvirt_uri)?;
        let events = connection.events()?;
        // Whatever happened while nobody listened.
        for session in self.sessions().values() {
            session.tell(Input::DevicesChanged);
        }
        loop {
            match events.next_timeout(EVENT_LOOK) {
                Ok(Event::Domain { uuid, event, .. }) => {
                    if let (Some(input), Some(session)) = (input(&event), self.sessions().get(&uuid.to_string())) {
                        session.tell(input);
                    }
                }
                Ok(Event::Disconnected(why)) => anyhow::bail!("libvirt closed the connection: {why:?}"),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the stream of events ended"),
            }
        }
    }
}

/// What a session is told of an event. That a guest was paused, resumed, reset or ended its shim learns from QEMU itself.
fn input(event: &DomainEvent) -> Option<Input> {
    match event {
        DomainEvent::DeviceAdded { .. } | DomainEvent::DeviceRemoved { .. } => Some(Input::DevicesChanged),
        DomainEvent::IoError { path, alias, reason, action: IoErrorAction::Paused } => {
            let reason = if reason.is_empty() { "an I/O error" } else { reason };
            Some(Input::IoError(format!("disk {alias} ({path}): {reason}")))
        }
        _ => None,
    }
}

/// Without it a guest that another site owns runs until it is found and paused; that is no reason not to protect others.
fn install_hook(config: &Config) {
    let path = &config.libvirt_hook;
    if path.as_os_str().is_empty() {
        return;
    }
    match hook::install(path, &config.ownerships()) {
        Ok(true) => tracing::warn!(
            path = %path.display(),
            "libvirt's hook was installed; libvirt heeds it from its next start on"
        ),
        Ok(false) => {}
        Err(error) => tracing::error!(path = %path.display(), "libvirt's hook cannot be installed: {error}"),
    }
}

/// Runs until told to end (SIGTERM, SIGINT). The shims go on. SIGHUP: the limits are read again.
pub async fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    let agent = Agent::new(config)?;
    let listener = vmdr_daemon::socket::listen(&agent.config.control_socket).context("listen for the vmdr command")?;
    // There for as long as the host is: what is in it comes and goes with protections.
    let ownerships = agent.config.ownerships();
    let marks = ownerships.directories().1;
    std::fs::create_dir_all(marks).with_context(|| format!("create {}", marks.display()))?;
    install_hook(&agent.config);
    let groups = Groups::named(agent.config.operator_group.as_deref(), agent.config.reader_group.as_deref());
    let groups = groups.context("operator_group and reader_group of the configuration")?;
    agent.restore().context("take up what was protected")?;
    let watcher = agent.clone();
    std::thread::Builder::new().name("libvirt events".to_owned()).spawn(move || watcher.watch_events())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let reloads = async {
        while hangup.recv().await.is_some() {
            agent.reload(path);
        }
    };
    tokio::spawn(agent.trust.clone().watch());
    let metrics = agent.clone();
    tokio::select! {
        served = control::serve(listener, groups, agent.clone()) => served?,
        served = crate::metrics::serve(metrics) => served?,
        () = reloads => {}
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    agent.stand_down().await;
    let sessions: Vec<Session> = std::mem::take(&mut *agent.sessions()).into_values().collect();
    tokio::task::spawn_blocking(move || {
        for mut session in sessions {
            session.end(Input::Shutdown);
        }
    })
    .await?;
    let _ = std::fs::remove_file(&agent.config.control_socket);
    Ok(())
}
