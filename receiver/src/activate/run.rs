//! The activation itself: a flat list of steps, each preceded by its durable record.
//!
//! ```text
//!            +-- the guest runs here ------------------------------------+
//!            |                                                           v
//!  request --+-- record Running, or written overlays: refuse (HasRun)   finish: define, record Running, tidy up
//!            |                                                           ^
//!            +-- checks -> Planned -> raise generation -> Fenced -> Restoring -> restore --+
//!                  |                                        ^                       |
//!                refuse, nothing changed                    +------ it failed ------+
//! ```
//! A receiver that is killed while libvirt restores leaves libvirt at work. Whoever comes next therefore never touches the
//! files of an earlier attempt before it has seen which attempt's files the running guest has; libvirt itself lets only
//! one domain of a UUID start.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;
use vmdr_daemon::durable;
use vmdr_hypervisor::libvirt::DomainState;

use super::clear::{self, Decrypted};
use super::content;
use super::files::{self, FileError};
use super::findings;
use super::host::{Guest, Host};
use super::memory::Memory;
use super::plan::{self, Plan};
use super::qcow2;
use super::record::{ActiveDirectory, PointId, Pristine, Record, Step};
use super::save_image::{self, Block, Content};
use super::xml::RAM_BACKEND;
use super::{ActivateError, Settings};
use crate::store::{Array, IMPORTED_FILE, PointId as StoredPoint, RecoveryPoint};

/// How long a guest may take from "libvirt has restored it" to running. libvirt answers when it runs, so this is only
/// waited for after an interrupted activation, whose restore may still be at work on a slow disk.
const RUNNING_WAIT_MAX: Duration = Duration::from_secs(120);
/// Between two questions to libvirt.
const POLL: Duration = Duration::from_millis(50);
/// The largest device state read: QEMU's are hundreds of KiB; one of a guest with a large video device a few MiB.
const DEVICE_STATE_BYTES_MAX: u64 = 256 << 20;
/// Reads and writes of the save image.
const BUFFER_BYTES: usize = 1 << 20;
const SAVE_IMAGE: &str = "restore.save";

/// The standby, as activation needs it.
pub trait Standby {
    /// The generation that is stored now.
    fn generation(&self) -> Result<u64, ActivateError>;
    /// Durably raises the generation, so that streams of older ones are refused, and freezes the standby, so that nothing
    /// changes it while a guest runs on it. Nothing happens where that is so already.
    fn fence(&self, to: u64) -> Result<(), ActivateError>;
    /// This recovery point; `None`: the newest, with everything applied that is durable.
    fn recovery_point(&self, point: Option<StoredPoint>) -> Result<RecoveryPoint, ActivateError>;
    /// The directory of the domain.
    fn directory(&self) -> PathBuf;
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Activated {
    /// Name of the guest.
    pub name: String,
    /// What it was activated from; `None`: it runs here, but not from an activation.
    pub point: Option<PointId>,
    /// The generation now.
    pub generation: u64,
    /// From the request to the running guest; `None`: it ran already.
    pub rto: Option<Duration>,
    /// Age of the point at the request.
    pub lost_seconds: f64,
    /// It ran already.
    pub was_active: bool,
    /// It is encrypted at rest: what that cost, within the RTO.
    pub decrypted: Option<Decrypted>,
}

/// One activation of one domain. The caller sees to it that there is one at a time.
pub struct Activation<'a> {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: &'a str,
    /// Its standby.
    pub standby: &'a dyn Standby,
    /// This host.
    pub host: &'a dyn Host,
    /// The configuration.
    pub settings: &'a Settings,
    /// Which recovery point; `None`: the newest.
    pub point: Option<StoredPoint>,
    /// When it was asked for.
    pub requested: Instant,
    /// The same by the wall clock.
    pub requested_unix_ns: u64,
}

