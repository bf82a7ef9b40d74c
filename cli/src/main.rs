//! The `vmdr` command: shows and steers what the two daemons of a host do.
//!
//! It holds no state and takes no decision about a guest: every command is one request to a daemon over its unix
//! socket, or two where something is to be confirmed in between. What it guarantees is the outside: results on
//! stdout, everything else on stderr; one line per error; the exit codes of [`failure::Failure`]; JSON that keeps
//! its shape while its `version` stays the same ([`json`]).

use std::io::Write;
use std::process::ExitCode;

use failure::Failure;

mod args;
mod client;
mod commands;
mod confirm;
mod failure;
mod json;
mod progress;
mod style;
mod table;
mod text;

fn main() -> ExitCode {
    let cli = match args::parse() {
        Ok(cli) => cli,
        Err(args::Stop::Shown) => return ExitCode::SUCCESS,
        Err(args::Stop::Usage(failure)) => return report(&failure),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return report(&Failure::Failed(format!("cannot start: {e}"))),
    };
    let ended = runtime.block_on(commands::run(&cli));
    // A thread that still waits for an answer typed on a terminal must not keep the command alive.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    // A stderr that is gone leaves the exit code, which says the same.
    let _ = writeln!(std::io::stderr(), "vmdr: {}", text::one_line(&failure.to_string()));
    ExitCode::from(failure.code())
}
