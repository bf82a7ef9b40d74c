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

/// What a disk hangs on. (Debian's cloud kernel, which the guests boot, knows no AHCI and no USB.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    #[default]
    Virtio,
    /// virtio-scsi.
    Scsi,
    /// IDE, on machine type pc only.
    Ide,
}

/// What a disk lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    /// A raw file.
    #[default]
    Raw,
    /// A qcow2 file over another over another, the lowest of which holds the file system.
    Chain,
    /// An NBD server at [`GuestSpec::nbd_socket`], which somebody else runs on the disk's file.
    Nbd,
}

/// How a disk is made; unless said otherwise a raw file on virtio-blk.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskShape {
    /// Its bus.
    pub bus: Bus,
    /// Its store.
    pub store: Store,
    /// The guest's TRIM is passed on to the store, and zeros that it writes become holes there.
    pub discard: bool,
}

impl DiskShape {
    /// On this bus, with TRIM where such a disk is protected.
    pub fn on(bus: Bus) -> Self {
        Self { bus, discard: bus != Bus::Ide, ..Self::default() }
    }

    /// In this store.
    pub fn in_store(store: Store) -> Self {
        Self { store, ..Self::default() }
    }
}

/// Firmware and variables of [`GuestSpec::uefi`], from Debian's package `ovmf`.
const OVMF: [&str; 2] = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"];

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
    /// How they are made, as far as it is not the usual way.
    pub disk_shapes: Vec<DiskShape>,
    /// Whether it boots with UEFI, with variables in a file of its own.
    pub uefi: bool,
    /// Further words for its kernel.
    pub kernel_words: String,
    /// Whether the QEMU guest agent is in it.
    pub qemu_agent: bool,
    /// Its <memballoon>.
    pub balloon: &'static str,
    /// Whether it has a QMP socket for vmdr alone, or only libvirt's monitor.
    pub own_qmp: bool,
    /// Its address.
    pub address: Ipv4Addr,
    /// Elements to put into its <devices>.
    pub extra_devices: String,
    /// Elements to put beside its <devices>.
    pub extra_elements: String,
    /// Its UUID, a new one for each that is made.
    pub uuid: uuid::Uuid,
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
            disk_shapes: Vec::new(),
            uefi: false,
            kernel_words: String::new(),
            qemu_agent: false,
            balloon: "<memballoon model='virtio'/>",
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

    /// The same with vmdr's tools in it, and the channel to them.
    pub fn tools(self) -> Self {
        let channel = "<channel type='unix'><target type='virtio' name='org.vmdr.guest.0'/></channel>";
        let devices = format!("{}{channel}", self.extra_devices);
        Self { kernel_words: format!("{} vmdr.daemon=1", self.kernel_words), extra_devices: devices, ..self }
    }

    /// The same with the QEMU guest agent in it, and the channel to that.
    pub fn qemu_agent(self) -> Self {
        let channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
        let devices = format!("{}{channel}", self.extra_devices);
        let kernel_words = format!("{} vmdr.agent=1", self.kernel_words);
        Self { kernel_words, extra_devices: devices, qemu_agent: true, ..self }
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

    /// How a disk is made.
    pub fn shape(&self, number: usize) -> DiskShape {
        self.disk_shapes.get(number).copied().unwrap_or_default()
    }

    /// Where a disk's file lies, in the site; of several the uppermost.
    pub fn disk_path(&self, number: usize) -> String {
        let format = if self.shape(number).store == Store::Chain { "qcow2" } else { "raw" };
        format!("/var/lib/libvirt/images/{}-{number}.{format}", self.name)
    }

    /// A disk's target name: the next free one of its bus.
    pub fn disk_target(&self, number: usize) -> String {
        let bus = self.shape(number).bus;
        let before = (0..number).filter(|other| self.shape(*other).bus == bus).count();
        let prefix = match bus {
            Bus::Virtio => "vd",
            Bus::Scsi => "sd",
            Bus::Ide => "hd",
        };
        format!("{prefix}{}", char::from(b'a' + before as u8))
    }

    /// Where the NBD server of a disk in [`Store::Nbd`] listens, in the site.
    pub fn nbd_socket(&self, number: usize) -> String {
        format!("/run/vmdr-test-{}-{number}.nbd", self.name)
    }

    /// Where its UEFI variables lie, in the site.
    pub fn variables_path(&self) -> String {
        format!("/var/lib/libvirt/qemu/nvram/{}.fd", self.name)
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
                let (address, words) = (self.address, &self.kernel_words);
                let line = format!("console=ttyS0 quiet panic=1 {words} vmdr.ip={address}/24 vmdr.workload={options}");
                let initrd = if self.qemu_agent { images.initrd_with_agent() } else { images.initrd() };
                let kernel = images.kernel();
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
        let mut devices: String = (0..self.disks_mib.len()).map(|number| self.disk_xml(number)).collect();
        if self.disk_shapes.iter().any(|shape| shape.bus == Bus::Scsi) {
            devices.push_str("<controller type='scsi' model='virtio-scsi'/>");
        }
        if matches!(self.kind, Kind::Linux { .. }) {
            let [_, b, c, d] = self.address.octets();
            // Writing to a String cannot fail.
            let _ = write!(
                devices,
                "<interface type='bridge'><source bridge='vmbr0'/><mac address='52:54:00:{b:02x}:{c:02x}:{d:02x}'/>\
                 <model type='virtio'/></interface>"
            );
        }
        let mut firmware = String::new();
        if self.uefi {
            let ([code, template], variables) = (OVMF, self.variables_path());
            firmware = format!(
                "<loader readonly='yes' type='pflash'>{code}</loader><nvram template='{template}'>{variables}</nvram>"
            );
        }
        let mut qmp = String::new();
        if self.own_qmp {
            let value = format!("unix:{},server=on,wait=off", self.qmp_socket());
            qmp = format!("<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='{value}'/></qemu:commandline>");
        }
        if (0..self.disks_mib.len()).any(|number| self.shape(number).bus == Bus::Ide) {
            // Otherwise the first IDE disk, of which there is one, is refused.
            let trim_off = "<qemu:property name='discard_granularity' type='unsigned' value='0'/>";
            qmp += &format!(
                "<qemu:override><qemu:device alias='ide0-0-0'><qemu:frontend>{trim_off}</qemu:frontend></qemu:device></qemu:override>"
            );
        }
        format!(
            "<domain type='{domain_type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
             <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{mem}</memory><vcpu>{vcpus}</vcpu>\
             <os><type arch='x86_64' machine='{machine}'>hvm</type>{firmware}{boot}</os><features><acpi/><apic/></features>\
             <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>\
             {extra_elements}<devices>{devices}<serial type='file'><source path='{console}'/></serial>\
             {balloon}{extra_devices}</devices>{qmp}</domain>",
            balloon = self.balloon,
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

    fn disk_xml(&self, number: usize) -> String {
        let (shape, path, target) = (self.shape(number), self.disk_path(number), self.disk_target(number));
        let (kind, format, source) = match shape.store {
            Store::Raw => ("file", "raw", format!("<source file='{path}'/>")),
            Store::Chain => ("file", "qcow2", format!("<source file='{path}'/>")),
            Store::Nbd => {
                let host = format!("<host transport='unix' socket='{}'/>", self.nbd_socket(number));
                ("network", "raw", format!("<source protocol='nbd' name='disk'>{host}</source>"))
            }
        };
        let bus = match shape.bus {
            Bus::Virtio => "virtio",
            Bus::Scsi => "scsi",
            Bus::Ide => "ide",
        };
        let discard = if shape.discard { " discard='unmap' detect_zeroes='unmap'" } else { "" };
        format!(
            "<disk type='{kind}' device='disk'><driver name='qemu' type='{format}' cache='none'{discard}/>\
             {source}<target dev='{target}' bus='{bus}'/></disk>"
        )
    }

    fn make_disk(&self, site: &Site, number: usize) -> Result<()> {
        let path = site.path(self.disk_path(number));
        let shape = self.shape(number);
        let raw = if shape.store == Store::Chain { path.with_extension("base.raw") } else { path.clone() };
        let file = fs::File::create(&raw).with_context(|| format!("create {}", raw.display()))?;
        file.set_len(self.disks_mib[number] << 20).with_context(|| format!("size {}", raw.display()))?;
        if matches!(self.kind, Kind::Linux { .. }) {
            exec::run(exec::limited(60, "mkfs.ext4").args(["-q", "-F"]).arg(&raw))?;
        }
        if shape.store == Store::Chain {
            // Files name the one below as the site sees it.
            let middle = PathBuf::from(self.disk_path(number)).with_extension("middle.qcow2");
            let below = PathBuf::from(self.disk_path(number)).with_extension("base.raw");
            for (file, below, format) in
                [(&middle, below.as_path(), "raw"), (&self.disk_path(number).into(), &middle, "qcow2")]
            {
                let words = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
                exec::run(site.command("qemu-img").args(words).arg(below).arg(file))?;
            }
        }
        Ok(())
    }

    /// Makes its disks and defines it in a site.
    pub fn define(&self, site: &Site) -> Result<()> {
        let images = Images::get()?;
        for number in 0..self.disks_mib.len() {
            self.make_disk(site, number).with_context(|| format!("make disk {number} of {}", self.name))?;
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