impl Activation<'_> {
    /// Brings the guest up, or finds it up. `progress` is told each step when it begins.
    pub fn run(&self, progress: &mut dyn FnMut(&str)) -> Result<Activated, ActivateError> {
        let active = ActiveDirectory::of(&self.standby.directory());
        let record = active.read(self.uuid)?;
        if let Some(guest) = self.settled_guest()? {
            progress("find the guest, which runs already");
            return self.found_active(&active, record, guest);
        }
        if let Some(files) = clear::linked(active.path()).filter(|files| !files.is_dir()) {
            // An overlay that is gone would count as one that was never written.
            let (files, link) = (files.display(), active.path().join(clear::LINK));
            let reasons = format!(
                "{files} is not there, where it lies in the clear: mount what it was on, or, if that is gone for good, remove {}",
                link.display()
            );
            return Err(ActivateError::Refused { name: self.name.to_owned(), reasons });
        }
        let (generation, last_attempt) = match record.map(|r| r.step) {
            None => (None, 0),
            Some(Step::Planned { generation }) => (Some(generation), 0),
            Some(Step::Fenced { generation, attempt, .. }) => (Some(generation), attempt),
            Some(Step::Restoring { generation, attempt, overlays, point }) => {
                self.refuse_written(&active, &overlays, point)?;
                (Some(generation), attempt)
            }
            Some(Step::Running { point, .. }) => return Err(self.has_run(&active, point)),
        };
        let attempt = last_attempt + 1;

        progress("check this host");
        // Kept until the end: an older point is kept as long as somebody has it.
        let preview = self.standby.recovery_point(self.point)?;
        self.refuse(&plan::make(&preview, &active.attempt(attempt), self.settings, self.host)?)?;

        progress("fence the old host");
        let generation = match generation {
            Some(generation) => generation,
            None => plan::next_generation(&self.standby.directory(), self.standby.generation()?),
        };
        if last_attempt == 0 {
            active.write(self.uuid, self.name, &Step::Planned { generation })?;
        }
        self.standby.fence(generation)?;
        // Only now is it certain that no epoch is added any more.
        let point = self.standby.recovery_point(self.point)?;
        let id = point_id(&point);
        active.write(self.uuid, self.name, &Step::Fenced { generation, point: id, attempt: last_attempt })?;
        // From here on the generation is this site's own. Where it cannot be removed, the next one is raised by more than it must be.
        let _ = std::fs::remove_file(self.standby.directory().join(IMPORTED_FILE));

        let mut top = &self.settings.state_directory;
        let mut decrypted = None;
        let above;
        let point = match (point.sealed, &self.settings.clear_directory) {
            (true, Some(clear)) => {
                progress("decrypt the recovery point");
                above = clear::begin(&active, clear, self.uuid)?;
                top = &above;
                let (point, took) = clear::decrypt(&point, &active)?;
                decrypted = took;
                point
            }
            _ => point,
        };
        progress("prepare disks and memory");
        let plan = plan::make(&point, &active.attempt(attempt), self.settings, self.host)?;
        self.refuse(&plan)?;
        let image = active.attempt(attempt).join(SAVE_IMAGE);
        let overlays = make_files(top, &active.attempt(attempt), &point, &plan, &image)?;

        progress("restore the guest");
        let step = Step::Restoring { generation, point: id, attempt, overlays };
        active.write(self.uuid, self.name, &step)?;
        let restored = match plan.memory {
            Memory::Off => self.host.boot(&plan.transformed.restore),
            _ => self.host.restore(&image),
        };
        if let Err(source) = restored {
            return self.restore_failed(&active, step, source);
        }
        let finished = self.finish(&active, generation, id, &plan, attempt, false)?;
        Ok(Activated { decrypted, ..finished })
    }

    /// The point that was activated, or the newest if it is not there any more: only its definition is of interest now.
    fn recorded(&self, active: &ActiveDirectory, point: PointId) -> Result<RecoveryPoint, ActivateError> {
        let id = StoredPoint { generation: point.generation, epoch: point.epoch };
        let stored = self.standby.recovery_point(Some(id)).or_else(|_| self.standby.recovery_point(None))?;
        Ok(if stored.sealed { clear::placed(&stored, &clear::directory(&active.files(), &stored)) } else { stored })
    }

    fn refuse(&self, plan: &Plan) -> Result<(), ActivateError> {
        let reasons: Vec<String> =
            findings::refusals(&plan.findings).map(|f| format!("{}: {}; {}", f.subject, f.fact, f.remedy)).collect();
        if reasons.is_empty() {
            return Ok(());
        }
        Err(ActivateError::Refused { name: self.name.to_owned(), reasons: reasons.join(" | ") })
    }

    fn has_run(&self, active: &ActiveDirectory, point: PointId) -> ActivateError {
        ActivateError::HasRun {
            name: self.name.to_owned(),
            point: format!("{}-{}", point.generation, point.epoch),
            directory: active.path().to_owned(),
        }
    }

    /// A restore of which the end is not known may have brought the guest up: what it wrote must not be lost.
    fn refuse_written(
        &self,
        active: &ActiveDirectory,
        overlays: &[Pristine],
        point: PointId,
    ) -> Result<(), ActivateError> {
        for overlay in overlays {
            if !files::is_pristine(overlay)? {
                return Err(self.has_run(active, point));
            }
        }
        Ok(())
    }

    /// The guest, if it is up or coming up. One that libvirt is just starting is waited for.
    fn settled_guest(&self) -> Result<Option<Guest>, ActivateError> {
        let deadline = Instant::now() + RUNNING_WAIT_MAX;
        loop {
            match self.host.guest(self.uuid)? {
                None => return Ok(None),
                Some(guest) if guest.state.is_active() => return Ok(Some(guest)),
                Some(guest) if guest.persistent => return Ok(None),
                // A transient domain without a process is one that libvirt is about to start.
                Some(guest) if Instant::now() > deadline => return Err(self.not_running(guest.state)),
                Some(_) => thread::sleep(POLL),
            }
        }
    }

    fn not_running(&self, state: DomainState) -> ActivateError {
        ActivateError::NotRunning { name: self.name.to_owned(), state: state.to_string() }
    }

    fn found_active(
        &self,
        active: &ActiveDirectory,
        record: Option<Record>,
        guest: Guest,
    ) -> Result<Activated, ActivateError> {
        let step = record.map(|r| r.step);
        match step {
            // Fenced: the attempt that is recorded as failed was not the only one under way.
            Some(Step::Restoring { generation, point, attempt, .. } | Step::Fenced { generation, point, attempt })
                if (1..=attempt).any(|n| guest_is_on(&guest, &active.attempt(n))) =>
            {
                let attempt = (1..=attempt).find(|n| guest_is_on(&guest, &active.attempt(*n))).unwrap_or(attempt);
                let stored = self.recorded(active, point)?;
                let plan = plan::make(&stored, &active.attempt(attempt), self.settings, self.host)?;
                self.finish(active, generation, point, &plan, attempt, true)
            }
            Some(Step::Running { generation, point, attempt, lost_seconds, .. }) => {
                if !guest.persistent {
                    let stored = self.recorded(active, point)?;
                    let plan = plan::make(&stored, &active.attempt(attempt), self.settings, self.host)?;
                    self.host.define(&plan.transformed.persistent)?;
                }
                Ok(Activated {
                    name: self.name.to_owned(),
                    point: Some(point),
                    generation,
                    rto: None,
                    lost_seconds,
                    was_active: true,
                    decrypted: None,
                })
            }
            // Not from this standby: somebody has a guest of this UUID here. It is left alone.
            None | Some(Step::Planned { .. } | Step::Fenced { .. } | Step::Restoring { .. }) => Ok(Activated {
                name: self.name.to_owned(),
                point: None,
                generation: self.standby.generation()?,
                rto: None,
                lost_seconds: 0.0,
                was_active: true,
                decrypted: None,
            }),
        }
    }

    fn restore_failed(
        &self,
        active: &ActiveDirectory,
        step: Step,
        source: vmdr_hypervisor::Error,
    ) -> Result<Activated, ActivateError> {
        // A lost connection says nothing about the guest; the record stays at Restoring and the next run looks.
        if source.is_connection() {
            return Err(ActivateError::Hypervisor(source));
        }
        // The restore of a predecessor that was killed may have been faster than this one.
        if let Some(guest) = self.settled_guest()? {
            let record = active.read(self.uuid)?;
            return self.found_active(active, record, guest);
        }
        if let Step::Restoring { generation, point, attempt, overlays } = step {
            self.refuse_written(active, &overlays, point)?;
            active.write(self.uuid, self.name, &Step::Fenced { generation, point, attempt })?;
            files::remove_directory(&active.attempt(attempt))?;
        }
        let qemu = self.host.qemu_complaints(self.name).map(|said| format!("; QEMU says: {said}")).unwrap_or_default();
        Err(ActivateError::Restore { name: self.name.to_owned(), said: format!("{source}{qemu}") })
    }

    /// The guest is up on the overlays of `attempt`: sees it running, makes it survive its own shutdown, and tidies up.
    fn finish(
        &self,
        active: &ActiveDirectory,
        generation: u64,
        point: PointId,
        plan: &Plan,
        attempt: u32,
        was_active: bool,
    ) -> Result<Activated, ActivateError> {
        self.wait_running()?;
        let rto = self.requested.elapsed();
        let lost_seconds = age_seconds(point.cut_unix_ns, self.requested_unix_ns);
        // Recorded first: from here on it must never be restored again, whether or not defining it works.
        let running_unix_ns = unix_ns(SystemTime::now());
        let rto_seconds = (!was_active).then_some(rto.as_secs_f64());
        let running = Step::Running { generation, point, attempt, running_unix_ns, rto_seconds, lost_seconds };
        active.write(self.uuid, self.name, &running)?;
        self.host.define(&plan.transformed.persistent)?;
        for other in active.attempts()?.into_iter().filter(|n| *n != attempt) {
            files::remove_directory(&active.attempt(other))?;
        }
        if let Err(error) = clear::keep_only(active, point.generation, point.epoch) {
            tracing::warn!(domain = self.name, %error, "what was decrypted for other points stays");
        }
        let image = active.attempt(attempt).join(SAVE_IMAGE);
        match std::fs::remove_file(&image) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", &image)(e)),
            _ => {}
        }
        let rto = (!was_active).then_some(rto);
        let (name, point, decrypted) = (self.name.to_owned(), Some(point), None);
        Ok(Activated { name, point, generation, rto, lost_seconds, was_active, decrypted })
    }

    /// Waits for the guest to run. One that libvirt left paused (it was killed between loading and starting) is resumed
    /// once; one that is paused for another reason stays so and is reported.
    fn wait_running(&self) -> Result<(), ActivateError> {
        let deadline = Instant::now() + RUNNING_WAIT_MAX;
        let mut resumed = false;
        loop {
            let state = self.host.guest(self.uuid)?.map_or(DomainState::ShutOff, |g| g.state);
            match state {
                DomainState::Running | DomainState::Blocked => return Ok(()),
                // libvirt refuses a resume while it is still loading, so an error here only means: not yet.
                DomainState::Paused if !resumed => {
                    resumed = self.host.resume(self.uuid).is_ok();
                    thread::sleep(POLL);
                }
                DomainState::Paused if Instant::now() < deadline => thread::sleep(POLL),
                other => return Err(self.not_running(other)),
            }
            if Instant::now() > deadline {
                return Err(self.not_running(state));
            }
        }
    }
}

