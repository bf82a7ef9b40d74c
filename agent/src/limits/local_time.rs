//! What the clock on the wall shows: schedules are an operator's, in the host's time zone.
#![allow(unsafe_code)]

use std::time::{SystemTime, UNIX_EPOCH};

/// Weekday and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// 0: Sunday.
    pub weekday: u8,
    /// Minutes since midnight.
    pub minute: u16,
}

impl LocalTime {
    /// Now, in the time zone of this process.
    pub fn now() -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self::of(seconds as libc::time_t)
    }

    fn of(seconds: libc::time_t) -> Self {
        // SAFETY: a C struct of numbers and a pointer that may be null: all zeros is a value.
        let mut broken: libc::tm = unsafe { std::mem::zeroed() };
        // SAFETY: two valid references, the second exclusive. A failure (a year beyond counting) leaves zeros.
        let _ = unsafe { libc::localtime_r(&seconds, &mut broken) };
        Self { weekday: (broken.tm_wday % 7) as u8, minute: (broken.tm_hour * 60 + broken.tm_min) as u16 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_has_its_minutes() {
        let now = LocalTime::now();
        assert!(now.weekday < 7 && now.minute < 24 * 60);
        // Whatever the time zone: twelve hours later it is the other half of the day (all but twice a year).
        let (one, other) = (LocalTime::of(1_700_000_000), LocalTime::of(1_700_000_000 + 12 * 3600));
        assert_eq!((one.minute + 12 * 60) % (24 * 60), other.minute);
        assert_eq!(LocalTime::of(1_700_000_000 + 7 * 86_400), one);
    }
}
