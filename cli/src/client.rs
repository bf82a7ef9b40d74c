//! The connections to the two daemons of this host.
//!
//! One connection per command, made here and handed to tonic, so that what stands in the way is known exactly (no
//! socket, nobody listening, no permission) and a lost connection is never silently made anew in the middle of a
//! request. A daemon that is there but hangs is noticed: unary requests have a time limit, and streams, which may
//! rightly take hours, are kept alive by HTTP/2 pings.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};
use vmdr_proto::control::agent_client::AgentClient;
use vmdr_proto::control::receiver_client::ReceiverClient;
use vmdr_proto::host::host_client::HostClient;

use crate::args::Common;
use crate::failure::{Failure, innermost};

/// For a daemon to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// For a daemon to answer a request that is not a stream. `doctor` and `unprotect` talk to libvirt and to QEMU; `hold`
/// waits for the receiver, at most 30 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often a silent connection is asked whether it is alive.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long it may take to answer that.
const PING_LIMIT: Duration = Duration::from_secs(20);
/// The longest answer accepted: a list of some hundred thousand recovery points.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Which daemon is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// On the protected host.
    Agent,
    /// At the backup site.
    Receiver,
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Daemon::Agent => "agent",
            Daemon::Receiver => "receiver",
        })
    }
}

impl Daemon {
    /// Where it listens.
    pub fn socket(self, common: &Common) -> &Path {
        match self {
            Daemon::Agent => &common.agent_socket,
            Daemon::Receiver => &common.receiver_socket,
        }
    }

    fn option(self) -> &'static str {
        match self {
            Daemon::Agent => "--agent-socket",
            Daemon::Receiver => "--receiver-socket",
        }
    }
}

/// Connects to the agent.
pub async fn agent(common: &Common) -> Result<AgentClient<Channel>, Failure> {
    let channel = connect(Daemon::Agent, &common.agent_socket).await?;
    Ok(AgentClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// Connects to the receiver.
pub async fn receiver(common: &Common) -> Result<ReceiverClient<Channel>, Failure> {
    let channel = connect(Daemon::Receiver, &common.receiver_socket).await?;
    Ok(ReceiverClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// Connects to a daemon for what is about its host.
pub async fn host(daemon: Daemon, common: &Common) -> Result<HostClient<Channel>, Failure> {
    let channel = connect(daemon, daemon.socket(common)).await?;
    Ok(HostClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// The daemons of this host, by their sockets.
pub fn there(common: &Common) -> Result<Vec<Daemon>, Failure> {
    let daemons: Vec<Daemon> =
        [Daemon::Agent, Daemon::Receiver].into_iter().filter(|daemon| daemon.socket(common).exists()).collect();
    if daemons.is_empty() {
        return Err(Failure::Unreachable(format!(
            "no vmdr daemon on this host: neither {} nor {} exists; start vmdr-agent or vmdr-receiver, or name a \
             socket with --agent-socket or --receiver-socket",
            common.agent_socket.display(),
            common.receiver_socket.display()
        )));
    }
    Ok(daemons)
}

/// A daemon of this host that is there; the agent first.
pub fn either(common: &Common) -> Result<Daemon, Failure> {
    Ok(there(common)?.into_iter().next().unwrap_or(Daemon::Agent))
}

async fn connect(daemon: Daemon, socket: &Path) -> Result<Channel, Failure> {
    let no_answer =
        || Failure::NoAnswer(format!("the {daemon} at {} did not accept within 5 s: its log", socket.display()));
    let stream = timeout(CONNECT_LIMIT, UnixStream::connect(socket))
        .await
        .map_err(|_| no_answer())?
        .map_err(|e| not_reachable(daemon, socket, &e))?;
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.take().map(TokioIo::new).ok_or_else(|| io::Error::other("the connection was lost"));
        async move { stream }
    });
    // The name is never looked up: the connector has the socket already.
    let endpoint = Endpoint::from_static("http://vmdr.invalid")
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_LIMIT)
        .keep_alive_while_idle(true);
    timeout(CONNECT_LIMIT, endpoint.connect_with_connector(connector)).await.map_err(|_| no_answer())?.map_err(|e| {
        Failure::Unreachable(format!("what listens at {} is no vmdr {daemon}: {}", socket.display(), innermost(&e)))
    })
}

fn not_reachable(daemon: Daemon, socket: &Path, error: &io::Error) -> Failure {
    let path = socket.display();
    Failure::Unreachable(match error.kind() {
        io::ErrorKind::NotFound => format!(
            "no vmdr {daemon} on this host: {path} does not exist; start vmdr-{daemon}, or name its socket with {}",
            daemon.option()
        ),
        io::ErrorKind::ConnectionRefused => {
            format!("the vmdr {daemon} does not run: nobody listens at {path}; start vmdr-{daemon}")
        }
        io::ErrorKind::PermissionDenied => format!("no permission to talk to the {daemon} at {path}: run this as root"),
        _ => format!("cannot connect to the {daemon} at {path}: {error}"),
    })
}

/// Waits for the answer to a request that is not a stream.
pub async fn answer<T>(
    daemon: Daemon,
    request: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match timeout(ANSWER_LIMIT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Failure::from_status(daemon, request, &status)),
        Err(_) => Err(Failure::NoAnswer(format!(
            "the {daemon} did not answer `{request}` within {} s; it may still be done: see `vmdr status` and its log",
            ANSWER_LIMIT.as_secs()
        ))),
    }
}
