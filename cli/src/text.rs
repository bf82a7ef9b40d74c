//! Numbers and strings as people read them: short, with units, and harmless on a terminal.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Widest line written.
pub const COLUMNS: usize = 120;

/// A string from outside without what could steer a terminal, in one line.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word.chars().map(|c| if c.is_control() { '?' } else { c }));
    }
    line
}

/// At most `columns` characters; the cut is shown.
pub fn shortened(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    text.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}

/// A sentence on lines of at most [`COLUMNS`], each after `first` indented below it.
pub fn wrapped(first: &str, sentence: &str) -> String {
    let indent = " ".repeat(first.chars().count());
    let mut out = first.to_owned();
    let mut column = indent.len();
    for (i, word) in sentence.split_whitespace().enumerate() {
        let width = word.chars().count();
        if i > 0 && column + 1 + width > COLUMNS {
            out.push('\n');
            out.push_str(&indent);
            column = indent.len();
        } else if i > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += width;
    }
    out.push('\n');
    out
}

/// Seconds, in the unit that needs at most four figures.
pub fn seconds(s: f64) -> String {
    if !s.is_finite() || s < 0.0 {
        return "-".to_owned();
    }
    match s {
        s if s < 0.009_95 => format!("{:.1} ms", s * 1e3),
        s if s < 0.999_5 => format!("{:.0} ms", s * 1e3),
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 119.5 => format!("{s:.0} s"),
        s if s < 7_170.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_000.0 => format!("{:.0} h", s / 3_600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// Milliseconds without their unit, for a column that names it.
pub fn milliseconds(s: f64) -> String {
    let ms = s * 1e3;
    if !ms.is_finite() || ms < 0.0 {
        "-".to_owned()
    } else if ms < 9.95 {
        format!("{ms:.1}")
    } else {
        format!("{ms:.0}")
    }
}

/// Bytes in binary units.
pub fn bytes(n: f64) -> String {
    if !n.is_finite() || n < 0.0 {
        return "-".to_owned();
    }
    let mut n = n;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if n < 999.5 {
            break;
        }
        n /= 1024.0;
        unit = next;
    }
    if unit != "B" && n < 9.95 { format!("{n:.1} {unit}") } else { format!("{n:.0} {unit}") }
}

/// A count, shortened from 100,000 on.
pub fn count(n: f64) -> String {
    if !n.is_finite() || n < 0.0 {
        "-".to_owned()
    } else if n < 99_999.5 {
        format!("{n:.0}")
    } else if n < 9_999_500.0 {
        format!("{:.0}k", n / 1e3)
    } else {
        format!("{:.0}M", n / 1e6)
    }
}

/// When, in UTC with nanoseconds; none for 0, which means "not known".
pub fn instant(unix_ns: u64) -> Option<String> {
    (unix_ns > 0).then(|| humantime::format_rfc3339_nanos(UNIX_EPOCH + Duration::from_nanos(unix_ns)).to_string())
}

/// The same for people: `2026-01-31 12:00:00.123`, UTC.
pub fn instant_short(unix_ns: u64) -> String {
    match instant(unix_ns) {
        Some(time) => time.chars().take(23).map(|c| if c == 'T' { ' ' } else { c }).collect(),
        None => "-".to_owned(),
    }
}

/// Seconds since an instant; not below 0, since two hosts' clocks differ.
pub fn age_seconds(unix_ns: u64, now: SystemTime) -> Option<f64> {
    let then = UNIX_EPOCH + Duration::from_nanos(unix_ns);
    (unix_ns > 0).then(|| now.duration_since(then).unwrap_or_default().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        for (s, text) in [
            (0.0, "0.0 ms"),
            (0.0031, "3.1 ms"),
            (0.142, "142 ms"),
            (0.9996, "1.0 s"),
            (5.0, "5.0 s"),
            (75.0, "75 s"),
            (600.0, "10 min"),
            (7_200.0, "2 h"),
            (200_000.0, "2 d"),
            (f64::NAN, "-"),
            (-1.0, "-"),
        ] {
            assert_eq!(seconds(s), text, "{s}");
        }
        for (n, text) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1000.0, "1.0 KiB"),
            (1536.0, "1.5 KiB"),
            (1_048_576.0, "1.0 MiB"),
            (12_345_678.0, "12 MiB"),
            (5e12, "4.5 TiB"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(bytes(n), text, "{n}");
        }
        for (n, text) in [(496.4, "496"), (99_999.0, "99999"), (123_456.0, "123k"), (2e7, "20M")] {
            assert_eq!(count(n), text, "{n}");
        }
        assert_eq!((milliseconds(0.003), milliseconds(0.0124)), ("3.0".into(), "12".into()));
    }

    #[test]
    fn instants() {
        assert_eq!(instant(1_769_860_800_123_456_789).as_deref(), Some("2026-01-31T12:00:00.123456789Z"));
        assert_eq!(instant_short(1_769_860_800_123_456_789), "2026-01-31 12:00:00.123");
        assert_eq!((instant(0), instant_short(0)), (None, "-".to_owned()));
        let now = UNIX_EPOCH + Duration::from_secs(100);
        assert_eq!(age_seconds(99_000_000_000, now), Some(1.0));
        assert_eq!(age_seconds(101_000_000_000, now), Some(0.0));
    }

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(one_line("a\x1b[2J\n\tb\u{9b}c  "), "a?[2J b?c");
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("abcd", 4), "abcd");
    }

    #[test]
    fn wraps_below_the_limit() {
        let text = wrapped("  advice: ", &"word ".repeat(60));
        assert!(text.lines().count() > 2);
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.lines().skip(1).all(|line| line.starts_with("          w")), "{text}");
    }
}
