//! What is not needed goes: manifests that the policy does not ask for, and chunks that no manifest needs.
//!
//! **Why no chunk is deleted that is needed**, with exports under way at the same time, of this receiver or another. A chunk goes
//! in two steps, with at least the *grace* in between:
//!
//! 1. *Mark.* Chunks that no manifest lists, and that are older than the grace, are listed in the mark. An export that begins now
//!    reads the mark first and sends such chunks again, which makes them younger than the mark.
//! 2. *Sweep*, when the mark is older than the grace. The mark says so first; then all manifests are read once more, and then
//!    chunks are deleted that are marked, in no manifest, and not younger than the mark.
//!
//! An export reads the mark again before it writes its manifest. It gives up while somebody sweeps; and if the mark is not the
//! one that it began with, it looks whether every chunk of its manifest is there and safe. So of a chunk that a manifest lists:
//! either it was not marked when the export looked last, then a sweep cannot begin before the grace is over, and the manifest is
//! there by then; or it was marked and sent again, then it is younger than the mark. Sent again in the moment of a sweep, it may
//! go, and the export sees the sweep, or that it is gone.
//!
//! What this takes for granted: an export writes its manifest within the grace after it looked last (a request takes six minutes
//! at most), and a sweep ends when its time is over ([`SWEEP_TIME_MAX`]). Whether something is older than something else is told by the
//! storage's clock alone; the grace is measured with this host's clock against it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::chunk;
use crate::error::ColdError;
use crate::export::now_unix_ns;
use crate::manifest::{Head, Name};
use crate::mark::{DOOMED_MAX, Mark, Stage};
use crate::vault::{StoredPoint, Vault};

/// The longest that a sweep deletes; the rest is for the next.
pub const SWEEP_TIME_MAX: Duration = Duration::from_secs(1800);
/// Deletions at once.
const DELETES_AT_ONCE: usize = 8;

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

/// Which points stay. `points` are newest first; of each stretch of time of a tier the earliest stays, and the newest always.
fn kept(points: &[Head], tiers: &[Tier]) -> Vec<bool> {
    let now = points.first().map_or(0, |newest| newest.cut_unix_ns);
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
        kept[i] |= i == 0 || tiers.is_empty();
    }
    kept
}

/// Prunes what a bucket has of a domain.
pub async fn prune(vault: &Vault, options: &PruneOptions) -> Result<PruneReport, ColdError> {
    let mut report = PruneReport::default();
    let points = readable(vault).await?;
    let keep = kept(&points, &options.tiers);
    for (point, keep) in points.iter().zip(keep) {
        if keep {
            report.kept += 1;
        } else {
            vault.bucket.delete(&vault.object(&point.object())).await?;
            report.dropped.push(point.point());
        }
    }
    if let Some(mark) = vault.mark().await? {
        check_owner(vault, &mark, options)?;
        let age = Duration::from_nanos(now_unix_ns().saturating_sub(mark.marked_unix_ns));
        if mark.stage == Stage::Marked && age < options.grace {
            report.marked_chunks = mark.doomed.len() as u64;
            return Ok(report);
        }
        report.deleted_chunks += sweep(vault, mark, options).await?;
    }
    let doomed = unneeded(vault, options.grace).await?;
    report.marked_chunks = doomed.len() as u64;
    if doomed.is_empty() {
        return Ok(report);
    }
    let mark = Mark {
        id: Uuid::new_v4().to_string(),
        owner: options.owner.clone(),
        stage: Stage::Marked,
        marked_unix_ns: 0,
        written_unix_ns: 0,
        doomed,
    };
    vault.put_mark(&mark).await?;
    if options.grace.is_zero()
        && let Some(mark) = vault.mark().await?
    {
        report.deleted_chunks += sweep(vault, mark, options).await?;
        report.marked_chunks = 0;
    }
    Ok(report)
}

/// All points, if every one can be read: else it is not known what is needed.
async fn readable(vault: &Vault) -> Result<Vec<Head>, ColdError> {
    let points = vault.points().await?;
    let readable = |StoredPoint { object, head }| {
        head.map_err(|what| ColdError::Damaged {
            what: format!(
                "{what}; nothing is pruned, because it is not known which chunks it needs: delete it if it is of no use"
            ),
            object: format!("{}/{object}", vault.uuid()),
        })
    };
    points.into_iter().map(readable).collect()
}

/// Somebody else's sweep is left alone while it may be under way.
fn check_owner(vault: &Vault, mark: &Mark, options: &PruneOptions) -> Result<(), ColdError> {
    let age = Duration::from_nanos(now_unix_ns().saturating_sub(mark.written_unix_ns));
    if mark.stage == Stage::Sweeping && mark.owner != options.owner && age < 2 * SWEEP_TIME_MAX {
        let (domain, owner) = (vault.uuid().to_string(), mark.owner.clone());
        return Err(ColdError::Busy { domain, owner, seconds: age.as_secs() });
    }
    Ok(())
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
    let old = |written: &u64| grace.is_zero() || *written < before;
    let doomed = chunks.iter().filter(|(name, written)| old(written) && !needed.contains(*name));
    Ok(doomed.map(|(name, _)| *name).take(DOOMED_MAX).collect())
}

/// Deletes what is marked; returns how many.
async fn sweep(vault: &Vault, mut mark: Mark, options: &PruneOptions) -> Result<u64, ColdError> {
    mark.stage = Stage::Sweeping;
    mark.owner.clone_from(&options.owner);
    vault.put_mark(&mark).await?;
    let begun = Instant::now();
    let written: HashMap<Name, u64> = vault.chunks().await?;
    let needed = needed(vault).await?;
    let goes = |name: &&Name| {
        !needed.contains(*name) && written.get(*name).is_some_and(|written| *written < mark.marked_unix_ns)
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
    vault.delete_mark().await?;
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
            let kept = kept(&points, &tiers);
            points.iter().zip(kept).filter(|(_, keep)| *keep).map(|(point, _)| point.cut_unix_ns).collect()
        };
        assert_eq!(of(&[]).len(), 11);
        assert_eq!(of(&[(0, 20)]), [100, 90, 80]);
        assert_eq!(of(&[(0, 20), (25, 100)]), [100, 90, 80, 50, 30, 0]);
        assert_eq!(of(&[(1000, 1000)]), [100, 0]);
        assert_eq!(of(&[(1, 5)]), [100]);
        assert!(kept(&[], &[]).is_empty());
    }
}
