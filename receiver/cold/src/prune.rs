//! What is not needed goes: manifests that the policy does not ask for, and chunks that no manifest needs.
//!
//! **Why no chunk is deleted that is needed**, with exports under way at the same time, of this receiver or another. A chunk goes
//! in two steps, with at least the *grace* in between:
//!
//! 1. *Mark.* Chunks that no manifest lists, and that are older than the grace, are listed in the mark. An export that begins now
//!    reads the mark first and sends such chunks again, which makes them younger than the mark.
//! 2. *Sweep*, when the mark is older than the grace, by whoever claims it first: two at once could not tell when the last of
//!    them is done. The mark says so first; then all manifests are read once more, and then chunks are deleted that are marked, in
//!    no manifest, and not younger than the mark. A sweep that was broken off is not gone on with: its mark is replaced, and the
//!    grace begins again.
//!
//! An export reads the mark again before it writes its manifest. It gives up while somebody sweeps; and it looks whether every
//! chunk of its manifest is there and safe, whatever the mark: a whole prune may have come and gone since it began. So of a chunk that a manifest lists:
//! either it was not marked when the export looked last, then a sweep cannot begin before the grace is over, and the manifest is
//! there by then; or it was marked and sent again, then it is younger than the mark. Sent again in the moment of a sweep, it may
//! go, and the export sees the sweep, or that it is gone.
//!
//! What this takes for granted: an export writes its manifest within the grace after it looked last (a request takes six minutes
//! at most); a sweep ends when its time is over (half an hour to look, half an hour to delete); an object that is there is not written by somebody who asks for
//! a new one. Whether something is older than something else, and whether the grace is over, is told by the storage's clock alone.
//! Whether a sweep has been broken off is told by this host's clock against it: they may be half an hour apart.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;

use crate::chunk;
use crate::error::ColdError;
use crate::export::now_unix_ns;
use crate::manifest::{Head, Name};
use crate::mark::{DOOMED_MAX, Mark, Stage};
use crate::vault::{StoredChunk, StoredPoint, Vault, unix_ns};

/// The longest that a sweep deletes; the rest is for the next. And the longest that it looks what is needed, before.
const SWEEP_TIME_MAX: Duration = Duration::from_secs(1800);
/// A sweep that began so long ago has been broken off: looking, deleting, and clocks that differ.
pub const BROKEN_OFF_AFTER: Duration = Duration::from_secs(3 * 1800);
/// Deletions at once.
const DELETES_AT_ONCE: usize = 8;
/// A cut may be so far ahead of the storage's clock: what clocks that are set differ by, and more.
const CLOCK_AHEAD_MAX: Duration = Duration::from_secs(3600);

/// One point of every so many nanoseconds is kept for so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// 0: every point.
    pub every_ns: u64,
    /// Age up to which.
    pub for_ns: u64,
}

/// How to prune.
#[derive(Debug, Clone)]
pub struct PruneOptions {
    /// Which points are kept, beside the newest. None: all of them.
    pub tiers: Vec<Tier>,
    /// How long a chunk that nothing needs stays.
    pub grace: Duration,
    /// Who this is, for other receivers and for the one that goes on after a crash.
    pub owner: String,
    /// The manifest of a point that has just been exported: it stays, whatever `tiers` say.
    pub exported: Option<String>,
}

/// What a prune did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Points that stay.
    pub kept: u64,
    /// Points that went.
    pub dropped: Vec<String>,
    /// Chunks that were deleted.
    pub deleted_chunks: u64,
    /// Chunks that nothing needs, and that go when the grace is over.
    pub marked_chunks: u64,
}

/// Which points stay. `points` are newest first; of each stretch of time of a tier the earliest stays. Always stay the newest, the
/// one that was exported last, and the one that `exported` names. `clock_unix_ns` is the storage's time: a cut has the time of the
/// guest's host, and if that is ahead, what is right must not look old beside it.
fn kept(points: &[Head], tiers: &[Tier], clock_unix_ns: u64, exported: Option<&str>) -> Vec<bool> {
    let now = points.first().map_or(0, |newest| newest.cut_unix_ns).min(clock_unix_ns);
    let last = points.iter().map(|point| point.exported_unix_ns).max().filter(|last| *last > 0);
    let mut taken = HashSet::new();
    let mut kept = vec![false; points.len()];
    for (i, point) in points.iter().enumerate().rev() {
        let age = now.saturating_sub(point.cut_unix_ns);
        for (tier, Tier { every_ns, for_ns }) in tiers.iter().enumerate() {
            if age <= *for_ns {
                let stretch = point.cut_unix_ns.checked_div(*every_ns).unwrap_or(point.cut_unix_ns);
                kept[i] |= taken.insert((tier, stretch));
            }
        }
        kept[i] |= i == 0 || tiers.is_empty() || Some(point.exported_unix_ns) == last;
        kept[i] |= exported.is_some_and(|exported| point.object() == exported);
    }
    kept
}

