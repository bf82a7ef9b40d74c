use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use tempfile::TempDir;

use super::super::host::fake::{BOOT, FakeHost, OnRestore};
use super::*;
use crate::store::{DiskImage, RamImage};

const UUID: Uuid = Uuid::from_u128(0x22222222_1111_4111_8111_111111111111);
const RAM_BYTES: u64 = 512 << 20;
const DISK_BYTES: u64 = 1 << 20;
const CUT: u64 = 1_000_000_000;

struct FakeStandby {
    directory: PathBuf,
    generation: Mutex<u64>,
    raised: Mutex<Vec<u64>>,
    point: RecoveryPoint,
}

impl Standby for FakeStandby {
    fn generation(&self) -> Result<u64, ActivateError> {
        Ok(*self.generation.lock().unwrap())
    }
    fn fence(&self, to: u64) -> Result<(), ActivateError> {
        let mut generation = self.generation.lock().unwrap();
        self.raised.lock().unwrap().push(to);
        *generation = to.max(*generation);
        Ok(())
    }
    fn recovery_point(&self, _: Option<StoredPoint>) -> Result<RecoveryPoint, ActivateError> {
        Ok(self.point.clone())
    }
    fn directory(&self) -> PathBuf {
        self.directory.clone()
    }
}

struct Fixture {
    parent: TempDir,
    standby: FakeStandby,
    host: FakeHost,
    settings: Settings,
}

fn sparse(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    // QEMU's user must be let through; tempfile makes directories for their owner only.
    files_open(directory.path());
    let top = directory.path().join("state");
    let domain = top.join(UUID.to_string());
    std::fs::create_dir_all(&domain).unwrap();
    let path = |name: &str| domain.join(name);
    sparse(&path("0.img"), RAM_BYTES);
    std::fs::write(path("1.img"), vec![5; 4096]).unwrap();
    sparse(&path("vda.raw"), DISK_BYTES);
    std::fs::write(path("device"), b"QEVM\0\0\0\x03\x04D\x7e\0").unwrap();
    let block = |name: &str, used_bytes, file: &str| RamImage {
        name: name.to_owned(),
        used_bytes,
        page_bytes: 4096,
        path: path(file),
    };
    let point = RecoveryPoint {
        uuid: UUID.to_string(),
        name: "proof".to_owned(),
        generation: 1,
        epoch: 7,
        cut_unix_ns: CUT,
        ram: vec![block("pc.ram", RAM_BYTES, "0.img"), block("pc.bios", 4096, "1.img")],
        device_state: path("device"),
        disks: vec![DiskImage { target: "vda".to_owned(), size_bytes: DISK_BYTES, path: path("vda.raw") }],
        domain_xml: include_str!("../testdata/q35.xml").to_owned(),
        machine: "pc-q35-10.0".to_owned(),
        dir: domain.clone(),
        layout: vmdr_codec::Layout::default(),
        sealed: false,
        older: None,
        checked: None,
    };
    let files = [
        "/usr/bin/qemu-system-x86_64",
        "/var/lib/libvirt/images/vmlinuz",
        "/var/lib/libvirt/images/initrd.gz",
        "/var/log/libvirt/qemu",
    ];
    let own = std::fs::metadata(directory.path()).unwrap();
    let owner = format!("+{}:+{}", own.uid(), own.gid());
    let host = FakeHost {
        files: files.iter().map(PathBuf::from).collect(),
        interfaces: ["br-dr".to_owned()].into(),
        capabilities: super::super::host::fake::CAPABILITIES.replace("+64056:+994", &owner),
        ..FakeHost::default()
    };
    let settings = Settings {
        state_directory: top,
        clear_directory: None,
        mapping: BTreeMap::from([("vmbr0".to_owned(), "br-dr".to_owned())]).into(),
    };
    let (generation, raised) = (Mutex::new(1), Mutex::default());
    Fixture { standby: FakeStandby { directory: domain, generation, raised, point }, host, settings, parent: directory }
}

