//! A protection that is ended while it begins: the disks of a guest that writes all the time are still being copied.

use anyhow::{Result, ensure};
use rand::Rng;
use std::time::Duration;
use vmdr_tests::daemon;
use vmdr_tests::guest::{Bus, DiskShape, GuestSpec};
use vmdr_tests::random;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};

/// How often it is begun and ended: usually, and in a soak.
const ROUNDS: [usize; 2] = [8, 150];
/// How long `protect` and `unprotect` may take.
const SECONDS_MAX: u64 = 60;
/// From the beginning of `protect` on: the copy of the disks takes longer.
const LEFT_AFTER: std::ops::Range<u64> = 300..1500;

#[test]
fn a_protection_that_ends_while_disks_are_copied_leaves_the_guest_alone() -> Result<()> {
    let guest = GuestSpec {
        disks_mib: vec![48, 24],
        disk_shapes: [Bus::Virtio, Bus::Scsi].map(DiskShape::on).to_vec(),
        ..GuestSpec::linux("web1").memory(128).workload("--ram-mib 16 --interval-ms 20 --direct --scratch /dev/sda")
    };
    let mut scene = Scene::new("leave", guest)?;
    scene.configure_agent("disk_copy_bytes_per_second = 4194304\n");
    scene.start_agent()?;
    let mut random = random::generator("leave");
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    for round in 0..random::rounds(ROUNDS[0], ROUNDS[1]) {
        let after = Duration::from_millis(random.random_range(LEFT_AFTER));
        let site = scene.rig.site(At::A);
        std::thread::scope(|scope| -> Result<()> {
            let protecting =
                scope.spawn(|| daemon::vmdr_output(site, SECONDS_MAX, &["protect", "web1", "--interval", "50ms"]));
            std::thread::sleep(after);
            daemon::vmdr_output(site, SECONDS_MAX, &["unprotect", "web1"])?;
            // It may have been too early for that.
            if let Ok(output) = protecting.join() {
                output?;
            }
            // There may be nothing left of it; it ends all the same.
            let last = daemon::vmdr_output(site, SECONDS_MAX, &["unprotect", "web1"])?;
            ensure!(matches!(last.status.code(), Some(0 | 4)), "unprotect: {last:?}");
            Ok(())
        })?;
        let jobs = site.virsh(&["qemu-monitor-command", "web1", "--hmp", "info block-jobs"])?;
        ensure!(jobs.contains("No active jobs"), "round {round}, left after {after:?}: {jobs}");
        let tick = client.ping(address, ANSWER)?.tick;
        client.wait_tick(address, tick + 3, ANSWER)?;
    }
    client.self_check(address)?;
    scene.rig.finish()
}
