//! The guest: its KVM descriptors, and running it.
#![allow(unsafe_code)]

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;
use vmdr_kvm_log::{BitmapLog, EXIT_RING_FULL, GuestState, RingLog};

use crate::memory::slots;
use crate::program::{self, APIC_PRIORITY, AREA, CODE, FS, Model, PAGE_TABLES, PORT_APIC, PORT_BATCH, PORT_SSE, SEED};

/// A guest of one vCPU.
pub struct Guest {
    kvm: Kvm,
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
    irqchip: bool,
    /// The guest has asked for a number of writes and has no answer yet.
    asks: bool,
    /// What it told last.
    told: Told,
}

#[derive(Default)]
struct Told {
    sse: Option<u32>,
    priority: Option<u32>,
}

/// How a guest is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// With KVM's interrupt controllers and timer.
    pub irqchip: bool,
    /// With dirty rings of so many entries.
    pub ring_entries: Option<u32>,
}

impl Guest {
    /// A guest over this memory that has no state yet; its ring log, if it has rings.
    pub fn empty(memory: GuestMemoryMmap, options: Options) -> Result<(Self, Option<RingLog>)> {
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let vm = Arc::new(kvm.create_vm().context("make a guest")?);
        if options.irqchip {
            vm.create_irq_chip().context("make interrupt controllers")?;
            vm.create_pit2(kvm_pit_config::default()).context("make a timer")?;
        }
        let mut ring = options.ring_entries.map(|entries| RingLog::enable(vm.clone(), entries)).transpose()?;
        for slot in slots(&memory)? {
            let region = kvm_userspace_memory_region {
                slot: slot.number,
                flags: 0,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the memory is mapped as long as `memory`, which lives as long as the guest.
            unsafe { vm.set_user_memory_region(region) }.context("set a memory slot")?;
        }
        let vcpu = vm.create_vcpu(0).context("make a vCPU")?;
        if let Some(ring) = &mut ring {
            ring.add_vcpu(&vcpu)?;
        }
        let guest = Self { kvm, vm, vcpu, memory, irqchip: options.irqchip, asks: false, told: Told::default() };
        Ok((guest, ring))
    }

    /// A guest at the beginning of its program, with an area of `area_bytes`.
    pub fn new(memory: GuestMemoryMmap, area_bytes: u64, options: Options) -> Result<(Self, Option<RingLog>)> {
        program::load(&memory)?;
        let (guest, ring) = Self::empty(memory, options)?;
        let mut cpuid = guest.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        for leaf in cpuid.as_mut_slice() {
            match leaf.function {
                // No nested virtualization: VMX and SVM.
                1 => leaf.ecx &= !(1 << 5),
                0x8000_0001 => leaf.ecx &= !(1 << 2),
                _ => {}
            }
        }
        guest.vcpu.set_cpuid2(&cpuid).context("set CPUID")?;
        let mut sregs = guest.vcpu.get_sregs()?;
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 0x23,
            type_: 3,
            present: 1,
            dpl: 3,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { selector: 0x1b, type_: 11, l: 1, db: 0, ..data };
        (sregs.ds, sregs.es, sregs.ss, sregs.gs) = (data, data, data, data);
        sregs.fs = kvm_segment { base: FS, ..data };
        sregs.cr3 = PAGE_TABLES;
        // PAE and SSE; long mode, active; paging and protection.
        (sregs.cr4, sregs.efer, sregs.cr0) = (0x620, 0x500, 0x8000_0033);
        guest.vcpu.set_sregs(&sregs).context("set special registers")?;
        let regs = kvm_regs {
            rip: CODE,
            // With ring 3's permission to use ports.
            rflags: 0x3002,
            rsi: SEED.into(),
            rcx: program::shift(area_bytes).into(),
            r8: AREA,
            r11: if options.irqchip { APIC_PRIORITY } else { 0 },
            ..Default::default()
        };
        guest.vcpu.set_regs(&regs).context("set registers")?;
        Ok((guest, ring))
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The bitmap log of its memory.
    pub fn bitmap_log(&self) -> Result<BitmapLog> {
        // SAFETY: the memory is mapped as long as `self.memory`; nobody changes slots.
        Ok(unsafe { BitmapLog::begin(self.vm.clone(), slots(&self.memory)?) }?)
    }

    /// Begins the ring log of its memory.
    pub fn begin_ring(&self, ring: &mut RingLog) -> Result<()> {
        // SAFETY: the memory is mapped as long as `self.memory`.
        Ok(unsafe { ring.begin(slots(&self.memory)?) }?)
    }

    /// Has it do `writes` writes, at least one. `ring_full` makes room in its ring and is called each time there is none.
    pub fn batch(&mut self, writes: u32, ring_full: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        ensure!(writes > 0, "a batch of no writes");
        self.until_it_asks(0, ring_full)?;
        self.until_it_asks(writes, ring_full)
    }

    /// Runs until it asks for a batch, answering `writes` if it asks already.
    fn until_it_asks(&mut self, writes: u32, ring_full: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.asks && writes == 0 {
            return Ok(());
        }
        self.answer(writes);
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(PORT_BATCH, _)) => {
                    self.asks = true;
                    return Ok(());
                }
                Ok(VcpuExit::IoOut(PORT_SSE, data)) => self.told.sse = Some(word(data)?),
                Ok(VcpuExit::IoOut(PORT_APIC, data)) => self.told.priority = Some(word(data)?),
                Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => ring_full()?,
                Ok(other) => bail!("the guest stopped with {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error).context("run the guest"),
            }
        }
    }

