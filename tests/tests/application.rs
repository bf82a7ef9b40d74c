//! Application-consistent points: a guest whose file system is at rest at the cut, and what becomes of it when anything fails
//! between freeze and thaw.
//!
//! A program in the guest writes lines and never syncs them. At an application-consistent point the image of the disk, read from
//! the receiver's state directory, has them, and needs no journal replay; at any other it does. (The file system is the
//! workload's, too, so that its ticks stand still while it is frozen.)

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmdr_receiver::store::{Array, Store, StoreOptions};
use vmdr_tests::daemon::{self, binary};
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random::rounds;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// How long a guest of these tests may stay frozen.
const FROZEN_MS_MAX: u64 = 8_000;
/// A workload whose ticks have stood still for this long (it makes one each 50 ms) has a frozen file system.
const STILL: Duration = Duration::from_millis(1_000);
/// `vmdr point create` and whatever it waits for.
const CREATE_SECONDS_MAX: u64 = 90;

fn guest(name: &str, hook: &str) -> GuestSpec {
    let guest = GuestSpec::linux(name).memory(160).workload("--ram-mib 16 --pages 20 --interval-ms 50");
    let hook = if hook.is_empty() { String::new() } else { format!(" vmdr.hook={hook}") };
    GuestSpec { kernel_words: format!("vmdr.buffered=1{hook}"), ..guest }
}

fn scene(name: &str, guest: GuestSpec) -> Result<Scene> {
    let mut scene = Scene::new(name, guest)?;
    scene.configure_agent(&format!("frozen_limit_ms = {FROZEN_MS_MAX}\n"));
    scene.start_agent()?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    Ok(scene)
}

/// The agent has heard of the tools in the guest.
fn wait_tools(scene: &Scene) -> Result<()> {
    wait_for("the guest's tools", ANSWER, || {
        Ok(scene.status(At::A)?["guest_tools"]
            .as_str()
            .is_some_and(|t| t.starts_with("vmdr-guest-tools"))
            .then_some(()))
    })
}

fn create_words<'a>(scene: &'a Scene, name: &'a str) -> [&'a str; 8] {
    ["point", "create", scene.guest.name.as_str(), "--name", name, "--application", "-o", "json"]
}

fn create(scene: &Scene, name: &str) -> Result<Value> {
    let output = daemon::vmdr_output(scene.rig.site(At::A), CREATE_SECONDS_MAX, &create_words(scene, name))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "vmdr point create --application: {}", err.trim());
    let made: Value = serde_json::from_str(&out).with_context(|| format!("read {out}"))?;
    ensure!(made["point"]["consistency"] == "application", "{made}");
    ensure!(made["application"]["file_systems"].as_u64() == Some(1), "{made}");
    let frozen = made["application"]["frozen_seconds"].as_f64().context("how long it was frozen")?;
    ensure!(frozen * 1e3 <= FROZEN_MS_MAX as f64, "frozen for {frozen} s");
    println!("{name}: {} after {frozen} s of freeze", made["point"]["id"]);
    Ok(made)
}

/// The same beside the test, which does something to it meanwhile.
fn create_beside(scene: &Scene, name: &str) -> Result<JoinHandle<Result<Output>>> {
    let mut command = scene.rig.site(At::A).command_within(CREATE_SECONDS_MAX, &binary("vmdr")?.to_string_lossy());
    command.args(create_words(scene, name));
    Ok(std::thread::spawn(move || exec::output(&mut command)))
}

