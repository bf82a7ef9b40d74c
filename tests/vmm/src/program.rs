//! The guest's program, and the model of what it does.
//!
//! 64-bit code in ring 3, identity-mapped, without interrupts. In ring 3 so that it runs on the processor, not in KVM's
//! emulator, wherever this test machine is a guest itself without nested virtualization.
//!
//! It asks port [`PORT_BATCH`] for a number and does as many writes: each of the write's number (from 1), 4 bytes, to a place
//! that a linear congruential generator says. Each fourth write it also reads another place. After the batch it tells what it
//! has in an SSE register ([`PORT_SSE`]) and in the local APIC ([`PORT_APIC`], where there is one), and asks again.
#![allow(unsafe_code)]

use anyhow::{Result, ensure};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmdr_bitmap::Bitmap;

use crate::memory::Kind;

/// Bytes of memory from address 0, with program, page tables and a word that is read by way of the FS register.
pub const LOW_BYTES: u64 = 1 << 20;
/// Where the area that is written begins.
pub const AREA: u64 = 64 << 20;
/// The area may end there: so far memory is mapped.
pub const AREA_END: u64 = 1 << 30;
/// Where the program is.
pub const CODE: u64 = 0x1000;
/// Where FS points to; what is there is added to the sum in every batch.
pub const FS: u64 = 0x6000;
/// The word there.
pub const FS_WORD: u32 = 0x0bad_cafe;
/// The table of page tables (the levels below follow).
pub const PAGE_TABLES: u64 = 0x9000;
/// The local APIC's task priority register.
pub const APIC_PRIORITY: u64 = 0xfee0_0080;

/// The guest asks how many writes to do.
pub const PORT_BATCH: u16 = 0x10;
/// The sum of all writes' numbers, from an SSE register.
pub const PORT_SSE: u16 = 0x14;
/// The task priority that the batch before left in the local APIC.
pub const PORT_APIC: u16 = 0x18;

/// Where the generator begins.
pub const SEED: u32 = 0x1234_5678;
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;
const OTHER: u32 = 0x9e37_79b1;

// esi: generator; edi: number of writes; ebp: sum of what was read; r8: the area; cl: 32 - log2 of its bytes;
// r11: APIC_PRIORITY, or 0; xmm15: sum of the writes' numbers.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".globl vmdr_test_guest, vmdr_test_guest_end",
    "vmdr_test_guest:",
    ".code64",
    "2:  mov dx, 0x10",
    "    in eax, dx",
    "    mov r10d, eax",
    "    test r10d, r10d",
    "    jz 2b",
    "    add ebp, fs:[0]",
    "    test r11, r11",
    "    jz 3f",
    "    mov eax, [r11]",
    "    mov dx, 0x18",
    "    out dx, eax",
    "3:  imul esi, esi, 1664525",
    "    add esi, 1013904223",
    "    mov ebx, esi",
    "    shr ebx, cl",
    "    and ebx, -4",
    "    inc edi",
    "    mov [r8 + rbx], edi",
    "    test edi, 3",
    "    jnz 4f",
    "    imul eax, esi, 0x9e3779b1",
    "    shr eax, cl",
    "    and eax, -4",
    "    add ebp, [r8 + rax]",
    "4:  movd xmm14, edi",
    "    paddd xmm15, xmm14",
    "    dec r10d",
    "    jnz 3b",
    "    test r11, r11",
    "    jz 5f",
    "    mov eax, edi",
    "    and eax, 0xf0",
    "    mov [r11], eax",
    "5:  movd eax, xmm15",
    "    mov dx, 0x14",
    "    out dx, eax",
    "    jmp 2b",
    "vmdr_test_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static vmdr_test_guest: u8;
    static vmdr_test_guest_end: u8;
}

/// The program's bytes.
fn code() -> &'static [u8] {
    let (start, end) = (&raw const vmdr_test_guest, &raw const vmdr_test_guest_end);
    // SAFETY: both labels are of the block above, in this order, in memory that is never written.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Puts program and page tables into low memory.
