//! A page-aligned byte buffer without unsafe code: allocated one page too large, used from the first boundary on.

use std::ops::{Deref, DerefMut};

/// Bytes of a page, of the alignment O_DIRECT asks for, and of the unit a stamp describes.
pub const PAGE_BYTES: usize = 4096;

/// Zeroed, page-aligned bytes. Untouched pages take no memory.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Aligned {
    /// A buffer of `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + PAGE_BYTES];
        let start = memory.as_ptr().align_offset(PAGE_BYTES);
        Self { memory, start, bytes }
    }

    /// The page with this number.
    pub fn page_mut(&mut self, page: usize) -> &mut [u8] {
        &mut self[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]
    }

    /// The page with this number.
    pub fn page(&self, page: usize) -> &[u8] {
        &self[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}
