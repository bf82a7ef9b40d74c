//! Names are updated at a real name server (Debian's knot, which scripts/setup installs): signed, with a wrong key, and at none.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmdr_plan::{Dns, Plan};
use vmdr_receiver::recovery::dns::update;

const ZONE: &str = "vmdr.example";
const REVERSE: &str = "79.10.in-addr.arpa";
const REVERSE_SIX: &str = "0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";

struct Server {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free for both protocols. Somebody else may take it before the server does: then it is tried again.
fn free_port() -> u16 {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Server {
    fn start() -> Self {
        for _ in 0..5 {
            if let Some(server) = Self::try_start(free_port()) {
                return server;
            }
        }
        panic!("knotd does not come up (scripts/setup installs it)");
    }

    fn try_start(port: u16) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        // Hexadecimal digits are base64, too.
        let secret = uuid::Uuid::new_v4().simple().to_string();
        write_key(&at.join("key"), "hmac-sha256", "updater", &secret);
        let place = at.display();
        let mut text = format!(
            "server:\n    listen: 127.0.0.1@{port}\n    rundir: {place}\ndatabase:\n    storage: {place}\nkey:\n  - id: updater\n    \
             algorithm: hmac-sha256\n    secret: {secret}\nacl:\n  - id: updates\n    key: updater\n    action: update\nzone:\n"
        );
        for zone in [ZONE, REVERSE, REVERSE_SIX] {
            text.push_str(&format!(
                "  - domain: {zone}\n    storage: {place}\n    file: {zone}.zone\n    acl: updates\n    zonefile-sync: -1\n"
            ));
            let mut records = format!("$ORIGIN {zone}.\n$TTL 3600\n@ SOA ns admin 1 60 60 3600 60\n@ NS ns.{ZONE}.\n");
            if zone == ZONE {
                // What it was at the site that was lost.
                records.push_str("web1 A 10.0.0.5\nweb1 AAAA 2001:db8:ffff::5\nweb1 TXT left\n");
            }
            fs::write(at.join(format!("{zone}.zone")), records).unwrap();
        }
        fs::write(at.join("knot.conf"), text).unwrap();
        let mut command = Command::new("knotd");
        command.arg("-c").arg(at.join("knot.conf")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("run knotd (scripts/setup installs it)");
        let mut server = Self { child, port, directory };
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if !server.ask(ZONE, "SOA").is_empty() {
                return Some(server);
            }
            if server.child.try_wait().unwrap().is_some() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }

    /// What a resolver is told: the values, sorted.
    fn ask(&self, name: &str, kind: &str) -> Vec<String> {
        let mut command = Command::new("kdig");
        command.args(["@127.0.0.1", "-p", &self.port.to_string(), "+short", "+time=2", "+retry=0", name, kind]);
        let said = command.output().expect("run kdig (scripts/setup installs it)");
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(';'));
        let mut lines: Vec<String> = lines.map(str::to_owned).collect();
        lines.sort();
        lines
    }

    fn dns(&self, more: &str) -> Dns {
        plan(self.port, &self.directory.path().join("key"), more)
    }
}

fn write_key(file: &Path, algorithm: &str, name: &str, secret: &str) {
    fs::write(file, format!("key \"{name}\" {{\n\talgorithm {algorithm};\n\tsecret \"{secret}\";\n}};\n")).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}

fn plan(port: u16, key: &Path, more: &str) -> Dns {
    let text = format!(
        "[dns]\nserver = \"127.0.0.1:{port}\"\nzone = \"{ZONE}\"\nreverse_zones = [\"{REVERSE}\", \"{REVERSE_SIX}\"]\nkey_file = \
         \"{}\"\nttl_seconds = 30\n{more}",
        key.display()
    );
    Plan::parse(&text).unwrap().dns.unwrap().value
}

fn names() -> Vec<String> {
    ["web1", "www"].map(|name| format!("{name}.{ZONE}")).to_vec()
}

fn addresses() -> Vec<IpAddr> {
    ["10.79.0.10", "10.80.0.5", "2001:db8::10"].map(|address| address.parse().unwrap()).to_vec()
}

#[test]
fn a_signed_update_is_what_resolvers_are_told() {
    let server = Server::start();
    assert_eq!(server.ask("web1.vmdr.example", "A"), ["10.0.0.5"]);
    for _ in 0..2 {
        let (changes, failed) = update(&server.dns(""), &names(), &addresses());
        assert_eq!(failed, None, "{changes:?}");
        assert_eq!(changes.len(), 3, "{changes:?}");
        assert!(changes.iter().all(|change| change.error.is_empty() && change.done.contains("(30 s)")), "{changes:?}");
        for name in names() {
            assert_eq!(server.ask(&name, "A"), ["10.79.0.10", "10.80.0.5"]);
            assert_eq!(server.ask(&name, "AAAA"), ["2001:db8::10"], "the old one is gone");
        }
        assert_eq!(server.ask("10.0.79.10.in-addr.arpa", "PTR"), ["web1.vmdr.example."]);
        let six = format!("0.1.{}{REVERSE_SIX}", "0.".repeat(18));
        assert_eq!(server.ask(&six, "PTR"), ["web1.vmdr.example."]);
        assert_eq!(server.ask("web1.vmdr.example", "TXT"), ["\"left\""]);
    }
}

#[test]
fn a_wrong_key_changes_nothing_and_follows_the_policy() {
    let server = Server::start();
    let key = server.directory.path().join("wrong");
    for (algorithm, name, secret) in [
        ("hmac-sha256", "updater", "bm90IHRoZSBrZXkgYXQgYWxsISE="),
        ("hmac-sha256", "somebody-else", "bm90IHRoZSBrZXkgYXQgYWxsISE="),
    ] {
        write_key(&key, algorithm, name, secret);
        for (policy, ends) in [("on_failure = \"abort\"", true), ("on_failure = \"warn\"", false)] {
            let begun = Instant::now();
            let (changes, failed) = update(&plan(server.port, &key, policy), &names(), &addresses());
            assert!(changes.len() == 3 && changes.iter().all(|change| !change.error.is_empty()), "{changes:?}");
            assert!(changes.iter().all(|change| !change.error.contains(secret)), "{changes:?}");
            assert_eq!(failed.is_some(), ends, "{failed:?}");
            assert!(begun.elapsed() < Duration::from_secs(30), "one that says no is not asked again and again");
        }
    }
    assert_eq!(server.ask("web1.vmdr.example", "A"), ["10.0.0.5"]);
}

#[test]
fn a_server_that_does_not_answer_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key");
    write_key(&key, "hmac-sha256", "updater", "bm90IHRoZSBrZXkgYXQgYWxsISE=");
    // One that is not there, and one that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    // (A port that is somebody's end of a connection, and that nobody listens on.)
    let end = TcpStream::connect(silent.local_addr().unwrap()).unwrap();
    for port in [end.local_addr().unwrap().port(), silent.local_addr().unwrap().port()] {
        let begun = Instant::now();
        let limits = "timeout_seconds = 1\ntries = 2\non_failure = \"abort\"";
        let (changes, failed) = update(&plan(port, &key, limits), &names()[..1], &addresses()[..1]);
        assert!(changes.iter().all(|change| change.error.contains("tried 2 times")), "{changes:?}");
        assert!(failed.is_some_and(|failed| failed.contains(ZONE)));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}
