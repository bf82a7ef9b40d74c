//! The chain on disk: its files, and the note of its newest record.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::chain::{self, Entry, HASH_CHARS, Head, Outcome};

/// Bytes at which a file is closed and the next one begun: some 25,000 records.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Files that are kept of a daemon.
pub const FILES_MAX: usize = 32;
/// How long a daemon waits for its predecessor to end, and how often it looks.
const LOCK_TIME_MAX: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(20);
/// The longest line read back.
pub(crate) const LINE_BYTES_MAX: usize = 16 << 10;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[error("audit log: {action} {path}: {source}", path = path.display())]
pub struct AuditError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

pub(crate) fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuditError {
    let path = path.to_owned();
    move |source| AuditError { action, path, source }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub file_bytes: u64,
    pub files: usize,
}

/// The chain of a daemon, which only it writes.
#[derive(Debug)]
pub(crate) struct Chain {
    directory: PathBuf,
    daemon: String,
    limits: Limits,
    file: File,
    bytes: u64,
    head_file: File,
    head: Head,
}

impl Chain {
    /// Opens it, and says what is to be noted in it.
    pub fn open(directory: &Path, daemon: &str, limits: Limits) -> Result<(Self, Vec<String>), AuditError> {
        make_directory(directory).map_err(of("create", directory))?;
        let files = files(directory, daemon)?;
        let head_path = head_path(directory, daemon);
        let head_file = open(&head_path)?;
        lock(&head_file).map_err(of("lock", &head_path))?;
        let noted = read_head(&head_file);
        let (mut found, mut cut) = (Newest::None, 0);
        for path in files.iter().rev() {
            let (newest, bytes) = newest(path)?;
            (found, cut) = (newest, cut + bytes);
            if !matches!(found, Newest::None) {
                break;
            }
        }
        // What was acknowledged last decides: what is missing then stays a gap in the numbers.
        let last = match &found {
            Newest::At(head) => head.clone(),
            Newest::None | Newest::Damaged => Head::zero(),
        };
        let head = noted.filter(|noted| noted.seq > last.seq).unwrap_or_else(|| last.clone());
        let path = files.last().cloned().unwrap_or_else(|| file_path(directory, daemon, head.seq + 1));
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(of("open", &path))?;
        let bytes = file.metadata().map_err(of("read", &path))?.len();
        sync_dir(directory)?;
        let mut notes = Vec::new();
        if cut > 0 {
            notes.push(format!("the last line was cut short when the daemon ended: {cut} bytes of it are gone"));
        }
        if matches!(found, Newest::Damaged) {
            notes.push("the newest line of the log is damaged: `vmdr audit verify` names it".to_owned());
        } else if last.seq < head.seq {
            notes.push(format!("records {} to {} are missing from the log", last.seq + 1, head.seq));
        }
        let (directory, daemon) = (directory.to_owned(), daemon.to_owned());
        Ok((Self { directory, daemon, limits, file, bytes, head_file, head }, notes))
    }

    /// Number of the newest record.
    pub fn sequence(&self) -> u64 {
        self.head.seq
    }

    /// Its hash.
    pub fn hash(&self) -> &str {
        &self.head.hash
    }

    /// Writes a record; it is durable when this returns. Blocks.
    pub fn append(&mut self, entry: &Entry, count: u64) -> Result<(), AuditError> {
        self.append_at(entry, count, None)
    }