/// Makes everything that QEMU needs to run `point` as it was planned, in `directory`: overlays, UEFI variables, and `image`, the
/// save image. `top` is the state directory, through which QEMU's user is let.
pub(crate) fn make_files(
    top: &Path,
    directory: &Path,
    point: &RecoveryPoint,
    plan: &Plan,
    image: &Path,
) -> Result<Vec<Pristine>, ActivateError> {
    // Made by a predecessor that did not get as far as recording it: nobody has used it.
    files::remove_directory(directory)?;
    durable::create_directory(directory).map_err(io("create", directory))?;
    let mut overlays = Vec::with_capacity(plan.disks.len());
    for (i, (disk, stored)) in plan.disks.iter().zip(&point.disks).enumerate() {
        let overlay = match &point.older {
            None => files::create_overlay(&disk.overlay, &disk.base, stored.size_bytes)?,
            Some(older) => {
                let mut read = |cluster: u64, buffer: &mut [u8]| {
                    let at = cluster * qcow2::CLUSTER_BYTES;
                    older.read(Array::Disk(i as u16), at, buffer).map_err(std::io::Error::other)
                };
                let clusters = content::clusters(point, i)?;
                let bytes = stored.size_bytes;
                files::create_older_overlay(&disk.overlay, &disk.base, bytes, &clusters, &mut read)?
            }
        };
        overlays.push(overlay);
        files::let_pass(top, &disk.overlay)?;
        files::let_pass(top, &disk.base)?;
        files::give_to_read(&disk.base, plan.qemu_owner)?;
    }
    if let Some((index, file)) = &plan.variables {
        let flash = &point.ram[*index];
        files::let_pass(top, file)?;
        let mut image = content::ram(point, *index).map_err(io("read", &flash.path))?;
        files::copy_variables(&mut image, file, flash.used_bytes, plan.qemu_owner)?;
    }
    if let Memory::Mapped(index) = plan.memory {
        let ram = &point.ram[index].path;
        files::let_pass(top, ram)?;
        files::give_to_read(ram, plan.qemu_owner)?;
    }
    if plan.memory != Memory::Off {
        write_save_image(image, point, plan)?;
    }
    durable::sync_directory(directory).map_err(io("sync", directory))?;
    Ok(overlays)
}

