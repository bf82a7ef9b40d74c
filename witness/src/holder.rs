//! The protected side: may the guest run here, and until when?
//!
//! The guest may run while its lease at the witness lasts, or while the backup site has stood down ("disarmed"): a site that
//! has durably said so takes nothing before this host has armed it again. So an outage of the witness stops no guest whose
//! backup can be reached, and a cut link stops none whose witness can be reached. Whoever reaches neither cannot know, and
//! stops when its lease runs out.
//!
//! **Order.** What [`Holder::may`] says has to be in force, with whoever stops the guest, before anything that
//! [`Holder::tick`] asks for is sent: permission is narrowed before the backup is armed.

use crate::{Over, Terms, Time};

/// Whether the guest may run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// No.
    Never,
    /// Up to this moment, by this host's clock: then it has to be told to stop.
    Until(Time),
    /// As long as nothing else is said.
    Always,
}

impl May {
    /// Whether it may at this moment.
    pub fn at(self, now: Time) -> bool {
        match self {
            Self::Never => false,
            Self::Until(end) => now < end,
            Self::Always => true,
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Renew the lease, or claim one where there is none. The answer goes to [`Holder::renewed`], [`Holder::lost`],
    /// [`Holder::outdated`] or [`Holder::unanswered`].
    Renew {
        /// Of this request. There is one at a time.
        number: u64,
        /// What it goes by.
        over: Over,
    },
    /// Tell the backup, on the newest stream, that the lease is held here again.
    Arm {
        /// Of this request.
        number: u64,
    },
    /// Ask the backup, on the newest stream, to stand down.
    Disarm {
        /// Of this request.
        number: u64,
    },
}

/// What this host knows of the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backup {
    /// It has to be reckoned with.
    MayBeArmed,
    /// It has said that it is, and takes the guest when the lease has ended.
    Armed,
    /// It has stood down, durably, and has not been armed since.
    Disarmed,
}

/// A check that is left out, so that the simulation shows what it is for.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Without {
    /// The lease counts from when its renewal was answered, not sent.
    SentAt,
    /// Nothing is taken off for clocks and for the time that stopping takes.
    Margin,
    /// Permission stays without bound when the backup is armed.
    Narrowing,
    /// Any answer to any request to stand down counts.
    Number,
    /// What is said in the beginning of a stream counts although a newer one is being opened.
    Opening,
    /// A host that was started anew takes a lease for permission before it has asked the backup who owns the guest.
    Confirmed,
}

/// A renewal that was not answered.
#[derive(Clone, Debug)]
struct Renewal {
    number: u64,
    sent: Time,
    over: Over,
}

/// The protected side of one domain.
#[derive(Clone, Debug)]
pub struct Holder {
    terms: Terms,
    automatic: bool,
    lease: Option<Time>,
    backup: Backup,
    /// The backup has been asked who owns the guest since the host was started.
    confirmed: bool,
    /// The newest stream that was begun to be opened.
    newest: u64,
    /// It, once the backup has answered.
    stream: Option<u64>,
    number: u64,
    /// The last request on this stream, if it has not been answered: one to stand down, one that arms.
    disarming: Option<u64>,
    arming: Option<u64>,
    renewal: Option<Renewal>,
    renew_at: Time,
    ask_at: Time,
    /// Another site owns the guest, in this generation.
    fenced: Option<u64>,
    /// The witness names another owner, and the backup has stood down all the same.
    contradiction: Option<u64>,
    #[cfg(test)]
    pub(crate) without: Option<Without>,
}

impl Holder {
    /// `may`: what was in force before, where whoever stops the guest has kept it through a restart of this process; `Never`
    /// after a start of the host. `confirmed`: since the host was started, the backup has been asked who owns the guest.
    pub fn new(terms: Terms, may: May, confirmed: bool) -> Self {
        Self {
            terms,
            automatic: true,
            lease: match may {
                May::Until(end) => Some(end),
                May::Never | May::Always => None,
            },
            backup: if may == May::Always { Backup::Disarmed } else { Backup::MayBeArmed },
            confirmed,
            newest: 0,
            stream: None,
            number: 0,
            disarming: None,
            arming: None,
            renewal: None,
            renew_at: Time::ZERO,
            ask_at: Time::ZERO,
            fenced: None,
            contradiction: None,
            #[cfg(test)]
            without: None,
        }
    }

    /// Whether the guest may run here.
    pub fn may(&self) -> May {
        match (self.backup, self.lease) {
            _ if self.fenced.is_some() || !self.is_confirmed() => May::Never,
            (Backup::Disarmed, _) => May::Always,
            (Backup::MayBeArmed | Backup::Armed, Some(end)) => May::Until(end),
            (Backup::MayBeArmed | Backup::Armed, None) => May::Never,
        }
    }

