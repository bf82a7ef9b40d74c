//! A UEFI variable that counts: each write goes through the firmware into the flash, and RAM knows the newest.

use crate::ioctl;
use crate::stamp::{self, Area};
use crate::workers::Worker;
use anyhow::{Context, Result, bail};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// In this directory (efivarfs), under a vendor GUID of its own.
const DIRECTORY: &str = "/sys/firmware/efi/efivars";
const NAME: &str = "VmdrCounter-7d6d3d5e-58d1-4f0c-9c8f-6a1f0b7c5d11";
/// Non-volatile, at boot time, at run time (UEFI specification, SetVariable): the four bytes that efivarfs puts before the value.
const ATTRIBUTES: [u8; 4] = 7u32.to_le_bytes();
/// Bytes of the value.
const VALUE_BYTES: usize = 512;
const FILL_BYTES: usize = VALUE_BYTES - (crate::aligned::PAGE_BYTES - stamp::FILL_BYTES_MAX);
/// Between two writes. The firmware takes some milliseconds for each, and more when its store is full.
const REST: Duration = Duration::from_millis(100);

/// The variable.
pub struct Variable {
    path: PathBuf,
    file: File,
    newest: u64,
}

impl Variable {
    /// Makes the variable, or finds the one from before a reboot and counts on.
    pub fn open() -> Result<Self> {
        let path = Path::new(DIRECTORY).join(NAME);
        let mut newest = 0;
        if let Ok(old) = fs::read(&path) {
            let old = old.get(ATTRIBUTES.len()..).unwrap_or_default();
            if old.len() == VALUE_BYTES {
                newest = stamp::read(old, Area::Variable, 0, FILL_BYTES).context("read the variable from before")?;
            }
            // efivarfs makes variables of vendors that it does not know immutable.
            let file = File::open(&path).context("open the variable")?;
            ioctl::clear_flags(&file).context("make the variable writable")?;
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| format!("open {} (no UEFI, or efivarfs is not mounted)", path.display()))?;
        let mut variable = Self { path, file, newest };
        variable.write()?;
        Ok(variable)
    }

    fn write(&mut self) -> Result<()> {
        let next = self.newest + 1;
        let mut bytes = [0; ATTRIBUTES.len() + VALUE_BYTES];
        bytes[..ATTRIBUTES.len()].copy_from_slice(&ATTRIBUTES);
        stamp::write(&mut bytes[ATTRIBUTES.len()..], Area::Variable, 0, next, FILL_BYTES);
        // One call is one SetVariable.
        let written = self.file.write(&bytes).context("write the UEFI variable")?;
        if written != bytes.len() {
            bail!("{written} of {} bytes of the UEFI variable were written", bytes.len());
        }
        self.newest = next;
        Ok(())
    }
}

impl Worker for Variable {
    fn step(&mut self) -> Result<()> {
        thread::sleep(REST);
        self.write()
    }

    fn check(&mut self) -> Result<()> {
        let bytes = fs::read(&self.path).context("read the UEFI variable")?;
        let value = bytes.get(ATTRIBUTES.len()..).unwrap_or_default();
        if value.len() != VALUE_BYTES {
            bail!("the UEFI variable has {} bytes", bytes.len());
        }
        match stamp::check(value, Area::Variable, 0, self.newest, FILL_BYTES) {
            Ok(()) => Ok(()),
            Err(bad) => bail!("the UEFI variable {bad}"),
        }
    }
}
