//! What stands before every request on a control socket: may this caller ask that, and the record of it.
//!
//! A reader may call the methods that are listed as such; everything else, also what is added later, is the operator's alone.
//! Each of those but reading the log itself is recorded twice: before it is done, durably, and with how it ended. The
//! subject of a record is the domain of the request, which every request message has as field 1. What the operator decided
//! beyond that ([`decided`]) is in its detail.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Full, Limited};
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Status};
use vmdr_audit::{Audit, Entry, Outcome};
use vmdr_proto::control::{
    ActivateRequest, DivergenceRequest, DomainRequest, ExportRequest, GroupRequest, ImportRequest, OwnRequest,
};

use crate::caller::{Caller, Role};
use crate::socket::refuse;

/// The longest request. Real ones have some hundred bytes.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Bytes before a message: whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;

/// The layer.
#[derive(Debug, Clone)]
pub struct Guard {
    audit: Audit,
    readable: Arc<[&'static str]>,
}

/// Methods of an operator that are not recorded, because they read the record, or only look, at a text that is long.
const QUIET: [&str; 3] = ["Audit", "VerifyAudit", "CheckPlan"];

impl Guard {
    /// `readable`: names of methods that change nothing and show nothing secret.
    pub fn new(audit: Audit, readable: &[&'static str]) -> Self {
        Self { audit, readable: readable.into() }
    }
}

impl<S> tower::Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: self.clone() }
    }
}

/// A service behind the guard.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    inner: S,
    guard: Guard,
}

type Response = http::Response<Body>;
type Answering<E> = Pin<Box<dyn Future<Output = Result<Response, E>> + Send>>;

impl<S> tower::Service<http::Request<Body>> for Guarded<S>
where
    S: tower::Service<http::Request<Body>, Response = Response> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Answering<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // The one that is ready, not its clone.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let guard = self.guard.clone();
        Box::pin(async move { guard.pass(inner, request).await })
    }
}

impl Guard {
    async fn pass<S>(self, mut inner: S, request: http::Request<Body>) -> Result<Response, S::Error>
    where
        S: tower::Service<http::Request<Body>, Response = Response>,
    {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let caller = request.extensions().get::<Caller>().copied();
        let readable = self.readable.contains(&method.as_str());
        let allowed = match caller.map(|caller| caller.role) {
            Some(Role::Operator) => true,
            Some(Role::Reader) => readable,
            Some(Role::Nobody) | None => false,
        };
        let (Some(caller), true) = (caller, allowed) else {
            return Ok(self.turn_away(caller, &method).into_http());
        };
        if readable || QUIET.contains(&method.as_str()) {
            return inner.call(request).await;
        }
        let (head, body) = request.into_parts();
        let bytes = match Limited::new(body, REQUEST_BYTES_MAX).collect().await {
            Ok(bytes) => bytes.to_bytes(),
            Err(error) => return Ok(Status::invalid_argument(format!("the request: {error}")).into_http()),
        };
        let message = bytes.get(HEAD_BYTES..).unwrap_or_default();
        let entry = Entry::new(&method, &caller.to_string(), &subject(message), Outcome::Begun);
        let entry = entry.because(decided(&method, message));
        let (audit, begun) = (self.audit.clone(), entry.clone());
        // From here on it has an end, also when a caller goes away in between.
        let mut report = Report { audit: self.audit, entry: Some(entry) };
        // One that cannot be written has said so itself.
        let _ = tokio::task::spawn_blocking(move || audit.record(begun)).await;
        let body = Body::new(Full::new(bytes).map_err(|never: Infallible| match never {}));
        let answer = inner.call(http::Request::from_parts(head, body)).await?;
        report.look(answer.headers());
        let (head, body) = answer.into_parts();
        if report.entry.is_none() {
            return Ok(http::Response::from_parts(head, body));
        }
        Ok(http::Response::from_parts(head, Body::new(Watched { body, report })))
    }

    fn turn_away(&self, caller: Option<Caller>, method: &str) -> Status {
        let who = caller.map_or_else(|| "somebody unknown".to_owned(), |caller| caller.user());
        let message = match caller.map(|caller| caller.role) {
            Some(Role::Reader) => format!("{who} may look, and `{method}` changes something: it is for operators"),
            _ => format!("{who} is neither root nor in a group that may talk to this daemon"),
        };
        refuse(&self.audit, Entry::new(method, &who, "control socket", Outcome::Refused).because(message.as_str()));
        Status::permission_denied(message)
    }
}

/// Field 1 of a request, which names the domain.
fn subject(message: &[u8]) -> String {
    DomainRequest::decode(message).map(|request| request.domain).unwrap_or_default()
}

