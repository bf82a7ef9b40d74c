//! The whole of it: protect, lose the site, activate, and the same guest goes on.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use vmdr_tests::client::WORKLOAD_TCP_PORT;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};

#[test]
fn a_guest_goes_on_at_the_second_site_after_the_first_was_killed() -> Result<()> {
    let guest = GuestSpec::linux("web1").workload("--ram-mib 48 --pages 100 --interval-ms 50 --readers 1");
    let mut scene = Scene::new("e2e-activate", guest)?;
    let address = scene.guest.address;
    let client = scene.rig.client().clone();
    let begun = client.ping(address, ANSWER)?;

    scene.protect(&["--interval", "100ms"])?;
    // A connection that is open, and quiet, when the site is lost.
    let stream = client.tcp(SocketAddr::from((address, WORKLOAD_TCP_PORT)), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut say = |line: &str| -> Result<String> {
        (&stream).write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        lines.read_line(&mut answer)?;
        Ok(answer)
    };
    assert!(say("before")?.starts_with("1 tick="));
    // A full round of the RAM area, so that every page was written while protected.
    let pages = 48 * 256;
    vmdr_tests::wait::wait_for("a round of writes", 4 * ANSWER, || {
        Ok((client.ping(address, ANSWER)?.writes > begun.writes + pages).then_some(()))
    })?;
    scene.guest.expect_running(scene.rig.site(At::A))?;

    let seen = client.ping(address, ANSWER)?;
    assert_eq!(seen.boot, begun.boot, "the guest was not restarted by being protected");
    let durable = scene.wait_durable()?;
    scene.lose_site_a()?;
    assert!(client.ping(address, std::time::Duration::from_secs(1)).is_err(), "the guest is gone with its site");

    let report = scene.activate()?;
    let epoch = report["point"]["epoch"].as_u64().context("the report names the epoch")?;
    assert!(epoch >= durable, "epoch {durable} had been acknowledged, {epoch} was activated: {report}");
    let after = client.ping(address, ANSWER)?;
    assert_eq!(after.boot, begun.boot, "resumed, not booted");
    assert!(after.tick >= seen.tick, "tick {} had been durable, it went on from {}", seen.tick, after.tick);
    client.self_check(address).context("RAM and disk at the second site")?;
    let on = client.wait_tick(address, after.tick + 20, ANSWER)?;
    assert!(on.acknowledged > after.acknowledged, "it writes its disk");
    client.self_check(address).context("RAM and disk after going on")?;
    assert!(say("after")?.starts_with("2 tick="), "the connection is still open, and the count goes on");

    // Again: nothing is started twice.
    let again = scene.activate()?;
    assert_eq!(again["was_active"], true, "{again}");
    assert_eq!(scene.rig.site(At::B).processes_named("qemu-system-x86_64").len(), 1);
    client.wait_tick(address, on.tick + 10, ANSWER)?;
    scene.rig.finish()
}
