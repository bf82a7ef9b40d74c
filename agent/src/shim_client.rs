//! The agent's end of a shim's control socket: one request, one answer.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vmdr_proto::SHIM_VERSION;
use vmdr_proto::frame;
use vmdr_proto::shim::{
    Arm, Cut, Detach, Fence, Fill, FromShim, GetState, Hello, NoPart, Part, Pass, Passed, Release, Resend, Resume,
    State, ToShim, from_shim, to_shim,
};
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
    /// The shim answered that it could not; it can be asked again.
    #[error("{0}")]
    Failed(String),
}

/// A connection.
#[derive(Debug)]
pub struct ShimClient {
    stream: UnixStream,
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
        let mut client = Self { stream };
        let state = client.state_after(to_shim::Request::Hello(Hello { protocol_version: SHIM_VERSION }))?;
        if state.protocol_version != SHIM_VERSION {
            bail!("the shim speaks protocol {}, this agent {SHIM_VERSION}", state.protocol_version);
        }
        client.stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok((client, state))
    }

    /// See `shim.proto`.
    pub fn arm(&mut self, generation: u64, epoch: u64, whole: Whole) -> Result<State, ShimError> {
        let (seed, resync) = (whole == Whole::Seed, whole == Whole::Resync);
        self.state_after(to_shim::Request::Arm(Arm { generation, epoch, seed, resync }))
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

    /// See `shim.proto`. The shim exits afterwards.
    pub fn detach(&mut self) -> Result<State, ShimError> {
        self.state_after(to_shim::Request::Detach(Detach {}))
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
            Some(from_shim::Reply::Failed(failed)) if failed.fatal => Err(ShimError::Lost(failed.message)),
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
