use super::*;

fn limits(text: &str) -> anyhow::Result<Limits> {
    #[derive(serde::Deserialize)]
    struct File {
        limits: Limits,
    }
    let mut limits = toml::from_str::<File>(text)?.limits;
    limits.check()?;
    Ok(limits)
}

#[test]
fn what_is_said_of_a_guest_goes_before_what_is_said_of_all() {
    let limits = limits(
        "[limits]\nbandwidth = \"100MB/s\"\ncuts_at_once = 2\n[limits.guest]\nbandwidth = [\"1MB/s\"]\ncpu_percent = 20\n\
         [limits.domain.db1]\nbandwidth = \"5MB/s\"\nmemory_bytes = 134217728\n",
    )
    .unwrap();
    let now = LocalTime { weekday: 1, minute: 0 };
    let (db1, web1) = (limits.of("db1"), limits.of("web1"));
    assert_eq!((db1.schedule.at(now), db1.cpu_percent, db1.memory_bytes), (Some(5_000_000), Some(20), Some(128 << 20)));
    assert_eq!((web1.schedule.at(now), web1.cpu_percent, web1.memory_bytes), (Some(1_000_000), Some(20), None));
    assert_eq!(limits.schedule.at(now), Some(100_000_000));
}

#[test]
fn an_error_names_the_key() {
    for (text, key) in [
        ("[limits]\nbandwidth = \"fast\"", "limits.bandwidth"),
        ("[limits.guest]\nbandwidth = [\"1MB/s\", \"never 1MB/s\"]", "limits.guest.bandwidth"),
        ("[limits.domain.db1]\nbandwidth = \"8:00 1MB/s\"", "limits.domain.db1.bandwidth"),
        ("[limits]\ncpu_percent = 0", "limits.cpu_percent"),
        ("[limits.domain.db1]\nmemory_bytes = 5", "limits.domain.db1.memory_bytes"),
        ("[limits]\ncuts_at_once = 0", "limits.cuts_at_once"),
        ("[limits.guest]\ncuts_at_once = 1", "cuts_at_once"),
        ("[limits]\nband = 1", "band"),
    ] {
        let error = limits(text).map(|_| ()).expect_err(text);
        let error = format!("{error:#}");
        assert!(error.contains(key), "{text}: {error}");
    }
}

/// Sends as much as it may for ten seconds of a clock of its own; gives bytes per second.
fn send_all(guests: &[&Guest], begun: Instant, seconds: f64) -> Vec<f64> {
    let end = begun + Duration::from_secs_f64(seconds);
    let mut free: Vec<Instant> = guests.iter().map(|_| begun).collect();
    let mut sent: Vec<f64> = guests.iter().map(|_| 0.0).collect();
    while let Some((index, at)) = free.iter().copied().enumerate().min_by_key(|(_, at)| *at)
        && at < end
    {
        let (bytes, wait) = guests[index].reserve(1 << 20, at);
        if at + wait < end {
            guests[index].sent(bytes);
            sent[index] += bytes as f64;
        }
        free[index] = at + wait + Duration::from_micros(1);
    }
    sent.iter().map(|bytes| bytes / seconds).collect()
}

#[test]
fn both_bandwidths_hold_and_guests_share_the_hosts() {
    let text = "[limits]\nbandwidth = \"3MB/s\"\n[limits.domain.slow]\nbandwidth = \"500kB/s\"";
    let host = Host::new(limits(text).unwrap());
    let (slow, one, two) = (host.guest("slow"), host.guest("one"), host.guest("two"));
    let begun = Instant::now();
    let rates = send_all(&[&slow, &one, &two], begun, 10.0);
    let sum: f64 = rates.iter().sum();
    assert!(sum <= 3.0e6 * 1.02 && sum > 3.0e6 * 0.95, "{rates:?}");
    assert!(rates[0] <= 0.5e6 * 1.02 && rates[0] > 0.2e6, "{rates:?}");
    assert!(rates[1] / rates[2] < 1.5 && rates[2] / rates[1] < 1.5, "{rates:?}");
    assert_eq!(one.wire_bytes(), (rates[1] * 10.0).round() as u64);
    // Other limits hold at once, for guests that are there.
    host.set(limits("[limits.guest]\nbandwidth = \"1MB/s\"").unwrap());
    let rates = send_all(&[&slow, &one], begun + Duration::from_secs(20), 10.0);
    assert!(rates.iter().all(|rate| (0.95e6..1.02e6).contains(rate)), "{rates:?}");
    host.set(Limits::default());
    assert_eq!(one.reserve(123_456, begun + Duration::from_secs(60)), (123_456, Duration::ZERO));
}

#[test]
fn a_limit_that_is_felt_is_named() {
    let host = Host::new(limits("[limits]\nbandwidth = \"1MB/s\"\n[limits.guest]\ncpu_percent = 10").unwrap());
    let guest = host.guest("web1");
    assert_eq!(guest.limited_by(), "");
    let now = Instant::now();
    send_all(&[&guest], now.checked_sub(Duration::from_secs(10)).unwrap(), 10.0);
    assert_eq!(guest.limited_by(), "bandwidth of this host (1 MB/s)");
    guest.cpu.charge(1.0, Instant::now());
    assert!(guest.rest() > Duration::from_secs(1));
    assert!(guest.limited_by().ends_with("processor share of this guest (10 % of one)"), "{}", guest.limited_by());
}

#[test]
fn memory_is_given_until_there_is_none() {
    let host = Host::new(limits("[limits]\nmemory_bytes = 402653184").unwrap());
    let (large, small) = (256 << 20, 128 << 20);
    host.admit("web1", large, &[small]).unwrap();
    let error = host.admit("web2", large, &[large, small]).unwrap_err().to_string();
    assert!(
        error.contains("2 protected guests have 384 MiB") && error.contains("domain web2 needs 256 MiB"),
        "{error}"
    );
    assert!(error.contains("limits.memory_bytes allows 384 MiB"), "{error}");
    Host::new(Limits::default()).admit("web2", u64::MAX / 2, &[large]).unwrap();
}
