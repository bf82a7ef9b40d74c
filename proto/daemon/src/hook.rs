//! libvirt's hook, which keeps a domain from being started on a host that does not own it, or was not told since its start
//! that it does: also by libvirt's autostart, before any daemon of vmdr runs.
//!
//! libvirt looks for hooks when it is started: one that is new counts from its next start, or that of the host.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::ownership::Ownerships;

/// Where libvirt looks for it, unless configured otherwise.
pub const HOOK: &str = "/etc/libvirt/hooks/qemu.d/vmdr";

/// The hook's text. `prepare` comes before every start: an ordinary one, a restore, an incoming migration.
fn text(ownerships: &Ownerships) -> String {
    let (records, confirmed) = ownerships.directories();
    format!(
        r#"#!/bin/sh
# Of vmdr; vmdr-agent writes it anew when it is missing. Refuses to start a domain that another site may own.
[ "$2 $3" = "prepare begin" ] || exit 0
uuid=$(sed -n 's:.*<uuid>\([0-9a-fA-F-]*\)</uuid>.*:\1:p' | head -n 1)
record='{records}'/$uuid.json
[ -n "$uuid" ] && [ -e "$record" ] || exit 0
if ! grep -q '"may_run": true' "$record"; then
    echo "vmdr: domain $1 is fenced: another site owns it, or may. 'vmdr status $1' says more; 'vmdr own $1' gets it back" >&2
    exit 1
fi
grep -q '"ask_first": true' "$record" || exit 0
# What vmdr-agent has said of a guest that its backup site takes by itself: nanoseconds since the host was started.
permission='{confirmed}'/$uuid.may
if [ -e "$permission" ]; then
    until=$(od -A n -t u8 -j 8 -N 8 "$permission" | tr -d ' ')
    read -r now rest < /proc/uptime
    if [ "${{until:-0}}" -le $(( (${{now%.*}} + 1) * 1000000000 )) ]; then
        echo "vmdr: domain $1 may not run here now: its backup site may have taken it, and vmdr-agent has neither a lease at the" \
            "witness nor an answer of that site. 'vmdr status $1' says more" >&2
        exit 1
    fi
fi
[ -e '{confirmed}'/"$uuid" ] && exit 0
echo "vmdr: this host was started anew, and was not told yet that it still owns domain $1. vmdr-agent asks the backup" \
    "site and starts it then; 'vmdr own $1 --force --reason TEXT' if that site is gone" >&2
exit 1
"#,
        records = records.display(),
        confirmed = confirmed.display()
    )
}

/// Installs it. Whether it is new.
pub fn install(path: &Path, ownerships: &Ownerships) -> io::Result<bool> {
    let text = text(ownerships);
    let executable = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o111 != 0);
    if fs::read_to_string(path).is_ok_and(|there| there == text) && executable(path) {
        return Ok(false);
    }
    crate::durable::write(path, text.as_bytes())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::ownership::Event;

    const UUID: &str = "22222222-1111-4111-8111-111111111111";

    #[test]
    fn a_domain_starts_only_where_it_may() {
        let directory = tempfile::tempdir().unwrap();
        let all = Ownerships::new(&directory.path().join("a b"), &directory.path().join("confirmed"));
        let hook = directory.path().join("hooks/qemu.d/vmdr");
        assert!(install(&hook, &all).unwrap());
        assert!(!install(&hook, &all).unwrap());
        let run_as = |uuid: &str, operation: &str| {
            let mut child = Command::new(&hook)
                .args(["web", operation, "begin", "-"])
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let xml = format!("<domain type='kvm'>\n  <name>web</name>\n  <uuid>{uuid}</uuid>\n</domain>\n");
            // One that is not interested does not read.
            let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
            let output = child.wait_with_output().unwrap();
            (output.status.success(), String::from_utf8(output.stderr).unwrap())
        };
        let run = |operation: &str| run_as(UUID, operation);
        assert!(run("prepare").0, "nothing is known of it");
        all.transition(UUID, "web", &Event::Protected(1), "").unwrap();
        let (may, said) = run("prepare");
        assert!(!may && said.contains("was not told yet"), "{said}");
        assert!(run("stopped").0);
        all.confirm(UUID).unwrap();
        assert!(run("prepare").0);
        // The second word of the file is what counts: `Permission` of the shim writes it.
        let uptime = fs::read_to_string("/proc/uptime").unwrap();
        let seconds: u64 = uptime.split('.').next().unwrap().parse().unwrap();
        for (until, may) in [
            (0, false),
            (i64::MAX as u64, true),
            (seconds * 1_000_000_000, false),
            ((seconds + 60) * 1_000_000_000, true),
        ] {
            let words: Vec<u8> = [7u64, until, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
            fs::write(all.permission(UUID), words).unwrap();
            let (found, said) = run("prepare");
            assert_eq!((found, said.contains("may not run here now")), (may, !may), "{until}: {said}");
        }
        fs::write(all.permission(UUID), "").unwrap();
        assert!(!run("prepare").0, "one that is not whole is none");
        fs::remove_file(all.permission(UUID)).unwrap();
        all.transition(UUID, "web", &Event::Outdated(2), "").unwrap();
        let (may, said) = run("prepare");
        assert!(!may && said.contains("domain web is fenced"), "{said}");
        // The copy of a drill is another domain.
        assert!(run_as("33333333-1111-4111-8111-111111111111", "prepare").0);
        all.transition(UUID, "web", &Event::Activating(3), "").unwrap();
        assert!(run("prepare").0, "it is protected nowhere: there is nobody to ask");
    }
}
