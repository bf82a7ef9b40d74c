//! etcd, as far as this protocol sees it: a key of the owner, a key of the lease, transactions.

use crate::{Allowed, Claim, Over, Owner, Terms, View, allows};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ask {
    Claim(Claim),
    Look,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Granted,
    Refused(Allowed),
    View(View),
}

pub(crate) struct Witness {
    pub(crate) up: bool,
    owner: Option<Owner>,
    /// Holder, and end in real time.
    lease: Option<(String, u64)>,
    /// Life of a lease in real time: by its clock, which drifts too.
    life_us: u64,
    /// How often it has lost everything: what is on its way to the one before does not arrive.
    pub(crate) wiped: u32,
    /// The check of the transaction that is left out: the other's lease, the owner's generation, that there is an owner.
    pub(crate) without: (bool, bool, bool),
}

impl Witness {
    pub(crate) fn new(terms: Terms, ppm: i64) -> Self {
        let life_us = terms.ttl().as_micros() as i64 * 1_000_000 / (1_000_000 + ppm);
        Self { up: true, owner: None, lease: None, life_us: life_us as u64, wiped: 0, without: (false, false, false) }
    }

    pub(crate) fn restart(&mut self, now: u64) {
        self.up = true;
        // As etcd does: what had not ended gets its whole life again.
        if let Some(lease) = &mut self.lease {
            lease.1 = now + self.life_us;
        }
    }

    pub(crate) fn wipe(&mut self) {
        (self.owner, self.lease) = (None, None);
        self.wiped += 1;
    }

    pub(crate) fn view(&mut self, now: u64) -> View {
        if self.lease.as_ref().is_some_and(|lease| lease.1 <= now) {
            self.lease = None;
        }
        View { owner: self.owner.clone(), lease: self.lease.as_ref().map(|lease| lease.0.clone()) }
    }

    pub(crate) fn answer(&mut self, ask: Ask, now: u64) -> Answer {
        let mut view = self.view(now);
        match ask {
            Ask::Look => Answer::View(view),
            Ask::Claim(claim) => {
                if self.without.0 {
                    view.lease = None;
                }
                if self.without.1 {
                    view.owner = None;
                }
                let over = if self.without.1 || self.without.2 && view.owner.is_none() {
                    Over::Anything
                } else {
                    claim.over.clone()
                };
                match allows(&view, &Claim { over, ..claim.clone() }) {
                    Allowed::Yes => {
                        self.owner = Some(Owner { generation: claim.generation, holder: claim.holder.clone() });
                        self.lease = Some((claim.holder.clone(), now + self.life_us));
                        Answer::Granted
                    }
                    no => Answer::Refused(no),
                }
            }
        }
    }
}
