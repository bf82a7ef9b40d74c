//! The control socket: one agent at a time, one request at a time ([`vmdr_proto::frame`]).
//!
//! The agent may go away at any moment and come back as another process; everything it needs to go on is in
//! [`State`](vmdr_proto::shim::State) and in the parts that are not released.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmdr_proto::frame::{self, FrameError};
use vmdr_proto::shim::{Failed, FromShim, NoPart, NoPartReason, Passed, ToShim, from_shim, to_shim};
use vmdr_proto::{SHIM_VERSION, SHIM_VERSION_MIN};

use crate::arena::Arena;
use crate::capture::{Capture, CaptureError, NoCut, Whole};
use crate::config::Config;
use crate::deadline::{self, Watch, lock};
use crate::disk::Disk;
use crate::nbd::{Export, Server};
use crate::permission::Permission;
use crate::state_page::StatePage;

/// How often the heartbeat in the state page rises.
pub const HEARTBEAT: Duration = Duration::from_millis(50);
/// How often QEMU's events are looked at when the agent asks for nothing.
const IDLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// An agent that stops reading in the middle of an answer is dropped after this time.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// How long what a guest wrote last is kept for an agent that is not there (it is being restarted, or was ended).
const GONE_LIMIT: Duration = Duration::from_secs(600);

/// How a shim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The agent detached it.
    Detached,
    /// QEMU is gone.
    GuestGone,
}

enum Next {
    Goes,
    Ends(End),
}

/// Runs a shim until it is detached or its guest is gone.
pub fn run(config: Config) -> anyhow::Result<End> {
    std::fs::create_dir_all(&config.directory).with_context(|| format!("make {}", config.directory.display()))?;
    // QEMU has to reach its sockets in here; they have owners of their own.
    std::fs::set_permissions(&config.directory, std::fs::Permissions::from_mode(0o711))?;
    let arena = Arena::new(config.arena_bytes).context("make the arena")?;
    let disks: Vec<Arc<Disk>> = config
        .disks
        .iter()
        .map(|disk| Arc::new(Disk::new(&disk.target, disk.size_bytes, arena.clone(), arena.bytes() / 4)))
        .collect();
    let exports: Vec<_> = disks.iter().map(|disk| disk.clone() as Arc<dyn Export>).collect();
    // A guest without a writable disk has nothing to mirror.
    let nbd = if exports.is_empty() {
        None
    } else {
        let server = Server::start(&config.nbd_socket(), exports, Some(config.qemu_uid));
        Some(server.context("start the NBD server")?)
    };
    let page = Arc::new(StatePage::create(&config.state_page()).context("make the state page")?);
    let heart = page.clone();
    std::thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
        loop {
            heart.beat();
            std::thread::sleep(HEARTBEAT);
        }
    })?;
    let directory = config.directory.clone();
    let listener = listen(&config.control_socket())?;
    let permission = match &config.permission {
        Some(path) => {
            let opened = Permission::open(path);
            Some(Arc::new(opened.with_context(|| format!("whether the guest may run: {}", path.display()))?))
        }
        None => None,
    };
    let (domain, monitor, qemu_pid) = (config.domain_name.clone(), config.monitor.clone(), config.qemu_pid);
    let capture = Capture::new(config, page.clone(), permission.clone(), arena, disks)?;
    let breaker = capture.breaker().context("keep hold of the monitor's connection")?;
    let capture = Arc::new(Mutex::new(capture));
    if let Some(permission) = permission {
        let qemu = deadline::process(qemu_pid).context("find QEMU's process")?;
        let capture = capture.clone();
        let watch = Watch { domain, permission, page, capture, monitor, breaker, qemu };
        watch.start().context("look at the deadline")?;
    }
    let end = serve(&listener, &capture)?;
    let runs = lock(&capture).detach();
    if let Some(nbd) = nbd {
        nbd.stop();
    }
    if !runs {
        // The state page stays: it tells the agent that the guest's pause is ours.
        return Ok(end);
    }
    std::fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
    Ok(end)
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn serve(listener: &UnixListener, capture: &Mutex<Capture>) -> anyhow::Result<End> {
    // Without a guest and without an agent.
    let mut alone = Instant::now();
    loop {
        if !lock(capture).is_gone() {
            alone = Instant::now();
        }
        if !readable(listener)? {
            let mut capture = lock(capture);
            if let Err(error) = capture.idle()
                && !outlives(&mut capture, &error)
            {
                return ended(&error);
            }
            if capture.is_gone() && alone.elapsed() > GONE_LIMIT {
                tracing::warn!("the guest is gone, and no agent has asked for what it wrote last");
                return Ok(End::GuestGone);
            }
            continue;
        }
        let (stream, _) = listener.accept().context("accept an agent")?;
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        tracing::info!("an agent has connected");
        match converse(&stream, capture) {
            Ok(end) => return Ok(end),
            Err(error) => tracing::info!("the agent is gone: {error}"),
        }
        alone = Instant::now();
    }
}

/// Whether a shim whose guest cannot be talked to any more has a reason to stay: QEMU is gone, and what the guest wrote
/// to its disks last is here.
fn outlives(capture: &mut Capture, error: &CaptureError) -> bool {
    error.is_fatal() && capture.guest_gone()
}

