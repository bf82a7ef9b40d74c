//! A guest in a QEMU of its own, without libvirt, protected by the product's capture in this process.
//!
//! The devices are those that libvirt gives a q35 guest with a disk, a network card and a balloon. QEMU has one monitor for
//! the capture, which keeps it to itself, and another of the same kind for the floor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use vmdr_proto::shim::Part;
use vmdr_shim::arena::Arena;
use vmdr_shim::capture::{Capture, Whole};
use vmdr_shim::config::{ARENA_BYTES, CUT_LIMIT_MS, CUT_PAGES_MAX, Config, DiskConfig};
use vmdr_shim::disk::Disk;
use vmdr_shim::monitor::Address;
use vmdr_shim::nbd::{Export, Server};
use vmdr_shim::qmp::Qmp;
use vmdr_shim::state_page::StatePage;
use vmdr_tests::wait::wait_for;
use vmdr_tests::{daemon, exec, images::Images};

/// A disk of the guest, and of the mirror.
const DISK_BYTES: u64 = 64 << 20;
/// How long a guest may take to boot under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long a mirror may take to be level.
const MIRROR: Duration = Duration::from_secs(60);
/// How long a monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// Passes after which what is left is copied in a pause, however much it is.
const PASSES_MAX: usize = 6;
/// Bytes of a part that is copied while the guest runs.
const FILL_BYTES: u64 = 16 << 20;
/// As libvirt names the job, and a name for its target.
const MIRROR_JOB: &str = "copy-vda-disk0";
const MIRROR_NODE: &str = "target";
/// Not /tmp, which may be memory: the guest's disk belongs on a disk.
const DIRECTORY: &str = "/var/tmp";

/// What a guest runs.
#[derive(Clone, Debug)]
pub enum Runs {
    /// Linux with these options of the workload.
    Linux(String),
    /// Linux with these options of the job.
    Job(String),
    /// The guest without an operating system, which spins so often after every page it writes.
    BareMetal(u32),
}

/// What a guest is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What it runs.
    pub runs: Runs,
    /// `kvm` or `tcg`.
    pub accelerator: &'static str,
    /// With the devices that libvirt makes, and a mirrored disk; otherwise as few as possible, on machine type pc.
    pub devices: bool,
    /// Its memory.
    pub memory_mib: u64,
}

