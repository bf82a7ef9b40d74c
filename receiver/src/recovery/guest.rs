//! Other addresses in a guest that was activated here, as the recovery plan says: through vmdr's tools in the guest
//! ([`vmdr_guest_channel::exchange`]), or else through the QEMU guest agent, which can do less.
//!
//! The guest is not believed and not waited for: what it says is bounded, and so is the time that all of it may take. A guest that has
//! the tools is also told what the time is, so that its clock does not stay where it was at the cut; and one whose plan has nothing to be
//! changed gets back what it had before another plan changed it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use serde_json::{Value, json};
use uuid::Uuid;
use vmdr_daemon::guest_channel::{GuestChannel, Line, NoAnswer, printable};
use vmdr_guest_channel::PORT;
use vmdr_guest_channel::exchange::{Conversation, Step};
use vmdr_guest_channel::network::{Mac, Network, Nic, Report, Route, Subnet};
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel, channel_socket};
use vmdr_hypervisor::libvirt::{Connection, Domain};
use vmdr_hypervisor::xml::Element;
use vmdr_plan::Cidr;
use vmdr_proto::control::Change;

use crate::activate::mapping::source_of;

/// How long the tools are waited for until they are heard of, where something is to be changed or they were there a moment ago...
const HEARD_LIMIT: Duration = Duration::from_secs(20);
/// ...in a guest that is booting...
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// ...and where something may only have to be given back...
const HOME_LIMIT: Duration = Duration::from_secs(5);
/// ...by a guest that is booting.
const HOME_BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to change what is to be changed, once it is heard of.
const WORK_LIMIT: Duration = Duration::from_secs(60);
/// How long one answer is waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The same in libvirt's whole seconds.
const ANSWER_SECONDS: i32 = 5;
/// Between two questions.
const REST: Duration = Duration::from_millis(100);
/// For so long a guest is told the time.
const CLOCK_FOR: Duration = Duration::from_secs(10);
/// Of what a program in the guest says so much is told.
const SAID_CHARS_MAX: usize = 200;
/// Addresses of a NIC that a guest's agent may claim.
const CLAIMED_MAX: usize = 64;

/// What a plan has a guest's network be.
pub fn wanted(original: &Element, plan: &vmdr_plan::Domain) -> Network {
    let subnet = |cidr: &Cidr| Subnet { address: cidr.address, prefix: cidr.prefix };
    let mut network = Network {
        hostname: plan.hostname.as_ref().map(|at| at.value.clone()),
        nameservers: plan.dns_servers.iter().map(|at| at.value).collect(),
        search: plan.dns_search.iter().map(|at| at.value.clone()).collect(),
        nics: Vec::new(),
    };
    for interface in original.find_all("devices/interface") {
        let address = interface.attribute_at("mac", "address").unwrap_or_default();
        let Ok(mac) = vmdr_plan::Mac::parse(address) else { continue };
        let said = plan.nic(Some(address), source_of(interface)).filter(|nic| nic.changed.is_some());
        let Some(said) = said else { continue };
        let everything = |via: IpAddr| {
            let address = if via.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
            Subnet { address, prefix: 0 }
        };
        let gateway = said.gateway.iter().map(|at| Route { to: everything(at.value), via: at.value });
        let routes = said.routes.iter().map(|route| Route { to: subnet(&route.to.value), via: route.via.value });
        network.nics.push(Nic {
            mac: Mac(mac.0),
            addresses: said.addresses.iter().map(|at| subnet(&at.value)).collect(),
            routes: gateway.chain(routes).collect(),
        });
    }
    network
}

/// In words, for what is going to be done.
pub fn steps(network: &Network) -> Vec<String> {
    let mut steps = Vec::new();
    for nic in &network.nics {
        let all = nic.addresses.iter().map(ToString::to_string).chain(nic.routes.iter().map(ToString::to_string));
        steps.push(format!("in the guest: NIC {} has {}", nic.mac, all.collect::<Vec<_>>().join(", ")));
    }
    if let Some(hostname) = &network.hostname {
        steps.push(format!("in the guest: its name is {hostname}"));
    }
    if network.has_resolver() {
        let servers: Vec<String> = network.nameservers.iter().map(ToString::to_string).collect();
        let all = [servers.join(", "), network.search.join(", ")].join(" ");
        steps.push(format!("in the guest: its resolver is {}", all.trim()));
    }
    steps
}

