//! The dirty logs against each other and against the truth: the same guest, the same memory, at the same time.
//!
//! For each kind of pages two guests, one logged by KVM's bitmap and one by its rings, and both by the log that vmdr's shim
//! uses (userfaultfd and PAGEMAP_SCAN) over the same mapping. After each batch of the guest's writes:
//! - KVM's log has exactly the pages of 4 KiB that the model of the guest wrote, and none that it only read, but for hugetlb:
//!   there it may have those that were read in a page of 2 MiB that was written. (Where the host's page table lets a page be
//!   written, KVM maps it so for a read, too, and reports it at once. The shim's log keeps the host's pages protected until the
//!   first write, which for hugetlb is the first to any of the 512.)
//! - the shim's has exactly the same, rounded to the pages that the host's page table keeps: 2 MiB for hugetlb, where one
//!   bit stands for all of it. (A transparent huge page is split by the first write to it, so that there it is 4 KiB.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vm_memory::GuestMemoryMmap;
use vmdr_kvm_log::{Bitmap, DirtyLog, LogError, PAGE_BYTES, RingLog, Slot};
use vmdr_shim::dirty_log::{self, Run};
use vmdr_shim::ramblock::RamBlock;
use vmdr_shim::uffd::{USERFAULTFD_FLAGS, Uffd};
use vmdr_test_vmm::guest::{Guest, Options};
use vmdr_test_vmm::memory::{self, Kind, anonymous_huge_bytes, slots};
use vmdr_test_vmm::program::Model;
use vmdr_tests::huge_pages::HugePages;

/// What the guest writes at random: with five kinds of pages and two logs of KVM's, a million under each of these.
const WRITES: u32 = 200_000;
const AREA_BYTES: u64 = 32 << 20;
const LARGEST_BATCH: u32 = 20_000;
/// Less than the largest batch has pages: the guest stops with a full ring.
const RING_ENTRIES: u32 = 1024;

/// The shim's dirty log of this very process.
struct ShimLog {
    log: dirty_log::DirtyLog,
    slots: Vec<Slot>,
}

