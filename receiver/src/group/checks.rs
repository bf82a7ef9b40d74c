//! Whether a member of a group is ready: the readiness checks of the recovery plan, made of the guest that was activated.
//!
//! Each try runs on a thread of its own, in the network namespace that the plan names; one that does not end (a name server that does
//! not answer) is waited for by the tries after it, so that there is never more than one of a check.

use std::fs::File;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver as Answer, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;
use uuid::Uuid;
use vmdr_hypervisor::xml::Element;
use vmdr_plan::{Hook, OnFailure, Ready, ReadyCheck};

use crate::activate::host::LocalHost;
use crate::activate::mapping::Mapping;
use crate::daemon::Receiver;
use crate::ready::{self, Checked, Found, Tries};
use crate::recovery::applied::Applied;
use crate::recovery::hooks;

/// Where `ip netns` has the network namespaces of a host.
const NAMESPACES: &str = "/run/netns";
/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 4;
/// How long a try of a connection may take, its name looked up included.
const CONNECTION: Duration = Duration::from_secs(8);
/// How long after its time a program may take to be gone.
const GRACE: Duration = Duration::from_secs(5);
/// What its QEMU guest agent is asked: a backup may have frozen the guest, and a look changes nothing.
const PING: &str = "guest-ping";
/// Between two looks whether the receiver ends.
const LOOK: Duration = Duration::from_millis(200);

/// The file of a named network namespace.
pub fn namespace(name: &str) -> PathBuf {
    Path::new(NAMESPACES).join(name)
}

/// The receiver ends: it goes on with the next.
#[derive(Debug)]
pub struct Ending;

/// A guest that runs here.
pub struct Subject<'a> {
    /// Whose libvirt it is of.
    pub receiver: &'a Receiver,
    /// The domain.
    pub uuid: Uuid,
    /// What programs are told.
    pub environment: Vec<(&'static str, String)>,
}

impl Subject<'_> {
    /// Makes one check.
    pub fn check(&self, ready: &Ready) -> Result<Checked, Ending> {
        let tries = Tries {
            limit: Duration::from_secs(ready.timeout_seconds),
            interval: Duration::from_secs(ready.interval_seconds),
            retries: ready.retries,
        };
        let mut trying = Trying::default();
        ready::try_until(&ready.shown(), tries, &mut |time| self.rest(time), &mut |_, left| {
            Ok(match &ready.check {
                ReadyCheck::Heartbeat => {
                    let (uri, uuid) = (self.receiver.config.libvirt_uri.clone(), self.uuid);
                    trying.turn(CONNECTION, None, move || heartbeat(&uri, uuid))
                }
                ReadyCheck::Tcp(to) => {
                    let to = to.clone();
                    trying.turn(CONNECTION, place(ready), move || connect(&to))
                }
                ReadyCheck::Command(argv) => {
                    let seconds = left.as_secs().max(1);
                    let hook = Hook { argv: argv.clone(), timeout_seconds: seconds, on_failure: OnFailure::Abort };
                    let environment = self.environment.clone();
                    let limit = Duration::from_secs(seconds) + GRACE;
                    trying.turn(limit, place(ready), move || match hooks::run_one("ready", &hook, &environment) {
                        Ok(()) => Found::Passed("it ended with 0".to_owned()),
                        Err(error) => Found::NotYet(error),
                    })
                }
            })
        })
    }

    fn rest(&self, time: Duration) -> Result<(), Ending> {
        let until = Instant::now() + time;
        while !self.receiver.is_ending() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK));
        }
        Err(Ending)
    }
}

/// What programs are told of a domain that was activated: as hooks are.
pub fn environment(
    receiver: &Receiver,
    (uuid, name): (Uuid, &str),
    mapping: &Mapping,
    point: &str,
    generation: u64,
) -> Vec<(&'static str, String)> {
    let stored = receiver.store.recovery_point(&uuid.to_string()).ok();
    // Without a definition it is told less.
    let original = stored.and_then(|point| Element::parse(&point.domain_xml).ok());
    let original = original.unwrap_or_else(|| Element::new("domain"));
    let active = receiver.active_directory(uuid);
    Applied { uuid, name, mapping, original, active, boots: false }.environment(point, Some(generation))
}

fn place(ready: &Ready) -> Option<PathBuf> {
    ready.namespace.as_ref().map(|name| namespace(&name.value))
}

