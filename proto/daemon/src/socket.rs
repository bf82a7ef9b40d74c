//! The control socket of a daemon.
//!
//! Any process of the host can connect: who it is decides what it may ask ([`crate::caller`], [`crate::guard`]). The kernel
//! tells that as surely as it checks a file's mode, and in contrast to that a refused attempt can be recorded. Each role has
//! connections for itself, so that nobody can take the operator's; callers without a role have a few, for a short time each.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use vmdr_audit::{Audit, Entry, Outcome};

use crate::caller::{Caller, Groups, Role};

/// See the module.
const MODE: u32 = 0o666;
/// Of the directory, where there is none yet.
const DIRECTORY_MODE: u32 = 0o755;
/// Connections of operators at the same time.
const OPERATORS_MAX: usize = 64;
/// Connections of readers.
const READERS_MAX: usize = 32;
/// Connections of everybody else.
const STRANGERS_MAX: usize = 4;
/// How long one of those may last: enough to be told no.
const STRANGER_TIME_MAX: Duration = Duration::from_secs(5);
/// Rest after a failed accept: mostly descriptors ran out, and come back.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// Listens at `path`. A socket that somebody answers on is left alone (`AddrInUse`); a stale one is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        std::fs::create_dir_all(directory)?;
        // Whatever the daemon's umask is: who may do what is decided when they have connected.
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(DIRECTORY_MODE))?;
    }
    if StdUnixStream::connect(path).is_ok() {
        let message = format!("{}: another daemon answers there", path.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))?;
    Ok(listener)
}

/// Connections with their callers. Ends when the receiver of the stream is gone.
pub fn incoming(listener: UnixListener, groups: Groups, audit: Audit) -> ReceiverStream<io::Result<ControlStream>> {
    let (sender, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        // Nobody can take the places of those who may more.
        let [operators, readers, strangers] =
            [OPERATORS_MAX, READERS_MAX, STRANGERS_MAX].map(|most| Arc::new(Semaphore::new(most)));
        loop {
            let accepted = tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection to the control socket");
                    tokio::time::sleep(ACCEPT_REST).await;
                    continue;
                }
            };
            let caller = match Caller::of(&stream, groups) {
                Ok(caller) => caller,
                Err(error) => {
                    tracing::warn!(%error, "ask who has connected to the control socket");
                    continue;
                }
            };
            let stranger = caller.role == Role::Nobody;
            let permits = match caller.role {
                Role::Operator => &operators,
                Role::Reader => &readers,
                Role::Nobody => &strangers,
            };
            let Ok(permit) = Arc::clone(permits).try_acquire_owned() else {
                let entry = Entry::new("connect", &caller.user(), "control socket", Outcome::Refused);
                refuse(&audit, entry.because("too many connections at once"));
                continue;
            };
            let time = stranger.then(|| Box::pin(tokio::time::sleep(STRANGER_TIME_MAX)));
            if sender.send(Ok(ControlStream { stream, caller, time, _permit: permit })).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(stream)
}

/// Records a refusal without waiting for the disk.
pub(crate) fn refuse(audit: &Audit, entry: Entry) {
    let audit = audit.clone();
    tokio::task::spawn_blocking(move || audit.refused(entry));
}

/// A connection to the control socket.
#[derive(Debug)]
pub struct ControlStream {
    stream: UnixStream,
    caller: Caller,
    /// The end of its time, if that is limited.
    time: Option<Pin<Box<tokio::time::Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for ControlStream {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller
    }
}

impl AsyncRead for ControlStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(time) = &mut self.time
            && time.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, to)
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