    fn append_at(&mut self, entry: &Entry, count: u64, dropped: Option<&Head>) -> Result<(), AuditError> {
        if self.bytes >= self.limits.file_bytes && dropped.is_none() {
            self.next_file()?;
        }
        let directory = self.directory.clone();
        let line = chain::line(&self.head, &self.daemon, entry, count, dropped, SystemTime::now());
        let (line, head) = line.map_err(|error| of("write", &directory)(error.into()))?;
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // Whatever came of it, the next line begins a line of its own.
            let _ = self.file.set_len(self.bytes);
            return Err(of("write", &directory)(error));
        }
        self.bytes += line.len() as u64;
        self.head = head;
        let text = format!("{:020} {}\n", self.head.seq, self.head.hash);
        let noted = self.head_file.write_all_at(text.as_bytes(), 0).and_then(|()| self.head_file.sync_data());
        noted.map_err(of("note the newest record in", &directory))
    }

    /// Begins another file, and deletes the oldest when there are too many.
    fn next_file(&mut self) -> Result<(), AuditError> {
        let path = file_path(&self.directory, &self.daemon, self.head.seq + 1);
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        self.file = file.map_err(of("create", &path))?;
        self.bytes = 0;
        sync_dir(&self.directory)?;
        let files = files(&self.directory, &self.daemon)?;
        let Some(excess) = files.len().checked_sub(self.limits.files).filter(|excess| *excess > 0) else {
            return Ok(());
        };
        let Some(last) = files.get(excess - 1) else { return Ok(()) };
        let (Newest::At(head), _) = newest(last)? else { return Ok(()) };
        let detail = format!("records up to {} are deleted, the log has {} files", head.seq, self.limits.files);
        let entry = Entry::new("rotate", &self.daemon, "", Outcome::Noted).because(detail);
        self.append_at(&entry, 1, Some(&head))?;
        for path in &files[..excess] {
            fs::remove_file(path).map_err(of("remove", path))?;
        }
        sync_dir(&self.directory)
    }
}

fn open(path: &Path) -> Result<File, AuditError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(of("open", path))
}

/// One daemon writes a chain. A predecessor that is just ending gets a moment for that.
fn lock(file: &File) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(fs::TryLockError::WouldBlock) if begun.elapsed() < LOCK_TIME_MAX => std::thread::sleep(LOCK_LOOK),
            Err(fs::TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "another daemon writes this log"));
            }
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

fn sync_dir(directory: &Path) -> Result<(), AuditError> {
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(of("sync", directory))
}

fn head_path(directory: &Path, daemon: &str) -> PathBuf {
    directory.join(format!("{daemon}.head"))
}

fn file_path(directory: &Path, daemon: &str, first: u64) -> PathBuf {
    directory.join(format!("{daemon}-{first:012}.jsonl"))
}

/// The newest record that was noted, if the note is whole.
pub(crate) fn noted(directory: &Path, daemon: &str) -> Option<Head> {
    read_head(&File::open(head_path(directory, daemon)).ok()?)
}

fn read_head(file: &File) -> Option<Head> {
    let mut bytes = [0; 20 + 1 + HASH_CHARS + 1];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let (seq, hash) = std::str::from_utf8(&bytes).ok()?.strip_suffix('\n')?.split_once(' ')?;
    Some(Head { seq: seq.parse().ok()?, hash: hash.to_owned() })
}

/// The files of a daemon's chain, oldest first.
pub(crate) fn files(directory: &Path, daemon: &str) -> Result<Vec<PathBuf>, AuditError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(of("list", directory))? {
        let name = entry.map_err(of("list", directory))?.file_name();
        let first = name
            .to_str()
            .and_then(|name| name.strip_prefix(daemon)?.strip_prefix('-')?.strip_suffix(".jsonl")?.parse::<u64>().ok());
        files.extend(first.map(|first| (first, directory.join(&name))));
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

/// One of root's alone. Those above it are as usual: other things lie there, which QEMU has to reach.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        // The other daemon of this host was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The newest whole line of a file.
enum Newest {
    /// There is none.
    None,
    /// It is no good record.
    Damaged,
    At(Head),
}

/// The newest whole line; a piece of a line after it is cut off, and how long that was.
fn newest(path: &Path) -> Result<(Newest, u64), AuditError> {
    let mut file = open(path)?;
    let length = file.metadata().map_err(of("read", path))?.len();
    let from = length.saturating_sub(2 * LINE_BYTES_MAX as u64);
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut bytes)).map_err(of("read", path))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let cut = (bytes.len() - whole) as u64;
    if cut > 0 {
        file.set_len(length - cut).and_then(|()| file.sync_data()).map_err(of("cut", path))?;
    }
    if whole == 0 {
        return Ok((Newest::None, cut));
    }
    let lines = &bytes[..whole - 1];
    let start = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let head = std::str::from_utf8(&lines[start..]).ok().and_then(|line| chain::parse(line).ok());
    Ok((head.map_or(Newest::Damaged, |(_, head)| Newest::At(head)), cut))
}
