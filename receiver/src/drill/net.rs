//! The network of a drill: bridges of its own that lead nowhere, and a namespace from which the copy is asked.
//!
//! For each network that the guest is in there is a bridge with the copy's tap device and one end of a pair of devices whose
//! other end is in the [`Probe`]'s namespace: no uplink, no address of the host, no IPv6 of the host. So what the copy sends
//! ends there: this host neither answers at such a bridge nor forwards what comes from it. The copy announces itself when it is resumed, as every migrated guest does; that is how its address is learnt.

use std::io;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::namespace;
use crate::activate::host::interface_index;

/// What all bridges of drills are called; a device's name has at most 15 bytes.
const BRIDGE: &str = "vmdr-d";
/// The probe's end of a pair.
const PROBE: &str = "probe";
/// Networks that a guest can be in, for a drill.
pub const BRIDGES_MAX: usize = 10;

/// Why a drill's network could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused.
    #[error("`ip {words}` (package iproute2): {said}")]
    Ip {
        /// The arguments.
        words: String,
        /// What it said.
        said: String,
    },
    /// A namespace or a setting.
    #[error("the network of the drill: {what}: {source}")]
    Io {
        /// What was to be done.
        what: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The thread that asks the copy has ended.
    #[error("the thread that asks the copy has ended by itself")]
    Ended,
}

fn ip(words: &[&str]) -> Result<(), NetError> {
    let failed = |said: String| NetError::Ip { words: words.join(" "), said };
    let done = Command::new("ip").args(words).output().map_err(|e| failed(e.to_string()))?;
    if done.status.success() { Ok(()) } else { Err(failed(String::from_utf8_lossy(&done.stderr).trim().to_owned())) }
}

fn setting(path: &str, value: &str) -> Result<(), NetError> {
    std::fs::write(path, value).map_err(|source| NetError::Io { what: format!("write {path}"), source })
}

