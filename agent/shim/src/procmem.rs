//! Reads memory of another process with `process_vm_readv`: many ranges into one buffer by one system call.
#![allow(unsafe_code)]

use std::io;

/// Ranges read by one call; the kernel takes 1,024 (UIO_MAXIOV). A kernel that does not preempt system calls makes a
/// thread that woke up on this CPU wait for the call's end, and in a cut that may be the vCPU thread that QEMU waits for
/// while it saves the devices: of 1,024 pages in one go, the save became longer by the whole copy.
const RANGES_PER_CALL: usize = 64;

/// A process's memory, by its pid.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: i32,
    remote: Vec<libc::iovec>,
}

// SAFETY: the iovecs name addresses of another process and are never dereferenced here.
unsafe impl Send for ProcessMemory {}

impl ProcessMemory {
    /// Memory of `pid`. The caller must be allowed to trace it.
    pub fn new(pid: i32) -> Self {
        Self { pid, remote: Vec::with_capacity(RANGES_PER_CALL) }
    }

    /// Reads `ranges` (address, bytes) one after another into `into`, which they must fill exactly.
    pub fn read(&mut self, ranges: impl IntoIterator<Item = (u64, u64)>, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        let mut bytes = 0;
        self.remote.clear();
        for (address, length) in ranges {
            if self.remote.len() == RANGES_PER_CALL {
                self.read_gathered(&mut into[at..at + bytes])?;
                at += bytes;
                bytes = 0;
            }
            self.remote.push(libc::iovec { iov_base: address as *mut libc::c_void, iov_len: length as usize });
            bytes += length as usize;
        }
        self.read_gathered(&mut into[at..at + bytes])?;
        if at + bytes != into.len() {
            return Err(io::Error::other(format!("ranges of {} bytes for a buffer of {}", at + bytes, into.len())));
        }
        Ok(())
    }

    fn read_gathered(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut first = 0;
        let mut done = 0;
        while done < into.len() {
            let local = libc::iovec { iov_base: into[done..].as_mut_ptr().cast(), iov_len: into.len() - done };
            let remote = &self.remote[first..];
            // SAFETY: `local` describes the rest of `into`, which is exclusively ours; the remote addresses are
            // checked by the kernel against the other process's mappings.
            let n = unsafe {
                libc::process_vm_readv(self.pid, &local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
            };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut n = n as usize;
            done += n;
            // A short read ends inside some range: go on from there.
            while n > 0 {
                let range = &mut self.remote[first];
                let step = n.min(range.iov_len);
                range.iov_base = (range.iov_base as usize + step) as *mut libc::c_void;
                range.iov_len -= step;
                n -= step;
                if range.iov_len == 0 {
                    first += 1;
                }
            }
        }
        self.remote.clear();
        std::thread::yield_now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_many_ranges_in_order() {
        let source: Vec<u8> = (0..3_000_000_u32).map(|i| (i * 7 + (i >> 8)) as u8).collect();
        let base = source.as_ptr() as u64;
        let ranges: Vec<(u64, u64)> = (0..2500).map(|i| (i * 1000 % 2_900_000, 1 + i % 900)).collect();
        let expected: Vec<u8> =
            ranges.iter().flat_map(|&(o, l)| source[o as usize..(o + l) as usize].iter().copied()).collect();
        let mut into = vec![0; expected.len()];
        let mut memory = ProcessMemory::new(std::process::id() as i32);
        memory.read(ranges.iter().map(|&(o, l)| (base + o, l)), &mut into).unwrap();
        assert!(into == expected);
    }

    #[test]
    fn an_unmapped_address_is_an_error() {
        let mut into = [0; 16];
        let error = ProcessMemory::new(std::process::id() as i32).read([(0x10, 16)], &mut into).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
