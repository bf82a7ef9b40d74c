//! Agents' streams into the store.
//!
//! ```text
//!  gRPC stream --> task: Open, Welcome --> queue (bounded) --> thread: begin, chunk, end --> store
//!       ^                                                          |
//!       +---- replies (bounded) <---- Durable, Heartbeat, Refused -+
//! ```
//! The store blocks at its disk, so each stream has a thread of its own; what arrives faster than the disk takes it stops at
//! HTTP/2's flow control. Acknowledgements leave in the order in which parts became durable, heartbeats in the order of the
//! stream: an answered heartbeat says that the disk is keeping up. After a refusal the stream ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_proto::REPLICATION_VERSION;
use vmdr_proto::replication::replication_server::Replication;
use vmdr_proto::replication::{
    Arm, Armed, Compare, DescribeReply, DescribeRequest, Disarm, Disarmed, FromReceiver, GiveBackReply,
    GiveBackRequest, HashesReply, HashesRequest, NamePointReply, NamePointRequest, Open, OwnerReply, OwnerRequest,
    ProbeReply, ProbeRequest, Refused, RefusedCode, RestReply, RestRequest, ReverseReply, ReverseRequest, SettleReply,
    SettleRequest, Taken, ToReceiver, Welcome, from_receiver, to_receiver,
};
use vmdr_trust::PeerInfo;

use crate::activate::run::{age_seconds, unix_ns};
use crate::daemon::Receiver;
use crate::failover::{self, Word};
use crate::hashes;
use crate::history;
use crate::probe;
use crate::reverse;
use crate::silence;
use crate::store::{Ingest, PartTail, StoreError, part_head, part_tail};
use crate::takeover;

/// From the beginning of a stream to its first message.
const OPEN_TIME_MAX: Duration = Duration::from_secs(10);
/// Messages between network and disk: some 8 MiB, at most 32.
const QUEUE_MESSAGES: usize = 8;
/// How often it is said that nothing is read, while the disk takes no more.
const BUSY_LOOK: Duration = Duration::from_millis(500);
/// Replies that the agent has not read yet; more and the stream waits for it.
const REPLIES_MAX: usize = 64;
/// The longest name of a domain or host taken over into messages and figures.
const NAME_CHARS_MAX: usize = 256;

/// Why a stream ends before its time.
#[derive(Debug)]
struct Refusal {
    code: RefusedCode,
    message: String,
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Refusal { code: error.code(), message: error.to_string() }
    }
}

fn corrupt(message: &str) -> Refusal {
    Refusal { code: RefusedCode::Corrupt, message: message.to_owned() }
}

type Replies = mpsc::Sender<Result<FromReceiver, Status>>;

/// The service.
pub struct ReplicationService {
    receiver: Arc<Receiver>,
}

impl ReplicationService {
    /// For this receiver.
    pub fn new(receiver: Arc<Receiver>) -> Self {
        ReplicationService { receiver }
    }

    /// Answers a question that may block, if the peer may ask it.
    async fn blocking<Q: Send + 'static, A: Send + 'static>(
        &self,
        request: Request<Q>,
        allowed: fn(&Receiver, &PeerInfo, &Q) -> Result<(), Status>,
        answer: fn(&Arc<Receiver>, &PeerInfo, &Q) -> Result<A, Status>,
    ) -> Result<Response<A>, Status> {
        let peer = peer_of(&request)?;
        let (receiver, request) = (Arc::clone(&self.receiver), request.into_inner());
        // What it begins goes on after it.
        let runtime = tokio::runtime::Handle::current();
        let reply = tokio::task::spawn_blocking(move || {
            let _entered = runtime.enter();
            allowed(&receiver, &peer, &request)?;
            answer(&receiver, &peer, &request)
        });
        reply.await.map_err(|e| Status::internal(e.to_string()))?.map(Response::new)
    }
}

