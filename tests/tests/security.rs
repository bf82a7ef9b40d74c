//! Who may do what, with the real daemons: on the control sockets, over the network, and what the audit log says of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "security/peers.rs"]
mod peers;
#[path = "security/sockets.rs"]
mod sockets;

use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vmdr_tests::daemon::{self, Program};
use vmdr_tests::site::Site;

/// The newest records of a daemon's audit log, as `vmdr audit` shows them.
fn audit(site: &Site, program: Program) -> Result<Vec<Value>> {
    let document = daemon::vmdr_json(site, &["audit", "-n", "10000"])?;
    let name = if program == Program::Agent { "agent" } else { "receiver" };
    let records = document["records"].as_array().context("the audit log has no records")?;
    Ok(records.iter().filter(|record| record["daemon"] == name).cloned().collect())
}

/// Whether there is a record with these words in it.
fn recorded(records: &[Value], act: &str, outcome: &str, words: &[&str]) -> bool {
    records.iter().any(|record| {
        let text = record.to_string();
        record["act"] == act && record["outcome"] == outcome && words.iter().all(|word| text.contains(word))
    })
}

/// The command must have failed with this code and said this.
fn failed(output: &Output, code: i32, word: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code) && said.contains(word), "{}: {said}", output.status);
    Ok(())
}
