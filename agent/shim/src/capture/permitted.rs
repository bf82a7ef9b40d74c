//! What the capture does about a guest that may not run, or may again. Called between two requests, by the thread that looks
//! at the clock ([`crate::deadline`]).

use std::time::Duration;

use super::{Capture, CaptureError};
use crate::permission::Permission;
use crate::rescue;

impl Capture {
    /// Whether the guest may run now.
    pub(super) fn may_run(&self) -> bool {
        self.permission.as_deref().is_none_or(Permission::allows)
    }

    /// Whether it stands still because it might not.
    pub(super) fn is_stopped(&self) -> bool {
        self.permission.as_deref().is_some_and(Permission::stopped)
    }

    /// The guest is paused and is to go on, but may not: it does when it may.
    pub(super) fn stay_stopped(&mut self) {
        tracing::warn!(domain = self.config.domain_name, "the guest may not run: it stays paused");
        if let Some(permission) = &self.permission {
            permission.set_stopped(true);
        }
        self.page.set_paused(false);
    }

    /// The guest was resumed. Time has passed since it was known that it may run.
    pub(super) fn look_after_cont(&mut self) -> Result<(), CaptureError> {
        let Some(permission) = self.permission.clone() else { return Ok(()) };
        rescue::look_after_cont(&permission, &mut self.qmp)?;
        self.page.set_standing(permission.stopped());
        Ok(())
    }

    /// The guest may not run: stops it if it does, and makes sure that it stands still.
    pub fn stand_still(&mut self, limit: Duration) -> Result<(), CaptureError> {
        let Some(permission) = self.permission.clone().filter(|_| !self.ending.gone) else { return Ok(()) };
        let events = self.qmp.events()?;
        self.note(events);
        rescue::stop(&permission, &mut self.qmp, limit)?;
        self.page.set_standing(true);
        Ok(())
    }

    /// The guest may run again, and goes on if it was stopped for that alone.
    pub fn go_on(&mut self) -> Result<(), CaptureError> {
        if self.ending.gone || self.fenced || self.held || !self.is_stopped() || !self.may_run() {
            return Ok(());
        }
        let Some(permission) = self.permission.clone() else { return Ok(()) };
        self.page.set_standing(false);
        let goes_on = rescue::go_on(&permission, &mut self.qmp)?;
        self.page.set_standing(permission.stopped());
        if goes_on {
            tracing::warn!(domain = self.config.domain_name, "the guest may run again, and goes on");
        }
        Ok(())
    }
}
