//! The command line: what can be written, what its help says, and the checks that need no daemon.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::failure::Failure;
use crate::text;

mod group;

pub use group::{GroupAction, WhichOfEach};

/// The shortest epoch: below it the pauses alone (3-5 ms) would take a fifth of the guest's time.
pub const INTERVAL_MIN: Duration = Duration::from_millis(25);
/// The longest epoch: with more the loss at a disaster is that of an ordinary snapshot.
pub const INTERVAL_MAX: Duration = Duration::from_secs(60);

const OVERVIEW: &str = "\
Protects running libvirt/KVM guests against the loss of a site. On the protected host an agent takes an incremental
checkpoint of the whole guest (memory, devices, disks) many times a second and streams it to a receiver at the backup
site, which can resume the guest from the newest one: same processes, same memory, same disks.

On the protected host:  doctor, prepare, protect, status, hold, release, suspend, resume, unprotect, move.
At the backup site:     status, points, point, retention, verify, inspect, plan, activate, group, drill, export,
                        import, forget.
After an activation:    reprotect and failback where the guest runs now; own and divergence where it ran.
On both:                pair, peers, audit.";

const EXAMPLES: &str = "\
Examples, in the order in which they are used:
  vmdr pair                                  (backup site) a token, for the next command
  vmdr pair --with b.example                 once: the two hosts know each other
  vmdr doctor web1                           can web1 be protected? what is in the way?
  vmdr prepare web1                          for intervals below 1s: a control socket, from web1's next start
  vmdr protect web1 --receiver b.example     start; ends when the first recovery point is safe at the backup site
  vmdr status                                what is protected here, and how much a failure now would lose
  vmdr points web1                           (backup site) what can be activated
  vmdr activate web1 --dry-run               (backup site) what would happen, and what would be lost
  vmdr activate web1                         (backup site) run web1 here
  vmdr activate web1 --before 10m            (backup site) the same as it was ten minutes ago

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 daemon not reachable, 4 domain not found,
5 already so, 6 no answer in time.";

/// Everything on the command line.
#[derive(Debug, Parser)]
#[command(
    name = "vmdr",
    version,
    about = "Protects running libvirt/KVM guests against the loss of a site",
    long_about = OVERVIEW,
    after_help = EXAMPLES,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What every command takes.
    #[command(flatten)]
    pub common: Common,
}

/// Options that every command takes.
#[derive(Debug, Args)]
pub struct Common {
    /// Form of the results on stdout
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    pub output: Output,
    /// Socket of the agent
    #[arg(long, global = true, env = "VMDR_AGENT_SOCKET", hide_env_values = true, default_value = vmdr_proto::AGENT_SOCKET, value_name = "PATH")]
    pub agent_socket: PathBuf,
    /// Socket of the receiver
    #[arg(
        long, global = true, env = "VMDR_RECEIVER_SOCKET", hide_env_values = true, default_value = vmdr_proto::RECEIVER_SOCKET,
        value_name = "PATH"
    )]
    pub receiver_socket: PathBuf,
}

/// Who activates a guest at the backup site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Failover {
    /// The backup site by itself, with a witness.
    Auto,
    /// The operator, with `vmdr activate`.
    Manual,
}

impl Failover {
    /// As the agent calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Manual => "manual",
        }
    }
}

