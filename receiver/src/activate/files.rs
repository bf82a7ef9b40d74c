//! Files of an activation: overlays over the standby's disks, and who may read what.
//!
//! The standby's images stay what they are. QEMU runs as a user of its own, so it is let through the directories and given
//! the RAM image to read; the disks are given to it by libvirt.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::qcow2;
use super::record::Pristine;

/// Why a file could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system refused.
    #[error("{what} {path:?}: {source}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// qemu-img refused.
    #[error("qemu-img could not create the overlay {path:?}: {message}")]
    QemuImg {
        /// The overlay.
        path: PathBuf,
        /// Its words.
        message: String,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { what, path, source }
}

/// Makes a qcow2 file of `bytes` over the raw image `base`, readable by nobody else, and says how it looks.
pub fn create_overlay(overlay: &Path, base: &Path, bytes: u64) -> Result<Pristine, FileError> {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o"])
        .arg([OsStr::new("backing_file="), base.as_os_str()].join_with_doubled_commas())
        .arg(overlay)
        .arg(bytes.to_string())
        .output()
        .map_err(failed("run qemu-img (package qemu-utils) for", overlay))?;
    if !made.status.success() {
        let message = String::from_utf8_lossy(&made.stderr).trim().to_owned();
        return Err(FileError::QemuImg { path: overlay.to_owned(), message });
    }
    settle(overlay)
}

