//! The guest's network, as the host describes it ([`vmdr_guest_channel::network`]): addresses, routes, resolver and name, now and after
//! a reboot, and back again.
//!
//! What a NIC was like before the first change is kept in the state directory (`home`), and what was given last (`given`), each as the text
//! that travels. Both are written before anything is changed. A description is the whole: NICs of `home` that it does not have get
//! back what they had. So the same one twice changes nothing, and an empty one takes everything home.
//!
//! No shell is run and no name is chosen by the host: MAC addresses and IP addresses are, and host names of letters, digits and hyphens.

pub mod netlink;
pub mod persist;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmdr_guest_channel::network::{ADDRESSES_MAX, Item, Mac, Network, Nic, ROUTES_MAX, Report, Route, Subnet};

use self::netlink::{Held, Link, Netlink};
use self::persist::System;

const HOME: &str = "home";
const GIVEN: &str = "given";
const SYSTEM: &str = "system";
const HOME_HOSTNAME: &str = "home.hostname";
const HOME_RESOLVER: &str = "home.resolv.conf";
const HOSTNAME_NOW: &str = "proc/sys/kernel/hostname";
const HOSTNAME_FILE: &str = "etc/hostname";
const RESOLVER: &str = "etc/resolv.conf";
/// More than any of these files has.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Programs that give a device the addresses that they are told.
const DHCP_CLIENTS: [&str; 3] = ["dhclient", "dhcpcd", "udhcpc"];
/// The most processes that are looked at.
const PROCESSES_MAX: usize = 10_000;
/// How long NICs that are not there yet are waited for when the guest has just started.
const NICS_WAIT: Duration = Duration::from_secs(30);
/// How long whatever is to set up the network is waited for when the guest has just started.
const STARTS_WAIT: Duration = Duration::from_secs(20);
/// Between two looks for them.
const NICS_LOOK: Duration = Duration::from_millis(500);

/// What is asked of the kernel; tests have one of their own.
pub trait Kernel {
    /// All devices that have a MAC address.
    fn links(&mut self) -> io::Result<Vec<Link>>;
    /// Brings a device up.
    fn up(&mut self, link: &Link) -> io::Result<()>;
    /// Its addresses of global scope.
    fn addresses(&mut self, link: &Link) -> io::Result<Vec<Held>>;
    /// Gives it an address.
    fn add_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()>;
    /// Takes one from it.
    fn remove_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()>;
    /// Its routes through others.
    fn routes(&mut self, link: &Link) -> io::Result<Vec<Route>>;
    /// Adds a route.
    fn add_route(&mut self, link: &Link, route: Route) -> io::Result<()>;
    /// Removes one.
    fn remove_route(&mut self, link: &Link, route: Route) -> io::Result<()>;
}

impl Kernel for Netlink {
    fn links(&mut self) -> io::Result<Vec<Link>> {
        self.links()
    }
    fn up(&mut self, link: &Link) -> io::Result<()> {
        self.up(link)
    }
    fn addresses(&mut self, link: &Link) -> io::Result<Vec<Held>> {
        self.addresses(link)
    }
    fn add_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        self.add_address(link, subnet)
    }
    fn remove_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        self.remove_address(link, subnet)
    }
    fn routes(&mut self, link: &Link) -> io::Result<Vec<Route>> {
        self.routes(link)
    }
    fn add_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        self.add_route(link, route)
    }
    fn remove_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        self.remove_route(link, route)
    }
}

/// Where things lie in the guest.
#[derive(Clone, Debug)]
pub struct Places {
    /// The root of its files; `/` but in tests.
    pub root: PathBuf,
    /// What is remembered, on a disk that outlives a reboot.
    pub state: PathBuf,
}

fn done(subject: impl Into<String>, what: impl Into<String>) -> Item {
    Item { subject: subject.into(), done: what.into(), error: String::new() }
}

fn failed(subject: impl Into<String>, error: impl Into<String>) -> Item {
    Item { subject: subject.into(), done: String::new(), error: error.into() }
}

