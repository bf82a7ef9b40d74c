//! After a reboot, too: the configuration of whatever sets up the guest's network, and of that alone.
//!
//! | system | found by | what is written |
//! | --- | --- | --- |
//! | systemd-networkd | its state of one of the NICs is not `unmanaged` | `/etc/systemd/network/00-vmdr-MAC.network` |
//! | NetworkManager | it manages one of the NICs | `/etc/NetworkManager/system-connections/vmdr-MAC.nmconnection` |
//! | ifupdown | `/etc/network/interfaces` | a section of that file; stanzas of the same NICs, there and in interfaces.d, are comments meanwhile |
//! | none of them | | nothing: the daemon gives the addresses again when it starts |
//!
//! What is written bears vmdr's name, so that it is found and taken away again, whoever set up the network when it was written.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmdr_guest_channel::network::{Item, Mac, Network, Nic};

use super::netlink::Link;
use super::{done, failed, link_of, read, replace_with};

const NETWORKD: &str = "etc/systemd/network";
const NETWORK_MANAGER: &str = "etc/NetworkManager/system-connections";
/// What each of the two knows of each NIC, by the kernel's number of it.
const NETWORKD_STATE: &str = "run/systemd/netif/links";
const NETWORK_MANAGER_STATE: &str = "run/NetworkManager/devices";
const INTERFACES: &str = "etc/network/interfaces";
const INTERFACES_D: &str = "etc/network/interfaces.d";
const BEGIN: &str = "# vmdr begin: written by vmdr-guest-tools, taken away when the guest goes home";
const END: &str = "# vmdr end";
/// Before each line that is a comment meanwhile.
const ASIDE: &str = "#vmdr# ";
/// How long a program may take.
const PROGRAM_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at it.
const PROGRAM_LOOK: Duration = Duration::from_millis(20);

/// What sets up the guest's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// systemd-networkd.
    Networkd,
    /// NetworkManager.
    NetworkManager,
    /// ifupdown.
    Ifupdown,
    /// Nothing that is known here.
    Own,
}

impl System {
    /// As it is noted.
    pub fn word(self) -> &'static str {
        match self {
            Self::Networkd => "systemd-networkd",
            Self::NetworkManager => "NetworkManager",
            Self::Ifupdown => "ifupdown",
            Self::Own => "own",
        }
    }

    /// The one that was noted.
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Networkd, Self::NetworkManager, Self::Ifupdown, Self::Own].into_iter().find(|one| one.word() == word)
    }
}

/// Whether the configuration of any of them has something of vmdr's; also if that cannot be seen.
pub fn is_written(root: &Path) -> bool {
    let file_of = |directory| own_files(&root.join(directory)).map_or(true, |files| !files.is_empty());
    let section = || match read(&root.join(INTERFACES)) {
        Ok(text) => text.is_some_and(|text| text.lines().any(|line| line == BEGIN)),
        Err(_) => true,
    };
    [NETWORKD, NETWORK_MANAGER].into_iter().any(file_of) || section()
}

/// Whether one of those that start with the guest has not come to all of these NICs yet. It is not known then whose they are.
pub fn is_starting(root: &Path, links: &[Link]) -> bool {
    let starts = |unit: &str, directory: &str| {
        let wanted = |target: &str| {
            let link = root.join("etc/systemd/system").join(format!("{target}.target.wants")).join(unit);
            fs::symlink_metadata(link).is_ok()
        };
        let seen = |link: &Link| root.join(directory).join(link.index.to_string()).exists();
        ["multi-user", "sysinit", "network-online"].into_iter().any(wanted) && !links.iter().all(seen)
    };
    starts("systemd-networkd.service", NETWORKD_STATE) || starts("NetworkManager.service", NETWORK_MANAGER_STATE)
}

/// Which it is, for these NICs.
pub fn system(root: &Path, links: &[Link]) -> System {
    let says = |directory: &str, link: &Link, good: &dyn Fn(&str) -> bool| {
        let file = root.join(directory).join(link.index.to_string());
        read(&file).ok().flatten().is_some_and(|text| text.lines().any(good))
    };
    let networkd = |line: &str| line.strip_prefix("ADMIN_STATE=").is_some_and(|state| state != "unmanaged");
    let manager = |line: &str| line == "managed=true" || line.starts_with("connection-uuid=");
    if links.iter().any(|link| says(NETWORKD_STATE, link, &networkd)) {
        System::Networkd
    } else if links.iter().any(|link| says(NETWORK_MANAGER_STATE, link, &manager)) {
        System::NetworkManager
    } else if root.join(INTERFACES).is_file() {
        System::Ifupdown
    } else {
        System::Own
    }
}

