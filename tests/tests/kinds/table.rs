//! The kinds of guests, one a line of thought: what each is made of, what it does, what happens to it.

use crate::act::Act;
use anyhow::{Context, Result, bail};
use std::fs;
use vmdr_tests::guest::{Bus, DiskShape, GuestSpec, Kind as System, Store};
use vmdr_tests::huge_pages::HugePages;
use vmdr_tests::oracle;
use vmdr_tests::rig::At;
use vmdr_tests::scene::Scene;

/// A kind of guest.
pub struct Kind {
    /// For `VMDR_KINDS`.
    pub name: &'static str,
    /// Makes the guest out of an ordinary one.
    pub make: fn(GuestSpec) -> GuestSpec,
    /// What happens in each round, over and over.
    pub acts: &'static [Act],
    /// Whether it needs huge pages.
    pub huge: bool,
    /// Fails if the guest is not what its kind says.
    pub expect: fn(&Scene) -> Result<()>,
    /// Whether it is lost and activated at the end.
    pub activate: bool,
    /// Further checks of the activated guest.
    pub after: fn(&Scene) -> Result<()>,
}

/// The load of most: memory, records and readers past the page cache.
const LOAD: &str =
    "--ram-mib 24 --pages 150 --interval-ms 20 --record-bytes 65536 --records 128 --readers 1 --reader-mib 2";
/// No device whose discards shared memory or huge pages would hide.
const NO_BALLOON: &str = "<memballoon model='none'/>";
const ORDINARY: Kind = Kind {
    name: "",
    make: |guest| guest.workload(LOAD),
    acts: &[Act::Nothing],
    huge: false,
    expect: |_| Ok(()),
    activate: false,
    after: |_| Ok(()),
};

/// All of them.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "vcpus",
        make: |guest| GuestSpec { vcpus: 2, ..guest.workload(LOAD) },
        acts: &[Act::Nothing, Act::Suspend],
        ..ORDINARY
    },
    Kind {
        name: "uefi",
        make: |guest| GuestSpec {
            uefi: true,
            ..guest.memory(192).workload("--ram-mib 16 --pages 100 --interval-ms 20 --variable")
        },
        activate: true,
        after: variables_are_the_flash,
        ..ORDINARY
    },
    Kind {
        name: "numa",
        make: |guest| {
            let cells = "<cpu mode='custom' match='exact' check='none'><model>qemu64</model><numa>\
                <cell id='0' cpus='0' memory='96' unit='MiB'/><cell id='1' cpus='1' memory='96' unit='MiB'/></numa></cpu>";
            GuestSpec { vcpus: 2, ..guest.memory(192).workload(LOAD).extra("", cells) }
        },
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "memfd",
        make: |guest| {
            let backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
            GuestSpec { balloon: NO_BALLOON, ..guest.workload(LOAD).extra("", backing) }
        },
        acts: &[Act::Nothing, Act::Reset],
        ..ORDINARY
    },
    Kind {
        name: "hugetlb",
        make: |guest| {
            let backing = "<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages><source type='memfd'/>\
                           <access mode='shared'/></memoryBacking>";
            GuestSpec { balloon: NO_BALLOON, ..guest.workload(LOAD).extra("", backing) }
        },
        huge: true,
        expect: |scene| HugePages::expect_used(scene.rig.site(At::A).qemu(&scene.guest.name)?),
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "thp",
        make: |guest| guest.memory(192).workload("--ram-mib 48 --pages 200 --interval-ms 20 --churn-mib 16"),
        expect: transparent_huge_pages,
        ..ORDINARY
    },
    Kind {
        name: "balloon",
        make: |guest| GuestSpec {
            balloon: "<memballoon model='virtio' autodeflate='on' freePageReporting='on'/>",
            kernel_words: "init_on_alloc=0 init_on_free=0".to_owned(),
            ..guest.memory(160).workload("--ram-mib 16 --pages 100 --interval-ms 20 --churn-mib 24")
        },
        acts: &[Act::Balloon, Act::Nothing, Act::Balloon],
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "chain",
        make: |guest| GuestSpec { disk_shapes: vec![DiskShape::in_store(Store::Chain)], ..guest.workload(LOAD) },
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "disks",
        make: |guest| GuestSpec {
            machine: "pc",
            disks_mib: vec![48, 24, 24],
            disk_shapes: [Bus::Virtio, Bus::Scsi, Bus::Ide].map(DiskShape::on).to_vec(),
            ..guest.workload(&format!("{LOAD} --scratch /dev/sda --scratch /dev/sdb"))
        },
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "trim",
        make: |guest| GuestSpec {
            disks_mib: vec![64, 24],
            disk_shapes: vec![DiskShape::on(Bus::Virtio); 2],
            ..guest.workload(&format!("{LOAD} --direct --scratch /dev/vdb"))
        },
        ..ORDINARY
    },
    Kind {
        name: "slow-fsync",
        make: |guest| GuestSpec { disk_shapes: vec![DiskShape::in_store(Store::Nbd)], ..guest.workload(LOAD) },
        ..ORDINARY
    },
    Kind { name: "reboot", acts: &[Act::Reset, Act::Reboot, Act::Nothing], ..ORDINARY },
    Kind { name: "suspend", acts: &[Act::Suspend], ..ORDINARY },
    Kind {
        name: "nic",
        make: |guest| GuestSpec { machine: "pc", kernel_words: "vmdr.hotplug=1".to_owned(), ..guest.workload(LOAD) },
        acts: &[Act::Nothing, Act::AttachNic, Act::Nothing],
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "dimm",
        make: |guest| {
            let room = "<maxMemory slots='2' unit='MiB'>1024</maxMemory>\
                <cpu mode='custom' match='exact' check='none'><model>qemu64</model><numa>\
                <cell id='0' cpus='0' memory='192' unit='MiB'/></numa></cpu>";
            // Room above 4 GiB makes the guest's kernel set bounce buffers of 64 MiB aside, unless told otherwise.
            let words = "memhp_default_state=online swiotlb=1024".to_owned();
            GuestSpec { kernel_words: words, ..guest.memory(192).workload(LOAD).extra("", room) }
        },
        acts: &[Act::Nothing, Act::AttachMemory, Act::Nothing, Act::Nothing],
        activate: true,
        ..ORDINARY
    },
    Kind {
        name: "kvm-memfd",
        make: |_| {
            let backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
            GuestSpec { balloon: NO_BALLOON, ..metal().extra("", backing) }
        },
        expect: kvm,
        ..ORDINARY
    },
    Kind {
        name: "kvm-hugetlb",
        make: |_| {
            let backing = "<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages><source type='memfd'/>\
                           </memoryBacking>";
            GuestSpec { balloon: NO_BALLOON, ..metal().extra("", backing) }
        },
        huge: true,
        expect: |scene| HugePages::expect_used(scene.rig.site(At::A).qemu(&scene.guest.name)?),
        ..ORDINARY
    },
];

