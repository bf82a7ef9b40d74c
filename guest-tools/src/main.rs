//! `vmdr-guest-tools`: the small static program that runs inside test guests.
//!
//! `workload` writes stamped pages all over a RAM area and stamped records to a disk in a known order, counts on the
//! console and over UDP, and checks at any time whether RAM and disk still agree with each other (see [`workload`]).
//! `daemon` keeps the guest's clock with the host's, and on request freezes file systems and changes addresses (see [`daemon`],
//! [`freeze`], [`network`]); it is for any guest, not for tests alone.
//! `job` does work of a fixed amount, for benchmarks.

mod aligned;
mod churn;
mod cli;
mod daemon;
mod disk;
mod freeze;
mod ioctl;
mod job;
mod network;
mod ram;
mod readers;
mod scratch;
mod serve;
mod stamp;
mod state;
mod variable;
mod workers;
mod workload;

use anyhow::Result;
use clap::Parser;

fn main() -> Result<()> {
    match cli::Cli::parse().command {
        cli::Command::Workload(options) => workload::run(options),
        cli::Command::Ask(options) => serve::ask(&options),
        cli::Command::Daemon(options) => daemon::run(&options),
        cli::Command::Freeze(options) => freeze::run(options),
        cli::Command::Job(options) => job::run(&options),
    }
}
