//! Hosts that are not peers, are no longer, or not of this domain; and a flood of connections while a guest is protected.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use vmdr_agent::link::Questions;
use vmdr_audit::Audit;
use vmdr_proto::replication::{
    DescribeRequest, GiveBackRequest, HashesRequest, OwnerRequest, ProbeRequest, ReverseRequest, SettleRequest,
    hashes_request,
};
use vmdr_tests::daemon::{self, Program};
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::random::rounds;
use vmdr_tests::rig::{At, PORT};
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;
use vmdr_trust::{Identity, Trust};

use super::{audit, failed, recorded};

/// How many connections the flood has.
const FLOOD: usize = 1000;

#[test]
fn only_paired_hosts_are_let_in_and_a_flood_keeps_nobody_out() -> Result<()> {
    let guest = GuestSpec::linux("secure").workload("--ram-mib 16 --pages 50 --interval-ms 100");
    let mut scene = Scene::strangers("security", guest)?;
    let (a, b) = (scene.rig.site(At::A), scene.rig.site(At::B));
    let name = &scene.guest.name.clone();
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
    // A connection that shows the new ones goes on with the next epoch: the receiver takes none without the one before.
    let sent = scene.status_number(At::A, "durable_epoch")?;
    scene.start_receiver()?;
    let (a, b) = (scene.rig.site(At::A), scene.rig.site(At::B));
    let again = scene.wait_durable()?;
    ensure!(again as f64 > sent, "epoch {again} after {sent}");
    let points = daemon::vmdr_json(b, &["points", name])?;
    ensure!(points["points"][0]["generation"] == 1, "{points}");

    flood(&scene)?;
    refused_hosts(&scene)?;

    // Revoked where it is received: the stream ends, and comes back with another pairing, at the epoch it was at.
    let peer = daemon::vmdr_json(a, &["peers"])?["id"].as_str().context("site A's own id")?.to_owned();
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

/// Hosts that must not get at anything, from a place of their own in the network; the receiver's audit log says so of each.
fn refused_hosts(scene: &Scene) -> Result<()> {
    let b = scene.rig.site(At::B);
    let identity = |site: At| scene.rig.site(site).path(vmdr_trust::DIRECTORY);
    let directory = tempfile::tempdir().context("a directory for other hosts")?;
    let uuid = scene.status(At::A)?["uuid"].as_str().context("a uuid")?.to_owned();
    let wait_recorded = |act: &str, words: &[&str]| {
        wait_for(&format!("the record of {act}, {words:?}"), ANSWER, || {
            Ok(recorded(&audit(b, Program::Receiver)?, act, "refused", words).then_some(()))
        })
    };

    // Site A's identity as a thief has it: what it shows has expired, or is not good yet.
    let stolen = directory.path().join("stolen");
    exec::run(Command::new("cp").arg("-a").args([&identity(At::A), &stolen]))?;
    let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 3600));
    for (from, until, word) in [(now - 3 * day, now - day, "expired"), (now + day, now + 2 * day, "not valid yet")] {
        Identity::open(&stolen)?.issue(from, until)?;
        let answer = describe(scene, &stolen, &uuid)?;
        ensure!(answer.is_err(), "a certificate that is {word}: {answer:?}");
        wait_recorded("connect", &["the certificate of", word])?;
    }

    // A host that knows this one and calls itself site-a, with an authority of its own.
    let stranger = directory.path().join("stranger");
    Identity::open(&stranger)?;
    exec::run(Command::new("cp").arg("-a").arg(identity(At::A).join("peers")).arg(&stranger))?;
    let answer = describe(scene, &stranger, &uuid)?;
    ensure!(answer.is_err(), "another authority: {answer:?}");
    wait_recorded("connect", &["is of no peer of this host"])?;

    // A peer, and not of this domain.
    let third = directory.path().join("third");
    vmdr_trust::introduce((&identity(At::B), "site-b", &[At::B.receiver()]), (&third, "site-c", &[]))?;
    let versions = ask(scene, &third, async |questions| questions.probe(ProbeRequest::default()).await)?;
    ensure!(versions.is_ok(), "it is let in: {versions:?}");
    let asked: [(&str, Result<(), String>); 7] = [
        ("Describe", describe(scene, &third, &uuid)?),
        ("Hashes", {
            let of = Some(hashes_request::Of::RamBlock(0));
            let request = HashesRequest { domain_uuid: uuid.clone(), units: 1, of, ..HashesRequest::default() };
            ask(scene, &third, async |questions| questions.hashes(request).await.map(drop))?
        }),
        ("Probe", {
            let request = ProbeRequest { domain_uuid: uuid.clone(), ..ProbeRequest::default() };
            ask(scene, &third, async |questions| questions.probe(request).await.map(drop))?
        }),
        ("Owner", {
            let request = OwnerRequest { domain_uuid: uuid.clone(), plan: true };
            ask(scene, &third, async |questions| questions.owner(request).await.map(drop))?
        }),
        ("Settle", {
            let request = SettleRequest { domain_uuid: uuid.clone(), generation: 9, ..SettleRequest::default() };
            ask(scene, &third, async |questions| questions.settle(request).await.map(drop))?
        }),
        ("GiveBack", {
            let request = GiveBackRequest { domain_uuid: uuid.clone(), generation: 1 };
            ask(scene, &third, async |questions| questions.give_back(request).await.map(drop))?
        }),
        ("Reverse", {
            let request = ReverseRequest { domain_uuid: uuid.clone(), generation: 9, ..ReverseRequest::default() };
            ask(scene, &third, async |questions| questions.reverse(request).await.map(drop))?
        }),
    ];
    for (act, answer) in asked {
        let refusal = answer.err().with_context(|| format!("{act} by a peer whose domain it is not"))?;
        ensure!(refusal.contains("does not belong to this host"), "{act}: {refusal}");
        wait_recorded(act, &["site-c", &uuid])?;
    }
    scene.wait_durable()?;
    Ok(())
}

fn describe(scene: &Scene, host: &Path, uuid: &str) -> Result<Result<(), String>> {
    let request = DescribeRequest { domain_uuid: uuid.to_owned() };
    ask(scene, host, async |questions| questions.describe(request).await.map(drop))
}

/// Asks the receiver something as the host whose identity lies in a directory, with the agent's own code.
fn ask<T: Send>(
    scene: &Scene,
    host: &Path,
    question: impl AsyncFnOnce(&mut Questions) -> Result<T, String> + Send,
) -> Result<Result<T, String>> {
    let audit = Audit::open(&host.with_extension("audit"), "agent")?;
    let trust = Trust::open(host, audit)?;
    scene.rig.client().inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
        Ok(runtime.block_on(async {
            let mut questions = Questions::connect(&trust, &At::B.receiver()).await?;
            question(&mut questions).await
        }))
    })
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
