//! Epochs of a guest as a stream of bytes.
//!
//! # Format, version 1
//! All numbers little-endian. 8 bytes `VMDRKVM` and 1, then frames:
//!
//! | frame | fields |
//! | --- | --- |
//! | 1, payload | `1 u8`, `length u32` (to [`vmdr_codec::PAYLOAD_BYTES_MAX`]), `xxh3 u64` of the bytes, the bytes: records of `vmdr-codec` |
//! | 2, end | `2 u8`, `epoch u64`, `payloads u32`, `digest_low u64`, `digest_high u64` over the epoch's payloads |
//!
//! Records that occur: Layout (first of each part; a RAM block is named by its guest address, in hexadecimal with `0x`),
//! RamPages, RamZero, and DeviceState ([`GuestState`], once, in the last part). Epochs are numbered from 1, without gaps; the
//! first has all of memory. An epoch without its end frame is nothing.

use std::io::{self, Read, Write};

use vm_memory::bitmap::Bitmap as WriteBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmdr_bitmap::Bitmap;
use vmdr_codec::{
    Assembler, CodecError, DEVICE_STATE_BYTES_MAX, Digest, Encoder, Layout, PAYLOAD_BYTES_MAX, RamBlock, Record,
    chunk_hash, decode,
};

use crate::PAGE_BYTES;
use crate::log::{DirtyLog, LogError, Slot};
use crate::state::{GuestState, StateError};

const MAGIC: [u8; 8] = *b"VMDRKVM\x01";
const FRAME_PAYLOAD: u8 = 1;
const FRAME_END: u8 = 2;

/// Why an epoch could not be taken, written, read or applied.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The dirty log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Guest memory is not what the slots, or the epoch's layout, say.
    #[error("guest memory at {address:#x}: {reason}")]
    Memory {
        /// Where.
        address: u64,
        /// What is wrong.
        reason: String,
    },
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The stream's other end failed.
    #[error("the stream: {0}")]
    Io(#[from] io::Error),
    /// A payload cannot be read.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// What arrived is not what was sent, or not a stream of this version.
    #[error("the stream is damaged or of another version: {0}")]
    Damaged(&'static str),
    /// The epoch is longer than the reader takes.
    #[error("the epoch has more than {0} bytes, which is as much as is taken")]
    TooLong(u64),
}

type Result<T> = std::result::Result<T, StreamError>;

/// Takes epochs of a guest: keeps which pages the standby does not have yet, and copies them.
///
/// One source serves one stream. When that breaks, what was taken out of the source and did not arrive is unknown:
/// [`everything`](Self::everything), and a stream from the beginning.
#[derive(Debug)]
pub struct Source<L, B> {
    log: L,
    memory: GuestMemoryMmap<B>,
    layout: Layout,
    /// What the standby does not have, for each slot.
    pending: Vec<Bitmap>,
    epoch: u64,
}

/// Pages of an epoch, copied; with the last ones of an epoch the state.
#[derive(Debug)]
pub struct Part {
    epoch: u64,
    layout: Layout,
    /// Block, first page, number of pages, in ascending order.
    runs: Vec<(u16, u64, u64)>,
    data: Vec<u8>,
    state: Option<Vec<u8>>,
}

impl Part {
    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.data.len() as u64 / PAGE_BYTES
    }

    /// The epoch it belongs to.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether it ends its epoch.
    pub fn is_last(&self) -> bool {
        self.state.is_some()
    }
}

impl<L: DirtyLog, B: WriteBitmap> Source<L, B> {
    /// Over a log that has begun, of memory in which all its slots lie. Everything is pending.
    pub fn new(log: L, memory: GuestMemoryMmap<B>) -> Result<Self> {
        for slot in log.slots() {
            check_region(&memory, slot.guest_address, slot.bytes)?;
        }
        let block = |slot: &Slot| RamBlock {
            name: format!("{:#x}", slot.guest_address),
            used_bytes: slot.bytes,
            page_bytes: PAGE_BYTES as u32,
        };
        let layout = Layout { ram: log.slots().iter().map(block).collect(), ..Layout::default() };
        layout.check()?;
        let mut source = Self { pending: log.sets(), log, memory, layout, epoch: 1 };
        source.everything();
        Ok(source)
    }

