//! Tells the neighbours of a guest that was activated here where its addresses are now.
//!
//! From the bridge that its NIC is in now, with its MAC address: once at once, and some times more within seconds, since a frame may
//! be lost, and Linux leaves an entry as it is that was changed within the last second. The addresses are the plan's; of a NIC of
//! which the plan has none the guest's own agent is asked, beside the activation.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel};
use vmdr_hypervisor::libvirt::Connection;
use vmdr_hypervisor::xml::Element;
use vmdr_plan::Mac;

use super::packet;
use crate::activate::mapping::{Mapping, source_of};

/// When what was announced is announced again, after the first time.
const AGAIN: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_millis(1200), Duration::from_millis(2500), Duration::from_secs(5)];
/// How long the guest's agent is asked for addresses.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// How long one question may take, in libvirt's whole seconds.
const ANSWER_SECONDS: i32 = 5;
/// Between two questions.
const REST: Duration = Duration::from_secs(1);
/// Addresses of a NIC that are announced, at most: a guest's agent may claim any number.
const ADDRESSES_MAX: usize = 64;

/// A NIC of the guest as it runs here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    mac: Mac,
    bridge: String,
    vlan: Option<u16>,
}

/// What is to be announced, and of which NICs that is not known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    known: Vec<(Nic, IpAddr)>,
    unknown: Vec<Nic>,
}

/// `original`: the definition of the protected host, by which the plan names NICs; `live`: the guest as it runs here; `changed`: of NICs
/// that are given other addresses, or of those that are not.
pub fn collect(original: &Element, live: &Element, mapping: &Mapping, changed: bool) -> Announcement {
    let mut found = Announcement::default();
    let Some(plan) = &mapping.plan else { return found };
    for interface in live.find_all("devices/interface") {
        let address = interface.attribute_at("mac", "address").unwrap_or_default();
        let (Ok(mac), Some(bridge)) = (Mac::parse(address), interface.attribute_at("source", "bridge")) else {
            continue;
        };
        let vlan = interface.attribute_at("vlan/tag", "id").and_then(|id| id.parse().ok());
        let nic = Nic { mac, bridge: bridge.to_owned(), vlan };
        let was = original
            .find_all("devices/interface")
            .into_iter()
            .find(|i| i.attribute_at("mac", "address").is_some_and(|a| a.eq_ignore_ascii_case(address)));
        let said = plan.nic(Some(address), was.and_then(source_of));
        if !said.map_or(plan.announce, |said| said.announce) || changed != said.is_some_and(|nic| nic.changed.is_some())
        {
            continue;
        }
        let addresses = said.map(|said| said.addresses.as_slice()).unwrap_or_default();
        if addresses.is_empty() {
            found.unknown.push(nic);
        } else {
            found.known.extend(addresses.iter().map(|at| (nic.clone(), at.value.address)));
        }
    }
    found
}

fn send(announced: &[(Nic, IpAddr)]) -> Vec<Result<String, String>> {
    let each = announced.iter().map(|(nic, address)| {
        let vlan = nic.vlan.map(|vlan| format!(", VLAN {vlan}")).unwrap_or_default();
        let what = format!("{address} on {}{vlan}", nic.bridge);
        match packet::send(&nic.bridge, &packet::announcements(nic.mac, *address, nic.vlan)) {
            Ok(()) => Ok(what),
            Err(error) => Err(format!("announce {what}: {error}")),
        }
    });
    each.collect()
}

/// Announces what is known at once, and the rest, and all of it again, on a thread of its own. Gives what was announced, and what
/// could not be.
pub fn begin(uri: &str, uuid: Uuid, name: &str, of: Announcement) -> (Vec<String>, Vec<String>) {
    let (mut told, mut failed) = (Vec::new(), Vec::new());
    for sent in send(&of.known) {
        match sent {
            Ok(what) => told.push(what),
            Err(what) => failed.push(what),
        }
    }
    if of != Announcement::default() {
        let (uri, name) = (uri.to_owned(), name.to_owned());
        let spawned =
            std::thread::Builder::new().name("announce".to_owned()).spawn(move || go_on(&uri, uuid, &name, of));
        if let Err(error) = spawned {
            failed.push(format!("announce again: {error}"));
        }
    }
    (told, failed)
}

fn go_on(uri: &str, uuid: Uuid, name: &str, of: Announcement) {
    let mut announced = of.known;
    if !of.unknown.is_empty() {
        match ask(uri, uuid) {
            Some(claimed) => {
                for nic in of.unknown {
                    let addresses = claimed.get(&nic.mac).into_iter().flatten().take(ADDRESSES_MAX);
                    announced.extend(addresses.map(|address| (nic.clone(), *address)));
                }
            }
            None => tracing::info!(
                domain = name,
                "its addresses are not known (the plan has none, its guest agent says none): not announced"
            ),
        }
    }
    let mut last = Duration::ZERO;
    for (i, at) in AGAIN.into_iter().enumerate() {
        for sent in send(&announced) {
            match sent {
                Ok(what) if i == 0 => tracing::info!(domain = name, "announced {what}"),
                Err(what) if i == 0 => tracing::warn!(domain = name, "{what}"),
                _ => {}
            }
        }
        std::thread::sleep(at.saturating_sub(last));
        last = at;
    }
}

