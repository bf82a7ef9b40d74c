//! The recovery plan around an activation: hooks before; after the resume announcement, limits, addresses in the guest, names and hooks.
//!
//! What is done after is noted in a file beside the activation's record before the guest is started, so that an activation that was
//! interrupted in between, and is run again, does it all the same. Hooks may therefore run twice.

use std::path::PathBuf;

use uuid::Uuid;
use vmdr_daemon::durable;
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;
use vmdr_plan::{Domain, Limits};
use vmdr_proto::control::{Change, HookRun, Mapped};

use super::limits::{self, Means};
use super::{announce, dns, guest, hooks};
use crate::activate::host::LocalHost;
use crate::activate::mapping::{Mapping, source_of};
use crate::activate::record::{ActiveDirectory, Step};

/// There while an activation is under way of which something is left to be done when the guest runs.
const PENDING: &str = "after-pending";

/// A plan that is applied to one domain.
pub struct Applied<'a> {
    /// The domain.
    pub uuid: Uuid,
    /// Its name.
    pub name: &'a str,
    /// How it maps.
    pub mapping: &'a Mapping,
    /// The definition that it had at the protected host.
    pub original: Element,
    /// Where its activation is recorded.
    pub active: ActiveDirectory,
    /// Whether it boots, as its point has no memory.
    pub boots: bool,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Hooks in the order in which they ran.
    pub hooks: Vec<HookRun>,
    /// Addresses and bridges.
    pub announced: Vec<String>,
    /// In the guest: addresses, routes, resolver, name.
    pub network: Vec<Change>,
    /// Names that lead to it.
    pub dns: Vec<Change>,
    /// What did not work and did not end anything.
    pub warnings: Vec<String>,
    /// A hook that was to end the activation, or something else that makes it none.
    pub failed: Option<String>,
}