/// Applies a description, and says of each thing what came of it.
pub fn apply(wanted: &Network, places: &Places) -> Report {
    let items = match Netlink::open() {
        Ok(mut kernel) => {
            let until = Instant::now() + STARTS_WAIT;
            let links = kernel.links().unwrap_or_default();
            let nics = of_nics(&links, wanted, &Network::default());
            while persist::is_starting(&places.root, &nics) && Instant::now() < until {
                std::thread::sleep(NICS_LOOK);
            }
            apply_with(&mut kernel, wanted, places, &mut persist::run)
        }
        Err(error) => vec![failed("network", format!("open a netlink socket: {error}"))],
    };
    Report { items }
}

/// What was given before a reboot is given again, where nothing else in the guest does that. Gives what is to be logged.
pub fn again(places: &Places) -> Vec<String> {
    let Ok(Some(given)) = read_network(&places.state.join(GIVEN)) else { return Vec::new() };
    // Whoever does it may not have started yet.
    if noted_system(places) != Some(System::Own) || persist::is_written(&places.root) {
        return Vec::new();
    }
    let mut kernel = match Netlink::open() {
        Ok(kernel) => kernel,
        Err(error) => return vec![format!("network: open a netlink socket: {error}")],
    };
    let until = Instant::now() + NICS_WAIT;
    while Instant::now() < until {
        let links = kernel.links().unwrap_or_default();
        if given.nics.iter().all(|nic| links.iter().any(|link| link.mac == nic.mac)) {
            break;
        }
        std::thread::sleep(NICS_LOOK);
    }
    let links = kernel.links().unwrap_or_default();
    if persist::system(&places.root, &of_nics(&links, &given, &Network::default())) != System::Own {
        return Vec::new();
    }
    let items = apply_with(&mut kernel, &given, places, &mut persist::run);
    items.iter().map(|item| format!("network, after a start: {}: {}{}", item.subject, item.done, item.error)).collect()
}

fn of_nics(links: &[Link], wanted: &Network, home: &Network) -> Vec<Link> {
    let nics = || wanted.nics.iter().chain(&home.nics);
    links.iter().filter(|link| nics().any(|nic| nic.mac == link.mac)).cloned().collect()
}

/// The device that has a MAC address. An error: it is not certain which one has the NIC's addresses.
fn link_of(links: &[Link], mac: Mac) -> Result<Option<&Link>, String> {
    let found: Vec<&Link> = links.iter().filter(|link| link.mac == mac).collect();
    match found.as_slice() {
        [] => Ok(None),
        [link] if link.is_part => Err(format!("{} is part of another device, which has its addresses", link.name)),
        [link] => Ok(Some(link)),
        several => {
            let names: Vec<&str> = several.iter().map(|link| link.name.as_str()).collect();
            Err(format!("several devices have this MAC address: {}", names.join(", ")))
        }
    }
}

/// What is given back to a NIC one day.
fn what_it_has(kernel: &mut dyn Kernel, link: &Link, mac: Mac, system: System) -> Result<Nic, String> {
    let told = |error: io::Error| error.to_string();
    let (held, mut routes) = (kernel.addresses(link).map_err(told)?, kernel.routes(link).map_err(told)?);
    // What was leased or announced is so again, by whoever did it; but where nobody looks after it a lease is all that there is.
    let looked_after = matches!(system, System::Networkd | System::NetworkManager);
    let stays = |held: &&Held| held.permanent || (held.subnet.address.is_ipv4() && !looked_after);
    let addresses: Vec<Subnet> = held.iter().filter(stays).map(|held| held.subnet).collect();
    // A route through a neighbour of a leased address comes with the next lease, and cannot be set without it.
    let link_local = |via: IpAddr| matches!(via, IpAddr::V6(via) if via.is_unicast_link_local());
    routes.retain(|route| link_local(route.via) || addresses.iter().any(|subnet| subnet.contains(route.via)));
    if addresses.len() > ADDRESSES_MAX || routes.len() > ROUTES_MAX {
        return Err(format!(
            "it has {} addresses and {} routes, more than can be noted ({ADDRESSES_MAX} and {ROUTES_MAX})",
            addresses.len(),
            routes.len()
        ));
    }
    Ok(Nic { mac, addresses, routes })
}