fn without_ipv6(device: &str) -> Result<(), NetError> {
    match setting(&format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(NetError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// What this host does with IPv4 that comes from a bridge of a drill. An address of any of its interfaces is otherwise one at
/// which it answers on all of them, and a hypervisor often forwards. The bridge has no address and no route leads to it, so a
/// reverse path never does: `rp_filter` drops everything that has a source.
const MUTE: [(&str, &str); 3] = [("arp_ignore", "8"), ("rp_filter", "1"), ("forwarding", "0")];

/// The names of a drill's bridges.
pub fn bridge_names(id: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{BRIDGE}{id}{number}")).collect()
}

fn probe_of(bridge: &str) -> String {
    format!("{bridge}p")
}

/// Makes bridges without an uplink.
pub fn create(bridges: &[String]) -> Result<(), NetError> {
    for bridge in bridges {
        ip(&["link", "add", "name", bridge, "type", "bridge"])?;
        // Nobody on this host talks to the copy: not even by the address that IPv6 makes up. Before there is anybody to talk to.
        without_ipv6(bridge)?;
        for (name, value) in MUTE {
            setting(&format!("/proc/sys/net/ipv4/conf/{bridge}/{name}"), value)?;
        }
        ip(&["link", "set", bridge, "up"])?;
    }
    Ok(())
}

/// Removes what there is of them.
pub fn remove(bridges: &[String]) -> Result<(), NetError> {
    for device in bridges.iter().map(|bridge| probe_of(bridge)).chain(bridges.iter().cloned()) {
        // The probe's devices go with its namespace, at any moment.
        if interface_index(&device)
            && let Err(error) = ip(&["link", "delete", &device])
            && interface_index(&device)
        {
            return Err(error);
        }
    }
    Ok(())
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network of its own, in which it sees the copy. It ends, with the network, when this is dropped.
pub struct Probe {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    networks: usize,
}

impl Probe {
    /// Beside the copy on these bridges.
    pub fn start(bridges: &[String]) -> Result<Self, NetError> {
        let (jobs, queue): (SyncSender<Job>, Receiver<Job>) = sync_channel(0);
        let (ready, is_ready) = sync_channel(1);
        let thread = std::thread::Builder::new().name("vmdr-probe".to_owned()).spawn(move || {
            let tid = rustix::thread::gettid().as_raw_nonzero();
            let here = namespace::leave_network().map(|()| format!("/proc/{}/task/{tid}/ns/net", std::process::id()));
            let left = here.is_ok();
            // Nobody waits any more: then the queue has ended, too.
            let _ = ready.send(here);
            if left {
                queue.into_iter().for_each(|job| job());
            }
        });
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| NetError::Io { what, source }
        };
        let thread = thread.map_err(failed("start a thread"))?;
        let probe = Probe { jobs: Some(jobs), thread: Some(thread), networks: bridges.len() };
        let namespace = is_ready.recv().map_err(|_| NetError::Ended)?;
        let namespace = namespace.map_err(failed("make a network namespace"))?;
        // A kernel without any address takes every other for a broadcast's, and remembers none.
        probe.run(|| ip(&["link", "set", "lo", "up"]))??;
        for (number, bridge) in bridges.iter().enumerate() {
            let (own, peer) = (probe_of(bridge), format!("{PROBE}{number}"));
            ip(&["link", "add", "name", &own, "type", "veth", "peer", "name", &peer, "netns", &namespace])?;
            without_ipv6(&own)?;
            ip(&["link", "set", &own, "master", bridge, "up"])?;
            probe.run(move || {
                // Who announces an address is remembered, whether it is a neighbour's or not.
                setting(&format!("/proc/sys/net/ipv4/conf/{peer}/arp_accept"), "1")?;
                ip(&["link", "set", &peer, "up"])
            })??;
        }
        Ok(probe)
    }

    /// How many networks it is in.
    pub fn networks(&self) -> usize {
        self.networks
    }

    /// Does something there, which has to end by itself.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, NetError> {
        let (answer, answered) = sync_channel(1);
        let job: Job = Box::new(move || {
            let _ = answer.send(job());
        });
        let jobs = self.jobs.as_ref().ok_or(NetError::Ended)?;
        jobs.send(job).map_err(|_| NetError::Ended)?;
        answered.recv().map_err(|_| NetError::Ended)
    }

    /// The addresses that cards with these MAC addresses have announced, and in which network.
    pub fn announced(&self, macs: &[String]) -> Result<Vec<(usize, Ipv4Addr)>, NetError> {
        let read = self.run(|| std::fs::read_to_string("/proc/thread-self/net/arp"))?;
        let table = read.map_err(|source| NetError::Io { what: "read the table of neighbours".to_owned(), source })?;
        Ok(neighbours(&table, macs))
    }

    /// Takes an address beside `of` in a network, and none in the others. There are some to choose from, because how large the
    /// guest takes its network to be is not known: `turn` counts the tries.
    pub fn settle_beside(&self, network: usize, of: Ipv4Addr, turn: usize) -> Result<(), NetError> {
        let address = format!("{}/24", beside(of, turn));
        let networks = self.networks;
        self.run(move || {
            for number in 0..networks {
                ip(&["address", "flush", "dev", &format!("{PROBE}{number}")])?;
            }
            ip(&["address", "add", &address, "dev", &format!("{PROBE}{network}")])
        })?
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // One that has panicked has ended, too.
            let _ = thread.join();
        }
    }
}

/// Another address of the smallest network that `of` can be in: never its first or last.
fn beside(of: Ipv4Addr, turn: usize) -> Ipv4Addr {
    let usable = |mask: &u8| !matches!(of.octets()[3] ^ mask, 0 | 255);
    let masks: Vec<u8> = [3, 1, 2].into_iter().filter(usable).collect();
    let [a, b, c, d] = of.octets();
    let mask = masks.get(turn % masks.len().max(1)).copied().unwrap_or(1);
    Ipv4Addr::new(a, b, c, d ^ mask)
}

/// Reads the kernel's table of neighbours.
fn neighbours(table: &str, macs: &[String]) -> Vec<(usize, Ipv4Addr)> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, _, _, mac, _, device] = words[..] else { return None };
        let network = device.strip_prefix(PROBE)?.parse().ok()?;
        macs.iter().any(|known| known.eq_ignore_ascii_case(mac)).then_some((network, address.parse().ok()?))
    };
    table.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel() {
        let names = bridge_names("0a1b2c", BRIDGES_MAX);
        assert_eq!(names[0], "vmdr-d0a1b2c0");
        assert!(names.iter().all(|name| probe_of(name).len() < 16), "{names:?}");
    }

    #[test]
    fn the_probe_is_beside_the_guest_and_nowhere_special() {
        for last in 1..255 {
            let guest = Ipv4Addr::new(10, 0, 0, last);
            for turn in 0..6 {
                let probe = beside(guest, turn);
                assert!(probe != guest && !matches!(probe.octets()[3], 0 | 255), "{guest}: {probe}");
                assert_eq!(guest.octets()[..3], probe.octets()[..3]);
            }
        }
        assert_eq!(beside(Ipv4Addr::new(10, 78, 0, 10), 0), Ipv4Addr::new(10, 78, 0, 9));
    }

    #[test]
    fn an_address_is_that_of_the_card() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.78.0.10       0x1         0x2         52:54:00:4e:00:0a     *        probe1\n\
            10.78.0.11       0x1         0x2         52:54:00:4e:00:0b     *        probe0\n\
            10.78.0.12       0x1         0x2         52:54:00:4e:00:0a     *        eth0\n";
        let macs = ["52:54:00:4E:00:0A".to_owned()];
        assert_eq!(neighbours(table, &macs), [(1, Ipv4Addr::new(10, 78, 0, 10))]);
        assert_eq!(neighbours("", &macs), []);
    }

    #[test]
    fn this_host_does_not_answer_at_a_bridge_of_a_drill() {
        let id = uuid::Uuid::new_v4().simple().to_string()[..6].to_owned();
        // In a network of its own: it forwards.
        let host = std::thread::spawn(move || {
            namespace::leave_network().unwrap();
            let gateway = Ipv4Addr::new(10, 78, 0, 1);
            ip(&["link", "add", "name", "vmbr0", "type", "bridge"]).unwrap();
            ip(&["address", "add", "10.78.0.1/24", "dev", "vmbr0"]).unwrap();
            ip(&["link", "set", "vmbr0", "up"]).unwrap();
            setting("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            let bridges = bridge_names(&id, 1);
            create(&bridges).unwrap();
            let probe = Probe::start(&bridges).unwrap();
            probe.settle_beside(0, Ipv4Addr::new(10, 78, 0, 10), 0).unwrap();
            // Whether there is an answer to "who has the gateway's address", which is asked once a second.
            let answered = |turns: u32| {
                let asked = probe.run(move || {
                    let one = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                    (0..turns).any(|_| {
                        // That nobody is there is an error later.
                        let _ = one.send_to(b"x", (gateway, 9));
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        let table = std::fs::read_to_string("/proc/thread-self/net/arp").unwrap();
                        let mut lines = table.lines().filter(|line| line.starts_with("10.78.0.1 "));
                        lines.any(|line| !line.contains("00:00:00:00:00:00"))
                    })
                });
                asked.unwrap()
            };
            assert!(!answered(30));
            let settings = format!("/proc/sys/net/ipv4/conf/{}", bridges[0]);
            assert_eq!(std::fs::read_to_string(format!("{settings}/forwarding")).unwrap().trim(), "0");
            // It would be heard.
            for (name, _) in MUTE {
                setting(&format!("{settings}/{name}"), "0").unwrap();
                setting(&format!("/proc/sys/net/ipv4/conf/all/{name}"), if name == "forwarding" { "1" } else { "0" })
                    .unwrap();
            }
            assert!(answered(600));
        });
        host.join().unwrap();
    }

    #[test]
    fn bridges_come_and_go_and_a_probe_is_alone() {
        let id = &uuid::Uuid::new_v4().simple().to_string()[..6];
        let bridges = bridge_names(id, 2);
        create(&bridges).unwrap();
        let probe = Probe::start(&bridges).unwrap();
        assert!(bridges.iter().all(|bridge| interface_index(bridge)));
        let seen = probe.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
        let devices: Vec<&str> = seen.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
        let mut devices: Vec<&str> =
            devices.into_iter().filter(|name| name.starts_with(PROBE) || *name == "lo").collect();
        devices.sort_unstable();
        assert_eq!(devices, ["lo", "probe0", "probe1"]);
        probe.settle_beside(1, Ipv4Addr::new(10, 9, 9, 10), 0).unwrap();
        drop(probe);
        remove(&bridges).unwrap();
        remove(&bridges).unwrap();
        assert!(!bridges.iter().any(|bridge| interface_index(bridge) || interface_index(&probe_of(bridge))));
    }
}