use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn files_open(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

impl Fixture {
    fn run_with(&self, progress: &mut dyn FnMut(&str)) -> Result<Activated, ActivateError> {
        Activation {
            uuid: UUID,
            name: "proof",
            standby: &self.standby,
            host: &self.host,
            settings: &self.settings,
            point: None,
            requested: Instant::now(),
            requested_unix_ns: CUT + 2_500_000_000,
        }
        .run(progress)
    }

    fn run(&self) -> Result<Activated, ActivateError> {
        self.run_with(&mut |_| {})
    }

    fn active(&self) -> ActiveDirectory {
        ActiveDirectory::of(&self.standby.directory)
    }

    fn step(&self) -> Option<Step> {
        self.active().read(UUID).unwrap().map(|r| r.step)
    }

    fn on_restore(&self, what: OnRestore) {
        *self.host.on_restore.lock().unwrap() = what;
    }

    fn restores(&self) -> usize {
        self.host.libvirt.lock().unwrap().restores.len()
    }

    fn attempts(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.active().path()) else { return Vec::new() };
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|n| n.starts_with("attempt")).collect();
        names.sort();
        names
    }

    fn guest_ends(&self) {
        self.host.libvirt.lock().unwrap().guest.as_mut().unwrap().state = DomainState::ShutOff;
    }

    /// What holds after every activation that has worked, whatever happened before.
    fn assert_running_once(&self) {
        let libvirt = self.host.libvirt.lock().unwrap();
        let guest = libvirt.guest.as_ref().unwrap();
        assert_eq!((guest.state, guest.persistent), (DomainState::Running, true));
        assert!(guest.disk_files.iter().all(|f| f.exists()), "{:?}", guest.disk_files);
        let Some(Step::Running { generation: 2, attempt, .. }) = self.step() else { panic!("{:?}", self.step()) };
        assert_eq!(self.attempts(), [format!("attempt-{attempt}")]);
        assert!(guest.disk_files[0].starts_with(self.active().attempt(attempt)));
        let defined = libvirt.defined.last().unwrap();
        assert_eq!(
            defined.attribute_at("devices/disk/source", "file").map(PathBuf::from),
            Some(guest.disk_files[0].clone())
        );
        assert!(!self.active().attempt(attempt).join(SAVE_IMAGE).exists());
        assert_eq!(*self.standby.generation.lock().unwrap(), 2);
    }
}

#[test]
fn a_guest_is_brought_up_and_reported() {
    let f = fixture();
    let mut steps = Vec::new();
    let done = f.run_with(&mut |s| steps.push(s.to_owned())).unwrap();
    assert_eq!(steps, ["check this host", "fence the old host", "prepare disks and memory", "restore the guest"]);
    assert_eq!(done.point, Some(PointId { generation: 1, epoch: 7, cut_unix_ns: CUT }));
    assert_eq!((done.generation, done.lost_seconds, done.was_active), (2, 2.5, false));
    assert!(done.rto.is_some());
    f.assert_running_once();
    let ram = std::fs::metadata(f.standby.directory.join("0.img")).unwrap();
    assert_eq!(ram.mode() & 0o777, 0o400);

    let again = f.run().unwrap();
    assert_eq!((again.was_active, again.rto, again.lost_seconds), (true, None, 2.5));
    assert_eq!(f.restores(), 1);
    f.assert_running_once();
}

#[test]
fn an_imported_standby_is_raised_far_above_what_its_point_had() {
    let f = fixture();
    std::fs::write(f.standby.directory.join(IMPORTED_FILE), "1-7\n").unwrap();
    let plan = plan::make(&f.standby.point, &f.active().attempt(1), &f.settings, &f.host).unwrap();
    assert!(plan.findings.iter().any(|finding| finding.subject == "ownership"), "{:?}", plan.findings);
    assert_eq!(f.run().unwrap().generation, 1001);
    assert_eq!(f.run().unwrap().generation, 1001, "once");
    assert!(!f.standby.directory.join(IMPORTED_FILE).exists());
    assert_eq!(f.restores(), 1);
}

