//! The server as a whole: who may connect, how many, what one session can do to another, and how it ends.

use crate::common::{Answer, LIMIT, MIB, NAME, Raw, Served, serve, wait_for, within_limit};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use vmdr_shim::nbd::proto::{command, command_flag};
use vmdr_shim::nbd::server::SESSIONS_MAX;
use vmdr_shim::nbd::{
    Capabilities, Client, ClientError, Export, ExportError, Extent, FileExport, Server, ServerError, WriteError,
};

const SIZE: u64 = MIB;

/// An export that does as it is told and remembers what was asked of it.
struct Scripted {
    name: &'static str,
    capabilities: Capabilities,
    log: Mutex<Vec<String>>,
    data: Mutex<Vec<u8>>,
    refuse_writes: AtomicBool,
    take_half: AtomicBool,
    panic_on_flush: AtomicBool,
}

const WRITE_ONLY: Capabilities = Capabilities {
    read: false,
    write: true,
    trim: true,
    fast_zero: false,
    block_status: false,
    multi_connection: false,
    block_bytes_min: 512,
};

impl Scripted {
    fn new(name: &'static str, capabilities: Capabilities) -> Arc<Self> {
        Arc::new(Self {
            name,
            capabilities,
            log: Mutex::default(),
            data: Mutex::new(vec![0; SIZE as usize]),
            refuse_writes: false.into(),
            take_half: false.into(),
            panic_on_flush: false.into(),
        })
    }

    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn has(&self, what: &str) -> bool {
        self.log().iter().any(|line| line == what)
    }
}

impl Export for Scripted {
    fn name(&self) -> &str {
        self.name
    }
    fn size_bytes(&self) -> u64 {
        SIZE
    }
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        let at = offset as usize;
        buf.copy_from_slice(&self.data.lock().unwrap()[at..at + buf.len()]);
        self.note(format!("read {offset} {}", buf.len()));
        Ok(())
    }
    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        if self.refuse_writes.load(Ordering::SeqCst) {
            return Err(ExportError::NoSpace("the arena is full".into()).into());
        }
        let take = if self.take_half.load(Ordering::SeqCst) { length / 2 } else { length };
        let mut payload = vec![0; take as usize];
        source.read_exact(&mut payload).map_err(|e| {
            self.note("source broke");
            WriteError::Source(e)
        })?;
        self.data.lock().unwrap()[offset as usize..][..payload.len()].copy_from_slice(&payload);
        self.note(format!("write {offset} {length}"));
        Ok(())
    }
    fn zero(&self, offset: u64, length: u64, may_unmap: bool, fast: bool) -> Result<(), ExportError> {
        self.note(format!("zero {offset} {length} {may_unmap} {fast}"));
        Ok(())
    }
    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.note(format!("trim {offset} {length}"));
        Ok(())
    }
    fn flush(&self) -> Result<(), ExportError> {
        assert!(!self.panic_on_flush.load(Ordering::SeqCst), "told to");
        self.note("flush");
        Ok(())
    }
    fn extents(&self, _: u64, length: u64, _: usize) -> Result<Vec<Extent>, ExportError> {
        Ok(vec![Extent { length, hole: false, zero: false }])
    }
    fn connected(&self, session: u64) {
        self.note(format!("connected {session}"));
    }
    fn disconnected(&self, session: u64) {
        self.note(format!("disconnected {session}"));
    }
}

#[test]
fn requests_reach_the_export_as_they_were_meant() {
    let dir = TempDir::new().unwrap();
    let export = Scripted::new(NAME, Capabilities { fast_zero: true, ..WRITE_ONLY });
    let (server, socket) = serve(&dir, vec![export.clone()]);
    let mut raw = Raw::go(&socket, NAME, true);
    raw.write(0, 512, &[1; 1024]).data();
    raw.write(command_flag::FUA, 0, &[2; 512]).data();
    raw.ask(command::WRITE_ZEROES, 0, 0, 512, 0).data();
    raw.ask(command::WRITE_ZEROES, command_flag::NO_HOLE, 0, 1024, 0).data();
    raw.ask(command::WRITE_ZEROES, command_flag::FAST_ZERO | command_flag::FUA, 0, 1536, 0).data();
    raw.ask(command::TRIM, 0, 4096, 4096, 0).data();
    raw.ask(command::FLUSH, 0, 0, 0, 0).data();
    // What it cannot do, or not like this, never gets there.
    assert_eq!(raw.ask(command::READ, 0, 0, 512, 0).code(), 1);
    for (offset, length) in [(1, 512), (0, 511), (256, 256)] {
        assert_eq!(raw.ask(command::WRITE_ZEROES, 0, offset, length, 0).code(), 22);
    }
    assert_eq!(raw.write(0, 1, &[3; 512]).code(), 22);
    raw.send(command::DISC, 0, 0, 0);
    raw.assert_closed();
    server.stop();
    let expected = [
        "connected 1",
        "write 512 1024",
        "write 0 512",
        "flush",
        "zero 0 512 true false",
        "zero 0 1024 false false",
        "zero 0 1536 true true",
        "flush",
        "trim 4096 4096",
        "flush",
        "disconnected 1",
    ];
    assert_eq!(export.log(), expected);
}

