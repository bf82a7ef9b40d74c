//! Gets a userfaultfd of QEMU's address space: one system call run inside QEMU by ptrace.
//!
//! A userfaultfd can only be made by the process whose memory it watches. One thread of QEMU is made to execute
//! `userfaultfd(2)`, and the descriptor is duplicated here with `pidfd_getfd`. It stays open in QEMU, so that a
//! successor of this process finds it in `/proc/PID/fd` with the dirty log intact.
//!
//! The thread is stopped for about a tenth of a millisecond. The ptrace part runs in a child process of its own
//! with all signals blocked: a tracer that dies half-way would leave wrong registers in QEMU.
#![allow(unsafe_code)]

mod x86_64;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::uffd::{UFFD_LINK, USERFAULTFD_FLAGS, Uffd};

const NO_WP_ASYNC: &str =
    "userfaultfd without asynchronous write protection: Linux 6.7 or later, built with it, is needed";

/// Where a userfaultfd came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Made now: nothing is registered.
    Fresh,
    /// Found in QEMU, left there by a predecessor: what it watched is still watched.
    Adopted,
}

/// A userfaultfd of `pid`: the one a predecessor left there, or a new one, made by `helper inject PID`.
pub fn userfaultfd_of(pid: i32, helper: &Path) -> anyhow::Result<(Uffd, Origin)> {
    match find(pid)? {
        Some((fd, features)) if Uffd::suffices(features) => {
            return Ok((Uffd::adopt(duplicate(pid, fd)?), Origin::Adopted));
        }
        // Made, and its maker died before the handshake.
        Some((fd, 0)) => return Ok((Uffd::handshake(duplicate(pid, fd)?).context(NO_WP_ASYNC)?, Origin::Fresh)),
        Some((_, features)) => bail!(
            "QEMU (pid {pid}) has a userfaultfd of its own (features {features:#x}): a background snapshot or postcopy \
             migration is under way; wait until it is over"
        ),
        None => {}
    }
    let output = Command::new(helper)
        .args(["inject", &pid.to_string()])
        .output()
        .with_context(|| format!("run {} inject", helper.display()))?;
    if !output.status.success() {
        bail!("take a userfaultfd from QEMU (pid {pid}): {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let number = String::from_utf8_lossy(&output.stdout).trim().parse().context("read the injected descriptor")?;
    let uffd = Uffd::handshake(duplicate(pid, number)?)
        .context("userfaultfd without asynchronous write protection: Linux 6.7 or later, built with it, is needed")?;
    Ok((uffd, Origin::Fresh))
}

/// The child's side: makes thread `pid` create a userfaultfd and returns its number there.
pub fn inject(pid: i32) -> anyhow::Result<i32> {
    block_signals()?;
    let number = x86_64::call(pid, libc::SYS_userfaultfd, [USERFAULTFD_FLAGS, 0])
        .with_context(|| format!("trace pid {pid}: is root or CAP_SYS_PTRACE missing, or another tracer attached?"))?;
    if number < 0 {
        let error = io::Error::from_raw_os_error(-number as i32);
        bail!("userfaultfd(2) inside QEMU (pid {pid}): {error}");
    }
    Ok(number as i32)
}

/// Closes vmdr's userfaultfd in `pid` with `helper unwatch PID`, if there is one: with it all that it watched is watched no more,
/// and nothing of vmdr is left in QEMU.
pub fn unwatch(pid: i32, helper: &Path) -> anyhow::Result<()> {
    if ours(pid)?.is_none() {
        return Ok(());
    }
    let output = Command::new(helper)
        .args(["unwatch", &pid.to_string()])
        .output()
        .with_context(|| format!("run {} unwatch", helper.display()))?;
    if !output.status.success() {
        bail!("close the userfaultfd of QEMU (pid {pid}): {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The child's side of [`unwatch`].
pub fn close(pid: i32) -> anyhow::Result<()> {
    block_signals()?;
    let Some(number) = ours(pid)? else { return Ok(()) };
    let result = x86_64::call(pid, libc::SYS_close, [number as u64, 0]).with_context(|| format!("trace pid {pid}"))?;
    if result < 0 {
        bail!("close(2) inside QEMU (pid {pid}): {}", io::Error::from_raw_os_error(-result as i32));
    }
    Ok(())
}

/// The userfaultfd that vmdr has made in `pid`; QEMU's own has other features.
fn ours(pid: i32) -> anyhow::Result<Option<i32>> {
    Ok(find(pid)?.filter(|(_, features)| Uffd::suffices(*features)).map(|(number, _)| number))
}

/// A userfaultfd that is open in `pid`, and its features (0: no handshake was done).
fn find(pid: i32) -> anyhow::Result<Option<(i32, u64)>> {
    let directory = format!("/proc/{pid}/fd");
    for entry in std::fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        let Ok(entry) = entry else { continue };
        if !std::fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == UFFD_LINK) {
            continue;
        }
        let Ok(number) = entry.file_name().to_string_lossy().parse() else { continue };
        let path = format!("/proc/{pid}/fdinfo/{number}");
        let info = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        return Ok(Some((number, features(&info).with_context(|| format!("no features in {path}"))?)));
    }
    Ok(None)
}

/// From a line `API:\taa:8000:7f`: version, features in use, features there are; hexadecimal.
fn features(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()
}

fn duplicate(pid: i32, number: i32) -> anyhow::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).context("pid 0")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).context("open QEMU's pidfd")?;
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).context("duplicate QEMU's userfaultfd")
}

fn block_signals() -> io::Result<()> {
    // SAFETY: an all-ones set is built by sigfillset; blocking signals of this thread touches no memory.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