    fn answer(&mut self, writes: u32) {
        if !std::mem::take(&mut self.asks) {
            return;
        }
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit was one for `in`, so `io` is the union's valid field, and the kernel has reserved that many bytes
        // in the mapping of `run` for the answer.
        unsafe {
            let offset = run.__bindgen_anon_1.io.data_offset as usize;
            (&raw mut *run).cast::<u8>().add(offset).cast::<u32>().write_unaligned(writes);
        }
    }

    /// Its state, all exits finished.
    pub fn save(&mut self) -> Result<GuestState> {
        // It then asks again.
        self.answer(0);
        self.vcpu.set_kvm_immediate_exit(1);
        let result = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        match result {
            Err(error) if error.errno() == libc::EINTR => {}
            other => bail!("the guest was to run nothing, and ended with {other:?}"),
        }
        Ok(GuestState::save(&self.kvm, &self.vm, &[&self.vcpu])?)
    }

    /// Makes it that state.
    pub fn restore(&mut self, state: &GuestState) -> Result<()> {
        Ok(state.restore(&self.vm, &[&self.vcpu])?)
    }

    /// How many writes it has done.
    pub fn writes(&self) -> Result<u32> {
        Ok(self.vcpu.get_regs()?.rdi as u32)
    }

    /// Fails unless its registers are what the model says; `before` is the model's priority before the last batch.
    pub fn check_registers(&self, model: &Model, before: u32) -> Result<()> {
        let regs = self.vcpu.get_regs()?;
        let there = (regs.rsi as u32, regs.rdi as u32, regs.rbp as u32);
        let expected = (model.random, model.writes, model.sum);
        ensure!(there == expected, "generator, writes and sum are {there:?}, not {expected:?}");
        ensure!(self.told.sse == Some(model.sse), "it told {:?} from SSE, not {}", self.told.sse, model.sse);
        let priority = self.irqchip.then_some(before);
        ensure!(self.told.priority == priority, "it told priority {:?}, not {priority:?}", self.told.priority);
        Ok(())
    }
}

fn word(data: &[u8]) -> Result<u32> {
    Ok(u32::from_le_bytes(data.try_into().ok().context("a port was not written with 4 bytes")?))
}
