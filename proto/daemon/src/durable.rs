//! Small files that are whole or not there at all, whatever happens.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Replaces the content of `path`: aside, synced, renamed, the directory synced. It and the directory are made if need be.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("a file without a directory"))?;
    fs::create_dir_all(directory)?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    let mut file = File::create(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    sync_directory(directory)
}

/// Removes a file for good; that there is none is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => return Ok(()),
        Ok(()) => {}
    }
    path.parent().map_or(Ok(()), sync_directory)
}

/// The content of a file; nothing, if there is none.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the names in a directory durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
