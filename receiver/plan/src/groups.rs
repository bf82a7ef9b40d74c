//! Whether the groups of a plan make sense: who is in which, and who waits for whom.

use std::collections::HashMap;

use crate::model::{Group, Plan};
use crate::place::Sink;
use crate::sense::twice;

pub(crate) fn check(plan: &Plan, sink: &Sink<'_>) {
    let known = |name: &str| plan.domains.iter().find(|domain| domain.name.value == name);
    let members = || plan.groups.iter().flat_map(|group| group.members.iter().map(move |member| (group, member)));
    for (group, member) in members().filter(|(_, member)| known(&member.value).is_none()) {
        let (name, group) = (&member.value, &group.name.value);
        let message =
            format!("{name} is a member of {group}, but no domain of this plan: give it a table, which may be empty");
        sink.wrong(member.place, message);
    }
    twice(members().map(|(_, member)| (member.value.as_str(), member.place)), sink, |name, first| {
        format!("{name} is a member of a group at {first} already")
    });
    let groups: HashMap<&str, &Group> = members().map(|(group, member)| (member.value.as_str(), group)).collect();
    for domain in &plan.domains {
        let name = domain.name.value.as_str();
        let Some(group) = groups.get(name) else {
            // Whoever said it before there were groups loses that domain and no other: `Domain::unsupported`.
            continue;
        };
        for needed in domain.needs.iter().filter(|needed| needed.value != name) {
            let Some(other) = known(&needed.value) else { continue };
            let its = groups.get(needed.value.as_str());
            if its.is_none_or(|its| its.name.value != group.name.value) {
                let place = its.map_or_else(|| "no group".to_owned(), |its| format!("group {}", its.name.value));
                let (needed_name, group) = (&needed.value, &group.name.value);
                let message = format!(
                    "{name} of group {group} needs {needed_name}, which is in {place}: a domain waits for those of its own group"
                );
                sink.wrong(needed.place, message);
            } else if other.place() > domain.place() {
                let message = format!(
                    "{name} has priority {} and needs {}, which comes after it with {}: the lowest is first",
                    domain.place(),
                    needed.value,
                    other.place()
                );
                sink.wrong(needed.place, message);
            }
        }
    }
}
