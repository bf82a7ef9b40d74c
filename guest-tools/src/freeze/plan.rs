//! Which file systems are brought to rest, and in which order: out of /proc/self/mountinfo, without I/O.
//!
//! All that lie over a block device and can be written, each once, however often it is mounted. What is inside comes first: a
//! file system before the one that its mount point lies in, and one in a loop device before the one that holds the loop's
//! file, because freezing it writes there.

use std::path::{Path, PathBuf};

/// File systems at most: more is refused, not done by half.
pub const FILE_SYSTEMS_MAX: usize = 256;

/// A file system to freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Device number as mountinfo has it, MAJOR:MINOR.
    pub device: String,
    /// Its type.
    pub kind: String,
    /// Where it can be reached; what is mounted over one of these hides it there.
    pub mount_points: Vec<PathBuf>,
}

struct Mount<'a> {
    id: &'a str,
    parent: &'a str,
    device: &'a str,
    point: PathBuf,
    kind: &'a str,
    source: PathBuf,
    writable: bool,
}

/// What to freeze, first things first. `backing`: the file behind a loop device (MAJOR:MINOR).
pub fn plan(mountinfo: &str, backing: impl Fn(&str) -> Option<PathBuf>) -> Result<Vec<Target>, String> {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(parse).collect();
    let mut devices: Vec<&str> = Vec::new();
    for mount in mounts.iter().filter(|mount| on_a_block_device(mount)) {
        if !devices.contains(&mount.device) {
            devices.push(mount.device);
        }
    }
    if devices.len() > FILE_SYSTEMS_MAX {
        return Err(format!("{} file systems are mounted, at most {FILE_SYSTEMS_MAX} can be frozen", devices.len()));
    }
    // (inner, outer): the first has to be frozen before the second.
    let mut before: Vec<(&str, &str)> = Vec::new();
    for mount in &mounts {
        if let Some(outer) = mounts.iter().find(|other| other.id == mount.parent) {
            before.push((mount.device, outer.device));
        }
    }
    for device in &devices {
        let holder = backing(device).and_then(|file| holder(&mounts, &file));
        before.extend(holder.map(|holder| (*device, holder)));
    }
    before.retain(|(inner, outer)| inner != outer);
    let mut left = devices;
    let mut order = Vec::new();
    while !left.is_empty() {
        // Of those with nothing left inside the one that was mounted last. (In a circle, just the last.)
        let free = |device: &&str| !before.iter().any(|(inner, outer)| outer == device && left.contains(inner));
        let at = left.iter().rposition(free).unwrap_or(left.len() - 1);
        order.push(left.remove(at));
    }
    let target = |device: &str| {
        let of = || mounts.iter().filter(|mount| mount.device == device);
        Target {
            device: device.to_owned(),
            kind: of().next().map_or_else(String::new, |mount| mount.kind.to_owned()),
            mount_points: of().map(|mount| mount.point.clone()).collect(),
        }
    };
    Ok(order.into_iter().map(target).collect())
}

/// The device of the file system that a path lies in, by the longest mount point.
fn holder<'a>(mounts: &[Mount<'a>], file: &Path) -> Option<&'a str> {
    let holds = mounts.iter().filter(|mount| file.starts_with(&mount.point));
    holds.max_by_key(|mount| mount.point.components().count()).map(|mount| mount.device)
}

/// Of btrfs, the device number says nothing, but its source does. ZFS has pools for sources (and cannot be frozen, which is
/// told).
fn on_a_block_device(mount: &Mount<'_>) -> bool {
    let fuse = mount.kind.starts_with("fuse") && mount.kind != "fuseblk";
    let block = !mount.device.starts_with("0:") || mount.source.starts_with("/dev") || mount.kind == "zfs";
    mount.writable && block && !fuse
}