/// Refuses to tell the age of points while one has a cut that is still to come.
fn check_clock(vault: &Vault, points: &[Head], clock_unix_ns: u64) -> Result<(), ColdError> {
    let Some(newest) = points.first() else { return Ok(()) };
    let ahead = Duration::from_nanos(newest.cut_unix_ns.saturating_sub(clock_unix_ns));
    if ahead <= CLOCK_AHEAD_MAX {
        return Ok(());
    }
    Err(ColdError::Clock {
        domain: vault.uuid().to_string(),
        object: format!("{}/{}", vault.uuid(), newest.object()),
        seconds: ahead.as_secs(),
    })
}

/// Prunes what a bucket has of a domain.
pub async fn prune(vault: &Vault, options: &PruneOptions) -> Result<PruneReport, ColdError> {
    let mut report = PruneReport::default();
    let (points, clock_unix_ns) = readable(vault).await?;
    if !options.tiers.is_empty() {
        check_clock(vault, &points, clock_unix_ns)?;
    }
    let keep = kept(&points, &options.tiers, clock_unix_ns, options.exported.as_deref());
    for (point, keep) in points.iter().zip(keep) {
        if keep {
            report.kept += 1;
        } else {
            vault.bucket.delete(&vault.object(&point.object())).await?;
            report.dropped.push(point.point());
        }
    }
    let mut broken_off = None;
    match vault.mark().await? {
        Some(mark) if mark.stage == Stage::Marked => {
            report.marked_chunks = mark.doomed.len() as u64;
            let age = Duration::from_nanos(now_unix_ns().saturating_sub(mark.marked_unix_ns));
            if age < options.grace {
                return Ok(report);
            }
            match sweep(vault, mark, options).await? {
                Sweep::Done(deleted) => report.deleted_chunks = deleted,
                Sweep::TooEarly => return Ok(report),
                Sweep::BrokenOff(id) => broken_off = Some(id),
            }
        }
        Some(mark) => {
            check_owner(vault, &mark, options)?;
            broken_off = Some(mark.id);
        }
        None => {}
    }
    let doomed = unneeded(vault, options.grace).await?;
    report.marked_chunks = doomed.len() as u64;
    if doomed.is_empty() && broken_off.is_none() {
        return Ok(report);
    }
    // An empty one replaces the mark of a sweep that was broken off, too.
    let mark = Mark {
        id: Uuid::new_v4().to_string(),
        owner: options.owner.clone(),
        stage: Stage::Marked,
        marked_unix_ns: 0,
        written_unix_ns: 0,
        doomed,
    };
    vault.put_mark(&mark).await?;
    if let Some(id) = broken_off {
        vault.bucket.delete(&vault.object(&claim(&id))).await?;
    }
    if options.grace.is_zero()
        && let Some(mark) = vault.mark().await?
        && let Sweep::Done(deleted) = sweep(vault, mark, options).await?
    {
        report.deleted_chunks += deleted;
        report.marked_chunks = 0;
    }
    Ok(report)
}

/// All points, if every one can be read: else it is not known what is needed. And when the last of them was written, by the
/// storage's clock: it has no younger time to tell without being written to.
async fn readable(vault: &Vault) -> Result<(Vec<Head>, u64), ColdError> {
    let points = vault.points().await?;
    let clock_unix_ns = points.iter().map(|point| point.written_unix_ns).max().unwrap_or(0);
    let readable = |StoredPoint { object, head, .. }| {
        head.map_err(|what| ColdError::Damaged {
            what: format!(
                "{what}; nothing is pruned, because it is not known which chunks it needs: delete it if it is of no use"
            ),
            object: format!("{}/{object}", vault.uuid()),
        })
    };
    let points = points.into_iter().map(readable).collect::<Result<_, _>>()?;
    Ok((points, clock_unix_ns))
}

/// Who sweeps what a mark lists has made this object: empty, and never replaced.
fn claim(mark: &str) -> String {
    format!("sweep/{mark}")
}

/// By this host's clock: whether a sweep that was begun then can still be under way, and for how long it is.
fn under_way(since_unix_ns: u64) -> Result<(), Duration> {
    let age = Duration::from_nanos(now_unix_ns().saturating_sub(since_unix_ns));
    if age < BROKEN_OFF_AFTER { Err(age) } else { Ok(()) }
}

