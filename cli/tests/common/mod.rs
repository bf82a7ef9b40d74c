//! A host with vmdr daemons that answer as the test wants, and the real `vmdr` binary run against them.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use vmdr_proto::control::agent_server::{Agent, AgentServer};
use vmdr_proto::control::receiver_server::{Receiver, ReceiverServer};
use vmdr_proto::control::*;
use vmdr_proto::host::host_server::HostServer;

mod about_groups;
mod about_host;

/// Compares with the file of that name. `VMDR_GOLDEN=write` writes it instead, for a change that is meant.
#[track_caller]
pub fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("VMDR_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert!(text == expected, "{} is not what the command writes now:\n{text}", path.display());
}

/// For one run of the command, with two busy cores.
const RUN_LIMIT: Duration = Duration::from_secs(120);
/// 2026-01-31T12:00:00.123456789Z.
pub const CUT_UNIX_NS: u64 = 1_769_860_800_123_456_789;
pub const UUID: &str = "11111111-2222-4333-8444-555555555555";

type Calls = Arc<Mutex<Vec<String>>>;
type Stream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<Progress, Status>> + Send>>;

/// Both daemons' sockets in a directory of their own; what they were asked is recorded.
pub struct Host {
    directory: tempfile::TempDir,
    calls: Calls,
}

pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Host {
    /// A host without daemons.
    pub fn empty() -> Host {
        Host { directory: tempfile::tempdir().unwrap(), calls: Calls::default() }
    }

    pub fn with_both() -> Host {
        let host = Host::empty();
        host.start_agent();
        host.start_receiver();
        host
    }

    pub fn agent_socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub fn receiver_socket(&self) -> PathBuf {
        self.directory.path().join("receiver.sock")
    }

    pub fn start_agent(&self) {
        let listener = UnixListener::bind(self.agent_socket()).unwrap();
        let daemon = || Daemon { calls: self.calls.clone(), who: "agent" };
        let services = Server::builder().add_service(AgentServer::new(daemon())).add_service(HostServer::new(daemon()));
        tokio::spawn(services.serve_with_incoming(UnixListenerStream::new(listener)));
    }

    pub fn start_receiver(&self) {
        let listener = UnixListener::bind(self.receiver_socket()).unwrap();
        let daemon = || Daemon { calls: self.calls.clone(), who: "receiver" };
        let services =
            Server::builder().add_service(ReceiverServer::new(daemon())).add_service(HostServer::new(daemon()));
        tokio::spawn(services.serve_with_incoming(UnixListenerStream::new(listener)));
    }

    /// What the daemons were asked, in order, as `daemon request domain`.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    pub async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, None).await
    }

    /// Runs the command with this on its stdin, which is no terminal.
    pub async fn run_with(&self, arguments: &[&str], stdin: Option<&str>) -> Ran {
        let mut command = self.command(Path::new(env!("CARGO_BIN_EXE_vmdr")));
        command.args(arguments);
        finish(command, stdin.unwrap_or_default()).await
    }

    /// Runs the command on a terminal (made by `script`), with this typed. Its stdout and stderr come as one.
    pub async fn run_on_terminal(&self, arguments: &[&str], typed: &str, environment: &[(&str, &str)]) -> Ran {
        let mut line = env!("CARGO_BIN_EXE_vmdr").to_owned();
        for argument in arguments {
            line.push_str(&format!(" '{argument}'"));
        }
        let mut command = self.command(Path::new("script"));
        command.envs(environment.iter().copied());
        command.args(["--quiet", "--return", "--flush", "--echo", "never", "--command", &line, "/dev/null"]);
        finish(command, typed).await
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("TERM", "xterm").env("SHELL", "/bin/sh");
        command.env("VMDR_AGENT_SOCKET", self.agent_socket());
        command.env("VMDR_RECEIVER_SOCKET", self.receiver_socket());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }
}

