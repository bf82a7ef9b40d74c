//! The ioctls for which neither the standard library nor libc has a function: each on an open file, each checked.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `linux/fs.h`: _IO(0x12, 119) and _IO(0x12, 127), each with an offset and a length in bytes.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// `linux/fs.h`: _IOW('f', 2, long), which nevertheless takes an int.
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;

/// The block device need not keep these bytes: what they read as afterwards is undefined.
pub fn discard(device: &File, offset: u64, length: u64) -> io::Result<()> {
    block_range(device, BLKDISCARD, offset, length)
}

/// These bytes of the block device read as zeros afterwards (WRITE_ZEROES where the device has it).
pub fn zero(device: &File, offset: u64, length: u64) -> io::Result<()> {
    block_range(device, BLKZEROOUT, offset, length)
}

fn block_range(device: &File, request: libc::c_ulong, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: both requests read two u64, which `range` is.
    match unsafe { libc::ioctl(device.as_raw_fd(), request, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes all flags (such as "immutable") off a file.
pub fn clear_flags(file: &File) -> io::Result<()> {
    let none: libc::c_int = 0;
    // SAFETY: the request reads one int, which `none` is.
    match unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_SETFLAGS, std::ptr::from_ref(&none)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
