//! Bandwidths, and when they hold: `"08:00-18:00 mon-fri 50MB/s"`.

use std::fmt;

use super::local_time::LocalTime;

/// The least bandwidth: below it the device state of a single epoch (some 260 KB) takes longer than anybody waits.
pub const BYTES_PER_SECOND_MIN: u64 = 100_000;
/// The most entries of a schedule.
const ENTRIES_MAX: usize = 32;
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
const DAY_MINUTES: u16 = 24 * 60;

/// Bandwidths with their times; the first that fits holds, and none: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    bytes_per_second: u64,
    /// Bit 0: Sunday.
    days: u8,
    /// Minutes of the day; until before from: past midnight, into the next day.
    from: u16,
    until: u16,
}

impl Schedule {
    /// Reads the entries; an error says which word is wrong.
    pub fn parse(entries: &[String]) -> Result<Self, String> {
        if entries.len() > ENTRIES_MAX {
            return Err(format!("{} entries are too many: {ENTRIES_MAX} at most", entries.len()));
        }
        Ok(Self { entries: entries.iter().map(|entry| Entry::parse(entry)).collect::<Result<_, _>>()? })
    }

    /// Bytes per second that hold at this time; nothing: no limit.
    pub fn at(&self, time: LocalTime) -> Option<u64> {
        self.entries.iter().find(|entry| entry.holds(time)).map(|entry| entry.bytes_per_second)
    }
}

impl Entry {
    fn parse(text: &str) -> Result<Self, String> {
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let example = "as in \"20MB/s\" or \"mon-fri 08:00-18:00 20MB/s\"";
        let rate = words.pop().ok_or_else(|| format!("an empty entry; it is written {example}"))?;
        let mut entry = Self { bytes_per_second: rate_of(rate)?, days: 0x7f, from: 0, until: DAY_MINUTES };
        let (mut days, mut hours) = (false, false);
        for word in words {
            if word.contains(':') && !hours {
                (entry.from, entry.until) = range_of(word)?;
                hours = true;
            } else if !word.contains(':') && !days {
                entry.days = days_of(word)?;
                days = true;
            } else {
                return Err(format!("{text:?} has {word:?} too much; it is written {example}"));
            }
        }
        Ok(entry)
    }

    fn holds(&self, time: LocalTime) -> bool {
        let day = |number: u8| self.days & (1 << (number % 7)) != 0;
        if self.from < self.until {
            return day(time.weekday) && (self.from..self.until).contains(&time.minute);
        }
        // Over midnight: the day is the one on which it began.
        (day(time.weekday) && time.minute >= self.from) || (day(time.weekday + 6) && time.minute < self.until)
    }
}

fn rate_of(word: &str) -> Result<u64, String> {
    let wrong = || format!("{word:?} is no bandwidth: write it like 20MB/s, 500kB/s, 10MiB/s or 100Mbit/s");
    let at = word.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let (number, unit) = word.split_at(at);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit {
        "B/s" => 1.0,
        "kB/s" => 1e3,
        "MB/s" => 1e6,
        "GB/s" => 1e9,
        "KiB/s" => 1024.0,
        "MiB/s" => 1_048_576.0,
        "GiB/s" => 1_073_741_824.0,
        "kbit/s" => 1e3 / 8.0,
        "Mbit/s" => 1e6 / 8.0,
        "Gbit/s" => 1e9 / 8.0,
        _ => return Err(wrong()),
    };
    let bytes = number * factor;
    if bytes < BYTES_PER_SECOND_MIN as f64 || bytes > 1e12 {
        return Err(format!("{word:?} is out of range: {} to 1000GB/s", Rate(BYTES_PER_SECOND_MIN)));
    }
    Ok(bytes as u64)
}

fn days_of(word: &str) -> Result<u8, String> {
    let number = |name: &str| {
        let found = DAYS.iter().position(|day| *day == name);
        found.ok_or_else(|| format!("{name:?} is no day: mon, tue, wed, thu, fri, sat, sun, or ranges like mon-fri"))
    };
    let mut days = 0;
    for part in word.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut day, last) = (number(first)?, number(last)?);
        loop {
            days |= 1 << day;
            if day == last {
                break;
            }
            day = (day + 1) % DAYS.len();
        }
    }
    Ok(days)
}