    /// What is known of the backup.
    pub fn backup(&self) -> Backup {
        self.backup
    }

    /// The generation in which another site owns the guest.
    pub fn fenced(&self) -> Option<u64> {
        self.fenced
    }

    /// The generation in which the witness has another owner although the backup has stood down: nothing takes over by
    /// itself before the operator has looked.
    pub fn contradiction(&self) -> Option<u64> {
        self.contradiction
    }

    /// Whether the backup is to take the guest by itself. It is not the end of it when that is not wished any more, or the
    /// protection is to end: the backup has to have stood down before ([`Holder::backup`]).
    pub fn set_automatic(&mut self, automatic: bool) {
        self.automatic = automatic;
    }

    /// What is to be done now; to be asked several times in each [`Terms::renew_every`].
    pub fn tick(&mut self, now: Time) -> Vec<Act> {
        let mut acts = Vec::new();
        if self.fenced.is_some() {
            return acts;
        }
        let answered = self.renewal.as_ref().is_none_or(|one| now >= one.sent + self.terms.answer_limit());
        if now >= self.renew_at && answered && (self.automatic || self.backup != Backup::Disarmed) {
            self.renew_at = now + self.terms.renew_every();
            // Where the backup has stood down nobody else can run the guest, whatever the witness has.
            let over = if self.backup == Backup::Disarmed { Over::Anything } else { Over::Own };
            let number = self.next_number();
            self.renewal = Some(Renewal { number, sent: now, over: over.clone() });
            acts.push(Act::Renew { number, over });
        }
        if self.stream.is_none() {
            return acts;
        }
        let left = self.lease.map_or(Time::ZERO, |end| end.saturating_sub(now));
        let wishes_it_armed = self.automatic && left > self.terms.in_danger();
        match self.backup {
            Backup::Disarmed if wishes_it_armed => acts.push(self.arm(now)),
            Backup::MayBeArmed if wishes_it_armed && now >= self.ask_at => acts.push(self.arm(now)),
            Backup::MayBeArmed | Backup::Armed if !wishes_it_armed && now >= self.ask_at => {
                let number = self.next_number();
                (self.disarming, self.arming) = (Some(number), None);
                (self.backup, self.ask_at) = (Backup::MayBeArmed, now + self.terms.renew_every());
                acts.push(Act::Disarm { number });
            }
            Backup::Disarmed | Backup::MayBeArmed | Backup::Armed => {}
        }
        acts
    }

    fn arm(&mut self, now: Time) -> Act {
        let number = self.next_number();
        (self.disarming, self.arming) = (None, Some(number));
        self.ask_at = now + self.terms.renew_every();
        // What was claimed over anything goes by a backup that has stood down.
        self.renewal.take_if(|renewal| renewal.over == Over::Anything);
        if !self.is_without_narrowing() {
            self.backup = Backup::MayBeArmed;
        }
        Act::Arm { number }
    }

    fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn answers(&mut self, number: u64) -> Option<Renewal> {
        self.renewal.take_if(|renewal| renewal.number == number)
    }

    /// The witness has granted or renewed the lease. `now`: when that was heard.
    pub fn renewed(&mut self, number: u64, now: Time) {
        let Some(renewal) = self.answers(number) else { return };
        let (from, hold) = (renewal.sent, self.terms.hold());
        #[cfg(test)]
        let (from, hold) = match self.without {
            Some(Without::SentAt) => (now, hold),
            Some(Without::Margin) => (from, self.terms.ttl()),
            _ => (from, hold),
        };
        let end = from + hold;
        if self.fenced.is_none() && end > now {
            self.lease = Some(self.lease.map_or(end, |before| before.max(end)));
            self.contradiction = None;
        }
    }

    /// Another site has the lease: this one has ended.
    pub fn lost(&mut self, number: u64) {
        if self.answers(number).is_some() {
            self.lease = None;
        }
    }

    /// The witness could not be asked, or does not have what the claim goes by. A lease that was granted before stands.
    pub fn unanswered(&mut self, number: u64) {
        self.answers(number);
    }

    /// The witness names another owner, in a newer generation. A backup that has stood down is none that runs the guest: a
    /// claim of its from before may have arrived late, and nobody runs the guest if this host stops, too.
    pub fn outdated(&mut self, number: u64, generation: u64) {
        if self.answers(number).is_none() {
            return;
        }
        self.lease = None;
        match self.backup {
            Backup::MayBeArmed | Backup::Armed => self.fenced = Some(generation),
            Backup::Disarmed => self.contradiction = Some(generation),
        }
    }

