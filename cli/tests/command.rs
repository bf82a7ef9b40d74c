//! The real `vmdr` binary against daemons that answer as the test wants: exit codes, errors, what goes where,
//! questions, and the JSON that must not change (`tests/golden/`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Host, UUID, golden};

#[tokio::test(flavor = "multi_thread")]
async fn json_keeps_its_shape() {
    let host = Host::with_both();
    let cases: [(&str, &[&str]); 34] = [
        ("doctor.json", &["doctor", "web1"]),
        ("prepare.json", &["prepare", "web1"]),
        ("protect.json", &["protect", "web1"]),
        ("hold.json", &["hold", "web1"]),
        ("release.json", &["release", "web1"]),
        ("suspend.json", &["suspend", "web1"]),
        ("resume.json", &["resume", "web1"]),
        ("unprotect.json", &["unprotect", "web1"]),
        ("status.json", &["status"]),
        ("points.json", &["points", "web1"]),
        ("point.json", &["point", "create", "web1", "--name", "before-upgrade"]),
        ("retention.json", &["retention", "web1"]),
        ("activate-older.json", &["activate", "web1", "--yes", "--point", "3-990"]),
        ("export.json", &["export", "web1", "--point", "3-990"]),
        ("export-prune.json", &["export", "web1", "--prune"]),
        ("cold-list.json", &["import", "--list"]),
        ("import.json", &["import", "web1"]),
        ("activate-plan.json", &["activate", "web1", "--dry-run"]),
        ("activate.json", &["activate", "web1", "--yes"]),
        ("activate-recovery.json", &["activate", "planned", "--yes"]),
        ("forget.json", &["forget", "web1", "--yes"]),
        ("move.json", &["move", "web1"]),
        ("failback.json", &["failback", "web1"]),
        ("reprotect.json", &["reprotect", "web1"]),
        ("own.json", &["own", "web1", "--force", "--reason", "site B is gone", "--yes"]),
        ("divergence.json", &["divergence", "web1"]),
        ("drill.json", &["drill", "web1", "--wait", "--keep"]),
        ("pair-token.json", &["pair", "--valid", "5m"]),
        ("peers.json", &["peers"]),
        ("peers-revoke.json", &["peers", "revoke", "site-a"]),
        ("peers-at.json", &["peers", "at", "site-a", "a.example"]),
        ("peers-rotate.json", &["peers", "rotate"]),
        ("peers-grant.json", &["peers", "grant", "web1", "site-c"]),
        ("audit.json", &["audit"]),
    ];
    for (name, arguments) in cases {
        let ran = host.run(&[arguments, &["-o", "json"]].concat()).await;
        golden(name, ran.succeeded());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_consistent_point_is_the_agents() {
    let host = Host::with_both();
    let words = ["point", "create", "web1", "--name", "quiet", "--application"];
    let said = host.run(&words).await;
    for part in ["3-999", "application-consistent", "froze 2 file systems for", "/boot/efi (vfat)"] {
        assert!(said.succeeded().contains(part), "{}", said.stdout);
    }
    let ran = host.run(&[&words[..], &["-o", "json"]].concat()).await;
    let document: serde_json::Value = serde_json::from_str(ran.succeeded()).unwrap();
    assert_eq!(document["point"]["consistency"], "application");
    assert_eq!(document["application"]["file_systems"], 2);
    let refused = host.run(&["point", "create", "bare", "--name", "x", "--application"]).await;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("nobody in the guest can freeze"), "{}", refused.stderr);
    assert_eq!(host.run(&[&words[..], &["--point", "3-990"]].concat()).await.code, 2);
    host.run(&["protect", "web1", "--application-every", "15m"]).await.succeeded();
    assert!(host.calls().contains(&"application every 900".to_owned()), "{:?}", host.calls());
    assert_eq!(host.run(&["protect", "web1", "--application-every", "100ms"]).await.code, 2);
    let ran = host.run(&["protect", "web1", "--failover", "auto"]).await;
    assert!(ran.succeeded().ends_with("web1 is protected, its failover is auto\n"), "{}", ran.stdout);
    assert!(host.calls().contains(&"failover auto".to_owned()), "{:?}", host.calls());
    assert_eq!(host.run(&["protect", "web1", "--failover", "sometimes"]).await.code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn verification_says_what_is_damaged_and_fails_for_it() {
    let host = Host::with_both();
    let begun = host.run(&["verify", "web1"]).await;
    assert_eq!(begun.succeeded(), "web1 is being verified; `vmdr points web1` shows what has been\n");
    let sound = host.run(&["verify", "web1", "--wait"]).await;
    assert_eq!(sound.succeeded(), "web1: recovery point 3-1000 is sound: 5.0 MiB read\n");
    let damaged = host.run(&["verify", "flipped", "--all", "--wait"]).await;
    assert_eq!(damaged.code, 1, "{}", damaged.stderr);
    assert!(damaged.stdout.contains("damaged: disk vda: 4096 bytes from offset 81920"), "{}", damaged.stdout);
    let document = host.run(&["verify", "flipped", "--wait", "-o", "json"]).await;
    let document: serde_json::Value = serde_json::from_str(&document.stdout).unwrap();
    assert_eq!((&document["kind"], &document["damaged"][0]), (&"verify".into(), &"3-1001".into()), "{document}");
    let both = host.run(&["verify", "web1", "--all", "--point", "3-990"]).await;
    assert_eq!(both.code, 2, "{}", both.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_says_how_it_went_and_fails_with_its_checks() {
    let host = Host::with_both();
    let begun = host.run(&["drill", "web1"]).await;
    assert_eq!(begun.succeeded(), "drill 0a1b2c of web1 is under way; `vmdr status web1` shows how it goes\n");
    let words = ["drill", "failing", "--wait", "--check", "tcp:22", "--check", "cmd:true", "--run", "1500ms"];
    let failed = host.run(&words).await;
    assert_eq!(failed.failed(1), "the drill of failing: failed");
    assert!(failed.stdout.contains("failed:         tcp:22: Connection?[2J refused"), "{}", failed.stdout);
    assert!(
        host.calls().contains(&"keep false run 2 checks [\"tcp:22\", \"cmd:true\"]".to_owned()),
        "{:?}",
        host.calls()
    );
    let ended = host.run(&["drill", "--end", "web1"]).await;
    assert!(ended.succeeded().starts_with("drill 0a1b2c of web1: passed\n"), "{}", ended.stdout);
    assert_eq!(host.run(&["drill", "refused", "--wait"]).await.code, 1);
    for wrong in [&["--end", "--keep"][..], &["--point", "1-2", "--before", "1h"]] {
        assert_eq!(host.run(&[&["drill", "web1"], wrong].concat()).await.code, 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_keep_their_shape() {
    let host = Host::with_both();
    let cases: [(&str, &[&str]); 23] = [
        ("doctor.txt", &["doctor", "web1"]),
        ("prepare.txt", &["prepare", "web1"]),
        ("protect.txt", &["protect", "web1"]),
        ("hold.txt", &["hold", "web1"]),
        ("release.txt", &["release", "web1"]),
        ("suspend.txt", &["suspend", "web1"]),
        ("drill.txt", &["drill", "web1", "--wait", "--keep"]),
        ("resume.txt", &["resume", "web1"]),
        ("status.txt", &["status"]),
        ("point.txt", &["point", "release", "web1", "--name", "before-upgrade"]),
        ("retention.txt", &["retention", "web1"]),
        ("activate-older.txt", &["activate", "web1", "--yes", "--before", "10m"]),
        ("export.txt", &["export", "web1", "--point", "3-990"]),
        ("export-prune.txt", &["export", "web1", "--prune"]),
        ("cold-list.txt", &["import", "--list"]),
        ("import.txt", &["import", "web1"]),
        ("activate-plan.txt", &["activate", "web1", "--dry-run"]),
        ("activate.txt", &["activate", "web1", "--yes"]),
        ("activate-recovery.txt", &["activate", "planned", "--yes"]),
        ("pair-token.txt", &["pair"]),
        ("peers.txt", &["peers"]),
        ("peers-grant.txt", &["peers", "grant", "web1", "site-c"]),
        ("audit.txt", &["audit"]),
    ];
    for (name, arguments) in cases {
        let ran = host.run(arguments).await;
        golden(name, ran.succeeded());
        assert!(ran.stdout.lines().all(|line| line.chars().count() <= 120), "{}", ran.stdout);
        assert!(!ran.stdout.contains('\x1b'), "{:?}", ran.stdout);
    }
    let points = host.run(&["points", "web1"]).await;
    assert!(points.succeeded().contains("3-1000  2026-01-31 12:00:00.123"), "{}", points.stdout);
    let fresh = host.run(&["points", "fresh"]).await;
    assert_eq!(fresh.succeeded(), "fresh has no recovery point here yet: its first copy is not whole\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_has_its_exit_code_and_one_line() {
    let host = Host::with_both();
    for (domain, code, line) in [
        ("refused", 1, "hostdev0 is passed through from the host: detach it"),
        ("broken", 1, "disk vda: the mirror failed"),
        ("halfway", 1, "halfway was shut down during the first copy"),
        ("odd", 2, "interval of 7 ms is below 25 ms"),
        ("lonely", 3, "the receiver b.example:7420 does not answer"),
        ("unknown", 4, "there is no domain 'unknown'; `virsh list --all` lists them"),
        ("twice", 5, "twice is protected already"),
        ("late", 6, "libvirt did not answer within 10 s"),
    ] {
        for output in ["table", "json"] {
            let ran = host.run(&["protect", domain, "-o", output]).await;
            assert_eq!(ran.failed(code), line);
            assert_eq!(ran.stdout, "", "{domain}");
        }
    }
    for command in ["doctor", "prepare", "hold", "release", "suspend", "resume", "unprotect", "points", "status"] {
        host.run(&[command, "unknown"]).await.failed(4);
    }
    for command in ["activate", "forget"] {
        host.run(&[command, "unknown", "--yes"]).await.failed(4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_never_reaches_a_daemon() {
    let host = Host::with_both();
    let cases: [&[&str]; 9] = [
        &[],
        &["explode"],
        &["protect"],
        &["protect", ""],
        &["protect", "web1", "--interval", "24ms"],
        &["protect", "web1", "--interval", "61s"],
        &["protect", "web1", "--receiver", "fd00::2"],
        &["status", "-o", "xml"],
        &["completions", "tcsh++"],
    ];
    for arguments in cases {
        let ran = host.run(arguments).await;
        ran.failed(2);
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
    assert_eq!(host.calls(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn protect_passes_on_what_was_asked() {
    let host = Host::with_both();
    host.run(&["protect", "web1"]).await.succeeded();
    host.run(&["protect", "web1", "--interval", "1s 250ms", "--receiver", "b.example"]).await.succeeded();
    assert_eq!(
        host.calls(),
        ["agent protect web1", "interval 0 receiver", "agent protect web1", "interval 1250 receiver b.example:7420"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hold_and_release_ask_the_agent_and_pass_on_its_no() {
    let host = Host::with_both();
    host.run(&["hold", UUID]).await.succeeded();
    host.run(&["release", UUID]).await.succeeded();
    assert_eq!(host.calls(), [format!("agent hold {UUID}"), format!("agent release {UUID}")]);
    for output in ["table", "json"] {
        for (arguments, line) in [
            (["hold", "seeding"], "the domain is seeding, not protected"),
            (["release", "idle"], "the domain is not held"),
        ] {
            let ran = host.run(&[&arguments[..], &["-o", output]].concat()).await;
            assert_eq!(ran.failed(1), line);
            assert_eq!(ran.stdout, "", "{arguments:?}");
        }
    }
    // Not answered in time is not "refused": the guest may be held all the same.
    host.run(&["hold", "late"]).await.failed(6);
    let ran = host.run_on_terminal(&["status", "held"], "", &[]).await;
    assert!(ran.stdout.contains("\x1b[33mheld\x1b[0m"), "{:?}", ran.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn prepare_says_when_nothing_is_left_to_do() {
    let host = Host::with_both();
    let ran = host.run(&["prepare", "prepared"]).await;
    assert!(ran.succeeded().starts_with("prepared was prepared already: "), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("Nothing more is needed for `vmdr protect`.\n"), "{}", ran.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_fails_when_something_is_refused() {
    let host = Host::with_both();
    let ran = host.run(&["doctor", "bad"]).await;
    assert_eq!(ran.failed(1), "bad cannot be protected: 1 finding refuses it");
    assert!(
        ran.stdout.contains("refused  hostdev0: a PCI device of the host\n         -> detach it\n"),
        "{}",
        ran.stdout
    );
    let ran = host.run(&["doctor", "bad", "-o", "json"]).await;
    ran.failed(1);
    assert!(ran.stdout.contains("\"ok\": false"), "{}", ran.stdout);
    assert!(host.run(&["doctor"]).await.succeeded().ends_with("this host can be used for protection\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_daemon() {
    let host = Host::empty();
    let ran = host.run(&["status"]).await;
    assert!(ran.failed(3).starts_with("no vmdr daemon on this host: neither "), "{}", ran.stderr);
    let ran = host.run(&["protect", "web1"]).await;
    assert!(ran.failed(3).starts_with("no vmdr agent on this host: "), "{}", ran.stderr);
    let ran = host.run(&["points", "web1"]).await;
    assert!(ran.failed(3).contains("start vmdr-receiver"), "{}", ran.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_with_nobody_behind_it() {
    let host = Host::empty();
    drop(std::os::unix::net::UnixListener::bind(host.agent_socket()).unwrap());
    let ran = host.run(&["doctor"]).await;
    assert!(ran.failed(3).contains("does not run: nobody listens at"), "{}", ran.stderr);
    // The receiver's side is shown all the same, and the exit code says that it is not all.
    host.start_receiver();
    let ran = host.run(&["status", "-o", "json"]).await;
    ran.failed(3);
    let status: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(status["unreachable"], serde_json::json!(["agent"]));
    assert_eq!(status["domains"][0]["name"], "web2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_closes_the_connection() {
    let host = Host::empty();
    let listener = tokio::net::UnixListener::bind(host.agent_socket()).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    let ran = host.run(&["doctor"]).await;
    ran.failed(3);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_asks_whoever_is_there() {
    let host = Host::empty();
    host.start_receiver();
    let ran = host.run(&["status", "web2"]).await;
    assert!(ran.succeeded().contains("web2"), "{}", ran.stdout);
    assert_eq!(host.calls(), ["receiver status web2"]);
    host.start_agent();
    // Known to one daemon is known; each says "not found" of the other's.
    host.run(&["status", "web2"]).await.succeeded();
    host.run(&["status", "web1"]).await.succeeded();
    assert_eq!(host.run(&["status", "nobody"]).await.failed(4), "nothing is stored here of nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_by_option() {
    let host = Host::empty();
    let other = Host::with_both();
    let socket = other.agent_socket();
    host.run(&["prepare", "web1", "--agent-socket", socket.to_str().unwrap()]).await.succeeded();
    let socket = other.receiver_socket();
    host.run(&["--receiver-socket", socket.to_str().unwrap(), "points", "web1"]).await.succeeded();
    assert_eq!(other.calls(), ["agent prepare web1", "receiver points web1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_to_ask_is_refused_before_anything() {
    let host = Host::with_both();
    for command in ["activate", "forget"] {
        // Not even the right answer on stdin is taken for one.
        let ran = host.run_with(&[command, "web1"], Some("web1\n")).await;
        assert!(ran.failed(2).contains("give --yes"), "{}", ran.stderr);
        assert_eq!(ran.stdout, "");
    }
    assert_eq!(host.calls(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn activate_asks_for_the_name() {
    let host = Host::with_both();
    let ran = host.run_on_terminal(&["activate", UUID], "web1\n", &[]).await;
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(ran.stdout.contains("12 s until now, and more while you read this"), "{}", ran.stdout);
    assert!(ran.stdout.contains("type the domain's name (web1):"), "{}", ran.stdout);
    assert!(ran.stdout.contains("RTO:            512 ms"), "{}", ran.stdout);
    assert_eq!(host.calls(), [format!("receiver plan {UUID}"), format!("receiver activate {UUID}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_other_answer_does_nothing() {
    for answer in ["y\n", "yes\n", "\n", "web\n", "WEB1\n", "web11\n", "\u{4}"] {
        let host = Host::with_both();
        let ran = host.run_on_terminal(&["activate", "web1"], answer, &[]).await;
        assert_eq!(ran.code, 1, "{answer:?}: {}", ran.stdout);
        assert!(ran.stdout.contains("vmdr: that is not web1: nothing was done"), "{}", ran.stdout);
        assert_eq!(host.calls(), ["receiver plan web1"], "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn export_and_import_pass_on_what_was_asked() {
    let host = Host::with_both();
    host.run(&["export", "web1"]).await.succeeded();
    let (url, key) = ("file:///mnt/vmdr", "/root/cold.key");
    host.run(&["import", "--from", url, "--key-file", key, "--list", "web1"]).await.succeeded();
    host.run(&["import", "--from", url, "--key-file", key, "web1", "--point", "3-990"]).await.succeeded();
    assert_eq!(
        host.calls(),
        [
            "receiver export web1  prune=false",
            "receiver cold-list file:///mnt/vmdr /root/cold.key web1",
            "receiver import file:///mnt/vmdr /root/cold.key web1 3-990",
        ]
    );
    assert!(host.run(&["export", "busy"]).await.failed(5).contains("under way"));
    assert!(host.run(&["import", "there"]).await.failed(1).contains("already"));
    for arguments in [
        &["import"][..],
        &["import", "--list", "--point", "3-990"],
        &["export"],
        &["export", "web1", "--prune", "--point", "3-990"],
    ] {
        host.run(arguments).await.failed(2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forget_asks_for_the_name() {
    let host = Host::with_both();
    let ran = host.run_on_terminal(&["forget", "web2"], "web2\n", &[]).await;
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(ran.stdout.contains("3.0 GiB freed"), "{}", ran.stdout);
    let ran = host.run_on_terminal(&["forget", "web2"], "web1\n", &[]).await;
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert_eq!(host.calls(), ["receiver status web2", "receiver forget web2", "receiver status web2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_shown_of_an_older_point_is_what_is_activated() {
    for words in [["--at", "2026-01-31T12:00:00Z"], ["--before", "10m"], ["--point", "before-upgrade"]] {
        let host = Host::with_both();
        host.run(&[&["activate", "web1", "--yes"][..], &words].concat()).await.succeeded();
        assert_eq!(host.calls(), ["receiver plan web1", "receiver at 3-990", "receiver activate web1"], "{words:?}");
    }
    let host = Host::with_both();
    for words in [
        &["--at", "2026-01-31T12:00:00Z", "--before", "10m"][..],
        &["--at", "2026-01-31T12:00:00Z", "--point", "3-990"],
        &["--before", "1000000y"],
        &["--point", "../x"],
    ] {
        let ran = host.run(&[&["activate", "web1", "--yes"][..], words].concat()).await;
        assert_eq!(ran.code, 2, "{words:?}: {}", ran.stderr);
    }
    let ran = host.run(&["point", "create", "web1", "--name", "taken", "--point", "3-990"]).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (1, "vmdr: the name is taken\n"));
    host.run(&["retention", "web1", "--tier", "epoch:10m", "--tier", "1m:24h"]).await.succeeded();
    host.run(&["retention", "web1", "--budget", "1GiB"]).await.succeeded();
    host.run(&["retention", "web1", "--reset"]).await.succeeded();
    assert_eq!(
        host.calls(),
        [
            "receiver create-point web1 taken 3-990",
            "receiver retention web1 change=false reset=false tiers=0",
            "receiver retention web1 change=true reset=false tiers=2",
            "receiver retention web1 change=false reset=false tiers=0",
            "receiver retention web1 change=true reset=false tiers=3",
            "receiver retention web1 change=false reset=true tiers=0",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_is_refused_activates_nothing() {
    let host = Host::with_both();
    for arguments in [&["activate", "bad", "--yes"][..], &["activate", "bad", "--dry-run"]] {
        let ran = host.run(arguments).await;
        assert!(ran.failed(1).ends_with("nothing was done"), "{}", ran.stderr);
        assert!(ran.stdout.contains("refused  hostdev0"), "{}", ran.stdout);
    }
    let ran = host.run(&["activate", "bad", "--dry-run", "-o", "json"]).await;
    ran.failed(1);
    let plan: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(plan["plan"]["ok"], false);
    assert!(host.calls().iter().all(|call| call == "receiver plan bad"), "{:?}", host.calls());
}

#[tokio::test(flavor = "multi_thread")]
async fn activate_twice_and_without_a_report() {
    let host = Host::with_both();
    // What is active already needs no question: nothing will be done.
    let ran = host.run_on_terminal(&["activate", "running"], "", &[]).await;
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(ran.stdout.contains("was running here already: nothing was done"), "{}", ran.stdout);
    let ran = host.run(&["activate", "unreported", "--yes", "--wait"]).await;
    assert!(ran.failed(1).contains("without a report"), "{}", ran.stderr);
    assert_eq!(host.calls().last().map(String::as_str), Some("receiver activate-and-wait unreported"));
}

#[tokio::test(flavor = "multi_thread")]
async fn colour_and_progress_only_on_a_terminal() {
    let host = Host::with_both();
    let coloured = host.run_on_terminal(&["status"], "", &[]).await;
    assert!(coloured.stdout.contains("\x1b[32mprotected\x1b[0m"), "{:?}", coloured.stdout);
    for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = host.run_on_terminal(&["status"], "", &[(name, value)]).await;
        assert_eq!(plain.code, 0);
        assert!(!plain.stdout.contains('\x1b'), "{name}: {:?}", plain.stdout);
    }
    let json = host.run_on_terminal(&["status", "-o", "json"], "", &[]).await;
    assert!(!json.stdout.contains('\x1b'), "{:?}", json.stdout);
    let progress = host.run_on_terminal(&["protect", "web1"], "", &[("NO_COLOR", "1")]).await;
    assert!(progress.stdout.contains("copy  256 MiB of 512 MiB  50 %  seeding"), "{:?}", progress.stdout);
    assert!(host.run(&["protect", "web1"]).await.stderr.is_empty());
}

/// A plan in a file of its own, and what the command says of it with the file's path left out.
async fn check_plan(host: &Host, plan: &str, words: &[&str]) -> (i32, String) {
    check_plan_with(host, plan, words, 0o640).await
}

async fn check_plan_with(host: &Host, plan: &str, words: &[&str], mode: u32) -> (i32, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("plan.toml");
    std::fs::write(&file, plan).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    let file = file.to_str().unwrap();
    let ran = host.run(&[&["plan", "check", file][..], words].concat()).await;
    let json = words.contains(&"json");
    let said = if json { ran.stdout } else { format!("{}--\n{}", ran.stdout, ran.stderr) };
    (ran.code, said.replace(file, "plan.toml"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_checked_by_itself_and_against_the_site() {
    const RIGHT: &str =
        "[domain.web1]\nmemory_limit = \"2GiB\"\n[[domain.web1.nic]]\nsource = \"br0\"\nbridge = \"br-dr\"\n";
    const WRONG: &str =
        "[domain.web1]\nmemory_limit = \"2GB\"\n[[domain.web1.nic]]\nsource = \"br0\"\nbrigde = \"br-dr\"\n";
    let empty = Host::empty();
    let host = Host::with_both();
    let gone = RIGHT.replace("br-dr", "br-gone");
    let later = format!("{RIGHT}[domain.web2]\npriority = 7\n");
    for (name, host, plan, words, code) in [
        ("plan-right.txt", &host, RIGHT, &[][..], 0),
        ("plan-right.json", &host, RIGHT, &["-o", "json"][..], 0),
        ("plan-site.txt", &host, &gone, &[], 1),
        ("plan-site.json", &host, &gone, &["-o", "json"], 1),
        ("plan-wrong.txt", &empty, WRONG, &[], 1),
        ("plan-wrong.json", &empty, WRONG, &["-o", "json"], 1),
        ("plan-offline.txt", &empty, RIGHT, &["--offline"], 0),
        ("plan-later.txt", &empty, &later, &["--offline"], 1),
    ] {
        let (ended, said) = check_plan(host, plan, words).await;
        assert_eq!(ended, code, "{name}: {said}");
        golden(name, &said);
    }
    assert_eq!(host.calls(), vec!["receiver check-plan"; 4]);
    assert_eq!(check_plan(&empty, RIGHT, &[]).await.0, 3, "without a receiver");
    // The receiver would not take it: the programs that it names run as root.
    for mode in [0o660, 0o646] {
        let (code, said) = check_plan_with(&empty, RIGHT, &["--offline"], mode).await;
        assert_eq!(code, 1, "{said}");
        assert!(
            said.starts_with("plan.toml: refused: others than its owner can write it: `chmod go-w plan.toml`"),
            "{said}"
        );
    }
    let missing = empty.run(&["plan", "check", "/no/such/plan.toml"]).await;
    assert_eq!(missing.failed(2), "there is no plan /no/such/plan.toml");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_activation_whose_last_hook_fails_says_so() {
    let host = Host::with_both();
    let ran = host.run(&["activate", "unhooked", "--yes"]).await;
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert!(ran.stderr.contains("runs here, but a hook failed"), "{}", ran.stderr);
    assert!(ran.stdout.contains("web1 runs here"), "{}", ran.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn help_version_completions() {
    let host = Host::empty();
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["activate", "--help"],
        &["prepare", "--help"],
        &["hold", "--help"],
        &["audit", "--help"],
        &["audit", "verify", "--help"],
        &["release", "--help"],
        &["protect", "-h"],
        &["export", "--help"],
        &["import", "--help"],
        &["--version"],
    ] {
        let ran = host.run(arguments).await;
        assert!(!ran.succeeded().is_empty());
        assert!(ran.stdout.lines().all(|line| line.chars().count() <= 120), "{}", ran.stdout);
    }
    for shell in ["bash", "zsh", "fish"] {
        let ran = host.run(&["completions", shell]).await;
        for command in
            ["doctor", "prepare", "protect", "hold", "release", "unprotect", "status", "points", "activate", "forget"]
        {
            assert!(ran.succeeded().contains(command), "{shell}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_and_never_an_argument() {
    let host = Host::with_both();
    let joined = host.run_with(&["pair", "--with", "b.example"], Some("  AAAAAA-BBBBBB \n")).await;
    assert_eq!(joined.succeeded(), "paired with site-b (0123456789ab)\n");
    assert_eq!(host.calls(), ["agent join b.example:7420 AAAAAA-BBBBBB"]);
    let used = host.run_with(&["pair", "--with", "b.example:9"], Some("USED\n")).await;
    assert!(used.failed(1).contains("the token was used already"), "{}", used.stderr);
    let none = host.run_with(&["pair", "--with", "b.example"], Some("\n")).await;
    assert!(none.failed(2).contains("no token was given"), "{}", none.stderr);
    let asked = host.run_on_terminal(&["pair", "--with", "b.example"], "AAAAAA\n", &[]).await;
    assert!(asked.stdout.contains("The token that `vmdr pair` shows"), "{}", asked.stdout);
    for wrong in
        [&["pair", "--valid", "2h"][..], &["pair", "--valid", "500ms"], &["pair", "--with", "b", "--valid", "1m"]]
    {
        assert_eq!(host.run(wrong).await.code, 2, "{wrong:?}");
    }
    // Where no receiver is there is nothing to connect to.
    let host = Host::empty();
    host.start_agent();
    host.run(&["pair"]).await.failed(3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_changed_ends_with_an_error() {
    let host = Host::with_both();
    let ran = host.run(&["audit", "verify"]).await;
    assert!(ran.failed(1).contains("the audit log was changed"), "{}", ran.stderr);
    assert!(ran.stdout.contains("agent: whole, 7 records") && ran.stdout.contains("line 8"), "{}", ran.stdout);
    let directory = tempfile::tempdir().unwrap();
    let none = host.run(&["audit", "verify", "--dir", directory.path().to_str().unwrap()]).await;
    assert!(none.failed(4).contains("has no audit log"), "{}", none.stderr);
}