/// Has the guest come up with this after a reboot, and nothing else of vmdr's.
pub fn write(
    root: &Path,
    system: System,
    network: &Network,
    links: &[Link],
    run: &mut dyn FnMut(&[&str]) -> Result<(), String>,
) -> Item {
    const SUBJECT: &str = "after a reboot";
    match write_files(root, system, network, links, run) {
        Ok(what) => done(SUBJECT, what),
        Err(error) => failed(SUBJECT, error),
    }
}

fn write_files(
    root: &Path,
    system: System,
    network: &Network,
    links: &[Link],
    run: &mut dyn FnMut(&[&str]) -> Result<(), String>,
) -> Result<String, String> {
    let told = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let known: Vec<(&Nic, &Link)> =
        network.nics.iter().filter_map(|nic| Some((nic, link_of(links, nic.mac).ok()??))).collect();
    let mut wanted: Vec<(PathBuf, String, u32)> = Vec::new();
    for (number, (nic, _)) in known.iter().enumerate() {
        // The resolver is the guest's: one NIC says it.
        let resolver = (number == 0).then_some(network);
        match system {
            System::Networkd => {
                let file = root.join(NETWORKD).join(format!("00-vmdr-{}.network", flat(nic.mac)));
                wanted.push((file, networkd_text(nic, resolver), 0o644));
            }
            System::NetworkManager => {
                let file = root.join(NETWORK_MANAGER).join(format!("vmdr-{}.nmconnection", flat(nic.mac)));
                wanted.push((file, manager_text(nic, resolver), 0o600));
            }
            System::Ifupdown | System::Own => {}
        }
    }
    let mut stale = 0;
    for directory in [NETWORKD, NETWORK_MANAGER] {
        for file in own_files(&root.join(directory)).map_err(told("look for what was written before"))? {
            if !wanted.iter().any(|(wanted, ..)| *wanted == file) {
                fs::remove_file(&file).map_err(told("take away what was written before"))?;
                stale += 1;
            }
        }
    }
    for (file, text, mode) in &wanted {
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory).map_err(told("make its directory"))?;
        }
        replace_with(file, text.as_bytes(), *mode, None).map_err(told("write the NIC's configuration"))?;
    }
    let ifupdown = if system == System::Ifupdown { known.as_slice() } else { &[] };
    interfaces(root, network, ifupdown).map_err(told("change /etc/network/interfaces"))?;
    // They would go on with what they have read.
    match system {
        System::Networkd if stale > 0 || !wanted.is_empty() => run(&["networkctl", "reload"])?,
        System::NetworkManager if stale > 0 || !wanted.is_empty() => {
            run(&["nmcli", "connection", "reload"])?;
            for (nic, _) in &known {
                run(&["nmcli", "connection", "up", "uuid", &manager_uuid(nic.mac)])?;
            }
        }
        _ => {}
    }
    Ok(match (network.nics.is_empty(), system) {
        (true, _) => "as before".to_owned(),
        (_, System::Networkd) => "the same, by systemd-networkd".to_owned(),
        (_, System::NetworkManager) => "the same, by NetworkManager".to_owned(),
        (_, System::Ifupdown) => "the same, by ifupdown".to_owned(),
        (_, System::Own) => "the same, by vmdr's tools when they start".to_owned(),
    })
}

/// Runs a program of the guest's to its end.
pub fn run(words: &[&str]) -> Result<(), String> {
    let Some((program, words)) = words.split_first() else { return Ok(()) };
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("run {program}: {error}"))?;
    let until = Instant::now() + PROGRAM_LIMIT;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{program} {} ended with {status}", words.join(" "))),
            Ok(None) if Instant::now() >= until => {
                // It may have ended just now.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{program} {} took more than {} s", words.join(" "), PROGRAM_LIMIT.as_secs()));
            }
            Ok(None) => std::thread::sleep(PROGRAM_LOOK),
            Err(error) => return Err(format!("wait for {program}: {error}")),
        }
    }
}

fn flat(mac: Mac) -> String {
    mac.to_string().replace(':', "-")
}

fn own_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let own =
        |name: &str| name.starts_with("00-vmdr-") || (name.starts_with("vmdr-") && name.ends_with(".nmconnection"));
    let files = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(own));
    Ok(files.map(|entry| entry.path()).collect())
}