/// Why a guest cannot have what the plan says; nothing is asked of it.
pub fn refusal(original: &Element, plan: &vmdr_plan::Domain) -> Option<String> {
    let network = wanted(original, plan);
    for (i, nic) in network.nics.iter().enumerate() {
        let same = network.nics[..i].iter().find(|other| other.addresses.iter().any(|a| nic.addresses.contains(a)));
        if let Some(other) = same {
            let (a, b) = (other.mac, nic.mac);
            return Some(format!("NICs {a} and {b} would have the same addresses: say in the plan which by `mac`"));
        }
    }
    network.encode().err().map(|why| format!("the guest would not take the plan's addresses: {why}"))
}

/// Has a guest that runs here have this network; `boots`: it was not resumed. What came of each thing; nothing where there was nothing
/// to be done.
pub fn apply(uri: &str, uuid: Uuid, name: &str, live: &Element, network: &Network, boots: bool) -> Vec<Change> {
    if let Some(socket) = channel_socket(live, PORT) {
        let connected = channel(live, PORT).and_then(|port| port.attribute_at("target", "state")) == Some("connected");
        let limit = match (network.is_home(), boots) {
            (false, true) => BOOT_LIMIT,
            (true, true) => HOME_BOOT_LIMIT,
            (true, false) if !connected => HOME_LIMIT,
            _ => HEARD_LIMIT,
        };
        return by_tools(name, socket, network, limit, connected);
    }
    if network.is_home() {
        return Vec::new();
    }
    if channel(live, GUEST_AGENT_CHANNEL).is_some() {
        return by_agent(uri, uuid, network);
    }
    vec![failed("network", "the guest has neither vmdr's tools nor the QEMU guest agent, which would change it")]
}

fn failed(subject: impl Into<String>, error: impl Into<String>) -> Change {
    Change { subject: subject.into(), done: String::new(), error: error.into() }
}

/// `limit`: for the first word of them. `connected`: something in the guest has the port open.
fn by_tools(name: &str, socket: PathBuf, network: &Network, limit: Duration, connected: bool) -> Vec<Change> {
    let channel = match GuestChannel::open(name, socket, true) {
        Ok(channel) => channel,
        Err(error) => return vec![failed("network", format!("talk to the guest's tools: {error}"))],
    };
    let until = Instant::now() + limit;
    let line = loop {
        match channel.networker() {
            Ok(line) => break Ok(line),
            Err(why) if Instant::now() >= until || channel.is_greeted() => break Err(why),
            Err(_) => std::thread::sleep(REST),
        }
    };
    let is_older = line.is_err() && channel.is_greeted();
    let changes = match line.map_err(ToOwned::to_owned).and_then(|line| converse(&line, network, WORK_LIMIT)) {
        Ok(report) => complete(report, network),
        // A guest of which nothing is wanted may have tools that do not run, or that are older.
        Err(why) if network.is_home() && (!connected || is_older) => {
            tracing::debug!(
                domain = name,
                "the guest's tools were not asked to give back what they have changed: {why}"
            );
            Vec::new()
        }
        Err(why) => vec![failed("network", format!("vmdr's tools in the guest: {why}"))],
    };
    keep(channel);
    changes
}

/// Each thing of a report, and each NIC of which it has nothing.
fn complete(report: Report, network: &Network) -> Vec<Change> {
    let mut changes: Vec<Change> = report.items.into_iter().map(change).collect();
    for nic in &network.nics {
        let subject = format!("NIC {}", nic.mac);
        if !changes.iter().any(|change| change.subject == subject) {
            changes.push(failed(subject, "the report of the guest's tools has nothing of it"));
        }
    }
    changes
}

fn change(item: vmdr_guest_channel::network::Item) -> Change {
    Change { subject: printable(&item.subject), done: printable(&item.done), error: printable(&item.error) }
}

/// Has a channel go on telling the time for a while.
fn keep(channel: GuestChannel) {
    // Without a thread it ends now.
    let _ = std::thread::Builder::new().name("guest clock".to_owned()).spawn(move || {
        std::thread::sleep(CLOCK_FOR);
        drop(channel);
    });
}

