//! Commands about recovery points: `points`, `point`, `retention`.

use std::time::SystemTime;

use vmdr_proto::control::{
    DomainRequest, Point, PointRequest, PointsReply, Retention, RetentionReply, RetentionRequest, RetentionTier,
};

use super::Out;
use crate::args::{Common, Domain, Tier};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::table::{Cell, Side, Table};
use crate::{json, text};

/// Columns for what is said of a point.
const NOTE_COLUMNS: usize = 36;

/// Lists the recovery points.
pub async fn points(common: &Common, out: Out, domain: &Domain) -> Result<(), Failure> {
    let request = DomainRequest { domain: domain.0.clone() };
    let reply = answer(Daemon::Receiver, "points", client::receiver(common).await?.points(request)).await?;
    out.result("points", || json::Points::new(&domain.0, &reply), || points_table(out, domain, &reply))
}

fn points_table(out: Out, domain: &Domain, reply: &PointsReply) -> String {
    let points = &reply.points;
    if points.is_empty() {
        return format!("{} has no recovery point here yet: its first copy is not whole\n", text::one_line(&domain.0));
    }
    let now = SystemTime::now();
    let age = |ns: u64| text::age_seconds(ns, now).map_or("-".to_owned(), text::seconds);
    let mut table = Table::new([
        ("POINT", Side::Left),
        ("CUT (UTC)", Side::Left),
        ("AGE", Side::Right),
        ("CONSISTENCY", Side::Left),
        ("SIZE", Side::Right),
        ("VERIFIED", Side::Right),
        ("NOTE", Side::Left),
    ]);
    for point in points {
        let verified = match age(point.verified_unix_ns) {
            never if never == "-" => never,
            age => age + " ago",
        };
        let tone = match (point.damaged, point.newest) {
            (true, _) => Tone::Bad,
            (_, true) => Tone::Good,
            _ => Tone::Plain,
        };
        table.row(
            [
                text::one_line(&point.id).into(),
                text::instant_short(point.cut_unix_ns).into(),
                age(point.cut_unix_ns).into(),
                text::one_line(&point.consistency).into(),
                text::bytes(point.bytes as f64).into(),
                verified.into(),
                Cell::toned(text::shortened(&note(point), NOTE_COLUMNS), tone),
            ],
            String::new(),
        );
    }
    let alarm = reply.retention.as_ref().map_or("", |retention| &retention.alarm);
    let alarm = if alarm.is_empty() { String::new() } else { text::wrapped("alarm: ", &text::one_line(alarm)) };
    table.render(out.style) + &alarm
}

fn note(point: &Point) -> String {
    let mut notes = Vec::new();
    if point.damaged {
        notes.push("damaged".to_owned());
    }
    if point.newest {
        notes.push("newest".to_owned());
    }
    if point.pinned {
        let names: Vec<_> = point.names.iter().map(|name| text::one_line(name)).collect();
        notes.push(if names.is_empty() { "pinned".to_owned() } else { format!("pinned: {}", names.join(", ")) });
    }
    notes.join(", ")
}

/// Names a point.
pub async fn create(
    common: &Common,
    out: Out,
    domain: &Domain,
    name: &str,
    point: Option<&str>,
) -> Result<(), Failure> {
    let point = point.unwrap_or_default().to_owned();
    let request = PointRequest { domain: domain.0.clone(), name: name.to_owned(), point };
    let mut receiver = client::receiver(common).await?;
    let point = answer(Daemon::Receiver, "point create", receiver.create_point(request)).await?;
    out.result(
        "point",
        || json::NamedPoint::new(&domain.0, name, true, &point),
        || {
            let (id, cut) = (text::one_line(&point.id), text::instant_short(point.cut_unix_ns));
            format!(
                "{name} is recovery point {id} of {}, cut {cut} UTC; it is kept until it is released\n",
                text::one_line(&domain.0)
            )
        },
    )
}