    /// The log, to drain a ring.
    pub fn log(&mut self) -> &mut L {
        &mut self.log
    }

    /// Pages that the VMM, or a device past KVM, wrote: `count` from `first` of a slot, counted in the log's order.
    pub fn mark(&mut self, slot: usize, first: u64, count: u64) {
        self.pending[slot].insert(first, count);
    }

    /// All pages are to be sent (again).
    pub fn everything(&mut self) {
        self.pending.iter_mut().for_each(Bitmap::fill);
        self.epoch = 1;
    }

    /// How many pages are pending after a look at the log.
    pub fn collect(&mut self) -> Result<u64> {
        self.log.collect(&mut self.pending)?;
        Ok(self.pending.iter().map(Bitmap::count).sum())
    }

    /// Copies at most `pages_max` of the pending pages, while the guest runs or not; those written since are pending again with
    /// the next look at the log. For a first copy that neither stops the guest for long nor takes a second memory.
    pub fn part(&mut self, pages_max: u64) -> Result<Part> {
        self.collect()?;
        self.copy(pages_max, None)
    }

    /// Ends the epoch: copies all that is pending, with the state of the same instant. All vCPUs are out of `KVM_RUN` from before
    /// the state was saved until this returns, and nothing else writes guest memory meanwhile.
    pub fn cut(&mut self, state: &GuestState) -> Result<Part> {
        self.collect()?;
        let part = self.copy(u64::MAX, Some(state.to_bytes()))?;
        self.epoch += 1;
        Ok(part)
    }

    fn copy(&mut self, pages_max: u64, state: Option<Vec<u8>>) -> Result<Part> {
        let mut runs = Vec::new();
        let mut left = pages_max;
        for (block, pending) in self.pending.iter().enumerate() {
            for (first, count) in pending.runs() {
                let count = count.min(left);
                if count == 0 {
                    break;
                }
                runs.push((block as u16, first, count));
                left -= count;
            }
        }
        let mut data = vec![0; ((pages_max - left) * PAGE_BYTES) as usize];
        let mut rest = data.as_mut_slice();
        for &(block, first, count) in &runs {
            let address = self.log.slots()[usize::from(block)].guest_address + first * PAGE_BYTES;
            let (into, after) = rest.split_at_mut((count * PAGE_BYTES) as usize);
            let error = |error: vm_memory::GuestMemoryError| StreamError::Memory { address, reason: error.to_string() };
            self.memory.read_slice(into, GuestAddress(address)).map_err(error)?;
            rest = after;
        }
        // Only now: what could not be copied stays pending.
        for &(block, first, count) in &runs {
            self.pending[usize::from(block)].remove(first, count);
        }
        Ok(Part { epoch: self.epoch, layout: self.layout.clone(), runs, data, state })
    }
}

/// Writes parts as frames.
pub struct Writer<W> {
    to: W,
    encoder: Encoder,
    digest: Digest,
    payloads: u32,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    pub fn new(mut to: W) -> Result<Self> {
        to.write_all(&MAGIC)?;
        Ok(Self { to, encoder: Encoder::new(), digest: Digest::new(), payloads: 0 })
    }

