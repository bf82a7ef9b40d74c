//! What guests boot: built once by `vm-images/build`, then taken from its cache.

use crate::exec;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Set to the directory that `vm-images/build` printed, so that it is not asked again.
pub const IMAGES_VARIABLE: &str = "VMDR_IMAGES";
/// Building takes a download and a compilation the first time.
const BUILD_SECONDS_MAX: u64 = 900;

/// Kernel, initramfs and bare-metal guest.
#[derive(Clone, Debug)]
pub struct Images {
    directory: PathBuf,
}

static KNOWN: Mutex<Option<Images>> = Mutex::new(None);

impl Images {
    /// Builds them where they are missing.
    pub fn get() -> Result<Self> {
        let mut known = KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(images) = &*known {
            return Ok(images.clone());
        }
        let directory = match std::env::var_os(IMAGES_VARIABLE) {
            Some(directory) => PathBuf::from(directory),
            None => {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vm-images/build");
                let printed = exec::run(&mut exec::limited(BUILD_SECONDS_MAX, &script.to_string_lossy()))
                    .context("build the test guests")?;
                PathBuf::from(printed.trim())
            }
        };
        let images = Self { directory };
        for file in [images.kernel(), images.initrd(), images.bare_metal()] {
            std::fs::metadata(&file).with_context(|| format!("find {}: run vm-images/build", file.display()))?;
        }
        *known = Some(images.clone());
        Ok(images)
    }

    /// The Linux kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The initramfs with the workload.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd.gz")
    }

    /// The same with the QEMU guest agent.
    pub fn initrd_with_agent(&self) -> PathBuf {
        self.directory.join("initrd-agent.gz")
    }

    /// The guest without an operating system, for KVM.
    pub fn bare_metal(&self) -> PathBuf {
        self.directory.join("bare-metal.elf")
    }
}
