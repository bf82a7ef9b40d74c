//! One site: a pid, network and mount namespace with a libvirtd of its own.
//!
//! The site's pid 1 is a shell that reads a pipe of which only this process has the other end. When this process ends,
//! however it ends, the pipe ends, pid 1 exits, and the kernel kills everything in the pid namespace, unmounts what was
//! mounted and deletes the network devices. Killing pid 1 is also how a site dies in one instant ([`Site::kill`]).

use crate::exec;
use crate::wait::wait_for;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// How long a site may take to come up; libvirtd asks QEMU for its capabilities the first time.
const START_SECONDS_MAX: u64 = 60;
/// How long a killed site may take to be gone (its memory has to be freed).
const STOP_SECONDS_MAX: u64 = 30;
/// The limit of a command in a site, unless another is given.
const COMMAND_SECONDS_MAX: u64 = 60;

/// What a site has for itself, and the directory of the run that takes its place.
const BINDS: &[(&str, &str)] = &[
    ("/var/lib/libvirt", "lib-libvirt"),
    ("/var/cache/libvirt", "cache-libvirt"),
    ("/var/log/libvirt", "log-libvirt"),
    ("/etc/libvirt", "etc-libvirt"),
    ("/var/lib/vmdr", "lib-vmdr"),
    ("/etc/vmdr", "etc-vmdr"),
    ("/var/log/vmdr", "log-vmdr"),
    ("/run", "run"),
];
/// libvirtd's answers to "what can this QEMU do", kept because asking takes seconds.
const CAPABILITIES_CACHE: &str = "/var/cache/vmdr/rig/cache-libvirt";

/// Runs as pid 1 of a namespace. $1: a file to make when all is set up; then pairs of directory and mount point.
const INIT: &str = r#"
set -e
ready=$1; shift
mount -t sysfs sysfs /sys
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
ip link set lo up
: >"$ready"
while read -r _; do :; done
"#;
/// Runs in the site once its network is there.
const SERVICES: &str = r#"
set -e
mkdir -p /run/libvirt /run/lock /run/vmdr /var/lib/libvirt/qemu /var/lib/libvirt/images /var/log/libvirt/qemu
chown libvirt-qemu: /var/lib/libvirt/qemu
setsid virtlogd </dev/null >>/var/log/libvirt/virtlogd.out 2>&1 &
setsid libvirtd </dev/null >>/var/log/libvirt/libvirtd.out 2>&1 &
"#;
/// What the rig changes in libvirt's configuration: no labels and no control groups, because both are the machine's and
/// not the site's.
const QEMU_CONF: &str = "\n# Added by vmdr's test rig.\nsecurity_driver = \"none\"\ncgroup_controllers = []\n";

/// A pid, network and mount namespace. Everything in it is killed when this is dropped or this process ends.
pub struct Namespace {
    unshare: Child,
    /// The pipe that pid 1 reads. Never written to.
    stdin: Option<ChildStdin>,
    pid1: u32,
}

