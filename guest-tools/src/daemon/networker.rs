//! The daemon's side of a description of the guest's network: one is applied at a time, on a thread of its own
//! ([`crate::network`]), and the host asks until it is done.

use std::thread::JoinHandle;

use vmdr_guest_channel::Message;
use vmdr_guest_channel::exchange::Desk;
use vmdr_guest_channel::network::{Item, Report};

use crate::network::{self, Places};

/// See the module.
pub struct Networker {
    places: Places,
    desk: Desk,
    work: Option<JoinHandle<Report>>,
    again: Option<JoinHandle<Vec<String>>>,
}

impl Networker {
    /// Gives what was given before a reboot again, where nothing else does.
    pub fn new(places: Places) -> Self {
        let of = places.clone();
        let again = std::thread::Builder::new().name("network".to_owned()).spawn(move || network::again(&of));
        Self { places, desk: Desk::default(), work: None, again: again.ok() }
    }

    /// Whether something is being applied, which writes files.
    pub fn is_active(&self) -> bool {
        self.work.is_some() || self.again.is_some()
    }

    /// Hears a message about the network. `frozen`: nothing can be written now. The answer.
    pub fn hear(&mut self, message: &Message, frozen: bool) -> Message {
        // What was given before comes first.
        if self.work.is_none() && (frozen || self.again.is_some()) {
            return Desk::busy();
        }
        let (answer, wanted) = self.desk.hear(message);
        let Some(wanted) = wanted else { return answer };
        let places = self.places.clone();
        let spawned =
            std::thread::Builder::new().name("network".to_owned()).spawn(move || network::apply(&wanted, &places));
        match spawned {
            Ok(work) => self.work = Some(work),
            Err(error) => self.desk.done(&failed(format!("start a thread: {error}"))),
        }
        answer
    }

    /// Looks whether it is done; lines to be logged.
    pub fn look(&mut self) -> Vec<String> {
        let mut log = Vec::new();
        if let Some(again) = self.again.take_if(|again| again.is_finished()) {
            log.extend(again.join().unwrap_or_default());
        }
        if let Some(work) = self.work.take_if(|work| work.is_finished()) {
            let report = work.join().unwrap_or_else(|_| failed("it ended before it was done".to_owned()));
            log.extend(
                report.items.iter().map(|item| format!("network: {}: {}{}", item.subject, item.done, item.error)),
            );
            self.desk.done(&report);
        }
        log
    }
}

fn failed(error: String) -> Report {
    Report { items: vec![Item { subject: "network".to_owned(), done: String::new(), error }] }
}
