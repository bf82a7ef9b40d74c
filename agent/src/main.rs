//! `vmdr-agent`: the daemon on a protected host; see the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmdr_agent::quiesce::helper;

/// Protects guests of this host: checkpoints them and streams them to a receiver.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; without it, defaults.
    #[arg(long, default_value = "/etc/vmdr/agent.toml")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Freeze a guest's file systems through the QEMU guest agent, and thaw them; the agent runs this.
    #[command(hide = true)]
    Freeze(helper::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.command {
        Some(Command::Freeze(options)) => helper::run(options),
        None => daemon(&arguments),
    }
}

#[tokio::main]
async fn daemon(arguments: &Arguments) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VMDR_LOG").unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    match vmdr_agent::daemon::run(&arguments.config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmdr-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
