//! From text to a [`Plan`]: every table of the schema, field by field.

use std::net::IpAddr;

use toml::de::DeTable;

use crate::model::{
    Disk, DiskSelector, Dns, Domain, Group, Hook, Iscsi, Limits, Nbd, Nic, NicSelector, NicTarget, OnFailure, Plan,
    Rbd, Ready, ReadyCheck, Route, Storage,
};
use crate::place::{At, Mistake, Place, Sink};
use crate::read::Reader;
use crate::schema;
use crate::sense;
use crate::values::{self, Cidr, Mac};

/// Seconds that a hook or a readiness check may take unless it says so.
const TIMEOUT_SECONDS: u64 = 30;
const TIMEOUT_SECONDS_MAX: u64 = 3600;
/// Seconds between two tries of a readiness check unless it says so.
const INTERVAL_SECONDS: u64 = 1;
/// Activations of a group at once unless it says so, and the most.
const PARALLEL: u64 = 4;
const PARALLEL_MAX: u64 = 32;
/// Time to live of names unless it is said.
const TTL_SECONDS: u64 = 60;
/// How long an attempt to update names may take, and how many there are, unless it is said.
const DNS_TIMEOUT_SECONDS: u64 = 5;
const DNS_TRIES: u64 = 3;
/// A plan is written by hand: more than this is something else.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// What `[defaults]` says beside networks.
struct Common {
    announce: bool,
    limits: Limits,
    dns_servers: Vec<At<IpAddr>>,
    dns_search: Vec<At<String>>,
    timeout_seconds: u64,
    on_failure: OnFailure,
    before: Vec<Hook>,
    after: Vec<Hook>,
}

impl Plan {
    /// Reads a plan. All mistakes are told, in the order of the text; a text that is no TOML has one, its first.
    pub fn parse(text: &str) -> Result<Plan, Vec<Mistake>> {
        let sink = Sink::new(text);
        if text.len() > TEXT_BYTES_MAX {
            sink.wrong(
                Place { line: 1, column: 1 },
                format!("this is larger than a plan can be ({TEXT_BYTES_MAX} bytes)"),
            );
            return Err(sink.found());
        }
        let table = match DeTable::parse(text) {
            Ok(table) => table,
            Err(error) => {
                let said = error.message().lines().collect::<Vec<_>>().join(", ");
                sink.wrong(sink.place(error.span().map_or(0, |span| span.start)), said);
                return Err(sink.found());
            }
        };
        let plan = read_plan(table.get_ref(), &sink);
        sense::check(&plan, &sink);
        let found = sink.found();
        if found.is_empty() { Ok(plan) } else { Err(found) }
    }
}

fn read_plan<'a>(table: &'a DeTable<'a>, sink: &'a Sink<'a>) -> Plan {
    let root = Reader::new(table, &schema::ROOT, Place { line: 1, column: 1 }, sink);
    let (common, nics) = read_defaults(root.table("defaults", &schema::DEFAULTS));
    let dns = root.table("dns", &schema::DNS).and_then(|table| read_dns(table, &common));
    let domains =
        root.named("domain", &schema::DOMAIN).into_iter().map(|(name, table)| read_domain(name, table, &common, &nics));
    let mut domains: Vec<Domain> = domains.collect();
    let groups = root.named("group", &schema::GROUP).into_iter().map(|(name, table)| read_group(name, table));
    let groups: Vec<Group> = groups.collect();
    for domain in &mut domains {
        let is_it = |member: &At<String>| member.value == domain.name.value;
        domain.in_group = groups.iter().any(|group| group.members.iter().any(is_it));
    }
    root.finish();
    let Common { announce, limits, dns_servers, dns_search, before, after, .. } = common;
    let everyone = Domain { announce, limits, nics, before, after, dns_servers, dns_search, ..Domain::default() };
    Plan { everyone, dns, domains, groups }
}