impl ShimLog {
    fn begin(memory: &GuestMemoryMmap, page_bytes: u64) -> Self {
        // The shim takes the userfaultfd that it finds in a process, so that nothing has to be injected here. One for all tests
        // of the process, open until its end.
        static UFFD: OnceLock<Uffd> = OnceLock::new();
        UFFD.get_or_init(|| {
            // SAFETY: the system call takes one integer and returns a descriptor or an error.
            let number = unsafe { libc::syscall(libc::SYS_userfaultfd, USERFAULTFD_FLAGS) };
            assert!(number >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
            // SAFETY: the descriptor was just made and is nobody else's.
            Uffd::handshake(unsafe { OwnedFd::from_raw_fd(number as i32) }).unwrap()
        });
        let pid = std::process::id() as i32;
        let (mut log, _) = dirty_log::DirtyLog::open(pid, Path::new("/nonexistent")).unwrap();
        let slots = slots(memory).unwrap();
        let block = |slot: &Slot| RamBlock {
            name: format!("slot{}", slot.number),
            page_bytes: if slot.number == 1 { page_bytes } else { PAGE_BYTES },
            used_bytes: slot.bytes,
            host_address: slot.host_address,
        };
        let blocks: Vec<_> = slots.iter().map(block).collect();
        log.follow(&blocks, &mut Vec::new()).unwrap();
        Self { log, slots }
    }
}

impl DirtyLog for ShimLog {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn collect(&mut self, into: &mut [Bitmap]) -> Result<(), LogError> {
        let mut runs: Vec<Run> = Vec::new();
        self.log.scan(&mut runs).map_err(|error| LogError::Other(error.into()))?;
        let protected = self.log.protect(&mut runs);
        for run in &runs {
            into[run.block].insert(run.first, run.pages);
        }
        protected.map_err(|error| LogError::Other(error.into()))
    }
}

impl Drop for ShimLog {
    fn drop(&mut self) {
        self.log.unwatch();
    }
}

/// What looking at the logs took, and how many pages were found.
#[derive(Default)]
struct Cost {
    kvm: Duration,
    shim: Duration,
    copy: Duration,
    pages: u64,
}

/// One guest; `ring`: with KVM's ring instead of its bitmap.
fn compare(kind: Kind, ring: bool) {
    let seed: u64 = rand::rng().random();
    let what = format!("{kind:?}, {}, seed {seed}", if ring { "ring" } else { "bitmap" });
    let mut random = StdRng::seed_from_u64(seed);
    let memory = memory::memory(kind, AREA_BYTES).unwrap();
    let options = Options { irqchip: false, ring_entries: ring.then_some(RING_ENTRIES) };
    let (mut guest, mut ring) = Guest::new(memory.clone(), AREA_BYTES, options).unwrap();
    let mut shim = ShimLog::begin(&memory, kind.page_bytes());
    let mut bitmap = None;
    match &mut ring {
        Some(ring) => guest.begin_ring(ring).unwrap(),
        None => bitmap = Some(guest.bitmap_log().unwrap()),
    }
    let mut model = Model::new(kind, AREA_BYTES).unwrap();
    let mut cost = Cost::default();
    let (mut batches, mut full, mut huge_seen) = (0, 0, 0);
    while model.writes < WRITES {
        if kind == Kind::TransparentHuge {
            let huge = anonymous_huge_bytes(slots(&memory).unwrap()[1].host_address, AREA_BYTES).unwrap();
            huge_seen += u32::from(huge > 0);
        }
        // As many small batches as large ones.
        let most = 1 << random.random_range(0..=LARGEST_BATCH.ilog2());
        let writes = random.random_range(1..=most).min(WRITES - model.writes);
        let before = model.priority();
        let mut truth = Bitmap::new(AREA_BYTES / PAGE_BYTES);
        let mut read = truth.clone();
        model.batch(writes, &mut truth, &mut read);
        let mut drain = || -> anyhow::Result<()> {
            full += 1;
            Ok(ring.as_mut().map_or(Ok(()), RingLog::drain)?)
        };
        guest.batch(writes, &mut drain).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        guest.check_registers(&model, before).unwrap_or_else(|error| panic!("{what}: {error:#}"));

        let kvm: &mut dyn DirtyLog = match (&mut ring, &mut bitmap) {
            (Some(ring), _) => ring,
            (_, Some(bitmap)) => bitmap,
            _ => unreachable!("one of both is there"),
        };
        let (mut by_kvm, mut by_shim) = (kvm.sets(), shim.sets());
        let begun = Instant::now();
        kvm.collect(&mut by_kvm).unwrap();
        cost.kvm += begun.elapsed();
        let begun = Instant::now();
        shim.collect(&mut by_shim).unwrap();
        cost.shim += begun.elapsed();
        cost.pages += truth.count();

        let rounded = rounded(&truth, kind.page_bytes() / PAGE_BYTES);
        let only_read = |page: &u64| read.contains(*page) && rounded.contains(*page) && !truth.contains(*page);
        (0..truth.len()).filter(only_read).for_each(|page| by_kvm[1].remove(page, 1));
        expect_same(&by_kvm[1], &truth, &format!("{what}: batch {batches} of {writes}: KVM's log and the truth"));
        expect_same(
            &by_shim[1],
            &rounded,
            &format!("{what}: batch {batches} of {writes}: the shim's log and the truth"),
        );
        // Program and page tables: KVM sets their accessed bits, which the model does not tell.
        expect_same(&by_shim[0], &by_kvm[0], &format!("{what}: batch {batches}: low memory, the shim's log and KVM's"));
        cost.copy += copy(&memory, &truth);
        batches += 1;
    }
    model.check_memory(&memory).unwrap_or_else(|error| panic!("{what}: {error:#}"));
    // Nothing was written since.
    let mut after = shim.sets();
    shim.collect(&mut after).unwrap();
    match (&mut ring, &mut bitmap) {
        (Some(ring), _) => ring.collect(&mut after).unwrap(),
        (_, Some(bitmap)) => bitmap.collect(&mut after).unwrap(),
        _ => unreachable!("one of both is there"),
    }
    assert!(after.iter().all(|set| set.count() == 0), "{what}: pages are reported that nobody wrote");
    if ring.is_some() {
        assert!(full > 0, "{what}: the ring was never full");
    }
    if kind == Kind::TransparentHuge {
        assert!(huge_seen > 0, "{what}: no huge page was left when the guest began to write");
    }
    let ratio = |time: Duration| time.as_secs_f64() / cost.copy.as_secs_f64();
    println!(
        "{what}: {} writes in {batches} batches, {} pages, ring full {full} times; looking took, as a multiple of copying the \
         pages: KVM {:.2}, shim {:.2}",
        model.writes,
        cost.pages,
        ratio(cost.kvm),
        ratio(cost.shim)
    );
}

/// Copies the pages, as the floor to compare with.
fn copy(memory: &GuestMemoryMmap, pages: &Bitmap) -> Duration {
    use vm_memory::{Bytes, GuestAddress};
    let mut into = vec![1; (pages.count() * PAGE_BYTES) as usize];
    let mut rest = into.as_mut_slice();
    let begun = Instant::now();
    for (first, count) in pages.runs() {
        let (run, after) = rest.split_at_mut((count * PAGE_BYTES) as usize);
        memory.read_slice(run, GuestAddress(vmdr_test_vmm::program::AREA + first * PAGE_BYTES)).unwrap();
        rest = after;
    }
    begun.elapsed()
}

/// The set, in which a page stands for all pages of its larger one.
fn rounded(set: &Bitmap, pages: u64) -> Bitmap {
    let mut rounded = Bitmap::new(set.len());
    for (first, count) in set.runs() {
        let start = first / pages * pages;
        rounded.insert(start, (first + count).next_multiple_of(pages) - start);
    }
    rounded
}

#[track_caller]
fn expect_same(there: &Bitmap, expected: &Bitmap, what: &str) {
    if there == expected {
        return;
    }
    let only =
        |a: &Bitmap, b: &Bitmap| (0..a.len()).filter(|&page| a.contains(page) && !b.contains(page)).collect::<Vec<_>>();
    let (more, missing) = (only(there, expected), only(expected, there));
    panic!(
        "{what}: {} pages only in the first: {more:?}; {} only in the second: {missing:?}",
        more.len(),
        missing.len()
    );
}

#[test]
fn anonymous_memory() {
    compare(Kind::Anonymous, false);
    compare(Kind::Anonymous, true);
}

#[test]
fn transparent_huge_pages() {
    compare(Kind::TransparentHuge, false);
    compare(Kind::TransparentHuge, true);
}

#[test]
fn huge_pages() {
    let _allowed = HugePages::allow().unwrap();
    compare(Kind::HugeMemfd, false);
    compare(Kind::HugeMemfd, true);
}

#[test]
fn a_shared_memfd() {
    compare(Kind::Memfd, false);
    compare(Kind::Memfd, true);
}

#[test]
fn a_private_file() {
    compare(Kind::PrivateFile, false);
    compare(Kind::PrivateFile, true);
}