pub fn load(memory: &GuestMemoryMmap) -> Result<()> {
    memory.write_slice(code(), GuestAddress(CODE))?;
    memory.write_obj(FS_WORD, GuestAddress(FS))?;
    // Present, writable, for ring 3; a page of 2 MiB.
    const TABLE: u64 = 7;
    const LARGE: u64 = 0x87;
    const CACHE_DISABLED: u64 = 0x18;
    let [first, fourth] = [PAGE_TABLES + 0x2000, PAGE_TABLES + 0x3000];
    memory.write_obj((PAGE_TABLES + 0x1000) | TABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(first | TABLE, GuestAddress(PAGE_TABLES + 0x1000))?;
    memory.write_obj(fourth | TABLE, GuestAddress(PAGE_TABLES + 0x1000 + 3 * 8))?;
    for large in 0..AREA_END >> 21 {
        memory.write_obj(large << 21 | LARGE, GuestAddress(first + large * 8))?;
    }
    let apic = APIC_PRIORITY >> 21 << 21;
    memory.write_obj(apic | LARGE | CACHE_DISABLED, GuestAddress(fourth + (apic >> 21 & 511) * 8))?;
    Ok(())
}

/// What the guest has done, and what memory and registers must therefore be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    area: Vec<u32>,
    shift: u32,
    /// The generator.
    pub random: u32,
    /// Writes so far.
    pub writes: u32,
    /// Sum of what was read.
    pub sum: u32,
    /// Sum of the writes' numbers.
    pub sse: u32,
}

impl Model {
    /// A guest that has not run, with an area of `bytes`, a power of two, and of this kind.
    pub fn new(kind: Kind, bytes: u64) -> Result<Self> {
        ensure!(bytes.is_power_of_two() && AREA + bytes <= AREA_END, "an area of {bytes} bytes");
        let area = (0..bytes).step_by(4).map(|at| kind.initial(at)).collect();
        Ok(Self { area, shift: shift(bytes), random: SEED, writes: 0, sum: 0, sse: 0 })
    }

    /// Does a batch; the pages of the area that it writes are added to `written`, those that it reads to `read`.
    pub fn batch(&mut self, writes: u32, written: &mut Bitmap, read: &mut Bitmap) {
        self.sum = self.sum.wrapping_add(FS_WORD);
        for _ in 0..writes {
            self.random = self.random.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
            let place = (self.random >> self.shift) / 4;
            self.writes += 1;
            self.area[place as usize] = self.writes;
            written.insert(u64::from(place) / 1024, 1);
            if self.writes.is_multiple_of(4) {
                let other = (self.random.wrapping_mul(OTHER) >> self.shift) / 4;
                self.sum = self.sum.wrapping_add(self.area[other as usize]);
                read.insert(u64::from(other) / 1024, 1);
            }
            self.sse = self.sse.wrapping_add(self.writes);
        }
    }

    /// What the task priority is after the batches so far.
    pub fn priority(&self) -> u32 {
        self.writes & 0xf0
    }

    /// Fails unless the area is what the guest must have made of it.
    pub fn check_memory(&self, memory: &GuestMemoryMmap) -> Result<()> {
        let there = area(memory, self.area.len() as u64 * 4)?;
        let wrong = there.iter().zip(&self.area).position(|(there, model)| there != model);
        if let Some(at) = wrong {
            let (there, model) = (there[at], self.area[at]);
            anyhow::bail!("after {} writes, byte {:#x} of the area has {there}, not {model}", self.writes, at * 4);
        }
        Ok(())
    }
}

/// How far the generator's word is shifted right to be an offset in the area.
pub fn shift(bytes: u64) -> u32 {
    32 - bytes.trailing_zeros()
}

fn area(memory: &GuestMemoryMmap, bytes: u64) -> Result<Vec<u32>> {
    let mut raw = vec![0; bytes as usize];
    memory.read_slice(&mut raw, GuestAddress(AREA))?;
    Ok(raw.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}
