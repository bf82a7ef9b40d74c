//! Which points are kept: a policy, and what has to be done for it. No I/O.
//!
//! A policy is a list of tiers, "one of every so long, up to this age", and a budget of bytes. Of each stretch of time of a
//! tier the earliest application-consistent point stays, or else the earliest, so that a point kept by a coarse tier was kept by
//! the finer ones before. An application-consistent one also stays for [`NAMING_NS`], whatever the policy, so that who has asked
//! for it can name it. The time by which points age is the newest point's cut: a protected host that is silent does not cost its
//! history.
//!
//! What goes when the history outgrows its budget, or the disk is nearly full, in this order:
//! 1. what the policy does not ask for any more;
//! 2. the oldest points, one after another, standbys that a seed has replaced with them.
//!
//! The newest point and those that are pinned (or being read) are never given up: when nothing but these is left, the
//! receiver stops accepting instead.

use std::time::Duration;

use vmdr_journal::{Set, Tier};

/// Neighbouring sets of like span that become one while it is not settled yet which points of theirs stay.
const MERGE_SETS: usize = 16;
/// How long an application-consistent point is kept in any case: it costs the guest something, and is named once it is durable.
const NAMING_NS: u64 = 60_000_000_000;
/// Of the budget, the part in use from which on there is an alarm, in percent.
pub const ALARM_PERCENT: u64 = 80;
/// Of the budget, the part that is left in use when points had to go, in percent.
const ROOM_PERCENT: u64 = 95;
/// The part from which on long reads end themselves: points have been given up before, if they could.
const PRESSING_PERCENT: u64 = 98;

/// How long which points are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Bytes of history at most, standbys that a seed has replaced included.
    pub budget_bytes: u64,
    /// The tiers, in any order. None: only the newest point and pinned ones are kept.
    pub tiers: Vec<Tier>,
}

impl Default for Retention {
    /// Every epoch for 10 minutes, every minute for 24 hours, every hour for 7 days, in 32 GiB.
    fn default() -> Self {
        let tier = |every, up_to| {
            let ns = |seconds| Duration::from_secs(seconds).as_nanos() as u64;
            Tier { every_ns: ns(every), for_ns: ns(up_to) }
        };
        let tiers = vec![tier(0, 600), tier(60, 24 * 3600), tier(3600, 7 * 24 * 3600)];
        Retention { budget_bytes: 32 << 30, tiers }
    }
}

impl Retention {
    /// Whether some tier wants points of this age.
    pub fn keeps(&self, cut_ns: u64, now_ns: u64) -> bool {
        self.stretch(cut_ns, now_ns).is_some()
    }

    /// The tier's stretch that keeps a point of this age, if the point is the earliest in it.
    fn stretch(&self, cut_ns: u64, now_ns: u64) -> Option<(u64, u64)> {
        let age = now_ns.saturating_sub(cut_ns);
        let tier = self.tiers.iter().filter(|tier| age <= tier.for_ns).min_by_key(|tier| tier.every_ns)?;
        Some((tier.every_ns, cut_ns.checked_div(tier.every_ns).unwrap_or(cut_ns)))
    }
}

/// A point of a standby's history, as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The epoch.
    pub epoch: u64,
    /// Wall clock at its cut.
    pub cut_ns: u64,
    /// It is pinned or being read.
    pub protected: bool,
    /// It is application-consistent.
    pub application: bool,
}

/// What to do next with the history of one standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Forget so many sets, from the oldest on.
    Forget(usize),
    /// Make so many neighbouring sets one, from this one on.
    Merge(usize, usize),
}

/// For each point whether the policy or a pin keeps it. `points` are in order; the last is the standby itself.
fn kept(points: &[Held], policy: &Retention, now_ns: u64) -> Vec<bool> {
    let fresh = |point: &Held| point.application && now_ns.saturating_sub(point.cut_ns) <= NAMING_NS;
    let mut kept: Vec<bool> = points.iter().map(|point| point.protected || fresh(point)).collect();
    let stretches: Vec<_> = points.iter().map(|point| policy.stretch(point.cut_ns, now_ns)).collect();
    let mut start = 0;
    for run in stretches.chunk_by(|one, next| one == next) {
        let inside = &points[start..start + run.len()];
        if run[0].is_some() {
            let best = inside.iter().position(|point| point.application).unwrap_or(0);
            kept[start + best] = true;
        }
        start += run.len();
    }
    if let Some(newest) = kept.last_mut() {
        *newest = true;
    }
    kept
}