fn refused(created: JoinHandle<Result<Output>>) -> Result<String> {
    let Ok(output) = created.join() else { bail!("the thread panicked") };
    let output = output?;
    ensure!(!output.status.success(), "a point was made: {}", String::from_utf8_lossy(&output.stdout));
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn points(scene: &Scene) -> Result<Vec<Value>> {
    let document = daemon::vmdr_json(scene.rig.site(At::B), &["points", &scene.guest.name])?;
    Ok(document["points"].as_array().context("no points")?.clone())
}

fn applications(scene: &Scene) -> Result<usize> {
    Ok(points(scene)?.iter().filter(|point| point["consistency"] == "application").count())
}

/// The image of the first disk at a point, out of the receiver's state directory (no receiver runs).
fn image(scene: &Scene, epoch: u64) -> Result<PathBuf> {
    let state = scene.rig.site(At::B).path("/var/lib/vmdr/receiver");
    let store = Store::open(&state, StoreOptions::default()).context("open the receiver's state directory")?;
    let uuid = scene.guest.uuid();
    let point = store.points(&uuid)?.into_iter().find(|point| point.epoch == epoch).context("no such point")?;
    let reader = store.read_point(&uuid, Some(point.id()))?;
    let path = scene.rig.site(At::B).path("/var/lib/vmdr").join(format!("image-{epoch}.raw"));
    let file = File::create(&path).context("create an image")?;
    let length = reader.length(Array::Disk(0));
    let mut piece = vec![0; 1 << 20];
    for at in (0..length).step_by(piece.len()) {
        let now = (length - at).min(piece.len() as u64) as usize;
        reader.read(Array::Disk(0), at, &mut piece[..now])?;
        file.write_all_at(&piece[..now], at).context("write an image")?;
    }
    Ok(path)
}

/// Whether the file system of an image has to replay its journal.
fn needs_recovery(image: &Path) -> Result<bool> {
    let said = exec::run(Command::new("dumpe2fs").arg("-h").arg(image))?;
    let features = said.lines().find(|line| line.starts_with("Filesystem features:")).context("no features")?;
    Ok(features.contains("needs_recovery"))
}

fn cat(image: &Path, file: &str) -> Result<String> {
    exec::run(Command::new("debugfs").args(["-R", &format!("cat {file}")]).arg(image))
}

fn line_number(line: &str) -> Result<u64> {
    line.trim().strip_prefix("line ").and_then(|n| n.parse().ok()).with_context(|| format!("{line:?} is no line"))
}

/// It is clean, and has all that was written before the hook ran; the numbers of the last line the hook saw and of the last.
fn check_clean(image: &Path, hooked: bool) -> Result<()> {
    ensure!(!needs_recovery(image)?, "the journal has to be replayed");
    // Reads only, and forces a whole check.
    let checked = exec::output(Command::new("e2fsck").args(["-f", "-n"]).arg(image))?;
    ensure!(checked.status.success(), "e2fsck: {}", String::from_utf8_lossy(&checked.stdout));
    let buffered = cat(image, "/buffered")?;
    let lines: Vec<u64> = buffered.lines().map(line_number).collect::<Result<_>>()?;
    ensure!(!lines.is_empty() && lines.iter().zip(1..).all(|(is, should)| *is == should), "{lines:?}");
    if hooked {
        let marker = line_number(cat(image, "/marker")?.lines().last().context("the hook has left no mark")?)?;
        ensure!(marker <= lines.len() as u64, "the hook saw line {marker}, the image has {}", lines.len());
        println!("the hook saw line {marker}, the image has {}", lines.len());
    }
    Ok(())
}

fn epoch_of(point: &Value) -> Result<u64> {
    point["epoch"].as_u64().context("no epoch")
}

/// One point at rest, one as any other; site A is lost; the images are what they should be; back to the first.
fn a_point_at_rest(mut scene: Scene, hooked: bool) -> Result<()> {
    let (client, address, name) = (scene.rig.client().clone(), scene.guest.address, scene.guest.name.clone());
    let mut quiet = 0;
    for round in 0..rounds(1, 10) {
        let made = create(&scene, &format!("quiet-{round}"))?;
        quiet = epoch_of(&made["point"])?;
        let tick = client.ping(address, ANSWER)?.tick;
        client.wait_tick(address, tick + 5, ANSWER).context("the workload goes on after a thaw")?;
    }
    scene.wait_durable()?;
    let crash = daemon::vmdr_json(scene.rig.site(At::B), &["point", "create", &name, "--name", "crash"])?;
    ensure!(crash["point"]["consistency"] == "crash" && crash["application"].is_null(), "{crash}");
    let crash = epoch_of(&crash["point"])?;
    let listed = points(&scene)?;
    let found = listed.iter().find(|point| point["epoch"].as_u64() == Some(quiet)).context("it is not listed")?;
    ensure!(found["consistency"] == "application" && found["pinned"] == true, "{found}");
    let status = scene.status(At::A)?;
    ensure!(status["application"]["cut"].is_string() && status["application"]["error"].is_null(), "{status}");

    scene.lose_site_a()?;
    scene.receiver.as_mut().context("a receiver")?.terminate()?;
    check_clean(&image(&scene, quiet)?, hooked).context("the point at rest")?;
    ensure!(needs_recovery(&image(&scene, crash)?)?, "any other point needs no replay: the test shows nothing");
    scene.start_receiver()?;
    let point = format!("quiet-{}", rounds(1, 10) - 1);
    let words = ["activate", name.as_str(), "--yes", "--wait", "-o", "json", "--point", &point];
    let output = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).context("read the report")?;
    ensure!(report["report"]["point"]["consistency"] == "application", "{report}");
    // Its file system was frozen at the cut; who froze it is gone.
    let pong = client.ping(address, ANSWER)?;
    client.wait_tick(address, pong.tick + 10, ANSWER).context("the activated guest thaws")?;
    client.self_check(address)?;
    scene.rig.finish()
}

