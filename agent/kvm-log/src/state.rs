//! What a guest is besides its memory: vCPUs, KVM's interrupt controllers, timer and clock; to bytes and back.
//!
//! # Format, version 1
//! All numbers little-endian. `version u32`, `vcpus u32`, `sections u32`, then so many sections: `kind u16, index u16` (of a vCPU, or of an
//! interrupt controller), `length u32`, and as many bytes: KVM's structure of x86-64, or an array of it, as
//! `KVM_GET_*` gives it.

use std::collections::BTreeMap;
use std::io;

use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// vCPUs that a state may have.
const VCPUS_MAX: u32 = 4096;
const VERSION: u32 = 1;
/// Sections that each vCPU has; a local APIC is one more.
const VCPU_SECTIONS: usize = 10;
/// MSRs whose value is relative to another's: set when that one is.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `KVM_CAP_XSAVE2`: bytes that a vCPU's XSAVE area takes.
const XSAVE_BYTES: i32 = size_of::<kvm_xsave>() as i32;

const KIND_REGS: u16 = 1;
const KIND_SREGS: u16 = 2;
const KIND_XSAVE: u16 = 3;
const KIND_XCRS: u16 = 4;
const KIND_MSRS: u16 = 5;
const KIND_EVENTS: u16 = 6;
const KIND_DEBUG_REGS: u16 = 7;
const KIND_MP_STATE: u16 = 8;
const KIND_LAPIC: u16 = 9;
const KIND_CPUID: u16 = 10;
const KIND_TSC_KHZ: u16 = 11;
const KIND_IRQCHIP: u16 = 32;
const KIND_PIT: u16 = 33;
const KIND_CLOCK: u16 = 34;

/// Why a state could not be saved, restored or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The guest may use nested virtualization, whose state is not saved.
    #[error("the guest's CPUID offers VMX or SVM: nested virtualization is not saved, take it out of the CPUID")]
    Nested,
    /// The XSAVE area is longer than KVM_GET_XSAVE gives (AMX was asked for).
    #[error("the guest's XSAVE area has {0} bytes, 4096 are supported: do not ask for AMX")]
    Xsave(i32),
    /// The guest to be restored has another number of vCPUs.
    #[error("the state has {saved} vCPUs, the guest has {there}")]
    Vcpus {
        /// In the state.
        saved: usize,
        /// In the guest.
        there: usize,
    },
    /// One has KVM's local APIC and the other not.
    #[error("the state was saved {} KVM's interrupt controllers, the guest was made {}", with(*.saved), with(!*.saved))]
    Irqchip {
        /// Whether the state has them.
        saved: bool,
    },
    /// An MSR cannot be set to what it was. This host's KVM, or its processor, is another.
    #[error("MSR {index:#x} cannot be set to {value:#x}, which it was")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The bytes are not a state of this version.
    #[error("the state is damaged or of another version: {0}")]
    Format(&'static str),
    /// KVM refused a call.
    #[error("{call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn with(there: bool) -> &'static str {
    if there { "with" } else { "without" }
}

type Result<T> = std::result::Result<T, StateError>;

fn kvm(call: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> StateError {
    move |error| StateError::Kvm { call, source: io::Error::from_raw_os_error(error.errno()) }
}

/// One vCPU, in KVM's structures.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct VcpuState {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: Box<kvm_xsave>,
    pub xcrs: kvm_xcrs,
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
    pub debug_regs: kvm_debugregs,
    pub mp_state: kvm_mp_state,
    /// Where KVM has the local APIC.
    pub lapic: Option<Box<kvm_lapic_state>>,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub tsc_khz: u32,
}

/// All of a guest but its memory and the devices that the VMM emulates.
#[derive(Debug, Default)]
pub struct GuestState {
    /// The vCPUs in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// Both PICs and the I/O APIC, or none, where KVM does not have them.
    pub irqchips: Vec<kvm_irqchip>,
    /// The timer, where KVM has it.
    pub pit: Option<kvm_pit_state2>,
    /// The paravirtual clock.
    pub clock: Option<kvm_clock_data>,
}

