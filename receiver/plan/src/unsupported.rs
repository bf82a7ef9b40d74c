//! What a plan can say and this version cannot do yet. It is refused and never left out in silence: on the day of a disaster a
//! guest without its LUN is worse than a plan that does not pass.

use crate::model::{Domain, Plan, Storage};
use crate::place::{Mistake, Place};

impl Plan {
    /// Everything in it that this version cannot do, in the order of the text.
    pub fn unsupported(&self) -> Vec<Mistake> {
        let mut found = Vec::new();
        for domain in self.domains.iter().chain([&self.everyone]) {
            domain.unsupported_into(&mut found);
        }
        found.sort();
        found.dedup();
        found
    }
}

impl Domain {
    /// The same for one domain.
    pub fn unsupported(&self) -> Vec<Mistake> {
        let mut found = Vec::new();
        self.unsupported_into(&mut found);
        found.sort();
        found
    }

    fn unsupported_into(&self, found: &mut Vec<Mistake>) {
        for disk in &self.disks {
            let kind = match &disk.storage.value {
                Storage::File { .. } => "a disk in a file of its own",
                Storage::Device(_) => "a disk on a block device",
                Storage::Iscsi(_) => "a disk on an iSCSI LUN",
                Storage::Rbd(_) => "a disk in Ceph",
                Storage::Nbd(_) => "a disk on an NBD server",
            };
            found.push(not_yet(disk.storage.place, kind, "leave it out: disks lie in the receiver's state directory"));
        }
        for nic in self.nics.iter().filter(|nic| !nic.of_defaults) {
            if let Some(mac) = &nic.new_mac {
                let why = "leave it out: a guest that is resumed has its MAC address in its memory";
                found.push(not_yet(mac.place, "another MAC address", why));
            }
        }
        if !self.in_group {
            self.alone_into(found);
        }
    }

    /// What is only looked at when a group is activated would be left out in silence.
    fn alone_into(&self, found: &mut Vec<Mistake>) {
        let places = [
            ("needs", self.needs.first().map(|at| at.place)),
            ("priority", self.priority.as_ref().map(|at| at.place)),
            ("ready", self.ready.first().map(|at| at.place)),
        ];
        for (key, place) in places {
            if let Some(place) = place {
                let name = &self.name.value;
                let message =
                    format!("`{key}` is of a domain in a group, and {name} is in none: list it in a [group.NAME]");
                found.push(Mistake { place, message });
            }
        }
    }
}

fn not_yet(place: Place, what: &str, instead: &str) -> Mistake {
    Mistake { place, message: format!("{what} is not supported yet; {instead}") }
}