fn read_defaults(table: Option<Reader<'_>>) -> (Common, Vec<Nic>) {
    let none = Common {
        announce: true,
        limits: Limits::default(),
        dns_servers: Vec::new(),
        dns_search: Vec::new(),
        timeout_seconds: TIMEOUT_SECONDS,
        on_failure: OnFailure::Abort,
        before: Vec::new(),
        after: Vec::new(),
    };
    let Some(table) = table else { return (none, Vec::new()) };
    let mut common = Common {
        announce: table.boolean("announce").is_none_or(|at| at.value),
        limits: read_limits(&table),
        dns_servers: table.list("dns_servers", values::ip),
        dns_search: table.list("dns_search", values::host_name),
        timeout_seconds: timeout(&table).unwrap_or(TIMEOUT_SECONDS),
        on_failure: on_failure(&table).unwrap_or(OnFailure::Abort),
        ..none
    };
    common.before = table.tables("before", &schema::HOOK).into_iter().filter_map(|t| read_hook(t, &common)).collect();
    common.after = table.tables("after", &schema::HOOK).into_iter().filter_map(|t| read_hook(t, &common)).collect();
    let nics = table.tables("nic", &schema::DEFAULT_NIC).into_iter().filter_map(|t| read_default_nic(t, &common));
    let nics = nics.collect();
    table.finish();
    (common, nics)
}

fn timeout(table: &Reader<'_>) -> Option<u64> {
    table.number("timeout_seconds", 1, TIMEOUT_SECONDS_MAX, "a time limit in seconds").map(|at| at.value)
}

fn on_failure(table: &Reader<'_>) -> Option<OnFailure> {
    let parse = |text: &str| match text {
        "abort" => Ok(OnFailure::Abort),
        "warn" => Ok(OnFailure::Warn),
        other => Err(format!("`on_failure` is {other:?}: it is \"abort\" or \"warn\"")),
    };
    table.parsed("on_failure", parse).map(|at| at.value)
}

fn read_limits(table: &Reader<'_>) -> Limits {
    Limits {
        cpu_percent: table.number("cpu_percent", 1, 102_400, "processor time in per cent of one processor"),
        cpu_shares: table.number("cpu_shares", 2, 10_000, "a weight against other guests"),
        memory_bytes: table.parsed("memory_limit", values::size),
    }
}

fn read_dns(table: Reader<'_>, common: &Common) -> Option<At<Dns>> {
    let server = table.parsed("server", values::host_and_port);
    let server = table.required("server", server);
    let zone = table.parsed("zone", values::host_name);
    let zone = table.required("zone", zone);
    let key_file = table.parsed("key_file", values::path);
    let key_file = table.required("key_file", key_file);
    let reverse_zones = table.list("reverse_zones", values::reverse_zone);
    let ttl = table.number("ttl_seconds", 1, 86_400, "a time to live in seconds");
    let timeout = table.number("timeout_seconds", 1, 60, "a time limit of one attempt in seconds");
    let tries = table.number("tries", 1, 10, "a number of attempts");
    let on_failure = on_failure(&table).unwrap_or(common.on_failure);
    let place = table.place;
    table.finish();
    let value = Dns {
        server: server?.value,
        zone: zone?.value,
        key_file: key_file?,
        reverse_zones,
        ttl_seconds: ttl.map_or(TTL_SECONDS, |at| at.value),
        timeout_seconds: timeout.map_or(DNS_TIMEOUT_SECONDS, |at| at.value),
        tries: tries.map_or(DNS_TRIES, |at| at.value),
        on_failure,
    };
    Some(At { value, place })
}

