//! Which of the checkpoint's RAM blocks is the guest's main memory, and how it comes into the restored guest; which one is
//! the flash with its UEFI variables.
//!
//! One block holds all of an ordinary guest's memory: it is mapped from the RAM image, so that activation takes no longer
//! for a large guest than for a small one. A guest with NUMA cells or memory devices has several, which QEMU does not take
//! from `memory-backend`: all its memory goes through the stream, which is slower (about a second per GiB) and right.

use vmdr_codec::{Layout, RamBlock};
use vmdr_hypervisor::domain_xml::DomainXml;

use super::xml::RAM_BACKEND;
use crate::store::RamImage;

/// Names under which QEMU has the memory of a guest with one backend: as libvirt starts it, with the path that machine types
/// before 4.0 use, and after an earlier activation.
const MAIN_NAMES: [&str; 4] = ["pc.ram", "/objects/pc.ram", RAM_BACKEND, "/objects/vmdr-ram"];

/// The flash with the UEFI variables, as QEMU names it on every machine type that vmdr protects. Its content is the file's.
const VARIABLES_NAME: &str = "system.flash1";

/// How main memory comes into the restored guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// This block (an index) is mapped from its image.
    Mapped(usize),
    /// There is none: the guest had shut down, and boots from its disks.
    Off,
    /// Everything goes through the stream.
    Carried {
        /// Why, for the operator.
        reason: String,
    },
}

/// Why the checkpoint's memory does not fit the definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// QEMU would refuse it.
    #[error(
        "the recovery point has {image_bytes} bytes of memory in block {block:?}, but the domain XML says {xml_bytes} bytes: \
         they are not of the same guest"
    )]
    Size {
        /// The block.
        block: String,
        /// Its size.
        image_bytes: u64,
        /// What the definition says.
        xml_bytes: u64,
    },
    /// A guest with UEFI variables, but no flash that holds them.
    #[error("the domain XML names a file of UEFI variables, but the recovery point has no RAM block {VARIABLES_NAME}")]
    NoVariables,
}

/// The block (an index) with the guest's UEFI variables, if it has any.
pub fn variables(xml: &DomainXml, blocks: &[RamImage]) -> Result<Option<usize>, MemoryError> {
    if xml.firmware.nvram.is_none() {
        return Ok(None);
    }
    blocks.iter().position(|b| b.name == VARIABLES_NAME).map(Some).ok_or(MemoryError::NoVariables)
}

/// Whether this is a guest that has shut down: of its RAM only flash is there (`Layout::is_off`).
fn is_off(blocks: &[RamImage]) -> bool {
    let block = |block: &RamImage| RamBlock {
        name: block.name.clone(),
        used_bytes: block.used_bytes,
        page_bytes: block.page_bytes,
    };
    Layout { ram: blocks.iter().map(block).collect(), ..Layout::default() }.is_off()
}

/// Decides how the memory of this guest is restored.
pub fn choose(xml: &DomainXml, blocks: &[RamImage]) -> Result<Memory, MemoryError> {
    if is_off(blocks) {
        return Ok(Memory::Off);
    }
    if !xml.numa_cells.is_empty() {
        let count = xml.numa_cells.len();
        return Ok(Memory::Carried { reason: format!("the guest has NUMA cells ({count})") });
    }
    if xml.devices_of("memory").next().is_some() {
        return Ok(Memory::Carried { reason: "the guest has memory devices".to_owned() });
    }
    let named = MAIN_NAMES.iter().find_map(|name| blocks.iter().position(|b| b.name == *name));
    let Some(main) = named else {
        let names = blocks.iter().map(|b| b.name.as_str()).collect::<Vec<_>>().join(", ");
        return Ok(Memory::Carried { reason: format!("none of its RAM blocks is known as main memory ({names})") });
    };
    let block = &blocks[main];
    if block.used_bytes != xml.memory_bytes {
        return Err(MemoryError::Size {
            block: block.name.clone(),
            image_bytes: block.used_bytes,
            xml_bytes: xml.memory_bytes,
        });
    }
    Ok(Memory::Mapped(main))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, used_bytes: u64) -> RamImage {
        RamImage { name: name.to_owned(), used_bytes, page_bytes: 4096, path: name.into() }
    }

    fn xml(extra: &str) -> DomainXml {
        DomainXml::parse(&format!(
            "<domain type='kvm'><name>a</name><uuid>22222222-1111-4111-8111-111111111111</uuid><memory unit='KiB'>4096</memory>\
             <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>{extra}</domain>"
        ))
        .unwrap()
    }

    #[test]
    fn one_backend_is_mapped_whatever_it_is_called() {
        for name in MAIN_NAMES {
            let blocks = [block("pc.bios", 4096), block(name, 4 << 20), block("vga.vram", 16 << 20)];
            assert_eq!(choose(&xml(""), &blocks), Ok(Memory::Mapped(1)), "{name}");
        }
    }

    #[test]
    fn several_backends_are_carried() {
        let blocks = [block("ram-node0", 2 << 20), block("ram-node1", 2 << 20)];
        let numa = "<cpu><numa><cell id='0' memory='2048'/><cell id='1' memory='2048'/></numa></cpu>";
        for (xml, what) in [
            (xml(numa), "NUMA cells (2)"),
            (xml("<devices><memory model='dimm'/></devices>"), "memory devices"),
            (xml(""), "ram-node0, ram-node1"),
        ] {
            match choose(&xml, &blocks) {
                Ok(Memory::Carried { reason }) => assert!(reason.contains(what), "{reason}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn memory_of_another_guest_is_refused() {
        let error = choose(&xml(""), &[block("pc.ram", 8 << 20)]).unwrap_err();
        assert!(error.to_string().contains("8388608") && error.to_string().contains("4194304"), "{error}");
        assert_eq!(choose(&xml(""), &[]), Ok(Memory::Off));
        assert_eq!(choose(&xml(""), &[block("system.flash1", 4096)]), Ok(Memory::Off));
    }

    #[test]
    fn variables_are_in_the_second_flash() {
        let blocks = [block("pc.ram", 4 << 20), block("system.flash0", 4096), block("system.flash1", 4096)];
        let mut uefi = xml("");
        assert_eq!(variables(&uefi, &blocks), Ok(None));
        uefi.firmware.nvram = Some("/var/lib/libvirt/qemu/nvram/a_VARS.fd".to_owned());
        assert_eq!(variables(&uefi, &blocks), Ok(Some(2)));
        assert_eq!(variables(&uefi, &blocks[..2]), Err(MemoryError::NoVariables));
    }
}
