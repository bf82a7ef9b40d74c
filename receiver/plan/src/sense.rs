//! Whether what a plan says goes together: between the tables of a domain, and between domains.

use std::collections::HashMap;
use std::hash::Hash;

use crate::groups;
use crate::model::{Disk, DiskSelector, Domain, Nic, NicSelector, NicTarget, Plan, Storage};
use crate::place::{At, Place, Sink};

pub(crate) fn check(plan: &Plan, sink: &Sink<'_>) {
    for domain in &plan.domains {
        selectors(domain, sink);
        for nic in domain.nics.iter().filter(|nic| !nic.of_defaults) {
            routes(nic, sink);
        }
        ways_out(domain, sink);
        counts(domain, sink);
        names(plan, domain, sink);
    }
    let dns_names = plan.domains.iter().flat_map(|domain| &domain.dns_names);
    twice(dns_names.map(|name| (&name.value, name.place)), sink, |name, first| {
        format!("{name} leads to another domain at {first} already")
    });
    let hostnames = plan.domains.iter().filter_map(|domain| domain.hostname.as_ref());
    twice(hostnames.map(|name| (&name.value, name.place)), sink, |name, first| {
        format!("{name} is another domain's name at {first} already")
    });
    twice(plan.everyone.nics.iter().map(|nic| (&nic.selector.value, nic.selector.place)), sink, |_, first| {
        format!("this source is mapped at {first} already")
    });
    macs(plan, sink);
    addresses(plan, sink);
    storages(plan, sink);
    cycles(plan, sink);
    groups::check(plan, sink);
}

/// Says of every repetition where it was first.
pub(crate) fn twice<T: Eq + Hash>(
    all: impl Iterator<Item = (T, Place)>,
    sink: &Sink<'_>,
    message: impl Fn(&T, Place) -> String,
) {
    let mut seen: HashMap<T, Place> = HashMap::new();
    let mut all: Vec<_> = all.collect();
    all.sort_by_key(|(_, place)| *place);
    for (what, place) in all {
        match seen.get(&what) {
            Some(first) => sink.wrong(place, message(&what, *first)),
            None => {
                seen.insert(what, place);
            }
        }
    }
}

fn selectors(domain: &Domain, sink: &Sink<'_>) {
    let own = domain.nics.iter().filter(|nic| !nic.of_defaults);
    let sources = own.filter(|nic| matches!(nic.selector.value, NicSelector::Source(_)));
    twice(sources.map(|nic| (&nic.selector.value, nic.selector.place)), sink, |_, first| {
        format!("the NICs of this source are described at {first} already")
    });
    twice(domain.disks.iter().map(|disk| (&disk.selector.value, disk.selector.place)), sink, |_, first| {
        format!("this disk has a place at {first} already")
    });
}

/// Who goes through a gateway has to reach it.
fn routes(nic: &Nic, sink: &Sink<'_>) {
    if nic.addresses.is_empty() {
        return;
    }
    let vias = nic.routes.iter().map(|route| (&route.via, "through"));
    for (via, _) in nic.gateway.iter().map(|gateway| (gateway, "gateway")).chain(vias) {
        if nic.addresses.iter().any(|own| own.value.address == via.value) {
            sink.wrong(via.place, format!("{} is the guest's own address", via.value));
        } else if !link_local(via.value) && !nic.addresses.iter().any(|own| own.value.contains(via.value)) {
            let own: Vec<String> = nic.addresses.iter().map(|own| own.value.to_string()).collect();
            sink.wrong(via.place, format!("{} is in none of the NIC's networks ({})", via.value, own.join(", ")));
        }
    }
}

fn link_local(address: std::net::IpAddr) -> bool {
    matches!(address, std::net::IpAddr::V6(six) if six.is_unicast_link_local())
}

/// Of each family one way leads to everything else, and one to each network.
fn ways_out(domain: &Domain, sink: &Sink<'_>) {
    let changed = domain.nics.iter().filter(|nic| nic.changed.is_some());
    let ways = changed.flat_map(|nic| {
        let gateways = nic.gateway.iter().map(|gateway| {
            let everything = if gateway.value.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            (everything.to_owned(), gateway.place)
        });
        gateways.chain(nic.routes.iter().map(|route| (route.to.value.to_string(), route.to.place)))
    });
    twice(ways, sink, |to, first| match to.as_str() {
        "0.0.0.0/0" | "::/0" => format!("the guest has its way to everything else ({to}) at {first} already"),
        _ => format!("the guest has a route to {to} at {first} already"),
    });
    for route in domain.nics.iter().flat_map(|nic| &nic.routes) {
        if route.to.value.address.is_ipv4() != route.via.value.is_ipv4() {
            let (to, via) = (route.to.value, route.via.value);
            sink.wrong(route.via.place, format!("{to} cannot be reached through {via}, which is of the other family"));
        }
    }
}