    /// Encodes and writes a part, and the end of the epoch if it is the last one; flushes then. The guest may run.
    pub fn part(&mut self, part: &Part) -> Result<()> {
        self.encoder.layout(&part.layout)?;
        let (pages, _) = part.data.as_chunks::<{ PAGE_BYTES as usize }>();
        let numbers =
            part.runs.iter().flat_map(|&(block, first, count)| (first..first + count).map(move |n| (block, n)));
        for ((block, number), page) in numbers.zip(pages) {
            self.encoder.ram_page(block, number, page);
            self.payloads()?;
        }
        if let Some(state) = &part.state {
            self.encoder.device_state(state)?;
        }
        self.encoder.finish();
        self.payloads()?;
        if part.is_last() {
            let (low, high) = self.digest.halves();
            self.to.write_all(&[FRAME_END])?;
            self.to.write_all(&part.epoch.to_le_bytes())?;
            self.to.write_all(&self.payloads.to_le_bytes())?;
            self.to.write_all(&low.to_le_bytes())?;
            self.to.write_all(&high.to_le_bytes())?;
            self.to.flush()?;
            self.digest.reset();
            self.payloads = 0;
        }
        Ok(())
    }

    fn payloads(&mut self) -> Result<()> {
        while let Some(payload) = self.encoder.take_full() {
            self.digest.update(&payload);
            self.payloads += 1;
            self.to.write_all(&[FRAME_PAYLOAD])?;
            self.to.write_all(&(payload.len() as u32).to_le_bytes())?;
            self.to.write_all(&chunk_hash(&payload).to_le_bytes())?;
            self.to.write_all(&payload)?;
        }
        Ok(())
    }
}

/// Reads whole epochs.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    bytes_max: u64,
    begun: bool,
    next: u64,
    torn: bool,
}

/// A whole epoch, checked: nothing of it is damaged, and all its pages are within its layout.
#[derive(Debug)]
pub struct Epoch {
    /// From 1.
    pub number: u64,
    /// Guest address and length of each slot.
    pub slots: Vec<(u64, u64)>,
    /// All but memory.
    pub state: GuestState,
    payloads: Vec<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Of a stream from its beginning. Holds one epoch in memory, of at most `bytes_max` encoded bytes.
    pub fn new(from: R, bytes_max: u64) -> Self {
        Self { from, bytes_max, begun: false, next: 1, torn: false }
    }

