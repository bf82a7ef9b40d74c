//! Is a part what it says, and can it be applied? Checked before it is accepted, so that applying cannot fail on content.

use std::sync::Arc;

use vmdr_codec::{
    Assembler, Counts, DEVICE_STATE_BYTES_MAX, DISK_PIECE_BYTES_MAX, DOMAIN_XML_BYTES_MAX, Digest, Layout, PAGE_BYTES,
    Record,
};
use vmdr_journal::PartTail;

/// Chunks of a part, at most: of 1 MiB each that is more than any arena has.
const PART_CHUNKS_MAX: u32 = 64 << 10;
/// Layouts in a part, at most. Agents send one; each changes the lengths of up to a thousand files.
const PART_LAYOUTS_MAX: u32 = 16;

/// Follows a part as it comes. Everything it says is one line for the operator.
#[derive(Debug)]
pub(super) struct PartCheck {
    layout: Option<Arc<Layout>>,
    layout_changed: bool,
    layouts: u32,
    device_state: Assembler,
    xml: Assembler,
    counts: Counts,
    digest: Digest,
    chunks: u32,
    payload_bytes: u64,
    scratch: Scratch,
}

/// Where pages and pieces are decoded to, only to see that they can be.
#[derive(Debug)]
pub(super) struct Scratch {
    pub page: Box<[u8; PAGE_BYTES]>,
    pub piece: Box<[u8; DISK_PIECE_BYTES_MAX]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { page: Box::new([0; PAGE_BYTES]), piece: Box::new([0; DISK_PIECE_BYTES_MAX]) }
    }
}

/// What a whole part brings beside pages and extents.
#[derive(Debug)]
pub(super) struct Checked {
    /// The layout that holds after it.
    pub layout: Option<Arc<Layout>>,
    /// Whether it brought that.
    pub layout_changed: bool,
    /// Device state, if it brought one.
    pub device_state: Option<Vec<u8>>,
    /// The domain's XML, if it brought one.
    pub xml: Option<String>,
}

impl PartCheck {
    /// For a part that finds this layout.
    pub fn new(layout: Option<Arc<Layout>>) -> Self {
        Self {
            layout,
            layout_changed: false,
            layouts: 0,
            device_state: Assembler::new("device state", DEVICE_STATE_BYTES_MAX),
            xml: Assembler::new("domain XML", DOMAIN_XML_BYTES_MAX),
            counts: Counts::default(),
            digest: Digest::new(),
            chunks: 0,
            payload_bytes: 0,
            scratch: Scratch::default(),
        }
    }

    /// Bytes of payload so far.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// The next chunk, as it came over the wire.
    pub fn chunk(&mut self, sequence: u32, payload: &[u8], xxh3: u64) -> Result<(), String> {
        if sequence != self.chunks {
            return Err(format!("chunk {sequence} came where {} was next", self.chunks));
        }
        if sequence >= PART_CHUNKS_MAX {
            return Err(format!("it has more than {PART_CHUNKS_MAX} chunks"));
        }
        if payload.is_empty() || payload.len() > vmdr_codec::PAYLOAD_BYTES_MAX {
            let most = vmdr_codec::PAYLOAD_BYTES_MAX;
            return Err(format!("chunk {sequence} has {} bytes, allowed are 1 to {most}", payload.len()));
        }
        if vmdr_codec::chunk_hash(payload) != xxh3 {
            return Err(format!("the checksum of chunk {sequence} does not match"));
        }
        self.content(payload).map_err(|what| format!("chunk {sequence}: {what}"))
    }

    /// The next payload, of which the checksum was checked.
    pub fn content(&mut self, payload: &[u8]) -> Result<(), String> {
        for record in vmdr_codec::decode(payload) {
            let record = record.map_err(|e| e.to_string())?;
            let counts = self.record(record)?;
            self.counts.add(counts);
        }
        self.digest.update(payload);
        self.payload_bytes += payload.len() as u64;
        self.chunks += 1;
        Ok(())
    }

