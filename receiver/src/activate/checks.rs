//! Whether this host could run a guest: the same questions at `protect`, in the plan and before an activation.
//!
//! A refusal is something that libvirt or QEMU would refuse here; a warning is something that the operator should know.
//! Questions that libvirt cannot answer (it may be busy or restarting) are errors, not findings.

use std::path::Path;

use uuid::Uuid;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{DomainXml, Interface};
use vmdr_hypervisor::host::NetworkState;
use vmdr_hypervisor::xml::Element;
use vmdr_proto::control::Finding;

use super::findings::{refused, warning};
use super::host::{CpuFit, Host};
use super::mapping::Mapping;
use crate::recovery;
use crate::recovery::limits::{self, Means};

/// Subject of findings about this host's memory.
pub const MEMORY: &str = "memory";

/// Everything that this host lacks for a guest, and what will be different.
pub fn check(xml: &Element, domain: &DomainXml, mapping: &Mapping, host: &dyn Host) -> Result<Vec<Finding>, Error> {
    let mut found = mapping.trouble.clone();
    check_name(domain, host, &mut found)?;
    check_machine(domain, host, &mut found)?;
    check_memory(domain, host, &mut found);
    check_limits(domain, mapping, &mut found);
    for interface in &domain.interfaces {
        check_interface(interface, mapping, host, &mut found)?;
    }
    check_files(xml, host, &mut found);
    check_confinement(host, &mut found)?;
    Ok(found)
}

fn check_name(domain: &DomainXml, host: &dyn Host, found: &mut Vec<Finding>) -> Result<(), Error> {
    let other: Option<Uuid> = host.uuid_of(&domain.name)?.filter(|uuid| *uuid != domain.uuid);
    if let Some(other) = other {
        found.push(refused(
            "domain name",
            &format!("this host has another domain named {} ({other})", domain.name),
            &format!("rename it: `virsh domrename {other} NEWNAME`"),
        ));
    }
    Ok(())
}

/// The emulator to use: the guest's own where it is installed, else this host's.
fn emulator<'a>(domain: &'a DomainXml, host: &dyn Host) -> Option<&'a str> {
    domain.emulator.as_deref().filter(|e| host.exists(e)).and_then(Path::to_str)
}

fn check_machine(domain: &DomainXml, host: &dyn Host, found: &mut Vec<Finding>) -> Result<(), Error> {
    let emulator = emulator(domain, host);
    match host.domain_capabilities(emulator, &domain.arch, &domain.machine, &domain.virt_type) {
        Ok(_) => {}
        Err(e) if e.is_connection() => return Err(e),
        Err(e) => {
            found.push(refused(
                "machine type",
                &format!("this host cannot run {} {} ({}): {e}", domain.virt_type, domain.machine, domain.arch),
                "install a QEMU at least as new as the protected host's (and KVM, if the guest uses it)",
            ));
            return Ok(());
        }
    }
    if domain.emulator.is_some() && emulator.is_none() {
        let path = domain.emulator.as_deref().unwrap_or(Path::new("")).display();
        found.push(warning("emulator", &format!("{path} is not on this host; libvirt's own choice is used"), ""));
    }
    let Some(cpu) = &domain.cpu else { return Ok(()) };
    let fit = host.cpu_fits(emulator, &domain.arch, &domain.machine, &domain.virt_type, cpu)?;
    let CpuFit::Lacks(what) = fit else { return Ok(()) };
    let fact = format!("this host cannot give the guest its CPU: {what}");
    found.push(if cpu.attribute("check") == Some("none") {
        // libvirt and QEMU would start it all the same: the guest may not have these features where it runs either.
        warning(
            "CPU",
            &fact,
            "compare the CPUs of both hosts; the guest's definition has check='none', so nothing else does",
        )
    } else {
        refused("CPU", &fact, "give the guest a CPU model that both hosts have, and restart it")
    });
    Ok(())
}

fn check_memory(domain: &DomainXml, host: &dyn Host, found: &mut Vec<Finding>) {
    let Some(available) = host.memory_available_bytes() else { return };
    if domain.memory_bytes > available {
        found.push(refused(
            MEMORY,
            &format!("the guest has {} MiB, this host has {} MiB left", domain.memory_bytes >> 20, available >> 20),
            "stop something here, or add memory",
        ));
    }
}

/// The recovery plan's limits, as `plan check` looks at them: the guest may have got more memory since. A guest without a limit is
/// better than none: only `plan check` refuses.
fn check_limits(domain: &DomainXml, mapping: &Mapping, found: &mut Vec<Finding>) {
    let Some(plan) = &mapping.plan else { return };
    for (_, mistake) in limits::trouble(&plan.limits, &domain.name, domain.memory_bytes, &Means::here()) {
        let fact = recovery::line(&mapping.file, &mistake);
        found.push(warning("recovery plan", &fact, "mend it; the guest comes up without a limit that cannot be set"));
    }
}

