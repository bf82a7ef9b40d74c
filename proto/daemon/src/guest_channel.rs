//! The host's end of the channel to a guest's tools: tells them the time, and asks them to freeze and thaw, or for other addresses.
//!
//! Where a domain's definition has a virtio channel named [`vmdr_guest_channel::PORT`], QEMU listens on a unix socket for
//! whoever wants to talk to the guest. While a domain is protected, a thread of the agent's does, and for a while after an
//! activation one of the receiver's. It answers: the guest asks for
//! the time and steers its own clock; nothing that the guest sends makes the agent do anything but answer, show what the guest
//! claims, and hand the answer to a question to whoever has asked it ([`Line`]) and waits for so long and no longer. So a guest
//! without tools, one that talks nonsense and one that floods the channel are all the same to protection: what is read is
//! limited in speed ([`PACE`]) and in size, what cannot be sent at once is dropped, and the guest asks again.
//!
//! QEMU takes one connection. Another one waits until its socket is free, without a thread that hangs in connect(2).

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmdr_guest_channel::{Decoder, Frame, Hello, Message, features};

/// How often QEMU's socket is tried.
const RETRY: Duration = Duration::from_secs(2);
/// How often the guest is greeted until it answers.
const GREET: Duration = Duration::from_secs(2);
/// How often the thread looks whether it should end.
const LOOK: Duration = Duration::from_millis(100);
/// How long a guest that does not read may keep an answer waiting.
const SEND_LIMIT: Duration = Duration::from_millis(50);
/// Bytes read at once: more than a guest's questions of a second...
const READ_BYTES: usize = 2048;
/// ...and the rest after that many (less after less): 40 KB/s is what a guest can make us read.
const PACE: Duration = Duration::from_millis(50);
/// A guest that has not asked for this long does not steer its clock.
const SILENCE: Duration = Duration::from_secs(5);

/// What the guest's tools say of themselves. Claims of the guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// Name and version, printable.
    pub software: String,
    /// How far its clock was behind when it last looked, in seconds; nothing while it does not ask.
    pub clock_offset_seconds: Option<f64>,
}

#[derive(Debug, Default)]
struct Seen {
    tools: Option<String>,
    features: u32,
    asked: Option<(Instant, i64)>,
}

/// A channel that is kept open. Dropping it closes it.
#[derive(Debug)]
pub struct GuestChannel {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    line: Arc<Line>,
}

/// Questions to the guest, over the channel's connection of the moment. One is waited for at a time.
#[derive(Debug, Default)]
pub struct Line {
    stream: Mutex<Option<UnixStream>>,
    waiting: Mutex<Option<(u32, SyncSender<Message>)>>,
    number: AtomicU32,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Nothing is connected, or was until the answer came.
    #[error("the channel to the guest's tools is not connected")]
    Closed,
    /// It did not come in time.
    #[error("the guest's tools did not answer in time")]
    Late,
}

impl Line {
    /// A number for a question.
    pub fn number(&self) -> u32 {
        self.number.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends something, if that is possible at once.
    pub fn tell(&self, number: u32, message: Message) -> Result<(), NoAnswer> {
        let stream = lock(&self.stream);
        let stream = stream.as_ref().ok_or(NoAnswer::Closed)?;
        match send(stream, &Frame { number, message }) {
            Ok(true) => Ok(()),
            Ok(false) => Err(NoAnswer::Late),
            Err(_) => Err(NoAnswer::Closed),
        }
    }

    /// Asks, and waits for the answer that has the question's number. Whoever waits already waits in vain from then on.
    pub fn ask(&self, number: u32, message: Message, limit: Duration) -> Result<Message, NoAnswer> {
        let (sender, answer) = sync_channel(1);
        *lock(&self.waiting) = Some((number, sender));
        let told = self.tell(number, message);
        let answered = told.and_then(|()| {
            answer.recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => NoAnswer::Late,
                RecvTimeoutError::Disconnected => NoAnswer::Closed,
            })
        });
        lock(&self.waiting).take_if(|(waiting, _)| *waiting == number);
        answered
    }

    fn answered(&self, number: u32, message: Message) {
        if let Some((_, sender)) = lock(&self.waiting).take_if(|(waiting, _)| *waiting == number) {
            // Whoever has asked may have gone.
            let _ = sender.try_send(message);
        }
    }

    fn set(&self, stream: Option<UnixStream>) {
        if stream.is_none() {
            *lock(&self.waiting) = None;
        }
        *lock(&self.stream) = stream;
    }
}

