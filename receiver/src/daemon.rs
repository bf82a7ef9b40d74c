//! The receiver as a whole: what its services share, and its life from start to end.
//!
//! Nothing here is durable: positions are the store's, activations are in their records. A receiver that is killed loses only
//! figures of the last hour.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::Server;
use uuid::Uuid;
use vmdr_audit::Audit;
use vmdr_daemon::caller::Groups;
use vmdr_daemon::guard::Guard;
use vmdr_daemon::host::HostService;
use vmdr_daemon::ownership::{CONFIRMED, Ownerships};
use vmdr_proto::MESSAGE_BYTES_MAX;
use vmdr_proto::control::receiver_server::ReceiverServer;
use vmdr_proto::host::host_server::HostServer;
use vmdr_proto::replication::replication_server::ReplicationServer;
use vmdr_trust::Trust;

use crate::activate::run::{age_seconds, unix_ns};
use crate::activate::{Settings, record::ActiveDirectory};
use crate::cold::{self, Cold};
use crate::config::Config;
use crate::control::ControlService;
use crate::drill::record::{Book, Outcome};
use crate::drill::{self, Drills};
use crate::failover;
use crate::group::{self, Groups as DomainGroups};
use crate::metrics::{DomainSample, DrillSample, Metrics, Sample};
use crate::recovery::{self, watch::Watched};
use crate::replication::ReplicationService;
use crate::reverse::{self, Reversal};
use crate::silence;
use crate::stats::Stats;
use crate::store::{DomainSummary, Store, StoreOptions};
use crate::takeover;
use crate::verify::{self, Verifier};

/// Silence after which an agent is asked whether it is there; twice that and the connection is given up, so that a host that
/// vanished is noticed within seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long it may take to answer: behind what is queued on a slow link (the agent has the same limit).
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes under way per stream: a link of 1 Gbit/s with a round trip of 60 ms is kept full.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// The same for a connection; an agent has a stream per guest on it.
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Requests under way on a connection: a stream, and questions beside it.
const STREAMS_MAX: u32 = 16;
/// Headers of a request; an agent sends some 300 bytes.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// Requests that were given up before they were looked at; more and the connection is closed.
const RESETS_MAX: usize = 16;
/// At the end: how long what is being answered may take. An agent that hangs must not keep the receiver; whatever is cut off
/// was not acknowledged, and an activation goes on from its record.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(5);

/// What those may ask on the control socket who may only look.
const READABLE: &[&str] = &["Groups", "Peers", "PlanActivation", "PlanGroup", "Points", "Status"];

/// What is known of a domain's stream while the receiver runs.
#[derive(Debug, Default)]
pub struct Session {
    /// Figures.
    pub stats: Stats,
    /// Streams opened so far: the end of an older one says nothing about the newest.
    pub streams: u64,
    /// Address and name of the protected host.
    pub peer: String,
    /// Why the last stream ended, unless it was ended in order.
    pub last_error: String,
    /// When the newest recovery point was cut, for its age when the next comes.
    pub cut_unix_ns: u64,
}

/// What the services share.
pub struct Receiver {
    /// The configuration.
    pub config: Config,
    /// What is stored.
    pub store: Store,
    /// What was done here, and refused.
    pub audit: Audit,
    /// Who this host is, and which hosts it trusts.
    pub trust: Trust,
    /// What is counted.
    pub metrics: Metrics,
    /// Since when nothing was heard of agents.
    pub silence: silence::Watches,
    /// Guests that are taken when their host is silent.
    pub failover: failover::Failover,
    /// Which domains this host owns.
    pub ownerships: Ownerships,
    /// Standbys that are being made of what is here already.
    pub reversals: Mutex<HashMap<Uuid, Reversal>>,
    /// Who reads points again.
    pub verifier: Verifier,
    /// Drills that are under way.
    pub drills: Arc<Drills>,
    /// Groups of domains that are being activated.
    pub groups: Arc<DomainGroups>,
    /// Object storage.
    pub cold: Cold,
    /// What the last look at the recovery plan has found.
    pub watched: Watched,
    /// What did not work when it was started, and that it goes on without.
    pub troubles: Vec<String>,
    sessions: Mutex<HashMap<Uuid, Session>>,
    activations: Mutex<HashMap<Uuid, Arc<tokio::sync::Mutex<()>>>>,
    started: Instant,
    ending: watch::Sender<bool>,
}

