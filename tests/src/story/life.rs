//! The rest of an instance's life, and its end.

use std::time::Duration;

use anyhow::ensure;

use super::Story;
use crate::program;

const BOOT_BOUND: Duration = Duration::from_secs(120);

pub fn console(story: &mut Story) -> anyhow::Result<String> {
    let id = story.instance(0)?.id.clone();
    let text = program::eventually("console output", Duration::from_secs(20), || {
        let text = story.operator.console(&id)?;
        ensure!(text.contains(&format!("instance {id}")), "no word of {id} on its console");
        Ok(text)
    })?;
    Ok(format!("{} lines, its own id among them", text.lines().count()))
}

/// A number that changes with each boot of the guest.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

pub fn reboot(story: &mut Story) -> anyhow::Result<String> {
    let guest = story.guest(0)?;
    let before = guest.sh(BOOT_ID)?;
    guest.sh("echo kept >/root/kept; sync")?;
    story.operator.reboot(&story.instance(0)?.id)?;
    program::eventually("another boot", BOOT_BOUND, || {
        let now = guest.sh_within(BOOT_ID, Duration::from_secs(15))?;
        ensure!(now != before, "the guest still runs its first boot");
        Ok(())
    })?;
    ensure!(guest.sh("cat /root/kept")? == "kept", "the root disk lost what was synced");
    Ok("another boot id, the same root disk".into())
}

pub fn stop_start(story: &mut Story) -> anyhow::Result<String> {
    // The volume goes through the stop attached.
    let id = story.instance(1)?.id.clone();
    story.guest(1)?.sh("sync; umount /mnt; echo kept >/root/kept; sync")?;
    story.operator.stop(&id)?;
    story.await_state(&id, "stopped")?;
    story.operator.start(&id)?;
    let running = story.await_state(&id, "running")?;
    ensure!(
        running.private_address == story.instance(1)?.private_address
            && running.public_address == Some(story.address(1)?),
        "its addresses changed: {running:?}"
    );
    let guest = story.guest(1)?;
    guest.await_ssh(BOOT_BOUND)?;
    ensure!(guest.sh("cat /root/kept")? == "kept", "the root disk lost what was synced");
    let disk = guest.await_disk(&story.volume)?;
    let found = guest.sh(&format!(
        "set -e; mkdir -p /mnt; mount {disk} /mnt; sha256sum /mnt/data | cut -d' ' -f1; umount /mnt"
    ))?;
    ensure!(found == story.digest, "the volume's data is {found}, it was {}", story.digest);
    Ok("the same addresses, the same root disk, the same volume".into())
}

pub fn terminate(story: &mut Story) -> anyhow::Result<String> {
    for instance in &story.instances {
        story.operator.terminate(&instance.id)?;
    }
    for instance in &story.instances {
        story.await_state(&instance.id, "terminated")?;
    }
    story.await_volume("available")?;
    for address in &story.addresses {
        story.operator.release(address)?;
    }
    story.operator.delete_volume(&story.volume)?;
    program::eventually("no QEMU is left", Duration::from_secs(10), || {
        let left = story.deployment.machines();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    Ok("no machine is left".into())
}

pub fn down(story: &mut Story) -> anyhow::Result<String> {
    story.deployment.down()?;
    // Twice is as good as once.
    story.deployment.down()?;
    let left = story.deployment.leftovers()?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok("no process, device, namespace, pin or socket".into())
}
