//! What the kernel says of the process at the other end of a unix socket, and of groups by name.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Not in libc's own list for all targets; from asm-generic/socket.h.
const SO_PEERGROUPS: libc::c_int = 59;
/// The most supplementary groups that a process can have (NGROUPS_MAX).
const GROUPS_MAX: usize = 65_536;
/// The longest entry of the group database that is read.
const ENTRY_BYTES_MAX: usize = 1 << 20;

/// Supplementary groups of the process that connected, as they were then.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = (groups.len() * size_of::<libc::gid_t>()) as libc::socklen_t;
        // SAFETY: the option writes at most `bytes` bytes of group ids, for which `groups` has room, and how many into `bytes`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= GROUPS_MAX {
            return Err(error);
        }
        groups.resize(count.clamp(groups.len() * 2, GROUPS_MAX), 0);
    }
}

/// The number of a group, if there is one of this name.
pub fn group_by_name(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut buffer: Vec<libc::c_char> = vec![0; 4096];
    loop {
        let mut entry = std::mem::MaybeUninit::<libc::group>::uninit();
        let mut found: *mut libc::group = std::ptr::null_mut();
        // SAFETY: all pointers are valid for the call, and `buffer` has the length given. `found` is null or points to `entry`.
        let result = unsafe {
            libc::getgrnam_r(name.as_ptr(), entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut found)
        };
        match result {
            0 if found.is_null() => return Ok(None),
            // SAFETY: it is not null, so `entry` was filled; the number is a plain field.
            0 => return Ok(Some(unsafe { (*found).gr_gid })),
            libc::ERANGE if buffer.len() < ENTRY_BYTES_MAX => buffer.resize(buffer.len() * 2, 0),
            other => return Err(io::Error::from_raw_os_error(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn own_groups_and_roots() {
        let (a, _b) = UnixStream::pair().unwrap();
        peer_groups(a.as_fd()).unwrap();
        assert_eq!(group_by_name("root").unwrap(), Some(0));
        assert_eq!(group_by_name("no-such-group-anywhere").unwrap(), None);
        assert!(group_by_name("a\0b").is_err());
    }
}
