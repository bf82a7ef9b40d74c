//! Where to go on after a connection was made: a pure decision.

use vmdr_proto::replication::Position;
use vmdr_proto::shim::{PartId, State};

/// What has to be done so that receiver and shim agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Everything up to `durable` is durable: release it, send `again`, go on.
    From {
        /// The newest part known to be durable, if any is held.
        durable: Option<(u64, u32)>,
        /// Parts the receiver does not have, in order.
        again: Vec<(u64, u32)>,
    },
    /// What the shim captured does not join what the receiver has: copy the whole guest as `epoch`.
    Seed {
        /// The epoch to open.
        epoch: u64,
    },
}

/// Compares what the receiver has with what the shim holds.
pub fn resume(receiver: &Position, shim: &State) -> Resume {
    // Parts of an open epoch are given up: they never were a recovery point.
    let seed = Resume::Seed { epoch: receiver.epoch + 1 };
    if !shim.armed || shim.generation != receiver.generation || shim.epoch == 0 {
        return seed;
    }
    // The part that the receiver needs next. While part 0 of the open epoch is not acknowledged, the parts that the
    // receiver has of it may be another attempt's: it takes the epoch from its beginning again.
    let mut held = shim.unreleased.iter();
    let next = if held.any(|part| (part.epoch, part.part) == (receiver.open_epoch, 0)) {
        (receiver.open_epoch, 0)
    } else if receiver.open_epoch > 0 {
        (receiver.open_epoch, receiver.open_parts)
    } else {
        (receiver.epoch + 1, 0)
    };
    let id = |part: &PartId| (part.epoch, part.part);
    let again: Vec<_> = shim.unreleased.iter().map(id).filter(|part| *part >= next).collect();
    let durable = shim.unreleased.iter().map(id).filter(|part| *part < next).max();
    let first = again.first().copied().unwrap_or((shim.epoch, shim.next_part));
    if first == next { Resume::From { durable, again } } else { seed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(epoch: u64, next_part: u32, held: &[(u64, u32)]) -> State {
        State {
            armed: true,
            generation: 1,
            epoch,
            next_part,
            unreleased: held.iter().map(|&(epoch, part)| PartId { epoch, part, last: false }).collect(),
            ..State::default()
        }
    }

    fn position(epoch: u64, open_epoch: u64, open_parts: u32) -> Position {
        Position { generation: 1, epoch, open_epoch, open_parts }
    }

    #[test]
    fn goes_on_where_the_receiver_is() {
        // An acknowledgement was lost: 7 is durable, 8 is not.
        let held = state(9, 0, &[(7, 0), (8, 0)]);
        let from = Resume::From { durable: Some((7, 0)), again: vec![(8, 0)] };
        assert_eq!(resume(&position(7, 0, 0), &held), from);
        // All is durable.
        assert_eq!(resume(&position(8, 0, 0), &held), Resume::From { durable: Some((8, 0)), again: vec![] });
        // In the middle of an epoch of several parts.
        let held = state(5, 3, &[(5, 1), (5, 2)]);
        assert_eq!(resume(&position(4, 5, 2), &held), Resume::From { durable: Some((5, 1)), again: vec![(5, 2)] });
        assert_eq!(resume(&position(4, 5, 3), &held), Resume::From { durable: Some((5, 2)), again: vec![] });
    }

    #[test]
    fn parts_of_an_earlier_attempt_are_not_taken_for_this_ones() {
        // A new shim has begun epoch 5 anew; the receiver has two parts of the attempt before.
        let held = state(5, 3, &[(5, 0), (5, 1), (5, 2)]);
        assert_eq!(
            resume(&position(4, 5, 2), &held),
            Resume::From { durable: None, again: vec![(5, 0), (5, 1), (5, 2)] }
        );
    }

    #[test]
    fn seeds_when_anything_is_missing() {
        let held = state(9, 0, &[(8, 0)]);
        // The receiver lost what it had acknowledged.
        assert_eq!(resume(&position(6, 0, 0), &held), Resume::Seed { epoch: 7 });
        // It is empty.
        assert_eq!(resume(&position(0, 0, 0), &held), Resume::Seed { epoch: 1 });
        // It has more than this shim ever sent.
        assert_eq!(resume(&position(9, 0, 0), &state(9, 0, &[])), Resume::Seed { epoch: 10 });
        // It dropped the parts of an open epoch.
        assert_eq!(resume(&position(4, 0, 0), &state(5, 3, &[(5, 2)])), Resume::Seed { epoch: 5 });
        // Another generation, or nothing captured yet.
        assert_eq!(resume(&Position { generation: 2, ..position(8, 0, 0) }, &held), Resume::Seed { epoch: 9 });
        assert_eq!(resume(&position(8, 0, 0), &State::default()), Resume::Seed { epoch: 9 });
    }
}
