//! Two sites on one machine.
//!
//! ```text
//!   site A (namespaces)                 wan (network namespace)               site B (namespaces)
//!   agent, shims, QEMU, libvirtd        client of the guests, relay           receiver, QEMU, libvirtd
//!     repl0 10.77.0.1 ----------------- repl-a  br-repl 10.77.0.254  repl-b ----------------- repl0 10.77.0.2
//!     vmbr0 = guest0 + taps ----------- guest-a br-guest 10.78.0.1  guest-b ----------------- vmbr0
//! ```
//!
//! The guest network reaches across, so that a client finds a guest at the same address wherever it runs.
//!
//! **Nothing outlives the process that made a rig.** Namespaces have no names: they end with their processes, and those
//! end with this process ([`crate::site`]). What can stay after a SIGKILL are directories; every run holds a lock on its
//! own, and the next rig removes those whose lock is free. Two runs at once share nothing but caches.
//!
//! A rig that is dropped without [`Rig::finish`], as in a test that fails, leaves the sites' logs under `target/rig-logs`, and
//! says where.

use crate::client::Client;
use crate::exec;
use crate::relay::{Relay, Shape};
use crate::site::{Namespace, Site};
use crate::wire::{self, Wire};
use anyhow::{Context, Result};
use rand::rngs::StdRng;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where runs keep their files. Not /tmp, which may be memory: disks and journals belong on a disk.
const RUNS: &str = "/var/tmp/vmdr-rig";
/// Characters of a run's id.
const ID_CHARS: usize = 8;
/// Address of the client and of the rig's end of the guest network.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Address of the relay on the replication link.
pub const RELAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
/// Port of the receiver and of the relay.
pub const PORT: u16 = vmdr_proto::RECEIVER_PORT;

/// One of the two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The site that is protected at first.
    A,
    /// The backup site at first.
    B,
}

impl At {
    /// Both.
    pub const ALL: [At; 2] = [At::A, At::B];

    /// The one opposite.
    pub fn other(self) -> At {
        match self {
            At::A => At::B,
            At::B => At::A,
        }
    }

    fn letter(self) -> &'static str {
        match self {
            At::A => "a",
            At::B => "b",
        }
    }

    /// Its address on the replication link.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1 + self as u8)
    }

    /// Where its receiver is reached directly, as the agent's configuration has it.
    pub fn receiver(self) -> String {
        format!("{}:{PORT}", self.address())
    }
}

/// Which packets of a site are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Those that it gets.
    In,
    /// Those that it gets, and those that it sends.
    Both,
}

/// The two sites, the link and the client.
pub struct Rig {
    id: String,
    name: String,
    directory: PathBuf,
    // Fields are dropped in this order: first what runs, then the lock.
    sites: [Site; 2],
    wan: Namespace,
    client: Client,
    finished: bool,
    _lock: File,
}

impl Rig {
    /// Brings both sites up. `name` is for the logs.
    pub fn new(name: &str) -> Result<Self> {
        let (id, directory, lock) = claim_directory()?;
        let started = Self::start(name, id, &directory, lock);
        if started.is_err() {
            // The error is what counts; the janitor of the next run removes what stays.
            let _ = keep_logs(&directory, name);
            let _ = fs::remove_dir_all(&directory);
        }
        started
    }

    fn start(name: &str, id: String, directory: &Path, lock: File) -> Result<Self> {
        let wan_directory = directory.join("wan");
        fs::create_dir(&wan_directory).context("create the wan's directory")?;
        let wan = Namespace::start(&wan_directory, &[]).context("start the wan")?;
        let client = Client::new(wan.pid1());
        let sites = [
            Site::prepare("site A", directory.join("a")).context("prepare site A")?,
            Site::prepare("site B", directory.join("b")).context("prepare site B")?,
        ];
        pair(&sites).context("pair the sites")?;
        let (name, directory) = (name.to_owned(), directory.to_owned());
        let mut rig = Self { id, name, directory, sites, wan, client, finished: false, _lock: lock };
        // With addresses of their own: a bridge otherwise takes one of its ports', so that the client would get another one
        // when site A is lost, and a guest go on answering the old one until its ARP entry is too old.
        for (bridge, mac, address) in
            [("br-repl", "02:76:6d:64:72:01", RELAY_ADDRESS), ("br-guest", "02:76:6d:64:72:02", CLIENT_ADDRESS)]
        {
            rig.wan_ip(&["link", "add", bridge, "address", mac, "type", "bridge", "mcast_snooping", "0"])?;
            rig.wan_ip(&["addr", "add", &format!("{address}/24"), "dev", bridge])?;
            rig.wan_ip(&["link", "set", bridge, "up"])?;
        }
        for at in At::ALL {
            rig.boot_site(at)?;
        }
        Ok(rig)
    }

