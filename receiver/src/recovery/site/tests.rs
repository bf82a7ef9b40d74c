use std::path::PathBuf;

use super::*;
use crate::activate::host::fake::FakeHost;

const Q35: &str = include_str!("../../activate/testdata/q35.xml");

/// A standby of a guest without tools.
fn standby() -> Standby {
    let without = Q35.replace("org.vmdr.guest.0", "org.example.0");
    let disks = vec![("vda".to_owned(), 1 << 30)];
    Standby { name: "proof".to_owned(), uuid: "u".to_owned(), xml: Ok(Element::parse(&without).unwrap()), disks }
}

fn host() -> FakeHost {
    let networks = [("dr".to_owned(), NetworkState::Active), ("idle".to_owned(), NetworkState::Inactive)].into();
    FakeHost { interfaces: ["br-dr".to_owned()].into(), networks, ..FakeHost::default() }
}

fn said(plan: &str, host: &FakeHost) -> Vec<String> {
    let plan = Plan::parse(plan).unwrap();
    let found = check(&plan, &[standby()], host).unwrap();
    found.iter().map(|f| format!("{}:{}: {}", f.finding.line, f.finding.column, f.finding.message)).collect()
}

#[test]
fn a_plan_that_fits_has_nothing_said_of_it() {
    let plan = "[[defaults.nic]]\nsource = \"lan\"\nnetwork = \"dr\"\n[domain.proof]\ncpu_shares = 100\n\
                [[domain.proof.nic]]\nmac = \"52:54:00:AA:BB:01\"\nbridge = \"br-dr\"\nvlan = 7\n\
                [[domain.proof.before]]\nargv = [\"/bin/sh\", \"-c\", \"true\"]\n";
    assert_eq!(said(plan, &host()), [] as [&str; 0]);
}

#[test]
fn what_this_site_lacks_is_said_once_where_the_plan_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    let mut open = std::fs::metadata(&secret).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o644);
    std::fs::set_permissions(&secret, open).unwrap();
    let iscsi = "[[domain.proof.disk]]\nserial = \"LUN0001\"\niscsi = { portal = \"127.0.0.1:1\", iqn = \"iqn.2026-01.example:san\", lun = 1";
    let in_domain = |text: &str| format!("[domain.proof]\n{text}");
    let cases: Vec<(String, Vec<&str>)> = vec![
        (
            "[[defaults.nic]]\nsource = \"br0\"\nbridge = \"br-gone\"\n[domain.proof]\n".to_owned(),
            vec!["3:10: bridge br-gone is not on this host"],
        ),
        (
            in_domain("[[domain.proof.nic]]\nsource = \"vmbr0\"\nnetwork = \"gone\"\n"),
            vec!["4:11: the libvirt network gone is not on"],
        ),
        (
            in_domain("[[domain.proof.nic]]\nsource = \"vmbr0\"\nnetwork = \"idle\"\n"),
            vec!["4:11: the libvirt network idle is not started"],
        ),
        (
            in_domain("[[domain.proof.nic]]\nsource = \"vmbr7\"\nbridge = \"br-dr\"\n"),
            vec!["3:10: proof has no such NIC; it has 52:54:00:aa:bb:01"],
        ),
        (in_domain("[[domain.proof.nic]]\nmac = \"52:54:00:00:00:09\"\n"), vec!["3:7: proof has no such NIC"]),
        ("[domain.web9]\n".to_owned(), vec!["1:9: nothing is stored here of \"web9\""]),
        (in_domain("[[domain.proof.after]]\nargv = [\"/no/such/hook\"]\n"), vec!["3:8: /no/such/hook: No such file"]),
        (in_domain("[[domain.proof.after]]\nargv = [\"/etc/passwd\"]\n"), vec!["3:8: /etc/passwd is no program"]),
        (
            in_domain("[[domain.proof.disk]]\ntarget = \"vdq\"\nfile = \"/no/such/directory/a.raw\"\n"),
            vec![
                "3:10: proof has no such disk; it has vda",
                "4:1: /no/such/directory is no directory",
                "4:1: a disk in a file",
            ],
        ),
        (
            in_domain("[[domain.proof.disk]]\ntarget = \"vda\"\ndevice = \"/dev/null\"\n"),
            vec!["4:1: /dev/null: it is no block device", "4:1: a disk on a block device is not supported"],
        ),
        (
            in_domain(&format!("{iscsi}, user = \"a\", secret_file = \"/no/secret\" }}\n")),
            vec![
                "4:1: a disk on an iSCSI",
                "4:1: the portal 127.0.0.1:1 cannot be reached",
                "the CHAP secret cannot be read from /no/secret",
            ],
        ),
        (
            in_domain(&format!("{iscsi}, user = \"a\", secret_file = \"{}\" }}\n", secret.display())),
            vec!["4:1: a disk on an iSCSI", "4:1: the portal", "can be read by others"],
        ),
        (
            in_domain(
                "[[domain.proof.nic]]\nsource = \"vmbr0\"\naddressing = \"changed\"\naddresses = [\"10.1.0.5/24\"]\n",
            ),
            vec!["4:14: proof has neither vmdr's tools nor"],
        ),
        (
            in_domain("hostname = \"a\"\ndns_servers = [\"10.1.0.53\"]\n"),
            vec!["2:12: proof has no channel to vmdr's tools", "3:16: proof has no channel to vmdr's tools"],
        ),
        (
            "[dns]\nserver = \"127.0.0.1:1\"\nzone = \"example.org\"\nkey_file = \"/no/key\"\n".to_owned(),
            vec!["4:12: the TSIG key in /no/key: No such file"],
        ),
        (
            format!("[dns]\nserver = \"127.0.0.1:1\"\nzone = \"example.org\"\nkey_file = \"{}\"\n", secret.display()),
            vec!["4:12: the TSIG key"],
        ),
    ];
    for (plan, expected) in cases {
        let said = said(&plan, &host());
        assert_eq!(said.len(), expected.len(), "{plan}: {said:?}");
        for (line, expected) in said.iter().zip(expected) {
            assert!(line.contains(expected), "{plan}: {line:?} is not {expected:?}");
        }
    }
    let hook = directory.path().join("hook");
    std::fs::write(&hook, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let plan = in_domain(&format!("[[domain.proof.after]]\nargv = [\"{}\"]\n", hook.display()));
    let found = said(&plan, &host());
    assert!(found.len() == 1 && found[0].starts_with("3:8: others than its owner can write"), "{found:?}");
    let flat = FakeHost { vlans: false, ..host() };
    let plan = in_domain("[[domain.proof.nic]]\nsource = \"vmbr0\"\nbridge = \"br-dr\"\nvlan = 7\n");
    assert_eq!(said(&plan, &flat), ["5:8: bridge br-dr does not tell VLANs apart"]);
}

