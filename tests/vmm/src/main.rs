//! Two roles in processes of their own: `source` runs the guest and streams epochs to its standard output, `standby` takes them
//! from its standard input and, when that ends, goes on where the last whole one was cut.

use std::io::{self, BufReader, BufWriter};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmdr_kvm_log::{Bitmap, BitmapLog, DirtyLog, LogError, Reader, RingLog, Slot, Source, VcpuState, Writer};
use vmdr_test_vmm::guest::{Guest, Options};
use vmdr_test_vmm::memory::{self, Kind};
use vmdr_test_vmm::program::{AREA, Model};

/// Encoded bytes of an epoch that the standby takes.
const EPOCH_BYTES_MAX: u64 = 1 << 30;
/// Pages of a part of the first copy.
const PART_PAGES: u64 = 2048;
/// MSRs that go by themselves: the time stamp counter, and what counts with it.
const MOVING_MSRS: [u32; 3] = [0x10, 0xe7, 0xe8];

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Runs a guest and streams its epochs, until somebody ends it.
    Source(SourceOptions),
    /// Takes epochs; when there are no more, resumes the guest, has it go on, and checks what it did.
    Standby {
        /// Batches to go on for.
        #[arg(long, default_value_t = 20)]
        batches: u32,
    },
}

#[derive(Args)]
struct SourceOptions {
    /// KVM's dirty log.
    #[arg(long, value_enum)]
    log: LogKind,
    /// What the guest's memory is made of.
    #[arg(long, value_enum, default_value_t = Kind::Anonymous)]
    memory: Kind,
    /// MiB that the guest writes, a power of two.
    #[arg(long, default_value_t = 32)]
    area_mib: u64,
    /// With KVM's interrupt controllers.
    #[arg(long)]
    irqchip: bool,
    /// Milliseconds from an epoch to the next.
    #[arg(long, default_value_t = 20)]
    interval: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogKind {
    Bitmap,
    Ring,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Source(options) => source(&options),
        Role::Standby { batches } => standby(batches),
    };
    if let Err(error) = done {
        eprintln!("vmdr-test-vmm: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Either of KVM's logs.
enum Log {
    Bitmap(BitmapLog),
    Ring(RingLog),
}

impl DirtyLog for Log {
    fn slots(&self) -> &[Slot] {
        match self {
            Self::Bitmap(log) => log.slots(),
            Self::Ring(log) => log.slots(),
        }
    }

    fn collect(&mut self, into: &mut [Bitmap]) -> Result<(), LogError> {
        match self {
            Self::Bitmap(log) => log.collect(into),
            Self::Ring(log) => log.collect(into),
        }
    }
}

impl Log {
    fn drain(&mut self) -> Result<()> {
        match self {
            Self::Bitmap(_) => anyhow::bail!("a guest without rings has a full ring"),
            Self::Ring(log) => Ok(log.drain()?),
        }
    }
}

/// Writes of a batch, by its number.
fn batch_writes(number: u32) -> u32 {
    1 + number.wrapping_mul(7919) % 1000
}

fn source(options: &SourceOptions) -> Result<()> {
    let area_bytes = options.area_mib << 20;
    let memory = memory::memory(options.memory, area_bytes)?;
    // A small ring, which is often full.
    let ring_entries = (options.log == LogKind::Ring).then_some(1024);
    let (guest, ring) = Guest::new(memory.clone(), area_bytes, Options { irqchip: options.irqchip, ring_entries })?;
    let log = match ring {
        None => Log::Bitmap(guest.bitmap_log()?),
        Some(mut ring) => {
            guest.begin_ring(&mut ring)?;
            Log::Ring(ring)
        }
    };
    let (source, guest) = (Mutex::new(Source::new(log, memory)?), Mutex::new(guest));
    // The guest's thread leaves the lock to the other one as long as the first is set, and ends with the second.
    let (wanted, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let run = || -> Result<()> {
        for number in 0.. {
            while wanted.load(Ordering::Acquire) {
                thread::sleep(Duration::from_micros(50));
            }
            if ended.load(Ordering::Acquire) {
                break;
            }
            lock(&guest)?.batch(batch_writes(number), &mut || lock(&source)?.log().drain())?;
        }
        Ok(())
    };
    let stream = |vcpu: &thread::ScopedJoinHandle<'_, Result<()>>| -> Result<()> {
        let mut writer = Writer::new(BufWriter::new(io::stdout().lock()))?;
        // All of memory once while the guest runs, then what was written meanwhile.
        for _ in 0..area_bytes / 4096 / PART_PAGES {
            let part = lock(&source)?.part(PART_PAGES)?;
            writer.part(&part)?;
        }
        while !vcpu.is_finished() {
            wanted.store(true, Ordering::Release);
            let part = {
                let mut guest = lock(&guest)?;
                let state = guest.save()?;
                lock(&source)?.cut(&state)?
            };
            wanted.store(false, Ordering::Release);
            writer.part(&part)?;
            eprintln!("epoch {} {} pages", part.epoch(), part.pages());
            thread::sleep(Duration::from_millis(options.interval));
        }
        Ok(())
    };
    thread::scope(|scope| {
        let vcpu = scope.spawn(run);
        let streamed = stream(&vcpu);
        wanted.store(false, Ordering::Release);
        ended.store(true, Ordering::Release);
        vcpu.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))??;
        streamed
    })
}

fn lock<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| anyhow::anyhow!("another thread panicked"))
}