/// The form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people, at most 120 columns wide.
    Table,
    /// One JSON document with a version field.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check whether this host, and a domain on it, can be protected
    ///
    /// Changes nothing. Every finding names a fact and its remedy; a domain is refused when one finding is a refusal.
    /// Exits with 1 when anything is refused.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr doctor            this host alone\n  vmdr doctor web1       web1 as well, and what the receiver could not run"
    )]
    Doctor {
        /// Name or UUID; without it the host alone is checked
        domain: Option<Domain>,
    },
    /// Give a domain a control socket of its own, from its next start
    ///
    /// Adds a second QEMU monitor socket to the persistent domain XML, for intervals below 1s. A guest that runs
    /// without it is protected through libvirt's monitor, with 1s and more. To have it, shut the guest down and start
    /// it once (a reboot inside the guest is not enough). A running guest is not touched; run it twice and nothing
    /// changes the second time.
    #[command(
        verbatim_doc_comment,
        after_help = "Example:\n  vmdr prepare web1\n  virsh shutdown web1       and when it is shut off\n  virsh start web1"
    )]
    Prepare {
        /// Name or UUID
        domain: Domain,
    },
    /// Start protecting a running domain
    ///
    /// Ends when the first recovery point is safe at the receiver: memory and disks have been copied once, which can
    /// take long. The guest runs meanwhile, with short pauses. Checks everything that `doctor` checks first, and
    /// changes nothing when that refuses. A guest without a control socket of its own (see `prepare`) gets a checkpoint
    /// each second at most, and a shorter interval is refused.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr protect web1\n  vmdr protect web1 --interval 1s --receiver 10.0.9.2:7420\n  vmdr protect web1 --receiver '[fd00:9::2]:7420'\n  vmdr protect web1 --failover auto     also of a domain that is protected already"
    )]
    Protect {
        /// Name or UUID
        domain: Domain,
        /// Time between checkpoints, 25ms to 60s [default: as configured, else 100ms]
        #[arg(long, value_name = "DURATION", value_parser = interval)]
        interval: Option<Interval>,
        /// Where to send to; port 7420 unless given [default: as configured]
        #[arg(long, value_name = "HOST[:PORT]", value_parser = receiver)]
        receiver: Option<String>,
        /// Make application-consistent points so often, like 15m [default: only on request]
        #[arg(long, value_name = "TIME", value_parser = whole_seconds)]
        application_every: Option<u64>,
        /// Who activates it there: the operator, or the site by itself [default: manual]
        #[arg(long, value_enum, value_name = "auto|manual", hide_possible_values = true)]
        failover: Option<Failover>,
    },
    /// Pause a protected guest with its standby level with it
    ///
    /// For planned stops and for comparisons. Pauses the guest with a checkpoint, and ends when that is durable at the
    /// receiver: the recovery point there is then what stands here, to the byte, and an activation loses nothing.
    /// The guest stays paused until `vmdr release`, also when the agent is restarted. Asked of a domain in state
    /// `protected` only. When this ends in any other way (no answer in time, Ctrl-C) the guest may be held all the
    /// same: see `vmdr status`.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr hold web1                    it stands still, nothing of it is only here\n  vmdr release web1                 it runs on"
    )]
    Hold {
        /// Name or UUID
        domain: Domain,
    },
    /// Let a held guest run on
    ///
    /// Ends what `vmdr hold` began; checkpoints are taken again. Not after an activation at the backup site: then the
    /// guest runs there.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr release web1")]
    Release {
        /// Name or UUID
        domain: Domain,
    },
    /// Take protection off for a while, for what libvirt refuses meanwhile
    ///
    /// For live migration within the site, snapshots, resizing disks, and whatever else is refused while block jobs run. The guest
    /// runs on, and nothing of vmdr is left at it. The newest recovery point stays at the receiver, where it can be
    /// activated and grows older; `vmdr status` shows since when. It stays so until `vmdr resume`, also when the agent or
    /// the host is restarted.
    #[command(
        verbatim_doc_comment,
        after_help = "Example:\n  vmdr suspend web1\n  virsh snapshot-create-as web1 before-upgrade\n  vmdr resume web1"
    )]
    Suspend {
        /// Name or UUID
        domain: Domain,
    },
    /// Put suspended protection back on
    ///
    /// Ends when that has begun. Memory and disks are compared with what the receiver has, and only what differs is
    /// sent; until that is whole (state `resync`) the recovery point from before stays.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr resume web1")]
    Resume {
        /// Name or UUID
        domain: Domain,
    },
    /// Stop protecting a domain; the guest runs on
    ///
    /// The recovery points stay at the receiver (`vmdr forget` deletes them there). A guest that is held runs again.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr unprotect web1")]
    Unprotect {
        /// Name or UUID
        domain: Domain,
    },
    /// Move a protected guest to the site that it is protected to
    ///
    /// Nothing is lost: the guest is paused with a checkpoint, that becomes durable there, the other site takes the guest
    /// over and brings it up, and only then what is left of it here is ended. Until the other site has taken it, any
    /// failure leaves the guest running here. If the answer is lost the guest stays paused until it is known who owns it;
    /// `vmdr status` says so. Prints how long the guest stood still. Afterwards it is not protected: see `reprotect`.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr move web1")]
    Move {
        /// Name or UUID
        domain: Domain,
    },
    /// Protect a guest that was activated, or moved, here, back to the site where it ran
    ///
    /// What that site still has of the guest's disks is compared, and only what differs is sent; memory is sent as a whole.
    /// The old disks there stay as they are (`vmdr divergence` there). A guest that is still paused there has to be ended
    /// first. Ends when the first recovery point is durable there.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr reprotect web1\n  vmdr reprotect web1 --receiver a.example"
    )]
    Reprotect {
        /// Name or UUID
        domain: Domain,
        /// Time between checkpoints, 25ms to 60s [default: as configured, else 100ms]
        #[arg(long, value_name = "DURATION", value_parser = interval)]
        interval: Option<Interval>,
        /// The other site's receiver; port 7420 unless given [default: as configured]
        #[arg(long, value_name = "HOST[:PORT]", value_parser = receiver)]
        receiver: Option<String>,
    },
    /// Take a guest home: move it, and have it protected in the other direction again
    ///
    /// The same as `move`, and when the guest runs there its agent protects it to here. Ends when that is done.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr failback web1")]
    Failback {
        /// Name or UUID
        domain: Domain,
    },
    /// Make this host the owner of a guest again
    ///
    /// The other site is asked to give the guest back: it does if the guest never ran there, as after an activation that
    /// failed. With --force it is not asked: for a site that is gone for good. If it is not, the guest runs twice until
    /// the two meet again; the newer generation, which is this host's then, wins.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr own web1\n  vmdr own web1 --force --reason 'site B burnt down'"
    )]
    Own {
        /// Name or UUID
        domain: Domain,
        /// Do not ask the other site
        #[arg(long, requires = "reason")]
        force: bool,
        /// What is known of the other site; recorded
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Do not ask for the domain's name
        #[arg(short, long)]
        yes: bool,
    },
    /// List what is kept aside of a guest's old disks here, or drop it
    ///
    /// When another site goes on with a guest that ran here, its disks here have what was written and never became durable
    /// there. They stay as they are. What of it belongs to vmdr goes by itself after `divergence_days`.
    #[command(verbatim_doc_comment, after_help = "Examples:\n  vmdr divergence web1\n  vmdr divergence web1 --drop")]
    Divergence {
        /// Name or UUID
        domain: Domain,
        /// Delete all of it, also files that are not vmdr's
        #[arg(long)]
        drop: bool,
        /// Do not ask for the domain's name
        #[arg(short, long)]
        yes: bool,
    },
    /// Show what is protected, standing by or active on this host
    ///
    /// Asks the agent and the receiver, whichever is there. RPO is what a failure now would lose: the age of the
    /// newest recovery point; WORST is the largest in the last hour. PAUSE is the median and the 99th percentile of
    /// the guest's pauses. DIRTY is pages of 4 KiB and SENT bytes on the wire, both per epoch.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr status\n  vmdr status web1 -o json | jq '.domains[0].rpo_seconds'"
    )]
    Status {
        /// Name or UUID; without it all of them
        domain: Option<Domain>,
    },
    /// List what of a domain can be activated here (backup site)
    ///
    /// Newest first. SIZE is what a point takes up: of the newest everything that is stored, of an older one what it
    /// takes to come back to it from the next newer one. What is pinned has the names of its pins in NOTE.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr points web1")]
    Points {
        /// Name or UUID
        domain: Domain,
    },
    /// Name a recovery point, or release one (backup site; with --application protected host)
    ///
    /// A named point is kept, whatever the retention policy says, until its name is released.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr point create web1 --name before-upgrade\n  vmdr point create web1 --name good --point 3-990\n  vmdr point create web1 --name quiet --application   at the protected host\n  vmdr point release web1 --name before-upgrade"
    )]
    Point {
        /// What to do
        #[command(subcommand)]
        action: PointAction,
    },
    /// Show or change how long which recovery points are kept (backup site)
    ///
    /// A tier is EVERY:FOR, one point of every so long, up to this age; EVERY `epoch` keeps every epoch. Of each stretch
    /// of time the earliest point stays. The budget is what older points may take on the disk: near it there is an
    /// alarm, beyond it the oldest points go first. The newest point and named ones always stay.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr retention web1\n  vmdr retention web1 --tier epoch:10m --tier 1m:24h --tier 1h:7d --budget 32GiB\n  vmdr retention web1 --reset           as configured for all domains"
    )]
    Retention {
        /// Name or UUID
        domain: Domain,
        /// One point of every so long, up to this age; can be given several times, and replaces all tiers there are
        #[arg(long = "tier", value_name = "EVERY:FOR", value_parser = tier)]
        tiers: Vec<Tier>,
        /// Space for older points: bytes, or with KiB, MiB, GiB, TiB
        #[arg(long, value_name = "SIZE", value_parser = size)]
        budget: Option<u64>,
        /// No policy of its own any more
        #[arg(long, conflicts_with_all = ["tiers", "budget"])]
        reset: bool,
    },
    /// Read recovery points again and compare them with their checksums (backup site)
    ///
    /// The newest one, unless another or all are asked for. It is done in the background, at the rate that the receiver is
    /// configured to; what is found is noted with the points (VERIFIED and `damaged` in `vmdr points`). What of the newest
    /// point is damaged is sent again by the agent as soon as it is connected. With --wait this ends when it is done, and
    /// exits with 1 when anything is damaged.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr verify web1\n  vmdr verify web1 --all --wait\n  vmdr verify web1 --point before-upgrade --wait"
    )]
    Verify {
        /// Name or UUID
        domain: Domain,
        /// This point: GENERATION-EPOCH, or a name that it was given
        #[arg(long, value_name = "ID", value_parser = point, conflicts_with = "all")]
        point: Option<String>,
        /// All points
        #[arg(long)]
        all: bool,
        /// Wait until it is done
        #[arg(long)]
        wait: bool,
    },
    /// Explain a receiver's state directory, without a daemon
    ///
    /// Reads every file of it, names all that is damaged with file and offset, and says of each recovery point whether it
    /// can be restored. Changes nothing. Runs `vmdr-inspect`, which is installed with the receiver; `vmdr inspect DIR
    /// --help` has its options. Exits with 1 when anything is damaged.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr inspect /var/lib/vmdr/receiver\n  vmdr inspect /var/lib/vmdr/receiver --domain web1 --point 3-990 --json"
    )]
    Inspect {
        /// The state directory, and options of `vmdr-inspect`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "DIR")]
        arguments: Vec<OsString>,
    },
    /// Run a domain here, from a recovery point (backup site)
    ///
    /// Shows the plan and what is lost, asks for the domain's name, then starts the guest where it was at the newest
    /// recovery point, or at the one that is asked for: what is newer stays as it is. Make sure that the guest no
    /// longer runs at the other site: this version does not check. Interrupted or run twice, it never starts a second
    /// guest here.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr activate web1 --dry-run      show the plan, change nothing\n  vmdr activate web1                ask, then do it\n  vmdr activate web1 --yes --wait   from a script; end when the guest runs\n  vmdr activate web1 --point 3-990  at this point (see `vmdr points`), or at one with this name\n  vmdr activate web1 --at 2026-01-31T12:00:00Z\n  vmdr activate web1 --before 10m   at the newest point that is ten minutes old or older"
    )]
    Activate {
        /// Name or UUID
        domain: Domain,
        /// Show the plan and what is lost; change nothing. Exits with 1 when activation would be refused
        #[arg(long)]
        dry_run: bool,
        /// Do not ask; needed where stdin is not a terminal
        #[arg(short, long)]
        yes: bool,
        /// Wait until everything received is applied, and for the guest to run
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        which: Which,
        /// Also at a point that is known to be damaged, as it is
        #[arg(long)]
        damaged: bool,
    },
    /// Rehearse an activation on a copy that is cut off from everything (backup site)
    ///
    /// Copies a recovery point, the newest unless another is asked for, runs the copy on networks of its own that lead
    /// nowhere, checks that it runs, and removes it. Protection goes on meanwhile; nothing of the domain is changed. Exits
    /// with 1 when a check fails. Without `--wait` it ends once the drill has begun.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr drill web1 --wait\n  vmdr drill web1 --check tcp:443 --check 'cmd:curl -sfk https://$VMDR_DRILL_ADDRESS/' --wait\n  vmdr drill web1 --before 1d --keep --wait   leave the copy running, to look at it\n  vmdr drill --end web1                       remove it"
    )]
    Drill {
        /// Name or UUID
        domain: Domain,
        #[command(flatten)]
        which: Which,
        /// Leave the copy running until `--end`
        #[arg(long)]
        keep: bool,
        /// Wait until it is done
        #[arg(long)]
        wait: bool,
        /// Also check this: tcp:PORT, tcp:ADDRESS:PORT, or cmd:COMMAND, which runs beside the copy
        #[arg(long = "check", value_name = "CHECK")]
        checks: Vec<String>,
        /// How long the copy has to run without a fault
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        run: Option<Duration>,
        /// End the drill that is under way or kept, and remove the copy
        #[arg(long, conflicts_with_all = ["point", "at", "before", "keep", "wait", "checks", "run"])]
        end: bool,
    },
    /// Send a recovery point to object storage, encrypted (backup site)
    ///
    /// Ends when the point can be imported from there. Only what the storage lacks is sent, and only what changed since the
    /// last export is read, where the history still tells that. It goes on when this command is ended; broken off, it goes on
    /// where it was the next time. Storage, key, and exports by the clock are in [cold] of receiver.toml.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr export web1                     the newest point\n  vmdr export web1 --point 3-990       this one, or one with this name\n  vmdr export web1 --prune             delete what the policy does not keep"
    )]
    Export {
        /// Name or UUID
        domain: Domain,
        /// This point: GENERATION-EPOCH, or a name that it was given
        #[arg(long, value_name = "ID", value_parser = point)]
        point: Option<String>,
        /// Export nothing: drop the points that `keep` does not ask for, and chunks that no point needs
        #[arg(long, conflicts_with = "point")]
        prune: bool,
    },
    /// Make a standby of a recovery point in object storage (backup site)
    ///
    /// Needs a receiver, the storage and the key, nothing else. Every chunk is checked. The standby is then listed by
    /// `vmdr points` and activated by `vmdr activate`. Refused where there is a standby of the domain already. The storage
    /// does not know who owns the guest: see to it that it runs nowhere else before you activate it.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr import --from s3://backup/vmdr --list\n  vmdr import --from file:///mnt/vmdr --key-file /root/cold.key web1\n  vmdr import web1 --point 3-990           from the storage in receiver.toml"
    )]
    Import {
        /// Name or UUID; with --list none means all
        #[arg(required_unless_present = "list")]
        domain: Option<Domain>,
        /// s3://BUCKET/PREFIX or file:///DIRECTORY [default: as configured]
        #[arg(long, value_name = "URL")]
        from: Option<String>,
        /// The master key, a file at the receiver [default: as configured]
        #[arg(long, value_name = "PATH")]
        key_file: Option<String>,
        /// Only show what is there
        #[arg(long, conflicts_with = "point")]
        list: bool,
        /// This point, GENERATION-EPOCH [default: the newest]
        #[arg(long, value_name = "ID", value_parser = point)]
        point: Option<String>,
    },
    /// Activate domains together that need each other: a group of the recovery plan
    #[command(subcommand_value_name = "ACTION", subcommand_help_heading = "Actions")]
    Group {
        /// What to do with it.
        #[command(subcommand)]
        action: GroupAction,
    },
    /// Check a recovery plan: how domains map onto the backup site
    #[command(subcommand_value_name = "ACTION", subcommand_help_heading = "Actions")]
    Plan {
        /// What to do with it.
        #[command(subcommand)]
        action: PlanAction,
    },
    /// Delete what is stored of a domain here (backup site)
    ///
    /// Refused while the domain is being received or runs here.
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr forget web1")]
    Forget {
        /// Name or UUID
        domain: Domain,
        /// Do not ask; needed where stdin is not a terminal
        #[arg(short, long)]
        yes: bool,
    },
    /// Make this host and another one known to each other
    ///
    /// Hosts exchange nothing before they are paired. On the host where a receiver runs, `vmdr pair` shows a token; on the
    /// other, `vmdr pair --with` asks for it. The token serves once and for ten minutes. From then on either host can
    /// protect guests to the other, whoever showed the token.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr pair                         (backup site) shows a token\n  vmdr pair --with b.example        (protected host) asks for the token\n  vmdr pair --with b.example < file  reads it from a file"
    )]
    Pair {
        /// The host that showed a token; port 7420 unless given
        #[arg(long, value_name = "HOST[:PORT]", value_parser = receiver)]
        with: Option<String>,
        /// How long the token shown is good, 1s to 1h
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = token_life, conflicts_with = "with")]
        valid: u32,
    },
    /// Show the hosts that this one is paired with, and steer what they may
    ///
    /// Without a word it lists them. A peer that is revoked is refused from then on, and its connections end; pairing it
    /// anew makes it a peer again.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr peers\n  vmdr peers revoke site-a\n  vmdr peers rotate                 another key and certificate for this host\n  vmdr peers grant web1 site-c      site-c may do with web1 what the host may that sent it\n  vmdr peers at site-a a.example    site-a, and no other, answers there"
    )]
    Peers {
        /// What to do
        #[command(subcommand)]
        action: Option<PeersAction>,
    },
    /// Show what was done to protection on this host, and who was refused
    ///
    /// Each daemon keeps a log to which is only added: every administrative act, before it is done and how it ended, and
    /// every refused attempt. Each record carries the hash of the one before, so that changes show.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr audit\n  vmdr audit -n 1000 -o json | jq -c '.records[] | select(.outcome == \"refused\")'\n  vmdr audit verify\n  vmdr audit verify --dir /backup/of/var/lib/vmdr/audit"
    )]
    Audit {
        /// At most so many records of each daemon
        #[arg(short = 'n', long, default_value_t = 20, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=10_000))]
        lines: u32,
        /// What to do instead of showing it
        #[command(subcommand)]
        action: Option<AuditAction>,
    },
    /// Write a completion script for a shell to stdout
    #[command(verbatim_doc_comment, after_help = "Example:\n  vmdr completions bash > /etc/bash_completion.d/vmdr")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Which recovery point; nothing given: the newest.