    /// The end of the part.
    pub fn end(mut self, tail: &PartTail) -> Result<Checked, String> {
        if tail.chunks != self.chunks || tail.payload_bytes != self.payload_bytes {
            return Err(format!(
                "{} chunks with {} bytes came, {} with {} were announced",
                self.chunks, self.payload_bytes, tail.chunks, tail.payload_bytes
            ));
        }
        if tail.digest != self.digest.halves() {
            return Err("the digest over the part does not match".to_owned());
        }
        if tail.counts != self.counts {
            return Err(format!("the part contains {:?}, announced were {:?}", self.counts, tail.counts));
        }
        let device_state = self.device_state.take().map_err(|e| e.to_string())?;
        let xml = self.xml.take().map_err(|e| e.to_string())?.map(String::from_utf8);
        let xml = xml.transpose().map_err(|_| "the domain XML is not UTF-8".to_owned())?;
        Ok(Checked { layout: self.layout, layout_changed: self.layout_changed, device_state, xml })
    }

    fn record(&mut self, record: Record<'_>) -> Result<Counts, String> {
        let mut counts = Counts::default();
        match record {
            Record::RamPages(run) => {
                self.pages(run.block, run.first, u64::from(run.count))?;
                counts.ram_pages = u64::from(run.count);
                for page in run.pages() {
                    let (number, data) = page.map_err(|e| e.to_string())?;
                    match data {
                        vmdr_codec::PageData::Zero => counts.zero_pages += 1,
                        vmdr_codec::PageData::Raw(_) => {}
                        lz4 => lz4.read(&mut self.scratch.page).map_err(|e| format!("page {number}: {e}"))?,
                    }
                }
            }
            Record::RamZero { block, first, pages } => {
                self.pages(block, first, pages)?;
                (counts.ram_pages, counts.zero_pages) = (pages, pages);
            }
            Record::DiskData { disk, offset, data } => {
                self.extent(disk, offset, data.len() as u64)?;
                data.read(&mut self.scratch.piece).map_err(|e| format!("disk {disk} at {offset}: {e}"))?;
                counts.disk_bytes = data.len() as u64;
            }
            Record::DiskZero { disk, offset, length } => {
                self.extent(disk, offset, length)?;
                counts.disk_zero_bytes = length;
            }
            Record::DeviceState { offset, total, bytes } => {
                self.device_state.add(offset, total, bytes).map_err(|e| e.to_string())?;
            }
            Record::DomainXml { offset, total, bytes } => {
                self.xml.add(offset, total, bytes).map_err(|e| e.to_string())?;
            }
            Record::Layout(layout) => {
                if let Some(before) = &self.layout {
                    follows(before, &layout)?;
                }
                self.layout_changed = true;
                self.layouts += 1;
                if self.layouts > PART_LAYOUTS_MAX {
                    return Err(format!("it has more than {PART_LAYOUTS_MAX} layouts"));
                }
                self.layout = Some(Arc::new(layout));
            }
        }
        Ok(counts)
    }

    fn layout(&self) -> Result<&Layout, String> {
        self.layout.as_deref().ok_or_else(|| "memory or disk data came before the layout".to_owned())
    }

    fn pages(&self, block: u16, first: u64, pages: u64) -> Result<(), String> {
        let layout = self.layout()?;
        let Some(of) = layout.ram.get(usize::from(block)) else {
            return Err(format!("RAM block {block} is not among the {} of the layout", layout.ram.len()));
        };
        if first.checked_add(pages).is_none_or(|end| end > of.pages()) {
            let all = of.pages();
            return Err(format!(
                "{pages} pages from {first} are beyond the {all} of RAM block {block} ({:?})",
                of.name
            ));
        }
        Ok(())
    }

    fn extent(&self, disk: u16, offset: u64, length: u64) -> Result<(), String> {
        let layout = self.layout()?;
        let Some(of) = layout.disks.get(usize::from(disk)) else {
            return Err(format!("disk {disk} is not among the {} of the layout", layout.disks.len()));
        };
        if offset.checked_add(length).is_none_or(|end| end > of.size_bytes) {
            let (size, target) = (of.size_bytes, &of.target);
            return Err(format!("{length} bytes at {offset} are beyond the {size} of disk {target}"));
        }
        Ok(())
    }
}

/// RAM blocks come and go with hotplug; a disk that goes or becomes another cannot be expressed as a difference.
fn follows(before: &Layout, after: &Layout) -> Result<(), String> {
    let (before, after) = (&before.disks, &after.disks);
    let same = before.iter().zip(after).all(|(b, a)| b.target == a.target);
    if after.len() < before.len() || !same {
        let names = |disks: &[vmdr_codec::Disk]| disks.iter().map(|d| d.target.clone()).collect::<Vec<_>>().join(" ");
        return Err(format!("the disks were {} and are now {}: a new seed is needed", names(before), names(after)));
    }
    Ok(())
}
