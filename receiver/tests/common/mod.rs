//! A receiver process of its own, and an agent's side of the wire.
#![allow(dead_code)]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint, Uri};
use vmdr_audit::Audit;
use vmdr_codec::{Digest, Disk, Encoder, Layout, RamBlock, chunk_hash};
use vmdr_proto::REPLICATION_VERSION;
use vmdr_proto::control::receiver_client::ReceiverClient;
use vmdr_proto::replication::replication_client::ReplicationClient;
use vmdr_proto::replication::{
    Chunk, Durable, EpochKind, FromReceiver, Heartbeat, Open, PartBegin, PartCounts, PartEnd, Position, Refused,
    ToReceiver, Welcome, from_receiver, to_receiver,
};

use vmdr_trust::Trust;

/// The host that is paired with every receiver.
pub const AGENT: &str = "site-a";
/// The limit of every wait.
pub const WAIT: Duration = Duration::from_secs(60);
pub const PAGE: usize = 4096;

/// A receiver with a state directory of its own.
pub struct Daemon {
    pub directory: TempDir,
    pub address: SocketAddr,
    pub metrics: SocketAddr,
    /// Further lines of its configuration.
    pub config: String,
    /// Further variables of its environment.
    pub environment: Vec<(&'static str, &'static str)>,
    child: Option<Child>,
}

/// An address that nobody uses now.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn rand_word() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vmdr-receiver"))
}

impl Daemon {
    pub async fn start() -> Self {
        Self::start_with("", &[]).await
    }

    /// The same with these further lines in its configuration and variables in its environment.
    pub async fn start_with(config: &str, environment: &[(&'static str, &'static str)]) -> Self {
        let (directory, config) = (tempfile::tempdir().unwrap(), config.to_owned());
        let (address, metrics, environment) = (free_address(), free_address(), environment.to_vec());
        let mut daemon = Daemon { directory, address, metrics, config, environment, child: None };
        daemon.introduce(AGENT);
        daemon.start_again().await;
        daemon
    }

    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("receiver.toml")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("receiver.sock")
    }

    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    pub fn ownerships(&self) -> PathBuf {
        self.directory.path().join("domains")
    }

    fn write_config(&self) {
        // One that is not there, unless the test has another.
        let none = "libvirt_uri = \"qemu+unix:///system?socket=/nonexistent/vmdr-test\"\n";
        let libvirt = if self.config.contains("libvirt_uri") { "" } else { none };
        let config = format!(
            "listen = \"{}\"\nmetrics_listen = \"{}\"\nstate_dir = {:?}\naudit_dir = {:?}\nidentity_dir = {:?}\nownership_dir = {:?}\ncontrol_socket = {:?}\nspace_reserve_bytes = 0\n{libvirt}{}",
            self.address,
            self.metrics,
            self.state(),
            self.directory.path().join("audit"),
            self.directory.path().join("identity"),
            self.ownerships(),
            self.socket(),
            self.config
        );
        std::fs::write(self.config_file(), config).unwrap();
    }

    /// Starts it, and waits until it answers.
    pub async fn start_again(&mut self) {
        self.write_config();
        let log = std::fs::File::options().create(true).append(true).open(self.directory.path().join("log")).unwrap();
        let child = program()
            .arg("--config")
            .arg(self.config_file())
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + WAIT;
        loop {
            if tokio::net::UnixStream::connect(self.socket()).await.is_ok() {
                return;
            }
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}, log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A second receiver with the same configuration.
    pub fn start_beside(&self) -> Output {
        program().arg("--config").arg(self.config_file()).output().unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.as_ref().unwrap().id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM; gives the exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let deadline = Instant::now() + WAIT;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        panic!("it does not end; log:\n{}", self.log());
    }

    /// Pairs the receiver with another host of this name, which is a directory.
    pub fn introduce(&self, name: &str) {
        let (own, other) = (self.directory.path().join("identity"), self.directory.path().join(name));
        vmdr_trust::introduce((&own, "site-b", &[]), (&other, name, &[])).unwrap();
    }

    pub fn trust(&self, name: &str) -> Trust {
        let directory = self.directory.path().join(name);
        let audit = Audit::open(&directory.join(format!("audit-{}", rand_word())), "agent").unwrap();
        Trust::open(&directory, audit).unwrap()
    }

    pub async fn agent(&self) -> ReplicationClient<Channel> {
        self.agent_of(AGENT).await
    }

    /// A connection of the host of this name.
    pub async fn agent_of(&self, name: &str) -> ReplicationClient<Channel> {
        let (trust, address) = (self.trust(name), self.address.to_string());
        let connector = tower::service_fn(move |_: Uri| {
            let (trust, address) = (trust.clone(), address.clone());
            async move {
                let stream = tokio::net::TcpStream::connect(&address).await?;
                trust.connect(stream, &address).await.map(TokioIo::new)
            }
        });
        let endpoint = Endpoint::from_static("http://receiver");
        ReplicationClient::new(endpoint.connect_with_connector(connector).await.unwrap())
    }

    pub async fn control(&self) -> ReceiverClient<Channel> {
        let socket = self.socket();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://receiver");
        ReceiverClient::new(endpoint.connect_with_connector(connector).await.unwrap())
    }

    pub fn images(&self, uuid: &str) -> PathBuf {
        let domain = self.state().join(uuid);
        let mut standbys: Vec<_> = std::fs::read_dir(&domain)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("standby."))
            .collect();
        assert_eq!(standbys.len(), 1, "{standbys:?}");
        standbys.remove(0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An agent's stream.
pub struct Stream {
    to: mpsc::Sender<ToReceiver>,
    from: Streaming<FromReceiver>,
}

pub enum Answer {
    Welcome(Welcome),
    Durable(Durable),
    Refused(Refused),
    Heartbeat(Heartbeat),
    Taken(u64),
    Armed(u64),
    Disarmed(u64),
    /// The stream ended, with the status if it was not in order.
    End(Option<tonic::Status>),
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Answer::Welcome(m) => m.fmt(f),
            Answer::Durable(m) => m.fmt(f),
            Answer::Refused(m) => m.fmt(f),
            Answer::Heartbeat(m) => m.fmt(f),
            Answer::Taken(generation) => write!(f, "taken (generation {generation})"),
            Answer::Armed(number) => write!(f, "armed ({number})"),
            Answer::Disarmed(number) => write!(f, "disarmed ({number})"),
            Answer::End(status) => write!(f, "the end ({status:?})"),
        }
    }
}

