//! The agent's end of a shim's control socket: one request, one answer.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vmdr_proto::shim::{
    Arm, Cut, Detach, EndMirrors, Fence, Fill, Finish, FromShim, GetState, Hello, NoPart, Part, Pass, Passed, Release,
    Resend, Resume, State, ToShim, from_shim, to_shim,
};
use vmdr_proto::{SHIM_VERSION, SHIM_VERSION_MIN, frame};
use vmdr_shim::capture::Whole;

/// How long a shim may take for any answer. A cut ends itself well before; reading a disk that hangs, too.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How long one that runs already may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(2);

/// Why a request brought no answer of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The shim is gone or does not answer: another one has to be started.
    #[error("the shim is lost: {0}")]
    Lost(String),
    /// QEMU is gone, or cannot be talked to any more. The shim may still have what the guest wrote last.
    #[error("the guest's QEMU is gone: {0}")]
    GuestGone(String),
    /// The shim answered that it could not; it can be asked again.
    #[error("{0}")]
    Failed(String),
}

/// A connection.
#[derive(Debug)]
pub struct ShimClient {
    stream: UnixStream,
    /// What both speak: this agent's version, or the one before.
    version: u32,
}

impl ShimClient {
    /// Connects and says hello, retrying until `limit` has passed: a shim that was just started needs a moment.
    pub fn connect(path: &Path, limit: Duration) -> anyhow::Result<(Self, State)> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("connect to the shim at {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        // One that does not even greet may hang with the guest paused: not to be waited for.
        stream.set_read_timeout(Some(limit.max(GREETING_LIMIT)))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut client = Self { stream, version: SHIM_VERSION };
        let state = client.greet()?;
        client.stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok((client, state))
    }

    /// Agrees on a version: the newest that both speak. A shim that was started by the agent before this one refuses a
    /// version that it does not know, and goes on listening.
    fn greet(&mut self) -> anyhow::Result<State> {
        let mut refused = String::new();
        for version in (SHIM_VERSION_MIN..=SHIM_VERSION).rev() {
            match self.state_after(to_shim::Request::Hello(Hello { protocol_version: version })) {
                Ok(state) if (SHIM_VERSION_MIN..=version).contains(&state.protocol_version) => {
                    self.version = state.protocol_version;
                    return Ok(state);
                }
                Ok(state) => bail!(
                    "the shim speaks protocol {}, this agent {SHIM_VERSION_MIN} to {SHIM_VERSION}: `vmdr unprotect` and \
                     `vmdr protect` start another",
                    state.protocol_version
                ),
                Err(ShimError::Failed(message)) => refused = message,
                Err(lost) => return Err(lost.into()),
            }
        }
        bail!("the shim speaks none of the protocols {SHIM_VERSION_MIN} to {SHIM_VERSION} of this agent: {refused}")
    }

    /// The version of the protocol that is spoken with this shim.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// See `shim.proto`.
    pub fn arm(&mut self, generation: u64, epoch: u64, whole: Whole, whole_disks: bool) -> Result<State, ShimError> {
        let (seed, resync) = (whole == Whole::Seed, whole == Whole::Resync);
        self.state_after(to_shim::Request::Arm(Arm { generation, epoch, seed, resync, whole_disks }))
    }

