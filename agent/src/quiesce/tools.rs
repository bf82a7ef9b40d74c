//! A freeze through vmdr's tools in the guest. They keep its limits themselves; what they say is a claim.

use std::sync::Arc;
use std::time::Duration;

use vmdr_guest_channel::{Message, Outcome};

use super::{Frozen, Held, Limits, Thawed, unanswered};
use vmdr_daemon::guest_channel::{Line, printable};

/// As the operator is told.
const WAY: &str = "vmdr's tools in the guest";

/// A freeze that the guest has confirmed.
#[derive(Debug)]
pub struct Freeze {
    line: Arc<Line>,
    number: u32,
}

/// Asks for it and waits.
pub fn freeze(line: Arc<Line>, limits: Limits) -> Result<Frozen, String> {
    let number = line.number();
    let hold_ms = u32::try_from(limits.hold.as_millis()).unwrap_or(u32::MAX);
    let freeze = Freeze { line, number };
    match freeze.line.ask(number, Message::Freeze { hold_ms }, limits.freeze) {
        Ok(Message::Frozen { outcome: Outcome::Frozen, file_systems, hold_ms, text, .. }) => {
            let hold = limits.hold.min(Duration::from_millis(hold_ms.into()));
            Ok(Frozen::new(Held::Tools(freeze), hold, file_systems.into(), printable(&text), WAY))
        }
        Ok(Message::Frozen { outcome: Outcome::Busy, .. }) => {
            Err("the guest has not ended an earlier freeze yet".to_owned())
        }
        Ok(Message::Frozen { text, .. }) => Err(format!("the guest could not be frozen: {}", printable(&text))),
        Ok(_) => Err("the guest's tools cannot freeze: they are of another version".to_owned()),
        Err(error) => {
            // It may be about to be frozen all the same.
            freeze.let_go();
            Err(unanswered("its file systems were not frozen", limits.freeze, error))
        }
    }
}

impl Freeze {
    /// Thaws and waits.
    pub fn thaw(self, limit: Duration) -> Result<Thawed, String> {
        let ask = Message::Thaw { freeze: self.number };
        match self.line.ask(self.line.number(), ask, limit) {
            Ok(Message::Thawed { held, frozen_ms, text }) => {
                Ok(Thawed { held, frozen: Duration::from_millis(frozen_ms.into()), text: printable(&text) })
            }
            Ok(_) => Err("the guest's tools did not understand that they were to thaw".to_owned()),
            Err(error) => Err(unanswered("it thaws by itself", limit, error)),
        }
    }

    /// Thaws without waiting. What is not heard the guest does by itself.
    pub fn let_go(&self) {
        let _ = self.line.tell(self.line.number(), Message::Thaw { freeze: self.number });
    }
}
