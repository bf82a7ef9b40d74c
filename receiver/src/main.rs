//! `vmdr-receiver`: the daemon at the backup site. All behaviour is in the library.

mod heap;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::fs::Mode;
use tracing_subscriber::EnvFilter;
use vmdr_receiver::config::Config;

/// Stores what agents send of their guests, and activates a guest when its host is lost.
///
/// Logs to stderr; VMDR_LOG sets how much (for example `debug`). Ends on SIGTERM.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; /etc/vmdr/receiver.toml, if there is one, where none is given.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only reads the configuration and says whether it is right.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmdr-receiver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    // What is stored is guests' memory and disks.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let config = Config::load(arguments.config.as_deref())?;
    if arguments.check {
        println!("the configuration is right");
        return Ok(());
    }
    if config.encryption.is_on() {
        // A core dump would have keys, and guests, in a file.
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, none)?;
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    }
    let filter = EnvFilter::try_from_env("VMDR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Runtime::new()?;
    let ended = runtime.block_on(vmdr_receiver::daemon::run(config));
    // A thread that is at its disk or waits for libvirt does not keep the process: all that matters is durable.
    runtime.shutdown_background();
    ended
}