    /// The next epoch; `None` when the stream has ended. What came of an epoch that did not arrive whole is dropped.
    pub fn epoch(&mut self) -> Result<Option<Epoch>> {
        match self.read() {
            Err(StreamError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            other => other,
        }
    }

    /// Whether the stream ended within an epoch.
    pub fn torn(&self) -> bool {
        self.torn
    }

    fn read(&mut self) -> Result<Option<Epoch>> {
        if !self.begun {
            if self.array()? != MAGIC {
                return Err(StreamError::Damaged("it does not begin as one"));
            }
            self.begun = true;
        }
        let mut payloads = Vec::new();
        let mut digest = Digest::new();
        let mut bytes = 0;
        loop {
            let [frame] = self.array()?;
            self.torn = true;
            match frame {
                FRAME_PAYLOAD => {
                    let length = u32::from_le_bytes(self.array()?) as usize;
                    let hash = u64::from_le_bytes(self.array()?);
                    if length > PAYLOAD_BYTES_MAX {
                        return Err(StreamError::Damaged("a payload is too long"));
                    }
                    bytes += length as u64;
                    if bytes > self.bytes_max {
                        return Err(StreamError::TooLong(self.bytes_max));
                    }
                    let mut payload = vec![0; length];
                    self.from.read_exact(&mut payload)?;
                    if chunk_hash(&payload) != hash {
                        return Err(StreamError::Damaged("the checksum of a payload"));
                    }
                    digest.update(&payload);
                    payloads.push(payload);
                }
                FRAME_END => {
                    let number = u64::from_le_bytes(self.array()?);
                    let count = u32::from_le_bytes(self.array()?);
                    let halves = (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
                    if number != self.next {
                        return Err(StreamError::Damaged("the number of an epoch"));
                    }
                    if count as usize != payloads.len() || halves != digest.halves() {
                        return Err(StreamError::Damaged("the checksum of an epoch"));
                    }
                    let epoch = Epoch::check(number, payloads)?;
                    self.next += 1;
                    self.torn = false;
                    return Ok(Some(epoch));
                }
                _ => return Err(StreamError::Damaged("an unknown frame")),
            }
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        self.from.read_exact(&mut array)?;
        Ok(array)
    }
}

impl Epoch {
    fn check(number: u64, payloads: Vec<Vec<u8>>) -> Result<Self> {
        let mut layout: Option<Layout> = None;
        let mut state = Assembler::new("guest state", DEVICE_STATE_BYTES_MAX);
        let mut page = Box::new([0; PAGE_BYTES as usize]);
        for payload in &payloads {
            for record in decode(payload) {
                let range = match record? {
                    Record::Layout(new) if layout.as_ref().is_none_or(|layout| *layout == new) => {
                        layout = Some(new);
                        continue;
                    }
                    Record::Layout(_) => return Err(StreamError::Damaged("memory changes within an epoch")),
                    Record::DeviceState { offset, total, bytes } => {
                        state.add(offset, total, bytes)?;
                        continue;
                    }
                    Record::RamZero { block, first, pages } => (block, first, pages),
                    Record::RamPages(run) => {
                        for content in run.pages() {
                            content?.1.read(&mut page)?;
                        }
                        (run.block, run.first, u64::from(run.count))
                    }
                    _ => return Err(StreamError::Damaged("a record that a VMM's guest does not have")),
                };
                let (block, first, pages) = range;
                let block = layout.as_ref().and_then(|layout| layout.ram.get(usize::from(block)));
                if block.is_none_or(|block| first + pages > block.pages()) {
                    return Err(StreamError::Damaged("a page is outside of memory"));
                }
            }
        }
        let layout = layout.ok_or(StreamError::Damaged("an epoch has no layout"))?;
        let slot = |block: &RamBlock| {
            let address = block.name.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
            let address = address.filter(|address| address.checked_add(block.used_bytes).is_some());
            address.map(|address| (address, block.used_bytes)).ok_or(StreamError::Damaged("the address of a slot"))
        };
        let slots = layout.ram.iter().map(slot).collect::<Result<_>>()?;
        let state = state.take()?.ok_or(StreamError::Damaged("an epoch has no state"))?;
        Ok(Self { number, slots, state: GuestState::from_bytes(&state)?, payloads })
    }

    /// Makes memory what it was at the epoch's cut, given that it is what it was at the one before (for the first: anything). The
    /// caller restores [`state`](Self::state) when the guest shall run.
    pub fn apply<B: WriteBitmap>(&self, memory: &GuestMemoryMmap<B>) -> Result<()> {
        for &(address, bytes) in &self.slots {
            check_region(memory, address, bytes)?;
        }
        let mut page = Box::new([0; PAGE_BYTES as usize]);
        let write = |block: u16, number: u64, page: &[u8]| {
            let address = self.slots[usize::from(block)].0 + number * PAGE_BYTES;
            let error = |error: vm_memory::GuestMemoryError| StreamError::Memory { address, reason: error.to_string() };
            memory.write_slice(page, GuestAddress(address)).map_err(error)
        };
        for record in self.payloads.iter().flat_map(|payload| decode(payload)) {
            match record? {
                Record::RamPages(run) => {
                    for content in run.pages() {
                        let (number, content) = content?;
                        content.read(&mut page)?;
                        write(run.block, number, &*page)?;
                    }
                }
                Record::RamZero { block, first, pages } => {
                    page.fill(0);
                    for number in first..first + pages {
                        write(block, number, &*page)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The range lies within one region of the memory.
fn check_region<B: WriteBitmap>(memory: &GuestMemoryMmap<B>, address: u64, bytes: u64) -> Result<()> {
    let region = memory.find_region(GuestAddress(address));
    let inside = region.is_some_and(|region| region.len() - (address - region.start_addr().0) >= bytes);
    if inside {
        return Ok(());
    }
    Err(StreamError::Memory { address, reason: format!("there are no {bytes} bytes in one piece") })
}

#[cfg(test)]
mod tests;
