//! What is refused, and states to bytes and back, with guests that never run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmdr_kvm_log::{Bitmap, BitmapLog, DirtyLog, GuestState, LogError, PAGE_BYTES, RingLog, Slot, StateError};

fn guest(irqchip: bool) -> (Kvm, Arc<VmFd>) {
    let kvm = Kvm::new().unwrap();
    let vm = Arc::new(kvm.create_vm().unwrap());
    if irqchip {
        vm.create_irq_chip().unwrap();
    }
    (kvm, vm)
}

/// A slot over memory that is never unmapped.
fn slot(number: u32, guest_address: u64, pages: u64) -> Slot {
    let bytes = pages * PAGE_BYTES;
    let memory = vec![0u8; (bytes + PAGE_BYTES) as usize].leak();
    let host_address = (memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
    Slot { number, guest_address, bytes, host_address, read_only: false }
}

fn vcpu(kvm: &Kvm, vm: &VmFd, change: impl FnOnce(&mut Vec<kvm_cpuid_entry2>)) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
    change(&mut cpuid);
    vcpu.set_cpuid2(&CpuId::from_entries(&cpuid).unwrap()).unwrap();
    vcpu
}

fn without_nested(cpuid: &mut Vec<kvm_cpuid_entry2>) {
    for leaf in cpuid {
        match leaf.function {
            1 => leaf.ecx &= !(1 << 5),
            0x8000_0001 => leaf.ecx &= !(1 << 2),
            _ => {}
        }
    }
}

#[test]
fn rings_of_a_wrong_size_or_too_late_are_refused() {
    let (_, vm) = guest(false);
    for entries in [0, 512, 1025, 1 << 30] {
        let error = RingLog::enable(vm.clone(), entries).unwrap_err();
        assert!(matches!(error, LogError::RingEntries { entries: e, .. } if e == entries), "{error}");
    }
    let mut ring = RingLog::enable(vm.clone(), 1024).unwrap();
    // SAFETY: nothing is set.
    let error = unsafe { ring.begin(vec![slot(0, 0, 1)]) }.unwrap_err();
    assert!(matches!(error, LogError::NoVcpu), "{error}");

    let (_, vm) = guest(false);
    let _vcpu = vm.create_vcpu(0).unwrap();
    let error = RingLog::enable(vm, 1024).unwrap_err();
    assert!(matches!(error, LogError::Kvm { call: "enable KVM_CAP_DIRTY_LOG_RING", .. }), "{error}");
}

#[test]
fn slots_that_are_not_whole_pages_are_refused() {
    let (_, vm) = guest(false);
    let good = slot(3, 0, 4);
    for bad in [
        vec![Slot { bytes: 0, ..good }],
        vec![Slot { bytes: 100, ..good }],
        vec![Slot { guest_address: 7, ..good }],
        vec![Slot { host_address: good.host_address + 1, ..good }],
        vec![good, Slot { guest_address: 1 << 20, ..good }],
    ] {
        // SAFETY: it is refused before anything is set.
        let error = unsafe { BitmapLog::begin(vm.clone(), bad) }.unwrap_err();
        assert!(matches!(error, LogError::Slot(3)), "{error}");
    }
}

#[test]
fn a_guest_with_rings_has_no_bitmap_and_sets_must_fit() {
    let (_, vm) = guest(false);
    let mut ring = RingLog::enable(vm.clone(), 1024).unwrap();
    ring.add_vcpu(&vm.create_vcpu(0).unwrap()).unwrap();
    let slots = vec![slot(0, 0, 100), slot(1, 1 << 20, 5)];
    // SAFETY: the memory is never unmapped.
    unsafe { ring.begin(slots.clone()) }.unwrap();
    let mut sets = ring.sets();
    assert_eq!(sets.iter().map(Bitmap::len).collect::<Vec<_>>(), [100, 5]);
    ring.collect(&mut sets).unwrap();
    assert!(matches!(ring.collect(&mut sets[..1]).unwrap_err(), LogError::Shape));
    sets[1] = Bitmap::new(6);
    assert!(matches!(ring.collect(&mut sets).unwrap_err(), LogError::Shape));
    // SAFETY: the same memory.
    let refused = unsafe { BitmapLog::begin(vm.clone(), slots) }.and_then(|mut log| {
        let mut sets = log.sets();
        log.collect(&mut sets)
    });
    assert!(matches!(refused.unwrap_err(), LogError::Kvm { .. }));
    ring.end().unwrap();
}

#[test]
fn a_log_that_has_ended_can_begin_again() {
    let (_, vm) = guest(false);
    let slots = vec![slot(0, 0, 130)];
    for _ in 0..2 {
        // SAFETY: the memory is never unmapped.
        let mut log = unsafe { BitmapLog::begin(vm.clone(), slots.clone()) }.unwrap();
        let mut sets = log.sets();
        log.collect(&mut sets).unwrap();
        assert_eq!(sets[0].count(), 0);
        log.end();
    }
}

#[test]
fn a_state_survives_its_bytes_and_another_guest() {
    for irqchip in [false, true] {
        let (kvm, vm) = guest(irqchip);
        let vcpu0 = vcpu(&kvm, &vm, without_nested);
        let mut regs = vcpu0.get_regs().unwrap();
        regs.r15 = 0x1122_3344_5566_7788;
        vcpu0.set_regs(&regs).unwrap();
        let saved = GuestState::save(&kvm, &vm, &[&vcpu0]).unwrap();
        assert_eq!(saved.irqchips.len(), if irqchip { 3 } else { 0 });
        let bytes = saved.to_bytes();
        let read = GuestState::from_bytes(&bytes).unwrap();
        assert_eq!(read.to_bytes(), bytes);

        let (_, other) = guest(irqchip);
        let vcpu1 = other.create_vcpu(0).unwrap();
        read.restore(&other, &[&vcpu1]).unwrap();
        assert_eq!(vcpu1.get_regs().unwrap(), regs);

        let error = read.restore(&other, &[]).unwrap_err();
        assert!(matches!(error, StateError::Vcpus { saved: 1, there: 0 }), "{error}");
        let (_, other) = guest(!irqchip);
        let vcpu1 = other.create_vcpu(0).unwrap();
        let error = read.restore(&other, &[&vcpu1]).unwrap_err();
        assert!(matches!(error, StateError::Irqchip { saved } if saved == irqchip), "{error}");

        for length in 0..bytes.len() {
            let error = GuestState::from_bytes(&bytes[..length]).unwrap_err();
            assert!(matches!(error, StateError::Format(_)), "{length} of {} bytes: {error}", bytes.len());
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(GuestState::from_bytes(&longer).unwrap_err(), StateError::Format(_)));
    }
}

#[test]
fn a_guest_that_may_nest_is_refused() {
    let (kvm, vm) = guest(false);
    // KVM lets a VMM offer what it likes.
    let vcpu =
        vcpu(&kvm, &vm, |cpuid| cpuid.iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.ecx |= 1 << 5));
    let error = GuestState::save(&kvm, &vm, &[&vcpu]).unwrap_err();
    assert!(matches!(error, StateError::Nested), "{error}");
}