fn read_domain(name: At<String>, table: Reader<'_>, common: &Common, defaults: &[Nic]) -> Domain {
    if name.value.is_empty() || name.value.contains('/') || name.value.chars().any(char::is_control) {
        table.sink.wrong(name.place, format!("{:?} is no name of a domain", name.value));
    }
    let announce = table.boolean("announce").map(|at| at.value);
    let own = read_limits(&table);
    let limits = Limits {
        cpu_percent: own.cpu_percent.or_else(|| common.limits.cpu_percent.clone()),
        cpu_shares: own.cpu_shares.or_else(|| common.limits.cpu_shares.clone()),
        memory_bytes: own.memory_bytes.or_else(|| common.limits.memory_bytes.clone()),
    };
    let mut nics: Vec<Nic> = Vec::new();
    for nic in table.tables("nic", &schema::NIC) {
        nics.extend(read_nic(nic, announce.unwrap_or(common.announce)));
    }
    nics.extend(defaults.iter().cloned().map(|nic| Nic { announce: announce.unwrap_or(nic.announce), ..nic }));
    let hooks = |key| table.tables(key, &schema::HOOK).into_iter().filter_map(|t| read_hook(t, common));
    let before = common.before.iter().cloned().chain(hooks("before")).collect();
    let after = hooks("after").chain(common.after.iter().cloned()).collect();
    let servers = table.list("dns_servers", values::ip);
    let search = table.list("dns_search", values::host_name);
    let domain = Domain {
        // Who is in which group stands elsewhere in the plan.
        in_group: false,
        announce: announce.unwrap_or(common.announce),
        limits,
        nics,
        disks: table.tables("disk", &schema::DISK).into_iter().filter_map(read_disk).collect(),
        before,
        after,
        hostname: table.parsed("hostname", values::host_name),
        dns_servers: if table.has("dns_servers") { servers } else { common.dns_servers.clone() },
        dns_search: if table.has("dns_search") { search } else { common.dns_search.clone() },
        dns_names: table.list("dns_names", values::host_name),
        priority: table.number("priority", 0, 1000, "a priority, the lowest first,"),
        needs: table.strings("needs").map(|list| list.value).unwrap_or_default(),
        ready: table.tables("ready", &schema::READY).into_iter().filter_map(|t| read_ready(t, common)).collect(),
        name,
    };
    table.finish();
    domain
}

fn read_target(table: &Reader<'_>) -> Option<At<NicTarget>> {
    let bridge = table.parsed("bridge", values::device_name);
    let network = table.parsed("network", values::network_name);
    if table.has("bridge") && table.has("network") {
        let place = table.key_place("bridge").max(table.key_place("network"));
        table.sink.wrong(place, "`bridge` and `network` exclude each other: a NIC is in one of them");
    }
    let bridge = bridge.map(|at| at.with(NicTarget::Bridge(at.value.clone())));
    bridge.or_else(|| network.map(|at| at.with(NicTarget::Network(at.value.clone()))))
}

fn read_vlan(table: &Reader<'_>) -> Option<At<u16>> {
    let vlan = table.number("vlan", 1, 4094, "a VLAN")?;
    if !table.has("bridge") {
        table.sink.wrong(vlan.place, "`vlan` needs a `bridge` whose port is put into it");
    }
    Some(vlan.with(u16::try_from(vlan.value).unwrap_or_default()))
}

fn read_default_nic(table: Reader<'_>, common: &Common) -> Option<Nic> {
    let source = table.string("source");
    let source = table.required("source", source);
    let target = read_target(&table);
    let vlan = read_vlan(&table);
    if source.is_some() && !table.has("bridge") && !table.has("network") {
        table.sink.wrong(table.place, "`bridge` or `network` is missing: where the source's NICs are here");
    }
    let announce = table.boolean("announce").map_or(common.announce, |at| at.value);
    table.finish();
    let source = source?;
    Some(Nic {
        selector: source.with(NicSelector::Source(source.value.clone())),
        of_defaults: true,
        target,
        vlan,
        new_mac: None,
        announce,
        addresses: Vec::new(),
        changed: None,
        gateway: None,
        routes: Vec::new(),
    })
}

fn read_nic(table: Reader<'_>, announce: bool) -> Option<Nic> {
    let mac = table.parsed("mac", Mac::parse);
    let source = table.string("source");
    let selector = table.one_of(&["mac", "source"], "which NIC is meant").and_then(|_| {
        let mac = mac.map(|at| at.with(NicSelector::Mac(at.value)));
        mac.or_else(|| source.map(|at| at.with(NicSelector::Source(at.value.clone()))))
    });
    let addressing = |text: &str| match text {
        "kept" => Ok(false),
        "changed" => Ok(true),
        other => Err(format!(
            "`addressing` is {other:?}: it is \"kept\" (the guest has these addresses) or \"changed\" (it is given them)"
        )),
    };
    let changed = table.parsed("addressing", addressing).filter(|at| at.value).map(|at| at.with(()));
    let mut routes = Vec::new();
    for route in table.tables("routes", &schema::ROUTE) {
        let to = route.parsed("to", Cidr::parse);
        let to = route.required("to", to);
        let via = route.parsed("via", values::ip);
        let via = route.required("via", via);
        route.finish();
        routes.extend(to.zip(via).map(|(to, via)| Route { to, via }));
    }
    let target = read_target(&table);
    let vlan = read_vlan(&table);
    let new_mac = table.parsed("new_mac", Mac::parse);
    let announce = table.boolean("announce").map_or(announce, |at| at.value);
    let addresses = table.list("addresses", Cidr::parse_host);
    let gateway = table.parsed("gateway", values::ip);
    if !table.has("addressing") || (changed.is_none() && table.string("addressing").is_some_and(|a| a.value == "kept"))
    {
        for key in ["gateway", "routes"] {
            if table.has(key) {
                let place = table.key_place(key);
                table.sink.wrong(
                    place,
                    format!(
                        "`{key}` without `addressing = \"changed\"`: a guest that keeps its addresses keeps its routes"
                    ),
                );
            }
        }
    }
    if let Some(changed) = &changed
        && !table.has("addresses")
    {
        table.sink.wrong(changed.place, "`addressing = \"changed\"` needs `addresses`");
    }
    table.finish();
    Some(Nic {
        selector: selector?,
        of_defaults: false,
        target,
        vlan,
        new_mac,
        announce,
        addresses,
        changed,
        gateway,
        routes,
    })
}

