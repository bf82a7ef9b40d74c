//! Resuming a guest that a shim has left paused.
//!
//! Whether the pause was the shim's is told by its state page; the page stays until the guest runs, so that whoever
//! comes next can try again.

use std::time::Duration;

use crate::monitor::{Address, Monitor};
use crate::qmp::QmpError;
use crate::state_page::StatePage;

/// How long QEMU's monitor may take to greet.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Resumes the guest if the page says that it was left paused, and then clears the page. Whether it had to.
///
/// The shim must be gone, or be the caller without a usable connection: a QMP socket serves one client.
pub fn resume_if_left_paused(page: &StatePage, monitor: &Address) -> Result<bool, QmpError> {
    if !page.paused() {
        return Ok(false);
    }
    end_pause(page, &mut Monitor::connect(monitor, CONNECT_LIMIT)?)?;
    Ok(true)
}

/// The same through a connection that there is.
pub fn end_pause(page: &StatePage, monitor: &mut Monitor) -> Result<(), QmpError> {
    let status = monitor.execute("query-status", None)?;
    // Any other state than "paused" has another cause than our `stop`, which cannot be waiting either: commands are
    // executed in order.
    if status["status"] == "paused" {
        monitor.execute("cont", None)?;
    }
    page.set_paused(false);
    Ok(())
}