#[test]
fn a_guest_that_was_shut_down_boots_from_its_disks() {
    let mut f = fixture();
    f.standby.point.ram.clear();
    // What is there is of an older epoch, and of no use.
    std::fs::remove_file(&f.standby.point.device_state).unwrap();
    f.on_restore(OnRestore::Refuse);
    assert!(f.run().is_err());
    assert_eq!(f.attempts(), Vec::<String>::new());
    f.on_restore(OnRestore::Run);
    assert!(!f.run().unwrap().was_active);
    f.assert_running_once();
    assert_eq!(f.host.libvirt.lock().unwrap().restores, [PathBuf::from(BOOT), PathBuf::from(BOOT)]);
    assert!(f.run().unwrap().was_active);
}

#[test]
fn killed_before_any_step_it_goes_on_and_starts_one_guest() {
    for step in ["check this host", "fence the old host", "prepare disks and memory", "restore the guest"] {
        for twice in [false, true] {
            let f = fixture();
            for _ in 0..=usize::from(twice) {
                let killed = catch_unwind(AssertUnwindSafe(|| f.run_with(&mut |s| assert!(s != step, "killed"))));
                assert!(killed.is_err(), "{step}");
            }
            assert_eq!(f.restores(), 0);
            f.run().unwrap();
            f.assert_running_once();
            let raised = f.standby.raised.lock().unwrap();
            assert!(raised.iter().all(|g| *g == 2), "{step}: the generation is chosen once: {raised:?}");
        }
    }
}

#[test]
fn killed_while_libvirt_restores_the_guest_is_found() {
    let f = fixture();
    f.on_restore(OnRestore::Killed);
    assert!(catch_unwind(AssertUnwindSafe(|| f.run())).is_err());
    assert!(matches!(f.step(), Some(Step::Restoring { attempt: 1, .. })));
    let found = f.run().unwrap();
    assert_eq!((found.was_active, f.restores()), (true, 1));
    f.assert_running_once();
}

#[test]
fn killed_before_libvirt_heard_of_it_a_new_attempt_leaves_the_old_files_alone() {
    let f = fixture();
    f.on_restore(OnRestore::KilledBefore);
    assert!(catch_unwind(AssertUnwindSafe(|| f.run())).is_err());
    // The first restore may still come: its files must be there while the second attempt is made.
    f.on_restore(OnRestore::Run);
    let mut seen = Vec::new();
    f.run_with(&mut |s| {
        if s == "restore the guest" {
            seen = f.attempts();
        }
    })
    .unwrap();
    assert_eq!(seen, ["attempt-1", "attempt-2"]);
    f.assert_running_once();
}

#[test]
fn a_late_restore_of_an_earlier_attempt_wins_and_keeps_its_files() {
    let f = fixture();
    f.on_restore(OnRestore::Killed);
    assert!(catch_unwind(AssertUnwindSafe(|| f.run())).is_err());
    // libvirt is slow: the next run sees no guest, and its own restore is refused because the first one has come up.
    let late = f.host.libvirt.lock().unwrap().guest.take();
    f.on_restore(OnRestore::Refuse);
    let done = f.run_with(&mut |s| {
        if s == "restore the guest" {
            f.host.libvirt.lock().unwrap().guest = None;
        }
    });
    assert!(matches!(done, Err(ActivateError::Restore { .. })));
    assert_eq!(f.attempts(), ["attempt-1"], "only its own attempt is removed");
    f.host.libvirt.lock().unwrap().guest = late;
    let found = f.run().unwrap();
    assert!(found.was_active && found.point.is_some());
    f.assert_running_once();
}

#[test]
fn a_restore_that_fails_leaves_nothing_and_can_be_repeated() {
    let f = fixture();
    f.on_restore(OnRestore::Refuse);
    for attempt in 1..=2 {
        let error = f.run().unwrap_err().to_string();
        assert!(error.contains("unable to execute QEMU command") && error.contains("untouched"), "{error}");
        assert!(error.contains("QEMU says: error while loading state"), "{error}");
        assert!(f.attempts().is_empty(), "{:?}", f.attempts());
        let Some(Step::Fenced { generation: 2, attempt: last, .. }) = f.step() else { panic!("{:?}", f.step()) };
        assert_eq!(last, attempt);
    }
    f.on_restore(OnRestore::Run);
    assert!(!f.run().unwrap().was_active);
    f.assert_running_once();
}

