//! The tick loop: for every tick, first the RAM pages, then record N on the disk and its fsync, then RAM says "N is on the
//! disk". Whatever instant a copy of RAM and disk is taken at, it must satisfy the self-check when it runs again.

use crate::churn::Churn;
use crate::cli::Workload;
use crate::disk::Disk;
use crate::ram::Ram;
use crate::readers;
use crate::scratch::Scratch;
use crate::serve;
use crate::state::State;
use crate::variable::Variable;
use crate::workers::Workers;
use anyhow::{Context, Result};
use std::io::Write;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

/// Runs the workload until the process is killed.
pub fn run(options: Workload) -> Result<()> {
    let state = Arc::new(State::new(&options));
    let mut ram = Ram::new(options.ram_mib << 20, options.seed, options.fill_bytes)?;
    let mut disk = None;
    let mut workers = Workers::default();
    if let Some(path) = &options.disk {
        let opened = Disk::open(path, &options)?;
        state.acknowledged.store(opened.acknowledged(), SeqCst);
        disk = Some(opened);
        readers::start(path, &options, &mut workers)?;
    }
    for (number, path) in options.scratch.iter().enumerate() {
        let scratch = Scratch::open(path, options.seed.wrapping_add(number as u64))?;
        workers.start(&format!("scratch{number}"), scratch)?;
    }
    if options.variable {
        workers.start("variable", Variable::open()?)?;
    }
    workers.start("churn", Churn::new(&state))?;
    serve::start(&options, &state)?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("bind a UDP socket")?;
    say(&format!("workload ready ram_mib={} pages={}", options.ram_mib, options.pages));
    for tick in 1.. {
        let begun = Instant::now();
        ram.write(u64::from(state.pages.load(SeqCst)));
        state.writes.store(ram.writes(), SeqCst);
        if let (Some(disk), true) = (&mut disk, state.records.load(SeqCst)) {
            match disk.write_next() {
                Ok(record) => state.acknowledged.store(record, SeqCst),
                Err(error) => {
                    // Counting goes on, so that the outside still learns what happened.
                    state.records.store(false, SeqCst);
                    say(&format!("selfcheck FAILED {error:#}"));
                    state.finish_check(Err(error));
                }
            }
        }
        state.tick.store(tick, SeqCst);
        if let Some(address) = options.udp {
            // A counter that got lost is followed by the next.
            let _ = socket.send_to(format!("tick {tick} boot={}", state.boot).as_bytes(), address);
        }
        if options.print_every != 0 && tick % options.print_every == 0 {
            say(&format!("tick {tick} acknowledged {}", state.acknowledged.load(SeqCst)));
        }
        let due = options.check_every != 0 && tick % options.check_every == 0;
        if state.take_check_request() || due {
            check(&state, &ram, &mut disk, &workers);
        }
        let interval = Duration::from_millis(u64::from(state.interval_ms.load(SeqCst)));
        thread::sleep(interval.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

fn check(state: &State, ram: &Ram, disk: &mut Option<Disk>, workers: &Workers) {
    let result = ram.check().and_then(|()| disk.as_mut().map_or(Ok(()), Disk::check)).and_then(|()| workers.check());
    let check = state.finish_check(result);
    say(&match check.failure {
        None => format!("selfcheck ok tick={}", check.tick),
        Some(reason) => format!("selfcheck FAILED {reason}"),
    });
}

/// A line on the console, whole and at once. A console that cannot be written to must not end the workload.
fn say(line: &str) {
    let mut console = std::io::stdout().lock();
    let _ = writeln!(console, "{line}");
    let _ = console.flush();
}