impl Applied<'_> {
    /// What is somewhere else here.
    pub fn list(&self) -> Vec<Mapped> {
        DomainXml::from_element(&self.original).map(|domain| self.mapping.list(&domain)).unwrap_or_default()
    }

    /// What programs are told; `generation`: in which this site owns the domain, once it does.
    pub fn environment(&self, point: &str, generation: Option<u64>) -> Vec<(&'static str, String)> {
        let nics = self.original.find_all("devices/interface");
        let nics = nics.into_iter().map(|nic| {
            let mac = nic.attribute_at("mac", "address").unwrap_or_default();
            let source = source_of(nic);
            let kind = nic.attribute("type").unwrap_or_default();
            let placed = self.mapping.place(kind, Some(mac), source.unwrap_or_default());
            let vlan = placed.vlan.map(|vlan| vlan.to_string()).unwrap_or_default();
            let said = self.mapping.plan.as_ref().and_then(|plan| plan.nic(Some(mac), source));
            let addresses = said.map(|said| said.addresses.as_slice()).unwrap_or_default();
            let addresses: Vec<String> = addresses.iter().map(|at| at.value.to_string()).collect();
            (
                mac.to_owned(),
                format!("{mac},{},{},{vlan},{}", placed.kind, placed.source, addresses.join("+")),
                addresses,
            )
        });
        let nics: Vec<(String, String, Vec<String>)> = nics.collect();
        let all = |words: Vec<String>| words.join(" ");
        let mut environment = vec![
            ("VMDR_DOMAIN", self.name.to_owned()),
            ("VMDR_UUID", self.uuid.to_string()),
            ("VMDR_POINT", point.to_owned()),
            ("VMDR_PLAN", self.mapping.file.clone()),
            ("VMDR_NICS", all(nics.iter().map(|(_, nic, _)| nic.clone()).collect())),
            ("VMDR_MACS", all(nics.iter().map(|(mac, ..)| mac.clone()).collect())),
            ("VMDR_ADDRESSES", all(nics.into_iter().flat_map(|(.., addresses)| addresses).collect())),
        ];
        environment.extend(generation.map(|generation| ("VMDR_GENERATION", generation.to_string())));
        environment
    }

    /// Runs the hooks that come before. Nothing is changed yet when they run.
    pub fn before(&self, point: &str, progress: &mut dyn FnMut(&str)) -> Outcome {
        let Some(plan) = &self.mapping.plan else { return Outcome::default() };
        let (hooks, failed) = hooks::run("before", &plan.before, &self.environment(point, None), progress);
        Outcome { hooks, failed, ..Outcome::default() }
    }

    fn pending(&self) -> PathBuf {
        self.active.path().join(PENDING)
    }

    /// Notes that [`Applied::after`] has to be done.
    pub fn note(&self) -> std::io::Result<()> {
        if self.mapping.plan.is_none() {
            return Ok(());
        }
        durable::write(&self.pending(), b"")
    }

    /// Whether the guest came up in an earlier activation: what was to be done after that is noted, or done.
    pub fn has_come_up(&self) -> bool {
        let record = self.active.read(self.uuid);
        matches!(record, Ok(Some(record)) if matches!(record.step, Step::Running { .. }))
    }

    /// Whether that was noted and not done.
    pub fn is_noted(&self) -> bool {
        self.pending().exists()
    }

    /// Takes the note back after an activation that has ended without a guest, unless libvirt may still be at work, or the guest
    /// has run, and what was left to be done after is still to be done.
    pub fn failed(&self) {
        let step = self.active.read(self.uuid).ok().flatten().map(|record| record.step);
        if !matches!(step, Some(Step::Restoring { .. } | Step::Running { .. }))
            && let Err(error) = durable::remove(&self.pending())
        {
            tracing::warn!(domain = self.name, %error, "take the note back that hooks are to be run");
        }
        // Made for the note; one with anything in it stays.
        let _ = std::fs::remove_dir(self.active.path());
    }

    /// What comes after the guest's resume. Nothing here takes the guest back: what fails is told.
    pub fn after(
        &self,
        uri: &str,
        host: &LocalHost,
        point: &str,
        generation: u64,
        progress: &mut dyn FnMut(&str),
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(plan) = &self.mapping.plan else { return outcome };
        let domain = host.connection().domain_by_uuid(&self.uuid);
        let live = domain.as_ref().map_err(ToString::to_string).and_then(|d| d.live_xml().map_err(|e| e.to_string()));
        match &live {
            Ok(live) => {
                let of = announce::collect(&self.original, live, self.mapping, false);
                (outcome.announced, outcome.warnings) = announce::begin(uri, self.uuid, self.name, of);
            }
            Err(error) => outcome.warnings.push(format!("its addresses were not announced: {error}")),
        }
        let memory_bytes = DomainXml::from_element(&self.original).map_or(0, |known| known.memory_bytes);
        let (limits, unfit) = limits::fitting(&plan.limits, self.name, memory_bytes, &Means::here());
        outcome.warnings.extend(unfit.iter().map(|mistake| format!("it is not limited as the plan says: {mistake}")));
        if !limits.is_empty()
            && let Ok(domain) = &domain
        {
            let Limits { cpu_percent, cpu_shares, memory_bytes } = &limits;
            let value = |at: &Option<vmdr_plan::At<u64>>| at.as_ref().map(|at| at.value);
            if let Err(error) = domain.limit(value(cpu_percent), value(cpu_shares), value(memory_bytes)) {
                outcome.warnings.push(format!("it is not limited as the plan says: {error}"));
            }
        }
        let addresses = match &live {
            Ok(live) => self.change_addresses(uri, live, plan, &mut outcome, progress),
            Err(error) => Some(format!("the guest's addresses were not changed: {error}"))
                .filter(|_| !guest::wanted(&self.original, plan).nics.is_empty()),
        };
        let mut failed = addresses.clone();
        if failed.is_none() {
            failed = self.update_names(plan, &mut outcome, progress);
        } else if self.mapping.dns.is_some() && !plan.dns_names.is_empty() {
            outcome
                .warnings
                .push("no names were updated, as they would lead to addresses that it does not have".to_owned());
        }
        let environment = self.environment(point, Some(generation));
        let (hooks, failed_hook) = hooks::run("after", &plan.after, &environment, progress);
        outcome.hooks = hooks;
        outcome.failed = failed.into_iter().chain(failed_hook).reduce(|all, one| format!("{all}; and {one}"));
        if addresses.is_some() {
            let again =
                format!("`vmdr activate {}` tries again to change its addresses, and runs the hooks again", self.name);
            outcome.warnings.push(again);
        }
        // What was to end the activation has to be put right: the next `activate` does it all again.
        if outcome.failed.is_none()
            && let Err(error) = durable::remove(&self.pending())
        {
            outcome.warnings.push(format!("the hooks may run again: remove {}: {error}", self.pending().display()));
        }
        for warning in &outcome.warnings {
            tracing::warn!(domain = self.name, "{warning}");
        }
        outcome
    }
}