/// A guest that runs.
pub struct Machine {
    qemu: Child,
    directory: tempfile::TempDir,
    spec: Spec,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It is gone already, or it goes now.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    /// Starts it and waits until its workload runs.
    pub fn start(spec: Spec) -> Result<Self> {
        let images = Images::get()?;
        let directory =
            tempfile::Builder::new().prefix("vmdr-bench-").tempdir_in(DIRECTORY).context("make a directory")?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", spec.accelerator, "-m", &format!("{}M", spec.memory_mib)])
            .args(["-display", "none", "-no-user-config", "-nodefaults", "-no-shutdown"])
            .args(["-serial", &format!("file:{}", at("serial"))]);
        for monitor in ["capture.qmp", "floor.qmp"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", at(monitor))]);
        }
        match &spec.runs {
            Runs::Linux(options) | Runs::Job(options) => {
                let what = if matches!(spec.runs, Runs::Job(_)) { "job" } else { "workload" };
                let options = options.split_whitespace().collect::<Vec<_>>().join(",");
                let line = format!("console=ttyS0 quiet panic=1 vmdr.ip=10.0.2.15/24 vmdr.{what}={options}");
                command
                    .arg("-kernel")
                    .arg(images.kernel())
                    .arg("-initrd")
                    .arg(images.initrd())
                    .args(["-append", &line]);
            }
            Runs::BareMetal(spins) => {
                command.arg("-kernel").arg(images.bare_metal()).args(["-append", &format!("pause={spins}")]);
            }
        }
        if spec.devices {
            make_disk(&directory.path().join("disk"))?;
            command.args(["-machine", "q35"]).args(libvirt_devices(&at("disk")));
        } else {
            command.args(["-machine", "pc"]);
        }
        let log = File::create(directory.path().join("stderr")).context("create QEMU's log")?;
        let qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().context("start QEMU")?;
        let mut machine = Self { qemu, directory, spec };
        machine.wait_ready()?;
        Ok(machine)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let line = match self.spec.runs {
            Runs::Linux(_) => "workload ready",
            Runs::Job(_) => "job ready",
            Runs::BareMetal(_) => "pages ",
        };
        let serial = self.path("serial");
        wait_for(&format!("{line:?} on the guest's console"), BOOT, || {
            if let Some(status) = self.qemu.try_wait().context("look at QEMU")? {
                bail!("QEMU ended with {status}: {}", fs::read_to_string(self.path("stderr")).unwrap_or_default());
            }
            let console = fs::read(&serial).unwrap_or_default();
            Ok(String::from_utf8_lossy(&console).contains(line).then_some(()))
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        self.qemu.id() as i32
    }

    /// Its serial port, so far.
    pub fn serial(&self) -> PathBuf {
        self.path("serial")
    }

    /// The monitor that the capture does not use.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.path("floor.qmp"), ANSWER).context("connect to the floor's monitor")
    }

    /// Begins to protect it: memory watched, the mirror started.
    pub fn protect(&self, monitor: &mut Qmp) -> Result<Protected> {
        let arena = Arena::new(ARENA_BYTES).context("make the arena")?;
        let mut disks = Vec::new();
        if self.spec.devices {
            disks.push(Arc::new(Disk::new("vda", DISK_BYTES, arena.clone(), arena.bytes() / 4)));
        }
        let config = Config {
            domain_name: "bench".to_owned(),
            domain_uuid: "00000000-0000-4000-8000-000000000000".to_owned(),
            permission: None,
            protection: String::new(),
            qemu_pid: self.pid(),
            qemu_uid: 0,
            monitor: Address::Socket(self.path("capture.qmp")),
            directory: self.path("shim"),
            disks: disks
                .iter()
                .map(|disk| DiskConfig { target: disk.target().to_owned(), size_bytes: disk.size() })
                .collect(),
            arena_bytes: ARENA_BYTES,
            cut_pages_max: CUT_PAGES_MAX,
            cut_limit_ms: CUT_LIMIT_MS,
        };
        fs::create_dir_all(&config.directory).context("make the shim's directory")?;
        let exports: Vec<_> = disks.iter().map(|disk| disk.clone() as Arc<dyn Export>).collect();
        let socket = config.nbd_socket();
        let server = match exports.is_empty() {
            true => None,
            false => Some(Server::start(&socket, exports, None).context("start the NBD server")?),
        };
        let page = Arc::new(StatePage::create(&config.state_page()).context("make the state page")?);
        let arena_fd = arena.fd_number();
        let mut capture =
            Capture::new(config, page, None, arena, disks.clone())?.with_helper(daemon::binary("vmdr-shim")?);
        capture.arm(1, 1, Whole::Seed)?;
        if self.spec.devices {
            mirror(monitor, &socket)?;
        }
        Ok(Protected { capture, arena_fd, disks, _server: server })
    }

    /// Ends that: memory unwatched, the mirror gone.
    pub fn unprotect(&self, monitor: &mut Qmp, mut protected: Protected) -> Result<()> {
        if self.spec.devices {
            monitor.execute("block-job-cancel", Some(&json!({ "device": MIRROR_JOB }))).context("end the mirror")?;
            wait_for("the end of the mirror", MIRROR, || {
                let jobs = monitor.execute("query-block-jobs", None)?;
                Ok(jobs.as_array().is_some_and(Vec::is_empty).then_some(()))
            })?;
            monitor.execute("blockdev-del", Some(&json!({ "node-name": MIRROR_NODE }))).context("remove its target")?;
        }
        ensure!(protected.capture.detach(), "the guest was left paused");
        drop(protected);
        fs::remove_dir_all(self.path("shim")).context("remove the shim's directory")
    }
}

/// The capture of a guest, and the server its disk is mirrored into.
pub struct Protected {
    /// The product's own.
    pub capture: Capture,
    /// The number of the arena's descriptor in this process; it has [`ARENA_BYTES`].
    pub arena_fd: i32,
    /// Those of the guest.
    pub disks: Vec<Arc<Disk>>,
    _server: Option<Server>,
}

impl Protected {
    /// Makes the first recovery point. Every part is given to `sink`, and given back after it.
    pub fn seed(&mut self, monitor: &mut Qmp, sink: &mut dyn FnMut(&Part) -> Result<()>) -> Result<()> {
        let until = Instant::now() + MIRROR;
        for pass in 1.. {
            let passed = self.capture.pass()?.context("a pass over memory")?;
            while let Some(part) = self.capture.fill(FILL_BYTES)? {
                sink(&part)?;
                self.release(&part);
            }
            let level = mirror_is_level(monitor)?;
            ensure!(Instant::now() < until, "the mirror is not level within {MIRROR:?}");
            if level && (passed.pending_pages <= CUT_PAGES_MAX / 4 || pass >= PASSES_MAX) {
                break;
            }
        }
        let part = self.cut()?;
        sink(&part)?;
        self.release(&part);
        Ok(())
    }