    /// Starts a site, new or after [`Rig::kill_site`]: its files are those it had, its /run is empty.
    pub fn boot_site(&mut self, at: At) -> Result<()> {
        self.sites[at as usize].start_namespace()?;
        self.connect(at).with_context(|| format!("connect {}", self.site(at).name()))?;
        self.site(at).start_services()
    }

    fn connect(&self, at: At) -> Result<()> {
        let site = self.site(at);
        let pid1 = site.namespace()?.pid1().to_string();
        for (network, device) in [("repl", "repl0"), ("guest", "guest0")] {
            let port = format!("{network}-{}", at.letter());
            self.wan_ip(&["link", "add", &port, "type", "veth", "peer", "name", device, "netns", &pid1])?;
            self.wan_ip(&["link", "set", &port, "master", &format!("br-{network}"), "up"])?;
        }
        let address = format!("{}/24", at.address());
        for words in [
            &["addr", "add", &address, "dev", "repl0"][..],
            &["link", "set", "repl0", "up"],
            &["link", "add", "vmbr0", "type", "bridge", "mcast_snooping", "0"],
            &["link", "set", "guest0", "master", "vmbr0", "up"],
            &["link", "set", "vmbr0", "up"],
        ] {
            exec::run(site.namespace()?.net_command("ip").args(words))?;
        }
        Ok(())
    }

    /// An `ip` command in the network between the sites.
    pub fn wan_ip(&self, words: &[&str]) -> Result<()> {
        exec::run(self.wan.net_command("ip").args(words)).map(|_| ()).context("in the wan")
    }

    /// The id of this run, unique among those that run now.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the run keeps its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A site.
    pub fn site(&self, at: At) -> &Site {
        &self.sites[at as usize]
    }

    /// The client of the guests.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// SIGKILL for everything at a site: QEMU, libvirtd, vmdr's processes, all in one instant.
    pub fn kill_site(&mut self, at: At) -> Result<()> {
        self.sites[at as usize].kill()
    }

    /// Takes the replication link down or up, as if the cable between the sites were pulled.
    pub fn set_link(&self, up: bool) -> Result<()> {
        for at in At::ALL {
            if self.site(at).is_up() {
                let port = format!("repl-{}", at.letter());
                self.wan_ip(&["link", "set", &port, if up { "up" } else { "down" }])?;
            }
        }
        Ok(())
    }

    /// Drops, or no longer drops, what arrives at `to` over the replication link; the other direction stays as it is.
    pub fn set_deaf(&self, to: At, deaf: bool) -> Result<()> {
        let namespace = self.site(to).namespace()?;
        // Deleting a table that is not there is no error for `add` + `delete`.
        let clear = "add table inet vmdr_rig; delete table inet vmdr_rig";
        exec::run(namespace.net_command("nft").arg(clear))?;
        if deaf {
            let drop = "add table inet vmdr_rig; \
                        add chain inet vmdr_rig in { type filter hook input priority 0; }; \
                        add rule inet vmdr_rig in iifname \"repl0\" drop";
            exec::run(namespace.net_command("nft").arg(drop))?;
        }
        Ok(())
    }

    /// Drops what passes between a site and an address on the replication link, in addition to what is dropped already.
    pub fn cut(&self, at: At, peer: Ipv4Addr, way: Way) -> Result<()> {
        let mut rules = "add table inet vmdr_cut; \
                         add chain inet vmdr_cut in { type filter hook input priority 0; }; \
                         add chain inet vmdr_cut out { type filter hook output priority 0; }; "
            .to_owned();
        rules.push_str(&format!("add rule inet vmdr_cut in ip saddr {peer} drop"));
        if way == Way::Both {
            rules.push_str(&format!("; add rule inet vmdr_cut out ip daddr {peer} drop"));
        }
        exec::run(self.site(at).namespace()?.net_command("nft").arg(rules)).map(|_| ())
    }

    /// Nothing is dropped at a site any more because of [`Rig::cut`].
    pub fn mend(&self, at: At) -> Result<()> {
        // Deleting a table that is not there is no error for `add` + `delete`.
        let clear = "add table inet vmdr_cut; delete table inet vmdr_cut";
        exec::run(self.site(at).namespace()?.net_command("nft").arg(clear)).map(|_| ())
    }

