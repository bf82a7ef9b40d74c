//! `vmdr-bench`: what vmdr costs, as ratios.
//!
//! Every figure stands beside a floor that was measured in the same run, in turn with it: a busy or slow machine moves both. A
//! benchmark prints a table, or JSON with a version field; only with `--check` a missed bar is a failure.

mod figures;
mod machine;
mod overhead;
mod pause;
mod pipeline;
mod receiver;
mod report;
mod rto;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use report::{Format, Report};

/// Measures vmdr against the least that is possible, in turn, in one run. Needs root.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    benchmark: Benchmark,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Common {
    /// How to print the results.
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    output: Format,
    /// Exit with 1 when a bar is missed.
    #[arg(long, global = true)]
    check: bool,
}

#[derive(Subcommand)]
enum Benchmark {
    /// How long a cut stops the guest, against stop, device save and cont alone.
    Pause(pause::Options),
    /// Dirty pages a second from guest memory to durable at the receiver, against memcpy and LZ4 of the same pages.
    Pipeline(pipeline::Options),
    /// How long a lost guest is away, against a cold start.
    Rto(rto::Options),
    /// How much longer a guest takes for the same work, against the same guest unprotected, and what of that the pauses are.
    Overhead(overhead::Options),
    /// What the receiver's store costs, against this disk's own throughput and syncs.
    Receiver(receiver::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let measured = match &arguments.benchmark {
        Benchmark::Pause(options) => pause::run(options),
        Benchmark::Pipeline(options) => pipeline::run(options),
        Benchmark::Rto(options) => rto::run(options),
        Benchmark::Overhead(options) => overhead::run(options),
        Benchmark::Receiver(options) => receiver::run(options),
    };
    match measured.and_then(|report| print(&report, &arguments.common)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmdr-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn print(report: &Report, common: &Common) -> Result<ExitCode> {
    print!("{}", report.print(common.output)?);
    Ok(if common.check && report.missed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
