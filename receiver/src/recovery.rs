//! The recovery plan (`vmdr-plan`) at this site: what of it is applied at an activation, and whether it fits.
//!
//! - [`mapping`]: what it says of a domain, for [`crate::activate`]; a plan that is wrong refuses an activation before anything is
//!   started.
//! - [`hooks`]: programs before and after; [`announce`]: the guest's addresses, told to its new neighbours; [`guest`]: other addresses
//!   in the guest; [`dns`]: names that lead to them; [`applied`]: all of that, in its order around an activation.
//! - [`limits`]: what a guest may take of this host.
//! - [`site`]: whether this site has what the plan names; [`watch`]: the same every day.
//!
//! The file is read each time: there is nothing to be told of a change.

pub mod announce;
pub mod applied;
pub mod dns;
pub mod guest;
pub mod hooks;
pub mod limits;
pub mod packet;
pub mod site;
pub mod watch;

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmdr_plan::{Mistake, Place, Plan};

use crate::activate::findings::refused;
use crate::activate::mapping::Mapping;
use crate::config::Config;

/// Of a plan that is wrong so many mistakes are told where there is no room for all.
const TOLD_MAX: usize = 5;

/// Permission to write for others than the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Reads a plan. What concerns the file as a whole is a mistake at line 0.
pub fn load(file: &Path) -> Result<Plan, Vec<Mistake>> {
    let whole = |message: String| vec![Mistake { place: Place::default(), message }];
    let read = || -> std::io::Result<(u32, String)> {
        let mut open = std::fs::File::open(file)?;
        let mode = open.metadata()?.mode();
        let mut text = String::new();
        open.read_to_string(&mut text)?;
        Ok((mode, text))
    };
    match read() {
        Err(error) => Err(whole(format!("read it: {error}"))),
        // Its hooks are run as root.
        Ok((mode, _)) if mode & OTHERS_WRITE != 0 => {
            Err(whole(format!("others than its owner can write it: `chmod go-w {}`", file.display())))
        }
        Ok((_, text)) => Plan::parse(&text),
    }
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
            mapping.dns = plan.dns.map(|dns| dns.value);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_plan_that_is_wrong_refuses_with_its_places() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("plan.toml");
        let config = Config { plan: Some(file.clone()), ..Config::default() };
        let facts = || -> Vec<String> {
            let trouble = mapping(&config, "web1", "u").trouble;
            trouble.iter().map(|finding| finding.fact.replace(&file.display().to_string(), "F")).collect()
        };
        assert!(mapping(&Config::default(), "web1", "u").plan.is_none());
        assert!(facts()[0].starts_with("F: read it: No such file"), "{:?}", facts());
        let write = |text: &str, mode: u32| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write("[domain.web1]\ncpu_shares = 100\n", 0o644);
        assert_eq!(facts(), [] as [&str; 0]);
        write("[domain.web1]\npriority = 1\n[domain.web2]\npriority = 2\n", 0o600);
        assert_eq!(facts().len(), 1, "what another domain has is no trouble: {:?}", facts());
        assert!(facts()[0].starts_with("F:2:12: `priority` is of a domain in a group"), "{:?}", facts());
        write("[domain.web1]\nfoo = 1\n", 0o600);
        assert!(facts()[0].starts_with("F:2:1: `foo` is no key"), "{:?}", facts());
        write("", 0o664);
        assert!(facts()[0].starts_with("F: others than its owner can write it"), "{:?}", facts());
    }
}
