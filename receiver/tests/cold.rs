//! Object storage and the receiver as a process: exports and imports while epochs come, points are thinned out, the domain is
//! forgotten, the receiver is killed, the key is changed, and objects are damaged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{DEVICE_STATE, Daemon, PAGE, Part, PartId, Stream, WAIT, open, xml};
use tempfile::TempDir;
use tonic::{Code, Status, Streaming};
use vmdr_codec::{Disk, Layout, RamBlock};
use vmdr_proto::control::{
    ColdDomain, ColdListRequest, DomainRequest, ExportReport, ExportRequest, GrantRequest, ImportReport, ImportRequest,
    Progress,
};
use vmdr_proto::replication::{EpochKind, to_receiver};

const UUID: &str = "33333333-1111-4111-8111-111111111111";
/// Long enough not to be in sealed bytes by chance.
const NAME: &str = "accounting-of-example-org";
const KEY: &str = "8f1d0c6b5a49382716051423324150617f8e9dacbbcad9e8f70615243342516a";
const OTHER_KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const RAM_PAGES: u64 = 512;
const DISK_BYTES: u64 = 8 << 20;
const SECOND_NS: u64 = 1_000_000_000;

/// What a guest has; it does not compress.
#[derive(Clone, PartialEq)]
struct Guest {
    epoch: u64,
    ram: Vec<u8>,
    disk: Vec<u8>,
    random: u64,
}

impl Guest {
    fn new() -> Self {
        let mut guest =
            Guest { epoch: 1, ram: vec![0; RAM_PAGES as usize * PAGE], disk: vec![0; DISK_BYTES as usize], random: 1 };
        let (mut ram, mut disk) = (std::mem::take(&mut guest.ram), std::mem::take(&mut guest.disk));
        guest.fill(&mut ram);
        guest.fill(&mut disk);
        (guest.ram, guest.disk) = (ram, disk);
        guest
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            word.copy_from_slice(&self.random.to_le_bytes());
        }
    }

    /// A cut each second.
    fn part(&self, kind: EpochKind, content: impl FnOnce(&mut vmdr_codec::Encoder)) -> Part {
        let id = PartId { generation: 1, epoch: self.epoch, part: 0, kind, last: true };
        let mut part = Part::make(&id, content);
        for message in &mut part.messages {
            if let to_receiver::Message::End(end) = message {
                end.cut_unix_ns += self.epoch * SECOND_NS;
            }
        }
        part
    }

    fn seed(&self) -> Part {
        let block =
            RamBlock { name: "pc.ram".to_owned(), used_bytes: RAM_PAGES * PAGE as u64, page_bytes: PAGE as u32 };
        let disks = vec![Disk { target: "vda".to_owned(), size_bytes: DISK_BYTES }];
        let layout = Layout { machine: "pc-q35-10.0".to_owned(), ram: vec![block], disks };
        self.part(EpochKind::Seed, |encoder| {
            encoder.layout(&layout).unwrap();
            encoder.domain_xml(&xml(UUID).replace("<name>web<", &format!("<name>{NAME}<"))).unwrap();
            for (page, content) in self.ram.as_chunks::<PAGE>().0.iter().enumerate() {
                encoder.ram_page(0, page as u64, content);
            }
            encoder.disk_data(0, 0, &self.disk);
            encoder.device_state(DEVICE_STATE).unwrap();
        })
    }

    /// The next epoch: a page and a disk block far from it are other.
    fn step(&mut self) -> Part {
        self.epoch += 1;
        let mut content = [0; PAGE];
        self.fill(&mut content);
        let page = self.epoch * 7 % RAM_PAGES;
        let block = (self.epoch * 577 * PAGE as u64) % DISK_BYTES;
        self.ram[page as usize * PAGE..][..PAGE].copy_from_slice(&content);
        self.disk[block as usize..][..PAGE].copy_from_slice(&content);
        self.part(EpochKind::Delta, |encoder| {
            encoder.ram_page(0, page, &content);
            encoder.disk_data(0, block, &content);
            encoder.device_state(DEVICE_STATE).unwrap();
        })
    }

    /// Asserts that this is what a receiver's standby has, at once.
    fn assert_stored(&self, daemon: &Daemon, what: &str) {
        let images = daemon.images(UUID);
        assert!(std::fs::read(images.join("ram/0.img")).unwrap() == self.ram, "{what}: RAM is other");
        assert!(std::fs::read(images.join("disk/vda.raw")).unwrap() == self.disk, "{what}: the disk is other");
    }
}

