//! Points go to a bucket and come back: a local directory, and an S3 server in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{PATTERN, Point, UUID, chunk_files, files, keys, local, restored, s3};
use rand::SeedableRng;
use rand::rngs::StdRng;
use vmdr_cold::keys::MasterKey;
use vmdr_cold::{
    Array, Bucket, ColdError, ExportOptions, Head, PruneOptions, PruneReport, Range, Source, SourceError, Vault,
    domains, export, prune,
};

/// Three points go there and come back.
async fn round_trip(bucket: &Bucket) {
    assert!(domains(bucket).await.unwrap().is_empty());
    assert!(Vault::open(bucket, UUID, &keys()).await.unwrap().is_none());
    let vault = Vault::open_or_begin(bucket, UUID, &keys()).await.unwrap();
    let first = Point::new(1);
    let mut random = StdRng::seed_from_u64(2);
    let second = first.next(&mut random, 3);
    let third = second.next(&mut random, 4);

    let whole = first.export(&vault, None).await.unwrap();
    // 14 chunks, of which 7 are other than zero and other than another.
    assert_eq!((whole.sent_chunks, whole.already), (7, false), "{whole:?}");
    let again = first.export(&vault, None).await.unwrap();
    assert_eq!((again.sent_bytes, again.already), (0, true));

    let next = second.export(&vault, Some(&whole.object)).await.unwrap();
    println!("first: {} bytes sent, second: {} of {} read", whole.sent_bytes, next.sent_bytes, next.read_bytes);
    assert!(next.sent_chunks <= 3 && next.read_bytes <= 3 << 20, "{next:?}");
    assert_eq!(next.base.as_deref(), Some(&*whole.object));
    // Without a base everything is read, and still only what is new is sent.
    let last = third.export(&vault, None).await.unwrap();
    assert!(last.sent_chunks <= 4 && last.read_bytes > 5 << 20, "{last:?}");

    // Another process, with nothing but the bucket and the key.
    assert_eq!(domains(bucket).await.unwrap(), [UUID]);
    let vault = Vault::open(bucket, UUID, &keys()).await.unwrap().unwrap();
    let points = vault.points().await.unwrap();
    let listed: Vec<u64> = points.iter().map(|point| point.head.as_ref().unwrap().epoch).collect();
    assert_eq!(listed, [3, 2, 1]);
    let head = points[1].head.as_ref().unwrap();
    assert_eq!((head.domain.as_str(), head.application, head.ram_bytes), ("web1", true, 8 << 20));
    for (point, name) in [(&first, Some("1-1")), (&second, Some("1-2")), (&third, None)] {
        let (object, _) = vault.find(name).await.unwrap();
        point.assert_restored(&vault, vault.manifest(&object).await.unwrap()).await;
    }
    let error = vault.find(Some("1-9")).await.unwrap_err();
    assert!(matches!(&error, ColdError::NoPoint { .. }) && error.to_string().contains("--list"), "{error}");
}

#[tokio::test]
async fn points_come_back_from_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    round_trip(&local(directory.path())).await;
}

#[tokio::test]
async fn points_come_back_from_an_s3_server() {
    let directory = tempfile::tempdir().unwrap();
    let (server, location) = s3(directory.path());
    let bucket = Bucket::open(&location).unwrap();
    round_trip(&bucket).await;
    assert!(!chunk_files(&server.objects().join("some/prefix")).is_empty());
    // Pruned there too: two of three go, and what only they needed.
    let vault = Vault::open(&bucket, UUID, &keys()).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await; // Its times are whole seconds.
    let report = prune(&vault, &pruning(1, Duration::ZERO)).await.unwrap();
    assert_eq!((report.kept, report.dropped.len()), (1, 2), "{report:?}");
    assert!(report.deleted_chunks > 0, "{report:?}");
    let (object, _) = vault.find(None).await.unwrap();
    restored(&vault, vault.manifest(&object).await.unwrap()).await.unwrap();
    // Who may not is told so.
    let denied =
        vmdr_cold::Location { credentials: Some((vmdr_test_s3::ACCESS_KEY.into(), "WRONG".into())), ..location };
    let error = domains(&Bucket::open(&denied).unwrap()).await.unwrap_err().to_string();
    assert!(error.contains("list"), "{error}");
}

