//! The C functions of libvirt that the `virt` crate does not wrap: block jobs, monitor commands with descriptors, events.
//!
//! Pointers come from live `virt` objects, which hold a reference; strings are NUL-terminated here; what libvirt
//! allocates is freed here. Nothing else in this crate is unsafe.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

use crate::events::{BlockJobStatus, Disconnect, DomainEvent, Event, IoErrorAction, Lifecycle, Sink};

/// How far a block job is, as libvirt says it.
pub(crate) struct BlockJob {
    pub(crate) kind: i32,
    pub(crate) bandwidth: u64,
    pub(crate) current: u64,
    pub(crate) end: u64,
}

/// The bandwidth goes with the job, as typed parameter, in bytes per second; 0: no limit.
pub(crate) fn block_copy(
    domain: &Domain,
    disk: &CStr,
    destination: &CStr,
    bandwidth: u64,
    flags: u32,
) -> Result<(), Error> {
    let mut field: [c_char; 80] = [0; 80];
    for (slot, byte) in field.iter_mut().zip(sys::VIR_DOMAIN_BLOCK_COPY_BANDWIDTH.to_bytes()) {
        *slot = c_char::from_ne_bytes([*byte]);
    }
    let value = sys::_virTypedParameterValue { ul: bandwidth };
    let mut parameter = sys::_virTypedParameter { field, type_: sys::VIR_TYPED_PARAM_ULLONG as c_int, value };
    let count = if bandwidth == 0 { 0 } else { 1 };
    // SAFETY: the domain is live, both strings are NUL-terminated, `parameter` outlives the call and is its only element.
    let done = unsafe {
        sys::virDomainBlockCopy(domain.as_ptr(), disk.as_ptr(), destination.as_ptr(), &raw mut parameter, count, flags)
    };
    check(done)
}

/// `None`: there is no job.
pub(crate) fn block_job_info(domain: &Domain, disk: &CStr) -> Result<Option<BlockJob>, Error> {
    let mut info = sys::_virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES;
    // SAFETY: the domain is live, the name NUL-terminated, `info` a whole structure that is written to.
    let found = unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, flags) };
    check(found)?;
    let job = || BlockJob { kind: info.type_, bandwidth: info.bandwidth, current: info.cur, end: info.end };
    Ok((found > 0).then(job))
}

pub(crate) fn block_job_abort(domain: &Domain, disk: &CStr, flags: u32) -> Result<(), Error> {
    // SAFETY: the domain is live, the name NUL-terminated.
    check(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) })
}

/// A monitor command, with descriptors that QEMU receives along with it.
pub(crate) fn monitor_command(
    domain: &Domain,
    command: &CStr,
    files: &[BorrowedFd<'_>],
    flags: u32,
) -> Result<String, Error> {
    let mut result: *mut c_char = ptr::null_mut();
    let done = if files.is_empty() {
        // SAFETY: the domain is live, the command NUL-terminated, `result` a place for one pointer.
        unsafe { sys::virDomainQemuMonitorCommand(domain.as_ptr(), command.as_ptr(), &raw mut result, flags) }
    } else {
        let mut descriptors: Vec<c_int> = files.iter().map(AsRawFd::as_raw_fd).collect();
        // A handful: `descriptors` cannot have more elements than there are descriptors in a process.
        let count = descriptors.len() as c_uint;
        // SAFETY: as above; the descriptors are borrowed, so open, and the array outlives the call. No descriptors are
        // asked for in return (libvirt allows null for both).
        unsafe {
            sys::virDomainQemuMonitorCommandWithFiles(
                domain.as_ptr(),
                command.as_ptr(),
                count,
                descriptors.as_mut_ptr(),
                ptr::null_mut(),
                ptr::null_mut(),
                &raw mut result,
                flags,
            )
        }
    };
    check(done)?;
    // SAFETY: on success libvirt has stored a string, or nothing, that now is ours.
    Ok(unsafe { take_string(result) })
}

type GenericFn = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type LifecycleFn = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type DeviceFn = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
type IoErrorFn = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);
type BlockJobFn = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, c_int, c_int, *mut c_void);

/// libvirt takes callbacks of every signature as the generic one and calls them by event id (its VIR_DOMAIN_EVENT_CALLBACK).
macro_rules! erase {
    ($function:ident, $signature:ty) => {
        // SAFETY: both are pointers to C functions; libvirt casts back to the signature of the event id before it calls.
        Some(unsafe { std::mem::transmute::<$signature, GenericFn>($function as $signature) })
    };
}

/// Registers one kind of event for all domains; returns what [`unregister`] takes.
pub(crate) fn register(connect: &Connect, id: u32, sink: &Sink) -> Result<i32, Error> {
    let callback = match id {
        sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE => erase!(on_lifecycle, LifecycleFn),
        sys::VIR_DOMAIN_EVENT_ID_REBOOT => Some(on_reboot as GenericFn),
        sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON => erase!(on_io_error, IoErrorFn),
        sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED => erase!(on_device_added, DeviceFn),
        sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED => erase!(on_device_removed, DeviceFn),
        sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2 => erase!(on_block_job, BlockJobFn),
        _ => None,
    };
    let opaque = Box::into_raw(Box::new(sink.clone())).cast::<c_void>();
    // SAFETY: the connection is live. `opaque` is a boxed Sink that libvirt gives back to `free_sink` exactly once when it
    // accepted the registration. Each callback has the signature that libvirt calls for its event id.
    let number = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connect.as_ptr(),
            ptr::null_mut(),
            id as c_int,
            callback,
            opaque,
            Some(free_sink),
        )
    };
    if number < 0 {
        let error = Error::last_error();
        // SAFETY: libvirt does not keep `opaque` where it refuses, so that it is still ours.
        unsafe { free_sink(opaque) };
        return Err(error);
    }
    Ok(number)
}