impl GuestState {
    /// Saves it. All vCPUs are out of `KVM_RUN` and have no exit open: after an exit for I/O KVM finishes the instruction in the
    /// next `KVM_RUN`, which has to come first, with `immediate_exit` set.
    pub fn save(host: &Kvm, vm: &VmFd, vcpus: &[&VcpuFd]) -> Result<Self> {
        check_xsave(vm)?;
        let indices = host.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let vcpus = vcpus.iter().map(|vcpu| VcpuState::save(vcpu, indices.as_slice())).collect::<Result<_>>()?;
        let mut state = Self { vcpus, ..Self::default() };
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            if there(vm.get_irqchip(&mut chip), "KVM_GET_IRQCHIP")?.is_some() {
                state.irqchips.push(chip);
            }
        }
        state.pit = there(vm.get_pit2(), "KVM_GET_PIT2")?;
        state.clock = Some(vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?);
        Ok(state)
    }

    /// Makes a guest that state. Its memory is restored already, its vCPUs and KVM's devices are made and have not run.
    /// After an error the guest is of no use.
    pub fn restore(&self, vm: &VmFd, vcpus: &[&VcpuFd]) -> Result<()> {
        check_xsave(vm)?;
        if self.vcpus.len() != vcpus.len() {
            return Err(StateError::Vcpus { saved: self.vcpus.len(), there: vcpus.len() });
        }
        let mut any = kvm_irqchip::default();
        let has_irqchip = there(vm.get_irqchip(&mut any), "KVM_GET_IRQCHIP")?.is_some();
        if has_irqchip == self.irqchips.is_empty() {
            return Err(StateError::Irqchip { saved: !has_irqchip });
        }
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu)?;
        }
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(kvm("KVM_SET_PIT2"))?;
        }
        if let Some(clock) = &self.clock {
            // The guest's clock goes on where it stood: without the flag that would add the time since.
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
        }
        Ok(())
    }

    /// The state as bytes, see the [module's](self) format.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Vec::new();
        let lapics = self.vcpus.iter().filter(|vcpu| vcpu.lapic.is_some()).count();
        let of_vcpus = self.vcpus.len() * VCPU_SECTIONS + lapics;
        let sections =
            of_vcpus + self.irqchips.len() + usize::from(self.pit.is_some()) + usize::from(self.clock.is_some());
        for number in [VERSION, self.vcpus.len() as u32, sections as u32] {
            to.extend_from_slice(&number.to_le_bytes());
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.write(index as u16, &mut to);
        }
        for (index, chip) in self.irqchips.iter().enumerate() {
            section(&mut to, KIND_IRQCHIP, index as u16, chip);
        }
        if let Some(pit) = &self.pit {
            section(&mut to, KIND_PIT, 0, pit);
        }
        if let Some(clock) = &self.clock {
            section(&mut to, KIND_CLOCK, 0, clock);
        }
        to
    }

    /// From bytes of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes;
        if take_u32(&mut rest)? != VERSION {
            return Err(StateError::Format("version"));
        }
        let vcpus = take_u32(&mut rest)?;
        if vcpus > VCPUS_MAX {
            return Err(StateError::Format("number of vCPUs"));
        }
        let count = take_u32(&mut rest)?;
        let mut sections = BTreeMap::new();
        for _ in 0..count {
            let head = take_u32(&mut rest)?;
            let length = take_u32(&mut rest)? as usize;
            let (body, after) = rest.split_at_checked(length).ok_or(StateError::Format("a section is cut short"))?;
            let key = (head as u16, (head >> 16) as u16);
            let known = matches!(key.0, KIND_REGS..=KIND_TSC_KHZ | KIND_IRQCHIP..=KIND_CLOCK);
            let in_range = key.0 >= KIND_IRQCHIP || u32::from(key.1) < vcpus;
            if !known || !in_range || sections.insert(key, body).is_some() {
                return Err(StateError::Format("a section is unknown or there twice"));
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(StateError::Format("bytes are left over"));
        }
        let sections = Sections(sections);
        let vcpus = (0..vcpus as u16).map(|index| VcpuState::read(&sections, index)).collect::<Result<_>>()?;
        let irqchips = (0..3).map_while(|index| sections.optional(KIND_IRQCHIP, index).transpose());
        Ok(Self {
            vcpus,
            irqchips: irqchips.collect::<Result<_>>()?,
            pit: sections.optional(KIND_PIT, 0)?,
            clock: sections.optional(KIND_CLOCK, 0)?,
        })
    }
}

