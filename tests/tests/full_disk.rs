//! A disk that is full is an ordinary thing: the guest gets an I/O error, the
//! operator a reason, and what was acknowledged is still there.

#![forbid(unsafe_code)]

use std::time::Duration;

use tests::deployment::Deployment;
use tests::operator::{Netctl, Operator};
use tests::small_disk::SmallDisk;
use tests::story::Story;

const PORT: u16 = 18774;

/// Room for the image, two root volumes' writes, and not for the volume's gibibyte.
const DISK_MIB: u32 = 400;

#[test]
fn a_full_disk_is_an_error_to_the_guest_and_a_reason_to_the_operator() -> anyhow::Result<()> {
    let disk = SmallDisk::new(DISK_MIB)?;
    let deployment = Deployment::within(disk.path(), "full", PORT)?;
    let mut story = Story::begin(deployment, |deployment| {
        Ok(Box::new(Netctl::new(deployment)) as Box<dyn Operator>)
    })?;
    story.tell_until("attaches_formats_and_writes_a_volume")?;

    let guest = story.guest(0)?;
    // 8 MiB were written and synced by the story; now more than there is room
    // for, past the guest's cache, so that the first error ends it.
    let filled = guest.sh_within(
        "dd if=/dev/zero of=/mnt/fill bs=1M count=900 oflag=direct 2>&1",
        Duration::from_secs(120),
    );
    let error = filled.expect_err("the guest wrote more than the disk holds");
    let shown = format!("{error:#}");
    assert!(
        shown.contains("Input/output error") || shown.contains("No space"),
        "the guest saw: {shown}"
    );

    let log = std::fs::read_to_string(story.deployment.paths().log_of("block-server"))?;
    assert!(log.to_lowercase().contains("no space"), "the block server gives no reason:\n{log}");

    // The guest, its root disk and the synced file live.
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    let digest = guest.sh("sha256sum /mnt/data | cut -d' ' -f1")?;
    assert_eq!(digest, story.digest(), "what was synced before the disk was full has changed");
    Ok(())
}
