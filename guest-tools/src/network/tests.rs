//! What is done to a kernel that is none, and to files in a directory.

use super::*;
use std::collections::BTreeMap;
use vmdr_guest_channel::network::Mac;

fn link(i: u8) -> Link {
    Link { index: i.into(), name: format!("eth{}", i - 1), mac: Mac([0x52, 0x54, 0, 0, 0, i]), is_part: false }
}

/// A kernel with two NICs that does as Linux does with addresses of one network: they go with the first of them.
#[derive(Default)]
struct Fake {
    addresses: BTreeMap<u32, Vec<Subnet>>,
    routes: BTreeMap<u32, Vec<Route>>,
    refuses: Option<Subnet>,
    changes: usize,
    /// Devices besides the two NICs.
    more: Vec<Link>,
    leased: Vec<Subnet>,
}

impl Kernel for Fake {
    fn links(&mut self) -> io::Result<Vec<Link>> {
        Ok([link(1), link(2)].into_iter().chain(self.more.clone()).collect())
    }
    fn up(&mut self, _: &Link) -> io::Result<()> {
        Ok(())
    }
    fn addresses(&mut self, link: &Link) -> io::Result<Vec<Held>> {
        let held = |subnet: &Subnet| Held { subnet: *subnet, permanent: !self.leased.contains(subnet) };
        Ok(self.addresses.get(&link.index).into_iter().flatten().map(held).collect())
    }
    fn add_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        if self.refuses == Some(subnet) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.changes += 1;
        self.addresses.entry(link.index).or_default().push(subnet);
        Ok(())
    }
    fn remove_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        self.changes += 1;
        let all = self.addresses.entry(link.index).or_default();
        let first = all.iter().position(|a| a.prefix == subnet.prefix) == all.iter().position(|a| *a == subnet);
        all.retain(|a| *a != subnet && !(first && a.prefix == subnet.prefix));
        Ok(())
    }
    fn routes(&mut self, link: &Link) -> io::Result<Vec<Route>> {
        Ok(self.routes.get(&link.index).cloned().unwrap_or_default())
    }
    fn add_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        let all = self.routes.entry(link.index).or_default();
        if all.contains(&route) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        self.changes += 1;
        all.push(route);
        Ok(())
    }
    fn remove_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        self.changes += 1;
        self.routes.entry(link.index).or_default().retain(|other| *other != route);
        Ok(())
    }
}

fn network(text: &str) -> Network {
    Network::parse(&format!("vmdr-network 1\n{text}")).unwrap()
}

const FIRST: &str = "nic 52:54:00:00:00:01\n";
const AWAY: &str = "hostname web1-dr\nnameserver 10.1.0.53\nsearch example.org\nnic 52:54:00:00:00:01\naddress 10.1.0.5/24\n\
                    address 10.1.0.6/24\nroute 0.0.0.0/0 via 10.1.0.1\n";

struct Guest {
    kernel: Fake,
    places: Places,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// At home, with an address and the way out on its first NIC.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        for file in [HOSTNAME_NOW, HOSTNAME_FILE, RESOLVER] {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        }
        fs::write(root.join(HOSTNAME_NOW), "(none)\n").unwrap();
        fs::write(root.join(RESOLVER), "nameserver 10.0.0.53\n").unwrap();
        let mut kernel = Fake::default();
        let home = network(&format!("{FIRST}address 10.0.0.5/24\nroute 0.0.0.0/0 via 10.0.0.1\n"));
        kernel.addresses.insert(1, home.nics[0].addresses.clone());
        kernel.routes.insert(1, home.nics[0].routes.clone());
        Self { kernel, places: Places { root, state: directory.path().join("state") }, _directory: directory }
    }

    fn apply(&mut self, wanted: &str) -> Vec<Item> {
        apply_with(&mut self.kernel, &network(wanted), &self.places, &mut |_| Ok(()))
    }

    fn now(&self, nic: u32) -> String {
        let addresses = self.kernel.addresses.get(&nic).into_iter().flatten().map(ToString::to_string);
        let routes = self.kernel.routes.get(&nic).into_iter().flatten().map(ToString::to_string);
        addresses.chain(routes).collect::<Vec<_>>().join(", ")
    }

    fn file(&self, file: &str) -> String {
        fs::read_to_string(self.places.root.join(file)).unwrap_or_default()
    }
}

