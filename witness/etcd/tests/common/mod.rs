//! A real etcd, and certificates for one.
#![allow(dead_code)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use vmdr_etcd::{Config, Etcd};
use vmdr_witness::{Claim, Over, Owner};

pub const WAIT: Duration = Duration::from_secs(60);
/// To find ports that stay free.
const ATTEMPTS: u32 = 5;

/// Files of an authority, and of a certificate of its for both ends.
#[derive(Clone)]
pub struct Tls {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Tls {
    pub fn make(directory: &Path) -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let mut own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = own.signed_by(&key, &issuer).unwrap();
        let write = |name: &str, text: String| {
            let path = directory.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        Self {
            ca: write("ca.pem", ca_certificate.pem()),
            certificate: write("own.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
        }
    }
}

/// An etcd of one member on ports of its own; gone when this is dropped.
pub struct Server {
    directory: tempfile::TempDir,
    client: u16,
    peer: u16,
    process: Option<Child>,
    /// Files of TLS; nothing: plain.
    pub tls: Option<Tls>,
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    pub fn start_with(tls: Option<Tls>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut server = Self { directory, client: 0, peer: 0, process: None, tls };
        // Somebody else can get a port between its being free and its being used.
        for _ in 0..ATTEMPTS {
            let free = || TcpListener::bind("127.0.0.1:0").unwrap();
            // Both are held until both are known.
            let (client, peer) = (free(), free());
            let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
            (server.client, server.peer) = (port(&client), port(&peer));
            drop((client, peer));
            server.begin();
            if server.listens() {
                return server;
            }
            server.kill();
            std::fs::remove_dir_all(server.data()).ok();
        }
        panic!("etcd does not start:\n{}", server.log());
    }

    /// Starts it again, where it was before.
    pub fn up(&mut self) {
        self.begin();
        assert!(self.listens(), "etcd does not start again:\n{}", self.log());
    }

    /// Whether it accepts connections; nothing else has its port.
    fn listens(&mut self) -> bool {
        let until = Instant::now() + WAIT;
        while Instant::now() < until {
            if self.process.as_mut().is_none_or(|process| process.try_wait().unwrap().is_some()) {
                return false;
            }
            if TcpStream::connect(("127.0.0.1", self.client)).is_ok() {
                // One that could not listen ends at once; the port may be somebody else's.
                std::thread::sleep(Duration::from_millis(200));
                return self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_none());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn begin(&mut self) {
        let (client, peer) = (self.url(), format!("http://127.0.0.1:{}", self.peer));
        let log = std::fs::File::create(self.directory.path().join("log")).unwrap();
        let mut command = Command::new("etcd");
        if let Some(tls) = &self.tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&tls.ca);
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
        }
        let child = command
            .arg("--data-dir")
            .arg(self.data())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--heartbeat-interval", "100"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.process = Some(child.expect("etcd is installed by scripts/setup"));
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client)
    }

    pub fn config(&self) -> Config {
        let mut config = Config { endpoints: vec![self.url()], timeout_ms: 5000, ..Config::default() };
        if let Some(tls) = &self.tls {
            config.ca_file = Some(tls.ca.clone());
            config.certificate_file = Some(tls.certificate.clone());
            config.key_file = Some(tls.key.clone());
        }
        config
    }

    /// A client, once it answers.
    pub async fn connect(&self) -> Etcd {
        let until = Instant::now() + WAIT;
        let etcd = Etcd::connect(&self.config()).await.unwrap();
        while let Err(error) = etcd.look("nobody").await {
            assert!(Instant::now() < until, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        etcd
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// By the owner that is there, or whatever is.
pub fn claim(holder: &str, generation: u64) -> Claim {
    Claim { holder: holder.to_owned(), generation, over: Over::Anything }
}

/// By what is there of `a` in the generation before, and nothing else.
pub fn take(holder: &str, generation: u64) -> Claim {
    let from = Owner { generation: generation - 1, holder: "a".to_owned() };
    Claim { over: Over::Owner(from), ..claim(holder, generation) }
}