fn check_interface(
    interface: &Interface,
    mapping: &Mapping,
    host: &dyn Host,
    found: &mut Vec<Finding>,
) -> Result<(), Error> {
    let placed = mapping.place_interface(interface);
    let (source, local) = (interface.source.as_deref().unwrap_or_default(), placed.source.as_str());
    if local.is_empty() {
        return Ok(());
    }
    let subject = format!("interface {}", interface.mac.as_deref().unwrap_or(source));
    let said = placed.said.map(|place| format!(" ({}:{place})", mapping.file)).unwrap_or_default();
    match placed.kind.as_str() {
        "bridge" => {
            if !host.has_interface(local) {
                let (fact, remedy) = if said.is_empty() {
                    let named = if local == source { String::new() } else { format!(" (here called {local})") };
                    let map = format!("or map it in receiver.toml: [bridges] \"{source}\" = \"LOCAL\"");
                    (format!("its bridge {source}{named} is not on this host"), map)
                } else {
                    (
                        format!("the bridge {local} of the recovery plan{said} is not on this host"),
                        "or mend the plan".to_owned(),
                    )
                };
                found.push(refused(&subject, &fact, &format!("create {local} here, {remedy}")));
            } else if placed.vlan.is_some()
                && let Some(why) = host.vlan_trouble(local)?
            {
                found.push(refused(&subject, &format!("{why}{said}"), "or mend the recovery plan"));
            }
        }
        "network" => {
            let (fact, remedy) = match host.network(local)? {
                NetworkState::Active => return Ok(()),
                NetworkState::Inactive => ("is not started", format!("`virsh net-start {local}` and net-autostart")),
                NetworkState::Missing => ("is not on this host", format!("define a network {local} here")),
            };
            found.push(refused(&subject, &format!("its libvirt network {local} {fact}{said}"), &remedy));
        }
        "direct" if !host.has_interface(source) => found.push(refused(
            &subject,
            &format!("its network device {source} is not on this host"),
            &format!("give a device here the name {source}"),
        )),
        _ => {}
    }
    Ok(())
}

/// Files that libvirt or QEMU opens when the guest starts, and directories where it makes them.
fn check_files(xml: &Element, host: &dyn Host, found: &mut Vec<Finding>) {
    for (path, what) in
        [("os/kernel", "kernel"), ("os/initrd", "initrd"), ("os/dtb", "device tree"), ("os/loader", "firmware")]
    {
        let file = xml.text_at(path).unwrap_or_default();
        if !file.is_empty() && !host.exists(Path::new(&file)) {
            let remedy = format!("copy it to {file} on this host (firmware: install the package that has it)");
            found.push(refused(what, &format!("{file} is not on this host"), &remedy));
        }
    }
    let mut made: Vec<(String, String)> = Vec::new();
    for device in xml.find("devices").into_iter().flat_map(Element::elements) {
        let kind = device.attribute("type").unwrap_or_default();
        let name = device.name.as_str();
        if matches!(name, "serial" | "console" | "parallel" | "channel") {
            let path = device.attribute_at("source", "path").unwrap_or_default().to_owned();
            match (kind, device.attribute_at("source", "mode")) {
                ("file", _) | ("unix", Some("bind") | None) => made.push((name.to_owned(), path)),
                ("dev" | "pipe" | "unix", _) => needed(name, &path, host, found),
                _ => {}
            }
            let log = device.attribute_at("log", "file").unwrap_or_default().to_owned();
            made.push((format!("log of {name}"), log));
        } else if name == "rng" && device.attribute_at("backend", "model") == Some("random") {
            needed(name, &device.text_at("backend").unwrap_or_default(), host, found);
        }
    }
    for (what, path) in made {
        let directory = Path::new(&path).parent().filter(|_| !path.is_empty());
        if let Some(directory) = directory.filter(|d| !host.exists(d)) {
            let directory = directory.display();
            let fact = format!("the directory of {path} is not on this host");
            found.push(refused(
                &what,
                &fact,
                &format!("create {directory} with the owner it has on the protected host"),
            ));
        }
    }
}

fn needed(what: &str, path: &str, host: &dyn Host, found: &mut Vec<Finding>) {
    if !path.is_empty() && !host.exists(Path::new(path)) {
        found.push(refused(
            what,
            &format!("{path} is not on this host"),
            "create it, or remove the device from the guest",
        ));
    }
}

/// libvirt labels the files it knows of; the RAM image reaches QEMU on its command line, where libvirt does not look.
fn check_confinement(host: &dyn Host, found: &mut Vec<Finding>) -> Result<(), Error> {
    let capabilities = host.capabilities()?;
    for model in capabilities.find_all("host/secmodel/model") {
        let remedy = match model.text().as_str() {
            "apparmor" => "allow it in /etc/apparmor.d/local/abstractions/libvirt-qemu: `STATE_DIR/** r,`",
            "selinux" => "label it: `semanage fcontext -a -t svirt_image_t 'STATE_DIR(/.*)?'` and restorecon",
            _ => continue,
        };
        let fact = format!("{} confines QEMU and does not know of the RAM image in the state directory", model.text());
        found.push(warning("confinement", &fact, remedy));
    }
    Ok(())
}

/// The user and group that QEMU runs as here (`<secmodel>` dac of the capabilities), if libvirt says so.
pub fn qemu_owner(capabilities: &Element, virt_type: &str) -> Option<(u32, u32)> {
    let models = capabilities.find_all("host/secmodel");
    let dac = models.into_iter().find(|m| m.text_at("model").as_deref() == Some("dac"))?;
    let labels = dac.find_all("baselabel");
    let label = labels.iter().find(|l| l.attribute("type") == Some(virt_type)).or(labels.first())?;
    parse_owner(&label.text())
}

/// The user and group that a definition demands for its QEMU (`<seclabel type='static' model='dac'>`).
pub fn demanded_owner(xml: &Element) -> Option<(u32, u32)> {
    let labels = xml.find_all("seclabel");
    let dac =
        labels.into_iter().find(|l| l.attribute("model") == Some("dac") && l.attribute("type") == Some("static"))?;
    parse_owner(&dac.text_at("label")?)
}

fn parse_owner(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.split_once(':')?;
    let number = |s: &str| s.trim().strip_prefix('+').unwrap_or(s.trim()).parse().ok();
    Some((number(user)?, number(group)?))
}

#[cfg(test)]
mod tests;