/// Makes an application-consistent point and names it.
pub async fn create_application(common: &Common, out: Out, domain: &Domain, name: &str) -> Result<(), Failure> {
    let request = PointRequest { domain: domain.0.clone(), name: name.to_owned(), point: String::new() };
    let mut agent = client::agent(common).await?;
    let made = answer(Daemon::Agent, "point create", agent.create_point(request)).await?;
    let point = made.point.clone().unwrap_or_default();
    out.result(
        "point",
        || json::NamedPoint::made(&domain.0, name, &point, &made),
        || {
            let (id, cut) = (text::one_line(&point.id), text::instant_short(point.cut_unix_ns));
            let said = format!(
                "{name} is recovery point {id} of {}, cut {cut} UTC, application-consistent; it is kept until it is released\n",
                text::one_line(&domain.0)
            );
            let frozen = format!(
                "{} froze {} file systems for {}. {}",
                text::one_line(&made.way),
                made.file_systems,
                text::seconds(made.frozen_seconds),
                text::one_line(&made.note)
            );
            said + &text::wrapped("", frozen.trim_end())
        },
    )
}

/// Releases a name.
pub async fn release(common: &Common, out: Out, domain: &Domain, name: &str) -> Result<(), Failure> {
    let request = PointRequest { domain: domain.0.clone(), name: name.to_owned(), point: String::new() };
    let mut receiver = client::receiver(common).await?;
    let point = answer(Daemon::Receiver, "point release", receiver.release_point(request)).await?;
    out.result(
        "point",
        || json::NamedPoint::new(&domain.0, name, false, &point),
        || {
            format!(
                "{name} is released: the retention policy decides about recovery point {}\n",
                text::one_line(&point.id)
            )
        },
    )
}

/// Shows or changes the policy.
pub async fn retention(
    common: &Common,
    out: Out,
    domain: &Domain,
    tiers: &[Tier],
    budget: Option<u64>,
    reset: bool,
) -> Result<(), Failure> {
    let mut receiver = client::receiver(common).await?;
    let show = RetentionRequest { domain: domain.0.clone(), ..RetentionRequest::default() };
    let request = if reset {
        RetentionRequest { reset, ..show }
    } else if tiers.is_empty() && budget.is_none() {
        show
    } else {
        // What is not given stays.
        let now = answer(Daemon::Receiver, "retention", receiver.retention(show.clone())).await?;
        let mut retention = now.retention.unwrap_or_default();
        if !tiers.is_empty() {
            let tier = |t: &Tier| RetentionTier { every_seconds: t.every_seconds, for_seconds: t.for_seconds };
            retention.tiers = tiers.iter().map(tier).collect();
        }
        retention.budget_bytes = budget.unwrap_or(retention.budget_bytes);
        RetentionRequest { change: true, retention: Some(retention), ..show }
    };
    let reply = answer(Daemon::Receiver, "retention", receiver.retention(request)).await?;
    out.result("retention", || json::RetentionPolicy::new(&domain.0, &reply), || policy_text(domain, &reply))
}

fn policy_text(domain: &Domain, reply: &RetentionReply) -> String {
    let Retention { budget_bytes, tiers } = reply.retention.clone().unwrap_or_default();
    let mut said =
        format!("Recovery points of {} that are kept, beside the newest and named ones:\n", text::one_line(&domain.0));
    if tiers.is_empty() {
        said.push_str("  none\n");
    }
    for tier in &tiers {
        let every = match tier.every_seconds {
            0 => "every epoch".to_owned(),
            seconds => format!("one of every {}", duration(seconds)),
        };
        said.push_str(&format!("  {every}, for {}\n", duration(tier.for_seconds)));
    }
    let used = text::bytes(reply.history_bytes as f64);
    said.push_str(&format!("Space for them: {used} used of {}\n", text::bytes(budget_bytes as f64)));
    if !reply.alarm.is_empty() {
        said.push_str(&text::wrapped("alarm: ", &text::one_line(&reply.alarm)));
    }
    said
}

fn duration(seconds: u64) -> String {
    humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string()
}
