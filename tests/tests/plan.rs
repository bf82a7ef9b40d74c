//! A recovery plan is applied by an activation: another bridge, hooks, and neighbours that are told where the guest is now.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use vmdr_tests::client::Client;
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, PROGRESS_SECONDS_MAX, PROTECT_SECONDS_MAX, Scene};
use vmdr_tests::site::Namespace;
use vmdr_tests::wait::wait_for;

const PLAN: &str = "/etc/vmdr/plan.toml";
const HOOK: &str = "/etc/vmdr/hook";
/// What the hook leaves behind, by its stage.
const SEEN: &str = "/var/log/vmdr/hook-";
/// The bridge at the second site that the guest's NIC is in there.
const BRIDGE: &str = "br-dr";
/// Of the client at that bridge. The guest has never heard of it.
const CLIENT: &str = "10.78.0.3/24";
/// Addresses that the plan gives the guest and that the guest itself has not: whatever tells of them is the receiver.
const SECOND: &str = "10.78.0.77";
const SIXTH: &str = "fd00:78::77";
/// The neighbour that the client takes to have them.
const STALE: &str = "02:00:00:00:00:99";

/// A client at a bridge of site B that nothing else leads to.
struct Elsewhere {
    namespace: Namespace,
}

impl Elsewhere {
    fn new(scene: &Scene) -> Result<Self> {
        let directory = scene.rig.directory().join("elsewhere");
        fs::create_dir(&directory).context("create the client's directory")?;
        let namespace = Namespace::start(&directory, &[])?;
        let site = scene.rig.site(At::B).namespace()?;
        let pid1 = namespace.pid1().to_string();
        for words in [
            &["link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"][..],
            &["link", "set", BRIDGE, "up"],
            &["link", "add", "dr0", "type", "veth", "peer", "name", "eth0", "netns", &pid1],
            &["link", "set", "dr0", "master", BRIDGE, "up"],
        ] {
            exec::run(site.net_command("ip").args(words))?;
        }
        let elsewhere = Elsewhere { namespace };
        elsewhere.ip(&["addr", "add", CLIENT, "dev", "eth0"])?;
        elsewhere.ip(&["link", "set", "eth0", "up"])?;
        Ok(elsewhere)
    }

    fn ip(&self, words: &[&str]) -> Result<String> {
        exec::run(self.namespace.net_command("ip").args(words))
    }

    /// Makes it believe that an address is at another neighbour.
    fn believe(&self, address: &str) -> Result<()> {
        self.ip(&["neigh", "replace", address, "lladdr", STALE, "dev", "eth0", "nud", "reachable"]).map(drop)
    }

    /// Where it takes an address to be.
    fn neighbour(&self, address: &str) -> Result<Option<String>> {
        let known = self.ip(&["neigh", "show", address, "dev", "eth0"])?;
        let mut words = known.split_whitespace().skip_while(|word| *word != "lladdr");
        Ok(words.nth(1).map(str::to_owned))
    }
}

fn write_plan(scene: &Scene, bridge: &str, mac: &str) -> Result<()> {
    let guest = &scene.guest;
    let (name, address) = (&guest.name, guest.address);
    let text = format!(
        "[domain.{name}]\n\
         [[domain.{name}.nic]]\n\
         {mac}\n\
         bridge = \"{bridge}\"\n\
         addresses = [\"{address}/24\", \"{SECOND}/24\", \"{SIXTH}/64\"]\n\
         [[domain.{name}.before]]\n\
         argv = [\"{HOOK}\", \"one word\"]\n\
         [[domain.{name}.after]]\n\
         argv = [\"{HOOK}\"]\n\
         timeout_seconds = 20\n\
         [[domain.{name}.after]]\n\
         argv = [\"/bin/false\"]\n\
         on_failure = \"warn\"\n"
    );
    fs::write(scene.rig.site(At::B).path(PLAN), text).context("write the plan")
}

const BY_SOURCE: &str = "source = \"vmbr0\"";

