//! The front that the story does not take where QEMU has vhost-user: real guests
//! on NBD, from their root disks to a volume that moves between them.

#![forbid(unsafe_code)]

use tests::deployment::Deployment;
use tests::operator::{Netctl, Operator};
use tests::story::Story;

const PORT: u16 = 18776;

/// What a volume's move stands on; the rest of the story asks nothing of the front.
const STEPS: [&str; 9] = [
    "starts",
    "builds_and_registers_an_image",
    "creates_a_key_pair",
    "creates_a_security_group",
    "runs_two_instances_of_different_types",
    "gives_each_an_elastic_address",
    "is_reached_by_ssh_with_the_key",
    "attaches_formats_and_writes_a_volume",
    "moves_the_volume_with_its_data",
];

#[test]
fn guests_on_nbd_boot_write_a_volume_and_hand_it_on() -> anyhow::Result<()> {
    let deployment = Deployment::new("nbd", PORT)?.with_block_front("nbd");
    let mut story = Story::begin(deployment, |deployment| {
        Ok(Box::new(Netctl::new(deployment)) as Box<dyn Operator>)
    })?;
    story.tell_only(&STEPS)?;
    assert_eq!(story.deployment.check_block_front()?, "nbd");
    Ok(())
}