/// Half of its memory is written a few times a second.
fn metal() -> GuestSpec {
    GuestSpec { kind: System::BareMetal { spins: 100, kvm: true }, ..GuestSpec::bare_metal("metal", true) }
}

fn kvm(scene: &Scene) -> Result<()> {
    let said = oracle::hmp(scene.rig.site(At::A), &scene.guest, "info kvm")?;
    if !said.contains("enabled") {
        bail!("QEMU says {said}");
    }
    Ok(())
}

/// The host has put the guest's memory into transparent huge pages.
fn transparent_huge_pages(scene: &Scene) -> Result<()> {
    let path = format!("/proc/{}/smaps_rollup", scene.rig.site(At::A).qemu(&scene.guest.name)?);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib: u64 = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("AnonHugePages")?;
    if kib < 32 << 10 {
        bail!(
            "only {kib} KiB of QEMU are in transparent huge pages (is {} never?)",
            "/sys/kernel/mm/transparent_hugepage"
        );
    }
    Ok(())
}

/// The activated guest's file of UEFI variables is its own, and what its flash holds.
fn variables_are_the_flash(scene: &Scene) -> Result<()> {
    let (site, guest) = (scene.rig.site(At::B), &scene.guest);
    oracle::pause(site, guest)?;
    let xml = site.virsh(&["dumpxml", &guest.name])?;
    let file = xml.split("</nvram>").next().and_then(|before| before.rsplit('>').next()).context("find <nvram>")?;
    let blocks = oracle::ram_blocks(site, guest)?;
    let flash = blocks.iter().find(|block| block.name == "system.flash1").context("find the flash")?;
    if fs::read(site.path(file)).with_context(|| format!("read {file}"))? != oracle::read_block(site, guest, flash)? {
        bail!("{file} is not what the flash holds");
    }
    if site.path(file) == site.path(guest.variables_path()) {
        bail!("{file} is where the protected host had it");
    }
    Ok(())
}
