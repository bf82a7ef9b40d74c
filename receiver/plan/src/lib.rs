//! Recovery plans: a TOML file in which an operator writes down once how the domains of a protected host map onto the backup
//! site. `docs/plan.md` describes it.
//!
//! - [`Plan::parse`]: from text to a plan that makes sense by itself, or everything that is wrong with it, each with line and
//!   column. Unknown keys are wrong.
//! - [`Plan::unsupported`]: what it says and this version cannot do.
//! - [`schema`]: which keys there are.
//!
//! Nothing is opened or asked here: whether the site has what the plan names, the receiver finds out.

mod groups;
mod model;
mod parse;
mod place;
mod read;
pub mod schema;
mod sense;
mod unsupported;
mod values;

pub use model::{
    Disk, DiskSelector, Dns, Domain, Group, Hook, Iscsi, Limits, Nbd, Nic, NicSelector, NicTarget, OnFailure, Plan,
    Rbd, Ready, ReadyCheck, Route, Storage,
};
pub use place::{At, Mistake, Place};
pub use values::{Cidr, Mac};

/// Where the plan is, unless the receiver's configuration says otherwise.
pub const PLAN_FILE: &str = "/etc/vmdr/plan.toml";

/// Whether a text can be the name of a group; if not, why.
pub fn group_name(text: &str) -> Result<(), String> {
    values::group_name(text)
}

impl Plan {
    /// The group of this name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name.value == name)
    }

    /// What it says of a domain, by its name or its UUID; the defaults, if it does not name it.
    pub fn domain(&self, name: &str, uuid: &str) -> &Domain {
        let by = |wanted: &str| self.domains.iter().find(|domain| domain.name.value == wanted);
        by(name).or_else(|| by(uuid)).unwrap_or(&self.everyone)
    }
}

impl Domain {
    /// What is said of a NIC that has this MAC address and is in this network or bridge at the protected host: by its MAC
    /// before its source, the domain's own before the defaults'.
    pub fn nic(&self, mac: Option<&str>, source: Option<&str>) -> Option<&Nic> {
        let mac = mac.and_then(|mac| Mac::parse(mac).ok());
        let by_mac = self
            .nics
            .iter()
            .find(|nic| matches!((&nic.selector.value, mac), (NicSelector::Mac(a), Some(b)) if *a == b));
        by_mac.or_else(|| {
            let source = source?;
            self.nics.iter().find(|nic| matches!(&nic.selector.value, NicSelector::Source(of) if of == source))
        })
    }
}