/// Says of a DHCP client that still holds a device: it will give it another address one day.
fn dhcp_client(root: &Path, device: &str) -> Option<Item> {
    let processes = fs::read_dir(root.join("proc")).ok()?.flatten().take(PROCESSES_MAX);
    let lines = processes.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
    let holds = |entry: fs::DirEntry| {
        let line = read(&entry.path().join("cmdline")).ok()??;
        let mut words = line.split(['\0', ' ']);
        let program = words.next()?.rsplit('/').next()?.trim_end_matches(':').to_owned();
        let names = words.any(|word| word == device || word.strip_prefix("-i") == Some(device));
        (DHCP_CLIENTS.contains(&program.as_str()) && names).then_some(program)
    };
    let program = lines.filter_map(holds).next()?;
    Some(failed(
        format!("DHCP on {device}"),
        format!("{program} holds the device and may give it other addresses: end it, or have it leave the device"),
    ))
}

/// The same with a kernel, and with somebody who runs programs.
fn apply_with(
    kernel: &mut dyn Kernel,
    wanted: &Network,
    places: &Places,
    run: &mut dyn FnMut(&[&str]) -> Result<(), String>,
) -> Vec<Item> {
    let mut items = Vec::new();
    let links = match kernel.links() {
        Ok(links) => links,
        Err(error) => return vec![failed("network", format!("list the devices: {error}"))],
    };
    let mut home = match read_network(&places.state.join(HOME)) {
        Ok(home) => home.unwrap_or_default(),
        Err(error) => return vec![failed("network", format!("what it was like before is not known: {error}"))],
    };
    let nothing_given = home.is_home() && wanted.is_home() && !places.state.join(GIVEN).exists();
    if nothing_given {
        return items;
    }
    let system = match (persist::system(&places.root, &of_nics(&links, wanted, &home)), noted_system(places)) {
        // The one that has it may not have started yet.
        (System::Own | System::Ifupdown, Some(noted)) => noted,
        (found, _) => found,
    };
    let mut unknown = Vec::new();
    for nic in &wanted.nics {
        if home.nics.iter().any(|before| before.mac == nic.mac) {
            continue;
        }
        let Ok(Some(link)) = link_of(&links, nic.mac) else { continue };
        match what_it_has(kernel, link, nic.mac, system) {
            Ok(has) => home.nics.push(has),
            Err(error) => {
                items.push(failed(
                    format!("NIC {}", nic.mac),
                    format!("it was left, as what it has is not known: {error}"),
                ));
                unknown.push(nic.mac);
            }
        }
    }
    // Before anything is changed: what is not known cannot be given back.
    if let Err(error) = note(places, &home, wanted, system) {
        return vec![failed("network", format!("nothing was changed, as it cannot be noted: {error}"))];
    }
    let going_home: Vec<Nic> =
        home.nics.iter().filter(|nic| !wanted.nics.iter().any(|w| w.mac == nic.mac)).cloned().collect();
    for nic in &going_home {
        let subject = format!("NIC {}", nic.mac);
        match link_of(&links, nic.mac).map(|link| link.map(|link| (link, set(kernel, link, nic)))) {
            Ok(Some((link, Ok(())))) => {
                items.push(done(subject, format!("as before: {}", describe(nic, link))));
                home.nics.retain(|before| before.mac != nic.mac);
            }
            Ok(Some((_, Err(error)))) => items.push(failed(subject, format!("give back what it had: {error}"))),
            // It is gone, and what it had with it.
            Ok(None) => home.nics.retain(|before| before.mac != nic.mac),
            Err(error) => items.push(failed(subject, format!("give back what it had: {error}"))),
        }
    }
    for nic in wanted.nics.iter().filter(|nic| !unknown.contains(&nic.mac)) {
        let subject = format!("NIC {}", nic.mac);
        match link_of(&links, nic.mac).map(|link| link.map(|link| (link, set(kernel, link, nic)))) {
            Ok(Some((link, Ok(())))) => items.push(done(subject, describe(nic, link))),
            Ok(Some((link, Err(error)))) => items.push(failed(subject, format!("{}: {error}", link.name))),
            Ok(None) => items.push(failed(subject, "the guest has no such NIC")),
            Err(error) => items.push(failed(subject, error)),
        }
    }
    items.extend(hostname(wanted.hostname.as_deref(), places));
    items.extend(resolver(wanted, places, system));
    items.push(persist::write(&places.root, system, wanted, &links, run));
    let changed = wanted.nics.iter().filter_map(|nic| link_of(&links, nic.mac).ok().flatten());
    items.extend(changed.filter_map(|link| dhcp_client(&places.root, &link.name)));
    if let Err(error) = note(places, &home, wanted, system) {
        items.push(failed("network", format!("note what was done: {error}")));
    }
    items
}