    /// The backup itself says that another site owns the guest.
    pub fn taken(&mut self, generation: u64) {
        self.lease = None;
        self.fenced = Some(generation);
    }

    /// A stream to the backup is being opened, which ends all that were before it. Streams are numbered as they are opened.
    pub fn opening(&mut self, stream: u64) {
        self.newest = self.newest.max(stream);
        (self.stream, self.disarming, self.arming) = (None, None, None);
    }

    /// The backup has answered on a stream that was opened: this host's generation is the newest it knows. `disarmed`: as it
    /// has said. Whether that counts: not what arrives after a newer stream was begun, on which it may have been armed.
    pub fn opened(&mut self, stream: u64, disarmed: bool) -> bool {
        if stream != self.newest && !self.is_without_opening() {
            return false;
        }
        (self.stream, self.confirmed) = (Some(stream), true);
        (self.disarming, self.arming) = (None, None);
        self.ask_at = Time::ZERO;
        self.backup = if disarmed { Backup::Disarmed } else { Backup::MayBeArmed };
        true
    }

    /// A stream ended. What the backup has said stands.
    pub fn closed(&mut self, stream: u64) {
        if self.stream == Some(stream) {
            (self.stream, self.disarming, self.arming) = (None, None, None);
        }
    }

    /// The backup has stood down, durably, as request `number` on `stream` had asked it to.
    pub fn disarmed(&mut self, stream: u64, number: u64) {
        #[cfg(test)]
        if self.without == Some(Without::Number) {
            self.backup = Backup::Disarmed;
            return;
        }
        if self.stream == Some(stream) && self.disarming == Some(number) {
            (self.backup, self.disarming) = (Backup::Disarmed, None);
        }
    }

    /// The backup is armed, as request `number` on `stream` had told it.
    pub fn armed(&mut self, stream: u64, number: u64) {
        if self.stream == Some(stream) && self.arming == Some(number) {
            (self.backup, self.arming) = (Backup::Armed, None);
        }
    }

    #[cfg(test)]
    fn is_without_narrowing(&self) -> bool {
        self.without == Some(Without::Narrowing)
    }

    #[cfg(not(test))]
    fn is_without_narrowing(&self) -> bool {
        false
    }

    #[cfg(test)]
    fn is_without_opening(&self) -> bool {
        self.without == Some(Without::Opening)
    }

    #[cfg(not(test))]
    fn is_without_opening(&self) -> bool {
        false
    }

    fn is_confirmed(&self) -> bool {
        #[cfg(test)]
        if self.without == Some(Without::Confirmed) {
            return true;
        }
        self.confirmed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Time = Time::from_secs;

    fn holder() -> Holder {
        Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Never, true)
    }

    /// Ticks, and has the witness grant what is asked of it.
    fn granted(holder: &mut Holder, now: Time) -> Vec<Act> {
        let acts = holder.tick(now);
        for act in &acts {
            if let Act::Renew { number, .. } = act {
                holder.renewed(*number, now);
            }
        }
        acts
    }

    fn others(acts: Vec<Act>) -> Vec<Act> {
        acts.into_iter().filter(|act| !matches!(act, Act::Renew { .. })).collect()
    }

    fn open(holder: &mut Holder, stream: u64, disarmed: bool) {
        holder.opening(stream);
        assert!(holder.opened(stream, disarmed));
    }

    #[test]
    fn a_lease_counts_from_when_it_was_asked_for() {
        let mut holder = holder();
        assert_eq!(holder.may(), May::Never);
        assert_eq!(holder.tick(S(100)), [Act::Renew { number: 1, over: Over::Own }]);
        assert_eq!(holder.tick(S(101)), [], "one at a time");
        holder.renewed(1, S(103));
        let May::Until(end) = holder.may() else { panic!("{:?}", holder.may()) };
        assert!(end < S(108) && end > S(107), "{end:?}");
        assert!(holder.may().at(S(107)) && !holder.may().at(S(108)));
        // One that is not waited for any more, and one that comes after its time, are none.
        assert!(matches!(holder.tick(S(104))[..], [Act::Renew { number: 2, .. }]));
        assert!(matches!(holder.tick(S(107))[..], [Act::Renew { number: 3, .. }]));
        holder.renewed(2, S(107));
        holder.renewed(3, S(120));
        assert_eq!(holder.may(), May::Until(end));
        // The witness has lost its keys: what was granted stands.
        assert!(matches!(holder.tick(S(121))[..], [Act::Renew { number: 4, .. }]));
        holder.unanswered(4);
        assert_eq!(holder.may(), May::Until(end));
    }

