//! The command line. A test guest's init passes the words of `vmdr.workload="..."` on as they are.

use clap::{Args, Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Runs inside a test guest of vmdr.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Dirty RAM and disk in a known order, count, and check on request that both agree.
    Workload(Workload),
    /// Send one request to a running workload and print its answer.
    Ask(Ask),
    /// Keep the clock with the host's, and freeze file systems and change addresses when the host asks for it, over the virtio port
    /// of vmdr.
    Daemon(Daemon),
    /// Freeze file systems until a line comes, the input ends or the time is over: the daemon runs this.
    #[command(hide = true)]
    Freeze(Freeze),
    /// Do the same work again and again, and say on the console when each piece of it begins and ends.
    Job(Job),
}

/// What the workload writes, how fast, and where it answers.
#[derive(Args, Clone, Debug)]
pub struct Workload {
    /// Size of the RAM area.
    #[arg(long, default_value_t = 64)]
    pub ram_mib: usize,
    /// RAM pages stamped in every tick; can be changed while running ("set pages=N").
    #[arg(long, default_value_t = 100)]
    pub pages: u32,
    /// Time between the beginnings of two ticks; can be changed while running ("set interval=N").
    #[arg(long, default_value_t = 50)]
    pub interval_ms: u32,
    /// Bytes of noise behind each RAM stamp, at most what is left of the page. More of it compresses worse.
    #[arg(long, default_value_t = 224)]
    pub fill_bytes: usize,
    /// Seed of the order in which pages are visited and of the noise.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// File (on a mounted file system) or block device that takes the records. Without it, RAM only.
    #[arg(long)]
    pub disk: Option<PathBuf>,
    /// Bytes of one record, a multiple of 4096; one record a tick, so MB/s = record bytes x ticks/s.
    #[arg(long, default_value_t = 4096)]
    pub record_bytes: usize,
    /// Records kept; record N lies at slot N modulo this.
    #[arg(long, default_value_t = 1024)]
    pub records: u64,
    /// Write the records with O_DIRECT.
    #[arg(long)]
    pub direct: bool,
    /// Do not fsync each record (sensible only with --direct: otherwise nothing has reached the disk).
    #[arg(long, requires = "direct")]
    pub no_fsync: bool,
    /// Threads that read records of their own with O_DIRECT into random pages of their own, without a break.
    #[arg(long, default_value_t = 0)]
    pub readers: usize,
    /// Size of each reader's RAM area.
    #[arg(long, default_value_t = 4)]
    pub reader_mib: usize,
    /// A block device without a file system that is written with O_DIRECT, trimmed and zeroed. May be given more than once.
    #[arg(long)]
    pub scratch: Vec<PathBuf>,
    /// Count in a UEFI variable (efivarfs must be mounted).
    #[arg(long)]
    pub variable: bool,
    /// MiB of memory to take, fill and give back again and again; can be changed while running ("set churn=N").
    #[arg(long, default_value_t = 0)]
    pub churn_mib: u32,
    /// Run the self-check by itself every so many ticks; 0: only on request.
    #[arg(long, default_value_t = 0)]
    pub check_every: u64,
    /// Print every so many ticks on the console.
    #[arg(long, default_value_t = 10)]
    pub print_every: u64,
    /// Send the counter to this address after every tick.
    #[arg(long)]
    pub udp: Option<SocketAddr>,
    /// UDP port on which requests are answered.
    #[arg(long, default_value_t = 7000)]
    pub port: u16,
    /// TCP port on which lines are counted and echoed.
    #[arg(long, default_value_t = 7001)]
    pub tcp_port: u16,
}

/// One request.
#[derive(Args)]
pub struct Ask {
    /// Where the workload listens.
    #[arg(default_value = "127.0.0.1:7000")]
    pub address: SocketAddr,
    /// The request: ping, check, or set KEY=VALUE...
    #[arg(default_value = "ping")]
    pub request: Vec<String>,
}

/// Where the host is, and what it may ask for.
#[derive(Args, Clone, Debug)]
pub struct Daemon {
    /// The port's device; without it, the one that has vmdr's name.
    #[arg(long)]
    pub port: Option<PathBuf>,
    /// Directory of programs that are run with "freeze" before file systems are frozen and with "thaw" afterwards.
    #[arg(long, default_value = HOOKS)]
    pub hooks: PathBuf,
    /// Seconds that each of them may take; one that fails or takes longer ends the freeze.
    #[arg(long, default_value_t = 10)]
    pub hook_seconds: u32,
    /// Seconds that file systems stay frozen at most, whatever the host asks for.
    #[arg(long, default_value_t = 10)]
    pub freeze_seconds_max: u32,
    /// Directory for what the network was like before a host changed it; on a disk, so that it outlives a reboot.
    #[arg(long, default_value = "/var/lib/vmdr-guest-tools")]
    pub state: PathBuf,
    /// The guest does not count as ready while this file is there.
    #[arg(long, default_value = "/run/vmdr-not-ready")]
    pub not_ready: PathBuf,
    /// Leave the network as it is, whatever the host asks for.
    #[arg(long)]
    pub keep_network: bool,
}

const HOOKS: &str = "/etc/vmdr/freeze.d";

/// One freeze.
#[derive(Args)]
pub struct Freeze {
    /// As the daemon's.
    #[arg(long, default_value = HOOKS)]
    pub hooks: PathBuf,
    /// As the daemon's.
    #[arg(long, default_value_t = 10)]
    pub hook_seconds: u32,
    /// How long file systems stay frozen at most.
    #[arg(long)]
    pub hold_ms: u32,
}

/// How much work a piece is.
#[derive(Args)]
pub struct Job {
    /// Mebibytes hashed, out of a buffer that fits a cache: work that writes no memory.
    #[arg(long, default_value_t = 64)]
    pub cpu_mib: u64,
    /// Mebibytes of memory, of which every page is written...
    #[arg(long, default_value_t = 32)]
    pub memory_mib: usize,
    /// ...so many times.
    #[arg(long, default_value_t = 16)]
    pub memory_rounds: u64,
    /// Records of 16 KiB written to the disk, each synced.
    #[arg(long, default_value_t = 100)]
    pub disk_records: u64,
    /// File that takes them; without it there is no disk work.
    #[arg(long)]
    pub disk: Option<PathBuf>,
}
