//! Caps on what protection may cost, and guests that are not paused all at once.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vmdr_tests::daemon::{self, Daemon, Program};
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random::rounds;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, PROTECT_SECONDS_MAX, Scene};
use vmdr_tests::wait::wait_for;

/// A cap far below what the guest writes...
const CAP: f64 = 2e6;
/// ...and what it writes: 100 pages that hardly compress, 50 times a second, are 20 MB/s.
const WRITER: &str = "--ram-mib 32 --pages 100 --interval-ms 20 --fill-bytes 4000";
/// On the wire there are headers of Ethernet, IP and TCP beside the bytes that the cap counts.
const HEADERS: f64 = 1.1;
/// Bytes that may leave at once after a rest: a tenth of a second's, and a frame.
const BURST: f64 = 0.1 * CAP + 65_536.0;

/// Bytes that site A has sent on the replication link.
fn wire_bytes(scene: &Scene) -> Result<f64> {
    let site = scene.rig.site(At::A);
    let text = site.run("ip", &["-s", "-j", "link", "show", "dev", "repl0"])?;
    let links: Value = serde_json::from_str(&text).context("read the link's counters")?;
    links[0]["stats64"]["tx"]["bytes"].as_f64().with_context(|| format!("no counter in {text}"))
}

/// SIGHUP: the agent reads its limits again.
fn reload(scene: &Scene, config: &str) -> Result<()> {
    let site = scene.rig.site(At::A);
    fs::write(site.path("/etc/vmdr/agent.toml"), config).context("write the agent's configuration")?;
    let agent = scene.agent.as_ref().context("an agent")?;
    exec::signal(agent.pid(), rustix::process::Signal::HUP)
}