/// Keeps points of the last `minutes` alone.
fn pruning(minutes: u64, grace: Duration) -> PruneOptions {
    let tiers = vec![vmdr_cold::Tier { every_ns: 0, for_ns: minutes * 60_000_000_000 - 1 }];
    PruneOptions { tiers, grace, owner: "test".to_owned(), exported: None }
}

#[tokio::test]
async fn nothing_of_the_guest_can_be_read_without_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let point = Point::new(3);
    point.export(&vault, None).await.unwrap();
    let found = files(directory.path());
    assert!(found.len() > 8);
    for path in found {
        let bytes = std::fs::read(&path).unwrap();
        for needle in [PATTERN, &PATTERN[4..20], b"web1", b"pc-q35", b"<domain", &point.ram[4096..4112]] {
            assert!(!bytes.windows(needle.len()).any(|window| window == needle), "{}", path.display());
            assert!(!path.to_string_lossy().as_bytes().windows(needle.len()).any(|window| window == needle));
        }
    }
    let wrong = [MasterKey::new([9; 32])];
    let error = Vault::open(&bucket, UUID, &wrong).await.unwrap_err();
    assert!(matches!(&error, ColdError::Key { .. }), "{error}");
    for part in [keys()[0].id().to_string(), wrong[0].id().to_string(), "configure the key".to_owned()] {
        assert!(error.to_string().contains(&part), "{error}");
    }
    assert!(Vault::open(&bucket, UUID, &[]).await.is_err());
}

#[tokio::test]
async fn another_master_key_rewrites_one_small_object() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let (old, new) = (keys().remove(0), MasterKey::new([5; 32]));
    let mut vault = Vault::open_or_begin(&bucket, UUID, std::slice::from_ref(&old)).await.unwrap();
    let point = Point::new(4);
    point.export(&vault, None).await.unwrap();
    let before: Vec<_> = files(directory.path()).iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(vault.rewrap(&new).await.unwrap());
    assert!(!vault.rewrap(&new).await.unwrap());
    let after: Vec<_> = files(directory.path()).iter().map(|path| std::fs::read(path).unwrap()).collect();
    let changed: Vec<usize> = before.iter().zip(&after).filter(|(a, b)| a != b).map(|(a, _)| a.len()).collect();
    assert_eq!((before.len(), changed.len()), (after.len(), 1));
    assert!(changed[0] < 200, "{changed:?}");
    assert!(Vault::open(&bucket, UUID, &[old]).await.is_err());
    let vault = Vault::open(&bucket, UUID, &[new]).await.unwrap().unwrap();
    let (object, _) = vault.find(None).await.unwrap();
    point.assert_restored(&vault, vault.manifest(&object).await.unwrap()).await;
    // A key that is lost is not replaced by another one.
    std::fs::remove_file(directory.path().join(UUID.to_string()).join("key")).unwrap();
    let error = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap_err().to_string();
    assert!(error.contains("missing") && error.contains("bring it back"), "{error}");
}