fn range_of(word: &str) -> Result<(u16, u16), String> {
    let wrong = || format!("{word:?} is no time of day: write it like 08:00-18:00, to 24:00 at most");
    let minute = |text: &str| {
        let (hours, minutes) = text.split_once(':').filter(|(h, m)| h.len() <= 2 && m.len() == 2)?;
        let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
        let minute = hours * 60 + minutes;
        (minutes < 60 && minute <= DAY_MINUTES).then_some(minute)
    };
    let (from, until) = word.split_once('-').ok_or_else(wrong)?;
    let (from, until) = (minute(from).ok_or_else(wrong)?, minute(until).ok_or_else(wrong)?);
    if from == until || from == DAY_MINUTES {
        return Err(wrong());
    }
    Ok((from, until))
}

/// A bandwidth for people.
pub struct Rate(pub u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes @ ..1_000_000 => write!(f, "{} kB/s", bytes as f64 / 1e3),
            bytes @ ..1_000_000_000 => write!(f, "{} MB/s", (bytes as f64 / 1e5).round() / 10.0),
            bytes => write!(f, "{} GB/s", (bytes as f64 / 1e8).round() / 10.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(entries: &[&str]) -> Result<Schedule, String> {
        Schedule::parse(&entries.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>())
    }

    fn at(weekday: u8, hour: u16, minute: u16) -> LocalTime {
        LocalTime { weekday, minute: hour * 60 + minute }
    }

    #[test]
    fn the_first_that_fits_holds() {
        let schedule = schedule(&["08:00-18:00 mon-fri 50MB/s", "sat,sun 100Mbit/s", "1.5GB/s"]).unwrap();
        assert_eq!(schedule.at(at(1, 8, 0)), Some(50_000_000));
        assert_eq!(schedule.at(at(5, 17, 59)), Some(50_000_000));
        assert_eq!(schedule.at(at(5, 18, 0)), Some(1_500_000_000));
        assert_eq!(schedule.at(at(6, 9, 0)), Some(12_500_000));
        assert_eq!(schedule.at(at(0, 23, 59)), Some(12_500_000));
        assert_eq!(super::Schedule::default().at(at(0, 0, 0)), None);
    }

    #[test]
    fn nights_belong_to_the_day_they_begin_on() {
        let night = schedule(&["fri-sun 22:00-06:00 1MB/s"]).unwrap();
        for (weekday, hour, held) in [
            (5, 21, false),
            (5, 22, true),
            (6, 5, true),
            (6, 6, false),
            (0, 23, true),
            (1, 5, true),
            (1, 22, false),
            (5, 5, false),
        ] {
            assert_eq!(night.at(at(weekday, hour, 0)).is_some(), held, "day {weekday}, {hour}:00");
        }
        let late = schedule(&["20:00-24:00 1MB/s"]).unwrap();
        assert!(late.at(at(3, 23, 59)).is_some() && late.at(at(3, 0, 0)).is_none());
    }

    #[test]
    fn mistakes_are_named() {
        for (entry, word) in [
            ("", "empty"),
            ("50", "\"50\""),
            ("50MB", "\"50MB\""),
            ("1B/s", "out of range"),
            ("9999999GB/s", "out of range"),
            ("mon-foo 1MB/s", "\"foo\""),
            ("25:00-26:00 1MB/s", "25:00-26:00"),
            ("08:00-08:00 1MB/s", "08:00-08:00"),
            ("08:00 1MB/s", "08:00"),
            ("mon tue 1MB/s", "\"tue\""),
            ("1MB/s mon", "\"mon\""),
            ("..MB/s", "..MB/s"),
        ] {
            let error = schedule(&[entry]).unwrap_err();
            assert!(error.contains(word), "{entry:?}: {error}");
        }
        assert!(schedule(&["1MB/s"; 33]).is_err());
        assert_eq!(
            [Rate(100_000), Rate(1_500_000), Rate(2_000_000_000)].map(|r| r.to_string()),
            ["100 kB/s", "1.5 MB/s", "2 GB/s"]
        );
    }
}