impl Stream {
    /// Opens a stream without a first message.
    pub async fn bare(agent: &mut ReplicationClient<Channel>) -> Self {
        let (to, messages) = mpsc::channel(64);
        let from = agent.replicate(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Stream { to, from }
    }

    pub async fn open(agent: &mut ReplicationClient<Channel>, uuid: &str, generation: u64) -> (Self, Answer) {
        let mut stream = Self::bare(agent).await;
        stream.send(to_receiver::Message::Open(open(uuid, generation))).await;
        let answer = stream.answer().await;
        (stream, answer)
    }

    /// Opens a stream that must be welcome.
    pub async fn welcome(agent: &mut ReplicationClient<Channel>, uuid: &str, generation: u64) -> (Self, Position) {
        match Self::open(agent, uuid, generation).await {
            (stream, Answer::Welcome(welcome)) => (stream, welcome.position.unwrap()),
            (_, other) => panic!("{other:?}"),
        }
    }

    /// A stream that has ended takes nothing any more; what it said is in the answers.
    pub async fn send(&mut self, message: to_receiver::Message) {
        let _ = self.to.send(ToReceiver { message: Some(message) }).await;
    }

    pub async fn answer(&mut self) -> Answer {
        let message = tokio::time::timeout(WAIT, self.from.message()).await.expect("an answer in time");
        match message {
            Ok(Some(FromReceiver { message: Some(message) })) => match message {
                from_receiver::Message::Welcome(m) => Answer::Welcome(m),
                from_receiver::Message::Durable(m) => Answer::Durable(m),
                from_receiver::Message::Refused(m) => Answer::Refused(m),
                from_receiver::Message::Heartbeat(m) => Answer::Heartbeat(m),
                from_receiver::Message::Taken(m) => Answer::Taken(m.generation),
                from_receiver::Message::Compare(m) => panic!("nothing is damaged: {m:?}"),
                from_receiver::Message::Armed(m) => Answer::Armed(m.number),
                from_receiver::Message::Disarmed(m) => Answer::Disarmed(m.number),
            },
            Ok(Some(FromReceiver { message: None })) => panic!("an empty answer"),
            Ok(None) => Answer::End(None),
            Err(status) => Answer::End(Some(status)),
        }
    }

    pub async fn refused(&mut self) -> Refused {
        match self.answer().await {
            Answer::Refused(refused) => refused,
            other => panic!("{other:?}"),
        }
    }

    pub async fn durable(&mut self) -> Durable {
        match self.answer().await {
            Answer::Durable(durable) => durable,
            other => panic!("{other:?}"),
        }
    }

    pub async fn send_part(&mut self, part: Part) {
        for message in part.messages {
            self.send(message).await;
        }
    }
}

pub fn open(uuid: &str, generation: u64) -> Open {
    Open {
        protocol_version: REPLICATION_VERSION,
        domain_uuid: uuid.to_owned(),
        domain_name: "web".to_owned(),
        generation,
        host_name: "site-a".to_owned(),
    }
}

/// The messages of one part.
pub struct Part {
    pub messages: Vec<to_receiver::Message>,
}

pub struct PartId {
    pub generation: u64,
    pub epoch: u64,
    pub part: u32,
    pub kind: EpochKind,
    pub last: bool,
}

pub const CUT_UNIX_NS: u64 = 1_800_000_000_000_000_000;

impl Part {
    pub fn make(id: &PartId, content: impl FnOnce(&mut Encoder)) -> Self {
        let mut encoder = Encoder::new();
        content(&mut encoder);
        let counts = encoder.finish();
        let mut digest = Digest::new();
        let (mut chunks, mut payload_bytes) = (0, 0);
        let mut messages = vec![to_receiver::Message::Begin(PartBegin {
            generation: id.generation,
            epoch: id.epoch,
            part: id.part,
            kind: id.kind.into(),
        })];
        while let Some(payload) = encoder.take_full() {
            digest.update(&payload);
            payload_bytes += payload.len() as u64;
            let xxh3 = chunk_hash(&payload);
            messages.push(to_receiver::Message::Chunk(Chunk { sequence: chunks, payload, xxh3 }));
            chunks += 1;
        }
        let (digest_low, digest_high) = digest.halves();
        messages.push(to_receiver::Message::End(PartEnd {
            chunks,
            payload_bytes,
            digest_low,
            digest_high,
            last: id.last,
            cut_unix_ns: if id.last { CUT_UNIX_NS } else { 0 },
            application: false,
            counts: Some(PartCounts {
                ram_pages: counts.ram_pages,
                zero_pages: counts.zero_pages,
                disk_bytes: counts.disk_bytes,
                disk_zero_bytes: counts.disk_zero_bytes,
            }),
        }));
        Part { messages }
    }

