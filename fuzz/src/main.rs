//! Fuzz targets: whatever bytes come, from a disk, a peer or a guest, the code neither panics nor runs out of memory or time,
//! and what it does take is consistent.
//!
//! One program with all targets; `scripts/fuzz` builds it, makes the corpus out of the fixtures (real state directories, see
//! `docs/journal.md`), and runs it.
//!
//! - `VMDR_FUZZ_TARGET` is the target's name.
//! - `VMDR_FUZZ_SEEDS` is a directory into which the first inputs of that target are written, instead of fuzzing.
//!
//! Formats with checksums would stop every mutated input at its first checksum. So the first byte of such an input says
//! whether it is taken as it is or *sealed* first ([`seal`]): its checksums are made right, and what is behind them is reached.

#![no_main]

mod archive;
mod disk;
mod seal;
mod targets;
mod wire;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use targets::Target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

/// Which target this run is for.
fn target() -> &'static Target {
    TARGET.get_or_init(|| {
        let name = std::env::var("VMDR_FUZZ_TARGET").unwrap_or_default();
        let names: Vec<&str> = targets::ALL.iter().map(|target| target.name).collect();
        let found = targets::ALL.iter().find(|target| target.name == name);
        found.unwrap_or_else(|| panic!("VMDR_FUZZ_TARGET is {name:?}, there are {}", names.join(" ")))
    })
}

fuzz_target!(
    init: {
        if let Some(to) = std::env::var_os("VMDR_FUZZ_SEEDS") {
            let seeds = (target().seeds)();
            for (number, seed) in seeds.iter().enumerate() {
                let path = std::path::Path::new(&to).join(format!("seed-{number:03}"));
                std::fs::write(&path, seed).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
            }
            println!("{} inputs of {} bytes", seeds.len(), seeds.iter().map(Vec::len).sum::<usize>());
            std::process::exit(0);
        }
        // A panic of any thread is a finding, also of one that the store started: libfuzzer-sys aborts then.
        target();
    },
    |bytes: &[u8]| (target().run)(bytes)
);
