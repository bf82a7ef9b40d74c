//! `vmdr group`: what can be written.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{instant, point};

/// What to do with a group of the recovery plan.
#[derive(Debug, Subcommand)]
pub enum GroupAction {
    /// Run all members of a group here, in the order that the recovery plan says (backup site)
    ///
    /// Shows what will happen and what is lost, asks for the group's name, then activates its members by priority and need. A
    /// member that is not ready keeps those that need it from being started; the others go on. Run again, it goes on from there;
    /// run while it goes on, it shows that. Exits with 1 unless all members are ready.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  vmdr group activate shop --dry-run\n  vmdr group activate shop --yes               from a script\n  vmdr group activate shop --before 15m\n  vmdr group activate shop --point db1=3-990   this member at this point, the others at their newest"
    )]
    Activate {
        /// Its name in the recovery plan
        group: String,
        /// Show what would happen; change nothing. Exits with 1 when a member would be refused
        #[arg(long)]
        dry_run: bool,
        /// Do not ask; needed where stdin is not a terminal
        #[arg(short, long)]
        yes: bool,
        #[command(flatten)]
        which: WhichOfEach,
        /// Also at points that are known to be damaged, as they are
        #[arg(long)]
        damaged: bool,
    },
    /// Show how the last activation of a group went, or goes (backup site)
    Report {
        /// Its name in the recovery plan
        group: String,
    },
    /// Begin no further member of a group that is being activated; those under way come to their end (backup site)
    ///
    /// It does not go on by itself then, nor after a restart of the receiver. Run again, `group activate` goes on.
    Stop {
        /// Its name in the recovery plan
        group: String,
    },
    /// List the groups, and how their last activations went (backup site)
    List,
}

/// Which recovery point of each member; nothing given: the newest, or what was asked for before when it goes on.
#[derive(Debug, Default, Args)]
pub struct WhichOfEach {
    /// A member at this point: GENERATION-EPOCH, or a name that it was given. Can be given for several
    #[arg(long = "point", value_name = "MEMBER=ID", value_parser = point_of)]
    pub points: Vec<(String, String)>,
    /// Each at its newest point that is not younger than this time (RFC 3339)
    #[arg(id = "at", long, value_name = "TIME", value_parser = instant, conflicts_with = "before")]
    pub at_unix_ns: Option<u64>,
    /// Each at its newest point that is at least so old
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub before: Option<Duration>,
}

fn point_of(typed: &str) -> Result<(String, String), String> {
    let (member, id) = typed.rsplit_once('=').filter(|(member, _)| !member.is_empty()).ok_or("write it MEMBER=ID")?;
    Ok((member.to_owned(), point(id)?))
}
