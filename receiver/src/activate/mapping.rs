//! How the NICs of a guest map onto this site: what the recovery plan says of a NIC, else `[bridges]` of receiver.toml, else the
//! network or bridge of the same name.

use std::collections::BTreeMap;

use vmdr_hypervisor::domain_xml::{DomainXml, Interface};
use vmdr_hypervisor::xml::Element;
use vmdr_plan::{Dns, Domain, NicTarget, Place};
use vmdr_proto::control::{Finding, Mapped};

/// How a guest maps onto this site.
#[derive(Debug, Clone, Default)]
pub struct Mapping {
    /// Bridges that have another name here.
    pub bridges: BTreeMap<String, String>,
    /// What the recovery plan says of the guest; `None`: there is no plan.
    pub plan: Option<Domain>,
    /// Who is told of names.
    pub dns: Option<Dns>,
    /// The plan's file, for messages.
    pub file: String,
    /// What forbids an activation by this plan.
    pub trouble: Vec<Finding>,
}

impl From<BTreeMap<String, String>> for Mapping {
    fn from(bridges: BTreeMap<String, String>) -> Self {
        Mapping { bridges, ..Mapping::default() }
    }
}

/// Where a NIC is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedNic {
    /// `bridge` or `network`, or as it was.
    pub kind: String,
    /// Bridge, network or device.
    pub source: String,
    /// VLAN of its port, where the plan has placed it.
    pub vlan: Option<u16>,
    /// Where the plan says so; `None`: it does not.
    pub said: Option<Place>,
}

/// The network, bridge or device that an `<interface>` is in.
pub fn source_of(interface: &Element) -> Option<&str> {
    let name = match interface.attribute("type")? {
        // One that runs has the bridge of its network, too.
        "network" => "network",
        "direct" => "dev",
        _ => "bridge",
    };
    interface.attribute_at("source", name)
}

impl Mapping {
    /// Where a NIC is here that is in this network or bridge, with this MAC address, at the protected host.
    pub fn place(&self, kind: &str, mac: Option<&str>, source: &str) -> PlacedNic {
        let as_is =
            |source: &str| PlacedNic { kind: kind.to_owned(), source: source.to_owned(), vlan: None, said: None };
        if !matches!(kind, "bridge" | "network" | "direct" | "ethernet" | "user") {
            return as_is(source);
        }
        let nic = self.plan.as_ref().and_then(|plan| plan.nic(mac, Some(source).filter(|s| !s.is_empty())));
        if let Some((nic, target)) = nic.and_then(|nic| nic.target.as_ref().map(|target| (nic, target))) {
            let (kind, source) = match &target.value {
                NicTarget::Bridge(bridge) => ("bridge", bridge),
                NicTarget::Network(network) => ("network", network),
            };
            let vlan = nic.vlan.as_ref().map(|vlan| vlan.value);
            return PlacedNic { kind: kind.to_owned(), source: source.clone(), vlan, said: Some(target.place) };
        }
        match self.bridges.get(source).filter(|_| kind == "bridge") {
            Some(local) => as_is(local),
            None => as_is(source),
        }
    }

    /// The same of a NIC of a definition.
    pub fn place_interface(&self, interface: &Interface) -> PlacedNic {
        self.place(&interface.kind, interface.mac.as_deref(), interface.source.as_deref().unwrap_or_default())
    }

    /// What is somewhere else here than at the protected host.
    pub fn list(&self, domain: &DomainXml) -> Vec<Mapped> {
        let mut list = Vec::new();
        for interface in &domain.interfaces {
            let source = interface.source.as_deref().unwrap_or_default();
            let placed = self.place_interface(interface);
            let from = format!("{} {source}", interface.kind);
            let vlan = placed.vlan.map(|vlan| format!(", VLAN {vlan}")).unwrap_or_default();
            let to = format!("{} {}{vlan}", placed.kind, placed.source);
            if from != to {
                let device = format!("NIC {}", interface.mac.as_deref().unwrap_or("without a MAC address"));
                list.push(Mapped { device, from: from.trim_end().to_owned(), to });
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_plan::Plan;

    fn mapping(plan: &str) -> Mapping {
        let bridges =
            BTreeMap::from([("br0".to_owned(), "br-old".to_owned()), ("br1".to_owned(), "br-one".to_owned())]);
        let plan = Plan::parse(plan).unwrap().domain("web1", "").clone();
        Mapping { bridges, plan: Some(plan), ..Mapping::default() }
    }

    fn placed(mapping: &Mapping, kind: &str, mac: &str, source: &str) -> String {
        let PlacedNic { kind, source, vlan, .. } = mapping.place(kind, Some(mac), source);
        format!("{kind} {source} {}", vlan.unwrap_or(0))
    }

    #[test]
    fn the_plan_goes_before_the_bridges_of_the_configuration() {
        let mapping = mapping(
            "[[defaults.nic]]\nsource = \"br0\"\nbridge = \"br-dr\"\n[[domain.web1.nic]]\nmac = \"52:54:00:00:00:01\"\n\
             bridge = \"br-dmz\"\nvlan = 7\n[[domain.web1.nic]]\nsource = \"default\"\nbridge = \"br-nat\"\n\
             [[domain.web1.nic]]\nsource = \"br9\"\nannounce = false\n",
        );
        for (kind, mac, source, expected) in [
            ("bridge", "52:54:00:00:00:01", "br0", "bridge br-dmz 7"),
            ("bridge", "52:54:00:00:00:02", "br0", "bridge br-dr 0"),
            ("bridge", "52:54:00:00:00:02", "br1", "bridge br-one 0"),
            ("bridge", "52:54:00:00:00:02", "br9", "bridge br9 0"),
            ("network", "52:54:00:00:00:02", "default", "bridge br-nat 0"),
            ("network", "52:54:00:00:00:02", "br1", "network br1 0"),
            ("direct", "52:54:00:00:00:01", "eth0", "bridge br-dmz 7"),
            ("hostdev", "52:54:00:00:00:01", "", "hostdev  0"),
        ] {
            assert_eq!(placed(&mapping, kind, mac, source), expected, "{kind} {mac} {source}");
        }
    }
}
