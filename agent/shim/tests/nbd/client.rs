//! The client against our server, against QEMU, and against servers that cannot be trusted.

use crate::common::{
    Guarded, KIB, LIMIT, MIB, NAME, SPARSE_DATA, SPARSE_SIZE, Served, pattern, sparse_file, spawn, succeed, wait_for,
    within_limit,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;
use vmdr_shim::nbd::message::{ChunkHead, Request, encode_greeting, encode_option_reply};
use vmdr_shim::nbd::proto::{CONTEXT_ALLOCATION, ErrorCode, chunk, command, option, reply};
use vmdr_shim::nbd::{Client, ClientError, Extent};

fn data_of(extents: &[Extent], mut at: u64) -> Vec<(u64, u64)> {
    let mut data = Vec::new();
    for extent in extents {
        if !extent.zero {
            data.push((at, extent.length));
        }
        at += extent.length;
    }
    data
}

/// Everything a client is for, on a disk with [`SPARSE_DATA`]; `unit` is how finely the server tells holes.
fn examine(client: &mut Client, file: &Path) {
    let content = std::fs::read(file).unwrap();
    assert_eq!(client.size_bytes(), SPARSE_SIZE);
    assert!(client.has_block_status());
    assert_eq!(data_of(&client.block_status(0, SPARSE_SIZE).unwrap(), 0), SPARSE_DATA);
    let mut whole = vec![0xff; SPARSE_SIZE as usize];
    client.read(0, &mut whole).unwrap();
    assert!(whole == content, "a read of everything, larger than one request may be");
    for (offset, length) in [(0, 1), (1, 1), (511, 2), (65_535, 3), (3 * MIB - 5, 4099), (SPARSE_SIZE - 7, 7)] {
        let mut part = vec![0xff; length];
        client.read(offset, &mut part).unwrap();
        assert_eq!(part, content[offset as usize..][..length], "{length} at {offset}");
        let extents = client.block_status(offset, length as u64).unwrap();
        assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), length as u64);
    }
    assert_eq!(
        client.block_status(3 * MIB - 5, 10).unwrap(),
        [Extent { length: 5, hole: true, zero: true }, Extent { length: 5, hole: false, zero: false }]
    );
    assert_eq!(client.block_status(0, 0).unwrap(), []);
    client.read(SPARSE_SIZE, &mut []).unwrap();
    for (offset, length) in [(SPARSE_SIZE, 1), (u64::MAX, 1), (SPARSE_SIZE - 1, 2)] {
        assert!(matches!(client.read(offset, &mut vec![0; length]), Err(ClientError::Range { .. })));
        assert!(matches!(client.block_status(offset, length as u64), Err(ClientError::Range { .. })));
    }
    client.read(0, &mut whole[..64]).unwrap();
    assert_eq!(whole[..64], pattern(0, 64));
}

#[test]
fn our_own_server_is_read() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, SPARSE_SIZE, &SPARSE_DATA);
    let served = Served::over(dir, file, true);
    examine(&mut served.client(), &served.file);
}

/// `qemu-nbd` on an image, and its socket.
fn qemu_nbd(dir: &TempDir, format: &str, image: &Path, extra: &[&str]) -> (Guarded, PathBuf) {
    let socket = dir.path().join("qemu.sock");
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=4", "--read-only", "--export-name", NAME, "--format", format]);
    command.args(extra).arg("--socket").arg(&socket).arg(image);
    let child = spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
    wait_for("qemu-nbd", || Client::connect(&socket, NAME, LIMIT).is_ok());
    (child, socket)
}

#[test]
fn qemu_nbd_is_read_whatever_the_format() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, SPARSE_SIZE, &SPARSE_DATA);
    let qcow = dir.path().join("disk.qcow2");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", file.to_str().unwrap(), qcow.to_str().unwrap()]);
    for (format, image) in [("raw", &file), ("qcow2", &qcow)] {
        let (_qemu, socket) = qemu_nbd(&dir, format, image, &[]);
        examine(&mut Client::connect(&socket, NAME, LIMIT).unwrap(), &file);
        let refused = Client::connect(&socket, "other", LIMIT).err().unwrap();
        assert!(matches!(refused, ClientError::Export { .. }), "{refused}");
        drop(_qemu);
        std::fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn an_error_reply_leaves_the_connection_usable() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, 4 * MIB, &[(0, 4 * MIB)]);
    let served = Served::over(dir, file, true);
    let mut client = served.client();
    // The file shrinks under the server: its second half cannot be read any more.
    std::fs::File::options().write(true).open(&served.file).unwrap().set_len(2 * MIB).unwrap();
    let mut buf = vec![0; 64 << 10];
    match client.read(3 * MIB, &mut buf) {
        Err(ClientError::Refused { code: ErrorCode::Io, text, .. }) => assert!(text.contains("disk.raw"), "{text}"),
        other => panic!("{other:?}"),
    }
    client.read(MIB, &mut buf).unwrap();
    assert_eq!(buf, pattern(MIB, 64 * KIB));
}

