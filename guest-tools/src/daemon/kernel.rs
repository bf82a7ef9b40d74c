//! The guest's own clock (adjtimex(2)), and waiting for its port (poll(2)).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Microseconds by which the kernel advances the clock in each tick of a hundredth of a second.
const TICK_US: f64 = 10_000.0;
/// Units of `timex.freq` in one part per million.
const FREQUENCY_PER_PPM: f64 = 65_536.0;
/// A tick of one microsecond more is this much more (parts per million).
const PPM_PER_TICK_US: f64 = 100.0;

/// The clock, in ns since 1970; 0 before that.
pub fn now_unix_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Runs the clock this much faster than by itself: 0.04 is 4 %. The kernel takes -0.1 to 0.1.
pub fn set_rate(rate: f64) -> io::Result<()> {
    let ticks_us = (rate * TICK_US).round();
    let rest_ppm = rate * 1e6 - ticks_us * PPM_PER_TICK_US;
    let mut request = zeroed();
    request.modes = libc::ADJ_TICK | libc::ADJ_FREQUENCY;
    request.tick = (TICK_US + ticks_us) as libc::c_long;
    request.freq = (rest_ppm * FREQUENCY_PER_PPM) as libc::c_long;
    adjust(&mut request)
}

/// Steps the clock.
pub fn step(offset_ns: i64) -> io::Result<()> {
    let mut request = zeroed();
    request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    request.time.tv_sec = offset_ns.div_euclid(1_000_000_000);
    // With ADJ_NANO this field is in nanoseconds, 0 to 999,999,999.
    request.time.tv_usec = offset_ns.rem_euclid(1_000_000_000);
    adjust(&mut request)
}

fn zeroed() -> libc::timex {
    // SAFETY: a C struct of numbers, for which all zeros is a value.
    unsafe { std::mem::zeroed() }
}

fn adjust(request: &mut libc::timex) -> io::Result<()> {
    // SAFETY: a valid, exclusively borrowed struct; the call only reads and writes it.
    let state = unsafe { libc::adjtimex(request) };
    if state < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a wait has found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ready {
    /// Nobody is at the other end.
    pub hung_up: bool,
    /// The other one has something to read, or has ended.
    pub also: bool,
}

/// Waits until there is something to read from one of them.
pub fn wait_readable(file: &File, also: Option<BorrowedFd<'_>>, wait: Duration) -> Ready {
    // Rounded up: a wait of half a millisecond is no busy loop.
    let ms = wait.as_millis().saturating_add(1).min(60_000) as libc::c_int;
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // A negative descriptor is passed over.
    let mut entries = [entry(file.as_raw_fd()), entry(also.map_or(-1, |also| also.as_raw_fd()))];
    // SAFETY: two valid, exclusively borrowed entries. A failure is as good as nothing to read.
    let _ = unsafe { libc::poll(entries.as_mut_ptr(), 2, ms) };
    Ready { hung_up: entries[0].revents & libc::POLLHUP != 0, also: entries[1].revents != 0 }
}