#[test]
fn bandwidth_stays_below_its_cap_and_protection_catches_up_when_it_is_gone() -> Result<()> {
    let mut scene = Scene::new("limits-bandwidth", GuestSpec::linux("web1").workload(WRITER))?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let receiver = format!("receiver = \"{}\"\n", At::B.receiver());
    let pace = |seconds: u64| -> Result<f64> {
        let (begun, first) = (Instant::now(), client.ping(address, ANSWER)?);
        std::thread::sleep(Duration::from_secs(seconds));
        let last = client.ping(address, ANSWER)?;
        Ok((last.writes - first.writes) as f64 / begun.elapsed().as_secs_f64())
    };
    let seconds = rounds(8, 60) as u64;
    let (before, begun) = (wire_bytes(&scene)?, Instant::now());
    let free_pace = pace(3)?;
    let free = (wire_bytes(&scene)? - before) / begun.elapsed().as_secs_f64();
    ensure!(free > 2.0 * CAP, "the guest writes too little for this test: {free} bytes/s on the wire");

    reload(&scene, &format!("{receiver}[limits.guest]\nbandwidth = [\"mon-sun 00:00-24:00 2MB/s\"]\n"))?;
    wait_for("the cap to be felt", Duration::from_secs(60), || {
        let status = scene.status(At::A)?;
        Ok(status["limited_by"]
            .as_str()
            .is_some_and(|by| by.contains("bandwidth of this guest (2 MB/s)"))
            .then_some(()))
    })?;
    let (before, begun) = (wire_bytes(&scene)?, Instant::now());
    let capped_pace = pace(seconds)?;
    let took = begun.elapsed().as_secs_f64();
    let capped = wire_bytes(&scene)? - before;
    let behind = scene.status(At::A)?;
    println!(
        "on the wire: {:.1} MB/s without a cap, {:.2} MB/s with 2 MB/s over {took:.0} s; the guest's pace with the cap is {:.2} \
         of that without; state {}, RPO {} s",
        free / 1e6,
        capped / took / 1e6,
        capped_pace / free_pace,
        behind["state"],
        behind["rpo_seconds"],
    );
    ensure!(capped <= (CAP * took + BURST) * HEADERS, "{capped} bytes in {took} s");
    ensure!(capped >= CAP * took * 0.5, "the cap is not made use of: {capped} bytes in {took} s");
    ensure!(behind["state"] == "behind", "{behind}");
    // Fewer pauses, if anything: but a machine that others use is never quite the same.
    ensure!(capped_pace > free_pace * 0.7, "the guest wrote {capped_pace} pages/s, {free_pace} before");

    // With the cap gone, or with a guest that writes less than it, protection catches up by itself.
    reload(&scene, &receiver)?;
    scene.wait_durable()?;
    let status = wait_for("protection to catch up", Duration::from_secs(PROTECT_SECONDS_MAX), || {
        let status = scene.status(At::A)?;
        let level = status["state"] == "protected" && status["rpo_seconds"].as_f64().is_some_and(|rpo| rpo < 1.0);
        Ok((level && status["limited_by"].is_null()).then_some(status))
    })?;
    println!("caught up: RPO {} s", status["rpo_seconds"]);
    client.self_check(address)?;

    // The share of a processor: fewer epochs, and the guest at its own pace.
    let shim = scene.rig.site(At::A).processes_named("vmdr-shim");
    let [shim] = shim.as_slice() else { anyhow::bail!("{} shims", shim.len()) };
    let agent = scene.agent.as_ref().context("an agent")?.pid();
    let used = || -> Result<f64> { Ok(cpu_seconds(*shim)? + cpu_seconds(agent)?) };
    let (before, begun) = (used()?, Instant::now());
    pace(4)?;
    let free = (used()? - before) / begun.elapsed().as_secs_f64();
    let percent = ((free * 25.0).round() as u32).max(1);
    reload(&scene, &format!("{receiver}[limits]\ncpu_percent = {percent}\n"))?;
    // What is owed of before is paid first.
    std::thread::sleep(Duration::from_secs(2));
    let (before, begun) = (used()?, Instant::now());
    let slow_pace = pace(seconds)?;
    let capped = (used()? - before) / begun.elapsed().as_secs_f64();
    println!(
        "processor: {:.0} % without a cap, {:.1} % with {percent} %; pace {:.2}",
        free * 100.0,
        capped * 100.0,
        slow_pace / free_pace
    );
    // The burst, and a step that had begun, are on top.
    ensure!(capped * 100.0 <= f64::from(percent) * 1.5 + 1.0, "{capped} seconds a second, {percent} % are allowed");
    ensure!(scene.status(At::A)?["limited_by"].as_str().is_some_and(|by| by.contains("processor share of this host")));
    reload(&scene, &receiver)?;
    let durable = scene.wait_durable()?;
    scene.lose_site_a()?;
    let report = scene.activate()?;
    ensure!(report["point"]["epoch"].as_u64() >= Some(durable), "{report}");
    client.self_check(address)?;
    scene.rig.finish()
}

/// Processor time of a process.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read a process's times")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// When each guest was paused, by the time stamps of its own QEMU, in seconds.
fn pauses(events: &str) -> BTreeMap<String, Vec<(f64, f64)>> {
    let mut stopped: BTreeMap<String, f64> = BTreeMap::new();
    let mut pauses: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for line in events.lines() {
        // event STOP at 1763830000.123456 for domain 'web1'
        let Some((event, rest)) = line.strip_prefix("event ").and_then(|rest| rest.split_once(" at ")) else {
            continue;
        };
        let Some((at, domain)) = rest.split_once(" for domain '") else { continue };
        let Ok(at) = at.parse::<f64>() else { continue };
        let domain = domain.split('\'').next().unwrap_or_default().to_owned();
        match event {
            "STOP" => {
                stopped.insert(domain, at);
            }
            "RESUME" => {
                if let Some(from) = stopped.remove(&domain) {
                    pauses.entry(domain).or_default().push((from, at));
                }
            }
            _ => {}
        }
    }
    pauses
}

/// The most guests that were paused at the same time, and the pairs of pauses that overlapped.
fn crowd(pauses: &BTreeMap<String, Vec<(f64, f64)>>) -> (usize, usize) {
    let mut edges: Vec<(f64, i32)> = pauses.values().flatten().flat_map(|(from, to)| [(*from, 1), (*to, -1)]).collect();
    // An end before a beginning at the same microsecond.
    edges.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most, mut overlaps) = (0, 0, 0);
    for (_, step) in edges {
        if step > 0 && now > 0 {
            overlaps += 1;
        }
        now += step;
        most = most.max(now);
    }
    (most as usize, overlaps)
}

