//! Test guests.

use crate::exec;
use crate::images::Images;
use crate::site::Site;
use crate::wait::wait_for;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// How long a guest that vmdr pauses at every cut is looked at until it is seen running.
const RUNNING_LIMIT: Duration = Duration::from_secs(20);

/// How long a guest may take to boot under TCG on a busy machine.
pub const BOOT_SECONDS_MAX: u64 = 120;

/// What a guest runs.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Linux with the workload, emulated. The text is the options of `vmdr-guest-tools workload`.
    Linux {
        /// Options of the workload; empty: its defaults.
        workload: String,
    },
    /// The guest without an operating system, under KVM. It has no network, and does not touch its disk.
    BareMetal {
        /// How many PAUSE instructions it spins after every page.
        spins: u32,
        /// Under KVM (which must open here), or else emulated.
        kvm: bool,
    },
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The domain's name.
    pub name: String,
    /// What it runs.
    pub kind: Kind,
    /// Guest memory.
    pub mem_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Machine type: pc or q35.
    pub machine: &'static str,
    /// The sizes of its disks; the first holds the workload's records.
    pub disks_mib: Vec<u64>,
    /// Whether it has a QMP socket for vmdr alone, or only libvirt's monitor.
    pub own_qmp: bool,
    /// Its address.
    pub address: Ipv4Addr,
    /// Elements to put into its <devices>.
    pub extra_devices: String,
    /// Elements to put beside its <devices>.
    pub extra_elements: String,
    uuid: uuid::Uuid,
}

