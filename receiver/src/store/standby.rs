//! What lies in a standby directory: the paths, and the small files beside the images.
//!
//! What holds only from a certain epoch on (layout, device state, XML) is in files named after the epoch, and the control
//! record says which.

use std::path::{Path, PathBuf};

use vmdr_codec::Layout;
use vmdr_journal::{Array, Disk, JournalError, Mode, write_all};

/// The longest layout file read: what [`vmdr_codec`]'s limits amount to is far less.
pub(super) const LAYOUT_BYTES_MAX: u64 = 4 << 20;

/// The path of an array's image; nothing for what is not one.
pub(super) fn image_path(dir: &Path, layout: &Layout, array: Array) -> Option<PathBuf> {
    match array {
        Array::Ram(n) => layout.ram.get(usize::from(n)).map(|_| ram_path(dir, usize::from(n))),
        Array::Disk(n) => layout.disks.get(usize::from(n)).map(|disk| disk_path(dir, &disk.target)),
        Array::Device | Array::Xml | Array::Layout => None,
    }
}

/// The history of the standby in `dir`.
pub(super) fn history_dir(dir: &Path) -> PathBuf {
    dir.join("history")
}

/// The path of RAM block `block`'s image.
pub(super) fn ram_path(dir: &Path, block: usize) -> PathBuf {
    dir.join("ram").join(format!("{block}.img"))
}

/// The path of a disk's image.
pub(super) fn disk_path(dir: &Path, target: &str) -> PathBuf {
    dir.join("disk").join(format!("{target}.raw"))
}

/// The path of the device state of `epoch`.
pub(super) fn device_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("device-{epoch}.state"))
}

/// The path of the layout that holds from `epoch` on.
pub(super) fn layout_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("layout-{epoch}"))
}

/// The path of the XML that holds from `epoch` on.
pub(super) fn xml_path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("domain-{epoch}.xml"))
}

/// Reads a layout file.
pub(super) fn read_layout(disk: &dyn Disk, path: &Path) -> Result<Layout, JournalError> {
    let bytes = read_small(disk, path, LAYOUT_BYTES_MAX)?;
    let damaged = |what: String| JournalError::Damaged { path: path.to_owned(), what };
    let Some((body, sum)) = bytes.split_at_checked(bytes.len().saturating_sub(8)) else {
        return Err(damaged("it is too short".to_owned()));
    };
    if sum != vmdr_codec::chunk_hash(body).to_le_bytes() {
        return Err(damaged("its checksum does not match".to_owned()));
    }
    Layout::from_bytes(body).map_err(|e| damaged(e.to_string()))
}

/// The content of a layout file.
pub(super) fn layout_bytes(layout: &Layout, path: &Path) -> Result<Vec<u8>, JournalError> {
    let what = |e: vmdr_codec::CodecError| JournalError::Damaged { path: path.to_owned(), what: e.to_string() };
    let mut bytes = layout.to_bytes().map_err(what)?;
    let sum = vmdr_codec::chunk_hash(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    Ok(bytes)
}

/// Whether there is such a file.
pub(super) fn is_there(disk: &dyn Disk, path: &Path) -> Result<bool, JournalError> {
    match disk.open(path, Mode::Read) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(JournalError::io("open", path)(e)),
    }
}

/// Reads a file of at most `max` bytes.
pub(super) fn read_small(disk: &dyn Disk, path: &Path, max: u64) -> Result<Vec<u8>, JournalError> {
    let file = disk.open(path, Mode::Read).map_err(JournalError::io("open", path))?;
    let length = file.length().map_err(JournalError::io("read", path))?;
    if length > max {
        let what = format!("it has {length} bytes, at most {max} are possible");
        return Err(JournalError::Damaged { path: path.to_owned(), what });
    }
    let mut bytes = vec![0; length as usize];
    let got = file.read_at(&mut bytes, 0).map_err(JournalError::io("read", path))?;
    bytes.truncate(got);
    Ok(bytes)
}

/// Makes a file with this content appear as a whole, durable once its directory is synced.
pub(super) fn write_aside(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), JournalError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let file = disk.open(&new, Mode::Create).map_err(JournalError::io("create", &new))?;
    write_all(&*file, bytes, 0).map_err(JournalError::io("write", &new))?;
    file.sync().map_err(JournalError::io("sync", &new))?;
    disk.rename(&new, path).map_err(JournalError::io("rename", &new))
}
