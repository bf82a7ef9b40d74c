//! The service that both daemons have: about their host, not about guests.

use tonic::{Request, Response, Status};
use vmdr_audit::Audit;
use vmdr_proto::host::host_server::Host;
use vmdr_proto::host::{AuditReply, AuditRequest, AuditVerdict};

/// Records shown unless asked for otherwise, and at most.
const LINES: u32 = 100;
const LINES_MAX: u32 = 10_000;

/// The service of one daemon.
#[derive(Debug, Clone)]
pub struct HostService {
    daemon: &'static str,
    audit: Audit,
}

impl HostService {
    /// For the daemon of this name.
    pub fn new(daemon: &'static str, audit: Audit) -> Self {
        Self { daemon, audit }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<Response<T>, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Status::internal(format!("the request ended by itself: {error}")))?.map(Response::new)
}

fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

#[tonic::async_trait]
impl Host for HostService {
    async fn audit(&self, request: Request<AuditRequest>) -> Result<Response<AuditReply>, Status> {
        let lines = match request.into_inner().lines {
            0 => LINES,
            lines => lines.min(LINES_MAX),
        };
        let (directory, daemon) = (self.audit.directory().to_owned(), self.daemon);
        blocking(move || {
            let lines = vmdr_audit::last_lines(&directory, daemon, lines as usize).map_err(internal)?;
            Ok(AuditReply { daemon: daemon.to_owned(), lines })
        })
        .await
    }

    async fn verify_audit(&self, _: Request<AuditRequest>) -> Result<Response<AuditVerdict>, Status> {
        let (directory, daemon) = (self.audit.directory().to_owned(), self.daemon);
        blocking(move || {
            let verdict = vmdr_audit::verify(&directory, daemon).map_err(internal)?;
            Ok(AuditVerdict {
                daemon: verdict.daemon,
                records: verdict.records,
                first: verdict.first,
                last: verdict.last,
                hash: verdict.hash,
                fault: verdict.fault.map(|fault| fault.to_string()).unwrap_or_default(),
            })
        })
        .await
    }
}
