//! The control sockets: an unprivileged user, a reader, an operator; and the record of what they tried.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use vmdr_tests::daemon::{self, Daemon, Program};
use vmdr_tests::exec;
use vmdr_tests::rig::{At, Rig};
use vmdr_tests::site::Site;

use super::{audit, failed, recorded};

/// Groups that every Debian has.
const CONFIG: &str = "operator_group = \"staff\"\nreader_group = \"users\"\n";
/// The command where everybody can run it.
const COMMAND: &str = "/run/vmdr-command";

/// What a reader may ask.
const LOOKS: &[&[&str]] = &[
    &["status"],
    &["doctor"],
    &["doctor", "web1"],
    &["points", "web1"],
    &["peers"],
    &["activate", "web1", "--dry-run"],
];
/// What only an operator may: everything else, whether it is answered at once or bit by bit.
const CHANGES: &[&[&str]] = &[
    &["prepare", "web1"],
    &["protect", "web1"],
    &["hold", "web1"],
    &["release", "web1"],
    &["suspend", "web1"],
    &["resume", "web1"],
    &["unprotect", "web1"],
    &["move", "web1"],
    &["reprotect", "web1"],
    &["failback", "web1"],
    &["own", "web1", "--force", "--reason", "because", "--yes"],
    &["point", "create", "web1", "--name", "x"],
    &["point", "release", "web1", "--name", "x"],
    &["retention", "web1"],
    &["verify", "web1"],
    &["verify", "web1", "--wait"],
    &["activate", "web1", "--yes"],
    &["activate", "web1", "--yes", "--wait"],
    &["divergence", "web1"],
    &["divergence", "web1", "--drop", "--yes"],
    &["forget", "web1", "--yes"],
    &["pair"],
    &["peers", "revoke", "site-a"],
    &["peers", "at", "site-a", "a.example"],
    &["peers", "rotate"],
    &["peers", "grant", "web1", "site-a"],
    &["audit"],
    &["audit", "verify"],
];

/// Runs the command as a user that is nobody, in one group.
fn as_nobody(site: &Site, group: &str, words: &[&str]) -> Result<Output> {
    let mut command = site.command("setpriv");
    command.args(["--reuid", "nobody", "--regid", "nogroup", "--groups", group, COMMAND]);
    exec::output(command.env("NO_COLOR", "1").args(words))
}

#[test]
fn a_user_without_a_role_is_refused_and_everything_is_recorded() -> Result<()> {
    let rig = Rig::new("sockets")?;
    let site = rig.site(At::B);
    let command = site.path(COMMAND);
    fs::copy(daemon::binary("vmdr")?, &command).context("copy the command")?;
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).context("let everybody run it")?;
    let receiver = Daemon::start(site, Program::Receiver, CONFIG)?;
    let agent = Daemon::start(site, Program::Agent, CONFIG)?;

    for words in LOOKS.iter().chain(CHANGES) {
        failed(&as_nobody(site, "nogroup", words)?, 1, "neither root nor in a group")?;
    }
    for words in LOOKS {
        let output = as_nobody(site, "users", words)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!said.contains("uid"), "{words:?}: {said}");
    }
    // An activation asks for the plan first, which a reader may see, and there is none.
    for words in CHANGES.iter().filter(|words| words[0] != "activate") {
        failed(&as_nobody(site, "users", words)?, 1, "it is for operators")?;
    }
    // Not refused: there is no such domain.
    for words in [&["forget", "web1", "--yes"][..], &["unprotect", "web1"]] {
        failed(&as_nobody(site, "staff", words)?, 4, "web1")?;
    }
    let of_receiver = audit(site, Program::Receiver)?;
    ensure!(recorded(&of_receiver, "Status", "refused", &["uid 65534"]), "{of_receiver:?}");
    ensure!(recorded(&of_receiver, "Forget", "refused", &["uid 65534", "may look"]), "{of_receiver:?}");
    ensure!(recorded(&of_receiver, "Forget", "begun", &["uid 65534", "web1"]), "{of_receiver:?}");
    ensure!(recorded(&of_receiver, "Forget", "failed", &["uid 65534", "web1"]), "{of_receiver:?}");
    let of_agent = audit(site, Program::Agent)?;
    ensure!(recorded(&of_agent, "Unprotect", "begun", &["uid 65534", "web1"]), "{of_agent:?}");
    ensure!(recorded(&of_agent, "Doctor", "refused", &["uid 65534"]), "{of_agent:?}");

    // A log that is whole, then one in which a byte was changed, then one that was cut short.
    daemon::vmdr(site, &["audit", "verify"])?;
    let directory = site.path("/var/lib/vmdr/audit");
    let log = directory.join("receiver-000000000001.jsonl");
    let good = fs::read_to_string(&log).context("read the log")?;
    fs::write(&log, good.replacen("uid 65534", "uid 65533", 1)).context("change the log")?;
    let line = good.lines().position(|line| line.contains("uid 65534")).context("a line to change")? + 1;
    let verify = |words: &[&str]| daemon::vmdr_output(site, 60, &[&["audit", "verify"], words].concat());
    failed(&verify(&[])?, 1, "was changed")?;
    let said = String::from_utf8_lossy(&verify(&[])?.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(said.contains(&format!("line {line}: its hash does not match")), "line {line}: {said}");
    failed(&verify(&["--dir", "/var/lib/vmdr/audit"])?, 1, "was changed")?;
    let kept: String = good.lines().take(2).map(|line| format!("{line}\n")).collect();
    fs::write(&log, kept).context("cut the log short")?;
    let said = String::from_utf8_lossy(&verify(&[])?.stdout).into_owned();
    ensure!(said.contains("missing after it"), "{said}");
    drop((receiver, agent));
    rig.finish()
}