    #[test]
    fn a_backup_is_asked_to_stand_down_when_the_witness_is_silent_and_armed_again_after() {
        let mut holder = holder();
        granted(&mut holder, S(100));
        open(&mut holder, 1, false);
        assert_eq!(holder.tick(S(101)), [Act::Renew { number: 2, over: Over::Own }, Act::Arm { number: 3 }]);
        assert_eq!(others(holder.tick(S(105))), [Act::Disarm { number: 5 }]);
        assert!(matches!(holder.may(), May::Until(_)), "only its answer counts");
        holder.disarmed(1, 5);
        assert_eq!((holder.may(), holder.backup()), (May::Always, Backup::Disarmed));
        assert_eq!(holder.tick(S(200)), [Act::Renew { number: 6, over: Over::Anything }]);
        // The link goes, too: what was promised stands.
        holder.closed(1);
        assert_eq!(holder.may(), May::Always);
        holder.renewed(6, S(200));
        assert_eq!(holder.may(), May::Always);
        open(&mut holder, 2, true);
        assert_eq!(others(holder.tick(S(201))), [Act::Arm { number: 8 }]);
        assert!(matches!(holder.may(), May::Until(_)), "narrowed before it is sent");
        // Nothing older widens it.
        holder.disarmed(1, 5);
        holder.disarmed(2, 5);
        assert!(matches!(holder.may(), May::Until(_)));
        // Told again until it has answered.
        holder.armed(2, 3);
        assert_eq!(others(granted(&mut holder, S(203))), [Act::Arm { number: 10 }]);
        holder.armed(2, 10);
        assert_eq!((holder.backup(), others(granted(&mut holder, S(205)))), (Backup::Armed, vec![]));
    }

    #[test]
    fn a_claim_over_anything_is_none_once_the_backup_is_armed() {
        let mut holder = Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Always, true);
        granted(&mut holder, S(100));
        open(&mut holder, 1, true);
        let acts = holder.tick(S(101));
        assert_eq!(acts, [Act::Renew { number: 2, over: Over::Anything }, Act::Arm { number: 3 }]);
        let before = holder.may();
        holder.renewed(2, S(101));
        assert_eq!(holder.may(), before);
    }

    #[test]
    fn what_an_older_stream_begins_with_does_not_count() {
        let mut holder = holder();
        holder.opening(1);
        holder.opening(2);
        assert!(!holder.opened(1, true) && holder.may() == May::Never);
        assert!(holder.opened(2, false));
        assert!(!holder.opened(1, true) && holder.backup() == Backup::MayBeArmed);
    }

    #[test]
    fn a_host_that_was_started_asks_the_backup_first() {
        let mut holder = Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Never, false);
        granted(&mut holder, S(100));
        assert_eq!(holder.may(), May::Never);
        open(&mut holder, 1, false);
        assert!(holder.may().at(S(101)));
    }

    #[test]
    fn where_it_is_not_wished_the_backup_is_not_armed() {
        let mut holder = holder();
        granted(&mut holder, S(100));
        open(&mut holder, 1, false);
        holder.set_automatic(false);
        assert_eq!(others(holder.tick(S(101))), [Act::Disarm { number: 3 }]);
        holder.disarmed(1, 3);
        assert_eq!((holder.may(), holder.tick(S(150))), (May::Always, vec![]));
    }

    #[test]
    fn a_newer_owner_ends_it_unless_the_backup_has_stood_down() {
        let mut fenced = holder();
        granted(&mut fenced, S(100));
        assert!(matches!(fenced.tick(S(101))[..], [Act::Renew { number: 2, .. }]));
        fenced.outdated(2, 2);
        assert_eq!((fenced.may(), fenced.fenced(), fenced.tick(S(105))), (May::Never, Some(2), vec![]));
        let mut disarmed = Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Always, true);
        disarmed.tick(S(100));
        disarmed.outdated(1, 2);
        assert_eq!((disarmed.may(), disarmed.contradiction()), (May::Always, Some(2)));
        disarmed.taken(2);
        assert_eq!(disarmed.may(), May::Never);
    }

    #[test]
    fn a_restart_goes_on_with_what_was_in_force() {
        let terms = Terms::new(S(10), S(2)).unwrap();
        assert_eq!(Holder::new(terms, May::Until(S(5)), true).may(), May::Until(S(5)));
        assert_eq!(Holder::new(terms, May::Always, true).may(), May::Always);
        let mut gone = Holder::new(terms, May::Until(S(5)), true);
        gone.tick(S(1));
        gone.lost(1);
        assert_eq!(gone.may(), May::Never);
    }
}
