//! A name server (Debian's knot) in a site, which takes signed updates of one zone and of one of names of addresses.

use crate::site::Site;
use crate::wait::wait_for;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::Duration;

/// The zone of names.
pub const ZONE: &str = "vmdr.example";
/// Where it listens, in the site.
pub const SERVER: &str = "127.0.0.1:5353";
/// The file with the key that it takes, in the site.
pub const KEY_FILE: &str = "/etc/vmdr/dns.key";
/// How long it may take to answer.
const ANSWER_SECONDS_MAX: u64 = 30;
const DIRECTORY: &str = "/etc/vmdr/knot";
const KEY_NAME: &str = "vmdr-test";

/// Ended with this.
pub struct Knot {
    child: Child,
}

impl Knot {
    /// Starts it; `reverse` is its zone of names of addresses. It answers when this does.
    pub fn start(site: &Site, reverse: &str) -> Result<Self> {
        let directory = site.path(DIRECTORY);
        fs::create_dir_all(&directory).context("make the name server's directory")?;
        // Whose digits are base64, too.
        let secret = uuid::Uuid::new_v4().simple().to_string();
        let key_file = site.path(KEY_FILE);
        fs::write(&key_file, format!("hmac-sha256:{KEY_NAME}:{secret}\n")).context("write the key")?;
        fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).context("protect the key")?;
        let mut text = format!(
            "server:\n    listen: {}\n    rundir: {DIRECTORY}\ndatabase:\n    storage: {DIRECTORY}\nlog:\n  - target: stderr\n    any: \
             warning\nkey:\n  - id: {KEY_NAME}\n    algorithm: hmac-sha256\n    secret: {secret}\nacl:\n  - id: updates\n    key: \
             {KEY_NAME}\n    action: update\nzone:\n",
            SERVER.replace(':', "@")
        );
        for zone in [ZONE, reverse] {
            text.push_str(&format!(
                "  - domain: {zone}\n    storage: {DIRECTORY}\n    file: {zone}.zone\n    acl: updates\n    zonefile-sync: -1\n"
            ));
            let records = format!(
                "$ORIGIN {zone}.\n$TTL 3600\n@ SOA ns.{ZONE}. admin.{ZONE}. 1 60 60 3600 60\n@ NS ns.{ZONE}.\n"
            );
            fs::write(directory.join(format!("{zone}.zone")), records).context("write a zone")?;
        }
        fs::write(directory.join("knot.conf"), text).context("write the name server's configuration")?;
        let log = fs::File::create(directory.join("log")).context("make the name server's log")?;
        let mut command = site.enter();
        command.args(["knotd", "-c", &format!("{DIRECTORY}/knot.conf")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let knot = Self { child: command.spawn().context("run knotd (scripts/setup installs it)")? };
        wait_for("the name server", Duration::from_secs(ANSWER_SECONDS_MAX), || {
            Ok(ask(site, ZONE, "SOA").ok().filter(|answer| !answer.is_empty()).map(drop))
        })
        .with_context(|| fs::read_to_string(directory.join("log")).unwrap_or_default())?;
        Ok(knot)
    }
}

impl Drop for Knot {
    fn drop(&mut self) {
        // What nsenter has started is the site's, and ends with that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server of a site says of a name: the values, sorted.
pub fn ask(site: &Site, name: &str, kind: &str) -> Result<Vec<String>> {
    let (address, port) = SERVER.split_once(':').context("an address and a port")?;
    let said = site.run("kdig", &[&format!("@{address}"), "-p", port, "+short", "+time=2", name, kind])?;
    let mut lines: Vec<String> = said
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(';'))
        .map(str::to_owned)
        .collect();
    lines.sort();
    Ok(lines)
}
