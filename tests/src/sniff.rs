//! What passes a network device: frames counted by who sent them and which way they went, as the kernel sees them (AF_PACKET).
#![allow(unsafe_code)]

use crate::client::Client;
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};

/// How often the thread looks whether it shall end.
const LOOK_MS: i64 = 50;
/// A header is enough.
const FRAME_BYTES: usize = 64;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// All frames, in both directions.
    pub all: u64,
    /// Of the station, received by the device.
    pub of_it_in: u64,
    /// Of the station, sent out through the device.
    pub of_it_out: u64,
}

#[derive(Debug, Default)]
struct Shared {
    ended: AtomicBool,
    all: AtomicU64,
    of_it_in: AtomicU64,
    of_it_out: AtomicU64,
}

/// A device that is listened to until this is dropped.
#[derive(Debug)]
pub struct Sniffer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Listens to a device in the network namespace of a process for frames of the station with this MAC address.
    pub fn start(pid: u32, device: &str, station: [u8; 6]) -> Result<Self> {
        let socket = Client::new(pid).inside(|| open(device).with_context(|| format!("listen to {device}")))?;
        let shared = Arc::new(Shared::default());
        let of = shared.clone();
        let thread = thread::spawn(move || count(&socket, &of, station));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// So far.
    pub fn count(&self) -> Count {
        let Shared { all, of_it_in, of_it_out, .. } = &*self.shared;
        Count { all: all.load(SeqCst), of_it_in: of_it_in.load(SeqCst), of_it_out: of_it_out.load(SeqCst) }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open(device: &str) -> Result<OwnedFd> {
    let name = std::ffi::CString::new(device).context("a name")?;
    // SAFETY: the name ends with NUL.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error()).context("find the device");
    }
    let every = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(every)) };
    if socket < 0 {
        return Err(io::Error::last_os_error()).context("make a packet socket");
    }
    // SAFETY: it was just made and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zero is an address of no family.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every;
    address.sll_ifindex = index as i32;
    let bytes = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the pointer is to an address of that many bytes.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) };
    if bound < 0 {
        return Err(io::Error::last_os_error()).context("bind a packet socket");
    }
    Ok(socket)
}

fn count(socket: &OwnedFd, shared: &Shared, station: [u8; 6]) {
    let rest = Timespec { tv_sec: 0, tv_nsec: LOOK_MS * 1_000_000 };
    while !shared.ended.load(SeqCst) {
        let mut wanted = [PollFd::new(socket, PollFlags::IN)];
        if !matches!(poll(&mut wanted, Some(&rest)), Ok(1..)) {
            continue;
        }
        let mut frame = [0u8; FRAME_BYTES];
        // SAFETY: as above.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut bytes = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the buffer and the address have the lengths that are given.
        let got = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                libc::MSG_TRUNC,
                (&raw mut from).cast(),
                &raw mut bytes,
            )
        };
        if got < 14 {
            continue;
        }
        shared.all.fetch_add(1, SeqCst);
        if frame[6..12] == station {
            let way = if from.sll_pkttype == libc::PACKET_OUTGOING { &shared.of_it_out } else { &shared.of_it_in };
            way.fetch_add(1, SeqCst);
        }
    }
}