#[test]
fn a_device_that_is_too_small_is_told_with_both_sizes() {
    // Loop devices are the machine's: this one is made by the test and goes with it.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("small");
    std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let device = std::process::Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
    assert!(device.status.success(), "{device:?}");
    let device = PathBuf::from(String::from_utf8(device.stdout).unwrap().trim());
    let plan = format!("[domain.proof]\n[[domain.proof.disk]]\ntarget = \"vda\"\ndevice = \"{}\"\n", device.display());
    let said = said(&plan, &host());
    let gone = std::process::Command::new("losetup").arg("--detach").arg(&device).status().unwrap();
    assert!(gone.success());
    let expected = format!("4:1: {} has 1048576 bytes, disk vda of proof has 1073741824", device.display());
    assert!(said.contains(&expected), "{said:?}");
}

#[test]
fn who_is_in_the_guest_decides_what_can_be_changed_there() {
    let nic = "[domain.proof]\n[[domain.proof.nic]]\nsource = \"vmbr0\"\naddressing = \"changed\"\naddresses = [\"10.1.0.5/24\"]\n";
    let said = |plan: &str, xml: &str| {
        let with = Standby { xml: Ok(Element::parse(xml).unwrap()), ..standby() };
        check(&Plan::parse(plan).unwrap(), &[with], &host()).unwrap()
    };
    assert_eq!(said(nic, Q35), []);
    let agent = Q35.replace("org.vmdr.guest.0", "org.qemu.guest_agent.0");
    let found = said(nic, &agent);
    assert!(found.len() == 1 && found[0].finding.severity() == Severity::Warning, "{found:?}");
    assert!(found[0].finding.message.contains("after a reboot"), "{found:?}");
    let named = nic.replacen("[domain.proof]\n", "[domain.proof]\nhostname = \"a\"\n", 1);
    let found = said(&named, &agent);
    assert!(found.iter().any(|f| f.finding.severity() == Severity::Refused && f.finding.line == 2), "{found:?}");
    let second =
        "<interface type='bridge'><mac address='52:54:00:aa:bb:77'/><source bridge='vmbr0'/></interface></devices>";
    let found = said(nic, &Q35.replace("</devices>", second));
    assert!(found.len() == 1 && found[0].finding.message.contains("several NICs"), "{found:?}");
}

#[test]
fn a_standby_that_cannot_be_looked_at_is_a_warning() {
    let plan = Plan::parse("[domain.proof]\n").unwrap();
    let unreadable = Standby { xml: Err("the first copy is not whole".to_owned()), ..standby() };
    let found = check(&plan, &[unreadable], &host()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].finding.severity(), found[0].domain.as_str()), (Severity::Warning, "proof"));
}

#[test]
fn what_readiness_checks_need_is_looked_for() {
    let plan = |ready: &str| format!("[group.shop]\nmembers = [\"proof\"]\n[domain.proof]\nready = [{{ {ready} }}]\n");
    assert_eq!(said(&plan("tcp = \"10.1.0.5:80\""), &host()), [] as [&str; 0]);
    for (ready, expected) in [
        ("heartbeat = true", "4:10: proof has neither vmdr's tools nor the QEMU guest agent, whose heartbeat"),
        (
            "tcp = \"10.1.0.5:80\", namespace = \"vmdr-none\"",
            "4:45: the network namespace vmdr-none is not on this host",
        ),
        ("argv = [\"/no/such/check\"]", "4:19: /no/such/check: No such file"),
    ] {
        let said = said(&plan(ready), &host());
        assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    }
}

#[test]
fn a_plan_for_the_way_home_is_no_mistake_where_the_guest_runs() {
    let mut host = host();
    host.names.insert("web9".to_owned(), uuid::Uuid::from_u128(9));
    let plan = Plan::parse("[domain.web9]\n").unwrap();
    let found = check(&plan, &[standby()], &host).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].finding.severity(), Severity::Warning, "{found:?}");
    assert!(found[0].finding.message.starts_with("web9 runs here and is not stored here"), "{found:?}");
}
