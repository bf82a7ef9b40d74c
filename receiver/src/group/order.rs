//! Who of a group is next. Nothing is asked or done here.

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not begun.
    Waiting,
    /// Its guest is being brought up.
    Activating,
    /// It runs, and its readiness checks are made.
    Checking,
    /// All that was asked of it is so.
    Ready,
    /// It will not be ready.
    Failed,
    /// Somebody that it needs will not be ready.
    HeldBack,
}

impl State {
    const ALL: [State; 6] =
        [State::Waiting, State::Activating, State::Checking, State::Ready, State::Failed, State::HeldBack];

    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            State::Waiting => "waiting",
            State::Activating => "activating",
            State::Checking => "checking",
            State::Ready => "ready",
            State::Failed => "failed",
            State::HeldBack => "held back",
        }
    }

    /// As it was written; what is not known has not begun.
    pub fn of(word: &str) -> State {
        Self::ALL.into_iter().find(|state| state.word() == word).unwrap_or(State::Waiting)
    }

    /// Whether somebody is at work on it.
    pub fn is_under_way(self) -> bool {
        matches!(self, State::Activating | State::Checking)
    }

    /// Whether nothing more comes of it.
    pub fn is_settled(self) -> bool {
        matches!(self, State::Ready | State::Failed | State::HeldBack)
    }
}

/// A member, as far as the order goes.
#[derive(Debug, Clone)]
pub struct Member {
    /// The lowest first.
    pub priority: u64,
    /// Indices of members that have to be ready before; no circles (the plan has none).
    pub needs: Vec<usize>,
    /// How it stands.
    pub state: State,
}

/// Holds back who needs somebody that will not be ready, directly or not; gives each with the member that it needs.
pub fn hold_back(members: &mut [Member]) -> Vec<(usize, usize)> {
    let mut held = Vec::new();
    loop {
        let lost = |of: &usize| matches!(members[*of].state, State::Failed | State::HeldBack);
        let next = members.iter().enumerate().find_map(|(index, member)| {
            let waits = member.state == State::Waiting;
            member.needs.iter().copied().find(|needed| waits && lost(needed)).map(|needed| (index, needed))
        });
        let Some((index, needed)) = next else { return held };
        members[index].state = State::HeldBack;
        held.push((index, needed));
    }
}

/// Who begins now, in the order of the plan: of those of the lowest priority of which something is still to come, who has all that
/// it needs; no more than `parallel` are under way then. Nobody, and nobody under way: all are settled.
pub fn next(members: &[Member], parallel: usize) -> Vec<usize> {
    let open = members.iter().filter(|member| !member.state.is_settled());
    let Some(lowest) = open.map(|member| member.priority).min() else { return Vec::new() };
    let under_way = members.iter().filter(|member| member.state.is_under_way()).count();
    let can = members.iter().enumerate().filter(|(_, member)| {
        let has_all = member.needs.iter().all(|needed| members[*needed].state == State::Ready);
        member.state == State::Waiting && member.priority == lowest && has_all
    });
    can.map(|(index, _)| index).take(parallel.saturating_sub(under_way)).collect()
}

/// The waves in which members would begin if all went well and any number could at once, from 0, one of each member.
pub fn waves(members: &[Member]) -> Vec<usize> {
    let mut left: Vec<Member> = members.iter().map(|m| Member { state: State::Waiting, ..m.clone() }).collect();
    let mut waves = vec![0; left.len()];
    for wave in 0..left.len() {
        for index in next(&left, usize::MAX) {
            waves[index] = wave;
            left[index].state = State::Activating;
        }
        for member in left.iter_mut().filter(|member| member.state == State::Activating) {
            member.state = State::Ready;
        }
    }
    waves
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(priority: u64, needs: &[usize]) -> Member {
        Member { priority, needs: needs.to_vec(), state: State::Waiting }
    }

    #[test]
    fn needs_and_priorities_decide_and_so_does_the_limit() {
        // Database, application, front; a log server that must be first; somebody alone.
        let mut shop = vec![member(100, &[]), member(100, &[0]), member(100, &[1]), member(10, &[]), member(100, &[])];
        assert_eq!(waves(&shop), [1, 2, 3, 0, 1]);
        assert_eq!(next(&shop, 4), [3]);
        shop[3].state = State::Checking;
        assert_eq!(next(&shop, 4), [] as [usize; 0], "those of a higher number wait for it to be ready");
        shop[3].state = State::Failed;
        assert_eq!(hold_back(&mut shop), [], "nobody needs it");
        assert_eq!(next(&shop, 4), [0, 4]);
        assert_eq!(next(&shop, 1), [0]);
        shop[4].state = State::Activating;
        assert_eq!(next(&shop, 1), [] as [usize; 0]);
        shop[0].state = State::Failed;
        assert_eq!(hold_back(&mut shop), [(1, 0), (2, 1)]);
        shop[4].state = State::Ready;
        assert!(next(&shop, 4).is_empty() && shop.iter().all(|member| member.state.is_settled()));
    }

    #[test]
    fn states_are_read_as_they_are_written() {
        for state in State::ALL {
            assert_eq!(State::of(state.word()), state);
        }
        assert_eq!(State::of("of a later version"), State::Waiting);
    }

    fn groups() -> impl Strategy<Value = (Vec<Member>, Vec<bool>, usize)> {
        let member = (0..3_u64, prop::collection::vec(any::<prop::sample::Index>(), 0..4));
        (prop::collection::vec(member, 1..12), prop::collection::vec(any::<bool>(), 12), 1..5_usize).prop_map(
            |(drawn, fails, parallel)| {
                let mut members: Vec<Member> = Vec::new();
                for (index, (priority, needs)) in drawn.into_iter().enumerate() {
                    // Those before it only, and none of a higher number: a plan has neither circles nor the reverse.
                    let mut needs: Vec<usize> =
                        needs.into_iter().filter(|_| index > 0).map(|i| i.index(index)).collect();
                    needs.sort_unstable();
                    needs.dedup();
                    let least = needs.iter().map(|needed| members[*needed].priority).max().unwrap_or(0);
                    members.push(member_of(priority.max(least), needs));
                }
                (members, fails, parallel)
            },
        )
    }

    fn member_of(priority: u64, needs: Vec<usize>) -> Member {
        Member { priority, needs, state: State::Waiting }
    }

    proptest! {
        #[test]
        fn all_are_settled_and_none_begins_too_early((mut members, fails, parallel) in groups()) {
            for _ in 0..=members.len() {
                let held = hold_back(&mut members);
                for (index, needed) in held {
                    prop_assert!(members[index].needs.contains(&needed));
                }
                let begin = next(&members, parallel);
                prop_assert!(begin.len() <= parallel);
                for index in &begin {
                    prop_assert!(members[*index].needs.iter().all(|needed| members[*needed].state == State::Ready));
                    let lower = members.iter().filter(|other| other.priority < members[*index].priority);
                    prop_assert!(lower.into_iter().all(|other| other.state.is_settled()));
                }
                for index in begin {
                    members[index].state = if fails[index] { State::Failed } else { State::Ready };
                }
            }
            for member in &members {
                prop_assert!(member.state.is_settled(), "{:?}", members);
                let lost = member.needs.iter().any(|of| matches!(members[*of].state, State::Failed | State::HeldBack));
                prop_assert_eq!(member.state == State::HeldBack, lost);
            }
        }
    }
}