/// What the policy asks for next: `points[i]` is what `sets[i]` takes back to, and one more is the standby itself, which is
/// in use or (`ended`) not any more.
pub fn next(sets: &[Set], points: &[Held], ended: bool, policy: &Retention, now_ns: u64) -> Option<Step> {
    let kept = kept(points, policy, now_ns);
    let oldest = kept.iter().position(|keep| *keep).unwrap_or(0);
    if oldest > 0 {
        return Some(Step::Forget(oldest));
    }
    // Runs of sets whose inner points are not kept.
    let mut start = 0;
    while start < sets.len() {
        let end = (start + 1..points.len()).find(|i| kept[*i]).unwrap_or(points.len() - 1);
        if end - start > 1 {
            if let Some((from, count)) = like(&sets[start..end]) {
                return Some(Step::Merge(start + from, count));
            }
            // The point behind the run stays for good if it is the first of another stretch of the same tier.
            let settled = policy
                .stretch(points[start].cut_ns, now_ns)
                .is_some_and(|(every, stretch)| points[end].cut_ns / every.max(1) != stretch);
            if ended || (end + 1 < points.len() && (settled || points[end].protected)) {
                return Some(Step::Merge(start, (end - start).min(MERGE_SETS)));
            }
        }
        start = end;
    }
    None
}

/// Neighbouring sets that span like many epochs, as many as make a merge worth while.
fn like(sets: &[Set]) -> Option<(usize, usize)> {
    let level = |set: &Set| (set.to - set.from).ilog(MERGE_SETS as u64);
    let mut from = 0;
    for i in 0..sets.len() {
        if level(&sets[i]) != level(&sets[from]) {
            from = i;
        }
        if i + 1 - from == MERGE_SETS {
            return Some((from, MERGE_SETS));
        }
    }
    None
}

/// What goes next for want of space: the oldest point that is not protected.
pub fn give_up(points: &[Held]) -> Option<Step> {
    let last = points.len().checked_sub(1)?;
    let first = points[..last].iter().position(|point| !point.protected)?;
    Some(if first == 0 { Step::Forget(1) } else { Step::Merge(first - 1, 2) })
}

/// Whether points have to go: the history has outgrown its budget.
pub fn over(used_bytes: u64, policy: &Retention) -> bool {
    used_bytes > policy.budget_bytes / 100 * ROOM_PERCENT
}

/// Whether points that may go have gone, and it is not enough: what is read or pinned is in the way.
pub fn pressing(used_bytes: u64, policy: &Retention) -> bool {
    used_bytes > policy.budget_bytes / 100 * PRESSING_PERCENT
}