fn parse(line: &str) -> Option<Mount<'_>> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let (id, parent, device) = (fields.next()?, fields.next()?, fields.next()?);
    let point = unescape(fields.nth(1)?);
    let mut fields = file_system.split(' ');
    let (kind, source, options) = (fields.next()?, unescape(fields.next()?), fields.next().unwrap_or(""));
    let writable = !options.split(',').any(|option| option == "ro");
    Some(Mount { id, parent, device, point, kind, source, writable })
}

/// mountinfo writes blanks and the like as backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let value = octal.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const USUAL: &str = "\
21 1 0:19 / /proc rw,nosuid - proc proc rw
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
23 22 0:5 / /dev rw - devtmpfs udev rw
24 22 8:17 / /srv/with\\040blank rw shared:2 - xfs /dev/sdb1 rw
25 24 7:0 / /srv/with\\040blank/inner rw - ext4 /dev/loop0 rw
26 22 11:0 / /media rw - iso9660 /dev/sr0 ro
27 22 8:1 /var/lib /again rw - ext4 /dev/sda1 rw,errors=remount-ro
28 22 0:44 / /mnt/b rw - btrfs /dev/sdc rw,space_cache
29 22 0:45 / /run/user/0/doc rw - fuse.portal /dev/fuse rw
30 22 0:46 / /tmp rw - tmpfs tmpfs rw
31 22 7:1 / /loop rw - ext4 /dev/loop1 rw
";

    fn devices(plan: &[Target]) -> Vec<&str> {
        plan.iter().map(|target| target.device.as_str()).collect()
    }

    #[test]
    fn what_is_inside_comes_first_and_nothing_twice() {
        let backing = |device: &str| (device == "7:1").then(|| PathBuf::from("/mnt/b/images/disk"));
        let plan = plan(USUAL, backing).unwrap();
        assert_eq!(devices(&plan), ["7:1", "0:44", "7:0", "8:17", "8:1"]);
        assert_eq!(plan[3].mount_points, [PathBuf::from("/srv/with blank")]);
        assert_eq!(plan[4].mount_points, [PathBuf::from("/"), PathBuf::from("/again")]);
        assert_eq!(plan[4].kind, "ext4");
    }

    #[test]
    fn too_many_are_refused() {
        let line = |n: usize| format!("{n} 1 8:{n} / /m{n} rw - ext4 /dev/x{n} rw\n");
        let lines = |count| (2..2 + count).map(line).collect::<String>();
        assert_eq!(plan(&lines(FILE_SYSTEMS_MAX), |_| None).unwrap().len(), FILE_SYSTEMS_MAX);
        assert!(plan(&lines(FILE_SYSTEMS_MAX + 1), |_| None).unwrap_err().contains("at most 256"));
    }

    proptest! {
        #[test]
        fn any_text_is_borne(text in "[0-9: a-z/\\\\,\n-]{0,400}") {
            let _ = plan(&text, |_| Some(PathBuf::from("/")));
        }

        /// Any tree of mounts: each is frozen before whatever it is mounted in.
        #[test]
        fn a_tree_is_taken_from_its_leaves(parents in proptest::collection::vec(any::<prop::sample::Index>(), 1..20)) {
            let mut lines = vec!["1 0 8:1 / / rw - ext4 /dev/d1 rw".to_owned()];
            let mut above = vec![0];
            for (i, parent) in parents.iter().enumerate() {
                let (id, parent) = (i + 2, parent.index(i + 1) + 1);
                above.push(parent);
                lines.push(format!("{id} {parent} 8:{id} / /m{id} rw - ext4 /dev/d{id} rw"));
            }
            let plan = plan(&lines.join("\n"), |_| None).unwrap();
            prop_assert_eq!(plan.len(), lines.len());
            let place = |id: usize| plan.iter().position(|target| target.device == format!("8:{id}")).unwrap();
            for (i, parent) in above.iter().enumerate().skip(1) {
                prop_assert!(place(i + 1) < place(*parent));
            }
        }
    }
}