#[test]
fn a_guest_at_rest_has_a_clean_disk() -> Result<()> {
    let scene = scene("app", guest("app1", "mmmmmmmmmmmm").tools())?;
    wait_tools(&scene)?;
    a_point_at_rest(scene, true)
}

/// Waits until cuts wait for a receiver that stands still.
fn wait_no_cuts(scene: &Scene) -> Result<()> {
    let epoch = || scene.status_number(At::A, "epoch");
    let (mut newest, mut since) = (epoch()?, Instant::now());
    wait_for("cuts to wait", ANSWER, || {
        let now = epoch()?;
        if now > newest {
            (newest, since) = (now, Instant::now());
        }
        Ok((since.elapsed() >= STILL).then_some(()))
    })
}

/// Waits until the workload stands still.
fn wait_frozen(scene: &Scene) -> Result<()> {
    let (client, address) = (scene.rig.client(), scene.guest.address);
    let (mut tick, mut since) = (client.ping(address, ANSWER)?.tick, Instant::now());
    wait_for("the guest to be frozen", ANSWER, || {
        let now = client.ping(address, ANSWER)?.tick;
        if now != tick {
            (tick, since) = (now, Instant::now());
        }
        Ok((since.elapsed() >= STILL).then_some(()))
    })
}

#[test]
fn whatever_fails_between_freeze_and_thaw_the_guest_thaws() -> Result<()> {
    // First frozen and the agent is lost; then frozen and its daemon stops answering; then a hook fails; then all is well.
    let mut scene = scene("appfail", guest("app2", "wsfm").tools())?;
    wait_tools(&scene)?;
    let (client, address, site) = (scene.rig.client().clone(), scene.guest.address, At::A);

    // While the receiver stands still, cuts wait for acknowledgements, and so does the guest, frozen.
    let lost = create_beside(&scene, "lost")?;
    scene.guest.wait_console(scene.rig.site(site), "hook freeze w", ANSWER)?;
    scene.receiver.as_ref().context("a receiver")?.freeze()?;
    wait_frozen(&scene)?;
    let tick = client.ping(address, ANSWER)?.tick;
    scene.agent.as_mut().context("an agent")?.kill()?;
    let line = scene.guest.wait_console(scene.rig.site(site), "freeze: thawed after", ANSWER)?;
    let frozen_ms = line.split_whitespace().nth(3).and_then(|ms| ms.parse::<u64>().ok());
    let frozen_ms = frozen_ms.with_context(|| format!("how long: {line}"))?;
    println!("the agent was killed: {line}");
    // Its own limit, and what thawing takes.
    ensure!(frozen_ms <= FROZEN_MS_MAX + 2_000, "{line}");
    client.wait_tick(address, tick + 5, ANSWER).context("the workload goes on")?;
    scene.receiver.as_ref().context("a receiver")?.thaw()?;
    refused(lost)?;
    scene.start_agent()?;
    scene.wait_durable().context("cuts go on after the agent is back")?;
    ensure!(applications(&scene)? == 0, "a point of a lost agent is marked");

    wait_tools(&scene)?;
    let silent = create_beside(&scene, "silent")?;
    scene.guest.wait_console(scene.rig.site(site), "hook freeze s", ANSWER)?;
    scene.receiver.as_ref().context("a receiver")?.freeze()?;
    scene.guest.wait_console(scene.rig.site(site), "daemon stopped", ANSWER)?;
    scene.receiver.as_ref().context("a receiver")?.thaw()?;
    let said = refused(silent)?;
    println!("the guest stopped answering: {}", said.trim());
    ensure!(said.contains("no application-consistent point was made"), "{said}");
    let tick = client.ping(address, ANSWER)?.tick;
    client.wait_tick(address, tick + 5, ANSWER).context("the workload goes on")?;
    scene.wait_durable().context("cuts go on")?;
    ensure!(applications(&scene)? == 0, "a cut that was not confirmed is marked");
    let status = scene.status(At::A)?;
    ensure!(status["application"]["error"].is_string() && status["state"] == "protected", "{status}");

    // The guest that stopped answering holds nobody up: each further request ends with a reason.
    let output = daemon::vmdr_output(scene.rig.site(site), CREATE_SECONDS_MAX, &create_words(&scene, "still"))?;
    ensure!(!output.status.success(), "a guest that does not answer was frozen");
    client.self_check(address)?;
    scene.rig.finish()
}

