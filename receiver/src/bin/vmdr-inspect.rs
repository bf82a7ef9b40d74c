//! `vmdr-inspect`: explains a receiver's state directory, and says which recovery points can be restored from it. Needs no
//! daemon and changes nothing. Exit codes: 0 sound, 1 damaged, 2 wrong usage, 3 it cannot be read, or not without a key.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vmdr_keys::{KeyError, MasterKey};
use vmdr_receiver::store::inspect::{DomainReport, Report, Soundness, Wanted, inspect};

/// Explains a receiver's state directory, and says which recovery points can be restored from it.
///
/// Reads all there is of it: every record of journal and history, the standby's images against their checksums. Changes nothing
/// and needs no daemon; while a receiver works in the directory, what that writes may look like damage.
#[derive(Parser)]
#[command(name = "vmdr-inspect", version)]
struct Arguments {
    /// The state directory.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Only this domain: name or UUID.
    #[arg(long)]
    domain: Option<String>,
    /// Whether this recovery point can be restored: GENERATION-EPOCH, or a name that it was given. The exit code is of it alone.
    #[arg(long, value_name = "ID", conflicts_with = "all")]
    point: Option<String>,
    /// Whether each of them can be (what is done anyway without --point).
    #[arg(long)]
    all: bool,
    /// Every record of every segment.
    #[arg(long)]
    records: bool,
    /// The key that domains are encrypted under, of the receiver's [encryption]; may be given several times.
    #[arg(long, value_name = "FILE")]
    key_file: Vec<PathBuf>,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let keys: Result<Vec<MasterKey>, KeyError> = arguments.key_file.iter().map(|path| MasterKey::read(path)).collect();
    let keys = match keys {
        Ok(keys) => keys,
        Err(error) => {
            eprintln!("vmdr-inspect: {error}");
            return ExitCode::from(3);
        }
    };
    let wanted = Wanted { domain: arguments.domain.clone(), records: arguments.records, keys };
    let mut report = match inspect(&arguments.directory, &wanted) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("vmdr-inspect: cannot read {}: {error}", arguments.directory.display());
            return ExitCode::from(3);
        }
    };
    if let Some(domain) = arguments.domain.as_ref().filter(|_| report.domains.is_empty()) {
        eprintln!("vmdr-inspect: nothing is stored of {domain} in {}", arguments.directory.display());
        return ExitCode::from(3);
    }
    let closed = report.domains.iter().find_map(|domain| domain.closed.clone());
    let mut sound = report.sound;
    if let Some(wanted) = &arguments.point {
        for domain in &mut report.domains {
            domain.points.retain(|point| point.id == *wanted || point.names.contains(wanted));
        }
        let mut points = report.domains.iter().flat_map(|domain| &domain.points).peekable();
        if let Some(what) = closed.as_ref().filter(|_| points.peek().is_none()) {
            eprintln!("vmdr-inspect: {what}");
            return ExitCode::from(3);
        }
        if points.peek().is_none() {
            eprintln!("vmdr-inspect: there is no recovery point {wanted}");
            return ExitCode::FAILURE;
        }
        sound = points.all(|point| point.soundness != Soundness::Damaged);
    }
    let text = if arguments.json { document(&report) } else { readable(&report, arguments.records) };
    // A reader that has seen enough is no error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    match sound {
        true => ExitCode::SUCCESS,
        false if closed.is_some() => ExitCode::from(3),
        false => ExitCode::FAILURE,
    }
}

fn document(report: &Report) -> String {
    let mut document = serde_json::to_value(report).unwrap_or_default();
    if let Some(fields) = document.as_object_mut() {
        fields.insert("version".to_owned(), 1.into());
        fields.insert("kind".to_owned(), "inspect".into());
    }
    format!("{document:#}\n")
}

fn readable(report: &Report, records: bool) -> String {
    let mut text = format!("{}\n", report.directory.display());
    if report.receiver_running {
        text += "a receiver works in this directory: what it is writing may look like damage\n";
    }
    for path in &report.strange {
        text += &format!("  {}: not of vmdr\n", path.display());
    }
    for domain in &report.domains {
        text += &about(report, domain, records);
    }
    text
}

fn about(report: &Report, domain: &DomainReport, records: bool) -> String {
    let mut text = format!("\n{} {}\n", domain.uuid, domain.name);
    let short = |path: &std::path::Path| {
        let own = report.directory.join(&domain.uuid);
        path.strip_prefix(own).unwrap_or(path).display().to_string()
    };
    for file in &domain.files {
        text += &format!("  {}  {} bytes  {}\n", short(&file.path), file.bytes, file.what);
        for record in file.records.iter().filter(|_| records) {
            let damage = record.damage.as_ref().map_or_else(String::new, |what| format!("  DAMAGED: {what}"));
            text += &format!("    {:>12}  {}{damage}\n", record.offset, record.what);
        }
    }
    for damage in &domain.damage {
        let at = damage.offset.map_or_else(String::new, |at| format!(" at {at}"));
        text += &format!("  DAMAGED {}{at}: {}\n", short(&damage.path), damage.what);
    }
    if let Some(what) = &domain.closed {
        text += &format!("  CLOSED: {what}\n");
        return text;
    }
    for point in &domain.points {
        let word = match point.soundness {
            Soundness::Sound => "can be restored",
            Soundness::Unproved => "can be restored as far as is known: not all of it has checksums",
            Soundness::Damaged => "CANNOT be restored",
        };
        let why = point.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        let names = if point.names.is_empty() { String::new() } else { format!(" ({})", point.names.join(", ")) };
        text += &format!("  point {}{names} {word}{why}\n", point.id);
    }
    if domain.points.is_empty() {
        text += "  there is no recovery point\n";
    }
    text
}