#[test]
fn a_guest_is_given_its_addresses_and_goes_home_again() {
    let mut guest = Guest::new();
    assert_eq!(guest.apply(""), [], "it is at home");
    assert!(!guest.places.state.exists());
    for again in [false, true] {
        let before = guest.kernel.changes;
        let items = guest.apply(AWAY);
        assert!(items.len() == 4 && items.iter().all(|item| item.error.is_empty()), "{items:?}");
        assert_eq!(items[0].done, "10.1.0.5/24, 10.1.0.6/24, 0.0.0.0/0 via 10.1.0.1 on eth0");
        assert_eq!(guest.now(1), "10.1.0.5/24, 10.1.0.6/24, 0.0.0.0/0 via 10.1.0.1");
        assert_eq!(guest.file(HOSTNAME_FILE), "web1-dr\n");
        assert!(guest.file(RESOLVER).contains("nameserver 10.1.0.53\nsearch example.org\n"));
        assert_eq!(guest.kernel.changes == before, again, "the same again changes nothing");
    }
    let items = guest.apply("");
    assert!(items.iter().all(|item| item.error.is_empty()), "{items:?}");
    assert_eq!(guest.now(1), "10.0.0.5/24, 0.0.0.0/0 via 10.0.0.1");
    assert_eq!(
        (guest.file(HOSTNAME_NOW).as_str(), guest.file(RESOLVER).as_str()),
        ("(none)", "nameserver 10.0.0.53\n")
    );
    assert_eq!(fs::read_dir(&guest.places.state).unwrap().count(), 0, "nothing is left of it");
    assert_eq!(guest.apply(""), []);
}

#[test]
fn what_a_description_does_not_have_any_more_goes_home() {
    let mut guest = Guest::new();
    guest.apply(&format!("{AWAY}nic 52:54:00:00:00:02\naddress 10.2.0.5/24\n"));
    assert_eq!(guest.now(2), "10.2.0.5/24");
    guest.apply("nic 52:54:00:00:00:02\naddress 10.3.0.5/24\n");
    assert_eq!((guest.now(1).as_str(), guest.now(2).as_str()), ("10.0.0.5/24, 0.0.0.0/0 via 10.0.0.1", "10.3.0.5/24"));
    assert_eq!(guest.file(HOSTNAME_NOW), "(none)");
    guest.apply("");
    assert_eq!(guest.now(2), "", "not what it was given first");
}

#[test]
fn the_new_addresses_may_be_in_the_network_of_the_old() {
    let mut guest = Guest::new();
    guest.apply(&format!("{FIRST}address 10.0.0.77/24\n"));
    assert_eq!(guest.now(1), "10.0.0.77/24");
}

#[test]
fn each_nic_has_its_own_line_and_a_failure_no_more_than_that() {
    let mut guest = Guest::new();
    guest.kernel.refuses = network(&format!("{FIRST}address 10.1.0.5/24\n")).nics[0].addresses.first().copied();
    let items = guest.apply(&format!("{AWAY}nic 52:54:00:00:00:02\naddress 10.2.0.5/24\nnic 52:54:00:00:00:09\n"));
    let errors: Vec<&str> = items.iter().filter(|i| !i.error.is_empty()).map(|i| i.subject.as_str()).collect();
    assert_eq!(errors, ["NIC 52:54:00:00:00:01", "NIC 52:54:00:00:00:09"], "{items:?}");
    assert_eq!(guest.now(2), "10.2.0.5/24");
}

#[test]
fn what_cannot_be_noted_is_not_done() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.places.state.join(".vmdr-home")).unwrap();
    let items = guest.apply(AWAY);
    assert!(items.len() == 1 && items[0].error.starts_with("nothing was changed"), "{items:?}");
    assert_eq!(guest.kernel.changes, 0);
    let mut guest = Guest::new();
    fs::create_dir_all(&guest.places.state).unwrap();
    fs::write(guest.places.state.join(HOME), "nonsense").unwrap();
    assert!(guest.apply(AWAY)[0].error.contains("is not known"));
    assert_eq!(guest.kernel.changes, 0);
}

#[test]
fn a_resolver_that_is_somebody_elses_is_left() {
    let mut guest = Guest::new();
    let file = guest.places.root.join(RESOLVER);
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", &file).unwrap();
    let items = guest.apply("nameserver 10.1.0.53\n");
    assert!(items.iter().any(|item| item.subject == "resolver" && item.error.contains("is a link")), "{items:?}");
    assert!(fs::symlink_metadata(&file).unwrap().file_type().is_symlink());
}

