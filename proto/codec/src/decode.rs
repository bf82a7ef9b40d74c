//! Payloads back to records. Nothing is copied before the caller asks for it.

use crate::layout::bound;
use crate::*;

/// One record of a payload. See the crate's documentation for the format.
#[derive(Debug, Clone)]
pub enum Record<'a> {
    /// Consecutive pages of a RAM block.
    RamPages(RamPages<'a>),
    /// Consecutive pages of a RAM block that are zero.
    RamZero {
        /// Number of the block.
        block: u16,
        /// Number of the first page in the block.
        first: u64,
        /// How many; `first + pages` does not overflow.
        pages: u64,
    },
    /// Bytes written to a disk.
    DiskData {
        /// Number of the disk.
        disk: u16,
        /// Where, in bytes; `offset + data.len()` does not overflow.
        offset: u64,
        /// What.
        data: DiskBytes<'a>,
    },
    /// A range of a disk that reads as zeroes.
    DiskZero {
        /// Number of the disk.
        disk: u16,
        /// Where, in bytes; `offset + length` does not overflow.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// A fragment of QEMU's device state, for an [`Assembler`].
    DeviceState {
        /// Where it belongs.
        offset: u64,
        /// How long the whole is.
        total: u64,
        /// The fragment.
        bytes: &'a [u8],
    },
    /// What the guest consists of, from here on.
    Layout(Layout),
    /// A fragment of the domain's XML, for an [`Assembler`].
    DomainXml {
        /// Where it belongs.
        offset: u64,
        /// How long the whole is.
        total: u64,
        /// The fragment.
        bytes: &'a [u8],
    },
}

impl Record<'_> {
    /// What the record adds to the counts of its part. Reads the encodings of pages, but does not decode them.
    pub fn counts(&self) -> Result<Counts, CodecError> {
        let mut counts = Counts::default();
        match self {
            Record::RamPages(run) => {
                counts.ram_pages = u64::from(run.count);
                for page in run.pages() {
                    counts.zero_pages += u64::from(page?.1 == PageData::Zero);
                }
            }
            Record::RamZero { pages, .. } => (counts.ram_pages, counts.zero_pages) = (*pages, *pages),
            Record::DiskData { data, .. } => counts.disk_bytes = data.len() as u64,
            Record::DiskZero { length, .. } => counts.disk_zero_bytes = *length,
            Record::DeviceState { .. } | Record::Layout(_) | Record::DomainXml { .. } => {}
        }
        Ok(counts)
    }
}

/// The records of a payload, in order. After an error there are no more.
pub fn decode(payload: &[u8]) -> Records<'_> {
    Records { rest: payload }
}

/// See [`decode`].
#[derive(Debug, Clone)]
pub struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, CodecError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let mut from = Cursor::new("record", self.rest);
        let result = record(&mut from);
        self.rest = if result.is_ok() { from.rest } else { &[] };
        Some(result)
    }
}

fn record<'a>(from: &mut Cursor<'a>) -> Result<Record<'a>, CodecError> {
    let kind = from.u8()?;
    let length = from.u32()? as usize;
    let body = from.bytes(length)?;
    let body = |what| Cursor::new(what, body);
    match kind {
        KIND_RAM_PAGES => {
            let mut body = body("RamPages record");
            let (block, first, count) = (body.u16()?, body.u64()?, body.u16()?);
            bound("pages of a record", u64::from(count), 1, u64::from(RECORD_PAGES_MAX))?;
            end_of("page", first, u64::from(count))?;
            Ok(Record::RamPages(RamPages { block, first, count, body: body.rest }))
        }
        KIND_RAM_ZERO => {
            let mut body = body("RamZero record");
            let (block, first, pages) = (body.u16()?, body.u64()?, body.u64()?);
            body.end()?;
            end_of("page", first, pages)?;
            Ok(Record::RamZero { block, first, pages })
        }
        KIND_DISK_DATA => {
            let mut body = body("DiskData record");
            let (disk, offset, length, encoding) = (body.u16()?, body.u64()?, body.u32()?, body.u8()?);
            bound("bytes of a disk record", u64::from(length), 1, DISK_PIECE_BYTES_MAX as u64)?;
            end_of("disk offset", offset, u64::from(length))?;
            let length = length as usize;
            let data = match encoding {
                ENCODING_RAW => {
                    let data = DiskBytes { length, lz4: false, bytes: body.bytes(length)? };
                    body.end()?;
                    data
                }
                ENCODING_LZ4 => DiskBytes { length, lz4: true, bytes: body.rest },
                other => return Err(CodecError::UnknownEncoding(other)),
            };
            Ok(Record::DiskData { disk, offset, data })
        }
        KIND_DISK_ZERO => {
            let mut body = body("DiskZero record");
            let (disk, offset, length) = (body.u16()?, body.u64()?, body.u64()?);
            body.end()?;
            end_of("disk offset", offset, length)?;
            Ok(Record::DiskZero { disk, offset, length })
        }
        KIND_DEVICE_STATE => {
            let (offset, total, bytes) = fragment(body("DeviceState record"), DEVICE_STATE_BYTES_MAX)?;
            Ok(Record::DeviceState { offset, total, bytes })
        }
        KIND_DOMAIN_XML => {
            let (offset, total, bytes) = fragment(body("DomainXml record"), DOMAIN_XML_BYTES_MAX)?;
            Ok(Record::DomainXml { offset, total, bytes })
        }
        KIND_LAYOUT => Ok(Record::Layout(Layout::from_bytes(body("layout").rest)?)),
        other => Err(CodecError::UnknownKind(other)),
    }
}

