//! Records to payloads.

use std::collections::VecDeque;

use crate::*;

/// Zero pages between others that are cheaper as a byte each than as a record of their own.
const INLINE_ZERO_PAGES_MAX: u16 = 16;
/// Unit in which a disk write is searched for zeroes.
const DISK_BLOCK_BYTES: usize = 4096;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Turns the content of a part into payloads.
///
/// After any call, [`Encoder::take_full`] gives the payloads that are complete; after [`Encoder::finish`] it gives all that
/// remain, and then the encoder is ready for the next part. Pages cost no allocation, payloads one each.
///
/// ```
/// let mut encoder = vmdr_codec::Encoder::new();
/// encoder.ram_page(0, 7, &[1; 4096]);
/// let counts = encoder.finish();
/// while let Some(payload) = encoder.take_full() {
///     assert_eq!(vmdr_codec::decode(&payload).count(), 1);
/// }
/// assert_eq!(counts.ram_pages, 1);
/// ```
pub struct Encoder {
    payload: Vec<u8>,
    full: VecDeque<Vec<u8>>,
    run: Run,
    counts: Counts,
    scratch: Box<[u8]>,
}

/// The RAM record that the next page may continue.
enum Run {
    None,
    /// A RamPages record that began at `start` of the payload, followed by `zeroes` pages that are not written yet.
    Pages {
        start: usize,
        block: u16,
        next: u64,
        count: u16,
        zeroes: u16,
    },
    /// A RamZero record, of which nothing is written yet.
    Zero {
        block: u16,
        first: u64,
        pages: u64,
    },
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("open", &self.payload.len()).field("full", &self.full.len()).finish()
    }
}

impl Encoder {
    /// An encoder at the beginning of a part.
    pub fn new() -> Self {
        let scratch = lz4_flex::block::get_maximum_output_size(DISK_PIECE_BYTES_MAX);
        Self {
            payload: Vec::new(),
            full: VecDeque::new(),
            run: Run::None,
            counts: Counts::default(),
            scratch: vec![0; scratch].into_boxed_slice(),
        }
    }

    /// The oldest payload that is complete and was not taken yet.
    pub fn take_full(&mut self) -> Option<Vec<u8>> {
        self.full.pop_front()
    }

    /// What the part contains so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Ends the part. [`Encoder::take_full`] then gives its remaining payloads, and what is encoded next is another part's.
    pub fn finish(&mut self) -> Counts {
        self.close_run();
        if !self.payload.is_empty() {
            self.full.push_back(std::mem::take(&mut self.payload));
        }
        std::mem::take(&mut self.counts)
    }

    /// Page `page` of block `block` has this content. Cheapest when pages come in ascending order.
    pub fn ram_page(&mut self, block: u16, page: u64, data: &[u8; PAGE_BYTES]) {
        self.counts.ram_pages += 1;
        if data == &ZERO_PAGE {
            self.counts.zero_pages += 1;
            self.zero_page(block, page);
            return;
        }
        self.start_pages(block, page);
        self.reserve();
        let compressed = compress(data, &mut self.scratch).filter(|&n| n < PAGE_BYTES);
        if let Some(length) = compressed {
            self.payload.push(ENCODING_LZ4);
            self.payload.extend_from_slice(&(length as u16).to_le_bytes());
            self.payload.extend_from_slice(&self.scratch[..length]);
        } else {
            self.payload.push(ENCODING_RAW);
            self.payload.extend_from_slice(data);
        }
        if let Run::Pages { next, count, .. } = &mut self.run {
            *next += 1;
            *count += 1;
        }
        self.close_full();
    }

    /// `pages` pages from `first` of block `block` are zero.
    pub fn ram_zero(&mut self, block: u16, first: u64, pages: u64) {
        if pages == 0 {
            return;
        }
        self.counts.ram_pages += pages;
        self.counts.zero_pages += pages;
        self.zero_run(block, first, pages);
    }

