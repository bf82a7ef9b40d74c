//! One operation of a whole life goes wrong, each in turn, in each way: appending, applying, thinning with its merges,
//! naming, reading, verifying, opening again. Whatever it is: nothing panics, what fails says so with an error that fits, what
//! was acknowledged is there, every older point is what it was, and the life goes on when the fault is over. After a sync
//! that failed what it should have made durable is lost ([`Fault::Error`] does so), and a crash shows whether anybody relied
//! on it.
//!
//! Nothing is done but what the test does, so that operation N is the same each time. `VMDR_SOAK` takes all of them, of several
//! hosts (some 790 changing ones and some thousands that only look, a host); the usual run a sample.

use super::history::{by_hand, check};
use super::sim::{Fault, SimDisk};
use super::*;

/// Epochs of a life.
const STEPS: u64 = 14;
/// In the usual run one of so many operations fails. There are many more that only look.
const STEP: u64 = 4;
const READS_STEP: u64 = 23;
/// Tries after an error, which is over with the first.
const TRIES_MAX: u32 = 4;

struct Life {
    disk: SimDisk,
    host: Host,
    store: Option<Store>,
    ingest: Option<Ingest>,
    errors: u32,
    context: String,
}

impl Life {
    fn new(seed: u64, context: String) -> Self {
        let mut host = Host::new(seed);
        host.keep = true;
        host.guest.clock = Some(1_000 * SECOND_NS);
        Self { disk: SimDisk::new(), host, store: None, ingest: None, errors: 0, context }
    }

    /// Only these two are what a disk's fault may look like.
    fn failed(&mut self, error: &StoreError, doing: &str) {
        let expected = matches!(error, StoreError::Full { .. } | StoreError::Io { .. });
        assert!(expected, "{}: {doing}: {error:?}", self.context);
        self.errors += 1;
    }

    fn store(&mut self) -> Store {
        for _ in 0..TRIES_MAX {
            if let Some(store) = &self.store {
                return store.clone();
            }
            match Store::open_on(Arc::new(self.disk.clone()), Path::new("/state"), by_hand()) {
                Ok(store) => self.store = Some(store),
                Err(error) => self.failed(&error, "open the store"),
            }
        }
        panic!("{}: the store does not open", self.context);
    }

    /// Sends what there is to send, connecting again as an agent does.
    fn send(&mut self) {
        for _ in 0..TRIES_MAX {
            let result = match self.ingest.take() {
                Some(ingest) => Ok((ingest, self.host.parts)),
                None => self.store().open_stream(UUID, "gast", 0).map(|ingest| {
                    let from = self.host.reconnected(ingest.position(), &self.context);
                    (ingest, from)
                }),
            };
            let result = result.and_then(|(mut ingest, from)| {
                self.host.send(&mut ingest, from)?;
                self.ingest = Some(ingest);
                Ok(())
            });
            match result {
                Ok(()) => return,
                Err(error) => self.failed(&error, "send"),
            }
        }
        panic!("{}: it does not get on", self.context);
    }

    /// Something that is not tried again: the next step comes all the same.
    fn act(&mut self, doing: &str, act: impl FnOnce(&Store, &Domain, &Host) -> Result<(), StoreError>) {
        let store = self.store();
        let result = store.domain(UUID).and_then(|domain| act(&store, &domain, &self.host));
        if let Err(error) = result {
            self.failed(&error, doing);
        }
    }

    fn live(&mut self) {
        for step in 0..STEPS {
            self.host.cut();
            self.send();
            let name = format!("pin-{step}");
            match step % 7 {
                1 | 5 => self.act("apply", |_, domain, _| domain.batch()),
                2 | 4 => self.act("apply and thin", |_, domain, _| {
                    domain.apply_all()?;
                    domain.thin(false);
                    Ok(())
                }),
                3 => self.act("name and release", |store, domain, _| {
                    domain.apply_all()?;
                    store.pin(UUID, &name, None)?;
                    let pins = domain.control().pins.clone();
                    pins.iter().rev().skip(1).try_for_each(|pin| store.release(UUID, &pin.name).map(|_| ()))
                }),
                6 => {
                    self.act("read and verify", |store, domain, host| {
                        domain.apply_all()?;
                        store.verify(UUID)?;
                        for point in store.points(UUID)?.iter().rev().take(2) {
                            let reader = store.read_point(UUID, Some(point.id()))?;
                            let mut bytes = vec![0; reader.length(Array::Ram(0)) as usize];
                            reader.read(Array::Ram(0), 0, &mut bytes)?;
                            assert!(bytes == host.past[&point.epoch].ram[0], "{}", point.id());
                            store.note_verified(UUID, point.id(), 1)?;
                        }
                        Ok(())
                    });
                    // The receiver is started anew.
                    (self.ingest, self.store) = (None, None);
                }
                _ => {}
            }
        }
    }

    /// Once more, now and after a crash, everything is there.
    fn end(mut self) -> u32 {
        self.disk.heal();
        // A history that could not be read is there when it is opened again.
        let trouble = self.store().domains().pop().and_then(|domain| domain.trouble);
        if trouble.is_some_and(|trouble| trouble.contains("cannot be had")) {
            (self.ingest, self.store) = (None, None);
        }
        self.host.cut();
        self.send();
        let store = self.store();
        check(&store, &self.host, &self.context);
        (self.ingest, self.store) = (None, None);
        drop(store);
        let disk = self.disk.crashed(&mut Random(17));
        let context = format!("{}, after a crash", self.context);
        let store = Store::open_on(Arc::new(disk), Path::new("/state"), by_hand());
        let store = store.unwrap_or_else(|e| panic!("{context}: {e}"));
        check(&store, &self.host, &context);
        self.errors
    }
}

/// Every operation, from the first to one that a life does not have any more.
fn each(seed: u64, fault: Fault) {
    // Each kind of fault takes others of the sample.
    let (mut after, step) = match fault {
        _ if soak() => (1, 1),
        Fault::Full | Fault::Crash => (1, STEP),
        Fault::Short => (2, STEP),
        Fault::Error => (3, STEP),
        Fault::Read => (1, READS_STEP),
    };
    let mut noticed = 0;
    loop {
        let mut life = Life::new(seed, format!("host {seed}, {fault:?} at operation {after}"));
        life.disk.fail(after, fault);
        life.live();
        let reached = life.disk.reached(fault) >= after;
        noticed += u64::from(life.end() > 0);
        if !reached {
            break;
        }
        after += step;
    }
    println!("host {seed}, {fault:?}: every {step}. of {} operations, {noticed} faults noticed", after - 1);
    // Some are not: a file that could not be removed is removed the next time, a hole that could not be found is data.
    assert!(after > 150 && noticed > 20, "{noticed} of {after}");
}

fn soak() -> bool {
    std::env::var_os("VMDR_SOAK").is_some()
}

/// Hosts of the usual run, and of one with VMDR_SOAK.
fn hosts() -> std::ops::Range<u64> {
    0..if soak() { 12 } else { 1 }
}

#[test]
fn no_space() {
    hosts().for_each(|seed| each(seed, Fault::Full));
}

#[test]
fn a_short_write() {
    hosts().for_each(|seed| each(seed, Fault::Short));
}

#[test]
fn an_io_error_or_a_sync_that_fails() {
    hosts().for_each(|seed| each(seed, Fault::Error));
}

#[test]
fn a_read_that_fails() {
    hosts().for_each(|seed| each(seed, Fault::Read));
}