fn networkd_text(nic: &Nic, resolver: Option<&Network>) -> String {
    let mut text = format!(
        "# Written by vmdr-guest-tools, taken away when the guest goes home.\n[Match]\nMACAddress={}\nKind=!*\n\n[Network]\nDHCP=no\n",
        nic.mac
    );
    for address in &nic.addresses {
        text.push_str(&format!("Address={address}\n"));
    }
    for server in resolver.iter().flat_map(|network| &network.nameservers) {
        text.push_str(&format!("DNS={server}\n"));
    }
    if let Some(network) = resolver.filter(|network| !network.search.is_empty()) {
        text.push_str(&format!("Domains={}\n", network.search.join(" ")));
    }
    for route in &nic.routes {
        text.push_str("\n[Route]\n");
        if !route.to.is_default() {
            text.push_str(&format!("Destination={}\n", route.to));
        }
        text.push_str(&format!("Gateway={}\n", route.via));
    }
    text
}

/// The same for the same NIC, so that it is the same connection.
fn manager_uuid(mac: Mac) -> String {
    format!("766d6472-0000-4000-8000-{}", mac.to_string().replace(':', ""))
}

fn manager_text(nic: &Nic, resolver: Option<&Network>) -> String {
    let mut text = format!(
        "# Written by vmdr-guest-tools, taken away when the guest goes home.\n[connection]\nid=vmdr-{}\nuuid={}\ntype=ethernet\n\
         autoconnect=true\nautoconnect-priority=999\n\n[ethernet]\nmac-address={}\n",
        flat(nic.mac),
        manager_uuid(nic.mac),
        nic.mac
    );
    for four in [true, false] {
        let addresses: Vec<_> = nic.addresses.iter().filter(|a| a.address.is_ipv4() == four).collect();
        text.push_str(if four { "\n[ipv4]\n" } else { "\n[ipv6]\n" });
        if addresses.is_empty() {
            text.push_str(if four { "method=disabled\n" } else { "method=link-local\n" });
            continue;
        }
        text.push_str("method=manual\n");
        for (number, address) in addresses.iter().enumerate() {
            text.push_str(&format!("address{}={address}\n", number + 1));
        }
        for (number, route) in nic.routes.iter().filter(|route| route.via.is_ipv4() == four).enumerate() {
            text.push_str(&format!("route{}={},{}\n", number + 1, route.to, route.via));
        }
        let servers = resolver.iter().flat_map(|network| &network.nameservers).filter(|s| s.is_ipv4() == four);
        let servers: String = servers.map(|server| format!("{server};")).collect();
        if !servers.is_empty() {
            text.push_str(&format!("dns={servers}\n"));
        }
        if let Some(network) = resolver.filter(|network| !network.search.is_empty()) {
            text.push_str(&format!("dns-search={};\n", network.search.join(";")));
        }
    }
    text
}

/// The files of ifupdown without vmdr's section and with all that was set aside. An error: where the section ends is not known.
fn restored(text: &str) -> io::Result<String> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        match line {
            BEGIN if inside => break,
            BEGIN => inside = true,
            END if inside => inside = false,
            _ if inside => {}
            _ => lines.push(line.strip_prefix(ASIDE).unwrap_or(line)),
        }
    }
    if inside {
        return Err(io::Error::other(format!("the section that begins with {BEGIN:?} has no line {END:?}")));
    }
    Ok(lines.iter().map(|line| format!("{line}\n")).collect())
}

/// The same with the stanzas of these devices set aside.
fn without(text: &str, devices: &[&str]) -> String {
    const KEYWORDS: [&str; 8] =
        ["iface", "mapping", "auto", "source", "source-directory", "no-auto-down", "no-scripts", "template"];
    let mut aside = false;
    let mut changed = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let Some(word) = words.next()
            && (KEYWORDS.contains(&word) || word.starts_with("allow-"))
        {
            aside = word == "iface" && words.next().is_some_and(|name| devices.contains(&name));
        }
        changed.push_str(&format!("{}{line}\n", if aside { ASIDE } else { "" }));
    }
    changed
}

fn interfaces(root: &Path, network: &Network, nics: &[(&Nic, &Link)]) -> io::Result<()> {
    let main = root.join(INTERFACES);
    let mut files = vec![main.clone()];
    match fs::read_dir(root.join(INTERFACES_D)) {
        Ok(entries) => files.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let devices: Vec<&str> = nics.iter().map(|(_, link)| link.name.as_str()).collect();
    for file in files {
        let Some(text) = read(&file)? else { continue };
        let mut changed = without(&restored(&text).map_err(|error| of_file(&file, &error))?, &devices);
        if file == main && !nics.is_empty() {
            changed.push_str(&section(network, nics));
        }
        if changed.trim_end() != text.trim_end() {
            let about = fs::symlink_metadata(&file)?;
            if !about.is_file() {
                return Err(of_file(&file, &io::Error::other("it is a link; it was left as it is")));
            }
            replace_with(&file, changed.as_bytes(), 0o600, Some(&about))?;
        }
    }
    Ok(())
}

fn of_file(file: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("{}: {error}", file.display()))
}