    /// `data` was written to disk `disk` at byte `offset`. Whole 4 KiB blocks of zeroes are encoded as such.
    pub fn disk_data(&mut self, disk: u16, offset: u64, data: &[u8]) {
        let mut start = 0;
        while start < data.len() {
            let (length, zero) = self.next_piece(offset, data, start);
            if zero {
                self.disk_zero(disk, offset + start as u64, length as u64);
            } else {
                self.disk_piece(disk, offset + start as u64, &data[start..start + length]);
            }
            start += length;
        }
    }

    /// `length` bytes of disk `disk` from byte `offset` read as zeroes.
    pub fn disk_zero(&mut self, disk: u16, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        self.counts.disk_zero_bytes += length;
        let start = self.open(KIND_DISK_ZERO);
        self.payload.extend_from_slice(&disk.to_le_bytes());
        self.payload.extend_from_slice(&offset.to_le_bytes());
        self.payload.extend_from_slice(&length.to_le_bytes());
        self.close(start);
    }

    /// QEMU's device state at the cut.
    pub fn device_state(&mut self, bytes: &[u8]) -> Result<(), CodecError> {
        layout::bound("device state bytes", bytes.len() as u64, 0, DEVICE_STATE_BYTES_MAX)?;
        self.fragments(KIND_DEVICE_STATE, bytes);
        Ok(())
    }

    /// The domain's XML.
    pub fn domain_xml(&mut self, xml: &str) -> Result<(), CodecError> {
        layout::bound("domain XML bytes", xml.len() as u64, 0, DOMAIN_XML_BYTES_MAX)?;
        self.fragments(KIND_DOMAIN_XML, xml.as_bytes());
        Ok(())
    }

    /// What the guest consists of, for all that is encoded from here on.
    pub fn layout(&mut self, layout: &Layout) -> Result<(), CodecError> {
        let body = layout.to_bytes()?;
        let start = self.open(KIND_LAYOUT);
        self.payload.extend_from_slice(&body);
        self.close(start);
        Ok(())
    }

    fn fragments(&mut self, kind: u8, bytes: &[u8]) {
        let mut offset = 0;
        loop {
            let length = (bytes.len() - offset).min(FRAGMENT_BYTES_MAX);
            let start = self.open(kind);
            self.payload.extend_from_slice(&(offset as u64).to_le_bytes());
            self.payload.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            self.payload.extend_from_slice(&bytes[offset..offset + length]);
            self.close(start);
            offset += length;
            if offset == bytes.len() {
                return;
            }
        }
    }

    /// How long the next piece from `start` of `data` is, and whether it is zero.
    fn next_piece(&self, offset: u64, data: &[u8], start: usize) -> (usize, bool) {
        let is_zero = |at: usize| {
            let aligned = (offset + at as u64).is_multiple_of(DISK_BLOCK_BYTES as u64);
            aligned && data.get(at..at + DISK_BLOCK_BYTES).is_some_and(|block| block == ZERO_PAGE)
        };
        let mut end = start;
        if is_zero(start) {
            while end < data.len() && is_zero(end) {
                end += DISK_BLOCK_BYTES;
            }
            return (end - start, true);
        }
        let most = data.len().min(start + DISK_PIECE_BYTES_MAX);
        while end < most && !is_zero(end) {
            let to_boundary = DISK_BLOCK_BYTES - (offset + end as u64) as usize % DISK_BLOCK_BYTES;
            end = (end + to_boundary).min(most);
        }
        (end - start, false)
    }

    fn disk_piece(&mut self, disk: u16, offset: u64, piece: &[u8]) {
        self.counts.disk_bytes += piece.len() as u64;
        let start = self.open(KIND_DISK_DATA);
        self.payload.extend_from_slice(&disk.to_le_bytes());
        self.payload.extend_from_slice(&offset.to_le_bytes());
        self.payload.extend_from_slice(&(piece.len() as u32).to_le_bytes());
        let compressed = compress(piece, &mut self.scratch).filter(|&n| n < piece.len());
        if let Some(length) = compressed {
            self.payload.push(ENCODING_LZ4);
            self.payload.extend_from_slice(&self.scratch[..length]);
        } else {
            self.payload.push(ENCODING_RAW);
            self.payload.extend_from_slice(piece);
        }
        self.close(start);
    }