#[test]
fn a_nic_whose_device_is_not_certain_is_left() {
    let same = |name: &str| Link { index: 9, name: name.to_owned(), ..link(1) };
    for (more, part, why) in [
        (Some(same("br0")), false, "several devices have this MAC address: eth0, br0"),
        (Some(same("eth0.7")), false, "eth0, eth0.7"),
        (None, true, "is part of another device"),
    ] {
        let mut links = vec![Link { is_part: part, ..link(1) }];
        links.extend(more);
        let said = link_of(&links, link(1).mac);
        assert!(said.as_ref().is_err_and(|said| said.contains(why)), "{said:?}");
    }
    let mut guest = Guest::new();
    guest.kernel.more.push(same("br0"));
    let items = guest.apply(AWAY);
    assert!(items.iter().any(|item| item.subject.starts_with("NIC ") && item.error.contains("br0")), "{items:?}");
    assert_eq!(guest.now(1), "10.0.0.5/24, 0.0.0.0/0 via 10.0.0.1");
}

#[test]
fn what_cannot_all_be_noted_is_left() {
    let mut guest = Guest::new();
    let many = (0..=ADDRESSES_MAX as u8).map(|i| Subnet { address: [10, 0, 1, i].into(), prefix: 32 });
    guest.kernel.addresses.insert(1, many.collect());
    let items = guest.apply(AWAY);
    assert!(items.iter().any(|item| item.error.contains("more than can be noted")), "{items:?}");
    assert_eq!(guest.kernel.addresses[&1].len(), ADDRESSES_MAX + 1);
}

#[test]
fn leases_are_given_back_where_nobody_else_does() {
    for (looked_after, back) in [(false, "10.0.0.5/24, 0.0.0.0/0 via 10.0.0.1"), (true, "")] {
        let mut guest = Guest::new();
        guest.kernel.leased = guest.kernel.addresses[&1].clone();
        if looked_after {
            let state = guest.places.root.join("run/systemd/netif/links");
            fs::create_dir_all(&state).unwrap();
            fs::write(state.join("1"), "ADMIN_STATE=configured\n").unwrap();
        }
        guest.apply(AWAY);
        guest.apply("");
        assert_eq!(guest.now(1), back);
    }
}

#[test]
fn whoever_had_the_nics_has_them_also_before_it_has_started() {
    let mut guest = Guest::new();
    let run = guest.places.root.join("run/NetworkManager/devices");
    fs::create_dir_all(&run).unwrap();
    fs::write(run.join("1"), "managed=true\n").unwrap();
    guest.apply(AWAY);
    let profiles = guest.places.root.join("etc/NetworkManager/system-connections");
    assert_eq!(fs::read_dir(&profiles).unwrap().count(), 1);
    // A reboot: its state is gone, and there is a file that would be another's.
    fs::remove_dir_all(guest.places.root.join("run")).unwrap();
    fs::create_dir_all(guest.places.root.join("etc/network")).unwrap();
    fs::write(guest.places.root.join("etc/network/interfaces"), "auto lo\n").unwrap();
    assert_eq!(again(&guest.places), Vec::<String>::new());
    guest.apply(AWAY);
    assert_eq!(fs::read_dir(&profiles).unwrap().count(), 1);
    assert!(persist::is_written(&guest.places.root));
    guest.apply("");
    assert_eq!(fs::read_dir(&profiles).unwrap().count(), 0);
    assert!(!persist::is_written(&guest.places.root) && !guest.places.state.join(SYSTEM).exists());
}

#[test]
fn a_dhcp_client_that_holds_a_device_is_told() {
    let mut guest = Guest::new();
    let process = guest.places.root.join("proc/77");
    fs::create_dir_all(&process).unwrap();
    for (line, told) in [
        ("/sbin/dhclient\0-pf\0/run/x\0eth0\0", true),
        ("udhcpc\0-ieth0\0", true),
        ("dhcpcd: eth0 [ip4]\0", true),
        ("dhclient\0eth1\0", false),
        ("editor\0eth0\0", false),
    ] {
        fs::write(process.join("cmdline"), line).unwrap();
        let items = guest.apply(AWAY);
        assert_eq!(items.iter().any(|item| item.subject == "DHCP on eth0" && !item.error.is_empty()), told, "{line}");
    }
}
