//! How a description of a guest's network gets into the guest and its report back: both ends, without I/O.
//!
//! The host has a [`Conversation`]: it says [`Conversation::message`], hears the answer, and so on, as often as it likes. The guest
//! has a [`Desk`]. Neither believes the other: whatever comes, memory and the number of turns are bounded.

use crate::Message;
use crate::network::{Intake, NETWORK_BYTES_MAX, Network, Phase, Report, Taken, piece};

/// More turns than any honest guest needs: pieces of both texts, and questions while it works.
const TURNS_MAX: u32 = 2000;

/// What the host does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Says the next message at once.
    Now,
    /// Says it after a rest: the guest is at work.
    Later,
    /// It is done.
    Done(Report),
    /// It will not be done.
    Failed(String),
}

/// The host's end.
#[derive(Clone, Debug)]
pub struct Conversation {
    text: String,
    at: usize,
    put: bool,
    report: Intake,
    turns: u32,
}

impl Conversation {
    /// An error: the description is more than a guest takes.
    pub fn new(network: &Network) -> Result<Self, String> {
        Ok(Self { text: network.encode()?, at: 0, put: false, report: Intake::default(), turns: 0 })
    }

    /// What is to be said now; again, if no answer came.
    pub fn message(&self) -> Message {
        let number = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        if self.put {
            return Message::NetworkAsk { at: number(self.report.len()) };
        }
        let bytes = piece(&self.text, self.at).to_vec();
        Message::NetworkPut { at: number(self.at), total: number(self.text.len()), bytes }
    }

    /// Hears an answer.
    pub fn hear(&mut self, message: &Message) -> Step {
        self.turns += 1;
        if self.turns > TURNS_MAX {
            return Step::Failed("the guest's tools answer without an end".to_owned());
        }
        match message {
            Message::NetworkIs { phase, at, total, bytes } => self.told(*phase, (*at).into(), (*total).into(), bytes),
            Message::Unsupported(_) => Step::Failed("the guest's tools are of a version that cannot".to_owned()),
            _ => Step::Later,
        }
    }

    fn told(&mut self, phase: Phase, at: usize, total: usize, bytes: &[u8]) -> Step {
        match phase {
            // A guest whose tools were started anew begins anew.
            Phase::Idle | Phase::Receiving => {
                let had = if phase == Phase::Idle { 0 } else { at };
                let progress = !self.put && had > self.at;
                self.put = false;
                self.report = Intake::default();
                self.at = if had < self.text.len() { had } else { 0 };
                if progress { Step::Now } else { Step::Later }
            }
            Phase::Working => {
                self.put = true;
                Step::Later
            }
            Phase::Busy => Step::Later,
            Phase::Done => {
                self.put = true;
                match self.report.put(at, total, bytes) {
                    Taken::Whole(text) => Step::Done(Report::parse(&text)),
                    Taken::More(_) if bytes.is_empty() => Step::Later,
                    Taken::More(_) => Step::Now,
                    Taken::Wrong(what) => Step::Failed(format!("the report of the guest's tools: {what}")),
                }
            }
            Phase::Refused => {
                let why = Report::parse(&String::from_utf8_lossy(bytes)).items.into_iter().next().unwrap_or_default();
                Step::Failed(format!("the guest's tools refuse it: {}", why.subject))
            }
            Phase::Other(_) => Step::Failed("the guest's tools are of a later version".to_owned()),
        }
    }
}

/// The guest's end.
#[derive(Clone, Debug, Default)]
pub struct Desk {
    intake: Intake,
    total: usize,
    phase: Phase,
    text: String,
    /// What is being applied, or was.
    applied: String,
}

impl Desk {
    /// Hears a message about the network: the answer, and a description that is to be applied now. [`Desk::done`] is told when it is.
    pub fn hear(&mut self, message: &Message) -> (Message, Option<Network>) {
        match message {
            Message::NetworkPut { at, total, bytes } => {
                let (at, total) = (usize::from(*at), usize::from(*total));
                // The last piece again, as its answer was lost; not one of another description.
                let ends = !bytes.is_empty() && at + bytes.len() == total && total == self.applied.len();
                let last = ends && self.applied.as_bytes().get(at..) == Some(bytes.as_slice());
                match self.phase {
                    Phase::Working if !last => return (Self::busy(), None),
                    Phase::Working => return (self.is(0), None),
                    Phase::Done if at > 0 && last => return (self.is(0), None),
                    Phase::Refused if at > 0 => return (self.is(0), None),
                    _ => {}
                }
                self.text.clear();
                self.applied.clear();
                self.phase = Phase::Receiving;
                self.total = total;
                let taken = self.intake.put(at, total, bytes);
                let network = match taken {
                    Taken::More(_) => None,
                    Taken::Wrong(what) => self.refuse(what.to_owned()),
                    Taken::Whole(text) => match Network::parse(&text) {
                        Ok(network) => {
                            self.applied = text;
                            Some(network)
                        }
                        Err(why) => self.refuse(why),
                    },
                };
                if network.is_some() {
                    self.phase = Phase::Working;
                }
                (self.is(0), network)
            }
            Message::NetworkAsk { at } => (self.is((*at).into()), None),
            _ => (self.is(0), None),
        }
    }

    fn refuse(&mut self, why: String) -> Option<Network> {
        self.phase = Phase::Refused;
        self.text = why.chars().filter(|c| !c.is_control()).take(200).collect();
        None
    }