    fn zero_page(&mut self, block: u16, page: u64) {
        let mut before = 0;
        if let Run::Pages { block: b, next, zeroes, count, .. } = &mut self.run
            && *b == block
            && *next + u64::from(*zeroes) == page
        {
            if *zeroes < INLINE_ZERO_PAGES_MAX && *count + *zeroes < RECORD_PAGES_MAX - 1 {
                *zeroes += 1;
                return;
            }
            before = u64::from(std::mem::take(zeroes));
        }
        self.zero_run(block, page - before, before + 1);
    }

    fn zero_run(&mut self, block: u16, first: u64, pages: u64) {
        match &mut self.run {
            Run::Zero { block: b, first: f, pages: p } if *b == block && f.checked_add(*p) == Some(first) => {
                *p += pages
            }
            _ => {
                self.close_run();
                self.run = Run::Zero { block, first, pages };
            }
        }
    }

    /// Makes the open record a RamPages one that the page can be added to.
    fn start_pages(&mut self, block: u16, page: u64) {
        if let Run::Pages { block: b, next, count, zeroes, .. } = &mut self.run {
            let fits = *count + *zeroes < RECORD_PAGES_MAX;
            if *b == block && *next + u64::from(*zeroes) == page && fits {
                for _ in 0..*zeroes {
                    self.payload.push(ENCODING_ZERO);
                }
                *count += *zeroes;
                *next += u64::from(*zeroes);
                *zeroes = 0;
                return;
            }
        }
        let start = self.open(KIND_RAM_PAGES);
        self.payload.extend_from_slice(&block.to_le_bytes());
        self.payload.extend_from_slice(&page.to_le_bytes());
        self.payload.extend_from_slice(&0u16.to_le_bytes());
        self.run = Run::Pages { start, block, next: page, count: 0, zeroes: 0 };
    }

    fn close_run(&mut self) {
        match std::mem::replace(&mut self.run, Run::None) {
            Run::None => {}
            Run::Pages { start, block, next, count, zeroes } => {
                let at = start + RECORD_HEAD_BYTES + 2 + 8;
                self.payload[at..at + 2].copy_from_slice(&count.to_le_bytes());
                self.close(start);
                if zeroes > 0 {
                    self.ram_zero_record(block, next, u64::from(zeroes));
                }
            }
            Run::Zero { block, first, pages } => self.ram_zero_record(block, first, pages),
        }
    }

    fn ram_zero_record(&mut self, block: u16, first: u64, pages: u64) {
        let start = self.open(KIND_RAM_ZERO);
        self.payload.extend_from_slice(&block.to_le_bytes());
        self.payload.extend_from_slice(&first.to_le_bytes());
        self.payload.extend_from_slice(&pages.to_le_bytes());
        self.close(start);
    }

    /// Begins a record; what follows up to [`Encoder::close`] is its body.
    fn open(&mut self, kind: u8) -> usize {
        self.close_run();
        self.reserve();
        let start = self.payload.len();
        self.payload.push(kind);
        self.payload.extend_from_slice(&0u32.to_le_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        let length = (self.payload.len() - start - RECORD_HEAD_BYTES) as u32;
        self.payload[start + 1..start + RECORD_HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
        self.close_full();
    }

    /// Hands the payload over if it is full.
    fn close_full(&mut self) {
        if self.payload.len() < CHUNK_BYTES {
            return;
        }
        if let Run::Pages { .. } = self.run {
            self.close_run();
        }
        if !self.payload.is_empty() {
            self.full.push_back(std::mem::take(&mut self.payload));
        }
    }

    /// Makes the payload's one allocation, at its first byte.
    fn reserve(&mut self) {
        if self.payload.capacity() == 0 {
            self.payload.reserve_exact(CHUNK_BYTES + FRAGMENT_BYTES_MAX + PAGE_BYTES);
        }
    }
}

fn compress(data: &[u8], to: &mut [u8]) -> Option<usize> {
    lz4_flex::block::compress_into(data, to).ok()
}
