//! Small files that are secret: mode 0600, replaced whole and durably; and the lock of their directory.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::TrustError;

/// The largest file that is read.
const BYTES_MAX: u64 = 256 << 10;
/// How long another daemon may hold the lock: it does so while it writes a file or two.
const LOCK_TIME_MAX: Duration = Duration::from_secs(5);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// Makes a directory of root's alone. Those above it are as usual: other things lie there, which QEMU has to reach.
pub fn make_directory(path: &Path) -> Result<(), TrustError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(TrustError::io("create", parent))?;
    match DirBuilder::new().mode(0o700).create(path) {
        // The other daemon of this host was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(TrustError::io("create", path)(error)),
        Ok(()) => File::open(parent).and_then(|parent| parent.sync_all()).map_err(TrustError::io("sync", parent)),
    }
}

/// Whether others than its owner may read or change it. Nothing that is not there is.
pub fn is_open_to_others(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// Keeps everybody else of this host from changing the directory, as long as the answer lives. Blocks for [`LOCK_TIME_MAX`].
pub fn lock(directory: &Path) -> Result<File, TrustError> {
    let path = directory.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.map_err(TrustError::io("open", &path))?;
    let until = Instant::now() + LOCK_TIME_MAX;
    loop {
        let error = match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOCK_LOOK);
                continue;
            }
            Err(TryLockError::WouldBlock) => io::Error::new(
                io::ErrorKind::TimedOut,
                "the other daemon of this host has held it for 5 s: does it hang?",
            ),
            Err(TryLockError::Error(error)) => error,
        };
        return Err(TrustError::io("lock", &path)(error));
    }
}

/// The file's content; none where there is no file.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, TrustError> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrustError::io("read", path)(error)),
    }
}

/// Replaces a file. After an error it is the old one or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), TrustError> {
    let aside = path.with_extension("new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(TrustError::io("replace", path))
}