pub(crate) fn unregister(connect: &Connect, number: i32) -> Result<(), Error> {
    // SAFETY: the connection is live; a number that is not registered is an error, not undefined.
    check(unsafe { sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), number) })
}

/// Reports the end of the connection; libvirt takes one such callback per connection.
pub(crate) fn register_close(connect: &Connect, sink: &Sink) -> Result<(), Error> {
    let opaque = Box::into_raw(Box::new(sink.clone())).cast::<c_void>();
    // SAFETY: as in `register`.
    let done =
        unsafe { sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), opaque, Some(free_sink)) };
    if done < 0 {
        let error = Error::last_error();
        // SAFETY: libvirt does not keep `opaque` where it refuses.
        unsafe { free_sink(opaque) };
        return Err(error);
    }
    Ok(())
}

pub(crate) fn unregister_close(connect: &Connect) -> Result<(), Error> {
    // SAFETY: the connection is live; a callback that is not registered is an error, not undefined.
    check(unsafe { sys::virConnectUnregisterCloseCallback(connect.as_ptr(), Some(on_close)) })
}

/// Silences libvirt's habit of printing every error to stderr; errors are returned, and logged where they are handled.
pub(crate) fn silence_errors() {
    // SAFETY: a callback without state, that does nothing with what it is given.
    unsafe { sys::virSetErrorFunc(ptr::null_mut(), Some(ignore)) };
}

unsafe extern "C" fn ignore(_data: *mut c_void, _error: sys::virErrorPtr) {}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: `opaque` is the Box<Sink> of a registration, handed back once.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}

/// # Safety
/// `domain` is valid during the call, `opaque` a Sink registered above.
unsafe fn deliver(domain: sys::virDomainPtr, opaque: *mut c_void, event: DomainEvent) {
    // SAFETY: the Sink lives until libvirt calls `free_sink`, which it does after the last callback.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    let mut uuid = [0u8; 16];
    // SAFETY: the domain is valid, the array has the 16 bytes (VIR_UUID_BUFLEN) that are written.
    if unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) } < 0 {
        return sink.lose();
    }
    // SAFETY: the name belongs to the domain, which is valid during the call; it is copied.
    let name = unsafe { copy_string(sys::virDomainGetName(domain)) };
    sink.deliver(Event::Domain { uuid: uuid::Uuid::from_bytes(uuid), name, event });
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let event = DomainEvent::Lifecycle { change: Lifecycle::from_raw(event), detail };
    // SAFETY: libvirt calls with a valid domain and the registration's `opaque`.
    unsafe { deliver(domain, opaque, event) };
    0
}

unsafe extern "C" fn on_reboot(_connect: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, DomainEvent::Rebooted) };
}

unsafe extern "C" fn on_io_error(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    path: *const c_char,
    alias: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: strings are null or valid during the call; they are copied.
    let (path, alias, reason) = unsafe { (copy_string(path), copy_string(alias), copy_string(reason)) };
    let event = DomainEvent::IoError { path, alias, reason, action: IoErrorAction::from_raw(action) };
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, event) };
}

unsafe extern "C" fn on_device_added(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_io_error`.
    unsafe { deliver(domain, opaque, DomainEvent::DeviceAdded { alias: copy_string(alias) }) };
}

unsafe extern "C" fn on_device_removed(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_io_error`.
    unsafe { deliver(domain, opaque, DomainEvent::DeviceRemoved { alias: copy_string(alias) }) };
}

unsafe extern "C" fn on_block_job(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_io_error`.
    let disk = unsafe { copy_string(disk) };
    let event = DomainEvent::BlockJob { disk, status: BlockJobStatus::from_raw(status) };
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, event) };
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: as in `deliver`.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    sink.deliver(Event::Disconnected(Disconnect::from_raw(reason)));
}

/// An error, with what is lacking in its message, if QEMU here cannot give a guest this CPU.
pub(crate) fn compare_hypervisor_cpu(
    connect: &Connect,
    emulator: Option<&CStr>,
    arch: &CStr,
    machine: &CStr,
    virt_type: &CStr,
    cpu: &CStr,
) -> Result<(), Error> {
    let emulator = emulator.map_or(ptr::null(), CStr::as_ptr);
    let flags = sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE;
    // SAFETY: the connection is live; the strings are NUL-terminated and outlive the call; libvirt allows a null emulator.
    let result = unsafe {
        sys::virConnectCompareHypervisorCPU(
            connect.as_ptr(),
            emulator,
            arch.as_ptr(),
            machine.as_ptr(),
            virt_type.as_ptr(),
            cpu.as_ptr(),
            flags,
        )
    };
    check(result)
}

fn check(result: c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// # Safety
/// `text` is null or a NUL-terminated string.
unsafe fn copy_string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the function's contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// # Safety
/// `text` is null or a NUL-terminated string from malloc, that nobody else uses.
unsafe fn take_string(text: *mut c_char) -> String {
    // SAFETY: by the function's contract; free takes null.
    unsafe {
        let copy = copy_string(text);
        libc::free(text.cast());
        copy
    }
}