impl GuestChannel {
    /// Talks to the guest behind `socket` from now on. `tell_time`: its clock may be steered.
    pub fn open(domain: &str, socket: PathBuf, tell_time: bool) -> std::io::Result<Self> {
        let (stop, seen, line) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::<Line>::default());
        // Another agent's questions are answered late, perhaps: not by the same numbers.
        line.number.store(uuid::Uuid::new_v4().as_fields().0, Ordering::Relaxed);
        let domain = domain.to_owned();
        let talk = Talk { domain, tell_time, stop: stop.clone(), seen: Arc::clone(&seen), line: line.clone() };
        std::thread::Builder::new().name(format!("guest {}", talk.domain)).spawn(move || talk.run(&socket))?;
        Ok(Self { stop, seen, line })
    }

    /// Somebody who freezes when asked to, or why there is nobody.
    pub fn freezer(&self) -> Result<Arc<Line>, &'static str> {
        self.line(features::FREEZE, "they are of a version that cannot freeze")
    }

    /// Somebody who changes the guest's network when asked to, or why there is nobody.
    pub fn networker(&self) -> Result<Arc<Line>, &'static str> {
        self.line(features::NETWORK, "they are of a version that cannot change addresses")
    }

    fn line(&self, feature: u32, without: &'static str) -> Result<Arc<Line>, &'static str> {
        let seen = lock(&self.seen);
        match seen.tools {
            None => Err("they have not been heard of"),
            Some(_) if seen.features & feature == 0 => Err(without),
            Some(_) => Ok(Arc::clone(&self.line)),
        }
    }

    /// Asks whether the guest is alive and ready, by its own account: how many seconds its tools have been running, and whether it
    /// is.
    pub fn heartbeat(&self, limit: Duration) -> Result<(u32, bool), String> {
        let line = self.line(features::HEARTBEAT, "they are of a version without a heartbeat")?;
        match line.ask(line.number(), Message::HeartbeatAsk, limit).map_err(|error| error.to_string())? {
            Message::Heartbeat { up_seconds, ready } => Ok((up_seconds, ready)),
            _ => Err("the guest's tools answer something else".to_owned()),
        }
    }

    /// Whether the tools have been heard of, whatever they can do.
    pub fn is_greeted(&self) -> bool {
        lock(&self.seen).tools.is_some()
    }

    /// What the guest's tools say, if there are any.
    pub fn tools(&self) -> Option<Tools> {
        let seen = lock(&self.seen);
        let software = seen.tools.clone()?;
        let asked = seen.asked.filter(|(at, _)| at.elapsed() < SILENCE);
        Some(Tools { software, clock_offset_seconds: asked.map(|(_, offset_ns)| offset_ns as f64 / 1e9) })
    }
}

impl Drop for GuestChannel {
    fn drop(&mut self) {
        // The thread sees it within LOOK. QEMU has a successor wait until its socket is free.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock<T>(values: &Mutex<T>) -> MutexGuard<'_, T> {
    // Independent values: valid after a panic.
    values.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects, if that is possible at once: not while QEMU's socket has somebody who waits already.
fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

struct Talk {
    domain: String,
    tell_time: bool,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    line: Arc<Line>,
}

impl Talk {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn run(&self, socket: &Path) {
        while !self.stopped() {
            // Another program may have the socket, or the guest may be ending: both are tried again without a word.
            if let Ok(stream) = connect(socket) {
                let ended = self.converse(&stream);
                *lock(&self.seen) = Seen::default();
                self.line.set(None);
                if let Err(error) = ended {
                    tracing::debug!(domain = self.domain, "the channel to the guest's tools: {error}");
                }
            }
            let until = Instant::now() + RETRY;
            while !self.stopped() && Instant::now() < until {
                std::thread::sleep(LOOK);
            }
        }
    }

    /// Talks until the other end is gone or this one is told to stop.
    fn converse(&self, stream: &UnixStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(SEND_LIMIT))?;
        self.line.set(Some(stream.try_clone()?));
        let mut from = stream;
        let mut decoder = Decoder::default();
        let mut greet = Instant::now();
        while !self.stopped() {
            if lock(&self.seen).tools.is_none() && Instant::now() >= greet {
                greet = Instant::now() + GREET;
                send(stream, &Frame { number: 0, message: Message::Hello(self.hello(true)) })?;
            }
            let mut buffer = [0; READ_BYTES];
            let bytes = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(bytes) => bytes,
                Err(error) if is_wait(&error) => continue,
                Err(error) => return Err(error),
            };
            let mut rest = &buffer[..bytes];
            while let Some(frame) = decoder.next(&mut rest) {
                // One that does not read gets no further answers to what it has asked at once.
                if let Some(message) = self.answer(frame.number, frame.message)
                    && !send(stream, &Frame { number: frame.number, message })?
                {
                    break;
                }
            }
            std::thread::sleep(PACE.mul_f64(bytes as f64 / READ_BYTES as f64));
        }
        Ok(())
    }

