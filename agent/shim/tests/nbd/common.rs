//! Files, servers, tools and a client of single bytes, for the tests beside this.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmdr_shim::nbd::message::{
    ChunkHead, ExportQuery, OptionReplyHead, ReplyHead, Request, decode_greeting, encode_option,
};
use vmdr_shim::nbd::proto::{chunk, option, reply};
use vmdr_shim::nbd::{Client, Export, FileExport, Server};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
/// For everything that should take milliseconds: long enough for a machine that does other things too.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const NAME: &str = "vda";

/// A server of one file export called [`NAME`].
pub struct Served {
    pub dir: TempDir,
    pub file: PathBuf,
    pub socket: PathBuf,
    pub server: Server,
}

impl Served {
    /// An all-hole file.
    pub fn empty(size_bytes: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("disk.raw");
        File::create(&file).unwrap().set_len(size_bytes).unwrap();
        Self::over(dir, file, false)
    }

    pub fn over(dir: TempDir, file: PathBuf, read_only: bool) -> Self {
        let socket = dir.path().join("nbd.sock");
        let export = FileExport::open(&file, NAME, read_only).unwrap();
        let server = Server::start(&socket, vec![Arc::new(export)], None).unwrap();
        Self { dir, file, socket, server }
    }

    pub fn uri(&self) -> String {
        uri(&self.socket, NAME)
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket, NAME, LIMIT).unwrap()
    }

    pub fn raw(&self) -> Raw {
        Raw::go(&self.socket, NAME, true)
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.file).unwrap()
    }

    /// The server still does what it is for.
    pub fn assert_alive(&self) {
        let mut client = self.client();
        let mut buf = [0; 512];
        client.read(0, &mut buf).unwrap();
    }
}

pub fn uri(socket: &Path, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

pub fn serve(dir: &TempDir, exports: Vec<Arc<dyn Export>>) -> (Server, PathBuf) {
    let socket = dir.path().join("nbd.sock");
    (Server::start(&socket, exports, None).unwrap(), socket)
}

/// Bytes that tell where they are: no two blocks of 8 alike, none zero.
pub fn pattern(offset: u64, length: u64) -> Vec<u8> {
    assert!(offset.is_multiple_of(8) && length.is_multiple_of(8));
    (offset / 8..(offset + length) / 8).flat_map(|n| (n ^ 0xa5a5_5a5a_c3c3_3c3c).to_le_bytes()).collect()
}

/// A sparse file with [`pattern`] at these ranges (offset, length).
pub fn sparse_file(path: &Path, size_bytes: u64, data: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(size_bytes).unwrap();
    for &(offset, length) in data {
        file.write_all_at(&pattern(offset, length), offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Data here and there, also at the very start and the very end.
pub const SPARSE_SIZE: u64 = 96 * MIB;
pub const SPARSE_DATA: [(u64, u64); 5] = [
    (0, 64 * KIB),
    (3 * MIB, 5 * MIB),
    (20 * MIB + 256 * KIB, 128 * KIB),
    (40 * MIB, MIB),
    (96 * MIB - 192 * KIB, 192 * KIB),
];

/// Bytes that a file takes up.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

pub fn assert_same_bytes(one: &Path, other: &Path) {
    let (mut a, mut b) = (File::open(one).unwrap(), File::open(other).unwrap());
    let (size_a, size_b) = (a.metadata().unwrap().len(), b.metadata().unwrap().len());
    assert_eq!(size_a, size_b, "sizes of {} and {}", one.display(), other.display());
    let (mut x, mut y) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut at = 0;
    while at < size_a {
        let part = (size_a - at).min(MIB) as usize;
        a.read_exact(&mut x[..part]).unwrap();
        b.read_exact(&mut y[..part]).unwrap();
        assert!(x[..part] == y[..part], "{} and {} differ in the MiB at {at}", one.display(), other.display());
        at += part as u64;
    }
}

/// A child that does not survive its test.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn spawn(command: &mut Command) -> Guarded {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.spawn();
    Guarded(child.unwrap_or_else(|e| panic!("{program} cannot be run ({e}): install libnbd-bin and qemu-utils")))
}

/// Runs a tool to its end, within a limit.
pub fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    let mut stdout = child.0.stdout.take().unwrap();
    let mut stderr = child.0.stderr.take().unwrap();
    let out = std::thread::spawn(move || read_all(&mut stdout));
    let err = std::thread::spawn(move || read_all(&mut stderr));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < 2 * LIMIT, "{program} {args:?} does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    Output { status, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
}

fn read_all(from: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).unwrap();
    all
}

/// What a tool says when it succeeds.
pub fn succeed(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Does something that must not hang.
pub fn within_limit<T: Send + 'static>(what: &str, action: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(action()));
    receiver.recv_timeout(LIMIT).unwrap_or_else(|e| panic!("{what}: {e}"))
}

/// A connection on which a test says whatever it likes.
pub struct Raw {
    pub stream: UnixStream,
    pub structured: bool,
    cookie: u64,
}

/// What came back for a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; with data.
    Done(Vec<u8>),
    /// Error number and text.
    Error(u32, String),
}