#[tokio::test]
async fn damage_is_found_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let point = Point::new(5);
    let report = point.export(&vault, None).await.unwrap();
    let manifest = vault.manifest(&report.object).await.unwrap();
    let chunks = chunk_files(directory.path());
    let named = |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().into_owned();
    for (i, path) in chunks.iter().enumerate() {
        let good = std::fs::read(path).unwrap();
        let other = std::fs::read(&chunks[(i + 1) % chunks.len()]).unwrap();
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 4;
            bytes
        };
        let places = [0, 9, 13, 20, 40, 48, 49, good.len() / 2, good.len() - 1];
        let mut bad: Vec<Vec<u8>> = places.into_iter().map(flipped).collect();
        bad.extend([Vec::new(), good[..30].to_vec(), good[..good.len() - 1].to_vec(), good[..good.len() / 2].to_vec()]);
        // Another chunk in its place, whole as it is.
        bad.push(other);
        for (n, bytes) in bad.into_iter().enumerate().filter(|(n, _)| i == 0 || n % 5 == i % 5) {
            std::fs::write(path, bytes).unwrap();
            let error = restored(&vault, manifest.clone()).await.unwrap_err();
            assert!(matches!(error, ColdError::Damaged { .. } | ColdError::Version { .. }), "case {n}: {error}");
            assert!(error.to_string().contains(&named(path)), "case {n}: {error}");
        }
        std::fs::remove_file(path).unwrap();
        let error = restored(&vault, manifest.clone()).await.unwrap_err();
        assert!(matches!(&error, ColdError::Missing { .. }) && error.to_string().contains(&named(path)), "{error}");
        // The next export mends what is missing.
        if i == 0 {
            let next = point.next(&mut StdRng::seed_from_u64(1), 0);
            let mended = next.export(&vault, Some(&report.object)).await.unwrap();
            assert_eq!((mended.sent_chunks, mended.read_bytes > 0), (1, true), "{mended:?}");
        }
        std::fs::write(path, good).unwrap();
    }
    point.assert_restored(&vault, manifest).await;
    // A point with a damaged manifest is listed as such, and the others as they are.
    let path = directory.path().join(UUID.to_string()).join(&report.object);
    let good = std::fs::read(&path).unwrap();
    for bytes in [&good[..0], &good[..100], &good[..good.len() - 1], &[good.clone(), vec![0]].concat()] {
        std::fs::write(&path, bytes).unwrap();
        assert!(vault.manifest(&report.object).await.is_err(), "{} of {} bytes", bytes.len(), good.len());
        let (_, head) = vault.find(None).await.unwrap();
        assert_eq!(head.epoch, 2);
        assert!(vault.points().await.unwrap().len() == 2);
        // What it needs is not known: nothing is deleted.
        if bytes.len() <= 100 {
            let error = prune(&vault, &pruning(1, Duration::ZERO)).await.unwrap_err().to_string();
            assert!(error.contains("nothing is pruned"), "{error}");
        }
    }
}

#[tokio::test]
async fn an_older_point_is_not_taken_for_a_damaged_newest_one() {
    let directory = tempfile::tempdir().unwrap();
    let vault = Vault::open_or_begin(&local(directory.path()), UUID, &keys()).await.unwrap();
    let first = Point::new(14);
    let second = first.next(&mut StdRng::seed_from_u64(3), 2);
    first.export(&vault, None).await.unwrap();
    let newest = second.export(&vault, None).await.unwrap().object;
    std::fs::write(directory.path().join(UUID.to_string()).join(&newest), b"rubbish").unwrap();
    for point in [None, Some("1-2")] {
        let error = vault.find(point).await.unwrap_err().to_string();
        assert!(error.contains(&newest) && error.contains("choose another"), "{error}");
    }
    assert_eq!(vault.find(Some("1-1")).await.unwrap().1.epoch, 1);
}

#[tokio::test]
async fn an_export_whose_key_was_replaced_meanwhile_lists_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    // Two receivers that begin at once, on a storage that lets both write the key.
    let path = directory.path().join(UUID.to_string()).join("key");
    let own = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = Point::new(15).export(&vault, None).await.unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let error = Point::new(15).export(&vault, None).await.unwrap_err().to_string();
    assert!(error.contains("another data key"), "{error}");
    assert!(vault.points().await.unwrap().is_empty());
    std::fs::write(&path, own).unwrap();
    Point::new(15).export(&vault, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn receivers_that_begin_at_once_have_one_key_and_export_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let first = Point::new(16);
    let mut random = StdRng::seed_from_u64(4);
    let points: Vec<Point> =
        std::iter::successors(Some(first), |point| Some(point.next(&mut random, 2))).take(4).collect();
    let exports = points.iter().map(|point| {
        let (bucket, point) = (bucket.clone(), point.clone());
        tokio::spawn(async move {
            let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
            point.export(&vault, None).await.unwrap().object
        })
    });
    let exports: Vec<_> = exports.collect();
    for (export, point) in exports.into_iter().zip(&points) {
        let object = export.await.unwrap();
        let vault = Vault::open(&bucket, UUID, &keys()).await.unwrap().unwrap();
        point.assert_restored(&vault, vault.manifest(&object).await.unwrap()).await;
    }
}

