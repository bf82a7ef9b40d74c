//! A network namespace for one thread.
#![allow(unsafe_code)]

use std::io;

use rustix::thread::UnshareFlags;

/// Gives this thread, and the programs that it starts, a network of its own: nothing but a loopback, which is off. It goes with
/// them.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: the flag concerns the network that this thread sees; it shares memory and descriptors as before.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}
