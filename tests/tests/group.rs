//! A group of three guests, database, application and front, comes up at the backup site in order and with readiness checks: one that
//! does not pass stops who depends on it, the next run goes on from there, and so does a receiver that was killed.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;
use vmdr_tests::client::WORKLOAD_TCP_PORT;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, PROGRESS_SECONDS_MAX, PROTECT_SECONDS_MAX, Scene};
use vmdr_tests::wait::wait_for;

const PLAN: &str = "/etc/vmdr/plan.toml";
/// Where the guests' network can be reached from at site B, which has no address in it itself.
const NAMESPACE: &str = "guests";
const BESIDE: &str = "10.78.0.5/24";
/// The application is ready once this is there.
const APP_OK: &str = "/etc/vmdr/app-ok";
/// A line for each time that the front's hook has begun.
const BEGUN: &str = "/etc/vmdr/front-begun";
const MEMBERS: [&str; 3] = ["db1", "app1", "front1"];

fn guest(index: usize) -> GuestSpec {
    let address = Ipv4Addr::new(10, 78, 0, 11 + index as u8);
    let guest = GuestSpec::linux(MEMBERS[index]).memory(96).address(address);
    let guest = guest.workload("--ram-mib 8 --pages 20 --interval-ms 100");
    if MEMBERS[index] == "app1" { guest.tools() } else { guest }
}

fn write_plan(scene: &Scene, guests: &[GuestSpec]) -> Result<()> {
    let tcp = |guest: &GuestSpec| {
        let to = format!("{}:{WORKLOAD_TCP_PORT}", guest.address);
        format!("{{ tcp = \"{to}\", namespace = \"{NAMESPACE}\", timeout_seconds = 60 }}")
    };
    let text = format!(
        "[group.shop]\nmembers = [\"front1\", \"app1\", \"db1\"]\n\
         [domain.db1]\nready = [{}]\n\
         [domain.app1]\nneeds = [\"db1\"]\n\
         ready = [{{ heartbeat = true, timeout_seconds = 60 }}, {{ argv = [\"/bin/test\", \"-e\", \"{APP_OK}\"], timeout_seconds = 3 }}]\n\
         [domain.front1]\nneeds = [\"app1\"]\nready = [{}]\n\
         [[domain.front1.before]]\nargv = [\"/bin/sh\", \"-c\", \"echo x >> {BEGUN}; sleep 5\"]\n",
        tcp(&guests[0]),
        tcp(&guests[2]),
    );
    fs::write(scene.rig.site(At::B).path(PLAN), text).context("write the plan")
}

/// `vmdr group` at site B: its exit code, its document, and what it says beside.
fn group(scene: &Scene, words: &[&str]) -> Result<(Option<i32>, Value, String)> {
    let words = [&["group"], words, &["-o", "json"]].concat();
    let output = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr).into_owned());
    let document = serde_json::from_str(&out).with_context(|| format!("vmdr {}: {out} {err}", words.join(" ")))?;
    Ok((output.status.code(), document, err))
}

fn member<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    let members = report["members"].as_array().context("members")?;
    members.iter().find(|member| member["name"] == name).with_context(|| format!("no {name} in {report}"))
}

fn states(report: &Value) -> Result<Vec<String>> {
    let state =
        |name: &&str| -> Result<String> { Ok(member(report, name)?["state"].as_str().unwrap_or_default().to_owned()) };
    MEMBERS.iter().map(state).collect()
}

