//! Fragments of a device state or XML, put together.

use crate::CodecError;

/// Collects the fragments of one DeviceState or DomainXml. Holds at most `max` bytes whatever comes.
#[derive(Debug)]
pub struct Assembler {
    what: &'static str,
    max: u64,
    total: Option<u64>,
    bytes: Vec<u8>,
}

impl Assembler {
    /// For a thing called `what` in errors, of at most `max` bytes.
    pub fn new(what: &'static str, max: u64) -> Self {
        Self { what, max, total: None, bytes: Vec::new() }
    }

    /// Adds a fragment, which must follow the ones before it; one at offset 0 starts anew.
    pub fn add(&mut self, offset: u64, total: u64, bytes: &[u8]) -> Result<(), CodecError> {
        if total > self.max {
            return Err(CodecError::OutOfBounds { what: self.what, value: total, min: 0, max: self.max });
        }
        if offset == 0 {
            self.bytes.clear();
            self.total = Some(total);
        }
        let expected = self.bytes.len() as u64;
        let fits = expected.checked_add(bytes.len() as u64).is_some_and(|end| end <= total);
        if self.total != Some(total) || offset != expected || !fits {
            return Err(CodecError::Fragment { what: self.what, offset, total, expected });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Whether any fragment has come since the beginning.
    pub fn is_empty(&self) -> bool {
        self.total.is_none()
    }

    /// What was put together, if fragments came; an error if some are missing. Starts anew.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>, CodecError> {
        let Some(total) = self.total.take() else { return Ok(None) };
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.len() as u64 != total {
            return Err(CodecError::Truncated { what: self.what, needed: total, left: bytes.len() as u64 });
        }
        Ok(Some(bytes))
    }
}
