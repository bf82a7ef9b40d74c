//! Mirrors of the guest's disks: begun, mended, and begun anew.

use std::time::{Duration, Instant};

use super::super::attach;
use super::{Active, LOOK, Mode, Phase, Stop};

/// A disk that has had no mirror for this long gets a new one.
const MIRROR_PATIENCE: Duration = Duration::from_secs(2);

impl Active<'_> {
    pub(super) fn start_mirrors(&mut self) -> anyhow::Result<()> {
        for disk in &self.attached.disks {
            attach::mirror(&self.worker.config, &self.attached.domain, &self.worker.uuid, &disk.target)?;
        }
        Ok(())
    }

    /// Mirrors that are not ready: what they bring is copied meanwhile. One that is gone is begun anew.
    pub(super) fn mend_mirrors(&mut self, message: &str) -> Result<(), Stop> {
        let since = *self.mirrors_bad.get_or_insert_with(Instant::now);
        let round = if let Mode::Copy { round, .. } = self.mode { round } else { 0 };
        let seed = matches!(self.worker.shared.status().phase, Phase::Seeding | Phase::Resync);
        self.set_mode(Mode::Copy { round: round.min(1), need_pass: false }, seed);
        if since.elapsed() < MIRROR_PATIENCE {
            return Ok(());
        }
        self.mirrors_bad = None;
        for disk in &self.attached.disks {
            if self.attached.domain.block_job(&disk.target).map_err(anyhow::Error::from)?.is_none() {
                tracing::warn!(
                    domain = self.worker.protection.name,
                    disk = disk.target,
                    "the mirror is gone, a new one begins: {message}"
                );
                self.worker.set_error(format!("disk {}: the mirror had to be begun anew", disk.target));
                self.mirror_gone = true;
            }
        }
        Ok(())
    }

    /// Begins the mirrors anew that are gone. What the guest wrote past them is found by comparing with the recovery point,
    /// so that a disk that has not changed does not cross the wire; without a recovery point, all of it does.
    pub(super) fn begin_mirrors_anew(&mut self) -> Result<(), Stop> {
        if !self.in_flight.is_empty() {
            // Acknowledgements of parts that are given up would be taken for those of their successors.
            self.next_cut = Instant::now() + LOOK;
            return Ok(());
        }
        self.mirror_gone = false;
        let durable = self.worker.shared.status().durable_epoch;
        if durable > 0 {
            self.copy_whole_after(durable)?;
        }
        for disk in &self.attached.disks {
            if self.attached.domain.block_job(&disk.target).map_err(anyhow::Error::from)?.is_none() {
                attach::mirror(&self.worker.config, &self.attached.domain, &self.worker.uuid, &disk.target)?;
            }
        }
        self.next_cut = Instant::now();
        Ok(())
    }
}