    fn hello(&self, answer: bool) -> Hello {
        let clock = if self.tell_time { features::CLOCK } else { 0 };
        Hello::own(clock, answer, concat!("vmdr ", env!("CARGO_PKG_VERSION")))
    }

    fn answer(&self, number: u32, message: Message) -> Option<Message> {
        match message {
            Message::Hello(hello) => {
                let mut seen = lock(&self.seen);
                if hello.common_version().is_none() && seen.tools.is_none() {
                    tracing::warn!(
                        domain = self.domain,
                        "the guest's tools speak versions {} to {} of the guest protocol, not {}",
                        hello.oldest,
                        hello.newest,
                        vmdr_guest_channel::VERSION
                    );
                }
                seen.tools = Some(printable(&hello.software));
                seen.features = if hello.common_version().is_some() { hello.features } else { 0 };
                hello.answer.then(|| Message::Hello(self.hello(false)))
            }
            Message::ClockAsk { offset_ns, .. } if self.tell_time => {
                lock(&self.seen).asked = Some((Instant::now(), offset_ns));
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Some(Message::ClockIs { host_unix_ns: since.as_nanos() as u64 })
            }
            Message::Frozen { .. }
            | Message::Thawed { .. }
            | Message::Heartbeat { .. }
            | Message::NetworkIs { .. }
            | Message::Unsupported(_) => {
                self.line.answered(number, message);
                None
            }
            other => Some(Message::Unsupported(other.kind())),
        }
    }
}