/// No more than the tools in a guest take.
fn counts(domain: &Domain, sink: &Sink<'_>) {
    const RESOLVER_MAX: usize = 8;
    const ADDRESSES_MAX: usize = 32;
    const ROUTES_MAX: usize = 60;
    let most = |place: Option<Place>, max: usize, what: &str| {
        if let Some(place) = place {
            sink.wrong(place, format!("this is one {what} too many: a guest takes at most {max}"));
        }
    };
    most(domain.dns_servers.get(RESOLVER_MAX).map(|at| at.place), RESOLVER_MAX, "name server");
    most(domain.dns_search.get(RESOLVER_MAX).map(|at| at.place), RESOLVER_MAX, "domain to append");
    for nic in domain.nics.iter().filter(|nic| nic.changed.is_some()) {
        for address in nic.addresses.iter().filter(|at| at.value.prefix == 0) {
            sink.wrong(
                address.place,
                format!("{} has all addresses in its network: a guest does not take it", address.value),
            );
        }
        most(nic.addresses.get(ADDRESSES_MAX).map(|at| at.place), ADDRESSES_MAX, "address");
        most(nic.routes.get(ROUTES_MAX).map(|route| route.to.place), ROUTES_MAX, "route");
    }
}

fn names(plan: &Plan, domain: &Domain, sink: &Sink<'_>) {
    for needed in &domain.needs {
        if needed.value == domain.name.value {
            sink.wrong(needed.place, format!("{} needs itself", needed.value));
        } else if !plan.domains.iter().any(|other| other.name.value == needed.value) {
            sink.wrong(needed.place, format!("{} is needed, but no domain of this plan", needed.value));
        }
    }
    for name in &domain.dns_names {
        match &plan.dns {
            None => sink.wrong(name.place, "`dns_names` needs a [dns] section that says who is told"),
            Some(dns) => {
                let zone = &dns.value.zone;
                if name.value != *zone && !name.value.ends_with(&format!(".{zone}")) {
                    sink.wrong(name.place, format!("{} is not in the zone {zone}", name.value));
                } else if domain.nics.iter().all(|nic| nic.addresses.is_empty()) {
                    let why = "none of the domain's NICs has `addresses`";
                    sink.wrong(name.place, format!("{} leads nowhere: {why}", name.value));
                }
            }
        }
    }
}

/// Every MAC address has one NIC.
fn macs(plan: &Plan, sink: &Sink<'_>) {
    let nics = plan.domains.iter().flat_map(|domain| &domain.nics).filter(|nic| !nic.of_defaults);
    let mut all = Vec::new();
    for nic in nics {
        if let NicSelector::Mac(mac) = &nic.selector.value {
            all.push((*mac, nic.selector.place));
        }
        if let Some(new) = &nic.new_mac {
            if nic.selector.value == NicSelector::Mac(new.value) {
                sink.wrong(new.place, format!("{} is the address that the NIC has", new.value));
            } else {
                all.push((new.value, new.place));
            }
        }
    }
    twice(all.into_iter(), sink, |mac, first| format!("{mac} is a NIC's at {first} already"));
}

/// Whether two NICs are certainly in different networks.
fn apart(a: &Nic, b: &Nic) -> bool {
    let of = |nic: &Nic| -> Option<(NicTarget, Option<u16>)> {
        nic.target.as_ref().map(|target| (target.value.clone(), nic.vlan.as_ref().map(|vlan| vlan.value)))
    };
    matches!((of(a), of(b)), (Some(a), Some(b)) if a != b)
}

