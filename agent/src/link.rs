//! The stream to the receiver: connects, reconnects, and tells the session.
//!
//! A session gets a fresh sender with each connection, so that nothing of an older connection can slip into a newer
//! one. The queue behind it is bounded ([`MESSAGES_MAX`]); a full one makes the session wait, not the guest.

mod socket;

use std::sync::mpsc::Sender as EventSender;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendTimeoutError, TrySendError};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use vmdr_proto::replication::replication_client::ReplicationClient;
use vmdr_proto::replication::{
    DescribeReply, DescribeRequest, Disarm, Durable, FromReceiver, GiveBackReply, GiveBackRequest, HashesReply,
    HashesRequest, Heartbeat, NamePointReply, NamePointRequest, Open, OwnerReply, OwnerRequest, Position, ProbeReply,
    ProbeRequest, Refused, RestReply, RestRequest, ReverseReply, ReverseRequest, SettleReply, SettleRequest,
    ToReceiver, from_receiver, to_receiver,
};
use vmdr_proto::{MESSAGE_BYTES_MAX, REPLICATION_VERSION};
use vmdr_trust::{Partner, PeerInfo, Trust};

use crate::failover::Failover;
use crate::limits::Guest;
use crate::limits::wire::Throttled;

/// Messages (of about 1 MiB at most) that wait for the network.
const MESSAGES_MAX: usize = 8;
/// How long a receiver may take for an answer: it reads disks for some, and a slow link takes its time for the largest (1 MiB).
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// HTTP/2 pings find a peer that vanished without a word.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// A ping waits behind what is on its way. On a link with 200 ms of delay and 1 % loss TCP carries some 100 KB/s, and queues
/// of 1 MB are common: a shorter limit would break such a connection again and again, and all of a part would be sent anew.
const PING_LIMIT: Duration = Duration::from_secs(15);
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(2);
const HEARTBEAT: Duration = Duration::from_secs(1);
/// The number of the only request to stand down that is made where failover is manual.
const DISARM: u64 = 1;
/// How often a session that waits for the link looks whether it is to end.
const SEND_LOOK: Duration = Duration::from_millis(100);

/// Who is protected, and where to.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port`.
    pub receiver: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The domain's name.
    pub domain_name: String,
    /// The generation this host runs the guest in; 0: not known yet.
    pub generation: u64,
    /// Who this host is, and who may answer.
    pub trust: Trust,
    /// How fast to send.
    pub limits: Arc<Guest>,
    /// If the receiver takes the guest by itself: who has to do with that.
    pub failover: Option<Failover>,
}

/// What a session hears of its link.
#[derive(Debug)]
pub enum LinkEvent {
    /// Connected and welcome.
    Up {
        /// What the receiver has.
        position: Position,
        /// Whether it has stood down, if it can take guests by itself.
        disarmed: Option<bool>,
        /// For this connection's messages. Closed when it ends.
        sender: mpsc::Sender<ToReceiver>,
    },
    /// A part is durable.
    Durable(Durable),
    /// The guest was taken over, in this generation.
    Taken(u64),
    /// A receiver that nobody has armed from here says now that it has stood down.
    Disarmed,
    /// What the receiver has turned out to be damaged: all is to be compared.
    Compare,
    /// The receiver refused something and ended the stream.
    Refused(Refused),
    /// The connection ended or could not be made; it is tried again.
    Down(String),
}

/// The connection is over, or whoever sends is to end.
#[derive(Debug)]
pub struct Closed;

/// Queues a message, waiting for the network as long as `ending` does not say that the session ends. Blocks.
pub fn send(
    runtime: &tokio::runtime::Handle,
    sender: &mpsc::Sender<ToReceiver>,
    message: ToReceiver,
    ending: impl Fn() -> bool,
) -> Result<(), Closed> {
    let mut message = match sender.try_send(message) {
        Ok(()) => return Ok(()),
        Err(TrySendError::Full(message)) => message,
        Err(TrySendError::Closed(_)) => return Err(Closed),
    };
    while !ending() {
        message = match runtime.block_on(sender.send_timeout(message, SEND_LOOK)) {
            Ok(()) => return Ok(()),
            Err(SendTimeoutError::Timeout(message)) => message,
            Err(SendTimeoutError::Closed(_)) => return Err(Closed),
        };
    }
    Err(Closed)
}