#[test]
fn a_lost_connection_says_nothing_about_the_guest() {
    let f = fixture();
    f.on_restore(OnRestore::LoseConnection);
    assert!(matches!(f.run(), Err(ActivateError::Hypervisor(_))));
    assert_eq!(f.attempts(), ["attempt-1"]);
    assert!(f.run().unwrap().was_active);
    assert_eq!(f.restores(), 1);
    f.assert_running_once();
}

#[test]
fn a_guest_left_paused_is_resumed_once() {
    let f = fixture();
    f.on_restore(OnRestore::Pause);
    f.run().unwrap();
    f.assert_running_once();
    assert_eq!(f.host.libvirt.lock().unwrap().resumes, 1);
    // The operator pauses it: that is the operator's word.
    f.host.libvirt.lock().unwrap().guest.as_mut().unwrap().state = DomainState::Paused;
    assert!(f.run().unwrap().was_active);
    assert_eq!(f.host.libvirt.lock().unwrap().resumes, 1);
}

#[test]
fn a_guest_that_has_run_is_not_restored_again() {
    let f = fixture();
    f.run().unwrap();
    f.guest_ends();
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("virsh start proof") && error.contains("1-7"), "{error}");
    assert_eq!(f.restores(), 1);

    // The same where the receiver was killed before it could record that the guest ran, if the guest wrote anything.
    let f = fixture();
    f.on_restore(OnRestore::Killed);
    assert!(catch_unwind(AssertUnwindSafe(|| f.run())).is_err());
    let overlay = f.host.libvirt.lock().unwrap().guest.take().unwrap().disk_files.remove(0);
    let mut file = File::options().append(true).open(&overlay).unwrap();
    file.write_all(b"a cluster").unwrap();
    assert!(matches!(f.run(), Err(ActivateError::HasRun { .. })));
    assert!(overlay.exists());
    assert_eq!(f.restores(), 1);
}

#[test]
fn a_guest_that_runs_here_anyway_is_left_alone() {
    let f = fixture();
    let guest = Guest { state: DomainState::Running, persistent: true, disk_files: vec!["/own.qcow2".into()] };
    f.host.libvirt.lock().unwrap().guest = Some(guest);
    let found = f.run().unwrap();
    assert_eq!((found.was_active, found.point, found.generation), (true, None, 1));
    assert_eq!((f.restores(), f.step()), (0, None));
}

#[test]
fn a_refusal_changes_nothing() {
    let mut f = fixture();
    f.host.interfaces.clear();
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("vmbr0") && error.contains("receiver.toml"), "{error}");
    assert_eq!(f.step(), None);
    assert!(f.standby.raised.lock().unwrap().is_empty());
    assert!(!f.active().path().exists());
}

#[test]
fn a_state_directory_that_qemu_cannot_reach_is_refused_before_anything_is_done() {
    let f = fixture();
    std::fs::set_permissions(f.parent.path(), std::fs::Permissions::from_mode(0o750)).unwrap();
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("chmod o+x"), "{error}");
    assert_eq!((f.step(), f.restores()), (None, 0));
}

#[test]
fn a_point_that_is_encrypted_needs_a_place_in_the_clear() {
    let mut f = fixture();
    f.standby.point.sealed = true;
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("clear_dir in [encryption]"), "{error}");
    f.settings.clear_directory = Some(f.parent.path().join("missing"));
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("is no directory"), "{error}");
    assert_eq!((f.step(), f.restores()), (None, 0));
    assert!(!f.active().path().exists());
}

#[test]
fn what_lay_in_the_clear_and_is_not_mounted_is_not_taken_for_never_written() {
    let f = fixture();
    std::fs::create_dir_all(f.active().path()).unwrap();
    std::os::unix::fs::symlink(f.parent.path().join("missing"), f.active().path().join("files")).unwrap();
    let error = f.run().unwrap_err().to_string();
    assert!(error.contains("mount what it was on"), "{error}");
    assert_eq!((f.step(), f.restores()), (None, 0));
}

#[test]
fn the_old_host_is_fenced_before_libvirt_is_asked() {
    let f = fixture();
    f.on_restore(OnRestore::KilledBefore);
    assert!(catch_unwind(AssertUnwindSafe(|| f.run())).is_err());
    assert_eq!(*f.standby.generation.lock().unwrap(), 2);
}
