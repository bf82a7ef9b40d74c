//! Brings the two sites up with a guest at site A, says how to enter them, and ends them when Enter is pressed.
//! For looking at things by hand; without arguments with both daemons, with `--bare` without.

use anyhow::{Context, Result, bail};
use vmdr_tests::daemon::{Daemon, Program, binary};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::{At, Rig};

fn main() -> Result<()> {
    let daemons = match std::env::args().nth(1).as_deref() {
        None => true,
        Some("--bare") => false,
        Some(other) => bail!("unknown argument {other}; vmdr-rig [--bare]"),
    };
    let rig = Rig::new("by-hand")?;
    let mut running = Vec::new();
    if daemons {
        running.push(Daemon::start(rig.site(At::B), Program::Receiver, "")?);
        let config = format!("receiver = \"{}\"\n", At::B.receiver());
        running.push(Daemon::start(rig.site(At::A), Program::Agent, &config)?);
    }
    let guest = GuestSpec::linux("web1").workload("--ram-mib 48 --pages 100 --interval-ms 50");
    guest.boot(rig.site(At::A))?;
    println!("guest web1 ({}) runs at site A; vmdr is {}", guest.address, binary("vmdr")?.display());
    for at in At::ALL {
        let site = rig.site(at);
        let pid1 = site.namespace()?.pid1();
        println!(
            "{}: nsenter -t {pid1} --mount --net --pid -- bash    files: {}",
            site.name(),
            site.directory().display()
        );
    }
    println!("Enter ends both.");
    std::io::stdin().read_line(&mut String::new()).context("wait for Enter")?;
    rig.finish()
}