    /// What came of what was being applied.
    pub fn done(&mut self, report: &Report) {
        self.phase = Phase::Done;
        self.text = report.encode();
        debug_assert!(self.text.len() <= NETWORK_BYTES_MAX);
    }

    /// The answer while nothing can be written, or another description is being applied.
    pub fn busy() -> Message {
        Message::NetworkIs { phase: Phase::Busy, at: 0, total: 0, bytes: Vec::new() }
    }

    /// Bytes that are kept.
    pub fn held(&self) -> usize {
        self.intake.len() + self.text.len() + self.applied.len()
    }

    fn is(&self, at: usize) -> Message {
        let number = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let (at, total, bytes) = match self.phase {
            Phase::Receiving => (self.intake.len(), self.total, Vec::new()),
            Phase::Done | Phase::Refused => (at, self.text.len(), piece(&self.text, at).to_vec()),
            _ => (0, 0, Vec::new()),
        };
        Message::NetworkIs { phase: self.phase, at: number(at), total: number(total), bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Item, Mac, Nic, Subnet};

    fn network(nics: u8) -> Network {
        let nic = |i: u8| Nic {
            mac: Mac([0x52, 0x54, 0, 0, 0, i]),
            addresses: (1..9).map(|h| Subnet { address: [10, 1, i, h].into(), prefix: 24 }).collect(),
            routes: Vec::new(),
        };
        Network { nics: (1..=nics).map(nic).collect(), ..Network::default() }
    }

    fn report() -> Report {
        let item = |i| Item { subject: format!("NIC {i}"), done: "x".repeat(100), error: String::new() };
        Report { items: (0..20).map(item).collect() }
    }

    /// Runs both ends; of each three messages one is lost where `lossy`.
    fn run(network: &Network, lossy: bool) -> (Step, Vec<Network>) {
        let (mut host, mut guest) = (Conversation::new(network).unwrap(), Desk::default());
        let (mut applied, mut sent) = (Vec::new(), 0u32);
        let mut lost = || {
            sent += 1;
            lossy && sent.is_multiple_of(3)
        };
        for turn in 0..500 {
            if turn % 7 == 3 && guest.phase == Phase::Working {
                guest.done(&report());
            }
            if lost() {
                continue;
            }
            let (answer, wanted) = guest.hear(&host.message());
            applied.extend(wanted);
            if lost() {
                continue;
            }
            match host.hear(&answer) {
                Step::Now | Step::Later => {}
                end => return (end, applied),
            }
        }
        panic!("it does not end: {host:?}, {guest:?}");
    }

    #[test]
    fn a_description_arrives_and_its_report_comes_back() {
        for network in [Network::default(), network(1), network(30)] {
            assert_eq!(run(&network, false), (Step::Done(report()), vec![network.clone()]));
            let (end, applied) = run(&network, true);
            assert_eq!(end, Step::Done(report()));
            assert!(!applied.is_empty() && applied.iter().all(|one| *one == network), "again, perhaps, but no other");
        }
    }

    #[test]
    fn the_report_of_one_description_is_not_believed_of_another() {
        let (mut first, mut second, mut guest) =
            (Conversation::new(&network(1)).unwrap(), Conversation::new(&network(2)).unwrap(), Desk::default());
        assert_eq!(guest.hear(&first.message()).1, Some(network(1)));
        for _ in 0..2 {
            let (answer, wanted) = guest.hear(&second.message());
            assert!(matches!(answer, Message::NetworkIs { phase: Phase::Busy, .. }) && wanted.is_none(), "{answer:?}");
            assert_eq!(second.hear(&answer), Step::Later);
        }
        // The same again, as its answer was lost.
        assert_eq!(first.hear(&guest.hear(&first.message()).0), Step::Later);
        guest.done(&report());
        let (answer, wanted) = guest.hear(&second.message());
        assert!(matches!(answer, Message::NetworkIs { phase: Phase::Receiving, .. }) || wanted.is_some(), "{answer:?}");
        assert!(!matches!(second.hear(&answer), Step::Done(_)));
    }

    #[test]
    fn what_is_refused_says_why() {
        let mut guest = Desk::default();
        let put = |text: &str| Message::NetworkPut { at: 0, total: text.len() as u16, bytes: text.as_bytes().to_vec() };
        let (answer, wanted) = guest.hear(&put("vmdr-network 1\ndance now\n"));
        assert_eq!(wanted, None);
        let said = Conversation::new(&Network::default()).unwrap().hear(&answer);
        assert!(matches!(said, Step::Failed(why) if why.contains("line 2, \"dance now\"")));
        // And it takes another one.
        assert_eq!(guest.hear(&put("vmdr-network 1\n")).1, Some(Network::default()));
    }

    #[test]
    fn a_guest_that_answers_for_ever_comes_to_an_end() {
        for phase in [Phase::Idle, Phase::Receiving, Phase::Working, Phase::Done, Phase::Busy] {
            let mut host = Conversation::new(&network(30)).unwrap();
            let answer = Message::NetworkIs { phase, at: 3, total: 60_000, bytes: vec![b'x'; 480] };
            let turns = (0..TURNS_MAX + 2).find(|_| matches!(host.hear(&answer), Step::Failed(_)));
            assert!(turns.is_some(), "{phase:?}");
            assert!(host.report.len() <= NETWORK_BYTES_MAX);
        }
    }
}
