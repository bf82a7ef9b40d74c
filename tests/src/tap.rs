//! An Ethernet device whose other end is a file.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::ioctl::{Opcode, Setter, ioctl};
use std::fs::File;

/// `TUNSETIFF` of linux/if_tun.h.
const SET_INTERFACE: Opcode = 0x4004_54ca;
/// `IFF_TAP | IFF_NO_PI`: whole Ethernet frames and nothing before them.
const FRAMES_ONLY: u16 = 0x0002 | 0x1000;
/// `IFNAMSIZ`, the ending NUL included.
const NAME_BYTES: usize = 16;

/// `struct ifreq` as far as the request reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

/// Makes the device in the network namespace of this thread. Reading and writing do not block; it goes with the file.
pub fn open(name: &str) -> Result<File> {
    ensure!(name.len() < NAME_BYTES, "{name:?} is too long for a network device");
    let mut request = Request { name: [0; NAME_BYTES], flags: FRAMES_ONLY, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("open /dev/net/tun")?;
    // SAFETY: this request reads (and writes) a `struct ifreq`, for which `Request` has the layout and size.
    unsafe { ioctl(&file, Setter::<SET_INTERFACE, Request>::new(request)) }
        .with_context(|| format!("make the tap device {name}"))?;
    fcntl_setfl(&file, OFlags::NONBLOCK).context("make the tap device non-blocking")?;
    Ok(file)
}
