//! `vmdr-guest-tools`: the small static program that runs inside test guests.
//!
//! `workload` writes stamped pages all over a RAM area and stamped records to a disk in a known order, counts on the
//! console and over UDP, and checks at any time whether RAM and disk still agree with each other (see [`workload`]).

mod aligned;
mod cli;
mod disk;
mod ram;
mod readers;
mod serve;
mod stamp;
mod state;
mod workload;

use anyhow::Result;
use clap::Parser;

fn main() -> Result<()> {
    match cli::Cli::parse().command {
        cli::Command::Workload(options) => workload::run(options),
        cli::Command::Ask(options) => serve::ask(&options),
    }
}
