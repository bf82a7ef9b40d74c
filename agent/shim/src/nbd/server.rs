//! The listening socket, a thread for each connection, and the end of both.
//!
//! Only [`Server::start`] and [`Server::stop`] wait for anything. The one lock, over the list of sessions, is held for
//! the length of a list operation, never across I/O or a call of an export: a session that stalls stalls itself.

use super::export::Export;
use super::handshake::{Agreed, SessionError, negotiate};
use super::proto::{BLOCK_BYTES_MIN_MAX, NAME_BYTES_MAX};
use super::session::{Tally, transmit};
use super::stream::DeadlineStream;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections at a time. One writer (QEMU's mirror) is expected; the rest is room for a reconnect beside a session
/// that is not gone yet, and for tools that open a few (nbdcopy: four). Each may hold a buffer of 32 MiB.
pub const SESSIONS_MAX: usize = 16;
/// Connections the kernel keeps waiting for the accept thread.
const BACKLOG: i32 = 16;
/// Time a client has for its whole negotiation, so that one that says nothing does not hold a place for ever. Afterwards
/// there is no limit: an idle guest may be silent for days.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of descriptors, mostly), which would otherwise fail again at once, and again.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The exports themselves are wrong.
    #[error("NBD socket {}: {why}", path.display())]
    Exports {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There is something at this path that is in use, or no socket.
    #[error("NBD socket {}: {why}; remove it or choose another path", path.display())]
    Occupied {
        /// The socket.
        path: PathBuf,
        /// What is there.
        why: &'static str,
    },
    /// The system refused.
    #[error("NBD socket {}: {doing}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// A running server. Dropping it stops it.
pub struct Server {
    path: PathBuf,
    /// Device and inode of the socket, so that only our own is removed.
    identity: (u64, u64),
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    listener: UnixListener,
    exports: Vec<Arc<dyn Export>>,
    stopping: AtomicBool,
    sessions: Mutex<Vec<Running>>,
}

struct Running {
    /// Weak, so that the connection is closed the moment its thread is done with it.
    stream: Weak<UnixStream>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Serves `exports` (by name) on a new unix socket at `path`, which only `owner_uid` (and root) may connect to:
    /// mode 0600, from its first instant. A socket left behind by a process that is gone is replaced.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left behind at `path`.
    pub fn start(path: &Path, exports: Vec<Arc<dyn Export>>, owner_uid: Option<u32>) -> Result<Self, ServerError> {
        check_exports(path, &exports)?;
        check_vacant(path)?;
        let (listener, identity) = listen(path, owner_uid)?;
        let shared =
            Arc::new(Shared { listener, exports, stopping: AtomicBool::new(false), sessions: Mutex::default() });
        let mut server = Self { path: path.to_owned(), identity, shared: Arc::clone(&shared), accept: None };
        let thread = std::thread::Builder::new().name("nbd-accept".into()).spawn(move || accept_all(&shared));
        // On failure, dropping `server` removes the socket.
        server.accept = Some(thread.map_err(|source| server.error("start the accept thread", source))?);
        Ok(server)
    }

    /// Where clients connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the socket and every connection and waits for their threads: as long as a request that an export is
    /// working on, no longer. Requests that are not answered by then never are.
    pub fn stop(mut self) {
        self.end();
    }

    fn error(&self, doing: &'static str, source: io::Error) -> ServerError {
        ServerError::Io { path: self.path.clone(), doing, source }
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        if std::fs::symlink_metadata(&self.path).is_ok_and(|there| (there.dev(), there.ino()) == self.identity) {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
        // Wakes the accept thread: accept fails on a socket that is shut down.
        let _ = rustix::net::shutdown(&self.shared.listener, Shutdown::Both);
        if let Some(thread) = self.accept.take() {
            join(thread);
        }
        // No accept thread any more: this list is complete.
        let sessions = std::mem::take(&mut *self.shared.sessions());
        for session in &sessions {
            if let Some(stream) = session.stream.upgrade() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        for session in sessions {
            join(session.thread);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, Vec<Running>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("an NBD thread panicked; its connection was closed");
    }
}

fn check_exports(path: &Path, exports: &[Arc<dyn Export>]) -> Result<(), ServerError> {
    let wrong = |why: String| Err(ServerError::Exports { path: path.to_owned(), why });
    if exports.is_empty() {
        return wrong("no export to serve".into());
    }
    let mut names = HashSet::new();
    for export in exports {
        let (name, size, unit) = (export.name(), export.size_bytes(), export.capabilities().block_bytes_min);
        if name.len() > NAME_BYTES_MAX {
            return wrong(format!("an export's name is longer than {NAME_BYTES_MAX} bytes"));
        }
        if !names.insert(name) {
            return wrong(format!("two exports are called {name:?}"));
        }
        if !unit.is_power_of_two() || unit > BLOCK_BYTES_MIN_MAX || size % u64::from(unit) != 0 {
            return wrong(format!("export {name:?} of {size} bytes cannot have blocks of {unit} bytes"));
        }
    }
    Ok(())
}

/// Nothing at `path`, or a socket that nobody listens on any more.
fn check_vacant(path: &Path) -> Result<(), ServerError> {
    let occupied = |why| Err(ServerError::Occupied { path: path.to_owned(), why });
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ServerError::Io { path: path.to_owned(), doing: "look", source }),
        Ok(there) if !there.file_type().is_socket() => occupied("there is something that is no socket"),
        // Not waiting: a server that hangs with a full backlog would keep us waiting for ever.
        Ok(_) => match probe(path) {
            Err(Errno::CONNREFUSED) => Ok(()),
            Ok(()) | Err(Errno::AGAIN) => occupied("another process serves there"),
            Err(e) => Err(ServerError::Io { path: path.to_owned(), doing: "probe the socket there", source: e.into() }),
        },
    }
}

fn probe(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

/// A listening socket and its device and inode. It is made under a name of its own and moved to `path` when it is
/// complete, so that whoever finds `path` can connect.
fn listen(path: &Path, owner_uid: Option<u32>) -> Result<(UnixListener, (u64, u64)), ServerError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let fail = |doing| move |source: io::Error| ServerError::Io { path: path.to_owned(), doing, source };
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let draft = path.with_file_name(format!(".nbd-{}-{number}", std::process::id()));
    // A process of the same number may have died half-way.
    let _ = std::fs::remove_file(&draft);
    let made = (|| {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| fail("create")(e.into()))?;
        // Before bind: Linux gives the new name the mode of the socket, so that it is never open to others.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| fail("set its mode")(e.into()))?;
        let address = SocketAddrUnix::new(&draft).map_err(|e| fail("use this path")(e.into()))?;
        // The draft's name may be shorter than the real one.
        SocketAddrUnix::new(path).map_err(|e| fail("use this path")(e.into()))?;
        rustix::net::bind(&socket, &address).map_err(|e| fail("bind")(e.into()))?;
        if let Some(uid) = owner_uid {
            rustix::fs::chown(&draft, Some(Uid::from_raw(uid)), None::<Gid>)
                .map_err(|e| fail("give it to QEMU's user")(e.into()))?;
        }
        rustix::net::listen(&socket, BACKLOG).map_err(|e| fail("listen")(e.into()))?;
        let there = std::fs::symlink_metadata(&draft).map_err(fail("look"))?;
        std::fs::rename(&draft, path).map_err(fail("move into place"))?;
        Ok((UnixListener::from(socket), (there.dev(), there.ino())))
    })();
    if made.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    made
}

fn accept_all(shared: &Arc<Shared>) {
    let mut last_session = 0;
    loop {
        let accepted = shared.listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        reap(shared);
        match accepted {
            Ok((stream, _)) => {
                last_session += 1;
                admit(shared, last_session, stream);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "NBD server cannot accept a connection; trying again");
                std::thread::sleep(ACCEPT_RETRY);
            }
        }
    }
}

/// Takes finished sessions off the list.
fn reap(shared: &Shared) {
    let mut finished = Vec::new();
    {
        let mut sessions = shared.sessions();
        let mut at = 0;
        while at < sessions.len() {
            if sessions[at].thread.is_finished() { finished.push(sessions.swap_remove(at)) } else { at += 1 }
        }
    }
    for session in finished {
        join(session.thread);
    }
}

fn admit(shared: &Arc<Shared>, session: u64, stream: UnixStream) {
    if shared.sessions().len() >= SESSIONS_MAX {
        tracing::warn!(session, limit = SESSIONS_MAX, "NBD connection closed: too many at a time");
        return;
    }
    let stream = Arc::new(stream);
    let watched = Arc::downgrade(&stream);
    let theirs = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name(format!("nbd-{session}"))
        .spawn(move || run(&theirs.exports, session, &stream));
    match spawned {
        Ok(thread) => shared.sessions().push(Running { stream: watched, thread }),
        Err(error) => tracing::warn!(session, %error, "NBD connection closed: no thread for it"),
    }
}

fn run(exports: &[Arc<dyn Export>], session: u64, stream: &UnixStream) {
    let agreed = match handshake(exports, session, stream) {
        Ok(Some(agreed)) => agreed,
        Ok(None) => return tracing::debug!(session, "NBD client left without choosing an export"),
        Err(error) => return tracing::warn!(session, %error, "NBD negotiation failed"),
    };
    let export = agreed.attachment.export().name();
    tracing::info!(session, export, structured = agreed.terms.structured, "NBD session begins");
    let mut tally = Tally::default();
    let mut socket = stream;
    let end = transmit(&mut socket, &agreed, &mut tally);
    let Tally { requests, failures } = tally;
    match end {
        Ok(end) => tracing::info!(session, export, requests, failures, ?end, "NBD session ended"),
        Err(error) => tracing::warn!(session, export, requests, failures, %error, "NBD session broke"),
    }
}

fn handshake(exports: &[Arc<dyn Export>], session: u64, stream: &UnixStream) -> Result<Option<Agreed>, SessionError> {
    let mut limited = DeadlineStream::new(stream, HANDSHAKE_LIMIT);
    let agreed = negotiate(&mut limited, exports, session)?;
    limited.lift()?;
    Ok(agreed)
}