#[derive(Debug, Default, Args)]
pub struct Which {
    /// At this point: GENERATION-EPOCH, or a name that it was given
    #[arg(long, value_name = "ID", value_parser = point)]
    pub point: Option<String>,
    /// At the newest point that is not younger than this time (RFC 3339)
    #[arg(id = "at", long, value_name = "TIME", value_parser = instant, conflicts_with_all = ["point", "before"])]
    pub at_unix_ns: Option<u64>,
    /// At the newest point that is at least so old
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, conflicts_with = "point")]
    pub before: Option<Duration>,
}

/// What to do with a recovery plan.
#[derive(Debug, Subcommand)]
pub enum PlanAction {
    /// Say what is wrong with a plan, each with file, line and column (backup site; with --offline anywhere)
    ///
    /// First whether the plan makes sense by itself; then, asked of the receiver, whether this site has what it names: networks,
    /// bridges, devices, programs, secrets, and the domains with the NICs and disks that it speaks of. Changes nothing. Exits
    /// with 1 when an activation by this plan would be refused.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr plan check                      the plan in /etc/vmdr/plan.toml, against this site\n  vmdr plan check new.toml --offline   without a receiver"
    )]
    Check {
        /// The plan
        #[arg(value_name = "FILE", default_value = vmdr_plan::PLAN_FILE)]
        file: PathBuf,
        /// Only whether it makes sense by itself: no receiver is asked
        #[arg(long)]
        offline: bool,
    },
}