/// Keeps a connection until the session is gone. Events go out through `events`, wrapped by `wrap`.
pub async fn run<T: Send + 'static>(target: Target, events: EventSender<T>, wrap: fn(LinkEvent) -> T) {
    let mut retry = RETRY_MIN;
    loop {
        let down = match connect(&target, &events, wrap).await {
            Ok(()) => {
                retry = RETRY_MIN;
                "the receiver closed the connection".to_owned()
            }
            Err(error) => error,
        };
        if events.send(wrap(LinkEvent::Down(down))).is_err() {
            return;
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
}

/// A connection for questions beside the stream.
#[derive(Clone, Debug)]
pub struct Questions {
    receiver: String,
    client: ReplicationClient<tonic::transport::Channel>,
}

impl Questions {
    /// Connects.
    pub async fn connect(trust: &Trust, receiver: &str) -> Result<Self, String> {
        Ok(Self { receiver: receiver.to_owned(), client: client(trust, receiver, &Guest::unlimited()).await?.0 })
    }

    /// What the receiver has of a domain.
    pub async fn describe(&mut self, request: DescribeRequest) -> Result<DescribeReply, String> {
        answer(&self.receiver, self.client.describe(request)).await
    }

    /// Hashes of what the receiver has.
    pub async fn hashes(&mut self, request: HashesRequest) -> Result<HashesReply, String> {
        answer(&self.receiver, self.client.hashes(request)).await
    }

    /// How a domain stands there.
    pub async fn owner(&mut self, request: OwnerRequest) -> Result<OwnerReply, String> {
        answer(&self.receiver, self.client.owner(request)).await
    }

    /// Whether a hand-over was taken; if not, it will not be.
    pub async fn settle(&mut self, request: SettleRequest) -> Result<SettleReply, String> {
        answer(&self.receiver, self.client.settle(request)).await
    }

    /// Has the receiver make ready for a domain that ran there.
    pub async fn reverse(&mut self, request: ReverseRequest) -> Result<ReverseReply, String> {
        answer(&self.receiver, self.client.reverse(request)).await
    }

    /// Tells the receiver that this host does not send for the time being, on purpose.
    pub async fn rest(&mut self, request: RestRequest) -> Result<RestReply, String> {
        answer(&self.receiver, self.client.rest(request)).await
    }

    /// Has the receiver give a domain back.
    pub async fn give_back(&mut self, request: GiveBackRequest) -> Result<GiveBackReply, String> {
        answer(&self.receiver, self.client.give_back(request)).await
    }

    /// Has the receiver keep a point under a name.
    pub async fn name_point(&mut self, request: NamePointRequest) -> Result<NamePointReply, String> {
        answer(&self.receiver, self.client.name_point(request)).await
    }

    /// What the receiver could store and run.
    pub async fn probe(&mut self, request: ProbeRequest) -> Result<ProbeReply, String> {
        answer(&self.receiver, self.client.probe(request)).await
    }
}

async fn answer<T>(
    receiver: &str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match tokio::time::timeout(ANSWER_LIMIT, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(format!("receiver {receiver}: {}", status.message())),
        Err(_) => Err(format!("receiver {receiver} did not answer within {ANSWER_LIMIT:?}")),
    }
}

type Client = ReplicationClient<tonic::transport::Channel>;

/// Connects; says also which peer answers.
async fn client(trust: &Trust, receiver: &str, limits: &Arc<Guest>) -> Result<(Client, PeerInfo), String> {
    // What goes over the connection is TLS all the same: the connector sees to it.
    let endpoint = Endpoint::from_shared(format!("http://{receiver}"))
        .map_err(|_| format!("receiver address {receiver:?} is not HOST:PORT"))?
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .keep_alive_while_idle(true);
    let (address, limits, trust) = (receiver.to_owned(), Arc::clone(limits), trust.clone());
    let answering = Arc::new(OnceLock::new());
    let found = Arc::clone(&answering);
    let connector = tower::service_fn(move |_| {
        let (address, limits, trust) = (address.clone(), Arc::clone(&limits), trust.clone());
        let found = Arc::clone(&found);
        async move {
            let stream = Throttled::new(socket::connect(&address).await?, limits);
            let stream = trust.connect(stream, &address).await?;
            // A channel that connects again comes to the same one: an address is one peer's.
            found.get_or_init(|| stream.peer().clone());
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| format!("connect to receiver {receiver}: {}", root_cause(&error)))?;
    let client = ReplicationClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let peer = answering.get().cloned().ok_or_else(|| format!("receiver {receiver}: nobody has answered"))?;
    Ok((client, peer))
}

async fn connect<T: Send + 'static>(
    target: &Target,
    events: &EventSender<T>,
    wrap: fn(LinkEvent) -> T,
) -> Result<(), String> {
    let (mut client, peer) = client(&target.trust, &target.receiver, &target.limits).await?;
    note_partner(target, peer).await?;
    let (sender, outgoing) = mpsc::channel(MESSAGES_MAX);
    // What arms and disarms does not wait behind what is copied.
    let (beside, first) = mpsc::channel(MESSAGES_MAX);
    let mut beside = Some(beside);
    let open_stream = target.failover.as_ref().map(|failover| Stream { failover, number: failover.opening() });
    let stream = open_stream.as_ref().map_or(0, |stream| stream.number);
    let open = Open {
        protocol_version: REPLICATION_VERSION,
        domain_uuid: target.domain_uuid.clone(),
        domain_name: target.domain_name.clone(),
        generation: target.generation,
        host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    let sent = sender.send(ToReceiver { message: Some(to_receiver::Message::Open(open)) }).await;
    sent.map_err(|_| "the stream ended before it began".to_owned())?;
    let outgoing = ReceiverStream::new(outgoing).merge(ReceiverStream::new(first));
    let replies = client.replicate(outgoing).await;
    let mut replies =
        replies.map_err(|status| format!("receiver {}: {}", target.receiver, status.message()))?.into_inner();
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let mut welcome = false;
    // The session's copy is the one that keeps the stream open once it has it.
    let mut own = Some(sender);
    let mut beats: Option<mpsc::WeakSender<ToReceiver>> = None;
    loop {
        let message = tokio::select! {
            message = replies.message() => message,
            _ = heartbeat.tick() => {
                if let Some(sender) = beats.as_ref().and_then(mpsc::WeakSender::upgrade) {
                    // A full queue is sign of life enough.
                    let _ = sender.try_send(ToReceiver { message: Some(to_receiver::Message::Heartbeat(now())) });
                } else if welcome {
                    return Err("the session has let go of the connection".to_owned());
                }
                continue;
            }
        };
        let message = match message {
            Ok(Some(FromReceiver { message: Some(message) })) => message,
            Ok(Some(_)) => continue,
            Ok(None) => return Ok(()),
            Err(status) => return Err(format!("receiver {}: {}", target.receiver, status.message())),
        };
        let event = match message {
            from_receiver::Message::Welcome(message) if !welcome => {
                welcome = true;
                let Some(sender) = own.take() else { continue };
                beats = Some(sender.downgrade());
                let disarmed = message.failover.map(|failover| failover.disarmed);
                match (&target.failover, beside.take()) {
                    (Some(failover), Some(beside)) => failover.opened(stream, disarmed, beside),
                    // Failover is manual, whatever was before: nobody is to take the guest.
                    (None, Some(beside)) if disarmed == Some(false) => {
                        let disarm = to_receiver::Message::Disarm(Disarm { number: DISARM });
                        let _ = beside.try_send(ToReceiver { message: Some(disarm) });
                    }
                    _ => {}
                }
                LinkEvent::Up { position: message.position.unwrap_or_default(), disarmed, sender }
            }
            from_receiver::Message::Welcome(_) | from_receiver::Message::Heartbeat(_) => continue,
            from_receiver::Message::Armed(armed) => {
                if let Some(failover) = &target.failover {
                    failover.armed(stream, armed.number);
                }
                continue;
            }
            from_receiver::Message::Disarmed(disarmed) => match &target.failover {
                Some(failover) => {
                    failover.disarmed(stream, disarmed.number);
                    continue;
                }
                None if disarmed.number == DISARM => LinkEvent::Disarmed,
                None => continue,
            },
            from_receiver::Message::Compare(_) => LinkEvent::Compare,
            from_receiver::Message::Durable(durable) => LinkEvent::Durable(durable),
            from_receiver::Message::Refused(refused) => LinkEvent::Refused(refused),
            from_receiver::Message::Taken(taken) => LinkEvent::Taken(taken.generation),
        };
        if events.send(wrap(event)).is_err() {
            return Ok(());
        }
    }
}

/// A stream that is being opened, or was; it has ended when this is dropped.
struct Stream<'a> {
    failover: &'a Failover,
    number: u64,
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        self.failover.closed(self.number);
    }
}

/// Before anything of the domain is sent: only the peer that it goes to can bring it home.
async fn note_partner(target: &Target, peer: PeerInfo) -> Result<(), String> {
    let (trust, uuid) = (target.trust.clone(), target.domain_uuid.clone());
    let partner = Partner { peer: peer.id, granted: false };
    let noted = tokio::task::spawn_blocking(move || trust.set_partner(&uuid, Some(&partner))).await;
    noted.map_err(|error| error.to_string())?.map_err(|error| format!("note to whom the domain goes: {error}"))
}

fn now() -> Heartbeat {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Heartbeat { sent_unix_ns: since.as_nanos() as u64 }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
