//! An activated guest writes again, whatever the moment of its cut.
//!
//! File systems that the QEMU guest agent has frozen for an application-consistent point are frozen in the checkpoint too, and
//! in those cut shortly before and after; it never thaws by itself, and who would have asked it to is gone with the other
//! site. So each guest that has one is asked to thaw, which does nothing where nothing is frozen. (vmdr's own tools in a guest
//! thaw by themselves.) Beside the activation: nobody waits for it.

use std::time::{Duration, Instant};

use uuid::Uuid;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel};
use vmdr_hypervisor::libvirt::{Connection, Domain};

/// How long one question may take, in libvirt's whole seconds.
const ANSWER_SECONDS: i32 = 5;
/// For how long a guest that runs is asked: its agent may need a moment on a busy host.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two questions.
const REST: Duration = Duration::from_millis(500);

/// Asks on a thread of its own.
pub fn begin(uri: &str, uuid: Uuid, name: &str) {
    let (uri, of) = (uri.to_owned(), name.to_owned());
    let spawned = std::thread::Builder::new().name("thaw".to_owned()).spawn(move || match ask(&uri, &uuid) {
        Ok(Some(0) | None) => {}
        Ok(Some(count)) => tracing::info!(domain = of, count, "thawed file systems that were frozen at the cut"),
        Err(error) => tracing::warn!(
            domain = of,
            "its guest agent could not be asked to thaw ({error}): if the guest stands still, `virsh domfsthaw {of}`"
        ),
    });
    if let Err(error) = spawned {
        tracing::warn!(domain = name, %error, "cannot ask its guest agent to thaw");
    }
}

/// How many file systems were thawed; nothing if there is no agent to be asked.
fn ask(uri: &str, uuid: &Uuid) -> Result<Option<u64>, Error> {
    let domain = || -> Result<Domain, Error> { Connection::open(uri)?.domain_by_uuid(uuid) };
    let until = Instant::now() + LIMIT;
    loop {
        let asked = domain().and_then(|domain| match channel(&domain.live_xml()?, GUEST_AGENT_CHANNEL) {
            Some(_) => domain.guest_agent("guest-fsfreeze-thaw", ANSWER_SECONDS).map(Some),
            None => Ok(None),
        });
        match asked {
            Ok(answer) => return Ok(answer.map(|count| count.as_u64().unwrap_or(0))),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => std::thread::sleep(REST),
        }
    }
}
