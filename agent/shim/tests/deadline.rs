//! A guest runs only while it may: a real QEMU (emulated, without a system) and a real shim beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmdr_proto::shim::{
    Arm, Cut, Detach, Fence, FromShim, GetState, Hello, NoPart, NoPartReason, Part, Pass, Resume, State, ToShim,
    from_shim, to_shim,
};
use vmdr_proto::{SHIM_VERSION, frame};
use vmdr_shim::arena::Arena;
use vmdr_shim::capture::Capture;
use vmdr_shim::config::{self, Config};
use vmdr_shim::deadline::{self, LIMIT, LOOK, Watch};
use vmdr_shim::monitor::{Address, Monitor};
use vmdr_shim::permission::{May, Permission, now};
use vmdr_shim::state_page::StatePage;
use vmdr_shim::{monitor, rescue};

const WAIT: Duration = Duration::from_secs(30);
/// A busy machine is no reason to fail; a guest that runs for longer than this is.
const STOPPED_WITHIN: Duration = Duration::from_millis(300);

/// A guest that spins in its firmware, with two monitors: one for the shim, one to look at it.
struct Guest {
    process: Child,
    directory: TempDir,
}

impl Guest {
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let socket = |name: &str| format!("unix:{},server=on,wait=off", directory.path().join(name).display());
        let process = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"])
            .args(["-qmp", &socket("shim.qmp"), "-qmp", &socket("test.qmp")])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU is installed by scripts/setup");
        let guest = Self { process, directory };
        wait_for("QEMU's sockets", || guest.path("shim.qmp").exists() && guest.path("test.qmp").exists());
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    fn monitor(&self) -> Address {
        Address::Socket(self.path("shim.qmp"))
    }

    fn look(&self) -> Monitor {
        Monitor::connect(&Address::Socket(self.path("test.qmp")), WAIT).unwrap()
    }

    /// As QEMU has it.
    fn status(&self) -> String {
        status(&mut self.look())
    }

    fn config(&self) -> Config {
        Config {
            domain_name: "one".to_owned(),
            domain_uuid: "22222222-1111-4111-8111-111111111111".to_owned(),
            protection: String::new(),
            qemu_pid: self.pid(),
            qemu_uid: 0,
            monitor: self.monitor(),
            directory: self.path("shim"),
            disks: Vec::new(),
            permission: Some(self.path("one.may")),
            arena_bytes: 64 << 20,
            cut_pages_max: 16 << 10,
            cut_limit_ms: 2000,
        }
    }

    fn permission(&self, may: May) -> Permission {
        Permission::open_or_create(&self.path("one.may"), may).unwrap().0
    }