#[test]
fn an_export_that_refuses_costs_an_error_and_not_the_session() {
    let dir = TempDir::new().unwrap();
    let export = Scripted::new(NAME, Capabilities { read: true, block_bytes_min: 1, ..WRITE_ONLY });
    let (_server, socket) = serve(&dir, vec![export.clone()]);
    let mut raw = Raw::go(&socket, NAME, true);
    export.refuse_writes.store(true, Ordering::SeqCst);
    // Its payload is larger than any socket buffer: it has to be read, or the next request is not found.
    assert_eq!(raw.write(0, 0, &vec![9; MIB as usize]).code(), 28);
    export.refuse_writes.store(false, Ordering::SeqCst);
    export.take_half.store(true, Ordering::SeqCst);
    assert_eq!(raw.write(0, 0, &[9; 1000]).code(), 5, "an export that forgets half is an error, not a success");
    export.take_half.store(false, Ordering::SeqCst);
    raw.write(0, 0, b"fine again").data();
    assert_eq!(raw.ask(command::READ, 0, 0, 10, 0), Answer::Done(b"fine again".to_vec()));
    // Fast zeroes were not announced.
    assert_eq!(raw.ask(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 512, 0).code(), 22);
}

#[test]
fn an_export_that_panics_loses_that_connection_only() {
    let dir = TempDir::new().unwrap();
    let export = Scripted::new(NAME, WRITE_ONLY);
    let (server, socket) = serve(&dir, vec![export.clone()]);
    let other = Raw::go(&socket, NAME, true);
    let mut raw = Raw::go(&socket, NAME, true);
    export.panic_on_flush.store(true, Ordering::SeqCst);
    raw.send(command::FLUSH, 0, 0, 0);
    raw.assert_closed();
    wait_for("the export to be told", || export.has("disconnected 2"));
    let mut other = other;
    other.write(0, 0, &[1; 512]).data();
    server.stop();
    assert!(export.has("disconnected 1"));
}

#[test]
fn exports_are_chosen_by_name() {
    let dir = TempDir::new().unwrap();
    let readable = Capabilities { read: true, block_bytes_min: 1, ..WRITE_ONLY };
    let (vda, vdb) = (Scripted::new("vda", readable), Scripted::new("vdb", readable));
    let (_server, socket) = serve(&dir, vec![vda.clone(), vdb.clone()]);
    Raw::go(&socket, "vdb", true).write(0, 0, b"to b").data();
    Raw::go(&socket, "vda", false).write(0, 0, b"to a").data();
    assert_eq!(&vda.data.lock().unwrap()[..4], b"to a");
    assert_eq!(&vdb.data.lock().unwrap()[..4], b"to b");
    // With two there is no default.
    for name in ["", "vdc"] {
        let refused = Client::connect(&socket, name, LIMIT).err().unwrap();
        assert!(matches!(refused, ClientError::Export { .. }), "{refused}");
    }
    wait_for("both sessions to be over", || vda.has("disconnected 2") && vdb.has("disconnected 1"));
}

#[test]
fn a_session_that_stalls_in_a_payload_stalls_nobody_and_does_not_keep_the_server_from_stopping() {
    let served = Served::empty(MIB);
    let mut stalled = served.raw();
    stalled.send(command::WRITE, 0, 0, 4096);
    stalled.stream.write_all(&[0xaa; 2048]).unwrap();
    // One that does not take its replies either: the server's socket buffer fills up.
    let mut deaf = served.raw();
    for _ in 0..16 {
        deaf.send(command::READ, 0, 0, MIB as u32);
    }
    // One in the middle of its handshake, one that said nothing.
    let _half = Raw::greeted(&served.socket, 3);
    let _mute = UnixStream::connect(&served.socket).unwrap();
    let mut busy = served.raw();
    for n in 0..100u64 {
        busy.write(command_flag::FUA, 8192 + n * 512, &[1; 512]).data();
    }
    let Served { server, socket, dir, .. } = served;
    within_limit("stop", move || server.stop());
    assert!(!socket.exists());
    stalled.assert_closed();
    busy.assert_closed();
    drop(dir);
}

