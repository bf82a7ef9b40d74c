//! The guest's own clock (adjtimex(2)), and waiting for its port (poll(2)).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
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

/// Waits until there is something to read; whether nobody is at the other end.
pub fn wait_readable(file: &File, wait: Duration) -> bool {
    // Rounded up: a wait of half a millisecond is no busy loop.
    let ms = wait.as_millis().saturating_add(1).min(60_000) as libc::c_int;
    let mut entry = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid, exclusively borrowed entry. A failure is as good as nothing to read.
    let _ = unsafe { libc::poll(&mut entry, 1, ms) };
    entry.revents & libc::POLLHUP != 0
}