    /// How it has ended, once it has.
    fn ended(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + WAIT;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "QEMU lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn status(monitor: &mut Monitor) -> String {
    monitor.execute("query-status", None).unwrap()["status"].as_str().unwrap().to_owned()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < until, "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The shim's program, and a connection to it.
struct Shim {
    process: Child,
    stream: UnixStream,
}

impl Shim {
    fn start(guest: &Guest) -> Self {
        let config = guest.config();
        std::fs::create_dir_all(&config.directory).unwrap();
        let file = guest.path("config.json");
        std::fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_vmdr-shim")).arg("run").arg("--config").arg(&file).spawn();
        let (process, socket) = (process.unwrap(), config.control_socket());
        let mut stream = None;
        wait_for("the shim", || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        let mut shim = Self { process, stream: stream.unwrap() };
        shim.state_after(to_shim::Request::Hello(Hello { protocol_version: SHIM_VERSION }));
        shim
    }

    fn ask(&mut self, request: to_shim::Request) -> from_shim::Reply {
        frame::write(&mut self.stream, &ToShim { request: Some(request) }).unwrap();
        frame::read::<FromShim>(&mut self.stream).unwrap().reply.unwrap()
    }

    fn state_after(&mut self, request: to_shim::Request) -> State {
        match self.ask(request) {
            from_shim::Reply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn state(&mut self) -> State {
        self.state_after(to_shim::Request::GetState(GetState {}))
    }

    /// Arms; the first cut has all of memory.
    fn arm(&mut self) {
        self.state_after(to_shim::Request::Arm(Arm { generation: 1, epoch: 1, seed: true, ..Arm::default() }));
        let passed = self.ask(to_shim::Request::Pass(Pass {}));
        assert!(matches!(passed, from_shim::Reply::Passed(_)), "{passed:?}");
    }

    fn cut(&mut self, hold: bool) -> Result<Part, NoPart> {
        match self.ask(to_shim::Request::Cut(Cut { pages_max: 1 << 20, hold })) {
            from_shim::Reply::Part(part) => {
                let release = vmdr_proto::shim::Release { epoch: part.epoch, part: part.part };
                self.state_after(to_shim::Request::Release(release));
                Ok(part)
            }
            from_shim::Reply::NoPart(no) => Err(no),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Lets the deadline pass and waits until the guest stands still. For how long it ran beyond it.
fn pass_deadline(permission: &Permission, guest: &mut Monitor) -> Duration {
    let end = now() + Duration::from_millis(200);
    permission.set(May::Until(end));
    let mut ran = Duration::ZERO;
    wait_for("the guest to stand still", || {
        let asked = now();
        if status(guest) == "running" {
            ran = asked.saturating_sub(end);
            return false;
        }
        true
    });
    ran
}

#[test]
fn a_guest_stops_at_the_deadline_and_goes_on_when_it_may_again() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let mut shim = Shim::start(&guest);
    let mut look = guest.look();
    let state = shim.state();
    assert_eq!((state.may, state.stopped), (Some(i64::MAX as u64), false));
    for _ in 0..3 {
        let ran = pass_deadline(&permission, &mut look);
        assert!(ran <= STOPPED_WITHIN, "{ran:?}");
        wait_for("the shim to know why", || shim.state().stopped);
        // Somebody else resumes it: not for long.
        look.execute("cont", None).unwrap();
        wait_for("it to be stopped again", || status(&mut look) == "paused");
        // Renewed.
        permission.set(May::Until(now() + WAIT));
        wait_for("the guest to go on", || status(&mut look) == "running");
        wait_for("the reason to be gone", || !shim.state().stopped);
    }
}

#[test]
fn a_deadline_that_is_put_off_in_time_stops_nothing() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let _shim = Shim::start(&guest);
    let mut look = guest.look();
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        permission.set(May::Until(now() + Duration::from_secs(2)));
        assert_eq!(status(&mut look), "running");
        std::thread::sleep(Duration::from_millis(50));
    }
    let events = look.events().unwrap();
    assert!(events.iter().all(|event| event.name != "STOP"), "{events:?}");
}

#[test]
fn cuts_over_the_deadline_do_not_let_it_run_on() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let mut shim = Shim::start(&guest);
    shim.arm();
    shim.cut(false).unwrap();
    let mut look = guest.look();
    for _ in 0..5 {
        let end = now() + Duration::from_millis(300);
        permission.set(May::Until(end));
        // One after another: one of them is over the deadline, or the look is between two.
        let refused = loop {
            match shim.cut(false) {
                Ok(_) => assert!(now() < end + Duration::from_secs(1), "cuts go on"),
                Err(no) if no.reason() == NoPartReason::NotPermitted => break no,
                Err(no) if no.reason() == NoPartReason::Pending => {}
                Err(no) => panic!("{no:?}"),
            }
        };
        assert!(now() >= end && refused.message.contains("lease"), "{refused:?}");
        wait_for("it to stand still", || status(&mut look) == "paused");
        look.events().unwrap();
        for _ in 0..20 {
            assert_eq!(shim.cut(false).unwrap_err().reason(), NoPartReason::NotPermitted);
            assert_eq!(status(&mut look), "paused");
        }
        assert!(look.events().unwrap().iter().all(|event| event.name != "RESUME"));
        permission.set(May::Always);
        wait_for("it to go on", || status(&mut look) == "running");
        wait_for("cuts to go on", || shim.cut(false).is_ok());
    }
}

#[test]
fn a_hold_stays_one_and_its_end_waits_for_the_permission() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let mut shim = Shim::start(&guest);
    shim.arm();
    shim.cut(true).unwrap();
    assert!(shim.state().held);
    permission.set(May::Never);
    std::thread::sleep(LOOK * 4);
    permission.set(May::Always);
    std::thread::sleep(LOOK * 4);
    // It was held before, and is.
    assert_eq!((shim.state().held, shim.state().stopped, guest.status().as_str()), (true, false, "paused"));
    permission.set(May::Never);
    let state = shim.state_after(to_shim::Request::Resume(Resume {}));
    assert_eq!((state.held, state.stopped, state.run_state.as_str()), (false, true, "paused"));
    std::thread::sleep(LOOK * 4);
    assert_eq!(guest.status(), "paused");
    permission.set(May::Always);
    wait_for("it to go on", || guest.status() == "running");
}

#[test]
fn what_somebody_else_has_paused_stays_paused() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let mut shim = Shim::start(&guest);
    guest.look().execute("stop", None).unwrap();
    permission.set(May::Never);
    std::thread::sleep(LOOK * 6);
    assert!(!shim.state().stopped);
    permission.set(May::Always);
    std::thread::sleep(LOOK * 6);
    assert_eq!(guest.status(), "paused");
}

#[test]
fn a_fenced_guest_does_not_go_on_with_a_permission() {
    let guest = Guest::start();
    let permission = guest.permission(May::Never);
    let mut shim = Shim::start(&guest);
    wait_for("it to be stopped", || shim.state().stopped);
    shim.state_after(to_shim::Request::Fence(Fence {}));
    permission.set(May::Always);
    std::thread::sleep(LOOK * 6);
    assert_eq!((shim.state().stopped, guest.status().as_str()), (false, "paused"));
}

#[test]
fn a_shim_that_ends_leaves_it_stopped_and_the_next_lets_it_go_on() {
    let guest = Guest::start();
    let permission = guest.permission(May::Always);
    let mut shim = Shim::start(&guest);
    permission.set(May::Never);
    wait_for("it to be stopped", || shim.state().stopped);
    shim.state_after(to_shim::Request::Detach(Detach { suspend: false }));
    shim.process.wait().unwrap();
    assert_eq!(guest.status(), "paused");
    // The one that follows has what was in force.
    let mut shim = Shim::start(&guest);
    let state = shim.state();
    assert_eq!((state.may, state.stopped, state.run_state.as_str()), (Some(0), true, "paused"));
    permission.set(May::Always);
    wait_for("it to go on", || guest.status() == "running");
}

#[test]
fn what_a_dead_shim_has_left_paused_is_not_resumed_while_it_may_not_run() {
    let guest = Guest::start();
    let permission = guest.permission(May::Never);
    let page = StatePage::create(&guest.path("state")).unwrap();
    page.set_paused(true);
    guest.look().execute("stop", None).unwrap();
    assert!(!rescue::resume_if_left_paused(&page, Some(&permission), &guest.monitor()).unwrap());
    assert_eq!((page.paused(), permission.stopped(), guest.status().as_str()), (false, true, "paused"));
    let mut monitor = Monitor::connect(&guest.monitor(), WAIT).unwrap();
    assert!(!rescue::go_on(&permission, &mut monitor).unwrap());
    permission.set(May::Always);
    assert!(rescue::go_on(&permission, &mut monitor).unwrap());
    assert_eq!((permission.stopped(), guest.status().as_str()), (false, "running"));
}

#[test]
fn a_monitor_that_hangs_costs_the_guest_its_life() {
    let mut guest = Guest::start();
    let permission = guest.permission(May::Always);
    let shim = Shim::start(&guest);
    guest.signal(rustix::process::Signal::STOP);
    // A request hangs with it.
    let mut stream = shim.stream.try_clone().unwrap();
    let asked = std::thread::spawn(move || {
        frame::write(&mut stream, &ToShim { request: Some(to_shim::Request::GetState(GetState {})) }).unwrap();
        let _ = frame::read::<FromShim>(&mut stream);
    });
    std::thread::sleep(LOOK);
    let end = now() + Duration::from_millis(200);
    permission.set(May::Until(end));
    guest.ended();
    let late = now() - end;
    assert!(late < LOOK + LIMIT + STOPPED_WITHIN, "{late:?}");
    asked.join().unwrap();
}

/// In this process, where a request can be made to hang.
fn watched(guest: &Guest) -> Arc<Mutex<Capture>> {
    let config = guest.config();
    std::fs::create_dir_all(&config.directory).unwrap();
    let page = Arc::new(StatePage::create(&config::state_page(&config.directory)).unwrap());
    let permission = Arc::new(Permission::open(&guest.path("one.may")).unwrap());
    let arena = Arena::new(config.arena_bytes).unwrap();
    let capture = Capture::new(config, page.clone(), Some(permission.clone()), arena, Vec::new()).unwrap();
    let breaker: Option<monitor::Breaker> = capture.breaker().unwrap();
    let capture = Arc::new(Mutex::new(capture));
    let (domain, monitor, qemu) = ("one".to_owned(), guest.monitor(), deadline::process(guest.pid()).unwrap());
    Watch { domain, permission, page, capture: capture.clone(), monitor, breaker, qemu }.start().unwrap();
    capture
}

#[test]
fn a_request_that_hangs_does_not_keep_the_guest_running() {
    let mut guest = Guest::start();
    let permission = guest.permission(May::Always);
    let capture = watched(&guest);
    let hangs = capture.lock().unwrap();
    let ran = pass_deadline(&permission, &mut guest.look());
    assert!(ran <= STOPPED_WITHIN + LOOK, "{ran:?}");
    assert!(permission.stopped() && guest.process.try_wait().unwrap().is_none());
    // What it waited on is gone.
    drop(hangs);
    assert!(deadline::lock(&capture).state().is_err());
}

#[test]
fn without_a_permission_there_is_no_shim() {
    let guest = Guest::start();
    let config = guest.config();
    let path: &Path = config.permission.as_deref().unwrap();
    assert!(!path.exists());
    let error = vmdr_shim::server::run(config).unwrap_err();
    assert!(format!("{error:#}").contains("whether the guest may run"), "{error:#}");
    assert_eq!(guest.status(), "running");
}