/// What of a request has to be known afterwards: that it was by force and why, that something is deleted, which point.
fn decided(method: &str, message: &[u8]) -> String {
    match method {
        "Own" => match OwnRequest::decode(message) {
            Ok(OwnRequest { force: true, reason, .. }) => format!("by force: {reason}"),
            _ => String::new(),
        },
        "Divergence" => match DivergenceRequest::decode(message) {
            Ok(DivergenceRequest { drop: true, .. }) => "drop".to_owned(),
            _ => String::new(),
        },
        "Export" => match ExportRequest::decode(message) {
            Ok(ExportRequest { prune: true, .. }) => "prune".to_owned(),
            _ => String::new(),
        },
        // Its subject is where it comes from.
        "Import" => match ImportRequest::decode(message) {
            Ok(ImportRequest { domain, point, .. }) => format!("domain {domain} {point}").trim_end().to_owned(),
            Err(_) => String::new(),
        },
        "Activate" => match ActivateRequest::decode(message) {
            Ok(ActivateRequest { point, damaged, .. }) => {
                let point = if point.is_empty() { String::new() } else { format!("point {point}") };
                if damaged { format!("{point}, although it is damaged") } else { point }
            }
            Err(_) => String::new(),
        },
        "ActivateGroup" => match GroupRequest::decode(message) {
            Ok(GroupRequest { at_unix_ns, points, damaged, .. }) => {
                let at = (at_unix_ns > 0).then(|| format!("at {at_unix_ns}"));
                let points = points.into_iter().map(|of| format!("{} at point {}", of.domain, of.point));
                let damaged = damaged.then(|| "although damaged".to_owned());
                at.into_iter().chain(points).chain(damaged).collect::<Vec<_>>().join(", ")
            }
            Err(_) => String::new(),
        },
        _ => String::new(),
    }
}

/// Records how a request ended: once, also when nobody waits for the answer any more.
struct Report {
    audit: Audit,
    entry: Option<Entry>,
}

impl Report {
    /// The status is in the headers of an answer without messages, else in its trailers.
    fn look(&mut self, headers: &http::HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.end(&status);
        }
    }

    fn end(&mut self, status: &Status) {
        let Some(entry) = self.entry.take() else { return };
        let entry = match status.code() {
            Code::Ok => entry.with(Outcome::Done),
            Code::PermissionDenied => entry.with(Outcome::Refused).because(status.message()),
            // What was begun may go on.
            Code::Cancelled => entry.with(Outcome::Noted).because(status.message()),
            _ => entry.with(Outcome::Failed).because(status.message()),
        };
        let audit = self.audit.clone();
        tokio::task::spawn_blocking(move || audit.record(entry));
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if tokio::runtime::Handle::try_current().is_ok() {
            self.end(&Status::cancelled("whoever asked has gone before it ended"));
        }
    }
}

/// The body of an answer, watched for its end.
struct Watched {
    body: Body,
    report: Report,
}

