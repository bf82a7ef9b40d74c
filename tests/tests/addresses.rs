//! A recovery plan gives a guest other addresses at the backup site, and names that lead to them; both outlive a reboot of the guest.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;
use vmdr_tests::client::Client;
use vmdr_tests::daemon;
use vmdr_tests::exec;
use vmdr_tests::guest::{BOOT_SECONDS_MAX, GuestSpec};
use vmdr_tests::knot::{self, Knot};
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ACTIVATE_SECONDS_MAX, ANSWER, Scene};
use vmdr_tests::site::Namespace;
use vmdr_tests::wait::wait_for;

const PLAN: &str = "/etc/vmdr/plan.toml";
/// The guest's second NIC. It has no address at the first site.
const SECOND_MAC: &str = "52:54:00:4e:00:63";
/// Where its NICs are at the second site, and what they have there.
const BRIDGES: [&str; 2] = ["br-dr", "br-dmz"];
const NEW: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 79, 0, 10), Ipv4Addr::new(10, 80, 0, 5)];
const SIXTH: &str = "fd00:79::10";
/// The client's, in the same networks.
const CLIENT: [&str; 2] = ["10.79.0.1/24", "10.80.0.1/24"];
const CLIENT_SIXTH: &str = "fd00:79::1/64";
/// A network behind the client, to which the guest has a route.
const BEHIND: &str = "10.81.0.1";
/// The client's, in the network that the guest was in at the first site.
const NEIGHBOUR: &str = "10.78.0.99/24";
/// The zone of names of the first address.
const REVERSE: &str = "79.10.in-addr.arpa";

/// A client at both bridges of site B, which nothing else leads to.
fn client_at_b(scene: &Scene) -> Result<Namespace> {
    let directory = scene.rig.directory().join("elsewhere");
    fs::create_dir(&directory).context("create the client's directory")?;
    let namespace = Namespace::start(&directory, &[])?;
    let ip = |words: &[&str]| exec::run(namespace.net_command("ip").args(words)).map(drop);
    let site = scene.rig.site(At::B).namespace()?;
    let pid1 = namespace.pid1().to_string();
    for (number, bridge) in BRIDGES.into_iter().enumerate() {
        let (outer, inner) = (format!("dr{number}"), format!("eth{number}"));
        for words in [
            &["link", "add", bridge, "type", "bridge", "mcast_snooping", "0"][..],
            &["link", "set", bridge, "up"],
            &["link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", &pid1],
            &["link", "set", &outer, "master", bridge, "up"],
        ] {
            exec::run(site.net_command("ip").args(words))?;
        }
        ip(&["addr", "add", CLIENT[number], "dev", &inner])?;
        ip(&["link", "set", &inner, "up"])?;
    }
    ip(&["addr", "add", CLIENT_SIXTH, "dev", "eth0", "nodad"])?;
    ip(&["addr", "add", &format!("{BEHIND}/24"), "dev", "lo"])?;
    ip(&["addr", "add", NEIGHBOUR, "dev", "eth0"])?;
    Ok(namespace)
}

fn write_plan(scene: &Scene) -> Result<()> {
    let name = &scene.guest.name;
    let [first, second] = NEW;
    let text = format!(
        "[dns]\n\
         server = \"{server}\"\n\
         zone = \"{zone}\"\n\
         reverse_zones = [\"{REVERSE}\"]\n\
         key_file = \"{key}\"\n\
         ttl_seconds = 30\n\
         [domain.{name}]\n\
         hostname = \"{name}-dr\"\n\
         dns_servers = [\"10.79.0.1\"]\n\
         dns_names = [\"{name}.{zone}\"]\n\
         [[domain.{name}.nic]]\n\
         mac = \"{SECOND_MAC}\"\n\
         bridge = \"{dmz}\"\n\
         addressing = \"changed\"\n\
         addresses = [\"{second}/24\"]\n\
         [[domain.{name}.nic]]\n\
         source = \"vmbr0\"\n\
         bridge = \"{dr}\"\n\
         addressing = \"changed\"\n\
         addresses = [\"{first}/24\", \"{SIXTH}/64\"]\n\
         gateway = \"10.79.0.1\"\n",
        server = knot::SERVER,
        zone = knot::ZONE,
        key = knot::KEY_FILE,
        dr = BRIDGES[0],
        dmz = BRIDGES[1],
    );
    // By its MAC address, as both are in one bridge at the first site.
    let mac = first_mac(scene);
    let text = text.replace("source = \"vmbr0\"", &format!("mac = \"{mac}\""));
    fs::write(scene.rig.site(At::B).path(PLAN), text).context("write the plan")
}

fn first_mac(scene: &Scene) -> String {
    let [_, b, c, d] = scene.guest.address.octets();
    format!("52:54:00:{b:02x}:{c:02x}:{d:02x}")
}