#[test]
fn a_server_that_is_killed_breaks_the_client_and_nothing_hangs() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, MIB, &[(0, MIB)]);
    let (qemu, socket) = qemu_nbd(&dir, "raw", &file, &[]);
    let mut client = Client::connect(&socket, NAME, LIMIT).unwrap();
    drop(qemu);
    let mut buf = [0; 512];
    assert!(matches!(client.read(0, &mut buf), Err(ClientError::Io { .. })));
    assert!(matches!(client.read(0, &mut buf), Err(ClientError::Broken)));
    assert!(matches!(client.block_status(0, 512), Err(ClientError::Broken)));
    assert!(matches!(Client::connect(&socket, NAME, LIMIT), Err(ClientError::Connect { .. })));
}

/// A socket that nobody accepts on; the kernel takes as many connections as `backlog` says.
fn unattended(path: &Path, backlog: i32) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, backlog).unwrap();
    socket
}

#[test]
fn a_server_that_says_nothing_costs_the_timeout() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("mute.sock");
    let _socket = unattended(&path, 0);
    let attempt = || {
        let path = path.clone();
        within_limit("connect", move || Client::connect(&path, NAME, Duration::from_millis(50)).err().unwrap())
    };
    // The first is in the backlog and waits for a greeting, the next cannot even connect.
    let error = attempt();
    assert!(matches!(error, ClientError::Io { .. }), "{error}");
    let error = attempt();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}

/// A server that greets properly, agrees to everything, and then answers each request as `script` says.
fn fake_server(
    dir: &TempDir,
    size: u64,
    script: impl Fn(&Request, &mut UnixStream) + Send + 'static,
) -> (PathBuf, JoinHandle<()>) {
    let socket = dir.path().join("fake.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&encode_greeting(3)).unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
        loop {
            let mut head = [0; 16];
            stream.read_exact(&mut head).unwrap();
            let asked = u32::from_be_bytes(head[8..12].try_into().unwrap());
            let length = u32::from_be_bytes(head[12..].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize]).unwrap();
            let mut say = |kind, data: &[u8]| stream.write_all(&encode_option_reply(asked, kind, data)).unwrap();
            if asked == option::SET_META_CONTEXT {
                say(reply::META_CONTEXT, &[&7u32.to_be_bytes()[..], CONTEXT_ALLOCATION.as_bytes()].concat());
            } else if asked == option::GO {
                say(reply::INFO, &[&[0, 0][..], &size.to_be_bytes(), &[0, 1]].concat());
            }
            say(reply::ACK, &[]);
            if asked == option::GO {
                break;
            }
        }
        let mut bytes = [0; Request::BYTES];
        while stream.read_exact(&mut bytes).is_ok() {
            let request = Request::decode(&bytes).unwrap();
            if request.command == command::DISC {
                break;
            }
            script(&request, &mut stream);
        }
    });
    (socket, thread)
}

fn say_chunk(stream: &mut UnixStream, cookie: u64, flags: u16, kind: u16, payload: &[u8]) {
    let head = ChunkHead { flags, kind, cookie, length: payload.len() as u32 };
    // The client hangs up at the first thing that is wrong.
    let _ = stream.write_all(&[&head.encode()[..], payload].concat());
}

fn data_chunk(offset: u64, data: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], data].concat()
}

fn hole_chunk(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

/// The chunks of one reply: flags, kind, payload.
type Script = Vec<(u16, u16, Vec<u8>)>;

fn with_read_reply(chunks: Script) -> (Result<(), ClientError>, Vec<u8>) {
    let dir = TempDir::new().unwrap();
    let (socket, thread) = fake_server(&dir, MIB, move |request, stream| {
        for (flags, kind, payload) in &chunks {
            say_chunk(stream, request.cookie, *flags, *kind, payload);
        }
    });
    let mut client = Client::connect(&socket, NAME, LIMIT).unwrap();
    let mut buf = vec![0xff; 16];
    let result = client.read(4096, &mut buf);
    drop(client);
    thread.join().unwrap();
    (result, buf)
}

#[test]
fn replies_in_pieces_and_out_of_order_are_put_together() {
    let (result, buf) = with_read_reply(vec![
        (0, chunk::OFFSET_DATA, data_chunk(4104, &[2; 8])),
        (0, chunk::OFFSET_HOLE, hole_chunk(4096, 4)),
        (0, chunk::OFFSET_DATA, data_chunk(4100, &[1; 4])),
        (1, chunk::NONE, vec![]),
    ]);
    result.unwrap();
    assert_eq!(buf, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]);
}