    /// A program in the network between the sites that ends with the rig. Its first child there is the program itself.
    pub fn wan_program(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.wan.pid1().to_string(), "--net", "--pid", "--", program]);
        command
    }

    /// Starts a relay between the sites at [`RELAY_ADDRESS`]:[`PORT`] that passes connections on to the receiver at `to`.
    pub fn relay(&self, to: At, shape: Shape) -> Result<Relay> {
        let listen = SocketAddr::from((RELAY_ADDRESS, PORT));
        Relay::start(&self.client, listen, SocketAddr::from((to.address(), PORT)), shape)
    }

    /// Puts a wire into the replication link, through which all frames between the sites pass from now on. Once per rig.
    pub fn wire(&self, random: &mut StdRng) -> Result<Wire> {
        let wire = Wire::start(&self.client, random)?;
        self.wan_ip(&["link", "add", "br-repl-b", "type", "bridge", "mcast_snooping", "0"])?;
        self.wan_ip(&["link", "set", "br-repl-b", "up"])?;
        self.wan_ip(&["link", "set", wire::ENDS[0], "master", "br-repl", "up"])?;
        for port in [wire::ENDS[1], "repl-b"] {
            self.wan_ip(&["link", "set", port, "master", "br-repl-b", "up"])?;
        }
        Ok(wire)
    }

    /// Copies the sites' logs to a directory that stays, and says where.
    pub fn keep_logs(&self) -> Result<PathBuf> {
        keep_logs(&self.directory, &format!("{}-{}", self.name, self.id))
    }

    /// Ends everything; to be called when all went well. Dropping a rig does the same, but keeps its logs.
    pub fn finish(mut self) -> Result<()> {
        for at in At::ALL {
            self.kill_site(at)?;
        }
        self.wan.kill()?;
        self.finished = true;
        fs::remove_dir_all(&self.directory).with_context(|| format!("remove {}", self.directory.display()))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !self.finished {
            match self.keep_logs() {
                Ok(kept) => eprintln!("rig: the logs of {} are in {}", self.name, kept.display()),
                Err(error) => eprintln!("rig: the logs of {} could not be kept: {error:#}", self.name),
            }
        }
        let ended: Result<Vec<()>> = At::ALL.into_iter().map(|at| self.kill_site(at)).collect();
        if let Err(error) = ended.and_then(|_| self.wan.kill()) {
            eprintln!("rig: {} did not end cleanly: {error:#}", self.name);
        }
        // finish() has removed it already, or the next run's janitor will.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Makes the sites peers of each other, as a `vmdr pair` of long ago has left them.
fn pair(sites: &[Site; 2]) -> Result<()> {
    let [a, b] = sites;
    let (of_a, of_b) = (a.path(vmdr_trust::DIRECTORY), b.path(vmdr_trust::DIRECTORY));
    vmdr_trust::introduce((&of_a, "site-a", &[At::A.receiver()]), (&of_b, "site-b", &[At::B.receiver()]))?;
    Ok(())
}

/// Makes two sites strangers to each other, before their daemons start.
pub fn unpair(rig: &Rig) -> Result<()> {
    for at in At::ALL {
        let directory = rig.site(at).path(vmdr_trust::DIRECTORY);
        fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    Ok(())
}

/// Makes a directory for a run and locks it, after removing those of runs that have ended.
fn claim_directory() -> Result<(String, PathBuf, File)> {
    let runs = Path::new(RUNS);
    fs::create_dir_all(runs).context("create the directory of the runs")?;
    let all = File::create(runs.join("lock")).context("create the lock of the runs")?;
    all.lock().context("lock the runs")?;
    remove_leftovers(runs)?;
    let id: String = uuid::Uuid::new_v4().simple().to_string().chars().take(ID_CHARS).collect();
    let directory = runs.join(&id);
    fs::create_dir(&directory).with_context(|| format!("create {}", directory.display()))?;
    let lock = File::create(directory.join("lock")).context("create the run's lock")?;
    lock.lock().context("lock the run")?;
    Ok((id, directory, lock))
}

/// Removes directories of runs whose process has ended; the caller holds the lock of all runs.
fn remove_leftovers(runs: &Path) -> Result<()> {
    for entry in fs::read_dir(runs).context("list the runs")?.flatten() {
        let Ok(lock) = File::open(entry.path().join("lock")) else { continue };
        if lock.try_lock().is_ok() {
            // Its namespaces are gone or going: a file that is still held is tried again by the next run.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Copies logs and configuration of a run to `target/rig-logs/NAME`.
fn keep_logs(directory: &Path, name: &str) -> Result<PathBuf> {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/rig-logs").join(name);
    for (site, part) in ["a", "b"]
        .into_iter()
        .flat_map(|site| ["log-libvirt", "log-vmdr", "etc-vmdr", "init.log"].map(|part| (site, part)))
    {
        let from = directory.join(site).join(part);
        if from.exists() {
            let to = kept.join(site);
            fs::create_dir_all(&to).with_context(|| format!("create {}", to.display()))?;
            exec::run(Command::new("cp").arg("-r").arg(from).arg(to))?;
        }
    }
    Ok(kept)
}
