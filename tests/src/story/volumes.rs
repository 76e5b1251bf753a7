//! A volume that is attached while the guest runs, and moves with its data.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::Story;
use crate::program;

const SIZE_GIB: u32 = 1;
const GROWN_GIB: u32 = 2;
const GROWN_BOUND: Duration = Duration::from_secs(30);

pub fn write(story: &mut Story) -> anyhow::Result<String> {
    story.volume = story.operator.create_volume(SIZE_GIB)?;
    story.await_volume("available")?;
    let ordered = Instant::now();
    story.operator.attach(&story.volume, &story.instance(0)?.id, "/dev/sdf")?;
    let guest = story.guest(0)?;
    let disk = guest.await_disk(&story.volume)?;
    let seen = ordered.elapsed();
    story.await_volume("in-use")?;
    let bytes = || -> anyhow::Result<u64> {
        let size = format!("cat /sys/block/{}/size", disk.trim_start_matches("/dev/"));
        Ok(guest.sh(&size)?.parse::<u64>()? * 512)
    };
    let found = bytes()?;
    ensure!(found == u64::from(SIZE_GIB) << 30, "the guest sees {found} bytes");
    story.digest = guest.sh(&format!(
        "set -e; mke2fs -q {disk} >/dev/null 2>&1; mkdir -p /mnt; mount {disk} /mnt; \
         dd if=/dev/urandom of=/mnt/data bs=64k count=128 2>/dev/null; sync; \
         sha256sum /mnt/data | cut -d' ' -f1"
    ))?;
    // It grows under the mounted file system, and the guest sees it.
    story.operator.grow_volume(&story.volume, GROWN_GIB)?;
    program::eventually("the guest sees the new size", GROWN_BOUND, || {
        let found = bytes()?;
        ensure!(found == u64::from(GROWN_GIB) << 30, "the guest sees {found} bytes");
        Ok(())
    })?;
    let front = story.deployment.check_block_front()?;
    let seen = seen.as_secs_f64();
    Ok(format!("{} seen as {disk} by {front} after {seen:.1} s", story.volume))
}

pub fn shift(story: &mut Story) -> anyhow::Result<String> {
    story.guest(0)?.sh("umount /mnt")?;
    let ordered = Instant::now();
    story.operator.detach(&story.volume)?;
    story.guest(0)?.await_no_disk(&story.volume)?;
    story.await_volume("available")?;
    story.operator.attach(&story.volume, &story.instance(1)?.id, "/dev/sdg")?;
    let guest = story.guest(1)?;
    let disk = guest.await_disk(&story.volume)?;
    let moved = ordered.elapsed();
    story.await_volume("in-use")?;
    let found = guest.sh(&format!(
        "set -e; mkdir -p /mnt; mount {disk} /mnt; sha256sum /mnt/data | cut -d' ' -f1"
    ))?;
    ensure!(found == story.digest, "the data is {found}, it was {}", story.digest);
    // A volume in use is not to be deleted, nor attached a second time.
    ensure!(story.operator.delete_volume(&story.volume).is_err(), "a volume in use was deleted");
    let second = story.operator.attach(&story.volume, &story.instance(0)?.id, "/dev/sdh");
    ensure!(second.is_err(), "a volume in use was attached a second time");
    program::eventually("still in use", std::time::Duration::from_secs(5), || {
        story.await_volume("in-use")
    })?;
    Ok(format!("data found on the other guest {:.1} s after the order", moved.as_secs_f64()))
}
