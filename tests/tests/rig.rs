//! The rig itself: two sites come up, guests boot and answer, the link can be cut, and nothing stays.

use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use vmdr_tests::client::{Check, Client, WORKLOAD_TCP_PORT};
use vmdr_tests::exec;
use vmdr_tests::guest::{GuestSpec, Kind};
use vmdr_tests::oracle;
use vmdr_tests::relay::Shape;
use vmdr_tests::rig::{At, PORT, RELAY_ADDRESS, Rig};
use vmdr_tests::wait::wait_for;

const ANSWER: Duration = Duration::from_secs(20);

/// Processes, mounts and network devices that belong to no site.
fn census() -> Result<(usize, usize, String)> {
    let own = exec::descendants(std::process::id()).len();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?.lines().count();
    let links = exec::run(std::process::Command::new("ip").args(["-br", "link"]))?;
    Ok((own, mounts, links))
}

#[test]
fn two_sites_come_up_a_guest_answers_across_and_nothing_stays() -> Result<()> {
    let before = census()?;
    let rig = Rig::new("rig-guest")?;
    let directory = rig.directory().to_owned();
    let guest = GuestSpec::linux("counter").workload("--ram-mib 16 --pages 50 --readers 1 --print-every 1");
    guest.boot(rig.site(At::A))?;
    assert_eq!(rig.site(At::B).virsh(&["list", "--all", "--name"])?.trim(), "", "B has a libvirtd of its own");

    let client = rig.client();
    let first = client.ping(guest.address, ANSWER)?;
    assert_eq!(first.check, Check::None);
    client.wait_tick(guest.address, first.tick + 5, ANSWER)?;
    let checked = client.self_check(guest.address)?;
    assert!(matches!(client.ping(guest.address, ANSWER)?.check, Check::Ok(tick) if tick == checked));
    client.set(guest.address, "pages=0 records=0", ANSWER)?;
    let idle = client.wait_tick(guest.address, checked + 5, ANSWER)?;
    let later = client.wait_tick(guest.address, idle.tick + 5, ANSWER)?;
    assert_eq!((idle.writes, idle.acknowledged, idle.boot), (later.writes, later.acknowledged, later.boot));

    let mut stream = client.tcp(SocketAddr::from((guest.address, WORKLOAD_TCP_PORT)), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    std::io::Write::write_all(&mut stream, b"hello\n")?;
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut answer)?;
    assert!(answer.starts_with("1 tick=") && answer.ends_with(" hello\n"), "{answer}");

    // The two independent ways of reading memory agree, and see a guest that ran in between.
    let site = rig.site(At::A);
    oracle::pause(site, &guest)?;
    let blocks = oracle::ram_blocks(site, &guest)?;
    let main = blocks.iter().find(|block| block.name == "pc.ram").context("find pc.ram")?;
    let physical = oracle::pmemsave(site, &guest)?;
    assert_eq!(oracle::differing_pages(&physical, &oracle::read_block(site, &guest, main)?), Vec::<u64>::new());
    oracle::resume(site, &guest)?;
    client.wait_tick(guest.address, later.tick + 5, ANSWER)?;
    oracle::pause(site, &guest)?;
    assert!(!oracle::differing_pages(&physical, &oracle::pmemsave(site, &guest)?).is_empty());

    rig.finish()?;
    assert!(!directory.exists());
    assert_eq!(census()?, before);
    Ok(())
}

