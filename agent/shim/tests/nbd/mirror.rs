//! What the server is for: the target of QEMU's mirror with synchronous writes (in qemu-storage-daemon, which has the same
//! block layer), and the command that serves a file.

use crate::common::{
    Guarded, KIB, LIMIT, MIB, NAME, SPARSE_DATA, SPARSE_SIZE, allocated, assert_same_bytes, sparse_file, spawn,
    succeed, uri, wait_for,
};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tempfile::TempDir;
use vmdr_shim::nbd::{Capabilities, Client, Export, ExportError, Extent, FileExport, Server, WriteError};

/// A block layer of QEMU's, and its monitor.
struct Daemon {
    _process: Guarded,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Daemon {
    /// With `image` as node `disk`, exported read-write as `guest` on `socket`.
    fn start(image: &Path, format: &str, socket: &Path) -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=file,filename={},discard=unmap", image.display()))
            .arg("--blockdev")
            .arg(format!("driver={format},node-name=disk,file=file,discard=unmap"))
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", "type=nbd,id=guest,node-name=disk,name=guest,writable=on"]);
        let mut process = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let to = process.0.stdin.take().unwrap();
        let from = BufReader::new(process.0.stdout.take().unwrap());
        let mut daemon = Self { _process: process, to, from };
        daemon.line();
        daemon.execute("qmp_capabilities", &json!({}));
        daemon
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        writeln!(self.to, "{}", json!({"execute": command, "arguments": arguments})).unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }

    fn mirror_to(&mut self, socket: &Path) {
        let server = json!({"type": "unix", "path": socket});
        // Without `discard` QEMU asks for zeroes that stay allocated, and the target is as large as the disk.
        let target = json!({
            "driver": "nbd", "node-name": "target", "server": server, "export": NAME, "discard": "unmap"
        });
        self.execute("blockdev-add", &target);
        let job = json!({
            "job-id": "mirror", "device": "disk", "target": "target", "sync": "full", "copy-mode": "write-blocking"
        });
        self.execute("blockdev-mirror", &job);
        wait_for("the mirror to be ready", || {
            let jobs = self.execute("query-block-jobs", &json!({}));
            assert_eq!(jobs[0]["status"].as_str().map(|s| s == "aborting" || s == "concluded"), Some(false), "{jobs}");
            jobs[0]["ready"] == true && jobs[0]["actively-synced"] == true
        });
    }

    fn synced(&mut self) -> bool {
        let jobs = self.execute("query-block-jobs", &json!({}));
        jobs[0]["ready"] == true && jobs[0]["actively-synced"] == true && jobs[0]["io-status"] == "ok"
    }
}

/// As a guest would.
fn write_as_guest(socket: &Path, commands: &[&str]) {
    let uri = uri(socket, "guest");
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend_from_slice(&["-c", command]);
    }
    args.push(&uri);
    succeed("qemu-io", &args);
}

const GUEST_WRITES: [&str; 8] = [
    "write -P 0xb1 0 4k",
    "write -P 0xb2 -f 5M 1M",
    "write -P 0xb3 70M 3M",
    "write -z 40M 512k",
    "write -z -u 6M 1M",
    "discard 7M 512k",
    "write -P 0xb4 100662784 512",
    "flush",
];

#[test]
fn a_mirror_into_a_file_is_identical_and_stays_sparse() {
    for format in ["raw", "qcow2"] {
        let dir = TempDir::new().unwrap();
        let raw = dir.path().join("source.raw");
        sparse_file(&raw, SPARSE_SIZE, &SPARSE_DATA);
        let image = dir.path().join("source.img");
        succeed("qemu-img", &["convert", "-f", "raw", "-O", format, raw.to_str().unwrap(), image.to_str().unwrap()]);
        let target = dir.path().join("target.raw");
        File::create(&target).unwrap().set_len(SPARSE_SIZE).unwrap();
        let (socket, guest) = (dir.path().join("nbd.sock"), dir.path().join("guest.sock"));
        let export = FileExport::open(&target, NAME, false).unwrap();
        let server = Server::start(&socket, vec![Arc::new(export)], None).unwrap();

        let mut daemon = Daemon::start(&image, format, &guest);
        daemon.mirror_to(&socket);
        assert!(allocated(&target) <= allocated(&raw) + MIB, "{format}: {} bytes", allocated(&target));
        write_as_guest(&guest, &GUEST_WRITES);
        assert!(daemon.synced());
        // What the guest sees, read through QEMU, is what the server was given.
        let mut client = Client::connect(&guest, "guest", LIMIT).unwrap();
        let mut seen = vec![0; SPARSE_SIZE as usize];
        client.read(0, &mut seen).unwrap();
        assert!(seen == std::fs::read(&target).unwrap(), "{format}: source and mirror differ");
        drop(daemon);
        server.stop();
    }
}

/// As the shim's own: takes writes, tells nothing.
struct Sink {
    file: File,
    written: AtomicU64,
    fail: AtomicBool,
    connected: AtomicU64,
}