impl Namespace {
    /// Starts it with these directories bound over those mount points.
    pub fn start(directory: &Path, binds: &[(PathBuf, &str)]) -> Result<Self> {
        let ready = directory.join("ready");
        match fs::remove_file(&ready) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("remove a mark"),
            _ => {}
        }
        let log = fs::File::create(directory.join("init.log")).context("create the namespace's log")?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["bash", "-c", INIT, "vmdr-rig-init"])
            .arg(&ready)
            .args(binds.iter().flat_map(|(from, to)| [from.as_os_str(), to.as_ref()]))
            .stdin(Stdio::piped())
            .stdout(log.try_clone().context("share the namespace's log")?)
            .stderr(log);
        let mut unshare = command.spawn().context("run unshare (root is needed)")?;
        let stdin = unshare.stdin.take();
        let mut namespace = Self { unshare, stdin, pid1: 0 };
        wait_for("set up a namespace", Duration::from_secs(START_SECONDS_MAX), || {
            if let Some(status) = namespace.unshare.try_wait().context("look at unshare")? {
                let log = fs::read_to_string(directory.join("init.log")).unwrap_or_default();
                bail!("the namespace ended with {status}: {log}");
            }
            Ok(ready.exists().then_some(()))
        })?;
        namespace.pid1 = *exec::children(namespace.unshare.id()).first().context("find the namespace's pid 1")?;
        Ok(namespace)
    }

    /// Its first process, by the id it has outside.
    pub fn pid1(&self) -> u32 {
        self.pid1
    }

    /// A command in its network namespace only.
    pub fn net_command(&self, program: &str) -> Command {
        let mut command = exec::limited(COMMAND_SECONDS_MAX, "nsenter");
        command.args(["-t", &self.pid1.to_string(), "--net", "--", program]);
        command
    }

    /// Kills everything in it at once and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.stdin = None;
        if self.unshare.try_wait().context("look at unshare")?.is_some() {
            return Ok(());
        }
        if self.pid1 != 0 && exec::alive(self.pid1) {
            // It may end between the look and the signal: the wait below decides.
            let _ = exec::signal(self.pid1, Signal::KILL);
        }
        wait_for("end a namespace", Duration::from_secs(STOP_SECONDS_MAX), || {
            Ok(self.unshare.try_wait().context("look at unshare")?.map(|_| ()))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.kill().is_err() {
            let _ = self.unshare.kill();
            let _ = self.unshare.wait();
        }
    }
}

/// One of the two sites.
pub struct Site {
    name: &'static str,
    directory: PathBuf,
    namespace: Option<Namespace>,
}

impl Site {
    /// Prepares the site's directories; nothing runs yet.
    pub fn prepare(name: &'static str, directory: PathBuf) -> Result<Self> {
        let site = Self { name, directory, namespace: None };
        for (inside, own) in BINDS {
            let own = site.directory.join(own);
            fs::create_dir_all(inside).with_context(|| format!("create {inside}"))?;
            match *inside {
                "/etc/libvirt" => copy(Path::new(inside), &own)?,
                "/var/cache/libvirt" if Path::new(CAPABILITIES_CACHE).exists() => {
                    copy(Path::new(CAPABILITIES_CACHE), &own)?;
                }
                _ => fs::create_dir_all(&own).with_context(|| format!("create {}", own.display()))?,
            }
        }
        let etc = site.directory.join("etc-libvirt");
        for unwanted in ["nwfilter", "qemu/networks/autostart", "qemu/autostart"] {
            // Not there is as good.
            let _ = fs::remove_dir_all(etc.join(unwanted));
        }
        let conf = etc.join("qemu.conf");
        let text = fs::read_to_string(&conf).context("read libvirt's qemu.conf")? + QEMU_CONF;
        fs::write(&conf, text).context("write the site's qemu.conf")?;
        Ok(site)
    }

    /// Starts the namespace, without its services.
    pub fn start_namespace(&mut self) -> Result<()> {
        let run = self.directory.join("run");
        fs::remove_dir_all(&run).and_then(|()| fs::create_dir(&run)).context("empty the site's /run")?;
        let binds: Vec<_> = BINDS.iter().map(|(inside, own)| (self.directory.join(own), *inside)).collect();
        self.namespace =
            Some(Namespace::start(&self.directory, &binds).with_context(|| format!("start {}", self.name))?);
        Ok(())
    }

    /// Starts libvirtd and waits until it answers.
    pub fn start_services(&self) -> Result<()> {
        exec::run(self.command("bash").args(["-c", SERVICES])).with_context(|| format!("start {}", self.name))?;
        let limit = Duration::from_secs(START_SECONDS_MAX);
        wait_for(&format!("libvirtd of {}", self.name), limit, || Ok(self.virsh(&["version"]).is_ok().then_some(())))?;
        if !Path::new(CAPABILITIES_CACHE).exists() {
            self.virsh(&["domcapabilities"])?;
            let aside = format!("{CAPABILITIES_CACHE}.{}", std::process::id());
            copy(&self.directory.join("cache-libvirt"), Path::new(&aside))?;
            if fs::rename(&aside, CAPABILITIES_CACHE).is_err() {
                // Another run was first.
                let _ = fs::remove_dir_all(&aside);
            }
        }
        Ok(())
    }

