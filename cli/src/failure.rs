//! How a command can end other than well, and the exit code of each way. The codes are part of the interface
//! (`docs/cli.md`): a number once given keeps its meaning.

use std::error::Error;

use tonic::{Code, Status};

use crate::client::Daemon;

/// Why the command did not do what was asked; each variant is one exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// 1: it was refused, or tried and failed. The guest is as it was unless the message says otherwise.
    #[error("{0}")]
    Failed(String),
    /// 2: the command line, or a value in the request, is wrong.
    #[error("{0}")]
    Usage(String),
    /// 3: a daemon is not there, does not accept, or went away meanwhile.
    #[error("{0}")]
    Unreachable(String),
    /// 4: no such domain, or nothing stored of it.
    #[error("{0}")]
    NotFound(String),
    /// 5: it is so already (for example: protected already).
    #[error("{0}")]
    Already(String),
    /// 6: a daemon is there but did not answer in time.
    #[error("{0}")]
    NoAnswer(String),
}

impl Failure {
    /// The process's exit code.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable(_) => 3,
            Failure::NotFound(_) => 4,
            Failure::Already(_) => 5,
            Failure::NoAnswer(_) => 6,
        }
    }

    /// What a daemon answered instead of a result.
    ///
    /// A status with a source was made on this side: the connection broke. One without came from the daemon, and its
    /// message is already a sentence for the operator.
    pub fn from_status(daemon: Daemon, request: &str, status: &Status) -> Failure {
        if let Some(source) = status.source() {
            // hyper does not export the type of this cause.
            if innermost(source).ends_with("timed out") {
                return Failure::NoAnswer(format!(
                    "the {daemon} does not answer any longer (asked: `{request}`): see its log, and whether it hangs"
                ));
            }
            return Failure::Unreachable(format!(
                "the connection to the {daemon} was lost during `{request}` ({}): see `vmdr status`, then run it again",
                innermost(source)
            ));
        }
        let message = match status.message() {
            "" => format!("the {daemon} refused `{request}` ({:?}) without a reason; its log has more", status.code()),
            message => message.to_owned(),
        };
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Failure::Usage(message),
            Code::NotFound => Failure::NotFound(message),
            Code::AlreadyExists => Failure::Already(message),
            Code::Unavailable => Failure::Unreachable(message),
            Code::DeadlineExceeded => Failure::NoAnswer(message),
            Code::Unimplemented => Failure::Failed(format!(
                "the {daemon} does not know `{request}`: it is of another version than this command (`vmdr --version`)"
            )),
            _ => Failure::Failed(message),
        }
    }
}

/// The first cause: the layers above it only repeat it.
pub fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_exit_code() {
        let code = |code| Failure::from_status(Daemon::Agent, "protect", &Status::new(code, "why")).code();
        let expected = [
            (Code::FailedPrecondition, 1),
            (Code::Internal, 1),
            (Code::ResourceExhausted, 1),
            (Code::PermissionDenied, 1),
            (Code::Unimplemented, 1),
            (Code::InvalidArgument, 2),
            (Code::OutOfRange, 2),
            (Code::Unavailable, 3),
            (Code::NotFound, 4),
            (Code::AlreadyExists, 5),
            (Code::DeadlineExceeded, 6),
        ];
        for (status, exit) in expected {
            assert_eq!(code(status), exit, "{status:?}");
        }
    }

    #[test]
    fn a_broken_connection_is_told_from_an_answer() {
        let mut status = Status::new(Code::Unknown, "transport error");
        status.set_source(std::sync::Arc::new(std::io::Error::other("broken pipe")));
        let failure = Failure::from_status(Daemon::Receiver, "activate", &status);
        assert_eq!(failure.code(), 3);
        assert!(failure.to_string().contains("broken pipe"), "{failure}");
        status.set_source(std::sync::Arc::new(std::io::Error::other("keep-alive timed out")));
        assert_eq!(Failure::from_status(Daemon::Receiver, "activate", &status).code(), 6);
        let failure = Failure::from_status(Daemon::Receiver, "activate", &Status::new(Code::Internal, ""));
        assert!(failure.to_string().contains("its log has more"), "{failure}");
    }
}