    /// See `shim.proto`.
    pub fn state(&mut self) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::GetState(GetState {}))
    }

    /// See `shim.proto`.
    pub fn release(&mut self, epoch: u64, part: u32) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::Release(Release { epoch, part }))
    }

    /// See `shim.proto`.
    pub fn fence(&mut self) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::Fence(Fence {}))
    }

    /// See `shim.proto`.
    pub fn resume(&mut self) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::Resume(Resume {}))
    }

    /// See `shim.proto`.
    pub fn end_mirrors(&mut self) -> Result<(), ShimError> {
        self.state_after(to_shim::Request::EndMirrors(EndMirrors {})).map(drop)
    }

    /// See `shim.proto`. The shim exits afterwards. `suspend`: a resync will follow.
    pub fn detach(&mut self, suspend: bool) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::Detach(Detach { suspend }))
    }

    /// See `shim.proto`.
    pub fn finish(&mut self) -> Result<Result<Part, NoPart>, ShimError> {
        self.part(to_shim::Request::Finish(Finish {}))
    }

    /// See `shim.proto`.
    pub fn pass(&mut self) -> Result<Result<Passed, NoPart>, ShimError> {
        match self.ask(to_shim::Request::Pass(Pass {}))? {
            from_shim::Reply::Passed(passed) => Ok(Ok(passed)),
            from_shim::Reply::NoPart(no) => Ok(Err(no)),
            other => Err(unexpected(&other)),
        }
    }

    /// See `shim.proto`.
    pub fn fill(&mut self, bytes_max: u64) -> Result<Result<Part, NoPart>, ShimError> {
        self.part(to_shim::Request::Fill(Fill { bytes_max }))
    }

    /// See `shim.proto`.
    pub fn cut(&mut self, pages_max: u64, hold: bool) -> Result<Result<Part, NoPart>, ShimError> {
        self.part(to_shim::Request::Cut(Cut { pages_max, hold }))
    }

    /// See `shim.proto`.
    pub fn resend(&mut self, epoch: u64, part: u32) -> Result<Result<Part, NoPart>, ShimError> {
        self.part(to_shim::Request::Resend(Resend { epoch, part }))
    }

    fn part(&mut self, request: to_shim::Request) -> Result<Result<Part, NoPart>, ShimError> {
        match self.ask(request)? {
            from_shim::Reply::Part(part) => Ok(Ok(part)),
            from_shim::Reply::NoPart(no) => Ok(Err(no)),
            other => Err(unexpected(&other)),
        }
    }

    fn state_after(&mut self, request: to_shim::Request) -> Result<State, ShimError> {
        match self.ask(request)? {
            from_shim::Reply::State(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: to_shim::Request) -> Result<from_shim::Reply, ShimError> {
        let lost = |error: frame::FrameError| ShimError::Lost(error.to_string());
        frame::write(&mut self.stream, &ToShim { request: Some(request) }).map_err(lost)?;
        let answer: FromShim = frame::read(&mut self.stream).map_err(lost)?;
        match answer.reply {
            Some(from_shim::Reply::Failed(failed)) if failed.fatal => Err(ShimError::GuestGone(failed.message)),
            Some(from_shim::Reply::Failed(failed)) => Err(ShimError::Failed(failed.message)),
            Some(reply) => Ok(reply),
            None => Err(ShimError::Lost("an answer of an unknown kind".to_owned())),
        }
    }
}

fn unexpected(reply: &from_shim::Reply) -> ShimError {
    let kind = match reply {
        from_shim::Reply::State(_) => "state",
        from_shim::Reply::Part(_) => "part",
        from_shim::Reply::NoPart(_) => "no part",
        from_shim::Reply::Passed(_) => "passed",
        from_shim::Reply::Failed(_) => "failed",
    };
    ShimError::Lost(format!("an answer that does not belong to the request: {kind}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use vmdr_proto::shim::Failed;

    use super::*;

    /// A shim that speaks `newest` and nothing else; it answers `hello` and `get_state`.
    fn shim_of(newest: u32, also_before: bool) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while let Ok(ask) = frame::read::<ToShim>(&mut stream) {
                let state = |protocol_version| from_shim::Reply::State(State { protocol_version, ..State::default() });
                let reply = match ask.request {
                    Some(to_shim::Request::Hello(hello))
                        if hello.protocol_version == newest
                            || (also_before && hello.protocol_version + 1 == newest) =>
                    {
                        state(hello.protocol_version)
                    }
                    Some(to_shim::Request::GetState(_)) => state(newest),
                    _ => from_shim::Reply::Failed(Failed { message: "not spoken here".to_owned(), fatal: false }),
                };
                frame::write(&mut stream, &FromShim { reply: Some(reply) }).unwrap();
            }
        });
        (directory, path)
    }

    #[test]
    fn a_shim_of_the_version_before_is_gone_on_with() {
        let (_directory, path) = shim_of(SHIM_VERSION - 1, false);
        let (mut client, state) = ShimClient::connect(&path, GREETING_LIMIT).unwrap();
        assert_eq!((client.version(), state.protocol_version), (SHIM_VERSION - 1, SHIM_VERSION - 1));
        client.state().unwrap();
        client.state().unwrap();
    }

    #[test]
    fn the_newest_version_that_both_speak_is_taken() {
        let (_directory, path) = shim_of(SHIM_VERSION, true);
        assert_eq!(ShimClient::connect(&path, GREETING_LIMIT).unwrap().0.version(), SHIM_VERSION);
        // A newer shim, which speaks the version before its own: this one.
        let (_directory, path) = shim_of(SHIM_VERSION + 1, true);
        assert_eq!(ShimClient::connect(&path, GREETING_LIMIT).unwrap().0.version(), SHIM_VERSION);
    }

    #[test]
    fn a_shim_of_any_other_version_is_refused_by_name() {
        for newest in [SHIM_VERSION + 2, SHIM_VERSION_MIN.wrapping_sub(1)] {
            let (_directory, path) = shim_of(newest, false);
            let error = ShimClient::connect(&path, GREETING_LIMIT).unwrap_err().to_string();
            assert!(error.contains("none of the protocols") && error.contains("not spoken here"), "{error}");
        }
    }
}
