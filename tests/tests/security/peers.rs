//! Hosts that are not peers, are no longer, or not of this domain; and a flood of connections while a guest is protected.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmdr_tests::daemon::{self, Program};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random::rounds;
use vmdr_tests::rig::{At, PORT};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;

use super::{audit, failed, recorded};

/// How many connections the flood has.
const FLOOD: usize = 1000;

#[test]
fn only_paired_hosts_are_let_in_and_a_flood_keeps_nobody_out() -> Result<()> {
    let guest = GuestSpec::linux("secure").workload("--ram-mib 16 --pages 50 --interval-ms 100");
    let scene = Scene::strangers("security", guest)?;
    let (a, b) = (scene.rig.site(At::A), scene.rig.site(At::B));
    let name = scene.guest.name.as_str();
    // Not paired: nothing is protected.
    let output = daemon::vmdr_output(a, 60, &["protect", name])?;
    failed(&output, 1, "paired with no other")?;
    // A token serves once.
    let token = daemon::vmdr_json(b, &["pair"])?["token"].as_str().context("a token")?.to_owned();
    let typed = |token: &str| daemon::vmdr_typed(a, &["pair", "--with", &At::B.receiver()], token);
    failed(&typed("AAAA")?, 2, "not a token")?;
    ensure!(typed(&token)?.status.success(), "the first pairing");
    failed(&typed(&token)?, 1, "used already")?;
    let records = audit(b, Program::Receiver)?;
    ensure!(recorded(&records, "pair", "done", &["token"]), "{records:?}");
    ensure!(recorded(&records, "pair", "refused", &["used already"]), "{records:?}");
    ensure!(!records.iter().any(|record| record.to_string().contains(&token)), "the token is in the log");

    scene.protect(&["--interval", "200ms"])?;
    scene.wait_durable()?;
    // Another certificate at both ends: the stream goes on, and no epoch is lost.
    let before = scene.status_number(At::A, "durable_epoch")?;
    daemon::vmdr(a, &["peers", "rotate"])?;
    daemon::vmdr(b, &["peers", "rotate"])?;
    let after = scene.wait_durable()?;
    ensure!(after as f64 > before, "epoch {after} after {before}");
    ensure!(scene.status(At::A)?["state"] == "protected", "after the rotation: {}", scene.status(At::A)?);

    flood(&scene)?;

    // Revoked where it is received: the stream ends, and comes back with another pairing, at the epoch it was at.
    let peer = daemon::vmdr_json(b, &["peers"])?["peers"][0]["id"].as_str().context("a peer")?.to_owned();
    daemon::vmdr(b, &["peers", "revoke", &peer[..12]])?;
    wait_for("the link to end", ANSWER, || Ok((scene.status(At::A)?["state"] == "disconnected").then_some(())))?;
    wait_for("a refusal", ANSWER, || {
        Ok(recorded(&audit(b, Program::Receiver)?, "connect", "refused", &["is revoked"]).then_some(()))
    })?;
    scene.pair()?;
    scene.wait_durable()?;
    let records = audit(b, Program::Receiver)?;
    ensure!(recorded(&records, "Revoke", "done", &["uid 0"]), "{records:?}");
    for site in [a, b] {
        daemon::vmdr(site, &["audit", "verify"])?;
    }
    scene.rig.client().self_check(scene.guest.address)?;
    scene.rig.finish()
}

/// Opens many connections that say nothing, or a byte now and then, while epochs go on becoming durable.
fn flood(scene: &Scene) -> Result<()> {
    let address = SocketAddr::from((At::B.address(), PORT));
    let client = scene.rig.client();
    let begun = Instant::now();
    let mut open: Vec<TcpStream> = Vec::new();
    let limit = Duration::from_secs(5);
    while open.len() < FLOOD {
        let made = client.inside(|| {
            (0..50).map(|_| TcpStream::connect_timeout(&address, limit).context("connect")).collect::<Result<Vec<_>>>()
        })?;
        open.extend(made);
    }
    for _ in 0..rounds(5, 60) {
        for stream in &mut open {
            // Those that were turned away say so here.
            let _ = std::io::Write::write(stream, &[22]);
        }
        scene.wait_durable()?;
    }
    println!("{FLOOD} connections, {:.1} s, the guest stayed protected", begun.elapsed().as_secs_f64());
    let records = audit(scene.rig.site(At::B), Program::Receiver)?;
    ensure!(recorded(&records, "connect", "refused", &["too many connections"]), "{records:?}");
    Ok(())
}