/// The environment that the hook had at a stage; nothing if it was not run.
fn seen(scene: &Scene, stage: &str) -> Option<String> {
    fs::read_to_string(scene.rig.site(At::B).path(format!("{SEEN}{stage}"))).ok()
}

/// `vmdr` at site B: its exit code and all that it says.
fn said(scene: &Scene, words: &[&str]) -> Result<(Option<i32>, String)> {
    let output = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, words)?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned()))
}

#[test]
fn a_guest_comes_up_where_the_plan_says() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 50 --interval-ms 100");
    let mut scene = Scene::new("plan", guest)?;
    let (name, address) = (scene.guest.name.clone(), scene.guest.address);
    let elsewhere = Elsewhere::new(&scene)?;
    let hook = scene.rig.site(At::B).path(HOOK);
    fs::write(&hook, format!("#!/bin/sh\n{{ env; echo \"ARGUMENTS=$#:$1\"; }} > {SEEN}$VMDR_STAGE\n"))?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    scene.configure_receiver(&format!("plan = \"{PLAN}\"\n"));

    // What would fail on the day is refused at `protect`, by its place in the plan.
    write_plan(&scene, "br-none", BY_SOURCE)?;
    scene.start_receiver()?;
    let refused =
        daemon::vmdr_output(scene.rig.site(At::A), PROTECT_SECONDS_MAX, &["protect", &name, "--interval", "100ms"])?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    ensure!(!refused.status.success() && why.contains("br-none") && why.contains("plan.toml:4:10"), "{why}");
    write_plan(&scene, BRIDGE, BY_SOURCE)?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let (code, checked) = said(&scene, &["plan", "check"])?;
    ensure!(code == Some(0) && checked.contains("fits this site"), "{checked}");

    // A wrong one is refused before anything is done, and said in the status without being asked for.
    write_plan(&scene, BRIDGE, "mac = \"52:54:00:00:00\"")?;
    let (code, refusal) = said(&scene, &["activate", &name, "--yes"])?;
    ensure!(code == Some(1) && refusal.contains("plan.toml:3:7"), "{code:?}: {refusal}");
    write_plan(&scene, BRIDGE, "mac = \"52:54:00:00:00:77\"")?;
    let (code, refusal) = said(&scene, &["plan", "check", "-o", "json"])?;
    ensure!(code == Some(1) && refusal.contains("has no such NIC"), "{code:?}: {refusal}");
    wait_for("the plan in the status", Duration::from_secs(PROGRESS_SECONDS_MAX), || {
        let advice = scene.status(At::B)?["advice"].as_str().unwrap_or_default().to_owned();
        Ok(advice.contains("has no such NIC").then_some(()))
    })?;
    // So is one whose hook says no: what was to come after that is not even tried.
    write_plan(&scene, BRIDGE, BY_SOURCE)?;
    let path = scene.rig.site(At::B).path(PLAN);
    let refusing = fs::read_to_string(&path)?.replacen(
        &format!("\"{HOOK}\", \"one word\""),
        "\"/bin/sh\", \"-c\", \"echo full; exit 7\"",
        1,
    );
    fs::write(&path, refusing)?;
    let (code, refusal) = said(&scene, &["activate", &name, "--yes"])?;
    ensure!(
        code == Some(1) && refusal.contains("nothing was changed") && refusal.contains("it said: full"),
        "{refusal}"
    );
    ensure!(scene.status(At::B)?["generation"] == 1, "the protected host was fenced");
    ensure!(seen(&scene, "before").is_none(), "a hook of a plan that was refused was run");
    ensure!(scene.rig.site(At::B).processes_named("qemu-system-x86_64").is_empty(), "a guest was started");
    scene.wait_durable().context("the guest is no longer protected after what was refused")?;

    write_plan(&scene, BRIDGE, BY_SOURCE)?;
    let plan = daemon::vmdr_json(scene.rig.site(At::B), &["activate", &name, "--dry-run"])?["plan"].clone();
    ensure!(plan["mapping"][0]["from"] == "bridge vmbr0" && plan["mapping"][0]["to"] == "bridge br-dr", "{plan}");
    ensure!(plan["steps"][0].as_str().is_some_and(|step| step.contains(HOOK)), "{plan}");

    let before = scene.rig.client().ping(address, ANSWER)?;
    scene.wait_durable()?;
    scene.lose_site_a()?;
    let own = address.to_string();
    for address in [own.as_str(), SECOND, SIXTH] {
        elsewhere.believe(address)?;
        ensure!(elsewhere.neighbour(address)?.as_deref() == Some(STALE), "{address} is not believed to be elsewhere");
    }
    let report = scene.activate()?;
    check_report(&scene, &report)?;

    // The guest, at the address that it had, found by who believed it elsewhere.
    let mac =
        report["mapping"][0]["device"].as_str().and_then(|device| device.strip_prefix("NIC ")).context("a MAC")?;
    for address in [own.as_str(), SECOND, SIXTH] {
        wait_for(&format!("{address} at {mac}"), ANSWER, || {
            Ok((elsewhere.neighbour(address)?.as_deref() == Some(mac)).then_some(()))
        })
        .with_context(|| format!("the client has {:?}", elsewhere.ip(&["neigh", "show"])))?;
    }
    let client = Client::new(elsewhere.namespace.pid1());
    let after = client.ping(address, ANSWER).context("from the client at the other bridge")?;
    ensure!(after.boot == before.boot && after.tick >= before.tick, "resumed, not booted: {after:?}");
    client.self_check(address)?;
    let xml = scene.rig.site(At::B).virsh(&["dumpxml", "--inactive", &name])?;
    ensure!(xml.contains("bridge='br-dr'") && !xml.contains("vmbr0"), "{xml}");

    // Again: nothing is done twice.
    fs::remove_file(scene.rig.site(At::B).path(format!("{SEEN}after")))?;
    let again = scene.activate()?;
    ensure!(again["was_active"] == true && again["hooks"] == Value::Array(Vec::new()), "{again}");
    ensure!(seen(&scene, "after").is_none(), "the hooks ran again");
    scene.rig.finish()
}