/// Processes of site A that freeze through the QEMU guest agent.
fn helpers(scene: &Scene) -> Vec<u32> {
    let site = scene.rig.site(At::A);
    let helps = |pid: &u32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(b"freeze")
    };
    site.processes_named("vmdr-agent").into_iter().filter(helps).collect()
}

#[test]
fn the_qemu_guest_agent_serves_where_the_guest_has_that() -> Result<()> {
    let mut scene = scene("appqga", guest("app3", "").qemu_agent())?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    let site = At::A;
    wait_for("the guest agent", ANSWER, || {
        let words = ["qemu-agent-command", &scene.guest.name, r#"{"execute":"guest-ping"}"#];
        Ok(scene.rig.site(site).virsh(&words).is_ok().then_some(()))
    })?;

    // The agent is killed between freeze and thaw: its helper thaws, and ends.
    scene.receiver.as_ref().context("a receiver")?.freeze()?;
    wait_no_cuts(&scene)?;
    let lost = create_beside(&scene, "lost")?;
    wait_frozen(&scene)?;
    let tick = client.ping(address, ANSWER)?.tick;
    ensure!(helpers(&scene).len() == 1, "{:?}", helpers(&scene));
    scene.agent.as_mut().context("an agent")?.kill()?;
    client.wait_tick(address, tick + 5, ANSWER).context("the workload goes on")?;
    wait_for("the helper's end", ANSWER, || Ok(helpers(&scene).is_empty().then_some(())))?;
    scene.receiver.as_ref().context("a receiver")?.thaw()?;
    refused(lost)?;
    scene.start_agent()?;
    scene.wait_durable().context("cuts go on after the agent is back")?;
    ensure!(applications(&scene)? == 0, "a point of a lost agent is marked");
    a_point_at_rest(scene, false)
}

#[test]
fn a_guest_without_either_is_refused_and_both_ways_are_named() -> Result<()> {
    let guest = GuestSpec::bare_metal("app4", true);
    let scene = Scene::new("appnone", guest)?;
    let name = scene.guest.name.as_str();
    let refused = |words: &[&str]| -> Result<()> {
        let output = daemon::vmdr_output(scene.rig.site(At::A), CREATE_SECONDS_MAX, words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{words:?}: {said}");
        ensure!(said.contains("vmdr-guest-tools daemon") && said.contains("qemu-ga"), "{said}");
        Ok(())
    };
    refused(&["protect", name, "--application-every", "1m"])?;
    scene.protect(&["--interval", "100ms"])?;
    refused(&create_words(&scene, "x"))?;
    scene.wait_durable()?;
    scene.rig.finish()
}
