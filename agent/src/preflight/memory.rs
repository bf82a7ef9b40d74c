//! How the guest's memory is made, and whether the dirty log sees everything that happens to it; what its machine is.
//!
//! A discard by QEMU (balloon, free page reporting) of a page of anonymous memory is reported as a write. In shared memory,
//! huge pages and private files it is not: the page silently becomes zero, or what the file has. So a balloon and such
//! memory together are refused.
//!
//! UEFI variables are carried because QEMU keeps the flash they lie in as a RAM block, whose content is that of the file byte
//! for byte: each write of the guest's goes to both at once. The receiver writes a file from that block.

use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;

use super::host::mib;
use super::{Finding, HostFacts};

/// Judges memory, NUMA and firmware of a definition.
pub fn memory(domain: &DomainXml, host: &HostFacts, arena_bytes: u64) -> Vec<Finding> {
    let mut findings = Vec::new();
    let backing = &domain.memory_backing;
    let shared = backing.shared
        || domain.numa_cells.iter().any(|c| c.access.as_deref() == Some("shared"))
        || domain.devices_of("memory").any(|d| d.element.attribute("access") == Some("shared"));
    let huge = backing.hugepages || domain.devices_of("memory").any(|d| d.element.find("source/pagesize").is_some());
    let anonymous = !shared && !huge && matches!(backing.source.as_deref(), None | Some("anonymous"));
    let kind = match (huge, backing.source.as_deref()) {
        (true, _) => "huge pages",
        (false, Some("memfd")) => "memfd",
        (false, Some("file")) => "files",
        (false, _) => "anonymous memory",
    };
    let access = if shared { "shared " } else { "" };
    let mut fact = format!("{} of {access}{kind}", mib(domain.memory_bytes));
    if domain.numa_cells.len() > 1 {
        fact = format!("{fact} in {} NUMA cells", domain.numa_cells.len());
    }
    findings.push(Finding::ok("memory", fact));
    let balloon = domain.devices_of("memballoon").find(|d| d.model != "none");
    if let (false, Some(balloon)) = (anonymous, balloon) {
        let what = balloon_says(&balloon.element);
        findings.push(Finding::refused(
            "memory",
            format!("a balloon{what} in {access}{kind}: pages that it gives back change without being reported"),
            "use <memballoon model='none'/>, or anonymous memory (no <memoryBacking>)",
        ));
    }
    if !anonymous && let Err(e) = &host.dirty_log_shared {
        findings.push(Finding::refused(
            "memory",
            format!("this kernel does not report written pages of {access}{kind} ({e})"),
            "remove <memoryBacking> from the domain, or boot a kernel >= 6.7",
        ));
    }
    if host.memory_available_bytes < arena_bytes {
        findings.push(Finding::refused(
            "memory for checkpoints",
            format!("{} available, {} needed", mib(host.memory_available_bytes), mib(arena_bytes)),
            "free memory on this host, or lower the arena in /etc/vmdr/agent.toml",
        ));
    }
    findings
}

fn balloon_says(balloon: &Element) -> &'static str {
    match (balloon.attribute("freePageReporting"), balloon.attribute("autodeflate")) {
        (Some("on"), _) => " with free page reporting",
        (_, Some("on")) => " with autodeflate",
        _ => "",
    }
}

/// Judges what the machine is: architecture, machine type, firmware, confidential computing.
pub fn machine(domain: &DomainXml, root: &Element, host: &HostFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    match domain.virt_type.as_str() {
        "kvm" => match &host.kvm {
            Ok(_) => findings.push(Finding::ok("type", "kvm")),
            Err(e) => findings.push(Finding::refused(
                "type",
                format!("kvm, but /dev/kvm cannot be used here ({e})"),
                "load kvm_intel or kvm_amd",
            )),
        },
        "qemu" => findings.push(Finding::ok("type", "qemu (TCG)")),
        other => findings.push(Finding::refused(
            "type",
            format!("a domain of type {other}"),
            "vmdr protects domains of type kvm and qemu",
        )),
    }
    if domain.arch != "x86_64" {
        findings.push(Finding::refused(
            "architecture",
            format!("the guest is {}", domain.arch),
            "vmdr protects x86_64 guests",
        ));
    }
    let machine = &domain.machine;
    let known = ["pc-i440fx-", "pc-q35-"].iter().any(|p| machine.starts_with(p)) || machine == "pc" || machine == "q35";
    findings.push(if known {
        Finding::ok("machine type", machine.clone())
    } else {
        Finding::refused(
            "machine type",
            format!("{machine} is not on the list"),
            "use a machine type pc-i440fx-* or pc-q35-* (virsh edit; the guest sees new hardware)",
        )
    });
    if let Some(kind) = &domain.launch_security {
        findings.push(Finding::refused(
            "launchSecurity",
            format!("{kind}: the guest's memory is encrypted with a key that never leaves this host's CPU"),
            "remove <launchSecurity>, or do not protect the domain",
        ));
    }
    findings.extend(variables(domain));
    let texts = ["os/kernel", "os/initrd", "os/dtb", "os/shim", "os/loader", "os/acpi/table"];
    let texts = texts.into_iter().flat_map(|path| root.find_all(path)).map(Element::text);
    let entries = root.find_all("sysinfo/entry").into_iter().filter_map(|e| e.attribute("file")).map(str::to_owned);
    let files: Vec<String> = texts.chain(entries).filter(|f| !f.is_empty()).collect();
    if !files.is_empty() {
        findings.push(Finding::warning(
            "files",
            format!("QEMU reads {} of this host", files.join(" and ")),
            "have the same files at the same place at the backup site: without them QEMU does not start there",
        ));
    }
    findings
}

/// Whether the UEFI variables, if there are any, can be carried.
fn variables(domain: &DomainXml) -> Option<Finding> {
    let subject = "UEFI variables";
    let firmware = &domain.firmware;
    if firmware.loader_writable {
        return Some(Finding::refused(
            subject,
            "the firmware is writable: code and variables are in one file, which is not carried",
            "use a firmware whose variables are in a file of their own (<os firmware='efi'>), or a stateless one",
        ));
    }
    let file = firmware.nvram.as_deref()?;
    Some(match firmware.nvram_format.as_deref() {
        None | Some("raw") => Finding::ok(subject, format!("{file} is carried with the guest's memory")),
        Some(format) => Finding::refused(
            subject,
            format!("{file} is of format {format}: only raw files of variables are carried"),
            "convert it (qemu-img convert -O raw), name it in <nvram format='raw'>, and start the guest anew",
        ),
    })
}

/// Arguments for QEMU that libvirt does not understand: each may be anything.
pub fn arguments(domain: &DomainXml) -> Vec<Finding> {
    let mut findings = Vec::new();
    let own = domain.qmp_socket.as_ref().map(|s| format!("unix:{}", s.display()));
    let mut arguments = domain.qemu_arguments.iter().peekable();
    while let Some(argument) = arguments.next() {
        let socket = arguments.peek().map(|a| a.split(',').next().unwrap_or_default());
        if argument == "-qmp" && own.is_some() && socket == own.as_deref() {
            arguments.next();
            continue;
        }
        findings.push(Finding::warning(
            "qemu:commandline",
            format!("the definition passes {argument:?} to QEMU, which libvirt knows nothing of"),
            "make sure that it works at the backup site too",
        ));
    }
    findings
}