fn section(network: &Network, nics: &[(&Nic, &Link)]) -> String {
    let mut text = format!("{BEGIN}\n");
    for (number, (nic, link)) in nics.iter().enumerate() {
        let name = &link.name;
        text.push_str(&format!("auto {name}\n"));
        for four in [true, false] {
            let mut first = true;
            for address in nic.addresses.iter().filter(|a| a.address.is_ipv4() == four) {
                let family = if four { "inet" } else { "inet6" };
                text.push_str(&format!("iface {name} {family} static\n    address {address}\n"));
                if !std::mem::take(&mut first) {
                    continue;
                }
                for route in nic.routes.iter().filter(|route| route.via.is_ipv4() == four) {
                    if route.to.is_default() {
                        text.push_str(&format!("    gateway {}\n", route.via));
                    } else {
                        let six = if matches!(route.via, IpAddr::V6(_)) { "-6 " } else { "" };
                        text.push_str(&format!(
                            "    up ip {six}route replace {} via {} dev {name}\n",
                            route.to, route.via
                        ));
                    }
                }
                if number == 0 && four {
                    let servers: Vec<String> = network.nameservers.iter().map(ToString::to_string).collect();
                    for (key, values) in [("dns-nameservers", servers), ("dns-search", network.search.clone())] {
                        if !values.is_empty() {
                            text.push_str(&format!("    {key} {}\n", values.join(" ")));
                        }
                    }
                }
            }
        }
    }
    text + END + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACES_TEXT: &str = "# the loopback\nauto lo\niface lo inet loopback\n\nallow-hotplug eth0\niface eth0 inet static\n    \
                                   address 10.0.0.5/24\n    gateway 10.0.0.1\n# a remark\niface eth1 inet dhcp\n";

    fn network() -> Network {
        Network::parse(
            "vmdr-network 1\nnameserver 10.1.0.53\nnameserver fd00::53\nsearch example.org\nnic 52:54:00:00:00:01\naddress 10.1.0.5/24\n\
             address 10.1.0.6/24\naddress fd00::5/64\nroute 0.0.0.0/0 via 10.1.0.1\nroute 10.9.0.0/16 via 10.1.0.2\n",
        )
        .unwrap()
    }

    fn links() -> Vec<Link> {
        let mac = |i| Mac([0x52, 0x54, 0, 0, 0, i]);
        let link = |i: u8| Link { index: i.into(), name: format!("eth{}", i - 1), mac: mac(i), is_part: false };
        vec![link(1), link(2)]
    }

    fn written(root: &Path, system: System, network: &Network) -> (Item, Vec<String>) {
        let mut ran = Vec::new();
        let item = write(root, system, network, &links(), &mut |words| {
            ran.push(words.join(" "));
            Ok(())
        });
        (item, ran)
    }

    #[test]
    fn whoever_has_the_nic_is_found_out() {
        let root = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let found = || system(root.path(), &links()[..1]);
        let starting = || is_starting(root.path(), &links()[..1]);
        assert!(found() == System::Own && !starting());
        put("etc/systemd/system/multi-user.target.wants/NetworkManager.service", "");
        assert!(starting());
        put(INTERFACES, "auto lo\n");
        assert_eq!(found(), System::Ifupdown);
        put("run/NetworkManager/devices/1", "[device]\nmanaged=true\n");
        assert!(found() == System::NetworkManager && !starting());
        put("run/systemd/netif/links/1", "ADMIN_STATE=unmanaged\n");
        assert_eq!(found(), System::NetworkManager);
        put("run/systemd/netif/links/1", "ADMIN_STATE=configured\nOPER_STATE=routable\n");
        assert_eq!(found(), System::Networkd);
    }

    #[test]
    fn ifupdown_has_a_section_and_gets_its_own_back() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(INTERFACES);
        fs::create_dir_all(root.path().join(INTERFACES_D)).unwrap();
        fs::write(&file, INTERFACES_TEXT).unwrap();
        let beside = root.path().join(INTERFACES_D).join("more");
        fs::write(&beside, "iface eth0 inet6 auto\n").unwrap();
        for _ in 0..2 {
            let (item, ran) = written(root.path(), System::Ifupdown, &network());
            assert_eq!((item.error.as_str(), ran.len()), ("", 0));
            let text = fs::read_to_string(&file).unwrap();
            assert!(
                text.contains("#vmdr#     address 10.0.0.5/24\n") && text.contains("\niface eth1 inet dhcp\n"),
                "{text}"
            );
            let section = "auto eth0\niface eth0 inet static\n    address 10.1.0.5/24\n    gateway 10.1.0.1\n    up ip route replace \
                           10.9.0.0/16 via 10.1.0.2 dev eth0\n    dns-nameservers 10.1.0.53 fd00::53\n    dns-search example.org\niface \
                           eth0 inet static\n    address 10.1.0.6/24\niface eth0 inet6 static\n    address fd00::5/64\n# vmdr end\n";
            assert!(text.ends_with(section) && text.matches(BEGIN).count() == 1, "{text}");
            assert_eq!(fs::read_to_string(&beside).unwrap(), "#vmdr# iface eth0 inet6 auto\n");
        }
        let (item, _) = written(root.path(), System::Ifupdown, &Network::default());
        assert_eq!((item.error.as_str(), item.done.as_str()), ("", "as before"));
        assert_eq!(fs::read_to_string(&file).unwrap(), INTERFACES_TEXT);
        assert_eq!(fs::read_to_string(&beside).unwrap(), "iface eth0 inet6 auto\n");
    }

    #[test]
    fn files_of_ifupdown_are_never_cut_nor_made_others() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(INTERFACES);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let mode = || fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        fs::write(&file, INTERFACES_TEXT).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        for network in [network(), Network::default()] {
            assert_eq!(written(root.path(), System::Ifupdown, &network).0.error, "");
            assert_eq!(mode(), 0o600);
        }
        let cut = format!("{INTERFACES_TEXT}{BEGIN}\nauto eth0\niface eth9 inet dhcp\n");
        let long = format!("{INTERFACES_TEXT}{}", "# filled\n".repeat(9000));
        for (text, why) in [(cut, "has no line"), (long, "has more than")] {
            fs::write(&file, &text).unwrap();
            for network in [network(), Network::default()] {
                let (item, _) = written(root.path(), System::Ifupdown, &network);
                assert!(item.error.contains(why), "{item:?}");
                assert_eq!(fs::read_to_string(&file).unwrap(), text);
            }
        }
        let elsewhere = root.path().join("elsewhere");
        fs::write(&elsewhere, INTERFACES_TEXT).unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        let (item, _) = written(root.path(), System::Ifupdown, &network());
        assert!(item.error.contains("it is a link"), "{item:?}");
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), INTERFACES_TEXT);
    }

    #[test]
    fn networkd_and_network_manager_have_a_file_and_never_both() {
        let root = tempfile::tempdir().unwrap();
        let (item, ran) = written(root.path(), System::Networkd, &network());
        assert_eq!((item.error.as_str(), ran), ("", vec!["networkctl reload".to_owned()]));
        let networkd = root.path().join(NETWORKD).join("00-vmdr-52-54-00-00-00-01.network");
        let text = fs::read_to_string(&networkd).unwrap();
        assert!(
            text.contains("MACAddress=52:54:00:00:00:01\nKind=!*\n") && text.contains("Address=fd00::5/64\n"),
            "{text}"
        );
        assert!(
            text.ends_with("[Route]\nGateway=10.1.0.1\n\n[Route]\nDestination=10.9.0.0/16\nGateway=10.1.0.2\n"),
            "{text}"
        );
        let (_, ran) = written(root.path(), System::NetworkManager, &network());
        assert_eq!(ran.len(), 2, "{ran:?}");
        assert!(!networkd.exists());
        let manager = root.path().join(NETWORK_MANAGER).join("vmdr-52-54-00-00-00-01.nmconnection");
        let text = fs::read_to_string(&manager).unwrap();
        for line in ["address2=10.1.0.6/24", "route1=0.0.0.0/0,10.1.0.1", "dns=fd00::53;", "dns-search=example.org;"] {
            assert!(text.lines().any(|has| has == line), "{line}: {text}");
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&manager).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let (item, ran) = written(root.path(), System::NetworkManager, &Network::default());
        assert_eq!((item.done.as_str(), ran), ("as before", vec!["nmcli connection reload".to_owned()]));
        assert!(!manager.exists());
    }

    #[test]
    fn a_program_that_fails_or_is_not_there_is_told() {
        assert_eq!(run(&["true"]), Ok(()));
        assert!(run(&["false"]).is_err_and(|why| why.contains("exit status: 1")));
        assert!(run(&["/no/such/program"]).is_err_and(|why| why.contains("No such file")));
    }
}
