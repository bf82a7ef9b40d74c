//! An export backed by a sparse raw file.
//!
//! Holes stay holes: zeroes are written by punching or by `FALLOC_FL_ZERO_RANGE` where the file system can, and
//! BLOCK_STATUS tells what `SEEK_DATA`/`SEEK_HOLE` tell. A flush is `fdatasync`. Every session sees the same file through
//! one descriptor and the page cache, so that several connections are safe.

use super::export::{Capabilities, Export, ExportError, Extent, WriteError};
use super::server::Server;
use anyhow::Context;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

/// Piece in which payloads go from socket to file, and zeroes are written where no system call makes them.
const PIECE_BYTES: usize = 256 << 10;

/// A raw file, served as one block device of the size it had when it was opened.
pub struct FileExport {
    name: String,
    path: PathBuf,
    file: File,
    size_bytes: u64,
    read_only: bool,
}

impl FileExport {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`io::Error`] when it cannot be opened, or is no regular file.
    pub fn open(path: &Path, name: &str, read_only: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(!read_only).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self { name: name.to_owned(), path: path.to_owned(), file, size_bytes: metadata.len(), read_only })
    }

    fn failed(&self, doing: &str, source: io::Error) -> ExportError {
        ExportError::Io { doing: format!("{doing} {}", self.path.display()), source }
    }

    /// `false` when the file system cannot do this.
    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> Result<bool, ExportError> {
        loop {
            return match rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, length) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
                Err(e) => Err(self.failed("zero a range of", e.into())),
            };
        }
    }

    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, ExportError> {
        // The descriptor's position is used by nothing else here, and is not relied upon between calls.
        match rustix::fs::seek(&self.file, to) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(self.failed("look for holes in", e.into())),
        }
    }

    /// End of the run that `at` is in, at most `end`, and whether it is a hole.
    fn run(&self, at: u64, end: u64) -> Result<(u64, bool), ExportError> {
        let data = self.seek(SeekFrom::Data(at))?.unwrap_or(end);
        if data > at {
            return Ok((data.min(end), true));
        }
        // A hole that opened here since the call above would be found at `at`: then what follows counts as data.
        let hole = self.seek(SeekFrom::Hole(at))?.filter(|hole| *hole > at).unwrap_or(end);
        Ok((hole.min(end), false))
    }
}

impl Export for FileExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: !self.read_only,
            trim: true,
            fast_zero: true,
            block_status: true,
            multi_connection: true,
            block_bytes_min: 1,
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.file.read_exact_at(buf, offset).map_err(|e| self.failed("read", e))
    }

    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        let mut piece = vec![0; PIECE_BYTES.min(length as usize)];
        let mut done = 0;
        while done < length as usize {
            let part = piece.len().min(length as usize - done);
            source.read_exact(&mut piece[..part]).map_err(WriteError::Source)?;
            self.file.write_all_at(&piece[..part], offset + done as u64).map_err(|e| self.failed("write", e))?;
            done += part;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, may_unmap: bool, fast: bool) -> Result<(), ExportError> {
        if may_unmap && self.allocate(FallocateFlags::PUNCH_HOLE, offset, length)? {
            return Ok(());
        }
        if self.allocate(FallocateFlags::ZERO_RANGE, offset, length)? {
            return Ok(());
        }
        if fast {
            return Err(ExportError::Unsupported("this file system cannot zero a range without writing it".into()));
        }
        let zeroes = vec![0; PIECE_BYTES];
        let mut done = 0;
        while done < length {
            let part = (PIECE_BYTES as u64).min(length - done);
            self.file
                .write_all_at(&zeroes[..usize::try_from(part).unwrap_or(PIECE_BYTES)], offset + done)
                .map_err(|e| self.failed("write zeroes to", e))?;
            done += part;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        // Where nothing can be punched the bytes stay: a trim is advice.
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, length).map(|_| ())
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.file.sync_data().map_err(|e| self.failed("flush", e))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        let end = offset.saturating_add(length);
        let (mut at, mut extents) = (offset, Vec::new());
        while at < end && extents.len() < limit {
            let (next, hole) = self.run(at, end)?;
            extents.push(Extent { length: next - at, hole, zero: hole });
            at = next;
        }
        Ok(extents)
    }

    fn connected(&self, session: u64) {
        tracing::debug!(session, file = %self.path.display(), "client connected");
    }

    fn disconnected(&self, session: u64) {
        tracing::debug!(session, file = %self.path.display(), "client disconnected");
    }
}

/// Rung by the signal handler; an eventfd, because writing to one is among the few things a handler may do.
static END: OnceLock<EventFd> = OnceLock::new();

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(end) = END.get() {
        let _ = end.write(1);
    }
}

/// Serves a file on a unix socket until SIGTERM or SIGINT, then removes the socket: the command `vmdr-shim nbd`.
///
/// # Errors
/// What kept the server from starting. Once it runs, nothing that clients or the file do ends it.
pub fn serve(file: &Path, socket: &Path, name: &str, read_only: bool) -> anyhow::Result<()> {
    if END.get().is_none() {
        let _ = END.set(EventFd::new(libc::EFD_CLOEXEC).context("create an eventfd for signals")?);
    }
    let end = END.get().context("create an eventfd for signals")?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        register_signal_handler(signal, on_signal).with_context(|| format!("handle signal {signal}"))?;
    }
    let export = FileExport::open(file, name, read_only).with_context(|| format!("open {}", file.display()))?;
    let size_bytes = export.size_bytes();
    let server = Server::start(socket, vec![Arc::new(export)], None)?;
    tracing::info!(file = %file.display(), socket = %socket.display(), export = name, size_bytes, read_only, "serving");
    loop {
        match end.read() {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("wait for a signal"),
        }
    }
    server.stop();
    Ok(())
}