async fn finish(mut command: Command, stdin: &str) -> Ran {
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // A command that never reads may have closed it already.
    let _ = input.write_all(stdin.as_bytes()).await;
    drop(input);
    let Output { status, stdout, stderr } =
        tokio::time::timeout(RUN_LIMIT, child.wait_with_output()).await.expect("the command did not end").unwrap();
    Ran {
        code: status.code().expect("ended by a signal"),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

impl Ran {
    /// Ended with this code, with exactly one line on stderr.
    #[track_caller]
    pub fn failed(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert_eq!(self.stderr.matches('\n').count(), 1, "one line: {:?}", self.stderr);
        self.stderr.strip_prefix("vmdr: ").expect(&self.stderr).trim_end()
    }

    /// Ended well, with nothing on stderr.
    #[track_caller]
    pub fn succeeded(&self) -> &str {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "stdout: {}", self.stdout);
        &self.stdout
    }
}

/// Answers by the domain's name.
struct Daemon {
    calls: Calls,
    who: &'static str,
}

impl Daemon {
    fn asked(&self, request: &str, domain: &str) -> Result<(), Status> {
        self.calls.lock().unwrap().push(format!("{} {request} {domain}", self.who).trim_end().to_owned());
        match domain {
            "unknown" => Err(Status::not_found("there is no domain 'unknown'; `virsh list --all` lists them")),
            "refused" => Err(Status::failed_precondition("hostdev0 is passed through\nfrom the host: detach it")),
            "twice" => Err(Status::already_exists("twice is protected already")),
            "lonely" => Err(Status::unavailable("the receiver b.example:7420 does not answer")),
            "odd" => Err(Status::invalid_argument("interval of 7 ms is below 25 ms")),
            "late" => Err(Status::deadline_exceeded("libvirt did not answer within 10 s")),
            "broken" => Err(Status::internal("disk vda: the mirror failed")),
            "idle" => Err(Status::failed_precondition("the domain is not held")),
            "seeding" => Err(Status::failed_precondition("the domain is seeding, not protected")),
            _ => Ok(()),
        }
    }
}

fn finding(severity: Severity, subject: &str, fact: &str, remedy: &str) -> Finding {
    Finding { severity: severity.into(), subject: subject.into(), fact: fact.into(), remedy: remedy.into() }
}

fn hostdev() -> Finding {
    finding(Severity::Refused, "hostdev0", "a PCI device of the host", "detach it")
}

/// What the plan has for one of the domains.
fn mapped(domain: &str) -> Vec<Mapped> {
    let mapped = Mapped {
        device: "NIC 52:54:00:12:34:56".into(),
        from: "bridge br0".into(),
        to: "bridge br-dmz, VLAN 120".into(),
    };
    if ["planned", "unhooked"].contains(&domain) { vec![mapped] } else { Vec::new() }
}

fn change(subject: &str, done: &str, error: &str) -> Change {
    Change { subject: subject.into(), done: done.into(), error: error.into() }
}

/// What was changed in the guest of a recovery plan.
fn changes() -> Vec<Change> {
    vec![
        change("NIC 52:54:00:12:34:56", "192.0.2.10/24, 0.0.0.0/0 via 192.0.2.1 on eth0", ""),
        change("resolver", "", "/etc/resolv.conf is a link to what another program writes; it was left as it is"),
    ]
}

fn hook(stage: &str, error: &str) -> HookRun {
    HookRun { stage: stage.into(), command: "/usr/local/sbin/tell web1".into(), seconds: 0.25, error: error.into() }
}

fn point(epoch: u64, newest: bool) -> Point {
    Point {
        id: format!("3-{epoch}"),
        generation: 3,
        epoch,
        cut_unix_ns: CUT_UNIX_NS - (1000 - epoch) * 100_000_000,
        consistency: "crash".into(),
        bytes: 512 << 20,
        pinned: !newest,
        newest,
        names: if newest { Vec::new() } else { vec!["before-upgrade".into()] },
        verified_unix_ns: if newest { 0 } else { CUT_UNIX_NS },
        damaged: false,
    }
}

/// A drill that passed, or failed.
fn drill(name: &str, passed: bool) -> DrillReport {
    let check =
        |check: &str, passed, said: &str| DrillCheck { check: check.into(), passed, said: said.into(), seconds: 5.0 };
    DrillReport {
        id: "0a1b2c".into(),
        name: name.into(),
        uuid: UUID.into(),
        point: "3-1000".into(),
        cut_unix_ns: CUT_UNIX_NS,
        result: if passed { "passed" } else { "failed" }.into(),
        started_unix_ns: CUT_UNIX_NS,
        ended_unix_ns: CUT_UNIX_NS + 9_000_000_000,
        age_seconds: 7200.0,
        copy_seconds: 0.25,
        rto_seconds: 1.5,
        copied_bytes: 5 << 20,
        shared_bytes: 512 << 20,
        checks: vec![
            check("runs", true, "in 5.0 s its vCPUs ran for 1.2 s, and no I/O failed"),
            check("tcp:22", passed, if passed { "10.0.0.5:22 takes connections" } else { "Connection\x1b[2J refused" }),
        ],
        ..DrillReport::default()
    }
}

fn policy() -> RetentionReply {
    let tier = |every_seconds, for_seconds| RetentionTier { every_seconds, for_seconds };
    let tiers = vec![tier(0, 600), tier(60, 86_400), tier(3600, 604_800)];
    RetentionReply {
        retention: Some(Retention { budget_bytes: 32 << 30, tiers }),
        history_bytes: 27 << 30,
        alarm: "the history has 27648 MiB of its budget of 32768 MiB".into(),
    }
}

fn progress(step: &str, done: u64, total: u64, unit: &str, message: &str) -> Result<Progress, Status> {
    let (step, unit, message) = (step.into(), unit.into(), message.into());
    Ok(Progress { step, done, total, unit, message, ..Progress::default() })
}

fn stream(messages: Vec<Result<Progress, Status>>) -> Response<Stream> {
    Response::new(Box::pin(tokio_stream::iter(messages)))
}

fn protected(name: &str) -> DomainStatus {
    DomainStatus {
        name: name.into(),
        uuid: UUID.into(),
        role: "protected".into(),
        state: "protected".into(),
        generation: 3,
        epoch: 1001,
        durable_epoch: 1000,
        rpo_seconds: 0.142,
        rpo_worst_hour_seconds: 0.391,
        pause_p50_seconds: 0.0046,
        pause_p99_seconds: 0.0123,
        dirty_pages_per_epoch: 496.5,
        bytes_per_epoch: 81920.0,
        link_bytes_per_second: 819200.0,
        peer: "b.example:7420".into(),
        interval_ms: 100,
        paused_ratio: 0.046,
        monitor: "direct".into(),
        ..DomainStatus::default()
    }
}

#[tonic::async_trait]
impl Agent for Daemon {
    async fn doctor(&self, request: Request<DoctorRequest>) -> Result<Response<DoctorReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("doctor", &domain)?;
        let mut findings = vec![
            finding(Severity::Ok, "qemu", "10.0.2", ""),
            finding(Severity::Warning, "clock", "kvmclock stands still in every pause", "use a TSC clock source"),
        ];
        if domain == "bad" {
            findings.push(hostdev());
        }
        Ok(Response::new(DoctorReply { findings }))
    }

    async fn prepare(&self, request: Request<DomainRequest>) -> Result<Response<PrepareReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("prepare", &domain)?;
        let qmp_socket = "/run/vmdr/qmp/web1.sock".into();
        let prepared = domain == "prepared";
        Ok(Response::new(PrepareReply { changed: !prepared, restart_needed: !prepared, qmp_socket }))
    }

    type ProtectStream = Stream;

    async fn protect(&self, request: Request<ProtectRequest>) -> Result<Response<Stream>, Status> {
        let ProtectRequest { domain, interval_ms, receiver, application_every_seconds, failover } =
            request.into_inner();
        self.asked("protect", &domain)?;
        self.calls.lock().unwrap().push(format!("interval {interval_ms} receiver {receiver}").trim_end().to_owned());
        if application_every_seconds > 0 {
            self.calls.lock().unwrap().push(format!("application every {application_every_seconds}"));
        }
        if !failover.is_empty() {
            self.calls.lock().unwrap().push(format!("failover {failover}"));
        }
        let mut messages = vec![
            progress("check", 0, 0, "", "warning: clock: kvmclock stands still in every pause"),
            progress("copy", 0, 0, "bytes", "starting"),
            progress("copy", 256 << 20, 512 << 20, "bytes", "seeding"),
        ];
        match domain.as_str() {
            "halfway" => messages.push(Err(Status::failed_precondition("halfway was shut down during the first copy"))),
            _ => messages.push(progress("protected", 0, 0, "", "epoch 1 is durable")),
        }
        Ok(stream(messages))
    }

    async fn unprotect(&self, request: Request<DomainRequest>) -> Result<Response<UnprotectReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("unprotect", &domain)?;
        Ok(Response::new(UnprotectReply { domain }))
    }

    async fn hold(&self, request: Request<DomainRequest>) -> Result<Response<HoldReply>, Status> {
        self.asked("hold", &request.into_inner().domain)?;
        Ok(Response::new(HoldReply { epoch: 1001 }))
    }

    async fn release(&self, request: Request<DomainRequest>) -> Result<Response<ReleaseReply>, Status> {
        self.asked("release", &request.into_inner().domain)?;
        Ok(Response::new(ReleaseReply {}))
    }

    async fn suspend(&self, request: Request<DomainRequest>) -> Result<Response<SuspendReply>, Status> {
        self.asked("suspend", &request.into_inner().domain)?;
        Ok(Response::new(SuspendReply { epoch: 1000 }))
    }

    async fn resume(&self, request: Request<DomainRequest>) -> Result<Response<ResumeReply>, Status> {
        self.asked("resume", &request.into_inner().domain)?;
        Ok(Response::new(ResumeReply {}))
    }

    type MoveAwayStream = Stream;

    async fn move_away(&self, request: Request<MoveRequest>) -> Result<Response<Stream>, Status> {
        let MoveRequest { domain, protect_back } = request.into_inner();
        self.asked("move", &domain)?;
        let moved = MoveReport {
            name: domain,
            uuid: UUID.into(),
            generation: 4,
            epoch: 1001,
            downtime_seconds: 0.75,
            protected_back: protect_back,
        };
        let last = Ok(Progress { step: "done".into(), moved: Some(moved), ..Progress::default() });
        Ok(stream(vec![progress("hand it over", 0, 0, "", ""), last]))
    }

    type ReprotectStream = Stream;

    async fn reprotect(&self, request: Request<ProtectRequest>) -> Result<Response<Stream>, Status> {
        self.asked("reprotect", &request.into_inner().domain)?;
        Ok(stream(vec![progress("protected", 0, 0, "", "epoch 2 is durable")]))
    }

    async fn own(&self, request: Request<OwnRequest>) -> Result<Response<OwnReply>, Status> {
        let OwnRequest { domain, force, reason } = request.into_inner();
        self.asked("own", &domain)?;
        self.calls.lock().unwrap().push(format!("force {force} reason {reason}").trim_end().to_owned());
        Ok(Response::new(OwnReply { name: domain, generation: 5, running: true }))
    }

    async fn create_point(&self, request: Request<PointRequest>) -> Result<Response<ApplicationPoint>, Status> {
        let PointRequest { domain, name, .. } = request.into_inner();
        self.asked("create-point", &format!("{domain} {name}"))?;
        if domain == "bare" {
            return Err(Status::failed_precondition("nobody in the guest can freeze its file systems"));
        }
        let consistency = "application".into();
        let point = Point { consistency, names: vec![name], pinned: true, ..point(999, false) };
        let (way, note) = ("vmdr's tools in the guest".into(), "not frozen: /boot/efi (vfat)".into());
        let made = ApplicationPoint { point: Some(point), frozen_seconds: 0.04, file_systems: 2, way, note };
        Ok(Response::new(made))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("status", &domain)?;
        let seeding = DomainStatus {
            state: "seeding".into(),
            epoch: 1,
            durable_epoch: 0,
            rpo_seconds: 0.0,
            pause_p50_seconds: 0.0,
            last_error: "the link\x1b[2J was lost".into(),
            advice: "wait for the first copy to end".into(),
            ..protected("db1")
        };
        let armed = FailoverStatus {
            stance: "armed".into(),
            lease_seconds: 12.4,
            message: "the backup site takes the guest by itself when this host is silent and its lease has ended"
                .into(),
        };
        let domains = match domain.as_str() {
            "" => vec![DomainStatus { failover: Some(armed), ..protected("web1") }, seeding],
            "db1" => vec![seeding],
            "held" => vec![DomainStatus { state: "held".into(), durable_epoch: 1001, ..protected("held") }],
            "web1" => vec![protected("web1")],
            _ => return Err(Status::not_found(format!("{domain} is not protected here"))),
        };
        Ok(Response::new(StatusReply { domains, ..StatusReply::default() }))
    }
}