/// The guest answers at both of its addresses and at the one of the other family, and finds its way out.
fn check_reachable(client: &Client, namespace: &Namespace, limit: Duration) -> Result<String> {
    let boots: Result<Vec<String>> = NEW
        .into_iter()
        .map(|address| Ok(client.ping(address, limit).with_context(|| format!("the guest at {address}"))?.boot))
        .collect();
    let boots = boots?;
    ensure!(boots[0] == boots[1], "two guests: {boots:?}");
    for words in [&["-6", "-c", "1", "-W", "5", SIXTH][..], &["-c", "1", "-W", "5", "-I", BEHIND, "10.79.0.10"]] {
        wait_for("an echo", limit, || {
            Ok(exec::run(namespace.net_command("busybox").arg("ping").args(words)).is_ok().then_some(()))
        })
        .with_context(|| format!("ping {}", words.join(" ")))?;
    }
    Ok(boots[0].clone())
}

#[test]
fn a_guest_is_given_other_addresses_that_outlive_a_reboot() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 32 --pages 50 --interval-ms 100").tools();
    let second = format!(
        "{}<interface type='bridge'><source bridge='vmbr0'/><mac address='{SECOND_MAC}'/><model type='virtio'/></interface>",
        guest.extra_devices
    );
    let guest = guest.extra(&second, "");
    let mut scene = Scene::new("addresses", guest)?;
    let name = scene.guest.name.clone();
    let namespace = client_at_b(&scene)?;
    let client = Client::new(namespace.pid1());
    let _knot = Knot::start(scene.rig.site(At::B), REVERSE)?;
    scene.configure_receiver(&format!("plan = \"{PLAN}\"\n"));
    write_plan(&scene)?;
    scene.start_receiver()?;
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let checked = daemon::vmdr_output(scene.rig.site(At::B), ACTIVATE_SECONDS_MAX, &["plan", "check"])?;
    ensure!(checked.status.success(), "{checked:?}");
    let plan = daemon::vmdr_json(scene.rig.site(At::B), &["activate", &name, "--dry-run"])?["plan"].clone();
    ensure!(plan["steps"].to_string().contains("10.79.0.10/24"), "{plan}");

    let before = scene.rig.client().ping(scene.guest.address, ANSWER)?;
    scene.wait_durable()?;
    scene.lose_site_a()?;
    let report = scene.activate()?;
    check_report(&report, &name)?;
    let boot = check_reachable(&client, &namespace, ANSWER)?;
    ensure!(boot == before.boot, "it was booted, not resumed");
    let old = scene.guest.address.to_string();
    let echo = exec::run(namespace.net_command("busybox").args(["ping", "-c", "1", "-W", "2", &old]));
    ensure!(echo.is_err(), "it has its old address, too");
    client.self_check(NEW[0])?;

    // Names, as a resolver sees them.
    let site = scene.rig.site(At::B);
    let full = format!("{name}.{}", knot::ZONE);
    ensure!(knot::ask(site, &full, "A")? == ["10.79.0.10", "10.80.0.5"], "{:?}", knot::ask(site, &full, "A"));
    ensure!(knot::ask(site, &full, "AAAA")? == [SIXTH], "{:?}", knot::ask(site, &full, "AAAA"));
    let pointer = knot::ask(site, "10.0.79.10.in-addr.arpa", "PTR")?;
    ensure!(pointer == [format!("{full}.")], "{pointer:?}");

    // A reboot, after which the guest's own configuration is what it was, and vmdr's tools give it the new addresses again.
    site.virsh(&["reset", &name])?;
    wait_for("the guest to have booted", Duration::from_secs(BOOT_SECONDS_MAX), || {
        let pong = client.ping(NEW[0], Duration::from_secs(2)).ok();
        Ok(pong.filter(|pong| pong.boot != boot).map(drop))
    })?;
    let booted = check_reachable(&client, &namespace, ANSWER)?;
    ensure!(booted != boot, "it was not booted");
    scene.rig.finish()
}

/// The report has each NIC, the resolver, the name, what is after a reboot, and each zone.
fn check_report(report: &Value, name: &str) -> Result<()> {
    let changes = |key: &str| -> Result<Vec<(String, String)>> {
        let all = report[key].as_array().with_context(|| format!("no {key} in {report}"))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        ensure!(all.iter().all(|change| change["error"].is_null()), "{report}");
        Ok(all.iter().map(|change| (text(&change["subject"]), text(&change["done"]))).collect())
    };
    let network = changes("network")?;
    let said = |what: &str| network.iter().any(|(subject, done)| format!("{subject}: {done}").contains(what));
    for what in [
        "10.79.0.10/24, fd00:79::10/64, 0.0.0.0/0 via 10.79.0.1 on eth",
        &format!("NIC {SECOND_MAC}: 10.80.0.5/24 on eth"),
        &format!("host name: {name}-dr"),
        "resolver: 10.79.0.1",
        "after a reboot: the same, by vmdr's tools",
    ] {
        ensure!(said(what), "{what} is not in {report}");
    }
    let dns = changes("dns")?;
    ensure!(dns.len() == 2 && dns[1].0.ends_with(REVERSE), "{report}");
    ensure!(report["failed"].is_null() && report["warnings"] == Value::Array(Vec::new()), "{report}");
    let announced = report["announced"].to_string();
    ensure!(announced.contains("10.79.0.10 on br-dr") && announced.contains("10.80.0.5 on br-dmz"), "{report}");
    Ok(())
}