/// The namespace from which readiness is looked at.
fn namespace(scene: &Scene) -> Result<()> {
    let site = scene.rig.site(At::B);
    for words in [
        &["netns", "add", NAMESPACE][..],
        &["link", "add", "ready0", "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE],
        &["link", "set", "ready0", "master", "vmbr0", "up"],
        &["-n", NAMESPACE, "addr", "add", BESIDE, "dev", "eth0"],
        &["-n", NAMESPACE, "link", "set", "eth0", "up"],
    ] {
        site.run("ip", words)?;
    }
    Ok(())
}

fn runs_at_b(scene: &Scene) -> Result<Vec<String>> {
    let names = scene.rig.site(At::B).virsh(&["list", "--name"])?;
    let mut names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
    names.sort();
    Ok(names)
}

#[test]
fn three_guests_come_up_in_order_and_go_on_from_where_they_stopped() -> Result<()> {
    let guests: Vec<GuestSpec> = (0..3).map(guest).collect();
    let mut scene = Scene::new("group", guests[0].clone())?;
    let site = scene.rig.site(At::A);
    for other in &guests[1..] {
        other.start(site)?;
    }
    for other in &guests[1..] {
        other.wait_console(site, "workload ready", Duration::from_secs(120))?;
    }
    namespace(&scene)?;
    write_plan(&scene, &guests)?;
    scene.configure_receiver(&format!("plan = \"{PLAN}\"\n"));
    scene.start_receiver()?;
    for name in MEMBERS {
        let words = ["protect", name, "--interval", "200ms"];
        let output = daemon::vmdr_output(scene.rig.site(At::A), PROTECT_SECONDS_MAX, &words)?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    daemon::vmdr(scene.rig.site(At::B), &["plan", "check"])?;
    let (code, plan, said) = group(&scene, &["activate", "shop", "--dry-run"])?;
    ensure!(code == Some(0) && plan["ok"] == true, "{code:?}: {plan} {said}");
    for (name, wave) in MEMBERS.into_iter().zip(1..) {
        ensure!(member(&plan, name)?["wave"] == wave, "{plan}");
    }
    scene.wait_durable()?;
    scene.lose_site_a()?;

    // The application is not ready: the front is not even tried.
    let (code, report, said) = group(&scene, &["activate", "shop", "--yes"])?;
    ensure!(code == Some(1), "{code:?}: {report} {said}");
    ensure!(states(&report)? == ["ready", "failed", "held back"], "{report}");
    ensure!(said.contains("db1 is ready") && said.contains("front1 is held back: it needs app1"), "{said}");
    let app1 = member(&report, "app1")?;
    ensure!(app1["error"].as_str().is_some_and(|error| error.contains("cmd:/bin/test -e")), "{report}");
    let passed: Vec<&Value> = app1["checks"].as_array().context("checks")?.iter().map(|c| &c["passed"]).collect();
    ensure!(passed == [&Value::Bool(true), &Value::Bool(false)], "the heartbeat, and the program: {report}");
    ensure!(runs_at_b(&scene)? == ["app1", "db1"], "{:?}", runs_at_b(&scene)?);
    ensure!(!scene.rig.site(At::B).path(BEGUN).exists(), "a hook of the front was run");
    let first = report.clone();
    ensure!(first["members"].as_array().is_some_and(|all| all.len() == 3), "{first}");
    let db1 = member(&report, "db1")?["activation"].clone();
    ensure!(db1["rto_seconds"].as_f64() > Some(0.0) && db1["lost_seconds"].as_f64() > Some(0.0), "{db1}");
    let status = daemon::vmdr_json(scene.rig.site(At::B), &["status"])?;
    ensure!(status["groups"][0]["group"] == "shop" && status["groups"][0]["state"] == "failed", "{status}");

    // Put right and run again; in the middle of the front the receiver is killed, and goes on by itself when it is back.
    fs::write(scene.rig.site(At::B).path(APP_OK), "")?;
    let killed = std::thread::scope(|threads| -> Result<_> {
        let asked = threads.spawn(|| {
            let words = ["group", "activate", "shop", "--yes"];
            daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)
        });
        let begun = wait_for("the front's hook", Duration::from_secs(ACTIVATE_SECONDS_MAX), || {
            Ok(scene.rig.site(At::B).path(BEGUN).exists().then_some(()))
        });
        let receiver = scene.receiver.as_ref().context("a receiver")?.pid();
        vmdr_tests::exec::signal(receiver, rustix::process::Signal::KILL)?;
        let Ok(output) = asked.join() else { bail!("the thread of the command") };
        begun.map(|()| output)
    })??;
    ensure!(!killed.status.success(), "the command has lost its receiver: {}", String::from_utf8_lossy(&killed.stdout));
    ensure!(runs_at_b(&scene)? == ["app1", "db1"], "{:?}", runs_at_b(&scene)?);
    scene.start_receiver()?;
    let limit = Duration::from_secs(ACTIVATE_SECONDS_MAX);
    let mut last = Value::Null;
    let went_on = wait_for("the group to go on by itself", limit, || {
        last = group(&scene, &["report", "shop"])?.1;
        std::thread::sleep(Duration::from_millis(200));
        Ok((last["state"] == "ready").then(|| last.clone()))
    });
    let report = went_on.with_context(|| format!("{last}"))?;
    ensure!(states(&report)? == ["ready"; 3] && report["attempts"] == 3, "{report}");
    ensure!(report["run"] == first["run"], "another run: {report}");
    for name in ["db1", "app1"] {
        let (before, now) = (member(&first, name)?, member(&report, name)?);
        ensure!(before["activation"] == now["activation"], "{name} was activated twice: {before} {now}");
    }
    let begun = fs::read_to_string(scene.rig.site(At::B).path(BEGUN))?;
    ensure!(begun.lines().count() == 2, "the front's hook was begun {} times", begun.lines().count());
    let front1 = member(&report, "front1")?;
    ensure!(front1["checks"][0]["passed"] == true && front1["activation"]["hooks"][0]["stage"] == "before", "{front1}");
    let time = |name: &str, key: &str| -> Result<String> {
        Ok(member(&report, name)?[key].as_str().with_context(|| format!("{key} of {name}"))?.to_owned())
    };
    ensure!(time("app1", "begun")? >= time("db1", "ended")?, "{report}");
    ensure!(time("front1", "begun")? >= time("app1", "ended")?, "{report}");
    ensure!(runs_at_b(&scene)? == ["app1", "db1", "front1"], "{:?}", runs_at_b(&scene)?);
    for guest in &guests {
        scene.rig.client().ping(guest.address, ANSWER)?;
        scene.rig.client().self_check(guest.address)?;
    }

    // Once more: there is nothing left to be done.
    let (code, again, said) = group(&scene, &["activate", "shop", "--yes"])?;
    ensure!(code == Some(0) && states(&again)? == ["ready"; 3], "{again} {said}");
    for name in MEMBERS {
        let (before, now) = (member(&report, name)?, member(&again, name)?);
        ensure!(before["activation"] == now["activation"], "{name} was activated twice: {before} {now}");
        ensure!(now["checks"][0]["passed"] == true, "{name} was not looked at again: {now}");
    }
    let words = ["group", "activate", "shop", "--yes", "--before", "1h"];
    let output = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &words)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("run here already") && said.contains("db1 (from "),
        "{said}"
    );
    let audit = daemon::vmdr_json(scene.rig.site(At::B), &["audit", "-n", "100"])?;
    let records = audit["records"].as_array().context("records")?;
    let of = |act: &str, detail: &str| {
        let is = |r: &&Value| r["act"] == act && r["detail"].as_str().is_some_and(|said| said.contains(detail));
        records.iter().filter(is).count()
    };
    ensure!(of("ActivateGroup", "gone on with after the receiver had ended") == 1, "{audit}");
    ensure!(of("Activate", "of group shop") >= 4, "{audit}");
    let limit = Duration::from_secs(PROGRESS_SECONDS_MAX);
    wait_for("the namespace to go", limit, || {
        Ok(scene.rig.site(At::B).run("ip", &["netns", "delete", NAMESPACE]).is_ok().then_some(()))
    })?;
    scene.rig.finish()
}