#[test]
fn three_guests_are_not_paused_at_once_and_the_third_needs_memory() -> Result<()> {
    let workload = "--ram-mib 8 --pages 20 --interval-ms 50";
    let guest = |number: u8| {
        let address = Ipv4Addr::new(10, 78, 0, 10 + number);
        GuestSpec::linux(&format!("web{number}")).memory(96).workload(workload).address(address)
    };
    let mut scene = Scene::new("limits-stagger", guest(1))?;
    // Two arenas of 64 MiB fit, at first.
    let caps = |mib: u64| {
        let bytes = mib << 20;
        let host = format!("receiver = \"{}\"\narena_bytes = 67108864\n", At::B.receiver());
        format!("{host}[limits]\ncuts_at_once = 1\nmemory_bytes = {bytes}\n")
    };
    scene.agent = None;
    scene.agent = Some(Daemon::start(scene.rig.site(At::A), Program::Agent, &caps(128))?);
    let site = scene.rig.site(At::A);
    let others: Vec<GuestSpec> = (2..=3).map(guest).collect();
    for other in &others {
        other.start(site)?;
    }
    for other in &others {
        other.wait_console(site, "workload ready", Duration::from_secs(120))?;
    }
    scene.protect(&["--interval", "100ms"])?;
    let protect =
        |name: &str| daemon::vmdr_output(site, PROTECT_SECONDS_MAX, &["protect", name, "--interval", "100ms"]);
    let output = protect("web2")?;
    ensure!(output.status.success(), "web2: {}", String::from_utf8_lossy(&output.stderr));
    let refused = protect("web3")?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && said.contains("limits.memory_bytes allows 128 MiB"), "{said}");
    reload(&scene, &caps(192))?;
    wait_for("the agent to read its limits", ANSWER, || {
        Ok(daemon::log(site, Program::Agent).contains("limits read again").then_some(()))
    })?;
    let output = protect("web3")?;
    ensure!(output.status.success(), "web3: {}", String::from_utf8_lossy(&output.stderr));

    let watch = |seconds: u64| -> Result<BTreeMap<String, Vec<(f64, f64)>>> {
        let mut command = site.command_within(seconds + 30, "virsh");
        let words =
            ["-c", "qemu:///system", "qemu-monitor-event", "--loop", "--regex", "--event", "STOP|RESUME", "--timeout"];
        let output = command.args(words).arg(seconds.to_string()).stdin(Stdio::null()).output().context("run virsh")?;
        Ok(pauses(&String::from_utf8_lossy(&output.stdout)))
    };
    let seconds = rounds(6, 60) as u64;
    let seen = watch(seconds)?;
    let cuts: Vec<usize> = seen.values().map(Vec::len).collect();
    let paused: f64 = seen.values().flatten().map(|(from, to)| to - from).sum();
    let (most, overlaps) = crowd(&seen);
    println!(
        "{cuts:?} pauses of {} guests in {seconds} s, {:.1} % of the time in all: {most} at once, {overlaps} overlaps",
        seen.len(),
        paused / seconds as f64 * 100.0
    );
    ensure!(seen.len() == 3 && cuts.iter().all(|cuts| *cuts >= 10), "{cuts:?}");
    ensure!(most == 1, "{most} guests were paused at once");

    // The same with room for all of them: they do not get in each other's way, but they meet.
    let receiver = format!("receiver = \"{}\"\narena_bytes = 67108864\n", At::B.receiver());
    reload(&scene, &format!("{receiver}[limits]\ncuts_at_once = 3\n"))?;
    let (most, overlaps) = crowd(&watch(seconds)?);
    println!("with cuts_at_once = 3: {most} at once, {overlaps} overlaps");
    scene.rig.finish()
}

#[test]
fn what_events_say_is_understood() {
    let events = "event STOP at 10.000001 for domain 'a'\nevent RESUME at 10.000005 for domain 'a'\n\
                  event STOP at 10.000003 for domain 'b': {}\nevent RESUME at 10.000009 for domain 'b'\nevents received: 4\n";
    assert_eq!(crowd(&pauses(events)), (2, 1));
    assert_eq!(crowd(&pauses(&events.replace("10.000003", "10.000005"))), (1, 0));
}