fn fragment<'a>(mut body: Cursor<'a>, max: u64) -> Result<(u64, u64, &'a [u8]), CodecError> {
    let (offset, total) = (body.u64()?, body.u64()?);
    bound(body.what, total, 0, max)?;
    let bytes = body.rest;
    let left = total.saturating_sub(offset);
    bound("bytes of a fragment", bytes.len() as u64, 0, left.min(FRAGMENT_BYTES_MAX as u64))?;
    Ok((offset, total, bytes))
}

/// `first + count`, which must neither overflow nor be empty.
fn end_of(what: &'static str, first: u64, count: u64) -> Result<u64, CodecError> {
    bound("length of a range", count, 1, u64::MAX)?;
    // Byte offsets become file offsets, which are signed.
    match first.checked_add(count) {
        Some(end) if end <= i64::MAX as u64 => Ok(end),
        _ => Err(CodecError::OutOfBounds { what, value: first, min: 0, max: i64::MAX as u64 }),
    }
}

/// Consecutive pages of a RAM block.
#[derive(Debug, Clone, Copy)]
pub struct RamPages<'a> {
    /// Number of the block.
    pub block: u16,
    /// Number of the first page in the block.
    pub first: u64,
    /// How many; `first + count` does not overflow.
    pub count: u16,
    body: &'a [u8],
}

impl<'a> RamPages<'a> {
    /// The pages with their numbers, in order. After an error there are no more.
    pub fn pages(&self) -> Pages<'a> {
        Pages { next: self.first, left: self.count, from: Cursor::new("page", self.body) }
    }
}

/// See [`RamPages::pages`].
#[derive(Debug, Clone)]
pub struct Pages<'a> {
    next: u64,
    left: u16,
    from: Cursor<'a>,
}

impl<'a> Pages<'a> {
    fn page(&mut self) -> Result<(u64, PageData<'a>), CodecError> {
        let data = match self.from.u8()? {
            ENCODING_ZERO => PageData::Zero,
            ENCODING_RAW => {
                let bytes = self.from.bytes(PAGE_BYTES)?;
                // The cursor gave exactly that many.
                let Ok(bytes) = bytes.try_into() else { return Err(CodecError::Lz4 { what: "page" }) };
                PageData::Raw(bytes)
            }
            ENCODING_LZ4 => {
                let length = self.from.u16()?;
                bound("length of a compressed page", u64::from(length), 1, PAGE_BYTES as u64 - 1)?;
                PageData::Lz4(self.from.bytes(usize::from(length))?)
            }
            other => return Err(CodecError::UnknownEncoding(other)),
        };
        let number = self.next;
        self.next += 1;
        self.left -= 1;
        if self.left == 0 {
            self.from.end()?;
        }
        Ok((number, data))
    }
}

impl<'a> Iterator for Pages<'a> {
    type Item = Result<(u64, PageData<'a>), CodecError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let result = self.page();
        if result.is_err() {
            self.left = 0;
        }
        Some(result)
    }
}

/// The content of a page, as encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageData<'a> {
    /// All zero.
    Zero,
    /// As it is.
    Raw(&'a [u8; PAGE_BYTES]),
    /// An LZ4 block.
    Lz4(&'a [u8]),
}

impl PageData<'_> {
    /// Decodes the page into `page`.
    pub fn read(&self, page: &mut [u8; PAGE_BYTES]) -> Result<(), CodecError> {
        match self {
            PageData::Zero => page.fill(0),
            PageData::Raw(bytes) => page.copy_from_slice(*bytes),
            PageData::Lz4(bytes) => decompress("page", bytes, page)?,
        }
        Ok(())
    }
}

/// Bytes written to a disk, as encoded.
#[derive(Debug, Clone, Copy)]
pub struct DiskBytes<'a> {
    length: usize,
    lz4: bool,
    bytes: &'a [u8],
}

impl<'a> DiskBytes<'a> {
    /// How many bytes they are once decoded: 1 to [`DISK_PIECE_BYTES_MAX`].
    #[allow(clippy::len_without_is_empty)] // Never empty.
    pub fn len(&self) -> usize {
        self.length
    }

    /// The bytes, decoded if need be into `buffer`.
    pub fn read<'b>(&self, buffer: &'b mut [u8; DISK_PIECE_BYTES_MAX]) -> Result<&'b [u8], CodecError>
    where
        'a: 'b,
    {
        if !self.lz4 {
            return Ok(self.bytes);
        }
        let to = &mut buffer[..self.length];
        decompress("disk piece", self.bytes, to)?;
        Ok(to)
    }
}

fn decompress(what: &'static str, from: &[u8], to: &mut [u8]) -> Result<(), CodecError> {
    match lz4_flex::block::decompress_into(from, to) {
        Ok(length) if length == to.len() => Ok(()),
        _ => Err(CodecError::Lz4 { what }),
    }
}

/// Reads fields off the front of bytes, never beyond their end.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    what: &'static str,
    pub(crate) rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(what: &'static str, rest: &'a [u8]) -> Self {
        Self { what, rest }
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], CodecError> {
        let Some((bytes, rest)) = self.rest.split_at_checked(length) else {
            let (needed, left) = (length as u64, self.rest.len() as u64);
            return Err(CodecError::Truncated { what: self.what, needed, left });
        };
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, CodecError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn string(&mut self) -> Result<String, CodecError> {
        let length = self.u16()?;
        bound("string length", u64::from(length), 0, STRING_BYTES_MAX as u64)?;
        let bytes = self.bytes(usize::from(length))?;
        let text = std::str::from_utf8(bytes).map_err(|_| CodecError::Text { what: self.what })?;
        Ok(text.to_owned())
    }

    pub(crate) fn end(&self) -> Result<(), CodecError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(CodecError::LeftOver { what: self.what, left: left as u64 }),
        }
    }
}