/// A user and the file with its secret: both or neither.
fn secret(table: &Reader<'_>) -> Option<(String, At<String>)> {
    let user = table.string("user");
    let file = table.parsed("secret_file", values::path);
    match (table.has("user"), table.has("secret_file")) {
        (true, false) => table.sink.wrong(table.key_place("user"), "`user` needs a `secret_file`"),
        (false, true) => table.sink.wrong(table.key_place("secret_file"), "`secret_file` needs a `user`"),
        _ => {}
    }
    Some((user?.value, file?))
}

fn read_disk(table: Reader<'_>) -> Option<Disk> {
    let target = table.string("target").map(|at| at.with(DiskSelector::Target(at.value.clone())));
    let serial = table.string("serial").map(|at| at.with(DiskSelector::Serial(at.value.clone())));
    let wwn = table.parsed("wwn", values::wwn).map(|at| at.with(DiskSelector::Wwn(at.value.clone())));
    let selector = table.one_of(&["target", "serial", "wwn"], "which disk is meant");
    let file = table.parsed("file", values::path);
    let device = table.parsed("device", values::device_path);
    let format = table.parsed("format", |text| match text {
        "raw" => Ok(false),
        "qcow2" => Ok(true),
        other => Err(format!("`format` is {other:?}: it is \"raw\" or \"qcow2\"")),
    });
    if table.has("format") && !table.has("file") {
        table.sink.wrong(table.key_place("format"), "`format` is of a `file`");
    }
    let iscsi = table.table("iscsi", &schema::ISCSI).and_then(read_iscsi);
    let rbd = table.table("rbd", &schema::RBD).and_then(read_rbd);
    let nbd = table.table("nbd", &schema::NBD).and_then(read_nbd);
    let which = table.one_of(&["file", "device", "iscsi", "rbd", "nbd"], "where the disk lies here");
    let place = which.map(|key| table.key_place(key));
    table.finish();
    selector?;
    let storage = match which? {
        "file" => Storage::File { path: file?.value, qcow2: format.is_some_and(|at| at.value) },
        "device" => Storage::Device(device?.value),
        "iscsi" => Storage::Iscsi(iscsi?),
        "rbd" => Storage::Rbd(rbd?),
        _ => Storage::Nbd(nbd?),
    };
    Some(Disk { selector: target.or(serial).or(wwn)?, storage: At { value: storage, place: place? } })
}

fn read_iscsi(table: Reader<'_>) -> Option<Iscsi> {
    let portal = table.parsed("portal", values::host_and_port);
    let portal = table.required("portal", portal);
    let iqn = table.parsed("iqn", values::iqn);
    let iqn = table.required("iqn", iqn);
    let lun = table.number("lun", 0, 16_383, "a LUN");
    let lun = table.required("lun", lun);
    let chap = secret(&table);
    table.finish();
    Some(Iscsi { portal: portal?.value, iqn: iqn?.value, lun: lun?.value, chap })
}

fn read_rbd(table: Reader<'_>) -> Option<Rbd> {
    let monitors = table.list("monitors", values::host_and_port);
    let pool = table.string("pool");
    let pool = table.required("pool", pool);
    let image = table.string("image");
    let image = table.required("image", image);
    let user = secret(&table);
    table.finish();
    let monitors = monitors.into_iter().map(|at| at.value).collect();
    Some(Rbd { monitors, pool: pool?.value, image: image?.value, user })
}