    /// "site A" or "site B".
    pub fn name(&self) -> &str {
        self.name
    }

    /// Where the site's files lie outside.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether it runs.
    pub fn is_up(&self) -> bool {
        self.namespace.is_some()
    }

    /// The namespace, if the site runs.
    pub fn namespace(&self) -> Result<&Namespace> {
        self.namespace.as_ref().with_context(|| format!("{} is down", self.name))
    }

    /// Where a path of the site lies outside.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        BINDS
            .iter()
            .find_map(|(at, own)| inside.strip_prefix(at).ok().map(|rest| self.directory.join(own).join(rest)))
            .unwrap_or_else(|| inside.to_owned())
    }

    /// A command in the site with the usual limit.
    pub fn command(&self, program: &str) -> Command {
        self.command_within(COMMAND_SECONDS_MAX, program)
    }

    /// A command in the site that ends by itself after `seconds`. In a site that is down it fails.
    pub fn command_within(&self, seconds: u64, program: &str) -> Command {
        let mut command = self.enter();
        command.args(["timeout", "-k", "5", &seconds.to_string(), program]);
        command
    }

    /// A command in the site without a limit, for what is to stay.
    pub fn enter(&self) -> Command {
        let pid1 = self.namespace.as_ref().map_or(0, Namespace::pid1);
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid1.to_string(), "--mount", "--net", "--pid", "--"]);
        command
    }

    /// Runs a command in the site and gives what it printed.
    pub fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        exec::run(self.command(program).args(words)).with_context(|| format!("in {}", self.name))
    }

    /// Runs a virsh command on the site's libvirtd and gives what it printed.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        let mut command = self.command("virsh");
        exec::run(command.args(["-q", "-c", "qemu:///system"]).args(words)).with_context(|| format!("in {}", self.name))
    }

    /// Processes of the site, by the ids they have outside.
    pub fn processes(&self) -> Vec<u32> {
        let Some(namespace) = &self.namespace else { return Vec::new() };
        let own = fs::read_link(format!("/proc/{}/ns/pid", namespace.pid1()));
        let Ok(own) = own else { return Vec::new() };
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .filter(|pid: &u32| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|ns| ns == own))
            .collect()
    }

    /// The id outside of the process that has this id in the site.
    pub fn outside_pid(&self, inside: u32) -> Option<u32> {
        let ends_with = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let ids = status.lines().find(|line| line.starts_with("NSpid:"));
            ids.and_then(|ids| ids.split_whitespace().last()?.parse().ok()) == Some(inside)
        };
        self.processes().into_iter().find(ends_with)
    }

    /// Processes of the site whose program has this file name.
    pub fn processes_named(&self, program: &str) -> Vec<u32> {
        let is = |pid: &u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let first = words.split(|byte| *byte == 0).next().unwrap_or_default();
            Path::new(&*String::from_utf8_lossy(first)).file_name().is_some_and(|name| name == program)
        };
        self.processes().into_iter().filter(is).collect()
    }

    /// The QEMU process of a domain, by the id it has outside.
    pub fn qemu(&self, domain: &str) -> Result<u32> {
        let guest = format!("guest={domain},");
        self.processes_named("qemu-system-x86_64")
            .into_iter()
            .find(|pid| {
                let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&words).contains(&guest)
            })
            .with_context(|| format!("no QEMU of {domain} runs in {}", self.name))
    }

    /// SIGKILL for everything in the site, in one instant. Its files stay.
    pub fn kill(&mut self) -> Result<()> {
        match self.namespace.take() {
            Some(mut namespace) => namespace.kill().with_context(|| format!("kill {}", self.name)),
            None => Ok(()),
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    exec::run(Command::new("cp").arg("-a").arg(from).arg(to)).map(|_| ())
}