impl Receiver {
    /// Opens the store. Blocks while journals are read.
    pub fn open(config: Config) -> anyhow::Result<Self> {
        let retention = config.retention.policy().map_err(|what| anyhow::anyhow!("[retention]: {what}"))?;
        let space_reserve_bytes = config.space_reserve_bytes;
        let keys = config.encryption.keyring();
        let options = StoreOptions { space_reserve_bytes, retention, keys, ..StoreOptions::default() };
        let store = Store::open(&config.state_dir, options).context("open the state directory")?;
        let ownerships = Ownerships::new(&config.ownership_dir, Path::new(CONFIRMED));
        let mut troubles = Vec::new();
        let audit = Audit::open(&config.audit_dir, "receiver").or_else(|error| {
            let trouble =
                format!("the audit log cannot be written, and what is done is noted in the log only: {error}");
            instead(&mut troubles, trouble, "audit", |directory| Audit::open(directory, "receiver"))
        })?;
        let trust = Trust::open(&config.identity_dir, audit.clone()).or_else(|error| {
            let trouble =
                format!("this host's identity cannot be used, and no peer is known until that is put right: {error}");
            instead(&mut troubles, trouble, "identity", |directory| Trust::open(directory, audit.clone()))
        });
        let trust = trust.context("this host's identity")?;
        Ok(Receiver {
            troubles,
            cold: Cold::new(config.cold.clone()),
            silence: silence::Watches::new(&config.alarm),
            failover: failover::Failover::new(&config.witness, &config.failover),
            config,
            audit,
            trust,
            store,
            metrics: Metrics::default(),
            ownerships,
            reversals: Mutex::default(),
            verifier: Verifier::default(),
            watched: Watched::default(),
            drills: Arc::default(),
            groups: Arc::default(),
            sessions: Mutex::default(),
            activations: Mutex::default(),
            started: Instant::now(),
            ending: watch::channel(false).0,
        })
    }

    /// Seconds since the start, for [`Stats`].
    pub fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// Changes or reads what is known of a domain's stream.
    pub fn session<T>(&self, uuid: Uuid, with: impl FnOnce(&mut Session) -> T) -> T {
        with(self.sessions().entry(uuid).or_default())
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<Uuid, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of a domain that is no longer there.
    pub fn forget_session(&self, uuid: Uuid) {
        self.sessions().remove(&uuid);
        self.silence.forget(uuid);
        failover::forgotten(self, uuid);
    }

    /// The lock under which a domain is activated or forgotten.
    pub fn activation_lock(&self, uuid: Uuid) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.activations.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as domains were ever asked about: those that nobody holds go when there are more than a few.
        if locks.len() > 64 {
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        }
        Arc::clone(locks.entry(uuid).or_default())
    }

    /// Becomes true when the receiver ends.
    pub fn ending(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// Whether the receiver ends.
    pub fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// The directory of a domain.
    pub fn domain_directory(&self, uuid: Uuid) -> PathBuf {
        self.store.dir().join(uuid.to_string())
    }

    /// The activation of a domain.
    pub fn active_directory(&self, uuid: Uuid) -> ActiveDirectory {
        ActiveDirectory::of(&self.domain_directory(uuid))
    }

    /// What activation of a domain needs of the configuration and the recovery plan.
    pub fn settings(&self, name: &str, uuid: Uuid) -> Settings {
        let mapping = recovery::mapping(&self.config, name, &uuid.to_string());
        let clear_directory = self.config.encryption.clear_dir.clone();
        Settings { state_directory: self.config.state_dir.clone(), clear_directory, mapping }
    }

    /// Bytes that can still be written where the state directory is.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let space = rustix::fs::statvfs(&self.config.state_dir)?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    /// The state for metrics.
    pub fn sample(&self) -> Sample {
        let now = unix_ns(SystemTime::now());
        let drill = |uuid: &str| {
            let book = Book::read(&self.store.dir().join(uuid)).ok()?;
            let last = book.newest().filter(|report| report.ended_unix_ns > 0)?;
            Some(DrillSample {
                ended_seconds: last.ended_unix_ns as f64 / 1e9,
                passed: last.outcome == Outcome::Passed,
                rto_seconds: last.rto_seconds,
            })
        };
        let silent = |d: &DomainSummary| {
            let uuid = Uuid::parse_str(&d.uuid).ok().filter(|_| !d.frozen)?;
            self.silence.seconds(uuid)
        };
        let domains = self.store.domains().into_iter().map(|d| DomainSample {
            drill: drill(&d.uuid),
            silent_seconds: silent(&d),
            alarm: self.silence.alarm(&d, "").is_some(),
            armed: Uuid::parse_str(&d.uuid).ok().and_then(|uuid| self.failover.is_armed(uuid)),
            name: d.name,
            generation: d.position.generation,
            epoch: d.position.epoch,
            recovery_point_age_seconds: (d.position.epoch > 0).then(|| age_seconds(d.cut_unix_ns, now)),
            stored_bytes: d.stored_bytes,
            points: d.points,
            history_bytes: d.history_bytes,
            history_budget_bytes: d.history_budget_bytes,
            history_alarm: d.alarm.is_some(),
            damaged_points: d.damaged_points,
            damaged: d.damage.is_some(),
            verified_seconds: d.verified_unix_ns.map(|ns| ns as f64 / 1e9),
            receiving: d.receiving,
            active: d.frozen,
            uuid: d.uuid,
        });
        let plan = self.watched.last().map(|last| (last.refusals() as u64, last.unix_seconds));
        Sample { domains: domains.collect(), free_bytes: self.free_bytes().unwrap_or(0), plan }
    }
}

/// Opens something that is not to keep guests from being activated in an empty directory instead of its own, and says so.
fn instead<T, E>(
    troubles: &mut Vec<String>,
    trouble: String,
    name: &str,
    open: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    tracing::error!("{trouble}");
    troubles.push(trouble);
    // A name that nobody can have taken before; it is made with a mode that keeps everybody else out.
    open(&std::env::temp_dir().join(format!("vmdr-{name}-{}", Uuid::new_v4())))
}

/// Runs a receiver until SIGTERM or SIGINT.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let groups = Groups::named(config.operator_group.as_deref(), config.reader_group.as_deref());
    let mut receiver =
        tokio::task::spawn_blocking(move || Receiver::open(config)).await.context("open the store")??;
    let groups = groups.or_else(|error| {
        // Whoever tells of groups may be at the site that is lost.
        let trouble = format!("operator_group or reader_group is not known, and only root may ask anything: {error}");
        tracing::error!("{trouble}");
        receiver.troubles.push(trouble);
        Groups::named(None, None)
    })?;
    let receiver = Arc::new(receiver);
    verify::start(&receiver).context("start the thread that verifies")?;
    recovery::watch::start(&receiver).context("start the thread that looks at the recovery plan")?;
    drill::tend::start(&receiver).context("start the thread that looks after drills")?;
    silence::start(&receiver).context("start the thread that raises alarms")?;
    failover::start(&receiver).context("start the thread that takes guests of silent hosts")?;