fn standby(batches: u32) -> Result<()> {
    let mut reader = Reader::new(BufReader::new(io::stdin().lock()), EPOCH_BYTES_MAX);
    let mut memory: Option<GuestMemoryMmap> = None;
    let mut last = None;
    while let Some(epoch) = reader.epoch()? {
        let into = match &mut memory {
            Some(memory) => memory,
            None => {
                let ranges: Vec<_> = epoch.slots.iter().map(|&(at, n)| (GuestAddress(at), n as usize)).collect();
                memory.insert(GuestMemoryMmap::from_ranges(&ranges)?)
            }
        };
        epoch.apply(into)?;
        last = Some((epoch.number, epoch.slots, epoch.state));
    }
    let (Some(memory), Some((number, slots, state))) = (memory, last) else { anyhow::bail!("no whole epoch came") };
    let area = slots.iter().find(|slot| slot.0 == AREA).context("the guest has no area to write")?;

    let options = Options { irqchip: !state.irqchips.is_empty(), ring_entries: None };
    let (mut guest, _) = Guest::empty(memory, options)?;
    guest.restore(&state)?;
    let again = guest.save()?;
    same(&state.vcpus[0], &again.vcpus[0]).context("the state that was restored")?;

    let resumed = guest.writes()?;
    let mut model = Model::new(Kind::Anonymous, area.1)?;
    // Which pages it touches does not matter here.
    let (mut written, mut read) = (Bitmap::new(0), Bitmap::new(0));
    let mut batch = 0;
    while model.writes < resumed {
        model.batch(batch_writes(batch), &mut written, &mut read);
        batch += 1;
    }
    ensure!(model.writes == resumed, "the guest did {resumed} writes, which is in the middle of a batch");
    model.check_memory(guest.memory()).context("memory before the guest ran")?;
    for _ in 0..batches {
        let before = model.priority();
        model.batch(batch_writes(batch), &mut written, &mut read);
        guest.batch(batch_writes(batch), &mut || anyhow::bail!("a guest without rings has a full ring"))?;
        batch += 1;
        guest.check_registers(&model, before)?;
    }
    model.check_memory(guest.memory()).context("memory after the guest went on")?;
    println!("resumed epoch={number} torn={} writes={resumed} went_on_to={}", reader.torn(), guest.writes()?);
    Ok(())
}

/// Fails unless a vCPU is what it was, but for time.
fn same(saved: &VcpuState, now: &VcpuState) -> Result<()> {
    ensure!(saved.regs == now.regs, "registers: {:x?}, now {:x?}", saved.regs, now.regs);
    ensure!(saved.sregs == now.sregs, "special registers: {:x?}, now {:x?}", saved.sregs, now.sregs);
    ensure!(saved.xsave.region == now.xsave.region, "XSAVE area");
    ensure!(saved.xcrs == now.xcrs, "XCRs: {:x?}, now {:x?}", saved.xcrs, now.xcrs);
    ensure!(saved.debug_regs == now.debug_regs, "debug registers");
    ensure!(saved.mp_state == now.mp_state, "state of the processor: {:?}, now {:?}", saved.mp_state, now.mp_state);
    ensure!(saved.events == now.events, "events: {:x?}, now {:x?}", saved.events, now.events);
    ensure!(saved.cpuid == now.cpuid, "CPUID");
    ensure!(saved.tsc_khz == now.tsc_khz, "frequency of the time stamp counter");
    ensure!(saved.msrs.len() == now.msrs.len(), "{} MSRs, now {}", saved.msrs.len(), now.msrs.len());
    for (saved, now) in saved.msrs.iter().zip(&now.msrs).filter(|(msr, _)| !MOVING_MSRS.contains(&msr.index)) {
        ensure!(saved == now, "MSR {saved:x?}, now {now:x?}");
    }
    let registers = |vcpu: &VcpuState| vcpu.lapic.as_ref().map(|lapic| lapic.regs);
    ensure!(registers(saved) == registers(now), "local APIC");
    Ok(())
}