fn describe(nic: &Nic, link: &Link) -> String {
    let list = nic.addresses.iter().map(ToString::to_string);
    let list: Vec<String> = list.chain(nic.routes.iter().map(ToString::to_string)).collect();
    let what = if list.is_empty() { "no address".to_owned() } else { list.join(", ") };
    format!("{what} on {}", link.name)
}

/// Has a device have these addresses and routes, and no others.
fn set(kernel: &mut dyn Kernel, link: &Link, nic: &Nic) -> io::Result<()> {
    kernel.up(link)?;
    let add = |kernel: &mut dyn Kernel| -> io::Result<Vec<Subnet>> {
        let has: Vec<Subnet> = kernel.addresses(link)?.iter().map(|held| held.subnet).collect();
        for subnet in nic.addresses.iter().filter(|subnet| !has.contains(subnet)) {
            kernel.add_address(link, *subnet)?;
        }
        Ok(has)
    };
    let has = add(kernel)?;
    for subnet in has.iter().filter(|subnet| !nic.addresses.contains(subnet)) {
        gone(kernel.remove_address(link, *subnet))?;
    }
    // With the first address of a network the kernel takes the others.
    add(kernel)?;
    let has = kernel.routes(link)?;
    for route in has.iter().filter(|route| !nic.routes.contains(route)) {
        gone(kernel.remove_route(link, *route))?;
    }
    for route in nic.routes.iter().filter(|route| !has.contains(route)) {
        kernel.add_route(link, *route)?;
    }
    Ok(())
}

/// What is not there any more need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ESRCH)) => Ok(()),
        other => other,
    }
}

fn hostname(wanted: Option<&str>, places: &Places) -> Option<Item> {
    let (now, file) = (places.root.join(HOSTNAME_NOW), places.root.join(HOSTNAME_FILE));
    let before = places.state.join(HOME_HOSTNAME);
    let change = |name: &str| -> io::Result<()> {
        // A file of the kernel's: written in one go.
        fs::write(&now, name)?;
        if name.starts_with('(') {
            // The kernel's own word for none.
            return fs::remove_file(&file);
        }
        replace(&file, format!("{name}\n").as_bytes())
    };
    let changed = match wanted {
        Some(name) => {
            let keep = if before.exists() {
                Ok(())
            } else {
                read(&now).and_then(|text| replace(&before, text.unwrap_or_default().trim().as_bytes()))
            };
            keep.and_then(|()| change(name)).map(|()| name.to_owned())
        }
        None if before.exists() => read(&before).and_then(|name| {
            let name = name.unwrap_or_default();
            change(&name)?;
            fs::remove_file(&before)?;
            Ok(format!("as before: {name}"))
        }),
        None => return None,
    };
    Some(match changed {
        Ok(what) => done("host name", what),
        Err(error) => failed("host name", error.to_string()),
    })
}

