//! What happens to a guest while it is protected.

use anyhow::{Context, Result, bail};
use rand::Rng;
use rand::rngs::StdRng;
use std::time::Duration;
use vmdr_tests::oracle;
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

/// How long a guest may take to boot again.
const GUEST_LIMIT: Duration = Duration::from_secs(120);
/// How long an operator's suspend lasts at most.
const SUSPENDED_MAX: Duration = Duration::from_millis(500);
/// MAC address of the second network card.
const MAC: &str = "52:54:00:00:77:01";

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing but its own load.
    Nothing,
    /// Its reset button is pressed.
    Reset,
    /// It is reset, and has booted.
    Reboot,
    /// An operator suspends it at a random moment, and resumes it.
    Suspend,
    /// A network card is plugged in (once).
    AttachNic,
    /// A DIMM is plugged in (once), which the guest uses from then on.
    AttachMemory,
    /// The balloon takes memory from it, or gives it back.
    Balloon,
}

fn device(scene: &Scene, verb: &str, xml: &str) -> Result<()> {
    let site = scene.rig.site(At::A);
    let file = site.directory().join("device.xml");
    std::fs::write(&file, xml).context("write a device's XML")?;
    site.virsh(&[verb, &scene.guest.name, &file.to_string_lossy(), "--live"]).map(|_| ())
}

fn nic() -> String {
    format!("<interface type='bridge'><source bridge='vmbr0'/><mac address='{MAC}'/><model type='virtio'/></interface>")
}

/// Waits until the guest answers (again).
pub fn wait_up(scene: &Scene) -> Result<()> {
    let (client, address) = (scene.rig.client(), scene.guest.address);
    client.ping(address, GUEST_LIMIT).map(|_| ()).with_context(|| {
        let console = scene.guest.console(scene.rig.site(At::A));
        let tail: Vec<&str> = console.lines().rev().take(5).collect();
        format!("its console ends with {tail:?} (newest first)")
    })
}

impl Act {
    /// Does it.
    pub fn happen(self, scene: &Scene, random: &mut StdRng) -> Result<()> {
        let (site, name) = (scene.rig.site(At::A), scene.guest.name.as_str());
        match self {
            Act::Nothing => Ok(()),
            Act::Reset => site.virsh(&["reset", name]).map(|_| ()),
            Act::Reboot => {
                let before = scene.rig.client().ping(scene.guest.address, GUEST_LIMIT)?.boot;
                site.virsh(&["reset", name])?;
                wait_for("the guest to boot again", GUEST_LIMIT, || {
                    let pong = scene.rig.client().ping(scene.guest.address, Duration::from_secs(1));
                    Ok(pong.ok().filter(|pong| pong.boot != before).map(|_| ()))
                })
            }
            Act::Suspend => suspend(scene, random),
            Act::AttachNic if site.virsh(&["dumpxml", name])?.contains(MAC) => Ok(()),
            Act::AttachNic => device(scene, "attach-device", &nic()),
            Act::AttachMemory => {
                if site.virsh(&["dumpxml", name])?.contains("<memory model='dimm'") {
                    return Ok(());
                }
                let dimm = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>";
                device(scene, "attach-device", dimm)?;
                // Fresh memory comes from there first, being above 4 GiB.
                scene.rig.client().set(scene.guest.address, "churn=24", ANSWER)
            }
            Act::Balloon => {
                let mib = random.random_range(scene.guest.mem_mib * 3 / 4..=scene.guest.mem_mib);
                site.virsh(&["setmem", name, &format!("{mib}MiB"), "--live"]).map(|_| ())
            }
        }
    }
}

/// `virsh suspend` within a cut does nothing: then there is nothing to resume either.
fn suspend(scene: &Scene, random: &mut StdRng) -> Result<()> {
    let site = scene.rig.site(At::A);
    oracle::pause(site, &scene.guest)?;
    std::thread::sleep(random::below(random, SUSPENDED_MAX));
    // Two looks apart from each other tell a guest that stays suspended from one in a cut.
    let mut paused = true;
    for _ in 0..3 {
        paused &= scene.guest.state(site)? == "paused";
        std::thread::sleep(Duration::from_millis(20));
    }
    if paused {
        oracle::resume(site, &scene.guest)?;
    } else if scene.guest.state(site)? == "shut off" {
        bail!("the guest is gone");
    }
    Ok(())
}