#[test]
fn the_link_can_be_cut_both_ways_and_one_way_and_slowed() -> Result<()> {
    let rig = Rig::new("rig-link")?;
    let inside = |at: At| Ok::<_, anyhow::Error>(Client::new(rig.site(at).namespace()?.pid1()));
    let sockets = [inside(At::A)?.udp(9999)?, inside(At::B)?.udp(9999)?];
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    }
    let counter = AtomicU64::new(0);
    // Whether a datagram gets from one site to the other.
    let arrives = |from: At| {
        let text = counter.fetch_add(1, Relaxed).to_string();
        let to = (from.other().address(), 9999);
        let sent = sockets[from as usize].send_to(text.as_bytes(), to);
        let mut buffer = [0; 64];
        sent.is_ok()
            && loop {
                match sockets[from.other() as usize].recv(&mut buffer) {
                    Ok(bytes) if buffer[..bytes] == *text.as_bytes() => break true,
                    Ok(_) => {}
                    Err(_) => break false,
                }
            }
    };
    for at in At::ALL {
        wait_for("the link", ANSWER, || Ok(arrives(at).then_some(())))?;
    }

    rig.set_link(false)?;
    assert!(!arrives(At::A) && !arrives(At::B), "cut both ways");
    rig.set_link(true)?;
    for at in At::ALL {
        wait_for("the link again", ANSWER, || Ok(arrives(at).then_some(())))?;
    }

    rig.set_deaf(At::A, true)?;
    assert!(arrives(At::A) && !arrives(At::B), "cut from B to A only");
    rig.set_deaf(At::A, false)?;
    assert!(arrives(At::A) && arrives(At::B), "open again");

    // Through the relay: slowed, stalled, broken.
    let relay = rig.relay(At::B, Shape { delay: Duration::from_millis(100), bytes_per_second: 0 })?;
    let listener = inside(At::B)?.listen(SocketAddr::from((At::B.address(), PORT)))?;
    std::thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        std::io::copy(&mut &stream, &mut &stream)
    });
    let to = SocketAddr::from((RELAY_ADDRESS, PORT));
    let mut stream = rig.client().tcp(to, ANSWER)?;
    let mut echo = |text: &[u8], limit: Duration| -> Result<Duration> {
        let begun = std::time::Instant::now();
        stream.set_read_timeout(Some(limit))?;
        std::io::Write::write_all(&mut stream, text)?;
        std::io::Read::read_exact(&mut stream, &mut vec![0; text.len()])?;
        Ok(begun.elapsed())
    };
    assert!(echo(b"slow", ANSWER)? >= Duration::from_millis(200), "100 ms each way");
    relay.stall(true);
    assert!(echo(b"held", Duration::from_millis(500)).is_err(), "nothing passes while stalled");
    relay.stall(false);
    assert!(relay.passed() >= 8);
    relay.reset();
    assert!(
        wait_for("the break", ANSWER, || Ok(echo(b"gone", Duration::from_millis(500)).is_err().then_some(()))).is_ok()
    );
    drop(relay);
    rig.finish()
}

#[test]
fn a_site_dies_at_once_and_comes_back_with_its_files() -> Result<()> {
    let mut rig = Rig::new("rig-kill")?;
    let guest = GuestSpec::bare_metal("metal", std::fs::File::open("/dev/kvm").is_ok());
    guest.boot(rig.site(At::A))?;
    if let Kind::BareMetal { kvm: true, .. } = guest.kind {
        let used = oracle::hmp(rig.site(At::A), &guest, "info kvm")?;
        assert!(used.contains("enabled"), "{used}");
    }
    let qemu = rig.site(At::A).qemu(&guest.name)?;
    let processes = rig.site(At::A).processes();
    assert!(processes.contains(&qemu));
    rig.kill_site(At::A)?;
    assert!(processes.iter().all(|pid| !exec::alive(*pid)), "all are gone at once");
    assert!(rig.site(At::A).virsh(&["list"]).is_err(), "nothing answers");

    rig.boot_site(At::A)?;
    assert_eq!(guest.state(rig.site(At::A))?, "shut off", "defined still, running no more");
    guest.start(rig.site(At::A))?;
    guest.expect_running(rig.site(At::A))?;
    rig.finish()
}

/// The process that made a rig dies by SIGKILL: everything of it goes, and the next rig removes its directory.
#[test]
fn nothing_survives_the_rigs_own_process() -> Result<()> {
    const MARK: &str = "VMDR_RIG_TEST_CHILD";
    if let Some(mark) = std::env::var_os(MARK) {
        // Here runs the child, which is killed in this sleep.
        let rig = Rig::new("rig-child")?;
        let site = rig.site(At::A);
        site.run("bash", &["-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 &"])?;
        let pids: Vec<String> =
            At::ALL.iter().flat_map(|at| rig.site(*at).processes()).map(|pid| pid.to_string()).collect();
        std::fs::write(&mark, format!("{}\n{}\n", rig.directory().display(), pids.join(" ")))?;
        std::thread::sleep(Duration::from_secs(600));
        return Ok(());
    }
    let mark = tempfile::NamedTempFile::new()?;
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "nothing_survives_the_rigs_own_process", "--nocapture"])
        .env(MARK, mark.path())
        .spawn()?;
    let said = wait_for("the child's rig", Duration::from_secs(120), || {
        let text = std::fs::read_to_string(mark.path())?;
        Ok((text.lines().count() == 2).then_some(text))
    });
    child.kill()?;
    child.wait()?;
    let said = said?;
    let mut lines = said.lines();
    let directory = lines.next().unwrap_or_default().to_owned();
    let pids: Vec<u32> = lines.next().unwrap_or_default().split(' ').filter_map(|pid| pid.parse().ok()).collect();
    assert!(pids.len() >= 6, "two of pid 1, virtlogd, libvirtd, and the sleep: {pids:?}");
    wait_for("the end of what the child started", Duration::from_secs(30), || {
        Ok(pids.iter().all(|pid| !exec::alive(*pid)).then_some(()))
    })?;
    assert!(std::path::Path::new(&directory).exists());
    Rig::new("rig-after")?.finish()?;
    assert!(!std::path::Path::new(&directory).exists());
    Ok(())
}
