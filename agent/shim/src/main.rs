//! `vmdr-shim`: started by the agent beside each protected guest; see the library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use vmdr_shim::config::Config;
use vmdr_shim::server::{self, End};
use vmdr_shim::{inject, nbd};

/// The process beside a protected guest. The agent starts it; nobody needs to by hand.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Protect one guest until detached.
    Run {
        /// JSON, written by the agent.
        #[arg(long)]
        config: PathBuf,
    },
    /// Make the process PID create a userfaultfd and print its number there.
    #[command(hide = true)]
    Inject {
        /// QEMU's process.
        pid: i32,
    },
    /// Make the process PID close the userfaultfd that `inject` has made there.
    #[command(hide = true)]
    Unwatch {
        /// QEMU's process.
        pid: i32,
    },
    /// Serve a raw file over NBD with the server that mirrors are made to.
    Nbd {
        /// The file.
        #[arg(long)]
        file: PathBuf,
        /// Unix socket to listen on.
        #[arg(long)]
        socket: PathBuf,
        /// Name of the export.
        #[arg(long, default_value = "")]
        name: String,
        /// Refuse writes.
        #[arg(long)]
        read_only: bool,
    },
}

/// `nice` value of a shim.
const PRIORITY: i32 = -10;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VMDR_LOG").unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    match execute(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config } => {
            let config = Config::read(&config)?;
            // Beside the guest, and needed by it: among the last to go when memory runs out.
            let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
            // A cut that waits for a processor is a pause that the guest notices.
            if let Err(error) = rustix::process::setpriority_process(None, PRIORITY) {
                tracing::warn!("raise the priority: {error}");
            }
            let name = config.domain_name.clone();
            let end = server::run(config).with_context(|| format!("domain {name}"))?;
            tracing::info!(domain = name, ?end, "ended");
            Ok(if end == End::Detached { ExitCode::SUCCESS } else { ExitCode::from(3) })
        }
        Command::Inject { pid } => {
            println!("{}", inject::inject(pid)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Unwatch { pid } => {
            inject::close(pid)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Nbd { file, socket, name, read_only } => {
            nbd::file::serve(&file, &socket, &name, read_only)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