fn busy(vault: &Vault, owner: &str, age: Duration) -> ColdError {
    ColdError::Busy { domain: vault.uuid().to_string(), owner: owner.to_owned(), seconds: age.as_secs() }
}

/// Somebody else's sweep is left alone while it may be under way. An own one is not: it ended with the process.
fn check_owner(vault: &Vault, mark: &Mark, options: &PruneOptions) -> Result<(), ColdError> {
    if mark.owner == options.owner {
        return Ok(());
    }
    under_way(mark.written_unix_ns).map_err(|age| busy(vault, &mark.owner, age))
}

/// Every chunk that a manifest lists.
async fn needed(vault: &Vault) -> Result<HashSet<Name>, ColdError> {
    let mut needed = HashSet::new();
    for object in vault.point_names().await? {
        needed.extend(vault.manifest(&object).await?.names());
    }
    Ok(needed)
}

/// Chunks that nothing needs for long enough.
async fn unneeded(vault: &Vault, grace: Duration) -> Result<Vec<Name>, ColdError> {
    let chunks = vault.chunks().await?;
    let needed = needed(vault).await?;
    let before = now_unix_ns().saturating_sub(grace.as_nanos() as u64);
    let old = |chunk: &StoredChunk| grace.is_zero() || chunk.written_unix_ns < before;
    let doomed = chunks.iter().filter(|(name, chunk)| old(chunk) && !needed.contains(*name));
    Ok(doomed.map(|(name, _)| *name).take(DOOMED_MAX).collect())
}

/// What came of a sweep.
#[derive(Debug, PartialEq, Eq)]
enum Sweep {
    /// So many chunks are deleted.
    Done(u64),
    /// By the storage's clock the grace is not over.
    TooEarly,
    /// Somebody else began to sweep this mark and has not ended.
    BrokenOff(String),
}

/// Deletes what is marked.
async fn sweep(vault: &Vault, mut mark: Mark, options: &PruneOptions) -> Result<Sweep, ColdError> {
    let claim = vault.object(&claim(&mark.id));
    let own = vault.bucket.put_new(&claim, Bytes::new()).await?;
    let claimed_unix_ns = vault.bucket.head(&claim).await?.map_or(0, |meta| unix_ns(&meta));
    if !own {
        let ended = under_way(claimed_unix_ns).map_err(|age| busy(vault, "another receiver", age));
        return ended.map(|()| Sweep::BrokenOff(mark.id));
    }
    // Whoever swept this mark took it away before the claim, so that a late claim is noticed here.
    let now = vault.mark().await?;
    let there = now.as_ref().is_some_and(|now| now.id == mark.id && now.stage == Stage::Marked);
    let over = u128::from(claimed_unix_ns.saturating_sub(mark.marked_unix_ns)) >= options.grace.as_nanos();
    if !there || !over {
        vault.bucket.delete(&claim).await?;
        let owner = now.map_or_else(|| "another receiver".to_owned(), |now| now.owner);
        return if there { Ok(Sweep::TooEarly) } else { Err(busy(vault, &owner, Duration::ZERO)) };
    }
    mark.stage = Stage::Sweeping;
    mark.owner.clone_from(&options.owner);
    vault.put_mark(&mark).await?;
    match delete(vault, &mark).await {
        Ok(deleted) => {
            vault.delete_mark(&mark.id).await?;
            vault.bucket.delete(&claim).await?;
            Ok(Sweep::Done(deleted))
        }
        Err(error) => {
            // Nothing is being deleted any more: exports need not wait until this sweep counts as broken off.
            mark.stage = Stage::Marked;
            if vault.is_marked(&mark.id).await.unwrap_or(false) && vault.put_mark(&mark).await.is_ok() {
                let _ = vault.bucket.delete(&claim).await;
            }
            Err(error)
        }
    }
}