#[test]
fn replies_that_do_not_cover_the_request_exactly_are_refused() {
    let data = |offset, length: usize| (0, chunk::OFFSET_DATA, data_chunk(offset, &vec![1; length]));
    let hole = |offset, length| (0, chunk::OFFSET_HOLE, hole_chunk(offset, length));
    let done = || (1, chunk::NONE, vec![]);
    let cases: Vec<(&str, Script)> = vec![
        ("nothing", vec![done()]),
        ("a gap", vec![data(4096, 8), done()]),
        ("one byte too few", vec![data(4096, 15), done()]),
        ("twice the same", vec![data(4096, 8), data(4096, 8), done()]),
        ("an overlap", vec![data(4096, 9), hole(4104, 8), done()]),
        ("an overlap from before", vec![data(4104, 8), data(4096, 9), done()]),
        ("around", vec![data(4100, 4), data(4096, 16), done()]),
        ("before the start", vec![data(4095, 16), done()]),
        ("beyond the end", vec![data(4097, 16), done()]),
        ("far away", vec![data(u64::MAX, 16), done()]),
        ("an endless hole", vec![hole(4096, u32::MAX), done()]),
        ("an empty chunk", vec![data(4096, 0), data(4096, 16), done()]),
        ("an odd hole", vec![(0, chunk::OFFSET_HOLE, vec![0; 13]), done()]),
        ("a short chunk", vec![(1, chunk::OFFSET_DATA, vec![0; 7])]),
        ("extents", vec![(1, chunk::BLOCK_STATUS, vec![0; 12])]),
        ("a short error", vec![(1, chunk::ERROR, vec![0; 5])]),
        ("an error that announces too much", vec![(1, chunk::ERROR, vec![0, 0, 0, 5, 0, 9, 65])]),
        ("an endless error", vec![(1, chunk::ERROR, vec![0; 1 << 20])]),
    ];
    for (what, chunks) in cases {
        let (result, _) = with_read_reply(chunks);
        assert!(matches!(result, Err(ClientError::Proto { .. })), "{what}: {result:?}");
    }
    let (result, _) = with_read_reply(vec![
        data(4096, 16),
        (1, chunk::ERROR_OFFSET, [&[0, 0, 0, 5, 0, 3][..], b"bad", &[0; 8]].concat()),
    ]);
    assert!(
        matches!(&result, Err(ClientError::Refused { code: ErrorCode::Io, text, .. }) if text == "bad"),
        "{result:?}"
    );
}

#[test]
fn extents_that_make_no_sense_are_refused() {
    let status = |id: u32, extents: &[(u32, u32)]| {
        let mut payload = id.to_be_bytes().to_vec();
        for (length, state) in extents {
            payload.extend_from_slice(&length.to_be_bytes());
            payload.extend_from_slice(&state.to_be_bytes());
        }
        payload
    };
    let ask = |payload: Vec<u8>| {
        let dir = TempDir::new().unwrap();
        let (socket, thread) = fake_server(&dir, MIB, move |request, stream| {
            say_chunk(stream, request.cookie, chunk::FLAG_DONE, chunk::BLOCK_STATUS, &payload);
        });
        let mut client = Client::connect(&socket, NAME, LIMIT).unwrap();
        let result = client.block_status(512, 1024);
        drop(client);
        thread.join().unwrap();
        result
    };
    // Beyond what was asked: the last one may, and is cut off.
    let told = ask(status(7, &[(24, 0), (u32::MAX, 3)])).unwrap();
    let expected = [Extent { length: 24, hole: false, zero: false }, Extent { length: 1000, hole: true, zero: true }];
    assert_eq!(told, expected);
    // In pieces, one per question, each the same: together they are one.
    assert_eq!(ask(status(7, &[(100, 2)])).unwrap(), [Extent { length: 1024, hole: false, zero: true }]);
    for (what, payload) in [
        ("none", status(7, &[])),
        ("nothing", vec![]),
        ("another context", status(8, &[(1024, 0)])),
        ("an empty one", status(7, &[(0, 0), (1024, 0)])),
        ("one behind the end", status(7, &[(1024, 0), (1, 3)])),
        ("half of one", status(7, &[(1024, 0)])[..10].to_vec()),
    ] {
        let result = ask(payload);
        assert!(matches!(result, Err(ClientError::Proto { .. })), "{what}: {result:?}");
    }
}

#[test]
fn random_bytes_from_a_server_are_an_error() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..150 {
        let dir = TempDir::new().unwrap();
        let mut bytes = vec![0; rng.random_range(1..400)];
        rng.fill(&mut bytes[..]);
        if round % 2 == 0 {
            let socket = dir.path().join("random.sock");
            let listener = UnixListener::bind(&socket).unwrap();
            if round % 4 == 0 {
                bytes = [encode_greeting(3), encode_option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]), bytes]
                    .concat();
            }
            let thread = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            });
            assert!(Client::connect(&socket, NAME, LIMIT).is_err());
            thread.join().unwrap();
            continue;
        }
        let (socket, thread) = fake_server(&dir, MIB, move |request, stream| {
            let mut bytes = bytes.clone();
            if request.cookie % 2 == 1 && bytes.len() > 20 {
                bytes[..4].copy_from_slice(&0x668e_33efu32.to_be_bytes());
                (bytes[6], bytes[7]) = (0, u8::from(bytes[20] > 128));
                bytes[8..16].copy_from_slice(&request.cookie.to_be_bytes());
            }
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
        });
        let mut client = Client::connect(&socket, NAME, LIMIT).unwrap();
        let mut buf = vec![0; 8192];
        assert!(client.read(0, &mut buf).is_err());
        assert!(matches!(client.block_status(0, 512), Err(ClientError::Broken)));
        drop(client);
        thread.join().unwrap();
    }
}