impl VcpuState {
    fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Self> {
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_CPUID2"))?.as_slice().to_vec();
        let offers =
            |function, bit: u32| cpuid.iter().any(|leaf| leaf.function == function && leaf.ecx >> bit & 1 == 1);
        if offers(1, 5) || offers(0x8000_0001, 2) {
            return Err(StateError::Nested);
        }
        // First: it may change what the others say (a pending INIT or SIPI is taken).
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: there(vcpu.get_lapic(), "KVM_GET_LAPIC")?.map(Box::new),
            tsc_khz: vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?,
            msrs: save_msrs(vcpu, indices)?,
            events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
            cpuid,
        })
    }

    fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::Format("CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        if vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(kvm("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as much as the guest's XSAVE area has, which is no more than the structure (`check_xsave`).
        #[allow(unsafe_code)]
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        }
        // After the APIC, whose timer the deadline starts.
        restore_msrs(vcpu, &self.msrs)?;
        // Last: the calls above may raise or drop events.
        vcpu.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    fn write(&self, index: u16, to: &mut Vec<u8>) {
        section(to, KIND_REGS, index, &self.regs);
        section(to, KIND_SREGS, index, &self.sregs);
        section(to, KIND_XSAVE, index, &*self.xsave);
        section(to, KIND_XCRS, index, &self.xcrs);
        section(to, KIND_MSRS, index, self.msrs.as_slice());
        section(to, KIND_EVENTS, index, &self.events);
        section(to, KIND_DEBUG_REGS, index, &self.debug_regs);
        section(to, KIND_MP_STATE, index, &self.mp_state);
        if let Some(lapic) = &self.lapic {
            section(to, KIND_LAPIC, index, &**lapic);
        }
        section(to, KIND_CPUID, index, self.cpuid.as_slice());
        section(to, KIND_TSC_KHZ, index, &self.tsc_khz);
    }

    fn read(from: &Sections<'_>, index: u16) -> Result<Self> {
        Ok(Self {
            regs: from.one(KIND_REGS, index)?,
            sregs: from.one(KIND_SREGS, index)?,
            xsave: Box::new(from.one(KIND_XSAVE, index)?),
            xcrs: from.one(KIND_XCRS, index)?,
            msrs: from.many(KIND_MSRS, index)?,
            events: from.one(KIND_EVENTS, index)?,
            debug_regs: from.one(KIND_DEBUG_REGS, index)?,
            mp_state: from.one(KIND_MP_STATE, index)?,
            lapic: from.optional(KIND_LAPIC, index)?.map(Box::new),
            cpuid: from.many(KIND_CPUID, index)?,
            tsc_khz: from.one(KIND_TSC_KHZ, index)?,
        })
    }
}

/// All that can be read: some of the list exist only with features that this guest does not have.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut saved = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::Format("MSR list"))?;
        // KVM stops at the first that it does not read.
        let read = vcpu.get_msrs(&mut msrs).map_err(kvm("KVM_GET_MSRS"))?;
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        rest = &rest[(read + 1).min(rest.len())..];
    }
    saved.sort_by_key(|msr| (msr.index == MSR_TSC_DEADLINE, msr.index));
    Ok(saved)
}

/// Sets all. One that cannot be set is an error, unless it has that value anyway.
fn restore_msrs(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<()> {
    let mut rest = saved;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| StateError::Format("MSR list"))?;
        let set = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
        let Some(refused) = rest.get(set) else { break };
        let mut now = Msrs::from_entries(std::slice::from_ref(refused)).map_err(|_| StateError::Format("MSR list"))?;
        let read = vcpu.get_msrs(&mut now).map_err(kvm("KVM_GET_MSRS"))?;
        if read != 1 || now.as_slice()[0].data != refused.data {
            return Err(StateError::Msr { index: refused.index, value: refused.data });
        }
        rest = &rest[set + 1..];
    }
    Ok(())
}

/// `None` where KVM says that there is no such device.
fn there<T>(result: std::result::Result<T, vmm_sys_util::errno::Error>, call: &'static str) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.errno(), libc::ENXIO | libc::EINVAL) => Ok(None),
        Err(error) => Err(kvm(call)(error)),
    }
}

fn check_xsave(vm: &VmFd) -> Result<()> {
    let bytes = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
    if bytes > XSAVE_BYTES { Err(StateError::Xsave(bytes)) } else { Ok(()) }
}

fn section<T: IntoBytes + Immutable + ?Sized>(to: &mut Vec<u8>, kind: u16, index: u16, value: &T) {
    let bytes = value.as_bytes();
    to.extend_from_slice(&kind.to_le_bytes());
    to.extend_from_slice(&index.to_le_bytes());
    to.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    to.extend_from_slice(bytes);
}

/// By kind and index.
struct Sections<'a>(BTreeMap<(u16, u16), &'a [u8]>);

impl Sections<'_> {
    fn optional<T: FromBytes>(&self, kind: u16, index: u16) -> Result<Option<T>> {
        let Some(bytes) = self.0.get(&(kind, index)) else { return Ok(None) };
        T::read_from_bytes(bytes).map(Some).map_err(|_| StateError::Format("a section has another length"))
    }

    fn one<T: FromBytes>(&self, kind: u16, index: u16) -> Result<T> {
        self.optional(kind, index)?.ok_or(StateError::Format("a section is missing"))
    }

    fn many<T: FromBytes>(&self, kind: u16, index: u16) -> Result<Vec<T>> {
        let bytes = self.0.get(&(kind, index)).ok_or(StateError::Format("a section is missing"))?;
        let pieces = bytes.chunks(size_of::<T>());
        pieces.map(|piece| T::read_from_bytes(piece).map_err(|_| StateError::Format("an array is cut short"))).collect()
    }
}

fn take_u32(rest: &mut &[u8]) -> Result<u32> {
    let (first, after) = rest.split_first_chunk::<4>().ok_or(StateError::Format("it is cut short"))?;
    *rest = after;
    Ok(u32::from_le_bytes(*first))
}
