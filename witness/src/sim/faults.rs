//! What can happen to the world.

use super::Random;

/// A fault; lengths in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A way: 0 from A to B, 1 from B to A, 2 between A and the witness, 3 between B and the witness.
    Cut { way: usize, length: u64 },
    /// Everything takes long.
    Slow { length: u64 },
    /// The witness is down, and started anew.
    Witness { length: u64 },
    /// All of the protected host stands still and goes on.
    Freeze { length: u64 },
    /// Its agent dies, and is started anew.
    Agent { length: u64 },
    /// The host dies, and is started anew.
    Host { length: u64 },
    /// The receiver dies, and is started anew.
    Receiver { length: u64 },
    /// The witness has lost all that it had, and is started anew.
    Wipe,
    /// The shim of the protected host does not look, while the host goes on.
    Shim { length: u64 },
    /// What the backup site writes is on its disk or not, and an error.
    Disk { length: u64 },
    /// The operator at the backup site wants the guest there, when its lease has ended.
    Operator,
    /// The operator there activates it by hand, as the runbook has it: the protected host is lost.
    ByHand,
    /// The operator at the protected host ends, or begins, that the backup takes the guest by itself.
    Automatic(bool),
}

impl Fault {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let length = random.spread_ms(100, 25_000);
        match random.range(0, 119) {
            0..=34 => Self::Cut { way: random.range(0, 3) as usize, length },
            35..=49 => Self::Slow { length },
            50..=64 => Self::Witness { length },
            65..=71 => Self::Freeze { length },
            72..=79 => Self::Agent { length },
            80..=84 => Self::Host { length },
            85..=94 => Self::Receiver { length },
            95..=97 => Self::Wipe,
            98..=101 => Self::Shim { length },
            102..=107 => Self::Disk { length },
            108..=111 => Self::Operator,
            112..=115 => Self::ByHand,
            _ => Self::Automatic(random.per_mille(600)),
        }
    }
}