/// What to do with peers.
#[derive(Debug, Subcommand)]
pub enum PeersAction {
    /// List them
    List,
    /// Trust one no longer
    Revoke {
        /// Name, or the first 6 or more characters of the id
        peer: String,
    },
    /// Say which peer answers at an address; another one there is refused
    ///
    /// Needed where several hosts are paired and this one has not been paired by this address: to protect a guest back to
    /// the host it came from, mostly.
    #[command(verbatim_doc_comment)]
    At {
        /// Name, or the first 6 or more characters of the id
        peer: String,
        /// Port 7420 unless given
        #[arg(value_name = "HOST[:PORT]", value_parser = receiver)]
        address: String,
    },
    /// Make another key and certificate for this host; running streams go on
    Rotate,
    /// Let a peer do with a stored domain what the one may that sent it (backup site)
    Grant {
        /// Name or UUID
        domain: Domain,
        /// Name, or the first 6 or more characters of the id
        peer: String,
        /// No longer
        #[arg(long)]
        withdraw: bool,
    },
}

/// What to do with the audit log.
#[derive(Debug, Subcommand)]
pub enum AuditAction {
    /// Read the whole log; name the first line that is wrong. Exits with 1 when there is one
    Verify {
        /// A directory with logs, instead of asking the daemons
        #[arg(long, value_name = "PATH")]
        dir: Option<PathBuf>,
    },
}

