//! What is kept of a domain's automatic failover, beside its standby: durable before anything is answered, or done because of it.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmdr_daemon::durable;
use vmdr_witness::{Owner, Stance};

const FILE: &str = "failover.json";
/// What a reader of the file must understand.
///
/// Version history, one sentence each:
///   1  first version.
const VERSION: u32 = 1;

/// See the module. Nothing is kept: nobody has been promised anything, and nothing is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Book {
    pub version: u32,
    /// What this site has promised.
    pub stance: Stance,
    /// Its host has asked for something: its failover is, or was, automatic.
    pub automatic: bool,
    /// The host that this site talks to about it, and the generation in which it does.
    pub host: Option<Owner>,
    /// The domain was activated here by hand, or handed over, in this generation, of which the witness does not know yet.
    pub publish: Option<u64>,
}

impl Default for Book {
    fn default() -> Self {
        Book { version: VERSION, stance: Stance::Disarmed, automatic: false, host: None, publish: None }
    }
}

impl Book {
    /// That of the domain in `directory`. An error is a sentence.
    pub fn read(directory: &Path) -> Result<Self, String> {
        let path = path(directory);
        let bytes = durable::read(&path).map_err(|error| format!("read {}: {error}", path.display()))?;
        let Some(bytes) = bytes else { return Ok(Book::default()) };
        let book: Book =
            serde_json::from_slice(&bytes).map_err(|error| format!("{} is damaged: {error}", path.display()))?;
        if book.version != VERSION {
            return Err(format!("{} has version {}, this vmdr knows {VERSION}", path.display(), book.version));
        }
        Ok(book)
    }

    /// Whether there is one.
    pub fn exists(directory: &Path) -> bool {
        // One that cannot be looked for is found out when it is read.
        path(directory).try_exists().unwrap_or(true)
    }

    /// Replaces what is kept. After an error it is not known which of the two is on the disk.
    pub fn replace(&mut self, directory: &Path, with: Book) -> io::Result<()> {
        // A domain that was forgotten must not come back by this.
        if !directory.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "nothing is stored of the domain any more"));
        }
        durable::write(&path(directory), &serde_json::to_vec_pretty(&with)?)?;
        *self = with;
        Ok(())
    }

    /// Another stance, which its host has asked for or which comes of that.
    pub fn keep(&mut self, directory: &Path, stance: &Stance) -> io::Result<()> {
        let with = Book { stance: stance.clone(), automatic: true, ..self.clone() };
        self.replace(directory, with)
    }

    /// Nothing is kept any more.
    pub fn remove(directory: &Path) -> io::Result<()> {
        durable::remove(&path(directory))
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_what_is_damaged_is_not_guessed_at() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        assert!(!Book::exists(at));
        let mut book = Book::read(at).unwrap();
        assert_eq!(book, Book::default());
        let a = Owner { generation: 3, holder: "a".to_owned() };
        for stance in [Stance::Armed { from: a.clone() }, Stance::Taking { from: a.clone() }, Stance::Disarmed] {
            book.keep(at, &stance).unwrap();
            assert_eq!((Book::read(at).unwrap(), book.automatic), (book.clone(), true));
        }
        let good = std::fs::read_to_string(path(at)).unwrap();
        for (bad, what) in [
            (good[..good.len() / 2].to_owned(), "damaged"),
            (good.replace("\"version\": 1", "\"version\": 2"), "knows 1"),
        ] {
            std::fs::write(path(at), bad).unwrap();
            let error = Book::read(at).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        Book::remove(at).unwrap();
        assert!(!Book::exists(at));
        assert!(book.keep(&at.join("gone"), &Stance::Disarmed).is_err() && !at.join("gone").exists());
    }
}