#[tokio::test]
async fn there_are_not_more_points_than_can_be_listed() {
    let directory = tempfile::tempdir().unwrap();
    let vault = Vault::open_or_begin(&local(directory.path()), UUID, &keys()).await.unwrap();
    let points = directory.path().join(UUID.to_string()).join("points");
    std::fs::create_dir(&points).unwrap();
    for n in 0..20_000 {
        std::fs::write(points.join(format!("{n:020}-1-1")), b"").unwrap();
    }
    let error = Point::new(17).export(&vault, None).await.unwrap_err().to_string();
    assert!(error.contains("20000 points") && error.contains("--prune"), "{error}");
    assert!(chunk_files(directory.path()).is_empty());
    std::fs::remove_file(points.join(format!("{:020}-1-1", 7))).unwrap();
    Point::new(17).export(&vault, None).await.unwrap();
}

#[tokio::test]
async fn a_broken_off_export_is_not_offered_and_goes_on_cheaply() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let point = Point::new(6);
    let ending = Arc::new(AtomicBool::new(false));
    let options = ExportOptions { ending: ending.clone(), parallel: 1, ..ExportOptions::default() };
    let mut reading = Arc::into_inner(point.reading()).unwrap();
    let after_three = |progress: vmdr_cold::ExportProgress| {
        if progress.sent_bytes > 2 << 20 {
            ending.store(true, Ordering::Relaxed);
        }
    };
    reading.pause = Duration::from_millis(300);
    let done = export(&vault, point.head.clone(), point.guest.clone(), Arc::new(reading), &options, &after_three).await;
    assert!(matches!(done, Err(ColdError::Ended)), "{done:?}");
    let there = chunk_files(directory.path()).len() as u64;
    assert!(there >= 2, "{there} chunks had been sent");
    assert!(vault.points().await.unwrap().is_empty());
    assert!(matches!(vault.find(None).await, Err(ColdError::NoPoint { .. })));
    let report = point.export(&vault, None).await.unwrap();
    assert_eq!(report.sent_chunks, 7 - there, "what is there is not sent again");
    point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
}

#[tokio::test]
async fn an_upload_that_fails_ends_the_export_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    // A file where the directory of the chunks would be.
    std::fs::write(directory.path().join(UUID.to_string()).join("chunks"), b"x").unwrap();
    let error = Point::new(7).export(&vault, None).await.unwrap_err();
    assert!(matches!(&error, ColdError::Store { .. }), "{error}");
    assert!(vault.points().await.unwrap().is_empty());
}

#[tokio::test]
async fn chunks_go_when_no_point_needs_them_and_not_before_the_grace_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let mut points = vec![Point::new(8)];
    let mut random = StdRng::seed_from_u64(9);
    for _ in 0..4 {
        points.push(points[points.len() - 1].next(&mut random, 3));
    }
    for point in &points {
        point.export(&vault, None).await.unwrap();
    }
    let before = chunk_files(directory.path()).len();
    let all = prune(&vault, &PruneOptions { tiers: vec![], ..pruning(1, Duration::ZERO) }).await.unwrap();
    assert_eq!(all, PruneReport { kept: 5, ..PruneReport::default() });

    // Two points stay; what only the others needed is announced and stays, too.
    let grace = Duration::from_secs(3600);
    let options = pruning(2, grace);
    let report = prune(&vault, &options).await.unwrap();
    assert_eq!((report.kept, report.dropped.len(), report.marked_chunks), (2, 3, 0), "too young: {report:?}");
    let report = prune(&vault, &pruning(2, Duration::from_millis(1))).await.unwrap();
    assert!(report.marked_chunks > 0 && report.deleted_chunks == 0, "{report:?}");
    assert_eq!(chunk_files(directory.path()).len(), before);

    // An export that needs announced chunks sends them again: the sweep leaves those.
    let mut back = points[0].clone();
    back.head.epoch = 6;
    back.head.cut_unix_ns += 3600 * 1_000_000_000;
    let report = back.export(&vault, None).await.unwrap();
    assert!(report.sent_chunks > 0, "{report:?}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    let swept = prune(&vault, &PruneOptions { tiers: vec![], ..pruning(2, Duration::from_millis(1)) }).await.unwrap();
    assert!(swept.deleted_chunks > 0, "{swept:?}");
    assert!(chunk_files(directory.path()).len() < before);
    for (point, id) in [(&points[3], "1-4"), (&points[4], "1-5"), (&back, "1-6")] {
        let (object, _) = vault.find(Some(id)).await.unwrap();
        point.assert_restored(&vault, vault.manifest(&object).await.unwrap()).await;
    }
    assert!(vault.find(Some("1-1")).await.is_err());
}

