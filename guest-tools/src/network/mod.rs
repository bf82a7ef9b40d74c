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
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmdr_guest_channel::network::{ADDRESSES_MAX, Item, Network, Nic, ROUTES_MAX, Report, Route, Subnet};

use self::netlink::{Link, Netlink};
use self::persist::System;

const HOME: &str = "home";
const GIVEN: &str = "given";
const HOME_HOSTNAME: &str = "home.hostname";
const HOME_RESOLVER: &str = "home.resolv.conf";
const HOSTNAME_NOW: &str = "proc/sys/kernel/hostname";
const HOSTNAME_FILE: &str = "etc/hostname";
const RESOLVER: &str = "etc/resolv.conf";
/// More than any of these files has.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How long NICs that are not there yet are waited for when the guest has just started.
const NICS_WAIT: Duration = Duration::from_secs(30);
/// Between two looks for them.
const NICS_LOOK: Duration = Duration::from_millis(500);

/// What is asked of the kernel; tests have one of their own.
pub trait Kernel {
    /// All devices that have a MAC address.
    fn links(&mut self) -> io::Result<Vec<Link>>;
    /// Brings a device up.
    fn up(&mut self, link: &Link) -> io::Result<()>;
    /// Its addresses of global scope.
    fn addresses(&mut self, link: &Link) -> io::Result<Vec<Subnet>>;
    /// Gives it an address.
    fn add_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()>;
    /// Takes one from it.
    fn remove_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()>;
    /// Its routes through others.
    fn routes(&mut self, link: &Link) -> io::Result<Vec<Route>>;
    /// Adds a route, or has the one to the same network lead there.
    fn set_route(&mut self, link: &Link, route: Route) -> io::Result<()>;
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
    fn addresses(&mut self, link: &Link) -> io::Result<Vec<Subnet>> {
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
    fn set_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        self.set_route(link, route)
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
        Ok(mut kernel) => apply_with(&mut kernel, wanted, places, &mut persist::run),
        Err(error) => vec![failed("network", format!("open a netlink socket: {error}"))],
    };
    Report { items }
}

/// What was given before a reboot is given again, where nothing else in the guest does that. Gives what is to be logged.
pub fn again(places: &Places) -> Vec<String> {
    let Ok(Some(given)) = read_network(&places.state.join(GIVEN)) else { return Vec::new() };
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
    if persist::system(&places.root, &of_nics(&links, &given)) != System::Own {
        return Vec::new();
    }
    let items = apply_with(&mut kernel, &given, places, &mut persist::run);
    items.iter().map(|item| format!("network, after a start: {}: {}{}", item.subject, item.done, item.error)).collect()
}

fn of_nics(links: &[Link], network: &Network) -> Vec<Link> {
    links.iter().filter(|link| network.nics.iter().any(|nic| nic.mac == link.mac)).cloned().collect()
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
    let link = |nic: &Nic| links.iter().find(|link| link.mac == nic.mac);
    let mut home = match read_network(&places.state.join(HOME)) {
        Ok(home) => home.unwrap_or_default(),
        Err(error) => return vec![failed("network", format!("what it was like before is not known: {error}"))],
    };
    let nothing_given = home.is_home() && wanted.is_home() && !places.state.join(GIVEN).exists();
    if nothing_given {
        return items;
    }
    for nic in &wanted.nics {
        if home.nics.iter().any(|before| before.mac == nic.mac) {
            continue;
        }
        let Some(link) = link(nic) else { continue };
        match (kernel.addresses(link), kernel.routes(link)) {
            (Ok(mut addresses), Ok(mut routes)) => {
                addresses.truncate(ADDRESSES_MAX);
                routes.truncate(ROUTES_MAX);
                home.nics.push(Nic { mac: nic.mac, addresses, routes });
            }
            (Err(error), _) | (_, Err(error)) => {
                items.push(failed(format!("NIC {}", nic.mac), format!("see what it has: {error}")));
            }
        }
    }
    // Before anything is changed: what is not known cannot be given back.
    if let Err(error) = note(places, &home, wanted) {
        return vec![failed("network", format!("nothing was changed, as it cannot be noted: {error}"))];
    }
    let system = persist::system(&places.root, &of_nics(&links, &home));
    let going_home: Vec<Nic> =
        home.nics.iter().filter(|nic| !wanted.nics.iter().any(|w| w.mac == nic.mac)).cloned().collect();
    for nic in &going_home {
        let subject = format!("NIC {}", nic.mac);
        match link(nic).map(|link| (link, set(kernel, link, nic))) {
            Some((link, Ok(()))) => {
                items.push(done(subject, format!("as before: {}", describe(nic, link))));
                home.nics.retain(|before| before.mac != nic.mac);
            }
            Some((_, Err(error))) => items.push(failed(subject, format!("give back what it had: {error}"))),
            // It is gone, and what it had with it.
            None => home.nics.retain(|before| before.mac != nic.mac),
        }
    }
    for nic in &wanted.nics {
        let subject = format!("NIC {}", nic.mac);
        match link(nic).map(|link| (link, set(kernel, link, nic))) {
            Some((link, Ok(()))) => items.push(done(subject, describe(nic, link))),
            Some((link, Err(error))) => items.push(failed(subject, format!("{}: {error}", link.name))),
            None => items.push(failed(subject, "the guest has no such NIC")),
        }
    }
    items.extend(hostname(wanted.hostname.as_deref(), places));
    items.extend(resolver(wanted, places, system));
    items.push(persist::write(&places.root, system, wanted, &links, run));
    if let Err(error) = note(places, &home, wanted) {
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
        let has = kernel.addresses(link)?;
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
    for route in kernel.routes(link)?.iter().filter(|route| !nic.routes.contains(route)) {
        gone(kernel.remove_route(link, *route))?;
    }
    for route in &nic.routes {
        kernel.set_route(link, *route)?;
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
fn note(places: &Places, home: &Network, given: &Network) -> io::Result<()> {
    fs::create_dir_all(&places.state)?;
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
            open.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
            Ok(Some(text))
        }
    }
}

/// Writes a file whole or not at all, and has it on the disk.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(file, bytes, 0o644)
}

fn replace_with(file: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
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