fn heartbeat(uri: &str, uuid: Uuid) -> Found {
    let ask = || -> Result<Found, vmdr_hypervisor::Error> {
        let host = LocalHost::connect(uri)?;
        let domain = || host.connection().domain_by_uuid(&uuid);
        let (ports, _) = ready::ports(&domain()?.live_xml()?, &[]);
        let mut last = Found::NotYet("nobody in the guest has opened a channel to this host".to_owned());
        for port in ports {
            last = ready::heartbeat(domain(), &port, PING);
            if matches!(last, Found::Passed(_)) {
                break;
            }
        }
        Ok(last)
    };
    ask().unwrap_or_else(|error| Found::NotYet(error.to_string()))
}

fn connect(to: &str) -> Found {
    let addresses: Vec<SocketAddr> = match to.to_socket_addrs() {
        Ok(addresses) => addresses.take(ADDRESSES_MAX).collect(),
        Err(error) => return Found::NotYet(format!("{to}: {error}")),
    };
    let mut last = Found::NotYet(format!("{to}: its name has no address"));
    for address in addresses {
        last = ready::connect(address);
        if matches!(last, Found::Passed(_)) {
            break;
        }
    }
    last
}

/// The try of a check that is under way.
#[derive(Default)]
struct Trying {
    under_way: Option<Answer<Found>>,
}

impl Trying {
    /// What a try finds, begun now unless the last one has not ended.
    fn turn(
        &mut self,
        wait: Duration,
        namespace: Option<PathBuf>,
        one: impl FnOnce() -> Found + Send + 'static,
    ) -> Found {
        let answer = match self.under_way.take() {
            Some(answer) => answer,
            None => {
                let (give, answer) = sync_channel(1);
                let thread = std::thread::Builder::new().name("vmdr-ready".to_owned()).spawn(move || {
                    let found = namespace.as_deref().map_or(Ok(()), enter).map_or_else(Found::NotYet, |()| one());
                    // Nobody waits any more: the check's time is over.
                    let _ = give.send(found);
                });
                if let Err(error) = thread {
                    return Found::NotYet(format!("start a thread for it: {error}"));
                }
                answer
            }
        };
        match answer.recv_timeout(wait) {
            Ok(found) => found,
            Err(RecvTimeoutError::Disconnected) => Found::NotYet("the try has ended without an answer".to_owned()),
            Err(RecvTimeoutError::Timeout) => {
                self.under_way = Some(answer);
                Found::NotYet(format!("a try has not ended within {} s", wait.as_secs()))
            }
        }
    }
}

/// Moves this thread, and the programs that it starts, into a network namespace.
fn enter(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| format!("open the network namespace {shown}: {error}"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| format!("enter the network namespace {shown}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_port_is_found_open_by_name_or_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(matches!(connect(&format!("127.0.0.1:{port}")), Found::Passed(_)));
        assert!(matches!(connect(&format!("localhost:{port}")), Found::Passed(_)));
        drop(listener);
        let Found::NotYet(said) = connect(&format!("127.0.0.1:{port}")) else { panic!("nobody listens") };
        assert!(said.contains("refused"), "{said}");
    }

    #[test]
    fn a_try_that_hangs_is_waited_for_and_not_begun_again() {
        let begun = Arc::new(AtomicUsize::new(0));
        let mut trying = Trying::default();
        let (let_go, held) = sync_channel::<()>(0);
        let of = Arc::clone(&begun);
        let first = trying.turn(Duration::from_millis(50), None, move || {
            of.fetch_add(1, Ordering::SeqCst);
            let _ = held.recv();
            Found::Passed("late".to_owned())
        });
        assert!(matches!(first, Found::NotYet(said) if said.contains("has not ended")));
        drop(let_go);
        let of = Arc::clone(&begun);
        let second = trying.turn(Duration::from_secs(60), None, move || {
            of.fetch_add(1, Ordering::SeqCst);
            Found::Failed("another".to_owned())
        });
        assert_eq!((second, begun.load(Ordering::SeqCst)), (Found::Passed("late".to_owned()), 1));
    }

    #[test]
    fn a_namespace_that_is_not_there_is_said() {
        let gone = namespace("vmdr-no-such-namespace");
        let found = Trying::default().turn(Duration::from_secs(60), Some(gone), || Found::Passed(String::new()));
        assert!(matches!(found, Found::NotYet(said) if said.contains("open the network namespace /run/netns/vmdr-no")));
    }
}