#[test]
fn a_connection_that_breaks_in_a_payload_is_the_sources_fault() {
    let dir = TempDir::new().unwrap();
    let export = Scripted::new(NAME, WRITE_ONLY);
    let (_server, socket) = serve(&dir, vec![export.clone()]);
    let mut raw = Raw::go(&socket, NAME, true);
    raw.send(command::WRITE, 0, 0, 4096);
    raw.stream.write_all(&[0xaa; 100]).unwrap();
    drop(raw);
    wait_for("the session to end", || export.has("disconnected 1"));
    assert_eq!(export.log(), ["connected 1", "source broke", "disconnected 1"]);
}

#[test]
fn sessions_are_limited_and_a_place_becomes_free_again() {
    let served = Served::empty(MIB);
    let mut sessions: Vec<Raw> = (0..SESSIONS_MAX).map(|_| served.raw()).collect();
    let one_too_many = Raw::connect(&served.socket);
    assert!(one_too_many.assert_closed().is_empty(), "it was let in");
    for session in &mut sessions {
        session.write(0, 0, &[1; 512]).data();
    }
    sessions.pop();
    wait_for("a place", || Client::connect(&served.socket, NAME, LIMIT).is_ok());
}

#[test]
fn the_socket_is_its_owners_alone() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("nbd.sock");
    let me = std::fs::metadata(dir.path()).unwrap().uid();
    // Only root can give files away; another's name is tried where that is possible.
    let owner = if me == 0 { 12_345 } else { me };
    let server = Server::start(&socket, vec![Scripted::new(NAME, WRITE_ONLY)], Some(owner)).unwrap();
    let there = std::fs::symlink_metadata(&socket).unwrap();
    assert_eq!(there.permissions().mode() & 0o7777, 0o600);
    assert_eq!(there.uid(), owner);
    assert_eq!(server.path(), socket);
    server.stop();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_path_in_use_is_left_alone_and_a_stale_socket_is_replaced() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("nbd.sock");
    let start = || Server::start(&socket, vec![Scripted::new(NAME, WRITE_ONLY)], None);

    std::fs::write(&socket, "a file").unwrap();
    assert!(matches!(start(), Err(ServerError::Occupied { .. })));
    assert_eq!(std::fs::read(&socket).unwrap(), b"a file");
    std::fs::remove_file(&socket).unwrap();

    let first = start().unwrap();
    assert!(matches!(start(), Err(ServerError::Occupied { .. })));
    drop(Raw::go(&socket, NAME, true));
    drop(first);

    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists(), "a socket that nobody listens on");
    let second = start().unwrap();
    drop(Raw::go(&socket, NAME, true));
    // Somebody else's socket at our path is not ours to remove.
    std::fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    second.stop();
    assert!(socket.exists());

    let long = dir.path().join("x".repeat(120));
    let Err(error) = Server::start(&long, vec![Scripted::new(NAME, WRITE_ONLY)], None) else {
        panic!("a path of 120 bytes was accepted");
    };
    assert!(matches!(error, ServerError::Io { .. }), "{error}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["nbd.sock"]);
}

#[test]
fn exports_that_cannot_be_served_are_refused() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("nbd.sock");
    let units = |block_bytes_min| Capabilities { block_bytes_min, ..WRITE_ONLY };
    let mut cases: Vec<Vec<Arc<dyn Export>>> = vec![
        vec![],
        vec![Scripted::new(NAME, WRITE_ONLY), Scripted::new(NAME, WRITE_ONLY)],
        vec![Scripted::new("x".repeat(4097).leak(), WRITE_ONLY)],
    ];
    for unit in [0, 3, 131_072] {
        cases.push(vec![Scripted::new(NAME, units(unit))]);
    }
    for exports in cases {
        assert!(matches!(Server::start(&socket, exports, None), Err(ServerError::Exports { .. })));
    }
    assert!(!socket.exists());
    assert!(FileExport::open(dir.path(), NAME, true).is_err(), "a directory");
    assert!(FileExport::open(&dir.path().join("none"), NAME, true).is_err());
}

#[test]
fn many_servers_come_and_go() {
    let dir = TempDir::new().unwrap();
    for round in 0..50 {
        let export = Scripted::new(NAME, WRITE_ONLY);
        let (server, socket) = serve(&dir, vec![export.clone()]);
        let raw = Raw::go(&socket, NAME, round % 2 == 0);
        server.stop();
        raw.assert_closed();
        assert_eq!(export.log(), ["connected 1", "disconnected 1"]);
    }
}