fn read_nbd(table: Reader<'_>) -> Option<Nbd> {
    let host = table.string("host");
    let host = table.required("host", host);
    let port = table.number("port", 1, 65_535, "a TCP port");
    let export = table.string("export");
    let export = table.required("export", export);
    table.finish();
    let port = port.map_or(10_809, |at| u16::try_from(at.value).unwrap_or_default());
    Some(Nbd { host: host?.value, port, export: export?.value })
}

/// Program and arguments.
fn argv(table: &Reader<'_>, whose: &str) -> Option<At<Vec<String>>> {
    let argv = table.strings("argv")?;
    let Some(program) = argv.value.first() else {
        table.sink.wrong(argv.place, "`argv` is empty: it is a program by its absolute path, and its arguments");
        return None;
    };
    if let Err(what) = values::path(&program.value) {
        table.sink.wrong(program.place, format!("the program of {whose}: {what}"));
    }
    Some(argv.with(argv.value.iter().map(|word| word.value.clone()).collect()))
}

fn read_hook(table: Reader<'_>, common: &Common) -> Option<Hook> {
    let argv = argv(&table, "a hook");
    let argv = table.required("argv", argv);
    let timeout_seconds = timeout(&table).unwrap_or(common.timeout_seconds);
    let on_failure = on_failure(&table).unwrap_or(common.on_failure);
    table.finish();
    Some(Hook { argv: argv?, timeout_seconds, on_failure })
}

fn read_ready(table: Reader<'_>, common: &Common) -> Option<At<Ready>> {
    let place = table.place;
    let tcp = table.parsed("tcp", values::host_and_port).map(|at| ReadyCheck::Tcp(at.value));
    let heartbeat = table.boolean("heartbeat");
    let command = argv(&table, "a check").map(ReadyCheck::Command);
    let timeout_seconds = timeout(&table).unwrap_or(common.timeout_seconds);
    let interval = table.number("interval_seconds", 1, TIMEOUT_SECONDS_MAX, "a time between tries in seconds");
    if let Some(at) = interval.as_ref().filter(|at| at.value > timeout_seconds) {
        let message =
            format!("`interval_seconds` is {}, longer than the {timeout_seconds} s that it may take", at.value);
        table.sink.wrong(at.place, message);
    }
    let retries = table.number("retries", 0, 10_000, "how often it is tried again").map(|at| at.value);
    let namespace = table.parsed("namespace", values::namespace);
    let on_failure = on_failure(&table).unwrap_or(common.on_failure);
    let which = table.one_of(&["tcp", "heartbeat", "argv"], "what shows that the guest is ready");
    if let Some(at) = namespace.as_ref().filter(|_| table.has("heartbeat")) {
        table.sink.wrong(at.place, "`namespace` is of `tcp` and `argv`: a heartbeat takes no network");
    }
    if let Some(at) = heartbeat.as_ref().filter(|at| !at.value) {
        table.sink.wrong(at.place, "`heartbeat` is false: leave it out");
    }
    table.finish();
    let check = match which? {
        "tcp" => tcp?,
        "heartbeat" => ReadyCheck::Heartbeat,
        _ => command?,
    };
    let interval_seconds = interval.map_or(INTERVAL_SECONDS, |at| at.value);
    Some(At { value: Ready { check, namespace, timeout_seconds, interval_seconds, retries, on_failure }, place })
}

fn read_group(name: At<String>, table: Reader<'_>) -> Group {
    if let Err(what) = values::group_name(&name.value) {
        table.sink.wrong(name.place, what);
    }
    let members = table.strings("members");
    let members = table.required("members", members);
    if let Some(at) = members.as_ref().filter(|at| at.value.is_empty()) {
        table.sink.wrong(at.place, format!("`members` is empty: it lists the domains of the group {}", name.value));
    }
    let parallel = table.number("parallel", 1, PARALLEL_MAX, "activations at once").map_or(PARALLEL, |at| at.value);
    table.finish();
    let members = members.map(|at| at.value).unwrap_or_default();
    Group { name, members, parallel: usize::try_from(parallel).unwrap_or(1) }
}