impl Applied<'_> {
    /// Has the guest have the plan's addresses, or its own again. A sentence if it has not those that it should have.
    fn change_addresses(
        &self,
        uri: &str,
        live: &Element,
        plan: &Domain,
        outcome: &mut Outcome,
        progress: &mut dyn FnMut(&str),
    ) -> Option<String> {
        let network = guest::wanted(&self.original, plan);
        if !network.is_home() {
            progress("change addresses in the guest");
        }
        let begun = std::time::Instant::now();
        outcome.network = guest::apply(uri, self.uuid, self.name, live, &network, self.boots);
        for Change { subject, done, error } in &outcome.network {
            tracing::info!(
                domain = self.name,
                error,
                seconds = begun.elapsed().as_secs_f64(),
                "in the guest: {subject}: {done}"
            );
        }
        let without = |change: &&Change| !change.error.is_empty();
        // A resolver alone keeps nobody from finding the guest.
        let decisive =
            |subject: &str| subject.starts_with("NIC ") || (subject == "network" && !network.nics.is_empty());
        let told = |change: &Change| format!("{}: {}", change.subject, change.error);
        let rest = outcome.network.iter().filter(without).filter(|change| !decisive(&change.subject));
        outcome.warnings.extend(rest.map(|change| format!("in the guest: {}", told(change))));
        let failed = outcome.network.iter().filter(without).find(|change| decisive(&change.subject)).map(told);
        if failed.is_none() && !network.nics.is_empty() {
            let of = announce::collect(&self.original, live, self.mapping, true);
            let (announced, warnings) = announce::begin(uri, self.uuid, self.name, of);
            outcome.announced.extend(announced);
            outcome.warnings.extend(warnings);
        }
        failed.map(|why| format!("it does not have the plan's addresses: {why}"))
    }

    /// Has names lead to the guest. A sentence if they do not and that is to end the activation.
    fn update_names(&self, plan: &Domain, outcome: &mut Outcome, progress: &mut dyn FnMut(&str)) -> Option<String> {
        let dns = self.mapping.dns.as_ref().filter(|_| !plan.dns_names.is_empty())?;
        progress("update names");
        let names: Vec<String> = plan.dns_names.iter().map(|at| at.value.clone()).collect();
        let mut addresses = Vec::new();
        for interface in self.original.find_all("devices/interface") {
            let said = plan.nic(interface.attribute_at("mac", "address"), source_of(interface));
            addresses.extend(said.into_iter().flat_map(|nic| &nic.addresses).map(|at| at.value.address));
        }
        let failed;
        (outcome.dns, failed) = dns::update(dns, &names, &addresses);
        let not_done = outcome.dns.iter().filter(|change| !change.error.is_empty());
        outcome.warnings.extend(not_done.map(|change| format!("{}: {}", change.subject, change.error)));
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activate::record::PointId;
    use vmdr_plan::Plan;

    #[test]
    fn what_is_left_to_be_done_is_noted_until_nothing_can_come_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let uuid = Uuid::from_u128(7);
        let plan = Plan::parse("").unwrap().domain("web1", "").clone();
        let original = Element::new("domain");
        let applied = |mapping| Applied {
            uuid,
            name: "web1",
            mapping,
            original: original.clone(),
            active: ActiveDirectory::of(directory.path()),
            boots: false,
        };
        let none = Mapping::default();
        applied(&none).note().unwrap();
        assert!(!applied(&none).is_noted(), "without a plan there is nothing to be done");
        let mapping = Mapping { plan: Some(plan), ..Mapping::default() };
        let applied = applied(&mapping);
        applied.note().unwrap();
        assert!(applied.is_noted());
        // libvirt may be starting it all the same.
        let point = PointId { generation: 1, epoch: 1, cut_unix_ns: 1 };
        let step = Step::Restoring { generation: 2, point, attempt: 1, overlays: Vec::new() };
        applied.active.write(uuid, "web1", &step).unwrap();
        applied.failed();
        assert!(applied.is_noted());
        applied.active.write(uuid, "web1", &Step::Fenced { generation: 2, point, attempt: 1 }).unwrap();
        applied.failed();
        assert!(!applied.is_noted());
    }

    #[test]
    fn a_hook_after_that_was_to_end_it_is_run_again_the_next_time() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("right");
        let plan = format!("[[domain.web1.after]]\nargv = [\"/bin/test\", \"-e\", \"{}\"]\n", file.display());
        let plan = Plan::parse(&format!("{plan}on_failure = \"abort\"\n")).unwrap().domain("web1", "").clone();
        let mapping = Mapping { plan: Some(plan), ..Mapping::default() };
        let applied = Applied {
            uuid: Uuid::from_u128(7),
            name: "web1",
            mapping: &mapping,
            original: Element::new("domain"),
            active: ActiveDirectory::of(directory.path()),
            boots: false,
        };
        let uri = "test:///default";
        let host = LocalHost::connect(uri).unwrap();
        applied.note().unwrap();
        let outcome = applied.after(uri, &host, "1-5", 2, &mut |_| {});
        assert!(outcome.failed.is_some() && applied.is_noted(), "{outcome:?}");
        std::fs::write(&file, "").unwrap();
        let outcome = applied.after(uri, &host, "1-5", 2, &mut |_| {});
        assert!(outcome.failed.is_none() && outcome.hooks.len() == 1 && !applied.is_noted(), "{outcome:?}");
    }

    #[test]
    fn the_environment_says_where_each_nic_is() {
        let plan = "[[domain.web1.nic]]\nmac = \"52:54:00:00:00:01\"\nbridge = \"br-dmz\"\nvlan = 7\n\
                    addresses = [\"192.0.2.10/24\", \"2001:db8::10/64\"]\n[[defaults.nic]]\nsource = \"lan\"\nnetwork = \"dr\"\n";
        let plan = Plan::parse(plan).unwrap().domain("web1", "").clone();
        let mapping = Mapping { plan: Some(plan), file: "/etc/vmdr/plan.toml".to_owned(), ..Mapping::default() };
        let nics = "<domain><devices><interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/></interface>\
                    <interface type='network'><mac address='52:54:00:00:00:02'/><source network='lan' bridge='virbr0'/></interface>\
                    </devices></domain>";
        let applied = Applied {
            uuid: Uuid::from_u128(7),
            name: "web1",
            mapping: &mapping,
            original: Element::parse(nics).unwrap(),
            active: ActiveDirectory::of(std::path::Path::new("/nonexistent")),
            boots: false,
        };
        let environment = applied.environment("1-5", Some(2));
        let of = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
        assert_eq!(of("VMDR_ADDRESSES"), Some("192.0.2.10/24 2001:db8::10/64"));
        assert_eq!(of("VMDR_MACS"), Some("52:54:00:00:00:01 52:54:00:00:00:02"));
        let nics = "52:54:00:00:00:01,bridge,br-dmz,7,192.0.2.10/24+2001:db8::10/64 52:54:00:00:00:02,network,dr,,";
        assert_eq!((of("VMDR_NICS"), of("VMDR_GENERATION"), of("VMDR_POINT")), (Some(nics), Some("2"), Some("1-5")));
        assert!(applied.environment("1-5", None).iter().all(|(name, _)| *name != "VMDR_GENERATION"));
    }
}