/// The report has what was done, and the hooks had what is documented.
fn check_report(scene: &Scene, report: &Value) -> Result<()> {
    let hooks = report["hooks"].as_array().context("hooks")?;
    let hooks: Vec<(&str, bool)> =
        hooks.iter().map(|hook| (hook["stage"].as_str().unwrap_or_default(), hook["error"].is_null())).collect();
    ensure!(hooks == [("before", true), ("after", true), ("after", false)], "{report}");
    ensure!(report["announced"].as_array().is_some_and(|announced| announced.len() == 3), "{report}");
    ensure!(report["failed"].is_null() && report["warnings"] == Value::Array(Vec::new()), "{report}");
    let (name, address) = (&scene.guest.name, scene.guest.address);
    for (stage, arguments) in [("before", "1:one word"), ("after", "0:")] {
        let seen = seen(scene, stage).with_context(|| format!("the hook {stage} was not run"))?;
        for line in [
            format!("VMDR_STAGE={stage}"),
            format!("VMDR_DOMAIN={name}"),
            format!("VMDR_UUID={}", scene.guest.uuid()),
            format!("VMDR_PLAN={PLAN}"),
            format!("VMDR_ADDRESSES={address}/24 {SECOND}/24 {SIXTH}/64"),
            format!("ARGUMENTS={arguments}"),
        ] {
            ensure!(seen.lines().any(|has| has == line), "{stage}: {line} is not in {seen}");
        }
        let point = report["point"]["id"].as_str().context("the point")?;
        ensure!(seen.contains(&format!("VMDR_POINT={point}")), "{stage}: not {point}: {seen}");
        ensure!(seen.contains("VMDR_GENERATION=2") == (stage == "after"), "{stage}: {seen}");
        ensure!(seen.contains(&format!(",bridge,{BRIDGE},,")), "{stage}: {seen}");
    }
    Ok(())
}
