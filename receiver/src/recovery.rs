//! The recovery plan (`vmdr-plan`) at this site: what of it is applied at an activation, and whether it fits.
//!
//! - [`mapping`]: what it says of a domain, for [`crate::activate`]; a plan that is wrong refuses an activation before anything is
//!   started.
//! - [`hooks`]: programs before and after; [`announce`]: the guest's addresses, told to its new neighbours; [`applied`]: both, in
//!   their order around an activation.
//! - [`site`]: whether this site has what the plan names; [`watch`]: the same every day.
//!
//! The file is read each time: there is nothing to be told of a change.

pub mod announce;
pub mod applied;
pub mod hooks;
pub mod packet;
pub mod site;
pub mod watch;

use std::path::Path;

use vmdr_plan::{Mistake, Place, Plan};

use crate::activate::findings::refused;
use crate::activate::mapping::Mapping;
use crate::config::Config;

/// Of a plan that is wrong so many mistakes are told where there is no room for all.
const TOLD_MAX: usize = 5;

/// Reads a plan. A file that cannot be read is a mistake at line 0.
pub fn load(file: &Path) -> Result<Plan, Vec<Mistake>> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| vec![Mistake { place: Place::default(), message: format!("read it: {error}") }])?;
    Plan::parse(&text)
}

/// `FILE:LINE:COLUMN: message`.
pub fn line(file: &str, mistake: &Mistake) -> String {
    match mistake.place.line {
        0 => format!("{file}: {}", mistake.message),
        _ => format!("{file}:{mistake}"),
    }
}

/// How a domain maps onto this site.
pub fn mapping(config: &Config, name: &str, uuid: &str) -> Mapping {
    let mut mapping = Mapping::from(config.bridges.clone());
    let Some(path) = &config.plan else { return mapping };
    mapping.file = path.display().to_string();
    let wrong = match load(path) {
        Ok(plan) => {
            let domain = plan.domain(name, uuid).clone();
            let unsupported = domain.unsupported();
            mapping.plan = Some(domain);
            unsupported
        }
        Err(mistakes) => mistakes,
    };
    let remedy = format!("mend it; `vmdr plan check {}` has everything that is wrong with it", mapping.file);
    let told =
        wrong.iter().take(TOLD_MAX).map(|mistake| refused("recovery plan", &line(&mapping.file, mistake), &remedy));
    mapping.trouble = told.collect();
    mapping
}