/// Tells a guest that was activated without a plan the time, if it has the tools. Nobody waits for it.
pub fn tell_time(uri: &str, uuid: Uuid, name: &str) {
    let domain = Connection::open(uri).and_then(|connection| connection.domain_by_uuid(&uuid));
    let socket = domain.and_then(|domain| Ok(channel_socket(&domain.live_xml()?, PORT)));
    let channel = match socket {
        Ok(Some(socket)) => GuestChannel::open(name, socket, true).map_err(|error| error.to_string()),
        Ok(None) => return,
        Err(error) => Err(error.to_string()),
    };
    match channel {
        Ok(channel) => keep(channel),
        Err(error) => tracing::warn!(domain = name, "its clock is not stepped: {error}"),
    }
}

/// Asks until it is done.
fn converse(line: &Line, network: &Network, limit: Duration) -> Result<Report, String> {
    let until = Instant::now() + limit;
    let mut conversation = Conversation::new(network)?;
    while Instant::now() < until {
        match line.ask(line.number(), conversation.message(), ANSWER_LIMIT.min(limit)) {
            Ok(answer) => match conversation.hear(&answer) {
                Step::Done(report) => return Ok(report),
                Step::Failed(why) => return Err(printable(&why)),
                Step::Now => {}
                Step::Later => std::thread::sleep(REST),
            },
            // It is asked again: whatever it was, it can be repeated.
            Err(NoAnswer::Late | NoAnswer::Closed) => std::thread::sleep(REST),
        }
    }
    Err(format!("they were not done within {} s", limit.as_secs()))
}

/// Through the QEMU guest agent: `ip`, for what it can do.
fn by_agent(uri: &str, uuid: Uuid, network: &Network) -> Vec<Change> {
    const CANNOT: &str = "the QEMU guest agent cannot change it; vmdr's tools in the guest can";
    let mut changes = Vec::new();
    let until = Instant::now() + WORK_LIMIT;
    let domain = Connection::open(uri).and_then(|connection| connection.domain_by_uuid(&uuid));
    match domain.map_err(|error| error.to_string()).and_then(|domain| {
        let interfaces = ask(&domain, "guest-network-get-interfaces", &json!({}), until)?;
        Ok((domain, interfaces))
    }) {
        Err(error) => changes.push(failed("network", format!("the QEMU guest agent: {error}"))),
        Ok((domain, interfaces)) => {
            for nic in &network.nics {
                let subject = format!("NIC {}", nic.mac);
                let mut run = |words: &[String]| execute(&domain, words, until);
                let mut look = || ask(&domain, "guest-network-get-interfaces", &json!({}), until);
                changes.push(match by_ip(nic, &interfaces, &mut run, &mut look) {
                    Ok(done) => Change { subject, done, error: String::new() },
                    Err(error) => failed(subject, error),
                });
            }
            if !network.nics.is_empty() {
                changes.push(failed("after a reboot", "they are gone then: the QEMU guest agent cannot keep them"));
            }
        }
    }
    if network.hostname.is_some() {
        changes.push(failed("host name", CANNOT));
    }
    if network.has_resolver() {
        changes.push(failed("resolver", CANNOT));
    }
    changes
}

/// Asks the agent until it answers.
fn ask(domain: &Domain, command: &str, arguments: &Value, until: Instant) -> Result<Value, String> {
    loop {
        match domain.guest_agent_with(command, arguments, ANSWER_SECONDS) {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() >= until => return Err(printable(&error.to_string())),
            Err(_) => std::thread::sleep(5 * REST),
        }
    }
}

/// Runs a program in the guest.
fn execute(domain: &Domain, words: &[String], until: Instant) -> Result<(), String> {
    let Some((program, words)) = words.split_first() else { return Ok(()) };
    let arguments = json!({ "path": program, "arg": words, "capture-output": true });
    let told = |error: vmdr_hypervisor::Error| printable(&error.to_string());
    let started = domain.guest_agent_with("guest-exec", &arguments, ANSWER_SECONDS).map_err(told)?;
    let pid = started["pid"].as_i64().ok_or("guest-exec told no process")?;
    while Instant::now() < until {
        let status = domain.guest_agent_with("guest-exec-status", &json!({ "pid": pid }), ANSWER_SECONDS);
        let status = status.map_err(told)?;
        if status["exited"] == true {
            if status["exitcode"] == 0 {
                return Ok(());
            }
            let said = BASE64.decode(status["err-data"].as_str().unwrap_or_default().as_bytes()).unwrap_or_default();
            let said: String = printable(&String::from_utf8_lossy(&said)).chars().take(SAID_CHARS_MAX).collect();
            return Err(format!("`{program} {}` ended with {}: {said}", words.join(" "), status["exitcode"]));
        }
        std::thread::sleep(REST);
    }
    Err(format!("`{program} {}` did not end in time", words.join(" ")))
}

