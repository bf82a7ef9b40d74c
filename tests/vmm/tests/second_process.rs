//! A guest goes on in a second process from what it streamed, after the first one was killed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

const VMM: &str = env!("CARGO_BIN_EXE_vmdr-test-vmm");

/// Kills the source after `epochs`; returns the epoch that the standby resumed, and how many writes it found and did.
fn fail_over(options: &[&str], epochs: u64) -> (u64, u64, u64) {
    let mut source =
        Command::new(VMM).arg("source").args(options).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let standby = Command::new(VMM)
        .arg("standby")
        .stdin(source.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(source.stderr.take().unwrap()).lines() {
        seen.push(line.unwrap());
        if seen.last().unwrap().starts_with(&format!("epoch {epochs} ")) {
            break;
        }
    }
    // SIGKILL, wherever it is: most likely within a batch, possibly within a frame.
    source.kill().unwrap();
    source.wait().unwrap();
    let output = standby.wait_with_output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{options:?}: standby: {errors}; source: {seen:#?}");
    print!("{options:?}: {text}");
    let field = |name: &str| -> u64 {
        let value = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.unwrap().parse().unwrap()
    };
    let (epoch, writes, went_on_to) = (field("epoch"), field("writes"), field("went_on_to"));
    assert!(epoch >= epochs, "the source told of epoch {epochs}, the standby resumed {epoch}");
    assert!(writes > 0 && went_on_to > writes, "{text}");
    (epoch, writes, went_on_to)
}

#[test]
fn from_the_bitmap() {
    fail_over(&["--log", "bitmap"], 12);
}

#[test]
fn from_the_bitmap_with_interrupt_controllers_and_a_memfd() {
    fail_over(&["--log", "bitmap", "--irqchip", "--memory", "memfd"], 7);
}

#[test]
fn from_the_ring() {
    fail_over(&["--log", "ring"], 12);
}

#[test]
fn from_the_ring_with_interrupt_controllers_and_huge_pages() {
    fail_over(&["--log", "ring", "--irqchip", "--memory", "transparent-huge"], 7);
}

#[test]
fn from_the_very_first_epoch() {
    let (epoch, ..) = fail_over(&["--log", "ring", "--interval", "60000"], 1);
    assert_eq!(epoch, 1);
}