/// Sends what the other end takes at once, and says whether it took anything. Half a frame is found to be none. (Two threads
/// send: the kernel takes a frame of either as a whole, or its beginning.)
fn send(mut stream: &UnixStream, frame: &Frame) -> std::io::Result<bool> {
    match stream.write(&frame.encode()) {
        Ok(_) => Ok(true),
        Err(error) if is_wait(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_wait(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// The guest chose it: no control characters get into a terminal or a log.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A channel to a "guest" that is this test.
    fn guest(tell_time: bool) -> (GuestChannel, UnixStream, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port");
        let listener = UnixListener::bind(&path).unwrap();
        let channel = GuestChannel::open("web1", path, tell_time).unwrap();
        let stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (channel, stream, directory)
    }

    fn next(stream: &mut UnixStream) -> Frame {
        let mut decoder = Decoder::default();
        loop {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            if let Some(frame) = decoder.next(&mut &byte[..]) {
                return frame;
            }
        }
    }

    fn say(stream: &mut UnixStream, number: u32, message: Message) {
        stream.write_all(&Frame { number, message }.encode()).unwrap();
    }

    const ASK: Message = Message::ClockAsk { guest_unix_ns: 1, offset_ns: 7_000_000, rate_ppm: 0 };

    #[test]
    fn a_guest_is_greeted_and_told_the_time() {
        let (channel, mut stream, _directory) = guest(true);
        let Message::Hello(hello) = next(&mut stream).message else { panic!("no hello") };
        assert!(hello.answer && hello.features == features::CLOCK);
        assert_eq!(channel.tools(), None);
        say(&mut stream, 5, Message::Hello(Hello::own(features::CLOCK, true, "tools\u{1b}[2J 9")));
        let answer = next(&mut stream);
        assert!(answer.number == 5 && matches!(answer.message, Message::Hello(Hello { answer: false, .. })));
        say(&mut stream, 6, ASK);
        let Frame { number: 6, message: Message::ClockIs { host_unix_ns } } = next(&mut stream) else {
            panic!("no time")
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        assert!(now >= host_unix_ns && now - host_unix_ns < 20_000_000_000);
        let tools = Tools { software: "tools[2J 9".to_owned(), clock_offset_seconds: Some(0.007) };
        assert_eq!(channel.tools(), Some(tools));
        say(&mut stream, 7, Message::Unknown(999));
        assert_eq!(next(&mut stream), Frame { number: 7, message: Message::Unsupported(999) });
    }

    #[test]
    fn a_clock_that_is_not_to_be_steered_is_not() {
        let (channel, mut stream, _directory) = guest(false);
        let Message::Hello(hello) = next(&mut stream).message else { panic!("no hello") };
        assert_eq!(hello.features, 0);
        say(&mut stream, 1, Message::Hello(Hello::own(0, false, "tools")));
        say(&mut stream, 2, ASK);
        assert_eq!(next(&mut stream), Frame { number: 2, message: Message::Unsupported(ASK.kind()) });
        assert_eq!(channel.tools().unwrap().clock_offset_seconds, None);
    }

    #[test]
    fn a_guest_that_floods_and_never_reads_holds_nobody_up() {
        let (channel, stream, _directory) = guest(true);
        stream.set_nonblocking(true).unwrap();
        let flood: Vec<u8> = (0..200).flat_map(|number| Frame { number, message: ASK }.encode()).collect();
        let noise = [0xa5; 4096];
        let mut taken = 0;
        let until = Instant::now() + Duration::from_millis(600);
        while Instant::now() < until {
            for bytes in [&flood[..], &noise[..]] {
                taken += (&stream).write(bytes).unwrap_or(0);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // What the kernel's buffers hold, and what the pace lets through in that time.
        assert!(taken < 2_000_000, "{taken} bytes were taken");
        let stop = channel.stop.clone();
        drop(channel);
        let gone = || Arc::strong_count(&stop) == 1;
        let until = Instant::now() + Duration::from_secs(20);
        while !gone() && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        assert!(gone(), "the thread goes on");
    }

    #[test]
    fn a_question_is_answered_by_its_number_or_not_at_all() {
        let (channel, mut stream, _directory) = guest(true);
        assert_eq!(channel.freezer().unwrap_err(), "they have not been heard of");
        say(&mut stream, 1, Message::Hello(Hello::own(features::CLOCK, true, "old tools")));
        assert!(matches!(next(&mut stream).message, Message::Hello(_)));
        while !matches!(next(&mut stream).message, Message::Hello(Hello { answer: false, .. })) {}
        assert_eq!(channel.freezer().unwrap_err(), "they are of a version that cannot freeze");
        say(&mut stream, 2, Message::Hello(Hello::own(features::FREEZE, true, "tools")));
        while !matches!(next(&mut stream).message, Message::Hello(Hello { answer: false, .. })) {}
        let line = channel.freezer().unwrap();
        let thawed = |text: &str| Message::Thawed { held: true, frozen_ms: 1, text: text.to_owned() };
        let limit = Duration::from_secs(20);
        std::thread::scope(|scope| {
            let (asker, number) = (line.clone(), line.number());
            let asked = scope.spawn(move || asker.ask(number, Message::Thaw { freeze: 3 }, limit));
            let asked_here = next(&mut stream);
            assert_eq!(asked_here, Frame { number, message: Message::Thaw { freeze: 3 } });
            say(&mut stream, number.wrapping_add(1), thawed("not asked"));
            say(&mut stream, number, thawed("asked"));
            assert_eq!(asked.join().unwrap(), Ok(thawed("asked")));
        });
        let late = line.ask(line.number(), Message::Freeze { hold_ms: 1 }, Duration::from_millis(50));
        assert_eq!(late, Err(NoAnswer::Late));
        drop(stream);
        let closed = line.ask(line.number(), Message::Freeze { hold_ms: 1 }, limit);
        assert_eq!(closed, Err(NoAnswer::Closed));
    }

    #[test]
    fn a_guest_says_whether_it_is_ready() {
        let (channel, mut stream, _directory) = guest(true);
        let limit = Duration::from_secs(20);
        assert!(channel.heartbeat(limit).is_err_and(|why| why.contains("not been heard of")));
        say(&mut stream, 1, Message::Hello(Hello::own(features::HEARTBEAT, true, "tools")));
        while !matches!(next(&mut stream).message, Message::Hello(Hello { answer: false, .. })) {}
        assert_eq!(channel.networker().unwrap_err(), "they are of a version that cannot change addresses");
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| channel.heartbeat(limit));
            let Frame { number, message: Message::HeartbeatAsk } = next(&mut stream) else { panic!("no question") };
            say(&mut stream, number, Message::Heartbeat { up_seconds: 7, ready: false });
            assert_eq!(asked.join().unwrap(), Ok((7, false)));
        });
    }

    #[test]
    fn a_channel_that_waits_for_its_turn_leaves_no_thread_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port");
        let listener = UnixListener::bind(&path).unwrap();
        // As QEMU's: one may wait. It does, and the next would wait in connect(2).
        rustix::net::listen(&listener, 0).unwrap();
        let _first = connect(&path).unwrap();
        let channel = GuestChannel::open("web1", path.clone(), true).unwrap();
        std::thread::sleep(3 * LOOK);
        assert_eq!(channel.tools(), None);
        let stop = channel.stop.clone();
        drop(channel);
        let until = Instant::now() + Duration::from_secs(20);
        while Arc::strong_count(&stop) > 1 {
            assert!(Instant::now() < until, "the thread goes on");
            std::thread::sleep(LOOK);
        }
        // And it is its turn when the socket is free.
        let channel = GuestChannel::open("web1", path, true).unwrap();
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        assert!(matches!(next(&mut stream).message, Message::Hello(_)));
        drop(channel);
    }
}