#[tokio::test]
async fn a_cut_in_the_time_to_come_stops_pruning_and_no_point_goes() {
    let directory = tempfile::tempdir().unwrap();
    let vault = Vault::open_or_begin(&local(directory.path()), UUID, &keys()).await.unwrap();
    let mut point = Point::new(21);
    point.export(&vault, None).await.unwrap();
    // The clock of the guest's host is 30 days ahead, for one export.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    point.head.epoch = 2;
    point.head.cut_unix_ns = (now + Duration::from_secs(30 * 24 * 3600)).as_nanos() as u64;
    point.export(&vault, None).await.unwrap();
    let error = prune(&vault, &pruning(2, Duration::ZERO)).await.unwrap_err();
    assert!(matches!(&error, ColdError::Clock { .. }) && error.to_string().contains("clock of the host"), "{error}");
    assert_eq!(vault.points().await.unwrap().len(), 2);
    // Where all points stay nobody asks how old they are.
    let all = prune(&vault, &PruneOptions { tiers: vec![], ..pruning(2, Duration::ZERO) }).await.unwrap();
    assert_eq!(all.kept, 2);
}

/// Reads a point when it is told to; says when it is asked first.
struct Held {
    reading: Arc<common::Reading>,
    asked: tokio::sync::mpsc::UnboundedSender<()>,
    go_on: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Source for Held {
    fn read(&self, array: Array, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let _ = self.asked.send(());
        // Ends at once when the sender is gone.
        let _ = self.go_on.lock().unwrap().recv_timeout(Duration::from_secs(60));
        self.reading.read(array, offset, buffer)
    }

    fn data_from(&self, array: Array, offset: u64) -> Result<u64, SourceError> {
        self.reading.data_from(array, offset)
    }

    fn changes(&self, base: &Head) -> Result<Option<Vec<Range>>, SourceError> {
        self.reading.changes(base)
    }
}

#[tokio::test]
async fn a_whole_prune_within_an_export_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let vault = Vault::open_or_begin(&local(directory.path()), UUID, &keys()).await.unwrap();
    let point = Point::new(22);
    let report = point.export(&vault, None).await.unwrap();
    // Chunks that nothing lists, and no mark.
    let manifest = directory.path().join(UUID.to_string()).join(&report.object);
    std::fs::remove_file(&manifest).unwrap();
    let (asked, mut is_asked) = tokio::sync::mpsc::unbounded_channel();
    let (go_on, waits) = std::sync::mpsc::channel();
    let source = Arc::new(Held { reading: point.reading(), asked, go_on: std::sync::Mutex::new(waits) });
    let options = ExportOptions::default();
    let exporting = export(&vault, point.head.clone(), point.guest.clone(), source, &options, &|_| ());
    let pruning = async {
        is_asked.recv().await.unwrap();
        let options = PruneOptions { tiers: vec![], ..pruning(1, Duration::from_millis(1)) };
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(prune(&vault, &options).await.unwrap().marked_chunks, 7);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(prune(&vault, &options).await.unwrap().deleted_chunks, 7);
        drop(go_on);
    };
    let (exported, ()) = tokio::join!(exporting, pruning);
    let error = exported.unwrap_err();
    assert!(matches!(&error, ColdError::Disturbed { .. }), "{error}");
    assert!(!manifest.exists() && vault.points().await.unwrap().is_empty());
    assert_eq!(point.export(&vault, None).await.unwrap().sent_chunks, 7);
    point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
}

