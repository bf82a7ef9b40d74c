//! `vmdr-agent`: the daemon on a protected host; see the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Protects guests of this host: checkpoints them and streams them to a receiver.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; without it, defaults.
    #[arg(long, default_value = "/etc/vmdr/agent.toml")]
    config: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
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