    /// Changes one bit of the first chunk's payload.
    pub fn damage(mut self) -> Self {
        for message in &mut self.messages {
            if let to_receiver::Message::Chunk(chunk) = message {
                let middle = chunk.payload.len() / 2;
                chunk.payload[middle] ^= 4;
            }
        }
        self
    }
}

pub const RAM_PAGES: u64 = 64;
pub const DISK_BYTES: u64 = 1 << 20;

pub fn layout() -> Layout {
    let block = |name: &str, pages: u64| RamBlock {
        name: name.to_owned(),
        used_bytes: pages * PAGE as u64,
        page_bytes: PAGE as u32,
    };
    Layout {
        machine: "pc-q35-10.0".to_owned(),
        ram: vec![block("pc.ram", RAM_PAGES), block("pc.bios", 1)],
        disks: vec![Disk { target: "vda".to_owned(), size_bytes: DISK_BYTES }],
    }
}

pub fn xml(uuid: &str) -> String {
    format!(
        "<domain type='qemu'><name>web</name><uuid>{uuid}</uuid><memory unit='KiB'>{}</memory>\
         <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os></domain>",
        RAM_PAGES * 4
    )
}

/// A device state as QEMU's begins and ends.
pub const DEVICE_STATE: &[u8] = b"QEVM\0\0\0\x03\x04device\0";

/// A seed in two parts: every page of RAM is `fill`, the disk begins with it.
pub fn seed(uuid: &str, generation: u64, epoch: u64, fill: u8) -> [Part; 2] {
    let id = |part, last| PartId { generation, epoch, part, kind: EpochKind::Seed, last };
    let first = Part::make(&id(0, false), |encoder| {
        encoder.layout(&layout()).unwrap();
        encoder.domain_xml(&xml(uuid)).unwrap();
        for page in 0..RAM_PAGES {
            encoder.ram_page(0, page, &[fill; PAGE]);
        }
    });
    let second = Part::make(&id(1, true), |encoder| {
        encoder.ram_page(1, 0, &[fill; PAGE]);
        encoder.disk_data(0, 0, &[fill; PAGE]);
        encoder.device_state(DEVICE_STATE).unwrap();
    });
    [first, second]
}

/// An ordinary epoch: page `epoch` of RAM and the same block of the disk are `fill`.
pub fn delta(generation: u64, epoch: u64, fill: u8) -> Part {
    let id = PartId { generation, epoch, part: 0, kind: EpochKind::Delta, last: true };
    Part::make(&id, |encoder| {
        encoder.ram_page(0, epoch, &[fill; PAGE]);
        encoder.disk_data(0, epoch * PAGE as u64, &[fill; PAGE]);
        encoder.device_state(DEVICE_STATE).unwrap();
    })
}

/// One page of a file.
pub fn page_of(file: &Path, page: u64) -> Vec<u8> {
    let bytes = std::fs::read(file).unwrap();
    bytes[page as usize * PAGE..][..PAGE].to_vec()
}