/// Deletes the chunks of a mark that nothing needs; returns how many. When this returns nothing is under way any more.
async fn delete(vault: &Vault, mark: &Mark) -> Result<u64, ColdError> {
    // Others take the sweep for broken off some time from here, so this has its limit, too.
    let looking = Instant::now();
    let written: HashMap<Name, StoredChunk> = vault.chunks().await?;
    let needed = needed(vault).await?;
    if looking.elapsed() > SWEEP_TIME_MAX {
        return Err(ColdError::Slow { domain: vault.uuid().to_string(), seconds: looking.elapsed().as_secs() });
    }
    let begun = Instant::now();
    let goes = |name: &&Name| {
        let old = |chunk: &StoredChunk| chunk.written_unix_ns < mark.marked_unix_ns;
        !needed.contains(*name) && written.get(*name).is_some_and(old)
    };
    let doomed: Vec<Name> = mark.doomed.iter().filter(goes).copied().collect();
    let mut deleted = 0;
    for batch in doomed.chunks(DELETES_AT_ONCE) {
        if begun.elapsed() > SWEEP_TIME_MAX {
            break;
        }
        let deletes = batch.iter().map(|name| {
            let object = vault.object(&chunk::object(name));
            async move { vault.bucket.delete(&object).await }
        });
        for done in futures_util::future::join_all(deletes).await {
            done?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(cut_unix_ns: u64) -> Head {
        Head {
            domain: String::new(),
            uuid: Uuid::nil(),
            generation: 1,
            epoch: cut_unix_ns,
            cut_unix_ns,
            application: false,
            exported_unix_ns: 0,
            exporter: String::new(),
            chunk_bytes: 4096,
            ram_bytes: 0,
            disk_bytes: 0,
            chunks: 0,
        }
    }

    #[test]
    fn of_each_stretch_the_earliest_stays_and_the_newest_always() {
        let points: Vec<Head> = (0..=100).rev().step_by(10).map(head).collect();
        let of = |tiers: &[(u64, u64)]| -> Vec<u64> {
            let tiers: Vec<_> =
                tiers.iter().map(|(every_ns, for_ns)| Tier { every_ns: *every_ns, for_ns: *for_ns }).collect();
            let kept = kept(&points, &tiers, u64::MAX, None);
            points.iter().zip(kept).filter(|(_, keep)| *keep).map(|(point, _)| point.cut_unix_ns).collect()
        };
        assert_eq!(of(&[]).len(), 11);
        assert_eq!(of(&[(0, 20)]), [100, 90, 80]);
        assert_eq!(of(&[(0, 20), (25, 100)]), [100, 90, 80, 50, 30, 0]);
        assert_eq!(of(&[(1000, 1000)]), [100, 0]);
        assert_eq!(of(&[(1, 5)]), [100]);
        assert!(kept(&[], &[], 0, None).is_empty());
    }

    #[test]
    fn a_cut_ahead_of_the_storages_clock_makes_nothing_old() {
        let points: Vec<Head> = [1000, 50, 40, 10].into_iter().map(head).collect();
        let tiers = [Tier { every_ns: 0, for_ns: 20 }];
        assert_eq!(kept(&points, &tiers, 55, None), [true, true, true, false]);
        // What was just exported stays, however old its cut; and what was exported last.
        assert_eq!(kept(&points, &tiers, 1000, Some(&points[3].object())), [true, false, false, true]);
        let mut points = points;
        points[2].exported_unix_ns = 7;
        assert_eq!(kept(&points, &tiers, 1000, None), [true, false, true, false]);
    }

    #[tokio::test]
    async fn a_mark_that_took_anothers_place_stays() {
        let (_directory, vault, mark) = marked(2).await;
        vault.delete_mark("another").await.unwrap();
        assert_eq!(vault.mark().await.unwrap().unwrap().id, mark.id);
        vault.delete_mark(&mark.id).await.unwrap();
        assert!(vault.mark().await.unwrap().is_none());
        assert!(!vault.is_marked(&mark.id).await.unwrap());
    }

    const GRACE: Duration = Duration::from_millis(1);

    fn options(owner: &str) -> PruneOptions {
        PruneOptions { tiers: vec![], grace: GRACE, owner: owner.to_owned(), exported: None }
    }

    /// A bucket with chunks that nothing needs, and the mark that says so.
    async fn marked(chunks: u8) -> (tempfile::TempDir, Vault, Mark) {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().display());
        let bucket = crate::Bucket::open(&crate::Location { url, ..crate::Location::default() }).unwrap();
        let key = crate::keys::MasterKey::new([7; 32]);
        let vault = Vault::open_or_begin(&bucket, Uuid::from_u128(1), &[key]).await.unwrap();
        for n in 0..chunks {
            put(&vault, n).await;
        }
        tokio::time::sleep(10 * GRACE).await;
        let report = prune(&vault, &options("a")).await.unwrap();
        assert_eq!((report.marked_chunks, report.deleted_chunks), (u64::from(chunks), 0));
        tokio::time::sleep(10 * GRACE).await;
        let mark = vault.mark().await.unwrap().unwrap();
        (directory, vault, mark)
    }

    async fn put(vault: &Vault, n: u8) {
        let object = vault.object(&chunk::object(&Name([n; 32])));
        vault.bucket.put(&object, Bytes::from_static(b"x")).await.unwrap();
    }

    async fn there(vault: &Vault) -> usize {
        vault.chunks().await.unwrap().len()
    }

    async fn claims(vault: &Vault) -> usize {
        let mut claims = 0;
        let count = |_: &str, _: &object_store::ObjectMeta| {
            claims += 1;
            Ok(())
        };
        vault.bucket.list(&vault.object("sweep"), count).await.unwrap();
        claims
    }

    #[tokio::test]
    async fn a_mark_is_swept_by_one_and_once() {
        let (_directory, vault, mark) = marked(20).await;
        // Who began first is still at it.
        vault.bucket.put_new(&vault.object(&claim(&mark.id)), Bytes::new()).await.unwrap();
        let error = sweep(&vault, mark.clone(), &options("b")).await.unwrap_err();
        assert!(matches!(&error, ColdError::Busy { .. }), "{error}");
        assert_eq!(there(&vault).await, 20);
        vault.bucket.delete(&vault.object(&claim(&mark.id))).await.unwrap();
        // Both have read the mark; one sweeps; then an export sends a chunk again, and sees no mark; then the other comes.
        assert_eq!(sweep(&vault, mark.clone(), &options("a")).await.unwrap(), Sweep::Done(20));
        put(&vault, 3).await;
        let late = sweep(&vault, Mark { marked_unix_ns: u64::MAX >> 1, ..mark }, &options("b")).await.unwrap_err();
        assert!(matches!(&late, ColdError::Busy { .. }), "{late}");
        assert_eq!((there(&vault).await, claims(&vault).await), (1, 0));
        assert!(vault.mark().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_storages_clock_says_when_the_grace_is_over() {
        let (_directory, vault, mark) = marked(2).await;
        // As a host would take it whose clock is ahead.
        let hour = PruneOptions { grace: Duration::from_secs(3600), ..options("a") };
        assert_eq!(sweep(&vault, mark, &hour).await.unwrap(), Sweep::TooEarly);
        assert_eq!((there(&vault).await, claims(&vault).await), (2, 0));
        assert_eq!(prune(&vault, &options("a")).await.unwrap().deleted_chunks, 2);
    }

    #[tokio::test]
    async fn a_sweep_that_was_broken_off_is_not_gone_on_with() {
        let (_directory, vault, mut mark) = marked(2).await;
        vault.bucket.put_new(&vault.object(&claim(&mark.id)), Bytes::new()).await.unwrap();
        mark.stage = Stage::Sweeping;
        vault.put_mark(&mark).await.unwrap();
        let error = prune(&vault, &options("b")).await.unwrap_err();
        assert!(matches!(&error, ColdError::Busy { owner, .. } if owner == "a"), "{error}");
        // Its own process has ended since: all is marked anew, and the grace begins again.
        let report = prune(&vault, &options("a")).await.unwrap();
        assert_eq!((report.marked_chunks, report.deleted_chunks, claims(&vault).await), (2, 0, 0));
        let anew = vault.mark().await.unwrap().unwrap();
        assert!(anew.id != mark.id && anew.stage == Stage::Marked && anew.marked_unix_ns > mark.marked_unix_ns);
        tokio::time::sleep(10 * GRACE).await;
        assert_eq!(prune(&vault, &options("b")).await.unwrap().deleted_chunks, 2);
        assert_eq!((there(&vault).await, claims(&vault).await), (0, 0));
    }

    #[tokio::test]
    async fn a_sweep_that_fails_leaves_the_mark_for_the_next_and_hinders_no_export() {
        let (_directory, vault, mark) = marked(2).await;
        let rubbish = vault.object("points/1-1-1");
        vault.bucket.put(&rubbish, Bytes::from_static(b"rubbish")).await.unwrap();
        let error = sweep(&vault, mark.clone(), &options("a")).await.unwrap_err();
        assert!(matches!(&error, ColdError::Damaged { .. }), "{error}");
        let now = vault.mark().await.unwrap().unwrap();
        assert_eq!((now.stage, now.marked_unix_ns, &now.id), (Stage::Marked, mark.marked_unix_ns, &mark.id));
        assert_eq!((there(&vault).await, claims(&vault).await), (2, 0));
        vault.bucket.delete(&rubbish).await.unwrap();
        assert_eq!(prune(&vault, &options("b")).await.unwrap().deleted_chunks, 2);
    }
}