/// What to do with a named point.
#[derive(Debug, Subcommand)]
pub enum PointAction {
    /// Name a point: the newest one, unless another is given
    ///
    /// With --application, at the protected host, another one is made: the guest's applications and file systems are brought to
    /// rest for a moment, by vmdr's tools or the QEMU guest agent in it. Ends when it is durable and named at the backup site.
    #[command(verbatim_doc_comment)]
    Create {
        /// Name or UUID
        domain: Domain,
        /// Letters, digits, dots, underscores and hyphens
        #[arg(long, value_name = "NAME", value_parser = point)]
        name: String,
        /// Which point, GENERATION-EPOCH
        #[arg(long, value_name = "ID", value_parser = point)]
        point: Option<String>,
        /// Make one now that is application-consistent, and name that (protected host)
        #[arg(long, conflicts_with = "point")]
        application: bool,
    },
    /// Release a name: the retention policy decides about its point again
    Release {
        /// Name or UUID
        domain: Domain,
        /// The name
        #[arg(long, value_name = "NAME", value_parser = point)]
        name: String,
    },
}

/// One point of every so many seconds, up to so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// 0: every epoch.
    pub every_seconds: u64,
    /// Age.
    pub for_seconds: u64,
}

fn tier(typed: &str) -> Result<Tier, String> {
    let (every, up_to) = typed.split_once(':').ok_or("write EVERY:FOR, like epoch:10m or 1m:24h")?;
    let seconds = |text: &str| {
        let length = humantime::parse_duration(text).map_err(|e| format!("{text:?}: {e}"))?;
        if length.subsec_nanos() > 0 {
            Err(format!("{text:?} is not a whole number of seconds"))
        } else {
            Ok(length.as_secs())
        }
    };
    let every_seconds = if every == "epoch" { 0 } else { seconds(every)? };
    let for_seconds = seconds(up_to)?;
    if for_seconds == 0 || every_seconds > for_seconds {
        return Err(format!("one of every {every} for {up_to} keeps nothing"));
    }
    Ok(Tier { every_seconds, for_seconds })
}