impl Raw {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Self { stream, structured: false, cookie: 0x1000 }
    }

    /// Connected, greeted, flags sent.
    pub fn greeted(socket: &Path, flags: u32) -> Self {
        let mut raw = Self::connect(socket);
        let mut greeting = [0; 18];
        raw.stream.read_exact(&mut greeting).unwrap();
        assert_eq!(decode_greeting(&greeting).unwrap(), 3);
        raw.stream.write_all(&flags.to_be_bytes()).unwrap();
        raw
    }

    /// Ready for requests.
    pub fn go(socket: &Path, name: &str, structured: bool) -> Self {
        let mut raw = Self::greeted(socket, 3);
        if structured {
            assert_eq!(raw.option(option::STRUCTURED_REPLY, &[]), vec![(reply::ACK, vec![])]);
            raw.structured = true;
        }
        let replies = raw.option(option::GO, &ExportQuery { name: name.to_owned(), infos: vec![] }.encode());
        assert_eq!(replies.last().unwrap().0, reply::ACK, "{replies:?}");
        raw
    }

    /// Sends an option and collects the replies to it.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.stream.write_all(&encode_option(option, data)).unwrap();
        let mut replies = Vec::new();
        loop {
            let mut head = [0; OptionReplyHead::BYTES];
            self.stream.read_exact(&mut head).unwrap();
            let head = OptionReplyHead::decode(&head).unwrap();
            assert_eq!(head.option, option);
            let mut data = vec![0; head.length as usize];
            self.stream.read_exact(&mut data).unwrap();
            replies.push((head.kind, data));
            if head.kind == reply::ACK || head.kind & reply::ERROR_BIT != 0 {
                return replies;
            }
        }
    }

    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u64 {
        self.cookie += 1;
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        self.stream.write_all(&request.encode()).unwrap();
        self.cookie
    }

    /// A request without payload, and its answer; `expected` bytes of data come with a simple reply.
    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32, expected: usize) -> Answer {
        let cookie = self.send(command, flags, offset, length);
        self.answer(cookie, expected)
    }

    pub fn write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> Answer {
        let cookie = self.send(vmdr_shim::nbd::proto::command::WRITE, flags, offset, payload.len() as u32);
        self.stream.write_all(payload).unwrap();
        self.answer(cookie, 0)
    }

    pub fn answer(&mut self, expected_cookie: u64, expected: usize) -> Answer {
        let mut head = [0; ReplyHead::BYTES];
        self.stream.read_exact(&mut head).unwrap();
        match ReplyHead::decode(&head).unwrap() {
            ReplyHead::Simple(simple) => {
                assert_eq!(simple.cookie, expected_cookie);
                if simple.error != 0 {
                    return Answer::Error(simple.error, String::new());
                }
                let mut data = vec![0; expected];
                self.stream.read_exact(&mut data).unwrap();
                Answer::Done(data)
            }
            ReplyHead::Chunk { flags, kind, cookie } => {
                assert!(self.structured);
                assert_eq!((cookie, flags), (expected_cookie, chunk::FLAG_DONE));
                let mut length = [0; ChunkHead::BYTES - ReplyHead::BYTES];
                self.stream.read_exact(&mut length).unwrap();
                let mut payload = vec![0; u32::from_be_bytes(length) as usize];
                self.stream.read_exact(&mut payload).unwrap();
                match kind {
                    chunk::NONE => Answer::Done(vec![]),
                    chunk::OFFSET_DATA => Answer::Done(payload[8..].to_vec()),
                    chunk::BLOCK_STATUS => Answer::Done(payload[4..].to_vec()),
                    chunk::ERROR => {
                        let (code, text) = vmdr_shim::nbd::handshake::decode_error_chunk(&payload).unwrap();
                        Answer::Error(code, text)
                    }
                    other => panic!("chunk {other:#x}"),
                }
            }
        }
    }

    /// The server has closed this connection; what it said before that.
    pub fn assert_closed(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(e) => panic!("connection is still open: {e}"),
        }
        rest
    }
}

impl Answer {
    pub fn code(&self) -> u32 {
        match self {
            Self::Done(_) => 0,
            Self::Error(code, _) => *code,
        }
    }

    pub fn data(self) -> Vec<u8> {
        match self {
            Self::Done(data) => data,
            Self::Error(code, text) => panic!("error {code}: {text}"),
        }
    }
}