fn resolver(wanted: &Network, places: &Places, system: System) -> Option<Item> {
    const SUBJECT: &str = "resolver";
    let file = places.root.join(RESOLVER);
    let before = places.state.join(HOME_RESOLVER);
    let is_link = fs::symlink_metadata(&file).is_ok_and(|about| about.file_type().is_symlink());
    if !wanted.has_resolver() {
        if !before.exists() {
            return None;
        }
        let back = read(&before).and_then(|text| {
            replace(&file, text.unwrap_or_default().as_bytes())?;
            fs::remove_file(&before)
        });
        return Some(match back {
            Ok(()) => done(SUBJECT, "as before"),
            Err(error) => failed(SUBJECT, error.to_string()),
        });
    }
    let servers: Vec<String> = wanted.nameservers.iter().map(ToString::to_string).collect();
    let what = [servers.join(", "), wanted.search.join(", ")].join(" ").trim().to_owned();
    if is_link {
        // Somebody else writes what it leads to.
        return Some(match system {
            System::Networkd | System::NetworkManager if !wanted.nics.is_empty() => {
                done(SUBJECT, format!("{what}, in the NIC's configuration"))
            }
            _ => failed(SUBJECT, format!("/{RESOLVER} is a link to what another program writes; it was left as it is")),
        });
    }
    let mut text = String::from("# Written by vmdr-guest-tools; given back when the guest goes home.\n");
    for server in &servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !wanted.search.is_empty() {
        text.push_str(&format!("search {}\n", wanted.search.join(" ")));
    }
    let keep = if before.exists() {
        Ok(())
    } else {
        read(&file).and_then(|had| replace(&before, had.unwrap_or_default().as_bytes()))
    };
    Some(match keep.and_then(|()| replace(&file, text.as_bytes())) {
        Ok(()) => done(SUBJECT, what),
        Err(error) => failed(SUBJECT, error.to_string()),
    })
}

/// What is remembered; nothing where all is home.
fn note(places: &Places, home: &Network, given: &Network, system: System) -> io::Result<()> {
    fs::create_dir_all(&places.state)?;
    let file = places.state.join(SYSTEM);
    if !home.is_home() || !given.is_home() {
        replace(&file, system.word().as_bytes())?;
    } else if file.exists() {
        fs::remove_file(&file)?;
    }
    for (name, network) in [(HOME, home), (GIVEN, given)] {
        let file = places.state.join(name);
        if network.is_home() {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => continue,
            }
        }
        let text = network.encode().map_err(io::Error::other)?;
        replace(&file, text.as_bytes())?;
    }
    Ok(())
}

/// Who had the NICs when something was given.
fn noted_system(places: &Places) -> Option<System> {
    System::of_word(read(&places.state.join(SYSTEM)).ok()??.trim())
}

fn read_network(file: &Path) -> Result<Option<Network>, String> {
    let text = read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    text.map(|text| Network::parse(&text).map_err(|why| format!("{}: {why}", file.display()))).transpose()
}

/// A file, if it is there.
fn read(file: &Path) -> io::Result<Option<String>> {
    use std::io::Read;
    match fs::File::open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(open) => {
            let mut text = String::new();
            open.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
            if text.len() as u64 > FILE_BYTES_MAX {
                return Err(io::Error::other(format!("{} has more than {FILE_BYTES_MAX} bytes", file.display())));
            }
            Ok(Some(text))
        }
    }
}

/// Writes a file whole or not at all, and has it on the disk.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(file, bytes, 0o644, None)
}

/// The same with a mode; or with the owner and the mode that another file has.
fn replace_with(file: &Path, bytes: &[u8], mode: u32, like: Option<&fs::Metadata>) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let mut name = file.file_name().unwrap_or_default().to_owned();
    // Programs that read whole directories pass names by that begin with a dot.
    let mut hidden = std::ffi::OsString::from(".vmdr-");
    hidden.push(&name);
    std::mem::swap(&mut name, &mut hidden);
    let beside = file.with_file_name(name);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut open = fs::File::options().write(true).create_new(true).mode(mode).open(&beside)?;
    if let Some(like) = like {
        // Whatever the mask of new files is.
        std::os::unix::fs::fchown(&open, Some(like.uid()), Some(like.gid()))?;
        open.set_permissions(like.permissions())?;
    }
    open.write_all(bytes)?;
    open.sync_all()?;
    fs::rename(&beside, file)?;
    if let Some(directory) = file.parent() {
        fs::File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