#[tokio::test]
async fn exports_and_prunes_at_the_same_time_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let first = Point::new(10);
    first.export(&vault, None).await.unwrap();
    // The grace must be longer than an export takes from its last look at the mark to its manifest, on a busy machine too.
    let grace = Duration::from_secs(1);
    let stop = Arc::new(AtomicBool::new(false));
    let deleted = Arc::new(AtomicU64::new(0));
    // Of two receivers: each finds the other's marks and sweeps.
    let pruners = ["one", "other"].map(|owner| {
        let (vault, stop, deleted) = (vault.clone(), stop.clone(), deleted.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                match prune(&vault, &PruneOptions { owner: owner.to_owned(), ..pruning(1, grace) }).await {
                    Ok(report) => drop(deleted.fetch_add(report.deleted_chunks, Ordering::Relaxed)),
                    // What the other has just deleted, or does.
                    Err(ColdError::Busy { .. } | ColdError::Missing { .. }) => {}
                    Err(ColdError::Damaged { what, .. }) if what.contains("missing") => {}
                    Err(other) => panic!("{other}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    });
    let mut random = StdRng::seed_from_u64(11);
    let (mut done, mut disturbed) = (0, 0);
    let mut point = first.clone();
    for epoch in 2..400 {
        // To and fro between two contents, so that what was dropped is needed again.
        let content = if epoch % 8 < 4 { point.next(&mut random, 6) } else { first.clone() };
        let epoch_point = Point { head: common::head(epoch), ..content };
        match epoch_point.export(&vault, None).await {
            Ok(report) => {
                done += 1;
                epoch_point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
            }
            Err(ColdError::Disturbed { .. }) => disturbed += 1,
            Err(other) => panic!("{other}"),
        }
        point = epoch_point;
        if done > 8 && deleted.load(Ordering::Relaxed) > 8 {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for pruner in pruners {
        pruner.await.unwrap();
    }
    let deleted = deleted.load(Ordering::Relaxed);
    println!("{done} exports, {disturbed} disturbed, {deleted} chunks deleted beside them");
    assert!(done > 8 && deleted > 8);
    let (object, _) = vault.find(None).await.unwrap();
    restored(&vault, vault.manifest(&object).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_point_that_lost_something_is_mended_by_exporting_it_again() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = local(directory.path());
    let vault = Vault::open_or_begin(&bucket, UUID, &keys()).await.unwrap();
    let point = Point::new(12);
    let report = point.export(&vault, None).await.unwrap();
    let chunks = chunk_files(directory.path());
    std::fs::remove_file(&chunks[0]).unwrap();
    std::fs::remove_file(&chunks[3]).unwrap();
    let again = point.export(&vault, None).await.unwrap();
    assert_eq!((again.already, again.sent_chunks), (false, 2), "{again:?}");
    point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
    // What an upload left that was cut short at once has its name and nothing else.
    std::fs::write(&chunks[1], b"").unwrap();
    std::fs::write(&chunks[2], [0; 20]).unwrap();
    let again = point.export(&vault, None).await.unwrap();
    assert_eq!((again.already, again.sent_chunks), (false, 2), "{again:?}");
    point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
    let manifest = directory.path().join(UUID.to_string()).join(&report.object);
    std::fs::write(&manifest, b"rubbish").unwrap();
    let again = point.export(&vault, None).await.unwrap();
    assert_eq!((again.already, again.sent_chunks), (false, 0), "{again:?}");
    point.assert_restored(&vault, vault.manifest(&report.object).await.unwrap()).await;
    assert!(point.export(&vault, None).await.unwrap().already);
}

#[test]
fn a_restore_whose_runtime_ends_does_not_look_whole() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut pieces, count) = runtime.block_on(async {
        let vault = Vault::open_or_begin(&local(directory.path()), UUID, &keys()).await.unwrap();
        let report = Point::new(13).export(&vault, None).await.unwrap();
        let manifest = vault.manifest(&report.object).await.unwrap();
        let count = manifest.names().count();
        (vmdr_cold::restore(&vault, Arc::new(manifest), 1), count)
    });
    assert!(pieces.next().unwrap().is_ok());
    runtime.shutdown_timeout(Duration::from_secs(10));
    // Those that were fetched may still come.
    let rest: Vec<_> = pieces.by_ref().collect();
    assert!(rest.len() < count, "{} of {count}", rest.len() + 1);
    assert!(matches!(rest.last(), Some(Err(_))), "{:?}", rest.last());
    assert!(pieces.next().is_none());
}
