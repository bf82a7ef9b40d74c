//! What a benchmark found: tables for a person, JSON for a program.

use std::fmt::Write;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

/// Version of the JSON document. It rises when a field changes its meaning or goes.
pub const VERSION: u32 = 1;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For a person.
    Table,
    /// For a program.
    Json,
}

/// A value that a figure should not exceed.
#[derive(Clone, Debug, Serialize)]
pub struct Bar {
    /// What is measured.
    pub name: String,
    /// What came out.
    pub value: f64,
    /// The most allowed.
    pub limit: f64,
    /// Whether it is kept.
    pub met: bool,
}

impl Bar {
    /// A bar of `limit` for `value`.
    pub fn new(name: impl Into<String>, value: f64, limit: f64) -> Self {
        Self { name: name.into(), value, limit, met: value <= limit }
    }
}

/// Rows under headings.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// One line above it.
    pub title: String,
    /// Headings.
    pub heads: Vec<&'static str>,
    /// Rows with as many cells.
    pub rows: Vec<Vec<String>>,
}

/// What it was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    cores: usize,
    kernel: String,
    qemu: String,
    /// Of vmdr: dev or release.
    profile: &'static str,
    kvm: bool,
    /// Processes that wanted to run in the minute before, and in the last one.
    load_before: f64,
    load_after: f64,
}

impl Host {
    /// As it is now.
    pub fn now() -> Result<Self> {
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output().context("ask QEMU for its version")?;
        let qemu = String::from_utf8_lossy(&qemu.stdout);
        let load = load();
        Ok(Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            qemu: qemu.split_whitespace().nth(3).unwrap_or("unknown").to_owned(),
            profile: if cfg!(debug_assertions) { "dev" } else { "release" },
            kvm: kvm_opens(),
            load_before: load,
            load_after: load,
        })
    }
}

/// Whether /dev/kvm can be used here.
pub fn kvm_opens() -> bool {
    fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    benchmark: &'static str,
    host: Host,
    /// Every measurement with its floor.
    pub results: Vec<Value>,
    /// What should be kept.
    pub bars: Vec<Bar>,
    /// The same for a person.
    #[serde(skip)]
    pub tables: Vec<Table>,
}

impl Report {
    /// An empty one; measuring begins now.
    pub fn new(benchmark: &'static str) -> Result<Self> {
        let host = Host::now()?;
        Ok(Self { version: VERSION, benchmark, host, results: Vec::new(), bars: Vec::new(), tables: Vec::new() })
    }

    /// Measuring has ended.
    pub fn finish(mut self) -> Self {
        self.host.load_after = load();
        self
    }

    /// Whether a bar is missed.
    pub fn missed(&self) -> bool {
        self.bars.iter().any(|bar| !bar.met)
    }

    /// The text to be printed.
    pub fn print(&self, format: Format) -> Result<String> {
        if format == Format::Json {
            return Ok(serde_json::to_string_pretty(self).context("write the results as JSON")? + "\n");
        }
        let mut text = String::new();
        let host = &self.host;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{} ({} profile, {} cores, kernel {}, QEMU {}, load {:.1} before and {:.1} after)",
            self.benchmark, host.profile, host.cores, host.kernel, host.qemu, host.load_before, host.load_after
        );
        for table in &self.tables {
            let _ = write!(text, "\n{}\n{}", table.title, lines(table));
        }
        if !self.bars.is_empty() {
            let rows = self.bars.iter().map(|bar| {
                let met = if bar.met { "met" } else { "MISSED" };
                vec![bar.name.clone(), format!("{:.2}", bar.value), format!("{:.2}", bar.limit), met.to_owned()]
            });
            let table =
                Table { heads: vec!["bar", "value", "at most", ""], rows: rows.collect(), title: String::new() };
            let _ = write!(text, "\n{}", lines(&table));
        }
        Ok(text)
    }
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
fn lines(table: &Table) -> String {
    let heads: Vec<String> = table.heads.iter().map(|head| (*head).to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&heads).chain(&table.rows).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    for row in all {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bar_shows_everywhere() {
        let mut report = Report::new("pause").unwrap().finish();
        report.bars.push(Bar::new("kept", 1.2, 1.25));
        assert!(!report.missed());
        report.bars.push(Bar::new("too long", 1.3, 1.25));
        assert!(report.missed());
        let text = report.print(Format::Table).unwrap();
        assert!(text.contains("too long   1.30     1.25  MISSED"), "{text}");
        let json: Value = serde_json::from_str(&report.print(Format::Json).unwrap()).unwrap();
        assert_eq!((&json["version"], &json["bars"][1]["met"]), (&VERSION.into(), &false.into()));
    }

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let table =
            Table { title: String::new(), heads: vec!["a", "long"], rows: vec![row(["name", "1"]), row(["n", ""])] };
        assert_eq!(lines(&table), "a     long\nname     1\nn\n");
    }
}
