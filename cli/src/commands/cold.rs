//! Commands about object storage: `export`, `import`.

use vmdr_proto::control::{ColdListReply, ColdListRequest, ExportReport, ExportRequest, ImportReport, ImportRequest};

use super::Out;
use crate::args::{Common, Domain};
use crate::client::{self, Daemon};
use crate::failure::Failure;
use crate::style::Tone;
use crate::table::{Cell, Side, Table};
use crate::{json, progress, text};

/// Columns for what is wrong with a point.
const NOTE_COLUMNS: usize = 40;

/// Exports a point, or prunes.
pub async fn export(
    common: &Common,
    out: Out,
    domain: &Domain,
    point: Option<&str>,
    prune: bool,
) -> Result<(), Failure> {
    let request = ExportRequest { domain: domain.0.clone(), point: point.unwrap_or_default().to_owned(), prune };
    let mut receiver = client::receiver(common).await?;
    let stream = receiver.export(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Receiver, "export", &status))?;
    let outcome = progress::follow(Daemon::Receiver, "export", stream.into_inner()).await?;
    let report = outcome.exported.ok_or_else(|| ended("export"))?;
    out.result("export", || json::cold::Export::from(&report), || export_text(&report))
}

fn ended(what: &str) -> Failure {
    Failure::Failed(format!("the receiver ended the {what} without a report: run it again, it goes on where it was"))
}

fn export_text(report: &ExportReport) -> String {
    let (name, url) = (text::one_line(&report.name), text::one_line(&report.url));
    let mut said = String::new();
    if report.rewrapped {
        said.push_str(&format!(
            "The data key of {name} is wrapped under the new master key; the old one is not needed for it any more.\n"
        ));
    }
    if report.already {
        said.push_str(&format!(
            "Point {} of {name} is at {url} already: nothing was sent\n",
            text::one_line(&report.point)
        ));
    } else if !report.point.is_empty() {
        let bytes = |n: u64| text::bytes(n as f64);
        said.push_str(&format!("Point {} of {name} is at {url}\n", text::one_line(&report.point)));
        said.push_str(&format!("  cut:  {} UTC\n", text::instant_short(report.cut_unix_ns)));
        let base = match text::one_line(&report.base) {
            base if base.is_empty() => "all of it".to_owned(),
            base => format!("what changed since point {base}"),
        };
        said.push_str(&format!("  read: {} of {}, {base}\n", bytes(report.read_bytes), bytes(report.total_bytes)));
        said.push_str(&format!(
            "  sent: {} in {} chunks that were not there yet, in {}\n",
            bytes(report.sent_bytes),
            report.sent_chunks,
            text::seconds(report.seconds)
        ));
    }
    if let Some(pruned) = &report.pruned {
        let dropped: Vec<String> = pruned.dropped.iter().map(|id| text::one_line(id)).collect();
        let dropped = if dropped.is_empty() { "none".to_owned() } else { dropped.join(", ") };
        said.push_str(&format!("Points of {name} at {url}: {} kept\n", pruned.kept));
        said.push_str(&text::wrapped("  dropped: ", &dropped));
        said.push_str(&format!(
            "  chunks:  {} deleted, {} more go when their grace is over\n",
            pruned.deleted_chunks, pruned.marked_chunks
        ));
    }
    said
}

/// Lists what object storage has.
pub async fn list(
    common: &Common,
    out: Out,
    domain: Option<&Domain>,
    from: Option<&str>,
    key_file: Option<&str>,
) -> Result<(), Failure> {
    let request = ColdListRequest {
        from: from.unwrap_or_default().to_owned(),
        key_file: key_file.unwrap_or_default().to_owned(),
        domain: domain.map_or_else(String::new, |domain| domain.0.clone()),
    };
    let mut receiver = client::receiver(common).await?;
    // Not the usual limit of time: object storage may be far away.
    let reply = receiver.cold_list(request).await;
    let reply = reply.map_err(|status| Failure::from_status(Daemon::Receiver, "import --list", &status))?.into_inner();
    out.result("cold-list", || json::cold::List::from(&reply), || list_text(out, &reply))
}

fn list_text(out: Out, reply: &ColdListReply) -> String {
    let url = text::one_line(&reply.url);
    if reply.domains.is_empty() {
        return format!("{url} has no recovery points\n");
    }
    let mut table = Table::new([
        ("DOMAIN", Side::Left),
        ("POINT", Side::Left),
        ("CUT (UTC)", Side::Left),
        ("CONSISTENCY", Side::Left),
        ("RAM", Side::Right),
        ("DISKS", Side::Right),
        ("CHUNKS", Side::Right),
        ("NOTE", Side::Left),
    ]);
    let mut notes = String::new();
    for domain in &reply.domains {
        let name = text::one_line(if domain.name.is_empty() { &domain.uuid } else { &domain.name });
        if !domain.error.is_empty() {
            notes.push_str(&text::wrapped(&format!("{name}: "), &text::one_line(&domain.error)));
        }
        for point in &domain.points {
            let sound = |text: String| if point.damage.is_empty() { text } else { "-".to_owned() };
            let (note, tone) = match text::one_line(&point.damage) {
                good if good.is_empty() => (good, Tone::Plain),
                bad => (text::shortened(&format!("damaged: {bad}"), NOTE_COLUMNS), Tone::Bad),
            };
            table.row(
                [
                    name.clone().into(),
                    text::one_line(&point.id).into(),
                    text::instant_short(point.cut_unix_ns).into(),
                    text::one_line(&point.consistency).into(),
                    sound(text::bytes(point.ram_bytes as f64)).into(),
                    sound(text::bytes(point.disk_bytes as f64)).into(),
                    sound(text::count(point.chunks as f64)).into(),
                    Cell::toned(note, tone),
                ],
                String::new(),
            );
        }
    }
    table.render(out.style) + &notes
}

/// Imports a point.
pub async fn import(
    common: &Common,
    out: Out,
    domain: &Domain,
    from: Option<&str>,
    key_file: Option<&str>,
    point: Option<&str>,
) -> Result<(), Failure> {
    let request = ImportRequest {
        from: from.unwrap_or_default().to_owned(),
        key_file: key_file.unwrap_or_default().to_owned(),
        domain: domain.0.clone(),
        point: point.unwrap_or_default().to_owned(),
    };
    let mut receiver = client::receiver(common).await?;
    let stream = receiver.import(request).await;
    let stream = stream.map_err(|status| Failure::from_status(Daemon::Receiver, "import", &status))?;
    let outcome = progress::follow(Daemon::Receiver, "import", stream.into_inner()).await?;
    let report = outcome.imported.ok_or_else(|| ended("import"))?;
    out.result("import", || json::cold::Import::from(&report), || import_text(&report))
}

fn import_text(report: &ImportReport) -> String {
    let (name, point) = (text::one_line(&report.name), text::one_line(&report.point));
    format!(
        "Point {point} of {name} is a standby here: `vmdr points {name}`, `vmdr activate {name}`\n  cut:  {} UTC\n  read: {} of \
         data for {} of memory and disks, every chunk checked, in {}\n",
        text::instant_short(report.cut_unix_ns),
        text::bytes(report.read_bytes as f64),
        text::bytes(report.total_bytes as f64),
        text::seconds(report.seconds)
    )
}