/// Makes an overlay that has these clusters itself, as `read` gives them: what an older recovery point has otherwise.
pub fn create_older_overlay(
    overlay: &Path,
    base: &Path,
    bytes: u64,
    clusters: &[u64],
    read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Result<Pristine, FileError> {
    let mut to = fs::File::create_new(overlay).map_err(failed("create", overlay))?;
    let backing = base.to_str().ok_or_else(|| io::Error::other("the path of its image is not UTF-8"));
    let backing = backing.map_err(failed("create", overlay))?;
    qcow2::write(&mut to, backing, bytes, clusters, read).map_err(failed("write", overlay))?;
    settle(overlay)
}

/// What it looks like before a guest has it.
fn settle(overlay: &Path) -> Result<Pristine, FileError> {
    fs::set_permissions(overlay, Permissions::from_mode(0o600)).map_err(failed("set the mode of", overlay))?;
    let file = fs::File::open(overlay).map_err(failed("open", overlay))?;
    file.sync_all().map_err(failed("sync", overlay))?;
    let metadata = file.metadata().map_err(failed("read the size of", overlay))?;
    Ok(Pristine { path: overlay.to_owned(), bytes: metadata.len(), modified_unix_ns: modified(&metadata) })
}

/// QEMU's options are separated by commas; a comma within one is written twice.
trait QemuOption {
    fn join_with_doubled_commas(self) -> std::ffi::OsString;
}

impl QemuOption for [&OsStr; 2] {
    fn join_with_doubled_commas(self) -> std::ffi::OsString {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let mut joined = self[0].as_bytes().to_vec();
        for &byte in self[1].as_bytes() {
            joined.push(byte);
            if byte == b',' {
                joined.push(byte);
            }
        }
        std::ffi::OsString::from_vec(joined)
    }
}

fn modified(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Whether nothing was written to an overlay since it was made. One that is gone holds nothing either.
pub fn is_pristine(overlay: &Pristine) -> Result<bool, FileError> {
    match fs::metadata(&overlay.path) {
        Ok(now) => Ok(now.len() == overlay.bytes && modified(&now) == overlay.modified_unix_ns),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(failed("look at", &overlay.path)(e)),
    }
}

/// The nearest directory above `top` that other users cannot enter, if there is one. It is not ours to open.
pub fn closed_above(top: &Path) -> Result<Option<PathBuf>, FileError> {
    for directory in top.ancestors().skip(1) {
        let mode = fs::metadata(directory).map_err(failed("look at", directory))?.mode();
        if mode & 0o001 == 0 {
            return Ok(Some(directory.to_owned()));
        }
    }
    Ok(None)
}

/// Lets other users pass through the directories from `top` down to that of `file`, without letting them list these.
pub fn let_pass(top: &Path, file: &Path) -> Result<(), FileError> {
    for directory in file.ancestors().skip(1).take_while(|d| d.starts_with(top)) {
        let mode = fs::metadata(directory).map_err(failed("look at", directory))?.mode();
        if mode & 0o001 == 0 {
            let open = Permissions::from_mode((mode & 0o7777) | 0o001);
            fs::set_permissions(directory, open).map_err(failed("set the mode of", directory))?;
        }
    }
    Ok(())
}

/// Gives the RAM image to QEMU's user to read and to nobody else. QEMU opens it read-only.
pub fn give_to_read(file: &Path, owner: Option<(u32, u32)>) -> Result<(), FileError> {
    if let Some((user, group)) = owner {
        chown(file, Some(user), Some(group)).map_err(failed("change the owner of", file))?;
    }
    fs::set_permissions(file, Permissions::from_mode(0o400)).map_err(failed("set the mode of", file))
}

/// Writes the guest's UEFI variables, for QEMU's user alone: a copy, since QEMU writes to it.
pub fn copy_variables(from: &mut dyn Read, to: &Path, bytes: u64, owner: Option<(u32, u32)>) -> Result<(), FileError> {
    let mut image = from.take(bytes);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(failed("create", to))?;
    io::copy(&mut image, &mut file).map_err(failed("write", to))?;
    // The image may end early: what lies beyond its end is zero.
    file.set_len(bytes).map_err(failed("size", to))?;
    if let Some((user, group)) = owner {
        chown(to, Some(user), Some(group)).map_err(failed("change the owner of", to))?;
    }
    file.sync_all().map_err(failed("sync", to))
}

/// Removes a directory, if it is there.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes a directory of an attempt, if it is there.
pub fn remove_directory(path: &Path) -> Result<(), FileError> {
    remove_tree(path).map_err(failed("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn an_overlay_is_pristine_until_written() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("a,b.raw");
        fs::write(&base, vec![7; 1 << 20]).unwrap();
        let overlay = create_overlay(&dir.path().join("vda.qcow2"), &base, 1 << 20).unwrap();
        assert_eq!(mode(&overlay.path), 0o600);
        assert!(is_pristine(&overlay).unwrap());
        fs::set_permissions(&overlay.path, Permissions::from_mode(0o640)).unwrap();
        assert!(is_pristine(&overlay).unwrap(), "libvirt changes owner and labels");
        let read = Command::new("qemu-img").arg("compare").arg(&base).arg(&overlay.path).output().unwrap();
        assert!(read.status.success(), "{read:?}");
        let written = Command::new("qemu-io").args(["-c", "write -P 9 0 4k"]).arg(&overlay.path).output().unwrap();
        assert!(written.status.success(), "{written:?}");
        assert!(!is_pristine(&overlay).unwrap());
        assert_eq!(fs::read(&base).unwrap(), vec![7; 1 << 20]);
    }

    #[test]
    fn variables_are_a_copy_of_the_flash_of_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let (image, copy) = (dir.path().join("2.img"), dir.path().join("variables.fd"));
        fs::write(&image, vec![7; 6000]).unwrap();
        let open = || fs::File::open(&image).unwrap();
        copy_variables(&mut open(), &copy, 8192, None).unwrap();
        assert_eq!(mode(&copy), 0o600);
        assert_eq!(fs::read(&copy).unwrap(), [vec![7; 6000], vec![0; 2192]].concat());
        assert!(copy_variables(&mut open(), &copy, 8192, None).is_err(), "nothing that is there is overwritten");
    }

    #[test]
    fn what_qemu_img_says_is_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let error = create_overlay(&dir.path().join("o"), &dir.path().join("missing"), 512).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn others_may_pass_and_read_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let top = dir.path().join("state");
        let inner = top.join("domain");
        fs::create_dir_all(&inner).unwrap();
        for d in [&top, &inner] {
            fs::set_permissions(d, Permissions::from_mode(0o700)).unwrap();
        }
        let file = inner.join("ram");
        fs::write(&file, b"x").unwrap();
        assert_eq!(closed_above(&top).unwrap(), None);
        let_pass(&top, &file).unwrap();
        give_to_read(&file, None).unwrap();
        assert_eq!((mode(&top), mode(&inner), mode(&file)), (0o701, 0o701, 0o400));
        fs::set_permissions(dir.path(), Permissions::from_mode(0o750)).unwrap();
        assert_eq!(closed_above(&top).unwrap().as_deref(), Some(dir.path()));
    }
}