fn size(typed: &str) -> Result<u64, String> {
    let digits = typed.find(|c: char| !c.is_ascii_digit()).unwrap_or(typed.len());
    let (number, unit) = typed.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        other => return Err(format!("{other:?} is no unit; write bytes, or KiB, MiB, GiB, TiB")),
    };
    let number: u64 = number.parse().map_err(|_| "write it like 32GiB".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

/// A time, as nanoseconds since 1970.
fn instant(typed: &str) -> Result<u64, String> {
    let time = humantime::parse_rfc3339_weak(typed).map_err(|e| format!("{e}; write it like 2026-01-31T12:00:00Z"))?;
    let since = time.duration_since(std::time::UNIX_EPOCH).map_err(|_| "that is before 1970".to_owned())?;
    let ns = u64::try_from(since.as_nanos()).map_err(|_| "that is too far away".to_owned())?;
    if ns == 0 { Err("that is before there was anything".to_owned()) } else { Ok(ns) }
}

/// A point's identity or name as typed; the receiver knows them.
fn point(typed: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = typed.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && typed.len() <= 64 && typed.chars().all(good) {
        return Ok(typed.to_owned());
    }
    Err("1 to 64 letters, digits, dots, underscores and hyphens, the first a letter or digit".to_owned())
}

/// Whole seconds, 1 to 3,600.
fn token_life(typed: &str) -> Result<u32, String> {
    let life = humantime::parse_duration(typed).map_err(|e| e.to_string())?;
    let seconds = u32::try_from(life.as_secs()).ok().filter(|seconds| (1..=3600).contains(seconds));
    seconds.filter(|_| life.subsec_nanos() == 0).ok_or_else(|| "write it like 10m; 1s to 1h".to_owned())
}

/// A domain's name or UUID as typed; the daemons find out which.
#[derive(Debug, Clone)]
pub struct Domain(pub String);

impl std::str::FromStr for Domain {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        if typed.is_empty() {
            // On the wire an empty name means "all".
            return Err("a domain's name is not empty".to_owned());
        }
        if typed.chars().any(char::is_control) {
            return Err("a domain's name has no control characters".to_owned());
        }
        Ok(Domain(typed.to_owned()))
    }
}