#[tonic::async_trait]
impl Replication for ReplicationService {
    type ReplicateStream = ReceiverStream<Result<FromReceiver, Status>>;

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        let receiver = Arc::clone(&self.receiver);
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let reply = tokio::task::spawn_blocking(move || {
            receiver.authorise(&peer, "Probe", &request.domain_uuid)?;
            probe::probe(&receiver, &request)
        })
        .await;
        reply.map_err(|e| Status::internal(format!("the probe ended by itself: {e}")))?.map(Response::new)
    }

    async fn describe(&self, request: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        let peer = peer_of(&request)?;
        let (receiver, uuid) = (Arc::clone(&self.receiver), request.into_inner().domain_uuid);
        let reply = tokio::task::spawn_blocking(move || {
            receiver.authorise(&peer, "Describe", &uuid)?;
            hashes::describe(&receiver.store, &uuid)
        })
        .await;
        reply.map_err(|e| Status::internal(e.to_string()))?.map(Response::new)
    }

    async fn hashes(&self, request: Request<HashesRequest>) -> Result<Response<HashesReply>, Status> {
        let peer = peer_of(&request)?;
        let (receiver, request) = (Arc::clone(&self.receiver), request.into_inner());
        let reply = tokio::task::spawn_blocking(move || {
            receiver.authorise(&peer, "Hashes", &request.domain_uuid)?;
            hashes::hashes(&receiver.store, &request)
        })
        .await;
        reply.map_err(|e| Status::internal(e.to_string()))?.map(Response::new)
    }

    async fn owner(&self, request: Request<OwnerRequest>) -> Result<Response<OwnerReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &OwnerRequest| {
            receiver.authorise(peer, "Owner", &asked.domain_uuid)
        };
        self.blocking(request, allowed, |receiver, _, asked| takeover::owner(receiver, asked)).await
    }

    async fn settle(&self, request: Request<SettleRequest>) -> Result<Response<SettleReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &SettleRequest| {
            receiver.authorise(peer, "Settle", &asked.domain_uuid)
        };
        self.blocking(request, allowed, |receiver, _, asked| takeover::settle(receiver, asked)).await
    }

    async fn reverse(&self, request: Request<ReverseRequest>) -> Result<Response<ReverseReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &ReverseRequest| {
            receiver.authorise_reverse(peer, takeover::parse(&asked.domain_uuid)?)
        };
        self.blocking(request, allowed, reverse::reverse).await
    }

    async fn rest(&self, request: Request<RestRequest>) -> Result<Response<RestReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &RestRequest| {
            receiver.authorise_stored(peer, "Rest", &asked.domain_uuid)
        };
        self.blocking(request, allowed, |receiver, _, asked| silence::rest(receiver, asked)).await
    }

    async fn give_back(&self, request: Request<GiveBackRequest>) -> Result<Response<GiveBackReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &GiveBackRequest| {
            receiver.authorise_stored(peer, "GiveBack", &asked.domain_uuid)
        };
        self.blocking(request, allowed, |receiver, _, asked| takeover::give_back(receiver, asked)).await
    }

    async fn name_point(&self, request: Request<NamePointRequest>) -> Result<Response<NamePointReply>, Status> {
        let allowed = |receiver: &Receiver, peer: &PeerInfo, asked: &NamePointRequest| {
            receiver.authorise(peer, "NamePoint", &asked.domain_uuid)
        };
        self.blocking(request, allowed, |receiver, _, asked| history::name_point(&receiver.store, asked)).await
    }

    async fn replicate(
        &self,
        request: Request<Streaming<ToReceiver>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let peer = peer_of(&request)?;
        let (replies, stream) = mpsc::channel(REPLIES_MAX);
        tokio::spawn(serve(Arc::clone(&self.receiver), peer, request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Who asks; every connection has a peer.
fn peer_of<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    let peer = request.extensions().get::<PeerInfo>().cloned();
    peer.ok_or_else(|| Status::unauthenticated("the connection has no peer"))
}

fn reply(message: from_receiver::Message) -> Result<FromReceiver, Status> {
    Ok(FromReceiver { message: Some(message) })
}

async fn serve(receiver: Arc<Receiver>, from: PeerInfo, mut incoming: Streaming<ToReceiver>, replies: Replies) {
    // An IPv4 address that came in on an IPv6 socket is shown as what it is.
    let shown = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port()).to_string();
    let peer = from.address.map_or_else(|| "unknown".to_owned(), shown);
    let refuse = async |of: Option<(Uuid, Option<u64>)>, refusal: Refusal| {
        refuse(&receiver, &replies, of, &from, refusal).await;
    };
    let open = match tokio::time::timeout(OPEN_TIME_MAX, incoming.message()).await {
        Ok(Ok(Some(ToReceiver { message: Some(to_receiver::Message::Open(open)) }))) => open,
        Ok(Ok(_)) => {
            return refuse(None, corrupt("the stream does not begin with Open")).await;
        }
        Ok(Err(status)) => return tracing::debug!(%peer, %status, "a stream ended before it began"),
        Err(_) => return tracing::warn!(%peer, "a stream said nothing"),
    };
    let uuid = Uuid::parse_str(&open.domain_uuid).ok();
    let name: String = open.domain_name.chars().take(NAME_CHARS_MAX).collect();
    let host: String = open.host_name.chars().take(NAME_CHARS_MAX).collect();
    let (uuid, ingest) = match open_stream(&receiver, &from, open).await {
        Ok(opened) => opened,
        Err((refusal, known)) => return refuse(uuid.filter(|_| known).map(|u| (u, None)), refusal).await,
    };
    receiver.metrics.streams_opened.fetch_add(1, Ordering::Relaxed);
    let number = receiver.session(uuid, |session| {
        session.streams += 1;
        session.peer = if host.is_empty() { peer.clone() } else { format!("{host} ({peer})") };
        session.last_error.clear();
        session.streams
    });
    let (of, shown) = (Arc::clone(&receiver), receiver.session(uuid, |session| session.peer.clone()));
    let noted = tokio::task::spawn_blocking(move || silence::opened(&of, uuid, number, &shown)).await;
    if let Err(error) = noted {
        tracing::error!(%uuid, %error, "note that a stream was opened");
    }
    let (of, whose, generation) = (Arc::clone(&receiver), from.clone(), ingest.generation());
    let failover = tokio::task::spawn_blocking(move || failover::opened(&of, uuid, number, &whose, generation)).await;
    // One that ended by itself has promised nothing.
    let failover = failover.unwrap_or_default();
    let position = ingest.position();
    tracing::info!(domain = %name, %uuid, %peer, host, generation = position.generation, epoch = position.epoch, "stream opened");
    let welcome = Welcome { protocol_version: REPLICATION_VERSION, position: Some(position.into()), failover };
    if replies.send(reply(from_receiver::Message::Welcome(welcome))).await.is_err() {
        return;
    }

    let (queue, messages) = mpsc::channel(QUEUE_MESSAGES);
    let (of, whose) = (Arc::clone(&receiver), from.clone());
    let answers = replies.clone();
    let runtime = tokio::runtime::Handle::current();
    let thread = std::thread::Builder::new().name(format!("ingest {name}")).spawn(move || {
        let _entered = runtime.enter();
        let mut stream = Stream { receiver: &of, uuid, number, host: &whose, ingest, replies: &answers };
        stream.run(messages)
    });
    let thread = match thread {
        Ok(thread) => thread,
        Err(error) => {
            let message = format!("domain {uuid}: no thread for its stream: {error}");
            return refuse(Some((uuid, Some(number))), Refusal { code: RefusedCode::Io, message }).await;
        }
    };
    let why = pass_on(&receiver, (uuid, number), &mut incoming, queue).await;
    let result = tokio::task::spawn_blocking(move || thread.join()).await;
    match result {
        Ok(Ok(Ok(()))) => {
            ended(&receiver, uuid, number, why.as_deref().unwrap_or_default());
            tracing::info!(domain = %name, %uuid, %peer, why = why.as_deref().unwrap_or("the agent ended it"), "stream closed");
        }
        Ok(Ok(Err(refusal))) => refuse(Some((uuid, Some(number))), refusal).await,
        Ok(Err(_)) | Err(_) => {
            let message = format!("domain {uuid}: the receiver failed, see its log");
            refuse(Some((uuid, Some(number))), Refusal { code: RefusedCode::Io, message }).await;
        }
    }
}

/// Moves messages from the network to the thread, until one of them ends. Says why, unless the agent ended it.
async fn pass_on(
    receiver: &Receiver,
    (uuid, number): (Uuid, u64),
    incoming: &mut Streaming<ToReceiver>,
    queue: mpsc::Sender<ToReceiver>,
) -> Option<String> {
    let mut ending = receiver.ending();
    loop {
        let message = tokio::select! {
            _ = ending.wait_for(|e| *e) => return Some("this receiver ends".to_owned()),
            () = queue.closed() => return None,
            message = incoming.message() => message,
        };
        match message {
            Ok(Some(message)) => {
                receiver.silence.heard(uuid, number);
                receiver.failover.heard(uuid, number);
                let mut queued = std::pin::pin!(queue.send(message));
                loop {
                    match tokio::time::timeout(BUSY_LOOK, &mut queued).await {
                        Ok(Ok(())) => break,
                        Ok(Err(_)) => return None,
                        // A store that is busy for long, or whose disk hangs, is not the agent's silence.
                        Err(_) => {
                            receiver.silence.not_read(uuid, number);
                            receiver.failover.heard(uuid, number);
                        }
                    }
                }
            }
            Ok(None) => return None,
            Err(status) => return Some(format!("the connection was lost: {}", status.message())),
        }
    }
}

/// A refusal comes with whether the peer may know what is stored of the domain.
async fn open_stream(receiver: &Arc<Receiver>, from: &PeerInfo, open: Open) -> Result<(Uuid, Ingest), (Refusal, bool)> {
    if open.protocol_version != REPLICATION_VERSION {
        let message = format!(
            "protocol version {} is not spoken here, {REPLICATION_VERSION} is: upgrade the older side",
            open.protocol_version
        );
        return Err((Refusal { code: RefusedCode::Version, message }, false));
    }
    let (receiver, from) = (Arc::clone(receiver), from.clone());
    let opened = tokio::task::spawn_blocking(move || {
        let denied =
            |status: Status| (Refusal { code: RefusedCode::Domain, message: status.message().to_owned() }, false);
        let failed = |error: StoreError| (Refusal::from(error), true);
        // Before anything is touched: a stream cuts off the one before it.
        receiver.authorise(&from, "Replicate", &open.domain_uuid).map_err(denied)?;
        let ingest =
            receiver.store.open_stream(&open.domain_uuid, &open.domain_name, open.generation).map_err(failed)?;
        let uuid =
            Uuid::parse_str(&open.domain_uuid).map_err(|_| failed(StoreError::BadUuid(open.domain_uuid.clone())))?;
        receiver.claim(&from, &open.domain_uuid).map_err(denied)?;
        Ok((uuid, ingest))
    });
    opened.await.unwrap_or_else(|error| {
        let message = format!("opening the domain ended by itself: {error}");
        Err((Refusal { code: RefusedCode::Io, message }, false))
    })
}

/// A stream has ended. What is known of the domain's newest stream stays if that is another one.
fn ended(receiver: &Receiver, uuid: Uuid, number: u64, why: &str) {
    receiver.session(uuid, |session| {
        if session.streams == number {
            session.peer.clear();
            session.last_error = why.to_owned();
        }
    });
}

/// `of`: the domain, and the stream's number if it was opened.
async fn refuse(
    receiver: &Arc<Receiver>,
    replies: &Replies,
    of: Option<(Uuid, Option<u64>)>,
    from: &PeerInfo,
    refusal: Refusal,
) {
    let Refusal { code, message } = refusal;
    let peer = from.shown();
    record(receiver, &peer, of.map(|(uuid, _)| uuid), code, &message);
    tracing::warn!(%peer, code = code.as_str_name(), "stream refused: {message}");
    receiver.metrics.streams_refused.fetch_add(1, Ordering::Relaxed);
    let mut position = None;
    if let Some((uuid, number)) = of {
        let store = receiver.store.clone();
        let asked = tokio::task::spawn_blocking(move || store.position(&uuid.to_string()).ok()).await;
        // Only of domains that exist: a peer's inventions are not remembered.
        position = asked.ok().flatten().filter(|p| p.generation > 0);
        match number {
            Some(number) => ended(receiver, uuid, number, &message),
            None if position.is_some() => receiver.session(uuid, |session| session.last_error.clone_from(&message)),
            None => {}
        }
    }
    let refused = Refused { code: code.into(), message, position: position.map(Into::into) };
    // An agent that is gone need not be told.
    let _ = replies.send(reply(from_receiver::Message::Refused(refused))).await;
}

/// What was refused goes into the audit log, unless it was this host that could not.
fn record(receiver: &Receiver, peer: &str, domain: Option<Uuid>, code: RefusedCode, message: &str) {
    if matches!(code, RefusedCode::Full | RefusedCode::Io) {
        return;
    }
    let subject = domain.map(|uuid| uuid.to_string()).unwrap_or_default();
    let word = code.as_str_name().trim_start_matches("REFUSED_CODE_").to_lowercase();
    let entry = Entry::new("Replicate", peer, &subject, Outcome::Refused).because(format!("{word}: {message}"));
    let audit = receiver.audit.clone();
    tokio::task::spawn_blocking(move || audit.refused(entry));
}

/// One stream's work, on its own thread.
struct Stream<'a> {
    receiver: &'a Arc<Receiver>,
    uuid: Uuid,
    /// Of the domain's streams.
    number: u64,
    host: &'a PeerInfo,
    ingest: Ingest,
    replies: &'a Replies,
}