/// Has a NIC have its addresses and routes, by a program that is run in the guest.
fn by_ip(
    nic: &Nic,
    interfaces: &Value,
    run: &mut dyn FnMut(&[String]) -> Result<(), String>,
    look: &mut dyn FnMut() -> Result<Value, String>,
) -> Result<String, String> {
    let interface = interface_of(nic, interfaces)?;
    let device = interface["name"].as_str().filter(|name| is_device(name)).ok_or("it has no name that can be used")?;
    let had = claimed_of(interface);
    let mut ip = |words: &str| {
        let words: Vec<String> = std::iter::once("ip").chain(words.split(' ')).map(str::to_owned).collect();
        run(&words)
    };
    // It is announced here, which a guest that looks whether somebody else has the address would take for that somebody.
    let replace = |subnet: &Subnet| {
        let six = if subnet.address.is_ipv6() { " nodad" } else { "" };
        format!("address replace {subnet} dev {device}{six}")
    };
    ip(&format!("link set dev {device} up"))?;
    for address in &nic.addresses {
        ip(&replace(address))?;
    }
    let gone: Vec<&Subnet> = had.iter().filter(|subnet| !nic.addresses.contains(subnet)).collect();
    for address in &gone {
        // It may be gone with another one, or by itself; what is left is seen in the end.
        if let Err(why) = ip(&format!("address delete {address} dev {device}")) {
            tracing::debug!("in a guest: {why}");
        }
    }
    if !gone.is_empty() {
        // With the first address of a network Linux takes the others.
        for address in &nic.addresses {
            ip(&replace(address))?;
        }
    }
    for route in &nic.routes {
        let six = if route.via.is_ipv6() { "-6 " } else { "" };
        ip(&format!("{six}route replace {} via {} dev {device}", route.to, route.via))?;
    }
    let now = look()?;
    let has = claimed_of(interface_of(nic, &now)?);
    let missing =
        nic.addresses.iter().filter(|subnet| !has.contains(subnet)).map(|subnet| format!("it has not {subnet}"));
    let left = gone.iter().filter(|subnet| has.contains(subnet)).map(|subnet| format!("it still has {subnet}"));
    let wrong: Vec<String> = missing.chain(left).collect();
    if !wrong.is_empty() {
        return Err(format!("{device}: {}", wrong.join(", ")));
    }
    let what = nic.addresses.iter().map(ToString::to_string).chain(nic.routes.iter().map(ToString::to_string));
    Ok(format!("{} on {device}, by the QEMU guest agent", what.collect::<Vec<_>>().join(", ")))
}

/// The device that has a NIC's MAC address, as the guest's agent tells.
fn interface_of<'a>(nic: &Nic, interfaces: &'a Value) -> Result<&'a Value, String> {
    let of_mac = |interface: &&Value| {
        let address = interface["hardware-address"].as_str().unwrap_or_default();
        vmdr_plan::Mac::parse(address).is_ok_and(|mac| mac.0 == nic.mac.0)
    };
    let mut found = interfaces.as_array().into_iter().flatten().filter(of_mac);
    let interface = found.next().ok_or("the guest has no such NIC")?;
    match found.next() {
        None => Ok(interface),
        Some(_) => Err("several devices of the guest have this MAC address".to_owned()),
    }
}

fn claimed_of(interface: &Value) -> Vec<Subnet> {
    interface["ip-addresses"].as_array().into_iter().flatten().take(CLAIMED_MAX).filter_map(claimed).collect()
}

/// The guest has chosen it, and it becomes a word of a command.
fn is_device(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !name.starts_with(['-', '.'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// An address of global scope that the guest claims.
fn claimed(address: &Value) -> Option<Subnet> {
    let prefix = u8::try_from(address["prefix"].as_u64()?).ok()?;
    let address: IpAddr = address["ip-address"].as_str()?.parse().ok()?;
    let local = match address {
        IpAddr::V4(four) => four.is_loopback() || four.is_link_local(),
        IpAddr::V6(six) => six.is_loopback() || six.is_unicast_link_local(),
    };
    (!local && prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some(Subnet { address, prefix })
}

#[cfg(test)]
mod tests;
