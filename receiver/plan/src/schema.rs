//! Which keys a plan can have, table by table. [`crate::Plan::parse`] refuses every other key, and `docs/plan.md` describes
//! these and no others (a test compares them).

/// A kind of table.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// As it is written, `NAME` for a name of the operator's.
    pub header: &'static str,
    /// Its keys.
    pub keys: &'static [&'static str],
}

/// The file itself.
pub const ROOT: Table = Table { header: "a plan", keys: &["defaults", "dns", "domain", "group"] };
/// What the domains of a site have in common.
pub const DEFAULTS: Table = Table {
    header: "[defaults]",
    keys: &[
        "announce",
        "cpu_percent",
        "cpu_shares",
        "memory_limit",
        "dns_servers",
        "dns_search",
        "timeout_seconds",
        "on_failure",
        "nic",
        "before",
        "after",
    ],
};
/// Where networks and bridges are here, for the NICs of all domains.
pub const DEFAULT_NIC: Table =
    Table { header: "[[defaults.nic]]", keys: &["source", "bridge", "network", "vlan", "announce"] };
/// A domain.
pub const DOMAIN: Table = Table {
    header: "[domain.NAME]",
    keys: &[
        "announce",
        "cpu_percent",
        "cpu_shares",
        "memory_limit",
        "hostname",
        "dns_servers",
        "dns_search",
        "dns_names",
        "priority",
        "needs",
        "ready",
        "nic",
        "disk",
        "before",
        "after",
    ],
};
/// A NIC of a domain.
pub const NIC: Table = Table {
    header: "[[domain.NAME.nic]]",
    keys: &[
        "mac",
        "source",
        "bridge",
        "network",
        "vlan",
        "new_mac",
        "announce",
        "addresses",
        "addressing",
        "gateway",
        "routes",
    ],
};
/// A route of a NIC.
pub const ROUTE: Table = Table { header: "[[domain.NAME.nic.routes]]", keys: &["to", "via"] };
/// A disk of a domain.
pub const DISK: Table = Table {
    header: "[[domain.NAME.disk]]",
    keys: &["target", "serial", "wwn", "file", "format", "device", "iscsi", "rbd", "nbd"],
};
/// An iSCSI LUN.
pub const ISCSI: Table =
    Table { header: "[domain.NAME.disk.iscsi]", keys: &["portal", "iqn", "lun", "user", "secret_file"] };
/// A Ceph block device.
pub const RBD: Table =
    Table { header: "[domain.NAME.disk.rbd]", keys: &["monitors", "pool", "image", "user", "secret_file"] };
/// An NBD export.
pub const NBD: Table = Table { header: "[domain.NAME.disk.nbd]", keys: &["host", "port", "export"] };
/// A program that is run before or after an activation.
pub const HOOK: Table =
    Table { header: "[[domain.NAME.before]], [[domain.NAME.after]]", keys: &["argv", "timeout_seconds", "on_failure"] };
/// When a domain counts as up.
pub const READY: Table = Table {
    header: "[[domain.NAME.ready]]",
    keys: &["tcp", "heartbeat", "argv", "namespace", "timeout_seconds", "interval_seconds", "retries", "on_failure"],
};
/// Domains that are activated together, in order.
pub const GROUP: Table = Table { header: "[group.NAME]", keys: &["members", "parallel"] };
/// Dynamic updates of names.
pub const DNS: Table = Table {
    header: "[dns]",
    keys: &["server", "zone", "reverse_zones", "key_file", "ttl_seconds", "timeout_seconds", "tries", "on_failure"],
};

/// All of them.
pub const TABLES: [&Table; 14] =
    [&ROOT, &DEFAULTS, &DEFAULT_NIC, &DOMAIN, &NIC, &ROUTE, &DISK, &ISCSI, &RBD, &NBD, &HOOK, &READY, &GROUP, &DNS];

/// What to say of a key that somebody may expect and that is not there for a reason.
pub(crate) fn hint(key: &str) -> Option<&'static str> {
    Some(match key {
        "vcpus" | "cpus" | "vcpu" => {
            "a guest that is resumed keeps the vCPUs that are in its memory; `cpu_percent` and `cpu_shares` limit what they get"
        }
        "memory" | "memory_mib" => {
            "a guest that is resumed keeps its memory; `memory_limit` bounds what it may take of this host"
        }
        "timeout" => "it is written `timeout_seconds`",
        "ttl" => "it is written `ttl_seconds`",
        "address" | "ip" | "ips" => "it is written `addresses = [\"ADDRESS/PREFIX\"]`",
        "depends" | "depends_on" | "dependencies" => "it is written `needs`",
        "domains" => "it is written `[domain.NAME]`",
        "groups" => "it is written `[group.NAME]`",
        "interval" => "it is written `interval_seconds`",
        _ => return None,
    })
}
