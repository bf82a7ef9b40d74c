//! Two hosts and their links: pairing, tokens, and every certificate that must be refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use vmdr_audit::Audit;
use vmdr_trust::{HANDSHAKES_MAX, Identity, PeerInfo, Token, Trust, WATCH, introduce, pair};

const DAY: Duration = Duration::from_secs(24 * 3600);
const WAIT: Duration = Duration::from_secs(30);

struct Host {
    directory: TempDir,
    trust: Trust,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let audit = Audit::open(&directory.path().join("audit"), "receiver").unwrap();
        let trust = Trust::open(&directory.path().join("identity"), audit).unwrap();
        Self { directory, trust }
    }

    fn identity(&self) -> std::path::PathBuf {
        self.directory.path().join("identity")
    }

    /// Whether the audit log has a record with all of these.
    async fn recorded(&self, words: &[&str]) -> bool {
        let directory = self.directory.path().join("audit");
        for _ in 0..200 {
            let lines = vmdr_audit::last_lines(&directory, "receiver", 1000).unwrap();
            if lines.iter().any(|line| words.iter().all(|word| line.contains(word))) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    /// Takes connections and sends back what comes, to peers; gives their names out.
    async fn serve(&self) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<PeerInfo>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut incoming = vmdr_trust::incoming(listener, self.trust.clone());
        let (names, seen) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(mut stream)) = incoming.next().await {
                let _ = names.send(stream.peer().clone());
                tokio::spawn(async move {
                    let mut byte = [0; 1];
                    while stream.read_exact(&mut byte).await.is_ok() && stream.write_all(&byte).await.is_ok() {
                        if stream.flush().await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        (address, seen)
    }

    /// A connection that is there and answers.
    async fn echo(&self, address: SocketAddr) -> io::Result<impl AsyncReadExt + AsyncWriteExt + Unpin + use<>> {
        let mut stream = self.trust.connect(TcpStream::connect(address).await?, &address.to_string()).await?;
        once(&mut stream).await?;
        Ok(stream)
    }
}

async fn once(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin)) -> io::Result<()> {
    stream.write_all(b"x").await?;
    stream.flush().await?;
    let mut byte = [0; 1];
    tokio::time::timeout(WAIT, stream.read_exact(&mut byte)).await.expect("an answer or an end in time").map(|_| ())
}

fn met() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    introduce((&a.identity(), "site-a", &[]), (&b.identity(), "site-b", &[])).unwrap();
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_makes_two_hosts_peers_in_both_directions() {
    let (a, b) = (Host::new(), Host::new());
    let (address, mut seen) = b.serve().await;
    let error = a.echo(address).await.err().unwrap().to_string();
    assert!(error.contains("paired with no other"), "{error}");

    let token = b.trust.show_token(Duration::from_secs(60)).unwrap();
    let token: Token = token.to_string().parse().unwrap();
    let peer = pair::join(&a.trust, &token, &address.to_string()).await.unwrap();
    assert_eq!(peer.id, b.trust.id().unwrap());
    assert_eq!(peer.addresses, [address.to_string()]);
    a.echo(address).await.unwrap();
    assert_eq!(seen.recv().await.unwrap().id, a.trust.id().unwrap());
    // The other way round, over the same pairing.
    let (back, mut seen) = a.serve().await;
    b.echo(back).await.unwrap();
    assert_eq!(seen.recv().await.unwrap().id, b.trust.id().unwrap());

    // The token a second time, by somebody else.
    let c = Host::new();
    let error = pair::join(&c.trust, &token, &address.to_string()).await.unwrap_err().to_string();
    assert!(error.contains("used already"), "{error}");
    assert!(b.recorded(&["\"pair\"", "\"refused\"", "used already"]).await);
    assert!(b.recorded(&["\"pair\"", "\"done\""]).await);
    assert_eq!(b.trust.peers().unwrap().len(), 1);
    // One that has expired, and one that another host showed.
    let expired = b.trust.show_token(Duration::from_secs(1)).unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let error = pair::join(&c.trust, &expired, &address.to_string()).await.unwrap_err().to_string();
    assert!(error.contains("expired"), "{error}");
    let strange = a.trust.show_token(Duration::from_secs(60)).unwrap();
    let error = pair::join(&c.trust, &strange, &address.to_string()).await.unwrap_err().to_string();
    assert!(error.contains("not the one that showed the token"), "{error}");
    assert!(c.trust.peers().unwrap().is_empty());
}

fn files(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_must_be_refused() {
    use std::os::unix::fs::PermissionsExt;
    let (a, b) = met();
    let (address, _seen) = b.serve().await;
    a.echo(address).await.unwrap();
    // Expired, and not yet good; then good again.
    let identity = Identity::open(&a.identity()).unwrap();
    let now = SystemTime::now();
    for (from, until, word) in [(now - 3 * DAY, now - DAY, "expired"), (now + DAY, now + 2 * DAY, "not valid yet")] {
        identity.issue(from, until).unwrap();
        let error = a.echo(address).await.err().unwrap().to_string();
        assert!(error.contains("does not accept this host's certificate"), "{error}");
        assert!(b.recorded(&["\"connect\"", "\"refused\"", "certificate of site-a", word]).await);
    }
    identity.issue(now - DAY, now + DAY).unwrap();
    assert!(a.trust.notices()[0].contains("ends in 0 days"), "{:?}", a.trust.notices());
    a.echo(address).await.unwrap();
    a.trust.rotate().unwrap();
    assert!(a.trust.notices().is_empty(), "{:?}", a.trust.notices());
    // Of an authority that nobody here knows, which calls itself the same.
    let stranger = Host::new();
    introduce((&stranger.identity(), "site-a", &[]), (&b.identity().with_extension("elsewhere"), "site-b", &[]))
        .unwrap();
    let peers = b.trust.peers().unwrap().len();
    let copied = a.identity().join("peers");
    for entry in std::fs::read_dir(copied).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), stranger.identity().join("peers").join(entry.file_name())).unwrap();
    }
    assert!(stranger.echo(address).await.is_err());
    assert!(b.recorded(&["\"connect\"", "\"refused\"", "is of no peer of this host"]).await);
    assert_eq!(b.trust.peers().unwrap().len(), peers);
    // What is no TLS at all.
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(WAIT, plain.read_to_end(&mut answer)).await.unwrap();
    assert!(b.recorded(&["\"connect\"", "\"refused\"", "does not speak TLS"]).await);
    let mut all = Vec::new();
    files(&a.identity(), &mut all);
    for path in all {
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_peer_is_out_at_once_and_a_rotated_one_stays() {
    let (a, b) = met();
    let (address, _seen) = b.serve().await;
    let watching = [a.trust.clone(), b.trust.clone()].map(|trust| tokio::spawn(trust.watch()));
    let mut stream = a.echo(address).await.unwrap();
    a.trust.rotate().unwrap();
    b.trust.rotate().unwrap();
    once(&mut stream).await.unwrap();
    a.echo(address).await.unwrap();
    // By another process of the same host: only the files say so.
    let peer = b.trust.peers().unwrap().remove(0);
    let audit = Audit::open(&b.directory.path().join("audit"), "agent").unwrap();
    Trust::open(&b.identity(), audit).unwrap().revoke(&peer.name).unwrap();
    let ended = async {
        while once(&mut stream).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WATCH + WAIT, ended).await.unwrap();
    let error = a.echo(address).await.err().unwrap().to_string();
    assert!(error.contains("does not accept"), "{error}");
    assert!(b.recorded(&["\"connect\"", "\"refused\"", "is revoked"]).await);
    assert_eq!(b.trust.connections(&peer.id), 0);
    watching.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_cannot_answer_in_place_of_another() {
    let (a, b) = met();
    let (address, _seen) = b.serve().await;
    // The only one there is, and remembered.
    a.echo(address).await.unwrap();
    let c = Host::new();
    introduce((&a.identity(), "site-a", &[]), (&c.identity(), "site-c", &[])).unwrap();
    // The same address, somebody else: what was remembered holds.
    let (elsewhere, _seen) = c.serve().await;
    let stream = TcpStream::connect(elsewhere).await.unwrap();
    let error = a.trust.connect(stream, &address.to_string()).await.err().unwrap().to_string();
    assert!(error.contains("site-c") && error.contains("where site-b"), "{error}");
    assert!(a.recorded(&["\"connect to\"", "\"refused\"", "site-c", &address.to_string()]).await);
    // Where nobody is known, nobody is guessed: neither of the two may be given what is the other's.
    let error = a.echo(elsewhere).await.err().unwrap().to_string();
    assert!(error.contains("peers at PEER") && error.contains("site-b") && error.contains("site-c"), "{error}");
    a.trust.locate("site-c", &elsewhere.to_string()).unwrap();
    a.echo(elsewhere).await.unwrap();
    // An address is one peer's.
    a.trust.locate("site-b", &elsewhere.to_string()).unwrap();
    let error = a.echo(elsewhere).await.err().unwrap().to_string();
    assert!(error.contains("site-c") && error.contains("where site-b"), "{error}");
    assert!(a.trust.locate("site-x", "x:1").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_keep_nobody_out_who_is_in() {
    let (a, b) = met();
    let (address, _seen) = b.serve().await;
    let mut stream = a.echo(address).await.unwrap();
    let mut flood = Vec::new();
    for _ in 0..1000 {
        flood.push(TcpStream::connect(address).await.unwrap());
        if flood.len() % 100 == 0 {
            once(&mut stream).await.unwrap();
        }
    }
    // Those that were not turned away say nothing; a trickle of bytes is no handshake either.
    let mut open = 0;
    for stream in &mut flood {
        let mut byte = [0; 1];
        let read = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut byte)).await;
        if read.is_err() && stream.write_all(&[22]).await.is_ok() {
            open += 1;
        }
    }
    assert!(open <= HANDSHAKES_MAX, "{open}");
    once(&mut stream).await.unwrap();
    assert!(b.recorded(&["\"connect\"", "\"refused\"", "too many connections"]).await);
    // Nothing of them stays: when their time is over a newcomer gets in.
    let deadline = tokio::time::Instant::now() + WAIT;
    while a.echo(address).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
