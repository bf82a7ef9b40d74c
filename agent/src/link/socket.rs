//! The TCP connection below the stream, with little of it waiting in this host's kernel.
//!
//! What lies in the kernel's send queue cannot be overtaken. Without a limit that is megabytes, for which a slow link takes
//! longer than a ping may: the connection would be given up although it works.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use tokio::net::TcpStream;

/// Bytes handed to the kernel and not sent yet. A quarter of a second at 1 MB/s; a fast link is refilled in time all the same,
/// since what is sent and not acknowledged does not count.
const UNSENT_BYTES_MAX: libc::c_int = 256 << 10;

/// Connects to `host:port`.
pub async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    limit_unsent(std::os::fd::AsFd::as_fd(&stream))?;
    Ok(stream)
}

fn limit_unsent(socket: BorrowedFd<'_>) -> io::Result<()> {
    let limit = UNSENT_BYTES_MAX;
    let bytes = &raw const limit;
    // SAFETY: the option takes an int, which `bytes` points to for the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            bytes.cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