    let listener = listen(receiver.config.listen).await?;
    let address = listener.local_addr().context("ask for the address listened on")?;
    let metrics = match receiver.config.metrics_listen {
        Some(at) => Some(TcpListener::bind(at).await.with_context(|| format!("listen on {at} for metrics"))?),
        None => None,
    };
    // Last: whoever finds the socket finds everything else too.
    let socket = vmdr_daemon::socket::listen(&receiver.config.control_socket)
        .with_context(|| format!("listen on {}", receiver.config.control_socket.display()))?;

    if let Some(metrics) = metrics {
        let of = Arc::clone(&receiver);
        tokio::spawn(vmdr_daemon::scrape::serve(
            metrics,
            Arc::new(move || of.metrics.render(&of.sample()) + &vmdr_daemon::host::metrics(&of.trust)),
        ));
    }
    let replication = ReplicationServer::new(ReplicationService::new(Arc::clone(&receiver)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let incoming = vmdr_trust::incoming(listener, receiver.trust.clone());
    tokio::spawn(receiver.trust.clone().watch());
    let agents = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(Some(STREAMS_MAX))
        .http2_max_header_list_size(Some(HEADER_BYTES_MAX))
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .add_service(replication)
        .serve_with_incoming_shutdown(incoming, ended(receiver.ending()));
    let audit = receiver.audit.clone();
    let control = Server::builder()
        .layer(Guard::new(audit.clone(), READABLE))
        .add_service(HostServer::new(HostService::new("receiver", receiver.trust.clone()).listening()))
        .add_service(ReceiverServer::new(ControlService::new(Arc::clone(&receiver))))
        .serve_with_incoming_shutdown(vmdr_daemon::socket::incoming(socket, groups, audit), ended(receiver.ending()));
    takeover::resume_all(&receiver);
    group::run::resume_all(&receiver);
    tokio::spawn(reverse::expire_for_ever(Arc::clone(&receiver)));
    let mut agents = tokio::spawn(agents);
    let mut control = tokio::spawn(control);
    tokio::spawn(cold::schedule::run(Arc::clone(&receiver)));
    tracing::info!(%address, state_dir = %receiver.config.state_dir.display(), "ready");

    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
        _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
        ended = &mut agents => {
            ended.context("serve agents")?.context("serve agents")?;
            anyhow::bail!("the server for agents has ended by itself");
        }
        ended = &mut control => {
            ended.context("serve the control socket")?.context("serve the control socket")?;
            anyhow::bail!("the server of the control socket has ended by itself");
        }
    }
    receiver.ending.send_replace(true);
    receiver.cold.end();
    // Their records say that this was in order.
    receiver.groups.ended(SHUTDOWN_TIME_MAX).await;
    let both = async { (agents.await, control.await) };
    if tokio::time::timeout(SHUTDOWN_TIME_MAX, both).await.is_err() {
        tracing::warn!("something is still being answered; ending without it");
    }
    match std::fs::remove_file(&receiver.config.control_socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!(%error, "remove the control socket"),
        _ => {}
    }
    Ok(())
}

async fn ended(mut ending: watch::Receiver<bool>) {
    // An error means that the receiver itself is gone.
    let _ = ending.wait_for(|e| *e).await;
}

/// Any address means IPv4 as well; where the kernel has no IPv6, it means IPv4 alone.
async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let any = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let no_ipv6 = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL));
    match TcpListener::bind(address).await {
        Err(error) if any && no_ipv6(&error) => {
            let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
            TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))
        }
        bound => bound.with_context(|| format!("listen on {address}")),
    }
}
