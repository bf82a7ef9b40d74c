//! The guest's end of the virtio-serial port.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmdr_guest_channel::{Decoder, Frame, PORT};

use super::kernel::{self, Ready};

/// Where the kernel names the ports. (udev makes links in /dev/virtio-ports of it, but not every guest has udev.)
const PORTS: &str = "/sys/class/virtio-ports";
/// How often a port that is not there yet is looked for.
const LOOK: Duration = Duration::from_secs(2);
/// How often it is looked whether a host is connected.
const HOST_LOOK: Duration = Duration::from_millis(100);
/// Bytes read at once.
const READ_BYTES: usize = 1024;

/// See the module.
pub struct Port {
    file: File,
    decoder: Decoder,
}

impl Port {
    /// Waits until the port is there, and opens it.
    pub fn wait(path: Option<&Path>) -> Result<Self> {
        let mut said = false;
        let path = loop {
            if let Some(path) = path.map(Path::to_owned).filter(|path| path.exists()).or_else(find) {
                break path;
            }
            if !said {
                println!("waiting for the virtio port {PORT}: the domain's definition needs a channel of that name");
                said = true;
            }
            std::thread::sleep(LOOK);
        };
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = file.with_context(|| format!("open {} (one program at a time can)", path.display()))?;
        Ok(Self { file, decoder: Decoder::default() })
    }

    /// Sends a frame. One that nobody takes is lost: whoever asks asks again.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        match self.file.write(&frame.encode()) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(error).context("write to the port"),
        }
    }

    /// What comes within `wait`; returns with the first that does. `also`: something else to wait for, and then also for the
    /// other end to go away.
    pub fn receive(&mut self, wait: Duration, also: Option<BorrowedFd<'_>>) -> Result<(Vec<Frame>, Ready)> {
        let until = Instant::now() + wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let ready = kernel::wait_readable(&self.file, also, left);
            let mut buffer = [0; READ_BYTES];
            let bytes = match self.file.read(&mut buffer) {
                Ok(bytes) => bytes,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                Err(error) => return Err(error).context("read from the port"),
            };
            let mut rest = &buffer[..bytes];
            let mut frames = Vec::new();
            while let Some(frame) = self.decoder.next(&mut rest) {
                frames.push(frame);
            }
            if !frames.is_empty() || left.is_zero() || ready.also {
                return Ok((frames, ready));
            }
            if bytes == 0 && ready.hung_up {
                if also.is_some() {
                    return Ok((frames, ready));
                }
                // Nobody is connected at the host: poll would return at once, for ever.
                std::thread::sleep(left.min(HOST_LOOK));
            }
        }
    }
}

fn find() -> Option<PathBuf> {
    let entries = fs::read_dir(PORTS).ok()?;
    let named =
        |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT);
    let entry = entries.flatten().find(named)?;
    let device = Path::new("/dev").join(entry.file_name());
    device.exists().then_some(device)
}