impl GuestSpec {
    /// A Linux guest with a disk, a network card and a QMP socket of its own.
    pub fn linux(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: Kind::Linux { workload: String::new() },
            mem_mib: 192,
            vcpus: 1,
            machine: "q35",
            disks_mib: vec![64],
            own_qmp: true,
            address: Ipv4Addr::new(10, 78, 0, 10),
            extra_devices: String::new(),
            extra_elements: String::new(),
            uuid: uuid::Uuid::new_v4(),
        }
    }

    /// A guest without an operating system, under KVM where `kvm` is set.
    pub fn bare_metal(name: &str, kvm: bool) -> Self {
        let kind = Kind::BareMetal { spins: 0, kvm };
        Self { kind, mem_mib: 64, machine: "pc", disks_mib: vec![1], ..Self::linux(name) }
    }

    /// The same with these options of the workload.
    pub fn workload(self, options: &str) -> Self {
        Self { kind: Kind::Linux { workload: options.to_owned() }, ..self }
    }

    /// The same with this much memory.
    pub fn memory(self, mem_mib: u64) -> Self {
        Self { mem_mib, ..self }
    }

    /// The same with these elements among its devices and beside them.
    pub fn extra(self, devices: &str, elements: &str) -> Self {
        Self { extra_devices: devices.to_owned(), extra_elements: elements.to_owned(), ..self }
    }

    /// The same with this address (and a MAC address that follows from it).
    pub fn address(self, address: Ipv4Addr) -> Self {
        Self { address, ..self }
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> String {
        self.uuid.hyphenated().to_string()
    }

    /// Where vmdr's own QMP socket of the domain lies, in the site.
    pub fn qmp_socket(&self) -> String {
        format!("/var/lib/libvirt/qemu/vmdr-{}.qmp", self.uuid())
    }

    /// Where a disk's file lies, in the site.
    pub fn disk_path(&self, number: usize) -> String {
        format!("/var/lib/libvirt/images/{}-{number}.raw", self.name)
    }

    /// Where the console is logged, in the site.
    pub fn console_path(&self) -> String {
        format!("/var/log/libvirt/qemu/{}-console.log", self.name)
    }

    /// The domain's definition.
    pub fn xml(&self, images: &Images) -> String {
        let (domain_type, boot) = match &self.kind {
            Kind::Linux { workload } => {
                // Commas instead of spaces: no quotes inside quotes.
                let options = workload.split_whitespace().collect::<Vec<_>>().join(",");
                let line = format!("console=ttyS0 quiet panic=1 vmdr.ip={}/24 vmdr.workload={options}", self.address);
                let (kernel, initrd) = (images.kernel(), images.initrd());
                let boot = format!(
                    "<kernel>{}</kernel><initrd>{}</initrd><cmdline>{line}</cmdline>",
                    kernel.display(),
                    initrd.display()
                );
                ("qemu", boot)
            }
            Kind::BareMetal { spins, kvm } => {
                let kernel = images.bare_metal();
                let boot = format!("<kernel>{}</kernel><cmdline>pause={spins}</cmdline>", kernel.display());
                (if *kvm { "kvm" } else { "qemu" }, boot)
            }
        };
        let mut devices = String::new();
        for number in 0..self.disks_mib.len() {
            let letter = char::from(b'a' + number as u8);
            // Writing to a String cannot fail.
            let _ = write!(
                devices,
                "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
                 <source file='{}'/><target dev='vd{letter}' bus='virtio'/></disk>",
                self.disk_path(number)
            );
        }
        if matches!(self.kind, Kind::Linux { .. }) {
            let [_, b, c, d] = self.address.octets();
            let _ = write!(
                devices,
                "<interface type='bridge'><source bridge='vmbr0'/><mac address='52:54:00:{b:02x}:{c:02x}:{d:02x}'/>\
                 <model type='virtio'/></interface>"
            );
        }
        let mut qmp = String::new();
        if self.own_qmp {
            let value = format!("unix:{},server=on,wait=off", self.qmp_socket());
            qmp = format!("<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='{value}'/></qemu:commandline>");
        }
        format!(
            "<domain type='{domain_type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
             <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{mem}</memory><vcpu>{vcpus}</vcpu>\
             <os><type arch='x86_64' machine='{machine}'>hvm</type>{boot}</os><features><acpi/><apic/></features>\
             <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>\
             {extra_elements}<devices>{devices}<serial type='file'><source path='{console}'/></serial>\
             <memballoon model='virtio'/>{extra_devices}</devices>{qmp}</domain>",
            name = self.name,
            uuid = self.uuid(),
            mem = self.mem_mib,
            vcpus = self.vcpus,
            machine = self.machine,
            extra_elements = self.extra_elements,
            extra_devices = self.extra_devices,
            console = self.console_path(),
        )
    }

    /// Makes its disks and defines it in a site.
    pub fn define(&self, site: &Site) -> Result<()> {
        let images = Images::get()?;
        for (number, mib) in self.disks_mib.iter().enumerate() {
            let path = site.path(self.disk_path(number));
            let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
            file.set_len(mib << 20).with_context(|| format!("size {}", path.display()))?;
            if matches!(self.kind, Kind::Linux { .. }) {
                exec::run(exec::limited(60, "mkfs.ext4").args(["-q", "-F"]).arg(&path))?;
            }
        }
        let xml = site.directory().join(format!("{}.xml", self.name));
        fs::write(&xml, self.xml(&images)).with_context(|| format!("write {}", xml.display()))?;
        site.virsh(&["define", &xml.to_string_lossy()]).map(|_| ())
    }

    /// Defines and starts it, without waiting for it to boot.
    pub fn start(&self, site: &Site) -> Result<()> {
        self.define(site)?;
        site.virsh(&["start", &self.name]).map(|_| ())
    }

    /// Starts it and waits until its workload runs (or, without an operating system, until it has begun to stamp pages).
    pub fn boot(&self, site: &Site) -> Result<()> {
        self.start(site)?;
        let line = match self.kind {
            Kind::Linux { .. } => "workload ready",
            Kind::BareMetal { .. } => "writes ",
        };
        self.wait_console(site, line, Duration::from_secs(BOOT_SECONDS_MAX)).map(|_| ())
    }

    /// The console so far.
    pub fn console(&self, site: &Site) -> String {
        let path: PathBuf = site.path(self.console_path());
        fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits for a whole line on the console that contains `text`, and gives it.
    pub fn wait_console(&self, site: &Site, text: &str, limit: Duration) -> Result<String> {
        let found = wait_for(&format!("{text:?} on the console of {}", self.name), limit, || {
            let console = self.console(site);
            let whole = console.rfind('\n').map_or("", |end| &console[..end]);
            Ok(whole.lines().find(|line| line.contains(text)).map(str::to_owned))
        });
        found.with_context(|| {
            let console = self.console(site);
            let tail: Vec<&str> = console.lines().rev().take(5).collect();
            format!("the console of {} ends with {tail:?} (newest first)", self.name)
        })
    }

    /// The state libvirt has of it: running, paused, shut off, ...
    pub fn state(&self, site: &Site) -> Result<String> {
        Ok(site.virsh(&["domstate", &self.name])?.trim().to_owned())
    }

    /// Fails unless libvirt has it running.
    pub fn expect_running(&self, site: &Site) -> Result<()> {
        // A single look may fall into the pause of a cut.
        wait_for(&format!("{} to run in {}", self.name, site.name()), RUNNING_LIMIT, || {
            Ok((self.state(site)? == "running").then_some(()))
        })
    }
}