/// A bucket and keys in a directory of their own.
struct Storage {
    directory: TempDir,
}

impl Storage {
    fn new() -> Self {
        let storage = Storage { directory: tempfile::tempdir().unwrap() };
        std::fs::create_dir(storage.bucket()).unwrap();
        for (name, key) in [("key", KEY), ("other", OTHER_KEY)] {
            let path = storage.path(name);
            std::fs::write(&path, key).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        storage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn bucket(&self) -> PathBuf {
        self.path("bucket")
    }

    fn config(&self, further: &str) -> String {
        let (bucket, key) = (self.bucket(), self.path("key"));
        format!("[cold]\nurl = \"file://{}\"\nkey_file = {key:?}\n{further}", bucket.display())
    }

    fn of_kind(&self, kind: &str) -> Vec<PathBuf> {
        let mut found = files(&self.bucket());
        found.retain(|path| path.to_string_lossy().contains(kind));
        found
    }

    fn chunks(&self) -> Vec<PathBuf> {
        self.of_kind("/chunks/")
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    all.sort();
    all
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// A guest whose first copy is durable, and the stream that it came by.
async fn seeded(daemon: &Daemon) -> (Guest, Stream) {
    let guest = Guest::new();
    let mut stream = connected(daemon).await;
    stream.send_part(guest.seed()).await;
    assert_eq!(stream.durable().await.epoch, 1);
    (guest, stream)
}

async fn connected(daemon: &Daemon) -> Stream {
    let mut stream = Stream::bare(&mut daemon.agent().await).await;
    let first = vmdr_proto::replication::Open { domain_name: NAME.to_owned(), ..open(UUID, 1) };
    stream.send(to_receiver::Message::Open(first)).await;
    assert!(matches!(stream.answer().await, common::Answer::Welcome(_)));
    stream
}

async fn more(guest: &mut Guest, stream: &mut Stream, epochs: u64) {
    for _ in 0..epochs {
        stream.send_part(guest.step()).await;
        assert_eq!(stream.durable().await.epoch, guest.epoch);
    }
}

/// The last message of a stream of progress.
async fn last(mut stream: Streaming<Progress>) -> Result<Progress, Status> {
    let mut last = Progress::default();
    while let Some(progress) = tokio::time::timeout(WAIT, stream.message()).await.expect("progress in time")? {
        last = progress;
    }
    Ok(last)
}

async fn exporting(daemon: &Daemon, point: &str) -> Result<Streaming<Progress>, Status> {
    let request = ExportRequest { domain: NAME.to_owned(), point: point.to_owned(), prune: false };
    Ok(daemon.control().await.export(request).await?.into_inner())
}

async fn export(daemon: &Daemon, point: &str) -> Result<ExportReport, Status> {
    Ok(last(exporting(daemon, point).await?).await?.exported.expect("a report"))
}

async fn import(daemon: &Daemon, point: &str) -> Result<ImportReport, Status> {
    let request = ImportRequest { domain: NAME.to_owned(), point: point.to_owned(), ..ImportRequest::default() };
    Ok(last(daemon.control().await.import(request).await?.into_inner()).await?.imported.expect("a report"))
}

async fn listed(daemon: &Daemon) -> ColdDomain {
    let mut reply = daemon.control().await.cold_list(ColdListRequest::default()).await.unwrap().into_inner();
    assert_eq!(reply.domains.len(), 1, "{reply:?}");
    reply.domains.remove(0)
}

async fn points(daemon: &Daemon) -> Result<Vec<String>, Status> {
    let reply = daemon.control().await.points(DomainRequest { domain: UUID.to_owned() }).await?;
    Ok(reply.into_inner().points.into_iter().map(|point| point.id).collect())
}

/// Waits until something is so.
async fn until(what: &str, so: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !so().await {
        assert!(Instant::now() < deadline, "not {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_receiver_has_the_guest_from_nothing_but_an_s3_bucket_and_nobody_else_can_read_it() {
    let storage = Storage::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = vmdr_test_s3::Server::start(listener, &storage.path("s3")).unwrap();
    let (endpoint, region, key) = (server.endpoint(), vmdr_test_s3::REGION, storage.path("key"));
    let config = format!(
        "[cold]\nurl = \"s3://bucket/a/b\"\nendpoint = \"{endpoint}\"\nregion = \"{region}\"\nkey_file = {key:?}\n"
    );
    let environment = [
        ("AWS_ACCESS_KEY_ID", vmdr_test_s3::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", vmdr_test_s3::SECRET_KEY),
        ("VMDR_LOG", "debug"),
    ];
    let here = Daemon::start_with(&config, &environment).await;
    let (mut guest, mut stream) = seeded(&here).await;
    more(&mut guest, &mut stream, 5).await;
    let whole = export(&here, "").await.unwrap();
    assert_eq!((whole.point.as_str(), whole.base.as_str(), whole.already), ("1-6", "", false));
    assert_eq!(whole.sent_chunks, 10, "{whole:?}");
    let older = guest.clone();
    more(&mut guest, &mut stream, 2).await;
    let next = export(&here, "").await.unwrap();
    assert_eq!((next.point.as_str(), next.base.as_str()), ("1-8", "1-6"));
    // Two epochs: two pages of RAM, two blocks of the disk.
    assert!(next.sent_chunks <= 4 && next.read_bytes <= 4 << 20, "{next:?}");
    assert!(next.sent_bytes < whole.sent_bytes / 2, "{next:?}");
    assert!(export(&here, "").await.unwrap().already);

    // Of two fresh ones each has its point.
    for (point, guest) in [("", &guest), ("1-6", &older)] {
        let there = Daemon::start_with(&config, &environment).await;
        let report = import(&there, point).await.unwrap();
        assert_eq!((report.name.as_str(), report.uuid.as_str()), (NAME, UUID));
        assert_eq!(points(&there).await.unwrap(), [format!("1-{}", guest.epoch)]);
        guest.assert_stored(&there, "imported");
        let again = import(&there, point).await.unwrap_err();
        assert!(again.code() == Code::FailedPrecondition && again.message().contains("vmdr forget"), "{again:?}");
        for secret in [KEY, vmdr_test_s3::SECRET_KEY] {
            assert!(!there.log().contains(secret) && !here.log().contains(secret));
        }
    }

    // All that is in the bucket, and what it is called.
    let objects = files(server.objects());
    assert!(objects.len() > 12, "{objects:?}");
    let state = std::fs::read(here.images(UUID).join("ram/0.img")).unwrap();
    let known: HashSet<[u8; 16]> =
        guest.ram.as_chunks::<16>().0.iter().chain(guest.disk.as_chunks::<16>().0).copied().collect();
    assert!(state.as_chunks::<16>().0.iter().all(|piece| known.contains(piece)), "what is looked for can be found");
    for path in objects {
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(16).any(|piece| known.contains(piece)), "{} has guest data", path.display());
        for what in [NAME.as_bytes(), b"<domain", b"pc-q35", b"pc.ram", b"\"epoch\"", DEVICE_STATE] {
            let what_text = String::from_utf8_lossy(what).into_owned();
            assert!(!contains(&bytes, what), "{} has {what_text}", path.display());
            assert!(!contains(path.to_string_lossy().as_bytes(), what), "{} is called {what_text}", path.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_key_or_objects_is_said_and_nothing_becomes_a_standby() {
    let storage = Storage::new();
    let here = Daemon::start_with(&storage.config(""), &[]).await;
    let (guest, _stream) = seeded(&here).await;
    export(&here, "").await.unwrap();
    let there = Daemon::start_with(&storage.config(""), &[]).await;
    let nothing = async |what: &str| {
        assert_eq!(points(&there).await.unwrap_err().code(), Code::NotFound, "{what} left something");
        let left: Vec<_> =
            files(&there.state()).into_iter().filter(|path| path.to_string_lossy().contains(UUID)).collect();
        assert!(left.is_empty(), "{what} left {left:?}");
    };
    let refused = async |what: &str, code, says: &[&str]| {
        let error = import(&there, "").await.unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error:?}");
        for says in says {
            assert!(error.message().contains(says), "{what}: {}", error.message());
        }
        nothing(what).await;
    };
    let other = storage.path("other").to_str().unwrap().to_owned();
    let request = ImportRequest { domain: UUID.to_owned(), key_file: other, ..ImportRequest::default() };
    let error = last(there.control().await.import(request).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("is sealed under key") && !error.message().contains(OTHER_KEY), "{error:?}");
    nothing("another key").await;

    let [key, manifest] = ["/key", "/points/"].map(|kind| storage.of_kind(kind).remove(0));
    for path in [key, manifest, storage.chunks()[0].clone(), storage.chunks()[9].clone()] {
        let good = std::fs::read(&path).unwrap();
        let shown = path.file_name().unwrap().to_str().unwrap();
        let mut flipped = good.clone();
        flipped[good.len() * 2 / 3] ^= 1;
        for (what, bytes) in [("flipped", &flipped[..]), ("short", &good[..good.len() - 1]), ("empty", &[])] {
            std::fs::write(&path, bytes).unwrap();
            refused(&format!("{shown} {what}"), Code::DataLoss, &[shown, "damaged"]).await;
        }
        std::fs::write(&path, &good).unwrap();
        let aside = storage.path("aside");
        std::fs::rename(&path, &aside).unwrap();
        let code =
            if shown == "key" || path.to_string_lossy().contains("/points/") { Code::NotFound } else { Code::DataLoss };
        refused(&format!("{shown} missing"), code, &[]).await;
        std::fs::rename(&aside, &path).unwrap();
    }
    import(&there, "").await.unwrap();
    guest.assert_stored(&there, "after all that");
    let noted = std::fs::read_to_string(there.state().join(UUID).join("imported")).unwrap();
    assert_eq!(noted.trim(), "1-1");

    // A host that knows of a newer generation than the point's.
    let there = Daemon::start_with(&storage.config(""), &[]).await;
    let ownerships = vmdr_daemon::ownership::Ownerships::new(&there.ownerships(), &storage.path("confirmed"));
    ownerships.transition(UUID, NAME, &vmdr_daemon::ownership::Event::Activating(2), "activated here").unwrap();
    let error = import(&there, "").await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("generation 2") && error.message().contains(UUID), "{error:?}");
    assert_eq!(points(&there).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_of_its_point_whatever_comes_and_goes_meanwhile() {
    let storage = Storage::new();
    let tiers = "[retention]\ntiers = [{ every_seconds = 0, for_seconds = 2 }]\n";
    let here = Daemon::start_with(&format!("{tiers}{}", storage.config("bytes_per_second = 2500000\n")), &[]).await;
    let (mut guest, mut stream) = seeded(&here).await;
    more(&mut guest, &mut stream, 3).await;
    let exported = guest.clone();
    let mut progress = exporting(&here, &format!("1-{}", guest.epoch)).await.unwrap();
    progress.message().await.unwrap().unwrap();
    // A second one is refused, so is an import.
    assert_eq!(export(&here, "").await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(import(&here, "").await.unwrap_err().code(), Code::NotFound);
    more(&mut guest, &mut stream, 60).await;
    let point = format!("1-{}", exported.epoch);
    until("thinned out", async || points(&here).await.unwrap().len() < 20).await;
    assert!(points(&here).await.unwrap().contains(&point), "what is being read stays");
    // The guest is copied anew, too.
    guest.epoch += 1;
    stream.send_part(guest.seed()).await;
    assert_eq!(stream.durable().await.epoch, guest.epoch);
    assert!(storage.of_kind("/points/").is_empty(), "it was too fast to show anything");
    let report = last(progress).await.unwrap().exported.unwrap();
    assert_eq!(report.point, point);
    // The next epoch thins it out.
    more(&mut guest, &mut stream, 1).await;
    until("let go", async || !points(&here).await.unwrap().contains(&point)).await;
    // What changed since is not known any more: all is read, and little is sent.
    let next = export(&here, "").await.unwrap();
    assert_eq!((next.base.as_str(), next.read_bytes), ("", RAM_PAGES * PAGE as u64 + DISK_BYTES));
    for (point, guest) in [(point.as_str(), &exported), ("", &guest)] {
        let there = Daemon::start_with(&storage.config(""), &[]).await;
        import(&there, point).await.unwrap();
        guest.assert_stored(&there, point);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_ends_with_its_domain_or_its_receiver_and_nothing_half_is_listed() {
    let storage = Storage::new();
    let mut here = Daemon::start_with(&storage.config("bytes_per_second = 2500000\nparallel = 1\n"), &[]).await;
    let (guest, stream) = seeded(&here).await;
    // Killed, and ended in order.
    for killed in [true, false] {
        let progress = exporting(&here, "").await.unwrap();
        let before = storage.chunks().len();
        until("some chunks", async || storage.chunks().len() > before).await;
        if killed {
            here.kill();
        } else {
            assert_eq!(here.terminate().await, Some(0), "{}", here.log());
        }
        last(progress).await.unwrap_err();
        here.start_again().await;
        assert_eq!(listed(&here).await.points.len(), 0);
    }
    drop(stream);
    // Forgotten, with more to read than waits to be sent.
    std::fs::remove_dir_all(storage.bucket().join(UUID).join("chunks")).unwrap();
    let progress = exporting(&here, "").await.unwrap();
    let before = storage.chunks().len();
    until("another chunk", async || storage.chunks().len() > before).await;
    let forget = DomainRequest { domain: UUID.to_owned() };
    here.control().await.forget(forget).await.unwrap();
    let error = last(progress).await.unwrap_err();
    assert!(error.message().contains("recovery point"), "{error:?}");
    assert_eq!(listed(&here).await.points.len(), 0);
    // Another life of it, with the same numbers: nothing is built on what was.
    let (mut again, mut stream) = seeded(&here).await;
    assert!(again == guest);
    more(&mut again, &mut stream, 1).await;
    let sent = storage.chunks().len();
    let report = export(&here, "").await.unwrap();
    assert_eq!(report.base, "");
    assert!(report.sent_chunks as usize <= 10 - sent + 2, "{report:?}, {sent} were there");
    let there = Daemon::start_with(&storage.config(""), &[]).await;
    import(&there, "").await.unwrap();
    again.assert_stored(&there, "imported");
}

/// Where a chunk was there is a pipe that nobody writes, so that whoever reads it waits.
fn block(path: &Path, aside: &Path) {
    std::fs::rename(path, aside).unwrap();
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

/// An import by a fresh receiver that has begun to write and waits for a chunk; and that chunk. Names of chunks say nothing of
/// what is in them: with the one that is read first nothing is written yet.
async fn stuck_import(storage: &Storage) -> (Daemon, Streaming<Progress>, PathBuf) {
    for blocked in storage.chunks() {
        block(&blocked, &storage.path("aside"));
        let there = Daemon::start_with(&storage.config("parallel = 1\n"), &[]).await;
        let request = ImportRequest { domain: NAME.to_owned(), ..ImportRequest::default() };
        let stuck = there.control().await.import(request).await.unwrap().into_inner();
        let begun = || files(&there.state()).iter().any(|path| path.to_string_lossy().ends_with(".img"));
        let deadline = Instant::now() + Duration::from_secs(5);
        while !begun() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if begun() {
            return (there, stuck, blocked);
        }
        drop(there);
        std::fs::remove_file(&blocked).unwrap();
        std::fs::rename(storage.path("aside"), &blocked).unwrap();
    }
    panic!("no import has begun to write");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_broken_off_leaves_nothing_to_activate_and_is_run_again() {
    let storage = Storage::new();
    let here = Daemon::start_with(&storage.config(""), &[]).await;
    let (guest, _stream) = seeded(&here).await;
    export(&here, "").await.unwrap();
    let (mut there, stuck, blocked) = stuck_import(&storage).await;
    // Meanwhile: not twice, and there is nothing yet.
    assert_eq!(import(&there, "").await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(points(&there).await.unwrap_or_default(), Vec::<String>::new());
    there.kill();
    last(stuck).await.unwrap_err();
    there.start_again().await;
    assert_eq!(points(&there).await.unwrap_or_default(), Vec::<String>::new());
    std::fs::remove_file(&blocked).unwrap();
    std::fs::rename(storage.path("aside"), &blocked).unwrap();
    import(&there, "").await.unwrap();
    guest.assert_stored(&there, "imported in the second go");

    // An agent that comes within an import takes the domain over; what it sends is not removed with the import.
    let (there, stuck, blocked) = stuck_import(&storage).await;
    // It is nobody's, though: the operator says that this peer may.
    let grant = GrantRequest { domain: UUID.to_owned(), peer: common::AGENT.to_owned(), withdraw: false };
    there.control().await.grant(grant).await.unwrap();
    let (mut other, mut stream) = seeded(&there).await;
    // Whoever reads the pipe gets nothing out of it, and goes on.
    drop(std::fs::File::options().write(true).open(&blocked).unwrap());
    last(stuck).await.unwrap_err();
    more(&mut other, &mut stream, 2).await;
    assert_eq!(points(&there).await.unwrap()[0], "1-3");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_master_key_rewrites_the_data_key_and_nothing_else() {
    let storage = Storage::new();
    let mut here = Daemon::start_with(&storage.config(""), &[]).await;
    let (mut guest, mut stream) = seeded(&here).await;
    export(&here, "").await.unwrap();
    let read = |path: &PathBuf| (path.clone(), std::fs::read(path).unwrap());
    let before: Vec<_> = files(&storage.bucket()).iter().map(read).collect();
    assert_eq!(here.terminate().await, Some(0));
    let (old, new) = (storage.path("key"), storage.path("other"));
    let rotated = storage.config("").replace(old.to_str().unwrap(), new.to_str().unwrap());
    // Without the old one it is refused, and nothing is begun anew beside what is there.
    here.config = rotated.clone();
    here.start_again().await;
    let error = export(&here, "").await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("sealed under key"), "{error:?}");
    assert!(files(&storage.bucket()).iter().map(read).collect::<Vec<_>>() == before);
    here.terminate().await;
    here.config = format!("{rotated}old_key_files = [{old:?}]\n");
    here.start_again().await;
    drop(stream);
    stream = connected(&here).await;
    more(&mut guest, &mut stream, 1).await;
    let report = export(&here, "").await.unwrap();
    assert!(report.rewrapped && report.base == "1-1", "{report:?}");
    let changed: Vec<_> = before.iter().filter(|(path, bytes)| std::fs::read(path).unwrap() != *bytes).collect();
    assert!(changed.len() == 1 && changed[0].1.len() < 200, "{:?}", changed.iter().map(|c| &c.0).collect::<Vec<_>>());
    // The new one alone is enough, the old one alone is not.
    let there = Daemon::start_with(&storage.config(""), &[]).await;
    assert_eq!(import(&there, "").await.unwrap_err().code(), Code::FailedPrecondition);
    let there = Daemon::start_with(&rotated, &[]).await;
    import(&there, "").await.unwrap();
    guest.assert_stored(&there, "imported");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_does_not_begin_anew_where_its_storage_is_not_mounted() {
    let storage = Storage::new();
    let here = Daemon::start_with(&storage.config(""), &[]).await;
    let (mut guest, mut stream) = seeded(&here).await;
    export(&here, "").await.unwrap();
    more(&mut guest, &mut stream, 1).await;
    let aside = storage.path("aside");
    std::fs::rename(storage.bucket(), &aside).unwrap();
    let error = export(&here, "").await.unwrap_err();
    assert!(error.message().contains("not there"), "{error:?}");
    assert!(!storage.bucket().exists());
    std::fs::create_dir(storage.bucket()).unwrap();
    let error = export(&here, "").await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    let exported = here.state().join(UUID).join("exported");
    for says in ["1-1 was exported", "mounted", exported.to_str().unwrap()] {
        assert!(error.message().contains(says), "{error:?}");
    }
    assert!(files(&storage.bucket()).is_empty());
    std::fs::remove_dir(storage.bucket()).unwrap();
    std::fs::rename(&aside, storage.bucket()).unwrap();
    assert_eq!(export(&here, "").await.unwrap().base, "1-1");
    std::fs::remove_dir_all(storage.bucket()).unwrap();
    std::fs::create_dir(storage.bucket()).unwrap();
    std::fs::remove_file(&exported).unwrap();
    assert!(!export(&here, "").await.unwrap().already);
}
