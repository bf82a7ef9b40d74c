//! What there is of vmdr at the sites: after `unprotect` it must be what there was before `protect`.

use crate::exec;
use crate::guest::GuestSpec;
use crate::rig::{At, Rig};
use crate::site::Site;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;

/// Everything that could be left over, by what it is; the number is how many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    things: BTreeMap<String, usize>,
}

impl Inventory {
    /// Of both sites and of the guest's QEMU at site A.
    pub fn take(rig: &Rig, guest: &GuestSpec) -> Result<Self> {
        let mut inventory = Self::default();
        for at in At::ALL {
            inventory.site(rig.site(at))?;
        }
        let site = rig.site(At::A);
        inventory.files(site, "/run/vmdr")?;
        inventory.files(site, "/var/lib/vmdr/agent")?;
        inventory.qemu(site, guest)?;
        Ok(inventory)
    }

    /// What is here and was not there.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let more = |(thing, count): (&String, &usize)| {
            let had = before.things.get(thing).copied().unwrap_or(0);
            (*count > had).then(|| format!("{thing}: {count}, before {had}"))
        };
        self.things.iter().filter_map(more).collect()
    }

    fn add(&mut self, thing: String) {
        *self.things.entry(thing).or_default() += 1;
    }

    fn site(&mut self, site: &Site) -> Result<()> {
        for pid in site.processes() {
            // One that has ended meanwhile is none. Commands that virsh and others run are seen for a moment: the caller looks
            // again.
            if let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm")) {
                self.add(format!("{}: process {}", site.name(), name.trim()));
            }
        }
        for line in exec::run(site.namespace()?.net_command("ip").args(["-o", "link"]))?.lines() {
            let name = line.split(": ").nth(1).unwrap_or(line).split('@').next().unwrap_or(line);
            self.add(format!("{}: network device {name}", site.name()));
        }
        let sockets = format!("/proc/{}/net/unix", site.namespace()?.pid1());
        for line in fs::read_to_string(&sockets).with_context(|| format!("read {sockets}"))?.lines() {
            // A connection to a listening socket has its path too: only those that listen are counted.
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [_, _, _, "00010000", _, _, _, path] = words[..]
                && path.contains("vmdr")
            {
                self.add(format!("{}: listening socket {path}", site.name()));
            }
        }
        Ok(())
    }

    fn files(&mut self, site: &Site, inside: &str) -> Result<()> {
        let directory = site.path(inside);
        let found = exec::run(exec::limited(30, "find").arg(&directory).args(["-mindepth", "1", "-printf", "%P\\n"]))?;
        // Made with the first protection, for all.
        for name in found.lines().filter(|name| *name != "shim") {
            self.add(format!("{}: file {inside}/{name}", site.name()));
        }
        Ok(())
    }

    fn qemu(&mut self, site: &Site, guest: &GuestSpec) -> Result<()> {
        for query in ["query-block-jobs", "query-block-exports", "query-fdsets"] {
            let words = ["qemu-monitor-command", &guest.name, &format!("{{\"execute\":\"{query}\"}}")];
            let answer = site.virsh(&words)?;
            let answer: serde_json::Value = serde_json::from_str(&answer).context("read QEMU's answer")?;
            for _ in answer["return"].as_array().into_iter().flatten() {
                self.add(format!("QEMU: an entry of {query}"));
            }
        }
        let descriptors = format!("/proc/{}/fd", site.qemu(&guest.name)?);
        for entry in fs::read_dir(&descriptors).with_context(|| format!("list {descriptors}"))?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            // `socket:[1234]` and the like are counted by kind.
            let target = target.to_string_lossy();
            let kind = target.split(":[").next().unwrap_or(&target);
            self.add(format!("QEMU: descriptor of {kind}"));
        }
        Ok(())
    }
}