    /// A cut. Its part is held until it is released.
    pub fn cut(&mut self) -> Result<Part> {
        self.capture.cut(u64::MAX, false)?.context("a cut")
    }

    /// Gives a part, and all before it, back.
    pub fn release(&mut self, part: &Part) {
        self.capture.release(part.epoch, part.part);
    }
}

fn make_disk(path: &Path) -> Result<()> {
    let file = File::create(path).context("create the guest's disk")?;
    file.set_len(DISK_BYTES).context("size the guest's disk")?;
    exec::run(exec::limited(60, "mkfs.ext4").args(["-q", "-F"]).arg(path)).map(|_| ())
}

/// As in the command line that libvirt 11.3 makes of a q35 guest with these devices.
fn libvirt_devices(disk: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut device = |text: &str| words.extend(["-device".to_owned(), text.to_owned()]);
    device("pcie-root-port,port=8,chassis=1,id=pci.1,bus=pcie.0,multifunction=on,addr=0x1");
    for number in 2..=6 {
        let (port, function) = (number + 7, number - 1);
        device(&format!(
            "pcie-root-port,port={port},chassis={number},id=pci.{number},bus=pcie.0,addr=0x1.{function:#x}"
        ));
    }
    device("qemu-xhci,id=usb,bus=pci.2,addr=0x0");
    device("virtio-blk-pci,bus=pci.3,addr=0x0,drive=disk0,id=virtio-disk0,write-cache=on");
    device("virtio-net-pci,netdev=net0,bus=pci.1,addr=0x0");
    device("virtio-balloon-pci,id=balloon0,bus=pci.4,addr=0x0");
    device("virtio-rng-pci,rng=rng0,id=rng,bus=pci.5,addr=0x0");
    for pair in [
        ["-object", "rng-random,id=rng0,filename=/dev/urandom"],
        ["-netdev", "user,id=net0,restrict=on"],
        ["-blockdev", &format!("driver=file,filename={disk},node-name=disk0,cache.direct=on,cache.no-flush=off")],
    ] {
        words.extend(pair.map(str::to_owned));
    }
    words
}

/// Mirrors the disk as virDomainBlockCopy with synchronous writes does.
fn mirror(monitor: &mut Qmp, socket: &Path) -> Result<()> {
    let server = json!({ "type": "unix", "path": socket });
    let target =
        json!({ "driver": "nbd", "node-name": MIRROR_NODE, "server": server, "export": "vda", "discard": "unmap" });
    monitor.execute("blockdev-add", Some(&target)).context("add the mirror's target")?;
    let job = json!({
        "job-id": MIRROR_JOB, "device": "disk0", "target": MIRROR_NODE, "sync": "full", "copy-mode": "write-blocking"
    });
    monitor.execute("blockdev-mirror", Some(&job)).context("start the mirror")?;
    Ok(())
}

fn mirror_is_level(monitor: &mut Qmp) -> Result<bool> {
    let jobs = monitor.execute("query-block-jobs", None)?;
    Ok(jobs
        .as_array()
        .is_some_and(|jobs| jobs.iter().all(|job| job["ready"] == true && job["actively-synced"] == true)))
}