/// A guest without disks cannot be told from another of its UUID; that libvirt was asked to restore it is enough then.
fn guest_is_on(guest: &Guest, attempt: &Path) -> bool {
    guest.disk_files.is_empty() || guest.disk_files.iter().any(|f| f.starts_with(attempt))
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ActivateError {
    let path = path.to_owned();
    move |source| FileError::Io { what, path, source }.into()
}

/// The identity of a recovery point.
pub fn point_id(point: &RecoveryPoint) -> PointId {
    PointId { generation: point.generation, epoch: point.epoch, cut_unix_ns: point.cut_unix_ns }
}

/// Nanoseconds since 1970, 0 before.
pub fn unix_ns(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// How old something is; never negative, whatever the clocks of two hosts say.
pub fn age_seconds(then_unix_ns: u64, now_unix_ns: u64) -> f64 {
    Duration::from_nanos(now_unix_ns.saturating_sub(then_unix_ns)).as_secs_f64()
}

fn write_save_image(path: &Path, point: &RecoveryPoint, plan: &Plan) -> Result<(), ActivateError> {
    let device_state = match point.older.as_ref().or(point.checked.as_ref()) {
        None => read_device_state(&point.device_state)?,
        Some(reader) => reader.device_state().to_vec(),
    };
    let mapped = match plan.memory {
        Memory::Mapped(index) => Some(index),
        Memory::Carried { .. } | Memory::Off => None,
    };
    let mut files: Vec<Option<Box<dyn Read>>> = Vec::with_capacity(point.ram.len());
    for (index, block) in point.ram.iter().enumerate() {
        let open = || content::ram(point, index).map_err(io("read", &block.path));
        files.push(if mapped == Some(index) { None } else { Some(open()?) });
    }
    let mut patches = match mapped {
        Some(index) => content::Patches::new(point, index, content::pages(point, index)?),
        None => None,
    };
    let mut patches = patches.as_mut();
    let mut blocks: Vec<Block<'_>> = Vec::with_capacity(point.ram.len());
    for (block, file) in point.ram.iter().zip(&mut files) {
        let sparse = is_guest_memory(&block.name);
        let (name, content) = match (file, patches.take()) {
            (None, None) => (RAM_BACKEND, Content::Mapped),
            (None, Some(pages)) => (RAM_BACKEND, Content::Patched(pages)),
            (Some(file), later) => {
                patches = later;
                (&*block.name, if sparse { Content::CarriedSparse(file) } else { Content::Carried(file) })
            }
        };
        blocks.push(Block { name, used_bytes: block.used_bytes, content });
    }
    let file = File::create(path).map_err(io("create", path))?;
    let mut to = BufWriter::with_capacity(BUFFER_BYTES, file);
    let xml = plan.transformed.restore.to_string();
    save_image::write(&mut to, &xml, &point.machine, &mut blocks, &device_state)?;
    to.flush().map_err(io("write", path))?;
    Ok(())
}

/// Memory of a NUMA node or a memory device: fresh and zero in the restored QEMU, so its zero pages need not be sent.
fn is_guest_memory(name: &str) -> bool {
    let name = name.strip_prefix("/objects/").unwrap_or(name);
    name.starts_with("ram-node") || name.starts_with("memdimm") || name.starts_with("memvirtiomem") || name == "pc.ram"
}

fn read_device_state(path: &Path) -> Result<Vec<u8>, ActivateError> {
    let mut state = Vec::new();
    let file = File::open(path).map_err(io("open", path))?;
    file.take(DEVICE_STATE_BYTES_MAX + 1).read_to_end(&mut state).map_err(io("read", path))?;
    if state.len() as u64 > DEVICE_STATE_BYTES_MAX {
        return Err(save_image::SaveImageError::DeviceState("it is larger than any that QEMU writes").into());
    }
    Ok(state)
}

#[cfg(test)]
mod tests;