impl http_body::Body for Watched {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        let polled = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        match &polled {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.report.look(trailers);
                }
            }
            Some(Err(status)) => {
                let status = status.clone();
                self.report.end(&status);
            }
            None => {}
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_subject_is_field_one_whatever_follows() {
        use vmdr_proto::control::ProtectRequest;
        let (domain, receiver) = ("web1".to_owned(), "b:1".to_owned());
        let protect = ProtectRequest { domain, receiver, interval_ms: 5, ..ProtectRequest::default() };
        assert_eq!(subject(&protect.encode_to_vec()), "web1");
        let activate = ActivateRequest { domain: "db".to_owned(), wait: true, ..ActivateRequest::default() };
        assert_eq!(subject(&activate.encode_to_vec()), "db");
        assert_eq!(subject(b"\xff\xff"), "");
        assert_eq!(subject(b""), "");
    }

    const WAIT: Duration = Duration::from_secs(10);

    fn request(role: Role, method: &str, message: &[u8]) -> http::Request<Body> {
        let framed = [&[0, 0, 0, 0, message.len() as u8][..], message].concat();
        let mut request = http::Request::new(Body::new(Full::new(bytes::Bytes::from(framed))));
        *request.uri_mut() = format!("/vmdr.control.v1.Receiver/{method}").parse().unwrap();
        request.extensions_mut().insert(Caller { uid: 77, pid: Some(5), role });
        request
    }

    /// Whether the log comes to have a record with all of these.
    async fn recorded(directory: &Path, words: &[&str]) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < WAIT {
            let lines = vmdr_audit::last_lines(directory, "receiver", 1000).unwrap();
            if lines.iter().any(|line| words.iter().all(|word| line.contains(word))) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    #[tokio::test]
    async fn a_role_gets_what_it_may_and_the_rest_is_recorded() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let guard = Guard::new(Audit::open(directory, "receiver").unwrap(), &["Status"]);
        let ask = async |role: Role, method: &str, message: Vec<u8>, answer: Status| {
            let inner = tower::service_fn(move |_: http::Request<Body>| {
                let answer = answer.clone().into_http::<Body>();
                async move { Ok::<_, Infallible>(answer) }
            });
            let answer = guard.clone().pass(inner, request(role, method, &message)).await.unwrap();
            Status::from_header_map(answer.headers()).unwrap().code()
        };
        let (ok, web1) = (|| Status::new(Code::Ok, ""), DomainRequest { domain: "web1".to_owned() }.encode_to_vec());
        for (role, method, expected) in [
            (Role::Nobody, "Status", Code::PermissionDenied),
            (Role::Nobody, "Audit", Code::PermissionDenied),
            (Role::Reader, "Status", Code::Ok),
            (Role::Reader, "Forget", Code::PermissionDenied),
            (Role::Reader, "AddedLater", Code::PermissionDenied),
            (Role::Operator, "Status", Code::Ok),
            (Role::Operator, "Audit", Code::Ok),
            (Role::Operator, "Forget", Code::Ok),
        ] {
            assert_eq!(ask(role, method, web1.clone(), ok()).await, expected, "{role:?} {method}");
        }
        assert_eq!(ask(Role::Operator, "Hold", web1.clone(), Status::not_found("no such")).await, Code::NotFound);
        let own = OwnRequest { domain: "web1".to_owned(), force: true, reason: "A burnt down".to_owned() };
        assert_eq!(ask(Role::Operator, "Own", own.encode_to_vec(), ok()).await, Code::Ok);
        for words in [
            &["Status", "refused", "uid 77"][..],
            &["Forget", "refused", "may look"],
            &["AddedLater", "refused"],
            &["Forget", "begun", "web1", "uid 77 (pid 5)"],
            &["Forget", "done", "web1"],
            &["Hold", "begun", "web1"],
            &["Hold", "failed", "no such"],
            &["Own", "begun", "by force: A burnt down"],
            &["Own", "done", "by force: A burnt down"],
        ] {
            assert!(recorded(directory, words).await, "{words:?}");
        }
        // Looking is no act.
        let lines = vmdr_audit::last_lines(directory, "receiver", 1000).unwrap();
        assert!(!lines.iter().any(|line| line.contains("\"Status\"") && !line.contains("refused")), "{lines:?}");
        assert_eq!(vmdr_audit::verify(directory, "receiver").unwrap().fault, None);
    }

    #[tokio::test]
    async fn the_end_of_a_long_answer_is_recorded_and_a_caller_who_goes_away_too() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let guard = Guard::new(Audit::open(directory, "receiver").unwrap(), &[]);
        let inner = || {
            tower::service_fn(|_: http::Request<Body>| async {
                let trailers = Status::unavailable("libvirt is away").into_http::<Body>().headers().clone();
                let body = Full::new(bytes::Bytes::from_static(b"progress"));
                Ok::<_, Infallible>(http::Response::new(Body::new(body.with_trailers(async { Some(Ok(trailers)) }))))
            })
        };
        let message = DomainRequest { domain: "web1".to_owned() }.encode_to_vec();
        let answer = guard.clone().pass(inner(), request(Role::Operator, "Activate", &message)).await.unwrap();
        let collected = answer.into_body().collect().await.unwrap();
        assert!(collected.trailers().is_some());
        assert!(recorded(directory, &["Activate", "failed", "libvirt is away"]).await);
        let answer = guard.clone().pass(inner(), request(Role::Operator, "Verify", &message)).await.unwrap();
        drop(answer);
        assert!(recorded(directory, &["Verify", "noted", "has gone"]).await);
        let never = tower::service_fn(|_: http::Request<Body>| std::future::pending::<Result<Response, Infallible>>());
        let asked = guard.clone().pass(never, request(Role::Operator, "Forget", &message));
        assert!(tokio::time::timeout(Duration::from_millis(50), asked).await.is_err());
        assert!(recorded(directory, &["Forget", "begun"]).await);
        assert!(recorded(directory, &["Forget", "noted", "has gone"]).await);
    }

    #[test]
    fn what_was_decided_is_kept() {
        let domain = || "web1".to_owned();
        let own =
            |force| OwnRequest { domain: domain(), force, reason: "site A burnt down".to_owned() }.encode_to_vec();
        assert_eq!(decided("Own", &own(true)), "by force: site A burnt down");
        assert_eq!(decided("Own", &own(false)), "");
        let divergence = |drop| DivergenceRequest { domain: domain(), drop }.encode_to_vec();
        assert_eq!(
            (decided("Divergence", &divergence(true)).as_str(), decided("Divergence", &divergence(false))),
            ("drop", String::new())
        );
        let activate =
            ActivateRequest { domain: domain(), point: "3-17".to_owned(), damaged: true, ..Default::default() };
        assert_eq!(decided("Activate", &activate.encode_to_vec()), "point 3-17, although it is damaged");
        assert_eq!(decided("Own", b"\xff"), "");
    }
}