impl Stream<'_> {
    fn run(&mut self, mut messages: mpsc::Receiver<ToReceiver>) -> Result<(), Refusal> {
        while let Some(ToReceiver { message }) = messages.blocking_recv() {
            let answer = match message {
                Some(to_receiver::Message::Begin(begin)) => {
                    let head = part_head(&begin).ok_or_else(|| corrupt("a part of unknown kind"))?;
                    self.ingest.begin(head)?;
                    None
                }
                Some(to_receiver::Message::Chunk(chunk)) => {
                    let bytes = chunk.payload.len() as u64;
                    self.ingest.chunk(chunk.sequence, chunk.payload.into(), chunk.xxh3)?;
                    self.receiver.metrics.received_bytes.fetch_add(bytes, Ordering::Relaxed);
                    let now = self.receiver.seconds();
                    self.receiver.session(self.uuid, |session| session.stats.received(now, bytes));
                    None
                }
                Some(to_receiver::Message::End(end)) => Some(self.end(part_tail(&end))?),
                Some(to_receiver::Message::Heartbeat(heartbeat)) => Some(from_receiver::Message::Heartbeat(heartbeat)),
                Some(to_receiver::Message::HandOver(asked)) => {
                    let taken = takeover::take(self.receiver, self.uuid, &mut self.ingest, &asked);
                    let generation = taken.map_err(|(code, message)| Refusal { code, message })?;
                    Some(from_receiver::Message::Taken(Taken { generation }))
                }
                Some(to_receiver::Message::Open(_)) => return Err(corrupt("a second Open in a stream")),
                Some(to_receiver::Message::Arm(Arm { number })) => {
                    self.asked(Word::Arm)?.then_some(from_receiver::Message::Armed(Armed { number }))
                }
                Some(to_receiver::Message::Disarm(Disarm { number })) => {
                    self.asked(Word::Disarm)?.then_some(from_receiver::Message::Disarmed(Disarmed { number }))
                }
                None => return Err(corrupt("an empty message, or one of a later version")),
            };
            if self.ingest.wants_comparison() {
                tracing::warn!(domain = %self.uuid, "the agent is asked to compare everything with the standby, which is damaged");
                let compare = reply(from_receiver::Message::Compare(Compare {}));
                if self.replies.blocking_send(compare).is_err() {
                    return Ok(());
                }
            }
            if let Some(answer) = answer
                && self.replies.blocking_send(reply(answer)).is_err()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether that was done. On a stream of before an activation: who owns the guest.
    fn asked(&self, word: Word) -> Result<bool, Refusal> {
        if !self.receiver.config.witness.is_set() {
            return Err(corrupt("this receiver has no witness, and says so in its Welcome"));
        }
        self.ingest.is_newest()?;
        Ok(failover::asked(self.receiver, self.uuid, self.number, self.host, &self.ingest, word))
    }

    fn end(&mut self, tail: PartTail) -> Result<from_receiver::Message, Refusal> {
        let (pages, cut_unix_ns) = (tail.counts.ram_pages, tail.cut_unix_ns);
        let began = Instant::now();
        let durable = self.ingest.end(tail)?;
        let metrics = &self.receiver.metrics;
        metrics.commit.observe(began.elapsed());
        metrics.durable_parts.fetch_add(1, Ordering::Relaxed);
        metrics.durable_epochs.fetch_add(u64::from(durable.last), Ordering::Relaxed);
        let (now, now_unix_ns) = (self.receiver.seconds(), unix_ns(SystemTime::now()));
        self.receiver.session(self.uuid, |session| {
            session.stats.durable_pages(now, pages);
            if durable.last {
                let previous = (session.cut_unix_ns > 0).then(|| age_seconds(session.cut_unix_ns, now_unix_ns));
                session.stats.durable_epoch(now, previous);
                session.cut_unix_ns = cut_unix_ns;
            }
        });
        Ok(from_receiver::Message::Durable(durable.into()))
    }
}
