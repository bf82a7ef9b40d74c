//! The demo: a guest is protected, its site is killed, and it goes on at the other site. `scripts/demo` runs this.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::Output;
use std::time::{Duration, Instant};
use vmdr_tests::client::{Pong, WORKLOAD_TCP_PORT};
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};

/// How long the guest is protected before its site is killed.
const PROTECTED_SECONDS: u64 = 8;
/// How long a command shown may take.
const COMMAND_SECONDS_MAX: u64 = 240;
const GUEST: &str = "web1";

struct Stage {
    begun: Instant,
}

impl Stage {
    fn say(&self, text: &str) {
        println!("[{:5.1} s] {text}", self.begun.elapsed().as_secs_f64());
    }

    /// Makes the two sites known to each other, as an operator does once.
    fn pair(&self, scene: &Scene) -> Result<()> {
        let shown = self.show(scene, At::B, &["pair"])?;
        let token = shown.lines().next().context("no token is shown")?;
        let words = ["pair", "--with", &At::B.receiver()];
        println!("site-a# echo {token} | vmdr {}", words.join(" "));
        let output = daemon::vmdr_typed(scene.rig.site(At::A), &words, token)?;
        print_indented(&output);
        println!();
        if !output.status.success() {
            bail!("vmdr {} ended with {}", words.join(" "), output.status);
        }
        Ok(())
    }

    /// Runs a `vmdr` command at a site as an operator would, showing it and what it prints.
    fn show(&self, scene: &Scene, at: At, words: &[&str]) -> Result<String> {
        let prompt = if at == At::A { "site-a#" } else { "site-b#" };
        println!("\n{prompt} vmdr {}", words.join(" "));
        let output = daemon::vmdr_output(scene.rig.site(at), COMMAND_SECONDS_MAX, words)?;
        print_indented(&output);
        println!();
        if !output.status.success() {
            bail!("vmdr {} ended with {}", words.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn print_indented(output: &Output) {
    for stream in [&output.stdout, &output.stderr] {
        String::from_utf8_lossy(stream).lines().for_each(|line| println!("    {line}"));
    }
}

fn main() -> Result<()> {
    let stage = Stage { begun: Instant::now() };
    println!("vmdr demo: two sites on this machine, a guest, and the loss of the site it runs at\n");
    stage.say("starting site A and site B, each with a network and a libvirtd of its own, and a guest at A");
    let guest = GuestSpec::linux(GUEST).workload("--ram-mib 48 --pages 100 --interval-ms 50");
    let mut scene = Scene::strangers("demo", guest)?;
    let address = scene.guest.address;
    let client = scene.rig.client().clone();
    let first = client.ping(address, ANSWER)?;
    stage.say(&format!("the guest runs at site A and counts: {}", count(&first)));

    stage.say("the two hosts have never met: one shows a token, on the other it is typed");
    stage.pair(&scene)?;
    stage.show(&scene, At::A, &["doctor", GUEST])?;
    stage.show(&scene, At::A, &["protect", GUEST, "--interval", "100ms"])?;
    let stream = client.tcp(SocketAddr::from((address, WORKLOAD_TCP_PORT)), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER)).context("set a time limit")?;
    stage.say(&format!("a client opens a TCP connection to the guest: {}", converse(&stream, "hello")?));
    stage.say(&format!("the guest is protected; it works on for {PROTECTED_SECONDS} s"));
    for _ in 0..PROTECTED_SECONDS / 2 {
        std::thread::sleep(Duration::from_secs(2));
        stage.say(&format!("the guest counts: {}", count(&client.ping(address, ANSWER)?)));
    }
    stage.show(&scene, At::A, &["status", GUEST])?;
    scene.wait_durable()?;
    let status = scene.status(At::A)?;
    let last = client.ping(address, ANSWER)?;
    stage.say(&format!("last seen of the guest at site A: {}", count(&last)));
    scene.lose_site_a()?;
    stage.say("SIGKILL for everything at site A: QEMU, libvirtd, the agent, the shim");
    if client.ping(address, Duration::from_secs(1)).is_ok() {
        bail!("the guest still answers after its site was killed");
    }
    stage.say("the guest does not answer any more");

    stage.show(&scene, At::B, &["points", GUEST])?;
    println!("site-b# vmdr activate {GUEST} --yes --wait -o json");
    let asked = Instant::now();
    let report = scene.activate()?;
    let back = client.ping(address, ANSWER)?;
    let answered = asked.elapsed();
    println!("{}\n", indent(&serde_json::to_string_pretty(&report).context("print the report")?));
    stage.say(&format!("the guest answers at site B, at the same address: {}", count(&back)));
    if back.boot != first.boot {
        bail!("the guest was booted anew (boot id {} instead of {})", back.boot, first.boot);
    }
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        stage.say(&format!("the guest counts on: {}", count(&client.ping(address, ANSWER)?)));
    }
    let checked = client.self_check(address)?;
    stage.say(&format!("its self-check: every page of RAM and every record on disk agree after tick {checked}"));
    stage.say(&format!("the client's TCP connection goes on: {}", converse(&stream, "hello again")?));
    stage.show(&scene, At::B, &["status", GUEST])?;

    println!("Figures");
    figures(&status, &report, &last, &back, answered);
    scene.rig.finish()?;
    println!();
    stage.say("cleaned up: no process, namespace, network device or file of it is left");
    Ok(())
}

fn figures(status: &Value, report: &Value, last: &Pong, back: &Pong, answered: Duration) {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let line = |name: &str, value: String| println!("  {name:<44} {value}");
    line("checkpoints that were durable at site B", format!("{}", number(&status["durable_epoch"])));
    let ms = |key: &str| number(&status[key]) * 1e3;
    line("pause of the guest per checkpoint, p50 / p99", {
        format!("{:.1} ms / {:.1} ms", ms("pause_p50_seconds"), ms("pause_p99_seconds"))
    });
    line("pages dirtied per checkpoint", format!("{:.0}", number(&status["dirty_pages_per_epoch"])));
    line("sent per checkpoint", format!("{:.0} KiB", number(&status["bytes_per_epoch"]) / 1024.0));
    line("RPO before the loss, now / worst", {
        format!("{:.0} ms / {:.0} ms", ms("rpo_seconds"), ms("rpo_worst_hour_seconds"))
    });
    let steps = last.tick.saturating_sub(back.tick);
    let lost = if steps == 0 { "nothing that was seen".to_owned() } else { format!("{steps} ticks of 50 ms at most") };
    line("lost, by the guest's own counter", lost);
    line("RTO, by vmdr (request to running guest)", format!("{:.0} ms", number(&report["rto_seconds"]) * 1e3));
    line("RTO, by the client (request to first answer)", format!("{:.0} ms", answered.as_secs_f64() * 1e3));
}

fn count(pong: &Pong) -> String {
    format!("tick {}, {} pages written, {} records on disk", pong.tick, pong.writes, pong.acknowledged)
}

fn converse(mut stream: &std::net::TcpStream, line: &str) -> Result<String> {
    stream.write_all(format!("{line}\n").as_bytes()).context("write to the guest")?;
    let mut answer = String::new();
    // One line each way: nothing is left in this buffer when it goes.
    BufReader::new(stream).read_line(&mut answer).context("read the guest's answer")?;
    Ok(format!("{line:?} -> {:?}", answer.trim_end()))
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