/// Whether the operator should know that soon points will have to go.
pub fn alarming(used_bytes: u64, policy: &Retention) -> bool {
    used_bytes > policy.budget_bytes / 100 * ALARM_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_journal::PointTail;

    const SECOND_NS: u64 = 1_000_000_000;

    /// A history as it would be: each new epoch is a set of 100 bytes, of merged ones the bytes add up.
    struct Model {
        sets: Vec<Set>,
        epoch: u64,
        now_ns: u64,
        rewritten: u64,
        applications: Vec<u64>,
    }

    impl Model {
        fn new() -> Self {
            let (sets, applications) = (Vec::new(), Vec::new());
            Model { sets, epoch: 1, now_ns: 1_000_000 * SECOND_NS, rewritten: 0, applications }
        }

        fn cut(&mut self, after_ns: u64) {
            let point = PointTail { cut_unix_ns: self.now_ns, ..PointTail::default() };
            let (from, to) = (self.epoch, self.epoch + 1);
            self.sets.push(Set { generation: 1, from, to, segment: 1, offset: 0, end: 100, units: 1, point });
            self.epoch = to;
            self.now_ns += after_ns;
        }

        fn held(&self, pinned: &[u64]) -> Vec<Held> {
            let all = self.sets.iter().map(|set| (set.from, set.point.cut_unix_ns)).chain([(self.epoch, self.now_ns)]);
            let protected = |epoch| pinned.contains(&epoch);
            let application = |epoch| self.applications.contains(&epoch);
            all.map(|(epoch, cut_ns)| Held {
                epoch,
                cut_ns,
                protected: protected(epoch),
                application: application(epoch),
            })
            .collect()
        }

        fn take(&mut self, step: Step) {
            match step {
                Step::Forget(count) => {
                    self.sets.drain(..count);
                }
                Step::Merge(from, count) => {
                    assert!(count > 1, "a merge of {count}");
                    let merged = &self.sets[from..from + count];
                    let bytes: u64 = merged.iter().map(Set::bytes).sum();
                    self.rewritten += bytes;
                    let new = Set { to: merged[count - 1].to, end: bytes, ..merged[0] };
                    self.sets.splice(from..from + count, [new]);
                }
            }
        }

        fn settle(&mut self, policy: &Retention, pinned: &[u64]) {
            while let Some(step) = next(&self.sets, &self.held(pinned), false, policy, self.now_ns) {
                self.take(step);
            }
        }
    }

    #[test]
    fn nine_days_of_epochs_leave_what_the_policy_says_and_are_rewritten_a_few_times() {
        let policy = Retention::default();
        let mut model = Model::new();
        let pinned = [50_000];
        let (hour, day) = (3_600 * SECOND_NS, 24 * 3_600 * SECOND_NS);
        // An epoch each five seconds; a look each minute.
        for n in 0..9 * 24 * 720 {
            model.cut(5 * SECOND_NS);
            if n % 12 == 0 {
                model.settle(&policy, &pinned);
            }
        }
        model.settle(&policy, &pinned);
        let points = model.held(&pinned);
        let age = |point: &Held| model.now_ns - point.cut_ns;
        let fresh = points.iter().filter(|point| age(point) <= 600 * SECOND_NS).count();
        assert_eq!(fresh, 121);
        let between = |from: u64, to: u64| {
            points.iter().filter(|point| age(point) > from && age(point) <= to).collect::<Vec<_>>()
        };
        let minutes = between(600 * SECOND_NS, day);
        assert!((1_430..1_450).contains(&minutes.len()), "{}", minutes.len());
        let hours = between(day, 7 * day);
        // 144, and the hour at the border, of which it is not settled yet.
        assert!((140..180).contains(&hours.len()), "{}", hours.len());
        assert!(hours.windows(2).all(|pair| pair[1].cut_ns - pair[0].cut_ns <= hour + 60 * SECOND_NS));
        // What is older is there for the pin alone.
        assert!(between(7 * day + hour, u64::MAX).len() <= 40, "{:?}", between(7 * day, u64::MAX).len());
        assert!(points.iter().any(|point| point.epoch == 50_000));
        let all = model.epoch * 100;
        assert!(model.rewritten < 8 * all, "{} bytes rewritten of {all}", model.rewritten);
        // Without a gap from the oldest to the newest.
        assert!(model.sets.windows(2).all(|pair| pair[0].to == pair[1].from));
    }

    #[test]
    fn of_neighbours_the_application_consistent_one_stays() {
        let policy = Retention::default();
        let mut model = Model::new();
        // One a quarter of an hour, never the first of its minute; a day and a half of them.
        for n in 0..36 * 720_u64 {
            if n % 180 == 7 {
                model.applications.push(model.epoch);
            }
            model.cut(5 * SECOND_NS);
            if n % 12 == 0 {
                model.settle(&policy, &[]);
            }
        }
        model.settle(&policy, &[]);
        let points = model.held(&[]);
        let age = |point: &Held| (model.now_ns - point.cut_ns) / SECOND_NS;
        // Of each minute of the last day the one that there was; of each hour before one of its four.
        let (day, hours): (Vec<&Held>, Vec<&Held>) =
            points.iter().filter(|point| age(point) > 3600).partition(|point| age(point) <= 23 * 3600);
        assert_eq!(day.iter().filter(|point| point.application).count(), 22 * 4);
        let hours: Vec<_> = hours.into_iter().filter(|point| age(point) > 26 * 3600).collect();
        assert!(hours.len() >= 9, "{}", hours.len());
        assert!(hours.iter().all(|point| point.application), "{hours:?}");
    }

    #[test]
    fn without_a_policy_there_is_time_to_name_it() {
        let policy = Retention { tiers: Vec::new(), ..Retention::default() };
        let mut model = Model::new();
        model.applications = vec![10, 60];
        for _ in 0..100 {
            model.cut(SECOND_NS);
        }
        model.settle(&policy, &[]);
        let points = model.held(&[]);
        assert_eq!(points.iter().filter(|point| point.application).map(|point| point.epoch).collect::<Vec<_>>(), [60]);
    }

    #[test]
    fn without_tiers_nothing_is_kept_but_what_is_pinned() {
        let policy = Retention { tiers: Vec::new(), ..Retention::default() };
        let mut model = Model::new();
        for _ in 0..100 {
            model.cut(SECOND_NS);
        }
        model.settle(&policy, &[40]);
        assert_eq!(model.sets.first().map(|set| set.from), Some(40));
        assert!(model.sets.len() < 2 * MERGE_SETS, "{}", model.sets.len());
        model.settle(&policy, &[]);
        assert_eq!(model.sets, []);
    }

    #[test]
    fn the_oldest_goes_first_and_a_pin_stays() {
        let mut model = Model::new();
        for _ in 0..5 {
            model.cut(SECOND_NS);
        }
        assert_eq!(give_up(&model.held(&[])), Some(Step::Forget(1)));
        assert_eq!(give_up(&model.held(&[1])), Some(Step::Merge(0, 2)));
        assert_eq!(give_up(&model.held(&[1, 2, 3, 4, 5])), None);
        let mut steps = 0;
        while let Some(step) = give_up(&model.held(&[1, 3])) {
            model.take(step);
            steps += 1;
        }
        assert_eq!((steps, model.sets.len()), (3, 2));
        assert_eq!(give_up(&[]), None);
        let policy = Retention { budget_bytes: 1000, tiers: Vec::new() };
        assert!(over(951, &policy) && !over(950, &policy) && alarming(801, &policy) && !alarming(800, &policy));
        assert!(pressing(981, &policy) && !pressing(980, &policy));
    }
}