fn addresses(plan: &Plan, sink: &Sink<'_>) {
    let nics: Vec<&Nic> = plan.domains.iter().flat_map(|domain| &domain.nics).filter(|nic| !nic.of_defaults).collect();
    let mut all: Vec<(&Nic, &At<crate::Cidr>)> =
        nics.iter().flat_map(|nic| nic.addresses.iter().map(move |address| (*nic, address))).collect();
    all.sort_by_key(|(_, address)| address.place);
    for (i, (nic, address)) in all.iter().enumerate() {
        let same = |(_, other): &&(&Nic, &At<crate::Cidr>)| other.value.address == address.value.address;
        if let Some((_, first)) = all[..i].iter().filter(same).find(|(other, _)| !apart(nic, other)) {
            let what = address.value.address;
            sink.wrong(address.place, format!("{what} is a NIC's at {} already", first.place));
        }
    }
    for nic in nics {
        for (i, address) in nic.addresses.iter().enumerate() {
            let other = nic.addresses[..i].iter().find(|other| {
                let (a, b) = (&address.value, &other.value);
                a.address != b.address && a.prefix != b.prefix && (a.contains(b.address) || b.contains(a.address))
            });
            if let Some(other) = other {
                let (a, b) = (address.value, other.value);
                sink.wrong(address.place, format!("{a} overlaps {b} at {}, with another prefix length", other.place));
            }
        }
    }
}

/// Two disks never lie in one place.
fn storages(plan: &Plan, sink: &Sink<'_>) {
    let disks = plan.domains.iter().flat_map(|domain| &domain.disks);
    let key = |disk: &Disk| match &disk.storage.value {
        Storage::File { path, .. } | Storage::Device(path) => path.clone(),
        Storage::Iscsi(lun) => format!("LUN {} of {} at {}", lun.lun, lun.iqn, lun.portal),
        Storage::Rbd(rbd) => format!("the RBD image {}/{}", rbd.pool, rbd.image),
        Storage::Nbd(nbd) => format!("the NBD export {} of {}:{}", nbd.export, nbd.host, nbd.port),
    };
    twice(disks.map(|disk| (key(disk), disk.storage.place)), sink, |what, first| {
        format!("{what} is another disk's at {first} already")
    });
}

/// Says of each circle once: at the name that closes it, in the domain of it that stands first.
fn cycles(plan: &Plan, sink: &Sink<'_>) {
    let index = |name: &str| plan.domains.iter().position(|domain| domain.name.value == name);
    let mut told = vec![false; plan.domains.len()];
    let mut order: Vec<usize> = (0..plan.domains.len()).collect();
    order.sort_by_key(|i| plan.domains[*i].name.place);
    for start in order {
        // The shortest way back to where it began, breadth first.
        let mut from: Vec<Option<usize>> = vec![None; plan.domains.len()];
        let mut queue = std::collections::VecDeque::from([start]);
        'search: while let Some(at) = queue.pop_front() {
            for needed in &plan.domains[at].needs {
                let Some(next) = index(&needed.value).filter(|next| *next != at) else { continue };
                if next == start {
                    let mut circle = vec![at];
                    while let Some(before) = circle.last().and_then(|last| from[*last]) {
                        circle.push(before);
                    }
                    circle.reverse();
                    if !circle.iter().any(|member| told[*member]) {
                        let mut names: Vec<&str> =
                            circle.iter().map(|member| plan.domains[*member].name.value.as_str()).collect();
                        names.push(&plan.domains[start].name.value);
                        sink.wrong(
                            needed.place,
                            format!("domains that wait for each other: {}", names.join(" needs ")),
                        );
                    }
                    for member in circle {
                        told[member] = true;
                    }
                    break 'search;
                }
                if from[next].is_none() {
                    from[next] = Some(at);
                    queue.push_back(next);
                }
            }
        }
    }
}

/// Which disk, in words.
impl std::fmt::Display for DiskSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DiskSelector::Target(target) => write!(f, "disk {target}"),
            DiskSelector::Serial(serial) => write!(f, "the disk with serial {serial}"),
            DiskSelector::Wwn(wwn) => write!(f, "the disk with WWN {wwn}"),
        }
    }
}

/// Which NIC, in words.
impl std::fmt::Display for NicSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NicSelector::Mac(mac) => write!(f, "NIC {mac}"),
            NicSelector::Source(source) => write!(f, "a NIC in {source}"),
        }
    }
}

/// A target, in words.
impl std::fmt::Display for NicTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NicTarget::Bridge(bridge) => write!(f, "bridge {bridge}"),
            NicTarget::Network(network) => write!(f, "network {network}"),
        }
    }
}
