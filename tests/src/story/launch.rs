//! From nothing to two running instances with elastic addresses.

use anyhow::{Context, ensure};

use super::Story;
use crate::internet::FRIENDS;

/// The types of the two instances.
pub const TYPES: [&str; 2] = ["t2.nano", "t3.micro"];

pub fn start(story: &mut Story) -> anyhow::Result<String> {
    // `begin` brought it up. Doing it again must change nothing.
    let again = story.deployment.up()?;
    ensure!(again.contains("AWS_ACCESS_KEY_ID"), "the second `up` does not tell the keys: {again}");
    Ok(format!("endpoint {}", story.deployment.endpoint()))
}

pub fn image(story: &mut Story) -> anyhow::Result<String> {
    story.image = story.operator.build_image("tiny")?;
    Ok(story.image.clone())
}

pub fn key(story: &mut Story) -> anyhow::Result<String> {
    story.operator.create_key("story", &story.key_file)?;
    let text = std::fs::read_to_string(&story.key_file)?;
    ensure!(text.contains("PRIVATE KEY"), "the key file holds no private key");
    Ok("ed25519".into())
}

pub fn group(story: &mut Story) -> anyhow::Result<String> {
    story.group = story.operator.create_group("story", "SSH from friends")?;
    story.operator.authorize(&story.group, "tcp", 22, FRIENDS)?;
    Ok(format!("{}: tcp 22 from {FRIENDS}", story.group))
}

pub fn instances(story: &mut Story) -> anyhow::Result<String> {
    let mut ids = Vec::new();
    for kind in TYPES {
        ids.push(story.operator.run_instance(&story.image, kind, "story", &story.group)?);
    }
    for id in &ids {
        let running = story.await_state(id, "running")?;
        ensure!(running.private_address.is_some(), "{id} runs without a private address");
        story.instances.push(running);
    }
    Ok(ids
        .iter()
        .zip(TYPES)
        .map(|(id, kind)| format!("{id} ({kind})"))
        .collect::<Vec<_>>()
        .join(", "))
}

pub fn addresses(story: &mut Story) -> anyhow::Result<String> {
    for index in 0..story.instances.len() {
        let address = story.operator.allocate_address()?;
        let id = story.instance(index)?.id.clone();
        story.operator.associate(&address, &id)?;
        let seen = story.operator.instance(&id)?;
        ensure!(
            seen.public_address == Some(address.address),
            "{id} shows {:?}",
            seen.public_address
        );
        story.addresses.push(address);
    }
    let first = story.addresses.first().context("no address")?.address;
    Ok(format!("{first} is the first's"))
}