impl Sink {
    fn failed(source: std::io::Error) -> ExportError {
        ExportError::Io { doing: "write the sink".into(), source }
    }
}

impl Export for Sink {
    fn name(&self) -> &str {
        NAME
    }
    fn size_bytes(&self) -> u64 {
        SPARSE_SIZE
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: false,
            write: true,
            trim: false,
            fast_zero: true,
            block_status: false,
            multi_connection: false,
            block_bytes_min: 512,
        }
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
        panic!("the server asked for what was not announced")
    }
    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        if self.fail.load(Ordering::SeqCst) {
            return Err(ExportError::NoSpace("told to".into()).into());
        }
        let mut payload = vec![0; length as usize];
        source.read_exact(&mut payload).map_err(WriteError::Source)?;
        self.file.write_all_at(&payload, offset).map_err(Self::failed)?;
        self.written.fetch_add(length.into(), Ordering::SeqCst);
        Ok(())
    }
    fn zero(&self, offset: u64, length: u64, _: bool, _: bool) -> Result<(), ExportError> {
        self.file.write_all_at(&vec![0; length as usize], offset).map_err(Self::failed)
    }
    fn trim(&self, _: u64, _: u64) -> Result<(), ExportError> {
        panic!("the server asked for what was not announced")
    }
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, ExportError> {
        panic!("the server asked for what was not announced")
    }
    fn connected(&self, session: u64) {
        self.connected.store(session, Ordering::SeqCst);
    }
    fn disconnected(&self, _: u64) {
        self.connected.store(0, Ordering::SeqCst);
    }
}

#[test]
fn a_mirror_needs_nothing_of_its_target_but_that_it_takes_writes() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("source.raw");
    sparse_file(&image, SPARSE_SIZE, &SPARSE_DATA);
    let target = dir.path().join("target.raw");
    // Old content, to see that zeroes are written where the source has none.
    sparse_file(&target, SPARSE_SIZE, &[(10 * MIB, 64 * KIB), (60 * MIB, 8 * MIB)]);
    let (socket, guest) = (dir.path().join("nbd.sock"), dir.path().join("guest.sock"));
    let file = File::options().read(true).write(true).open(&target).unwrap();
    let (written, fail) = (AtomicU64::new(0), AtomicBool::new(false));
    let sink = Arc::new(Sink { file, written, fail, connected: AtomicU64::new(0) });
    let server = Server::start(&socket, vec![sink.clone()], None).unwrap();
    let mut daemon = Daemon::start(&image, "raw", &guest);
    daemon.mirror_to(&socket);
    assert_ne!(sink.connected.load(Ordering::SeqCst), 0);
    let data: u64 = SPARSE_DATA.iter().map(|(_, length)| length).sum();
    assert!(sink.written.load(Ordering::SeqCst) <= data + MIB, "holes were sent as data");
    write_as_guest(&guest, &GUEST_WRITES);
    assert!(daemon.synced());
    // Also after the discard: as long as it mirrors, QEMU drops those, for the source too. If it did not, a target without
    // TRIM would keep what the source has lost.
    assert_same_bytes(&image, &target);

    // An error of the target is not the guest's: its write succeeds, and the mirror is no mirror any more.
    sink.fail.store(true, Ordering::SeqCst);
    write_as_guest(&guest, &["write -P 0xc1 0 64k"]);
    assert!(!daemon.synced(), "a failed write went unnoticed");
    drop(daemon);
    wait_for("the session to end", || sink.connected.load(Ordering::SeqCst) == 0);
    server.stop();
}

#[test]
fn the_command_serves_a_file_until_it_is_told_to_end() {
    let dir = TempDir::new().unwrap();
    let (file, socket) = (dir.path().join("disk.raw"), dir.path().join("nbd.sock"));
    sparse_file(&file, MIB, &[(0, 64 * KIB)]);
    let shim = env!("CARGO_BIN_EXE_vmdr-shim");
    let (file_arg, socket_arg) = (file.to_str().unwrap(), socket.to_str().unwrap());
    for signal in ["TERM", "INT"] {
        let mut command = Command::new(shim);
        command.args(["nbd", "--file", file_arg, "--socket", socket_arg, "--name", "disk", "--read-only"]);
        let mut process = spawn(command.stdin(Stdio::null()).stderr(Stdio::null()));
        wait_for("the command's socket", || socket.exists());
        assert_eq!(succeed("nbdinfo", &["--size", &uri(&socket, "disk")]).trim(), MIB.to_string());
        // Somebody who is connected does not keep it from ending.
        let _client = Client::connect(&socket, "disk", LIMIT).unwrap();
        succeed("kill", &[&format!("-{signal}"), &process.0.id().to_string()]);
        let mut status = None;
        wait_for("the command to end", || {
            status = process.0.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "after SIG{signal}: {status:?}");
        assert!(!socket.exists());
    }
    let output = crate::common::run(shim, &["nbd", "--file", "/nonexistent", "--socket", socket_arg]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent"));
}