/// Whole milliseconds within [`INTERVAL_MIN`] and [`INTERVAL_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// Milliseconds.
    pub ms: u32,
}

fn whole_seconds(typed: &str) -> Result<u64, String> {
    let length = humantime::parse_duration(typed).map_err(|e| format!("{e}; write it like 15m"))?;
    match (length.as_secs(), length.subsec_nanos()) {
        (1.., 0) => Ok(length.as_secs()),
        _ => Err(format!("{typed:?} is not a whole number of seconds")),
    }
}

fn interval(typed: &str) -> Result<Interval, String> {
    let length = humantime::parse_duration(typed).map_err(|e| format!("{e}; write it like 100ms or 2s"))?;
    if length < INTERVAL_MIN || length > INTERVAL_MAX {
        return Err(format!(
            "an interval is {} to {}",
            humantime::format_duration(INTERVAL_MIN),
            humantime::format_duration(INTERVAL_MAX).to_string().replace("1m", "60s")
        ));
    }
    if length.subsec_nanos() % 1_000_000 != 0 {
        return Err("an interval is a whole number of milliseconds".to_owned());
    }
    u32::try_from(length.as_millis()).map(|ms| Interval { ms }).map_err(|_| "too long".to_owned())
}

/// `HOST`, `HOST:PORT`, `ADDRESS6` in brackets with or without a port; the answer always has a port.
fn receiver(typed: &str) -> Result<String, String> {
    let (host, port) = if let Some(rest) = typed.strip_prefix('[') {
        let (address, after) = rest.split_once(']').ok_or("the closing bracket is missing")?;
        address.parse::<std::net::Ipv6Addr>().map_err(|e| format!("in the brackets: {e}"))?;
        let port = match after.strip_prefix(':') {
            Some(port) => Some(port),
            None if after.is_empty() => None,
            None => return Err("after the brackets only :PORT can follow".to_owned()),
        };
        (format!("[{address}]"), port)
    } else {
        match typed.split_once(':') {
            Some((_, rest)) if rest.contains(':') => {
                return Err("write an IPv6 address in brackets: [ADDRESS]:PORT".to_owned());
            }
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (typed.to_owned(), None),
        }
    };
    let in_a_name = |c: char| c.is_ascii_alphanumeric() || "-._[]:".contains(c);
    if host.is_empty() || !host.chars().all(in_a_name) {
        return Err("the host is not a name or an address".to_owned());
    }
    let port = match port {
        None => vmdr_proto::RECEIVER_PORT,
        Some(port) => match port.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => return Err("a port is a number from 1 to 65535".to_owned()),
        },
    };
    Ok(format!("{host}:{port}"))
}

