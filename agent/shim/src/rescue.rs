//! Resuming a guest that a shim has left paused, and stopping one that may not run.
//!
//! Whether the pause was the shim's is told by its state page; the page stays until the guest runs, so that whoever
//! comes next can try again. A guest that may not run now ([`Permission`]) is not resumed: that is noted where the permission
//! is, and whoever finds it with the permission given again lets it go on.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::monitor::{Address, Monitor};
use crate::permission::Permission;
use crate::qmp::QmpError;
use crate::state_page::StatePage;

/// How long QEMU's monitor may take to greet.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Resumes the guest if the page says that it was left paused, and then clears the page. Whether it had to.
///
/// The shim must be gone, or be the caller without a usable connection: a QMP socket serves one client.
pub fn resume_if_left_paused(
    page: &StatePage,
    permission: Option<&Permission>,
    monitor: &Address,
) -> Result<bool, QmpError> {
    if !page.paused() {
        return Ok(false);
    }
    if let Some(permission) = permission
        && !permission.allows()
    {
        permission.set_stopped(true);
        page.set_paused(false);
        return Ok(false);
    }
    end_pause(page, permission, &mut Monitor::connect(monitor, CONNECT_LIMIT)?)?;
    Ok(true)
}

/// The same through a connection that there is.
pub fn end_pause(page: &StatePage, permission: Option<&Permission>, monitor: &mut Monitor) -> Result<(), QmpError> {
    let status = monitor.execute("query-status", None)?;
    // Any other state than "paused" has another cause than our `stop`, which cannot be waiting either: commands are
    // executed in order.
    if status["status"] == "paused" {
        match permission {
            None => drop(monitor.execute("cont", None)?),
            Some(permission) => {
                permission.set_stopped(true);
                page.set_standing(false);
                go_on(permission, monitor)?;
                page.set_standing(permission.stopped());
            }
        }
    }
    page.set_paused(false);
    Ok(())
}

/// Whether a guest in this state executes anything, or can begin to by itself.
fn executes(status: &Value) -> bool {
    // A sleeping guest wakes up by itself.
    matches!(status["status"].as_str(), Some("running" | "suspended") | None)
}

/// Stops the guest, which may not run, and makes sure that it stands still.
pub fn stop(permission: &Permission, monitor: &mut Monitor, limit: Duration) -> Result<(), QmpError> {
    let until = Instant::now() + limit;
    let left = || until.saturating_duration_since(Instant::now());
    let [status] = monitor.send([("query-status", None)])?;
    if !executes(&monitor.wait(status, left())?) {
        return Ok(());
    }
    // Before, so that whoever comes next knows why it stands still.
    permission.set_stopped(true);
    let [stop, status] = monitor.send([("stop", None), ("query-status", None)])?;
    monitor.wait(stop, left())?;
    let status = monitor.wait(status, left())?;
    if executes(&status) {
        let message = format!("the guest is {} after it", status["status"]);
        return Err(QmpError::Command { command: "stop".to_owned(), message });
    }
    Ok(())
}

/// Lets a guest go on that was stopped because it might not run, if it may. Whether it was let.
pub fn go_on(permission: &Permission, monitor: &mut Monitor) -> Result<bool, QmpError> {
    let status = monitor.execute("query-status", None)?;
    if status["status"] != "paused" {
        // Somebody has resumed it, or something else keeps it from running.
        permission.set_stopped(false);
        return Ok(false);
    }
    if !permission.allows() {
        return Ok(false);
    }
    monitor.execute("cont", None)?;
    look_after_cont(permission, monitor)?;
    Ok(!permission.stopped())
}

/// The guest was resumed. Between the look at the permission and that time has passed: if too much, it is stopped again.
pub fn look_after_cont(permission: &Permission, monitor: &mut Monitor) -> Result<(), QmpError> {
    if permission.allows() {
        permission.set_stopped(false);
        return Ok(());
    }
    permission.set_stopped(true);
    monitor.execute("stop", None).map(drop)
}