/// Serves one connection; an error means that it is over, not the shim.
fn converse(stream: &UnixStream, capture: &Mutex<Capture>) -> Result<End, FrameError> {
    let (mut from, mut to) = (stream, stream);
    // Of the agent's protocol, once it has said one that is spoken here.
    let mut version = None;
    loop {
        if !readable(stream)? {
            let mut capture = lock(capture);
            if let Err(error) = capture.idle()
                && !outlives(&mut capture, &error)
            {
                tracing::error!("{error}");
                return Ok(End::GuestGone);
            }
            continue;
        }
        let request = frame::read::<ToShim>(&mut from)?.request;
        if let Some(to_shim::Request::Hello(hello)) = &request
            && (SHIM_VERSION_MIN..=SHIM_VERSION).contains(&hello.protocol_version)
        {
            version = Some(hello.protocol_version);
        }
        let (mut reply, next) = match request {
            Some(to_shim::Request::Hello(hello)) if version != Some(hello.protocol_version) => {
                let spoken = format!("shim protocols {SHIM_VERSION_MIN} to {SHIM_VERSION} are spoken here");
                (failed(&format!("{spoken}, not {}", hello.protocol_version), false), Next::Goes)
            }
            Some(request) if version.is_some() => answer(&mut lock(capture), request),
            _ => (failed("a request before hello, or one that is not known here", false), Next::Goes),
        };
        if let (from_shim::Reply::State(state), Some(version)) = (&mut reply, version) {
            state.protocol_version = version;
        }
        let written = frame::write(&mut to, &FromShim { reply: Some(reply) });
        if let Next::Ends(end) = next {
            return Ok(end);
        }
        written?;
    }
}

fn answer(capture: &mut Capture, request: to_shim::Request) -> (from_shim::Reply, Next) {
    use to_shim::Request;
    let result = match request {
        Request::Hello(_) | Request::GetState(_) => capture.state().map(from_shim::Reply::State),
        Request::Arm(arm) => {
            let armed = capture.arm(arm.generation, arm.epoch, Whole::of(arm.seed, arm.resync));
            if arm.whole_disks {
                capture.compare_whole_disks();
            }
            armed.and_then(|()| state(capture))
        }
        Request::Pass(_) => capture.pass().map(|outcome| match outcome {
            Ok(passed) => from_shim::Reply::Passed(Passed {
                dirty_pages: passed.dirty_pages,
                pending_pages: passed.pending_pages,
                timing: Some(passed.timing),
            }),
            Err(no) => no_part(no),
        }),
        Request::Fill(fill) => capture.fill(fill.bytes_max).map(|part| match part {
            Some(part) => from_shim::Reply::Part(part),
            None => from_shim::Reply::NoPart(NoPart {
                reason: NoPartReason::Nothing.into(),
                message: "nothing is pending".to_owned(),
                timing: None,
            }),
        }),
        Request::Cut(cut) => capture.cut(cut.pages_max, cut.hold).map(|outcome| match outcome {
            Ok(part) => from_shim::Reply::Part(part),
            Err(no) => no_part(no),
        }),
        Request::Resume(_) => capture.end_hold().and_then(|()| state(capture)),
        Request::Release(release) => {
            capture.release(release.epoch, release.part);
            // Comes with every epoch: QEMU is not asked for it.
            Ok(from_shim::Reply::State(capture.own_state()))
        }
        Request::Resend(resend) => capture.resend(resend.epoch, resend.part).map(from_shim::Reply::Part),
        Request::Finish(_) => capture.last_epoch().map(|outcome| match outcome {
            Ok(part) => from_shim::Reply::Part(part),
            Err(no) => no_part(no),
        }),
        Request::Fence(_) => capture.fence().and_then(|()| state(capture)),
        Request::EndMirrors(_) => capture.end_mirrors().and_then(|()| state(capture)),
        Request::Detach(detach) => {
            capture.keep_bitmaps(detach.suspend);
            return (
                state(capture).unwrap_or_else(|error| failed(&error.to_string(), false)),
                Next::Ends(End::Detached),
            );
        }
    };
    match result {
        Ok(reply) => (reply, Next::Goes),
        Err(CaptureError::NoSpace(message)) => {
            let no = NoPart { reason: NoPartReason::NoSpace.into(), message, timing: None };
            (from_shim::Reply::NoPart(no), Next::Goes)
        }
        Err(error) => {
            tracing::warn!("{error}");
            let ends = error.is_fatal() && !capture.guest_gone();
            let next = if ends { Next::Ends(End::GuestGone) } else { Next::Goes };
            (failed(&error.to_string(), error.is_fatal()), next)
        }
    }
}

fn state(capture: &mut Capture) -> Result<from_shim::Reply, CaptureError> {
    capture.state().map(from_shim::Reply::State)
}

fn no_part(no: NoCut) -> from_shim::Reply {
    from_shim::Reply::NoPart(NoPart { reason: no.reason.into(), message: no.message, timing: Some(no.timing) })
}

fn failed(message: &str, fatal: bool) -> from_shim::Reply {
    from_shim::Reply::Failed(Failed { message: message.to_owned(), fatal })
}

fn ended(error: &CaptureError) -> anyhow::Result<End> {
    if error.is_fatal() {
        tracing::error!("{error}");
        return Ok(End::GuestGone);
    }
    Err(anyhow::anyhow!("{error}"))
}

/// Waits until `fd` is readable, or for [`IDLE`].
fn readable(fd: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    match poll(&mut fds, Some(&IDLE)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
