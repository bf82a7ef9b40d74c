//! What the freezing process asks of the kernel: freezing, signals, user ids.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::systems::Kernel;

/// `linux/fs.h`: _IOWR('X', 119, int) and _IOWR('X', 120, int); the argument is not looked at.
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// The kernel itself.
pub struct Linux;

impl Kernel for Linux {
    type Handle = File;

    fn freeze(&self, handle: &File) -> io::Result<()> {
        request(handle, FIFREEZE)
    }

    fn thaw(&self, handle: &File) -> io::Result<()> {
        request(handle, FITHAW)
    }
}

fn request(file: &File, request: libc::c_ulong) -> io::Result<()> {
    // SAFETY: neither request reads or writes memory of this process.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes out what waits to be written to the file system of `file`.
pub fn sync(file: &File) -> io::Result<()> {
    // SAFETY: an open descriptor.
    match unsafe { libc::syncfs(file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Kills a process with all of its group.
pub fn kill_group(pid: u32) {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return };
    // SAFETY: a call without memory; a group that is gone is an error that does not matter.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
}

/// The effective user.
pub fn own_uid() -> u32 {
    // SAFETY: a call without arguments that cannot fail.
    unsafe { libc::geteuid() }
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// From here on this process is not ended by what a service manager or a terminal sends: it ends by itself, soon, and must
/// not before. (Caught and not ignored, which hooks would inherit.)
pub fn outlive_signals() {
    let handler = nothing as extern "C" fn(libc::c_int);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: the handler does nothing, so that it may run at any time.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}
