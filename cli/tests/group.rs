//! `vmdr group`: what is asked, shown and written, and how it ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
mod common;

use common::{Host, golden};

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_shown_as_text_and_as_json() {
    let host = Host::with_both();
    let cases: [(&str, &[&str], i32); 6] = [
        ("group-plan", &["group", "activate", "shop", "--dry-run"], 0),
        ("group-plan-refused", &["group", "activate", "partly", "--dry-run"], 1),
        ("group", &["group", "activate", "shop", "--yes"], 0),
        ("group-failed", &["group", "report", "failing"], 0),
        ("group-stop", &["group", "stop", "shop"], 0),
        ("groups", &["group", "list"], 0),
    ];
    for (name, words, code) in cases {
        let ran = host.run(words).await;
        assert_eq!(ran.code, code, "{name}: {}", ran.stderr);
        golden(&format!("{name}.txt"), &ran.stdout);
        assert!(ran.stdout.lines().all(|line| line.chars().count() <= 120), "{name}: {}", ran.stdout);
        let ran = host.run(&[words, &["-o", "json"]].concat()).await;
        assert_eq!(ran.code, code, "{name}: {}", ran.stderr);
        golden(&format!("{name}.json"), &ran.stdout);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_not_ready_fails_and_says_who_and_why() {
    let host = Host::with_both();
    let ran = host.run(&["group", "activate", "failing", "--yes"]).await;
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    for said in ["db1 is ready\n", "app1 is not ready: no answer\n", "run it again: it goes on from there"] {
        assert!(ran.stderr.contains(said), "{said}: {}", ran.stderr);
    }
    for shown in ["held back", "it needs app1, which is not ready", "its check heartbeat did not pass"] {
        assert!(ran.stdout.contains(shown), "{shown}: {}", ran.stdout);
    }
    assert!(!ran.stdout.contains('\u{1b}'), "{}", ran.stdout);
    let cut = host.run(&["group", "activate", "unreported", "--yes"]).await;
    assert_eq!(cut.code, 1);
    assert!(cut.stderr.contains("goes on from there"), "{}", cut.stderr);
    assert_eq!(host.run(&["group", "report", "unknown"]).await.code, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_asked_for_by_name_and_with_its_points() {
    let host = Host::with_both();
    let refused = host.run(&["group", "activate", "shop"]).await;
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("the group's name"), "{}", refused.stderr);
    assert!(host.calls().is_empty(), "{:?}", host.calls());
    let words = ["group", "activate", "shop", "--yes", "--point", "db1=3-990", "--point", "a=b=before-upgrade"];
    assert_eq!(host.run(&words).await.code, 0);
    let asked = "receiver activate-group shop at 0 points [\"db1=3-990\", \"a=b=before-upgrade\"]";
    assert!(host.calls().contains(&asked.to_owned()), "{:?}", host.calls());
    for wrong in
        [&["--point", "3-990"][..], &["--at", "2026-01-31T12:00:00Z", "--before", "1h"], &["--point", "=3-990"]]
    {
        let ran = host.run(&[&["group", "activate", "shop", "--yes"][..], wrong].concat()).await;
        assert_eq!(ran.code, 2, "{wrong:?}: {}", ran.stderr);
    }
    let typed = host.run_on_terminal(&["group", "activate", "shop"], "mail\n", &[]).await;
    assert_eq!(typed.code, 1);
    let typed = host.run_on_terminal(&["group", "activate", "shop"], "shop\n", &[]).await;
    assert_eq!(typed.code, 0, "{}", typed.stdout);
}
