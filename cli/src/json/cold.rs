//! Documents of `export` and `import`.

use serde::Serialize;
use vmdr_proto::control;

use crate::text;

/// What is known of a domain's exports: part of `status`.
#[derive(Serialize)]
pub struct Exported {
    at: Option<String>,
    point: Option<String>,
    error: Option<String>,
}

impl Exported {
    /// Nothing, if nothing was ever exported or tried.
    pub fn new(status: &control::DomainStatus) -> Option<Exported> {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let at = text::instant(status.exported_unix_ns);
        let exported = Exported { at, point: word(&status.exported_point), error: word(&status.export_error) };
        (exported.at.is_some() || exported.error.is_some()).then_some(exported)
    }
}

/// `export`.
#[derive(Serialize)]
pub struct Export {
    domain: String,
    uuid: String,
    url: String,
    point: Option<String>,
    cut: Option<String>,
    already: bool,
    base: Option<String>,
    total_bytes: u64,
    read_bytes: u64,
    sent_chunks: u64,
    sent_bytes: u64,
    seconds: f64,
    rewrapped: bool,
    pruned: Option<Pruned>,
}

#[derive(Serialize)]
struct Pruned {
    kept: u64,
    dropped: Vec<String>,
    deleted_chunks: u64,
    marked_chunks: u64,
}

impl From<&control::ExportReport> for Export {
    fn from(report: &control::ExportReport) -> Export {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Export {
            domain: report.name.clone(),
            uuid: report.uuid.clone(),
            url: report.url.clone(),
            point: word(&report.point),
            cut: text::instant(report.cut_unix_ns),
            already: report.already,
            base: word(&report.base),
            total_bytes: report.total_bytes,
            read_bytes: report.read_bytes,
            sent_chunks: report.sent_chunks,
            sent_bytes: report.sent_bytes,
            seconds: report.seconds,
            rewrapped: report.rewrapped,
            pruned: report.pruned.as_ref().map(|pruned| Pruned {
                kept: pruned.kept,
                dropped: pruned.dropped.clone(),
                deleted_chunks: pruned.deleted_chunks,
                marked_chunks: pruned.marked_chunks,
            }),
        }
    }
}

/// `import --list`.
#[derive(Serialize)]
pub struct List {
    url: String,
    domains: Vec<Domain>,
}

#[derive(Serialize)]
struct Domain {
    uuid: String,
    name: Option<String>,
    points: Vec<Point>,
    error: Option<String>,
}

#[derive(Serialize)]
struct Point {
    id: String,
    cut: Option<String>,
    consistency: String,
    exported: Option<String>,
    ram_bytes: u64,
    disk_bytes: u64,
    chunks: u64,
    damage: Option<String>,
}

impl From<&control::ColdListReply> for List {
    fn from(reply: &control::ColdListReply) -> List {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let point = |point: &control::ColdPoint| Point {
            id: point.id.clone(),
            cut: text::instant(point.cut_unix_ns),
            consistency: point.consistency.clone(),
            exported: text::instant(point.exported_unix_ns),
            ram_bytes: point.ram_bytes,
            disk_bytes: point.disk_bytes,
            chunks: point.chunks,
            damage: word(&point.damage),
        };
        let domain = |domain: &control::ColdDomain| Domain {
            uuid: domain.uuid.clone(),
            name: word(&domain.name),
            points: domain.points.iter().map(point).collect(),
            error: word(&domain.error),
        };
        List { url: reply.url.clone(), domains: reply.domains.iter().map(domain).collect() }
    }
}

/// `import`.
#[derive(Serialize)]
pub struct Import {
    domain: String,
    uuid: String,
    point: String,
    cut: Option<String>,
    total_bytes: u64,
    read_bytes: u64,
    seconds: f64,
}

impl From<&control::ImportReport> for Import {
    fn from(report: &control::ImportReport) -> Import {
        Import {
            domain: report.name.clone(),
            uuid: report.uuid.clone(),
            point: report.point.clone(),
            cut: text::instant(report.cut_unix_ns),
            total_bytes: report.total_bytes,
            read_bytes: report.read_bytes,
            seconds: report.seconds,
        }
    }
}