/// The addresses that a guest's agent claims, by MAC address.
fn ask(uri: &str, uuid: Uuid) -> Option<BTreeMap<Mac, Vec<IpAddr>>> {
    let end = Instant::now() + ASK_LIMIT;
    loop {
        let domain = Connection::open(uri).and_then(|connection| connection.domain_by_uuid(&uuid));
        let asked = domain.and_then(|domain| {
            channel(&domain.live_xml()?, GUEST_AGENT_CHANNEL)
                .map(|_| domain.guest_agent("guest-network-get-interfaces", ANSWER_SECONDS))
                .transpose()
        });
        match asked {
            Ok(answer) => return answer.map(|answer| addresses(&answer)),
            Err(_) if Instant::now() < end => std::thread::sleep(REST),
            Err(_) => return None,
        }
    }
}

fn addresses(answer: &Value) -> BTreeMap<Mac, Vec<IpAddr>> {
    let mut all: BTreeMap<Mac, Vec<IpAddr>> = BTreeMap::new();
    for interface in answer.as_array().into_iter().flatten() {
        let Some(Ok(mac)) = interface["hardware-address"].as_str().map(Mac::parse) else { continue };
        for address in interface["ip-addresses"].as_array().into_iter().flatten() {
            let address = address["ip-address"].as_str().and_then(|text| text.parse::<IpAddr>().ok());
            let of_a_nic = |a: &IpAddr| !a.is_loopback() && !a.is_unspecified() && !a.is_multicast();
            all.entry(mac).or_default().extend(address.filter(of_a_nic));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_plan::Plan;

    fn xml(kind: &str, source: &str, macs: &[&str]) -> Element {
        let nic = |mac: &&str| format!("<interface type='{kind}'><mac address='{mac}'/><source {source}/></interface>");
        let nics: String = macs.iter().map(nic).collect();
        Element::parse(&format!("<domain><devices>{nics}</devices></domain>")).unwrap()
    }

    fn mapping(plan: &str) -> Mapping {
        Mapping { plan: Some(Plan::parse(plan).unwrap().domain("web1", "").clone()), ..Mapping::default() }
    }

    #[test]
    fn what_the_plan_says_of_a_nic_is_announced_where_it_is_now() {
        let macs = ["52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"];
        let original = xml("network", "network='lan'", &macs);
        let live = xml("network", "network='dr' bridge='virbr7'", &macs);
        let plan = "[[domain.web1.nic]]\nmac = \"52:54:00:00:00:01\"\nnetwork = \"dr\"\naddresses = [\"10.1.0.5/24\", \"fd00::5/64\"]\n\
                    [[domain.web1.nic]]\nmac = \"52:54:00:00:00:02\"\nnetwork = \"dr\"\nannounce = false\naddresses = [\"10.1.0.6/24\"]\n\
                    [[domain.web1.nic]]\nsource = \"lan\"\nnetwork = \"dr\"\n";
        let found = collect(&original, &live, &mapping(plan), false);
        let known: Vec<String> =
            found.known.iter().map(|(nic, at)| format!("{} {at} {}", nic.mac, nic.bridge)).collect();
        assert_eq!(known, ["52:54:00:00:00:01 10.1.0.5 virbr7", "52:54:00:00:00:01 fd00::5 virbr7"]);
        assert_eq!(found.unknown.iter().map(|nic| nic.mac.to_string()).collect::<Vec<_>>(), [macs[2]]);
        assert_eq!(collect(&original, &live, &Mapping::default(), false), Announcement::default(), "no plan");
        let off = collect(&original, &live, &mapping("[domain.web1]\nannounce = false\n"), false);
        assert_eq!(off, Announcement::default());
    }

    #[test]
    fn a_guest_is_not_believed_everything() {
        let answer = serde_json::json!([
            { "hardware-address": "52:54:00:00:00:01", "ip-addresses": [
                { "ip-address": "10.1.0.5" }, { "ip-address": "127.0.0.1" }, { "ip-address": "224.0.0.1" },
                { "ip-address": "x" }, { "ip-address": 3 }, { "ip-address": "fd00::5" }] },
            { "hardware-address": "nonsense", "ip-addresses": [{ "ip-address": "10.1.0.6" }] },
            { "name": "lo" }, 7
        ]);
        let all = addresses(&answer);
        let expected: Vec<IpAddr> = ["10.1.0.5", "fd00::5"].map(|a| a.parse().unwrap()).to_vec();
        assert_eq!(all.into_values().collect::<Vec<_>>(), [expected]);
        assert!(addresses(&Value::Null).is_empty());
    }
}
