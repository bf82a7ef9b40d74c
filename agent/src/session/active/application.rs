//! Application-consistent points of a session: asked for, or due by its schedule.

use std::time::{Duration, Instant};

use vmdr_proto::shim::Part;

use super::{Active, Mode, Phase};
use crate::quiesce::stage::{Asker, Made};
use crate::quiesce::{self, Frozen, Limits};
use crate::session::Input;
use vmdr_daemon::guest_channel::GuestChannel;

/// What there is to tell of them.
#[derive(Clone, Debug, Default)]
pub struct Application {
    /// The wall clock at the newest one's cut; 0: none was made.
    pub cut_unix_ns: u64,
    /// For how long the guest was frozen for it.
    pub frozen: Duration,
    /// Why there was none the last time; empty: there was.
    pub error: String,
}

impl Active<'_> {
    /// Somebody wants one.
    pub(super) fn ask_application(&mut self, asker: Asker) {
        // Not what is shown: that acknowledgements are late is no reason to make none.
        let phase = self.worker.shared.status().phase;
        let refused = if phase != Phase::Protected || self.mode != Mode::Cuts || self.hold.is_some() {
            Some(format!("the domain is {}, not protected", phase.name()))
        } else if !self.application.is_idle() {
            Some("another application-consistent point is being made".to_owned())
        } else {
            None
        };
        match refused {
            Some(why) => {
                let _ = asker.send(Err(why));
            }
            None => self.begin_application(Some(asker)),
        }
    }

    fn begin_application(&mut self, asker: Option<Asker>) {
        self.application.begin(asker);
        let tools = self.worker.shared.tools().as_ref().map(GuestChannel::freezer);
        let tools = tools.unwrap_or(Err("the domain has no channel to them")).map_err(str::to_owned);
        let (worker, inputs) = (&self.worker, self.worker.inputs.clone());
        let (name, uri, limits) = (&worker.protection.name, &worker.config.libvirt_uri, Limits::of(&worker.config));
        // A session that has ended drops what it is told, which thaws the guest.
        let tell = move |result| drop(inputs.send(Input::Frozen(result)));
        if let Err(error) = quiesce::begin(name, worker.uuid, uri, limits, tools, tell) {
            self.fail_application(&format!("start a thread: {error}"));
        }
    }

    /// What came of the freeze.
    pub(super) fn froze(&mut self, result: Result<Frozen, String>) {
        match result {
            Ok(frozen) => {
                let until = frozen.until;
                if let Err(late) = self.application.froze(frozen, until) {
                    drop(late);
                    return;
                }
                // Not later than need be: the guest waits.
                self.next_cut = Instant::now();
            }
            Err(why) => self.fail_application(&why),
        }
    }

    /// Looks whether one is due, or waits for its cut in vain.
    pub(super) fn look_at_application(&mut self) {
        if let Some(frozen) = self.application.take(Some(Instant::now())) {
            // Nobody waits for the answer: it is no use any more.
            drop(frozen);
            self.fail_application("no cut could be made while the guest's file systems were frozen");
        }
        let Some(due) = self.worker.application_due else { return };
        let ready = self.worker.shared.status().phase == Phase::Protected && self.mode == Mode::Cuts;
        if Instant::now() >= due && ready && self.hold.is_none() && self.application.is_idle() {
            self.worker.application_due = self.worker.application_every().map(|every| Instant::now() + every);
            self.begin_application(None);
        }
    }

    /// A recovery point has been cut and the guest runs: if it was at rest, that ends now. Returns before the part is shipped,
    /// because it says whether the guest was at rest until after the cut.
    pub(super) fn thaw_after_cut(&mut self, part: &Part) {
        let Some(frozen) = self.application.take(None) else { return };
        let (file_systems, note, way) = (frozen.file_systems, frozen.note.clone(), frozen.way);
        match frozen.thaw() {
            Ok(thawed) if thawed.held => {
                let made = Made {
                    generation: part.generation,
                    epoch: part.epoch,
                    cut_unix_ns: part.cut_unix_ns,
                    frozen: thawed.frozen,
                    file_systems,
                    note,
                    way,
                };
                tracing::info!(
                    domain = self.worker.protection.name,
                    epoch = part.epoch,
                    file_systems,
                    frozen = ?thawed.frozen,
                    "the cut is application-consistent ({way})"
                );
                self.application.mark(made);
            }
            Ok(thawed) => {
                let why = if thawed.text.is_empty() { String::new() } else { format!(": {}", thawed.text) };
                self.fail_application(&format!("the guest's file systems were not frozen until after the cut{why}"));
            }
            Err(why) => {
                self.fail_application(&format!("it is not known whether the cut was of a guest at rest: {why}"))
            }
        }
    }

    /// All up to this epoch is durable.
    pub(super) fn application_durable(&mut self, epoch: u64) {
        if let Some(made) = self.application.durable(epoch) {
            let (cut_unix_ns, frozen) = (made.cut_unix_ns, made.frozen);
            self.worker.shared.status().application = Application { cut_unix_ns, frozen, error: String::new() };
        }
    }

    pub(super) fn fail_application(&mut self, why: &str) {
        if self.application.is_idle() {
            return;
        }
        tracing::warn!(domain = self.worker.protection.name, "no application-consistent point: {why}");
        self.worker.shared.status().application.error = why.to_owned();
        self.application.fail(&format!("no application-consistent point was made: {why}"));
    }
}