#[tonic::async_trait]
impl Receiver for Daemon {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("status", &domain)?;
        if !["", "web2"].contains(&domain.as_str()) {
            return Err(Status::not_found(format!("nothing is stored here of {domain}")));
        }
        let standby = DomainStatus {
            name: "web2".into(),
            role: "standby".into(),
            state: "ready".into(),
            epoch: 77,
            durable_epoch: 77,
            stored_bytes: 3 << 30,
            pause_p50_seconds: 0.0,
            pause_p99_seconds: 0.0,
            paused_ratio: 0.0,
            monitor: String::new(),
            peer: "a.example".into(),
            drill: Some(drill("web2", true)),
            silent: "nothing was heard of the agent on a.example for 41 s (bound 30 s)".into(),
            silent_seconds: 41.5,
            ..protected("web2")
        };
        let groups = vec![about_groups::report("shop", false)];
        Ok(Response::new(StatusReply { notices: Vec::new(), domains: vec![standby], groups }))
    }

    type DrillStream = Stream;

    async fn drill(&self, request: Request<DrillRequest>) -> Result<Response<Stream>, Status> {
        let DrillRequest { domain, keep, wait, checks, run_seconds, .. } = request.into_inner();
        self.asked("drill", &domain)?;
        self.calls.lock().unwrap().push(format!("keep {keep} run {run_seconds} checks {checks:?}"));
        let mut report = drill(&domain, domain != "failing");
        if keep {
            report.kept = true;
            report.copy_name = format!("{domain}-drill-0a1b2c");
            report.bridges = vec!["vmdr-d0a1b2c0".into()];
        }
        if !wait {
            report = DrillReport { result: "under way".into(), ended_unix_ns: 0, checks: Vec::new(), ..report };
        }
        let last = Ok(Progress { step: "drill".into(), drill: Some(report), ..Progress::default() });
        Ok(stream(vec![progress("copy the recovery point", 0, 0, "", ""), last]))
    }

    async fn end_drill(&self, request: Request<DomainRequest>) -> Result<Response<DrillReport>, Status> {
        let domain = request.into_inner().domain;
        self.asked("end-drill", &domain)?;
        Ok(Response::new(drill(&domain, true)))
    }

    async fn points(&self, request: Request<DomainRequest>) -> Result<Response<PointsReply>, Status> {
        let domain = request.into_inner().domain;
        self.asked("points", &domain)?;
        let points = if domain == "fresh" { Vec::new() } else { vec![point(1000, true), point(990, false)] };
        let retention = Some(RetentionReply { alarm: String::new(), ..policy() });
        Ok(Response::new(PointsReply { points, retention }))
    }

    async fn create_point(&self, request: Request<PointRequest>) -> Result<Response<Point>, Status> {
        let PointRequest { domain, name, point: id } = request.into_inner();
        self.asked("create-point", &format!("{domain} {name} {id}"))?;
        if name == "taken" {
            return Err(Status::failed_precondition("the name is taken"));
        }
        Ok(Response::new(Point { names: vec![name], ..point(990, false) }))
    }

    async fn release_point(&self, request: Request<PointRequest>) -> Result<Response<Point>, Status> {
        let PointRequest { domain, name, .. } = request.into_inner();
        self.asked("release-point", &format!("{domain} {name}"))?;
        Ok(Response::new(Point { pinned: false, ..point(990, false) }))
    }

    async fn retention(&self, request: Request<RetentionRequest>) -> Result<Response<RetentionReply>, Status> {
        let RetentionRequest { domain, change, reset, retention } = request.into_inner();
        let tiers = retention.clone().unwrap_or_default().tiers.len();
        self.asked("retention", &format!("{domain} change={change} reset={reset} tiers={tiers}"))?;
        let now = policy();
        Ok(Response::new(RetentionReply { retention: retention.filter(|_| change).or(now.retention.clone()), ..now }))
    }

    async fn plan_activation(&self, request: Request<ActivateRequest>) -> Result<Response<ActivationPlan>, Status> {
        let ActivateRequest { domain, point: wanted, at_unix_ns, .. } = request.into_inner();
        self.asked("plan", &domain)?;
        let older = !wanted.is_empty() || at_unix_ns > 0;
        let mut plan = ActivationPlan {
            name: if domain == UUID { "web1".into() } else { domain.clone() },
            uuid: UUID.into(),
            point: Some(if older { point(990, false) } else { point(1000, true) }),
            given_up: older.then_some(GivenUp { epochs: 10, disk_bytes: 5 << 20, seconds: 1.0 }),
            lost_seconds: 12.5,
            steps: vec!["stop receiving".into(), "restore the guest".into()],
            findings: vec![finding(Severity::Warning, "network", "bridge br1 has no uplink", "check it")],
            already_active: domain == "running",
            mapping: mapped(&domain),
        };
        if domain == "bad" {
            plan.findings.push(hostdev());
        }
        Ok(Response::new(plan))
    }

    type ActivateStream = Stream;

    async fn activate(&self, request: Request<ActivateRequest>) -> Result<Response<Stream>, Status> {
        let ActivateRequest { domain, wait, point: wanted, at_unix_ns, .. } = request.into_inner();
        assert_eq!(at_unix_ns, 0, "what was shown is what is asked for");
        if !wanted.is_empty() {
            self.asked("at", &wanted)?;
        }
        self.asked(if wait { "activate-and-wait" } else { "activate" }, &domain)?;
        let planned = !mapped(&domain).is_empty();
        let report = ActivationReport {
            name: "web1".into(),
            uuid: UUID.into(),
            point: Some(point(1000, true)),
            rto_seconds: 0.512,
            given_up: (!wanted.is_empty()).then_some(GivenUp { epochs: 10, disk_bytes: 5 << 20, seconds: 1.0 }),
            lost_seconds: 12.7,
            was_active: domain == "running",
            generation: 4,
            mapping: mapped(&domain),
            hooks: if planned {
                vec![hook("before", ""), hook("after", "it ended with exit status: 3")]
            } else {
                Vec::new()
            },
            announced: if planned { vec!["192.0.2.10 on br-dmz".into()] } else { Vec::new() },
            network: if planned { changes() } else { Vec::new() },
            dns: Vec::from_iter(
                planned.then(|| change("DNS zone example.org", "web1.example.org is 192.0.2.10 (60 s)", "")),
            ),
            warnings: if planned {
                vec!["it is not limited as the plan says: no control groups".into()]
            } else {
                Vec::new()
            },
            failed: if domain == "unhooked" { "a hook failed".into() } else { String::new() },
            decrypt_seconds: if wanted.is_empty() { 0.0 } else { 0.25 },
            decrypted_bytes: if wanted.is_empty() { 0 } else { 96 << 20 },
        };
        let activation = (domain != "unreported").then_some(report);
        let last = Progress { step: "run".into(), activation, ..Progress::default() };
        Ok(stream(vec![progress("apply", 1, 2, "epochs", ""), progress("restore", 0, 0, "", ""), Ok(last)]))
    }

    async fn plan_group(&self, request: Request<GroupRequest>) -> Result<Response<GroupPlan>, Status> {
        let group = request.into_inner().group;
        self.asked("plan-group", &group)?;
        Ok(Response::new(about_groups::plan(&group, group == "partly")))
    }

    type ActivateGroupStream = Stream;

    async fn activate_group(&self, request: Request<GroupRequest>) -> Result<Response<Stream>, Status> {
        let GroupRequest { group, at_unix_ns, points, .. } = request.into_inner();
        let points: Vec<String> = points.into_iter().map(|of| format!("{}={}", of.domain, of.point)).collect();
        self.asked("activate-group", &format!("{group} at {at_unix_ns} points {points:?}"))?;
        let ready = group != "failing";
        let report = (group != "unreported").then(|| about_groups::report(&group, ready));
        let last = Progress { step: "done".into(), group: report, ..Progress::default() };
        let app1 = if ready { "app1 is ready" } else { "app1 is not ready: no answer" };
        let said = |message| progress("db1", 1, 3, "ready", message);
        Ok(stream(vec![said("db1 is ready"), progress("app1: restore", 1, 3, "ready", ""), said(app1), Ok(last)]))
    }

    async fn stop_group(&self, request: Request<GroupsRequest>) -> Result<Response<GroupReport>, Status> {
        let group = request.into_inner().group;
        self.asked("stop-group", &group)?;
        let mut report = about_groups::report(&group, false);
        report.state = "under way".into();
        report.members[1].state = "checking".into();
        Ok(Response::new(report))
    }

    async fn groups(&self, request: Request<GroupsRequest>) -> Result<Response<GroupsReply>, Status> {
        let group = request.into_inner().group;
        self.asked("groups", &group)?;
        let groups = match group.as_str() {
            "" => vec![
                about_groups::report("mail", true),
                about_groups::report("shop", false),
                GroupReport { group: "wiki".into(), state: "not activated".into(), ..GroupReport::default() },
            ],
            "failing" => vec![about_groups::report("failing", false)],
            _ => vec![about_groups::report(&group, true)],
        };
        Ok(Response::new(GroupsReply { groups }))
    }

    async fn check_plan(&self, request: Request<CheckPlanRequest>) -> Result<Response<CheckPlanReply>, Status> {
        let text = request.into_inner().text;
        self.asked("check-plan", "")?;
        let found = |severity: Severity, line, column, message: &str| PlanFinding {
            severity: severity.into(),
            line,
            column,
            message: message.into(),
        };
        let mut findings = vec![found(
            Severity::Warning,
            2,
            16,
            "web1 has 4096 MiB of memory, the limit is 2048 MiB: the rest will be swapped out",
        )];
        if text.contains("br-gone") {
            findings.push(found(Severity::Refused, 5, 10, "bridge br-gone is not on this host"));
        }
        Ok(Response::new(CheckPlanReply { findings, domains: vec!["web1".into()] }))
    }

    async fn divergence(&self, request: Request<DivergenceRequest>) -> Result<Response<DivergenceReply>, Status> {
        let DivergenceRequest { domain, drop } = request.into_inner();
        self.asked("divergence", &domain)?;
        let file = DivergentFile {
            target: "vda".into(),
            path: "/var/lib/libvirt/images/web1.raw".into(),
            bytes: 1 << 30,
            format: "raw".into(),
            own: false,
            differing_bytes: 0,
        };
        let set = Divergence { generation: 4, since_unix_ns: 1, until_unix_ns: 2, files: vec![file] };
        Ok(Response::new(DivergenceReply { sets: vec![set], freed_bytes: if drop { 1 << 30 } else { 0 } }))
    }

    type VerifyStream = Stream;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Stream>, Status> {
        let VerifyRequest { domain, point, all, wait } = request.into_inner();
        self.asked(if all { "verify-all" } else { "verify" }, &domain)?;
        let damaged = domain == "flipped";
        let report = VerifyReport {
            ended: wait,
            sound: vec![if point.is_empty() { "3-1000".to_owned() } else { point }],
            damaged: if damaged { vec!["3-1001".to_owned()] } else { Vec::new() },
            damage: if damaged { vec!["disk vda: 4096 bytes from offset 81920 on".to_owned()] } else { Vec::new() },
            bytes: 5 << 20,
        };
        let last = Progress { step: "verify".into(), verification: Some(report), ..Progress::default() };
        Ok(stream(vec![progress("verify", 1 << 20, 5 << 20, "bytes", ""), Ok(last)]))
    }

    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<GrantReply>, Status> {
        let GrantRequest { domain, peer, withdraw } = request.into_inner();
        self.asked(if withdraw { "withdraw" } else { "grant" }, &format!("{domain} {peer}"))?;
        Ok(Response::new(GrantReply { owner: "site-a (0123456789ab)".into(), granted: vec![peer] }))
    }

    type ExportStream = Stream;

    async fn export(&self, request: Request<ExportRequest>) -> Result<Response<Stream>, Status> {
        let ExportRequest { domain, point, prune } = request.into_inner();
        self.calls.lock().unwrap().push(format!("receiver export {domain} {point} prune={prune}"));
        if domain == "busy" {
            return Err(Status::already_exists("an export, prune or import of busy is under way already"));
        }
        let mut report = ExportReport {
            name: "web1".to_owned(),
            uuid: UUID.to_owned(),
            url: "s3://backup/vmdr".to_owned(),
            ..ExportReport::default()
        };
        if prune {
            report.pruned = Some(PruneReport {
                kept: 7,
                dropped: vec!["3-1".to_owned(), "3-2".to_owned()],
                deleted_chunks: 12,
                marked_chunks: 3,
            });
        } else {
            report.point = "3-990".to_owned();
            report.cut_unix_ns = CUT_UNIX_NS;
            report.base = "3-500".to_owned();
            report.total_bytes = 4 << 30;
            report.read_bytes = 300 << 20;
            report.sent_chunks = 211;
            report.sent_bytes = 90 << 20;
            report.seconds = 12.5;
            report.rewrapped = point == "3-990";
        }
        let far =
            Progress { step: "export".to_owned(), done: 1, total: 2, unit: "bytes".to_owned(), ..Progress::default() };
        let last = Progress { exported: Some(report), ..Progress::default() };
        Ok(stream(vec![Ok(far), Ok(last)]))
    }

    async fn cold_list(&self, request: Request<ColdListRequest>) -> Result<Response<ColdListReply>, Status> {
        let ColdListRequest { from, key_file, domain } = request.into_inner();
        self.calls.lock().unwrap().push(format!("receiver cold-list {from} {key_file} {domain}"));
        let point = ColdPoint {
            id: "3-990".to_owned(),
            cut_unix_ns: CUT_UNIX_NS,
            consistency: "crash".to_owned(),
            exported_unix_ns: CUT_UNIX_NS,
            ram_bytes: 2 << 30,
            disk_bytes: 20 << 30,
            chunks: 5000,
            damage: String::new(),
        };
        let bad =
            ColdPoint { id: "3-1".to_owned(), damage: "it is cut\x1b[2J short".to_owned(), ..ColdPoint::default() };
        let good = ColdDomain {
            uuid: UUID.to_owned(),
            name: "web1".to_owned(),
            points: vec![point, bad],
            error: String::new(),
        };
        let closed = ColdDomain {
            uuid: UUID.replace('1', "9"),
            error: "it is sealed under key 77".to_owned(),
            ..ColdDomain::default()
        };
        Ok(Response::new(ColdListReply { url: "s3://backup/vmdr".to_owned(), domains: vec![good, closed] }))
    }

    type ImportStream = Stream;

    async fn import(&self, request: Request<ImportRequest>) -> Result<Response<Stream>, Status> {
        let ImportRequest { from, key_file, domain, point } = request.into_inner();
        self.calls.lock().unwrap().push(format!("receiver import {from} {key_file} {domain} {point}"));
        if domain == "there" {
            return Err(Status::failed_precondition("there is a standby of there here already"));
        }
        let report = ImportReport {
            name: "web1".to_owned(),
            uuid: UUID.to_owned(),
            point: "3-990".to_owned(),
            cut_unix_ns: CUT_UNIX_NS,
            total_bytes: 22 << 30,
            read_bytes: 5 << 30,
            seconds: 61.0,
        };
        let last = Progress { imported: Some(report), ..Progress::default() };
        Ok(stream(vec![Ok(last)]))
    }

    async fn forget(&self, request: Request<DomainRequest>) -> Result<Response<ForgetReply>, Status> {
        self.asked("forget", &request.into_inner().domain)?;
        Ok(Response::new(ForgetReply { freed_bytes: 3 << 30 }))
    }
}