/// Why there is no command to run.
pub enum Stop {
    /// Help or version was asked for and has been written.
    Shown,
    /// The command line is wrong.
    Usage(Failure),
}

/// Parses this process's command line.
pub fn parse() -> Result<Cli, Stop> {
    parse_from(std::env::args_os())
}

fn parse_from(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, Stop> {
    Cli::try_parse_from(arguments).map_err(|error| {
        use clap::error::ErrorKind;
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                let _ = error.print();
                Stop::Shown
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                Stop::Usage(Failure::Usage("a command is missing; `vmdr --help` lists them".to_owned()))
            }
            _ => Stop::Usage(Failure::Usage(first_paragraph(&error.to_string()))),
        }
    })
}

/// clap's own text is a paragraph with what is wrong, then tips and usage: the first is kept.
fn first_paragraph(text: &str) -> String {
    let paragraph: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = text::one_line(&paragraph.join(" "));
    format!("{}; see `vmdr --help`", line.strip_prefix("error: ").unwrap_or(&line))
}

/// The completion script for a shell.
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vmdr", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn intervals() {
        for (typed, ms) in
            [("25ms", 25), ("100ms", 100), ("1s", 1000), ("60s", 60_000), ("1m", 60_000), ("1s 5ms", 1005)]
        {
            assert_eq!(interval(typed), Ok(Interval { ms }), "{typed}");
        }
        for typed in ["24ms", "0ms", "61s", "100", "", "-1s", "1.5ms", "30ms 1us", "99999999999999999h", "x"] {
            assert!(interval(typed).is_err(), "{typed}");
        }
        assert_eq!(interval("1ms").unwrap_err(), "an interval is 25ms to 60s");
    }

    #[test]
    fn tiers_sizes_and_times() {
        let tier_of = |every_seconds, for_seconds| Ok(Tier { every_seconds, for_seconds });
        assert_eq!(tier("epoch:10m"), tier_of(0, 600));
        assert_eq!(tier("1m:24h"), tier_of(60, 86_400));
        for typed in ["", "1m", "1m:1s", "epoch:0s", "1ms:1s", "x:1h", "1h:"] {
            assert!(tier(typed).is_err(), "{typed}");
        }
        for (typed, bytes) in [("5", 5), ("32GiB", 32 << 30), ("1 TiB", 1 << 40), ("7M", 7 << 20)] {
            assert_eq!(size(typed), Ok(bytes), "{typed}");
        }
        for typed in ["", "GiB", "1.5GiB", "-1", "99999999999999999999", "17000000TiB", "1GB"] {
            assert!(size(typed).is_err(), "{typed}");
        }
        assert_eq!(instant("2026-01-31T12:00:00Z"), Ok(1_769_860_800_000_000_000));
        assert_eq!(instant("2026-01-31 12:00:00"), Ok(1_769_860_800_000_000_000));
        for typed in ["", "yesterday", "1970-01-01T00:00:00Z", "2026-13-01T00:00:00Z"] {
            assert!(instant(typed).is_err(), "{typed}");
        }
        for typed in ["", "-x", "a b", "../x", "ä"] {
            assert!(point(typed).is_err(), "{typed}");
        }
    }

    #[test]
    fn receivers() {
        for (typed, sent) in [
            ("b", "b:7420"),
            ("b.example:7", "b.example:7"),
            ("10.0.0.2:65535", "10.0.0.2:65535"),
            ("[fd00::2]", "[fd00::2]:7420"),
            ("[fd00::2]:80", "[fd00::2]:80"),
        ] {
            assert_eq!(receiver(typed).as_deref(), Ok(sent), "{typed}");
        }
        for typed in
            ["", ":7420", "b:", "b:0", "b:65536", "b:x", "fd00::2", "[fd00::2", "[b]:1", "[::1]x", "a b", "http://b"]
        {
            assert!(receiver(typed).is_err(), "{typed}");
        }
    }

    #[test]
    fn errors_are_one_line() {
        let line = |arguments: &[&str]| match parse_from(arguments.iter().map(OsString::from)) {
            Err(Stop::Usage(failure)) => failure.to_string(),
            _ => panic!("{arguments:?} was accepted"),
        };
        for arguments in [
            &["vmdr"][..],
            &["vmdr", "protect"],
            &["vmdr", "explode"],
            &["vmdr", "protect", "web1", "--interval", "1ms"],
            &["vmdr", "status", "--nonsense"],
            &["vmdr", "status", ""],
        ] {
            let line = line(arguments);
            assert!(!line.contains('\n') && !line.starts_with("error"), "{line}");
        }
        assert!(line(&["vmdr", "protect", "web1", "--interval", "1ms"]).contains("an interval is 25ms to 60s"));
    }
}
