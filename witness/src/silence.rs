//! Since when nothing was heard of a protected host.

use std::time::Duration;

use crate::Time;

/// How long nothing came in on the newest stream of a domain. Streams are numbered as they are opened, and a newer one ends
/// those before it: what still comes in on an older one says nothing.
#[derive(Clone, Debug)]
pub struct Silence {
    bound: Duration,
    heard: Time,
    stream: u64,
}

impl Silence {
    /// `bound`: what is longer is too long. It counts from `now`.
    pub fn new(bound: Duration, now: Time) -> Self {
        Self { bound, heard: now, stream: 0 }
    }

    /// A stream was opened, which ends those before it. Whether it is the newest.
    pub fn opened(&mut self, stream: u64, now: Time) -> bool {
        self.stream = self.stream.max(stream);
        self.heard(stream, now)
    }

    /// Something came in on a stream. Whether that counts.
    pub fn heard(&mut self, stream: u64, now: Time) -> bool {
        let counts = self.is_newest(stream);
        if counts {
            self.wait_from(now);
        }
        counts
    }

    /// Whether none was opened after it.
    pub fn is_newest(&self, stream: u64) -> bool {
        stream == self.stream
    }

    /// It was not waited for until now: silence counts from here.
    pub fn wait_from(&mut self, now: Time) {
        self.heard = self.heard.max(now);
    }

    /// How long nothing was heard.
    pub fn lasts(&self, now: Time) -> Duration {
        now.saturating_sub(self.heard)
    }

    /// Whether that is too long.
    pub fn is_too_long(&self, now: Time) -> bool {
        self.lasts(now) > self.bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_stream_says_does_not_count() {
        const S: fn(u64) -> Time = Time::from_secs;
        let mut silence = Silence::new(S(5), S(100));
        assert!(silence.opened(1, S(100)) && !silence.is_too_long(S(105)) && silence.is_too_long(S(106)));
        assert!(silence.heard(1, S(107)) && !silence.is_too_long(S(110)));
        assert!(silence.opened(3, S(111)));
        assert!(!silence.heard(1, S(120)) && silence.is_too_long(S(120)));
        // Opened before the newest, said after it.
        assert!(!silence.opened(2, S(121)) && silence.is_too_long(S(121)));
        silence.wait_from(S(122));
        assert!(!silence.is_too_long(S(122)) && silence.lasts(S(125)) == S(3));
    }
}
