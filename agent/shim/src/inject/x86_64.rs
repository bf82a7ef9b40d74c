//! One system call in a thread of another process, on x86-64: the only file that knows registers.
#![allow(unsafe_code)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the shim knows x86-64 only; another architecture needs a sibling of this file");

use std::fs;
use std::io;
use std::ptr;

use crate::procmem::ProcessMemory;

const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// Signals met while the thread is traced that are handed on before giving up.
const SIGNALS_MAX: usize = 1000;

/// Which stop of the tracee is waited for.
#[derive(PartialEq)]
enum Stop {
    /// PTRACE_INTERRUPT took effect.
    Interrupt,
    /// Entry or exit of a system call.
    Syscall,
}

/// Runs system call `number` in thread `tid` and returns what it returned there (negative: an errno).
///
/// The instruction is taken from the vDSO, which every process has. `orig_rax` of -1 keeps the kernel from
/// restarting the call that was interrupted before its registers are back; they are given back in a *signal* stop,
/// because only there does the kernel look at `orig_rax` and restart that call.
pub fn call(tid: i32, number: libc::c_long, arguments: [u64; 2]) -> io::Result<i64> {
    let instruction = find_syscall_instruction(tid)?;
    ptrace(libc::PTRACE_SEIZE, tid, libc::PTRACE_O_TRACESYSGOOD as usize)?;
    let result = traced_call(tid, instruction, number, arguments);
    let detached = ptrace(libc::PTRACE_DETACH, tid, 0);
    let value = result?;
    detached?;
    Ok(value)
}

fn traced_call(tid: i32, instruction: u64, number: libc::c_long, arguments: [u64; 2]) -> io::Result<i64> {
    ptrace(libc::PTRACE_INTERRUPT, tid, 0)?;
    wait(tid, Stop::Interrupt)?;
    let saved = registers(tid)?;
    let mut call = saved;
    call.rip = instruction;
    call.rax = number as u64;
    call.orig_rax = u64::MAX;
    call.rdi = arguments[0];
    call.rsi = arguments[1];
    set_registers(tid, &call)?;
    let value = (|| {
        ptrace(libc::PTRACE_SYSCALL, tid, 0)?;
        wait(tid, Stop::Syscall)?;
        ptrace(libc::PTRACE_SYSCALL, tid, 0)?;
        wait(tid, Stop::Syscall)?;
        let value = registers(tid)?.rax as i64;
        ptrace(libc::PTRACE_INTERRUPT, tid, 0)?;
        ptrace(libc::PTRACE_CONT, tid, 0)?;
        wait(tid, Stop::Interrupt)?;
        Ok(value)
    })();
    set_registers(tid, &saved)?;
    value
}

/// Waits for the stop that is wanted; a signal that arrives on the way is delivered to the thread.
fn wait(tid: i32, wanted: Stop) -> io::Result<()> {
    for _ in 0..SIGNALS_MAX {
        let mut status = 0;
        // SAFETY: the kernel writes one int.
        if unsafe { libc::waitpid(tid, &mut status, libc::__WALL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other("the thread ended while it was traced"));
        }
        let signal = libc::WSTOPSIG(status);
        let event_stop = status >> 16 == libc::PTRACE_EVENT_STOP;
        let syscall_stop = signal == libc::SIGTRAP | 0x80;
        let resume = if wanted == Stop::Syscall { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        if event_stop {
            if wanted == Stop::Interrupt {
                return Ok(());
            }
            ptrace(resume, tid, 0)?;
        } else if syscall_stop {
            if wanted == Stop::Syscall {
                return Ok(());
            }
            ptrace(resume, tid, 0)?;
        } else {
            ptrace(resume, tid, signal as usize)?;
        }
    }
    Err(io::Error::other("the thread is flooded with signals"))
}

fn registers(tid: i32) -> io::Result<libc::user_regs_struct> {
    // SAFETY: user_regs_struct is plain integers, for which zero is a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one user_regs_struct through the data pointer.
    let result =
        unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, ptr::null_mut::<libc::c_void>(), &mut registers as *mut _) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(registers) }
}

fn set_registers(tid: i32, registers: &libc::user_regs_struct) -> io::Result<()> {
    // SAFETY: the kernel reads one user_regs_struct through the data pointer.
    let result =
        unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, ptr::null_mut::<libc::c_void>(), registers as *const _) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn ptrace(request: libc::c_uint, tid: i32, data: usize) -> io::Result<()> {
    // SAFETY: requests used with this function take an integer, never a pointer into our memory.
    let result = unsafe { libc::ptrace(request, tid, ptr::null_mut::<libc::c_void>(), data as *mut libc::c_void) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The address of a `syscall` instruction in the vDSO of `pid`.
fn find_syscall_instruction(pid: i32) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let range = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| line.split(' ').next());
    let bounds = range
        .and_then(|range| range.split_once('-'))
        .and_then(|(start, end)| Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?)));
    let (start, end) = bounds.ok_or_else(|| io::Error::other("the process has no vDSO"))?;
    let mut code = vec![0; (end - start) as usize];
    ProcessMemory::new(pid).read([(start, end - start)], &mut code)?;
    let at = code.windows(2).position(|bytes| bytes == SYSCALL_INSTRUCTION);
    at.map(|at| start + at as u64).ok_or_else(|| io::Error::other("no syscall instruction in the vDSO"))
}
