//! A disk into a running QEMU and out of it, by either front.
//!
//! ```text
//!               open              add                          close
//!   vhost-user  chardev-add       device_add vhost-user-blk-pci  chardev-remove
//!   nbd         blockdev-add      device_add virtio-blk-pci      blockdev-del
//! ```
//! Which one a disk has is asked of QEMU each time: it outlives agents, and those
//! may be asked for another front than the one before.

use model::VolumeId;
use serde_json::{Value, json};

use super::front::{Fronts, say_fallback, vhost_user_socket};
use super::qmp::{self, Qmp};
use super::{Context, Sockets, arguments};

pub fn plain(result: Result<Value, qmp::Error>) -> Result<(), String> {
    result.map(drop).map_err(|e| e.to_string())
}

fn sockets_of(volume: VolumeId, context: &Context) -> Result<&Sockets, String> {
    context.sockets.get(&volume).ok_or_else(|| format!("volume {volume} has no export"))
}

/// Makes QEMU reach the volume, before there is a device.
pub async fn open(
    qmp: &Qmp,
    volume: VolumeId,
    context: &Context,
    fronts: Fronts,
) -> Result<(), String> {
    let sockets = sockets_of(volume, context)?;
    match by_vhost_user(qmp, volume, sockets, fronts).await {
        Ok(()) => Ok(()),
        Err(reason) if fronts.may_fall_back() => {
            say_fallback(volume, &reason);
            plain(qmp.execute("blockdev-add", arguments::block_node(volume, &sockets.nbd)).await)
        }
        Err(reason) => Err(reason),
    }
}

async fn by_vhost_user(
    qmp: &Qmp,
    volume: VolumeId,
    sockets: &Sockets,
    fronts: Fronts,
) -> Result<(), String> {
    if !fronts.share_memory() {
        return Err(format!("block front {}", fronts.describe()));
    }
    let socket = vhost_user_socket(sockets)?;
    if !shares_memory(qmp).await.map_err(|e| e.to_string())? {
        return Err("the guest was started with memory of its own; it changes when it is \
                    stopped and started"
            .into());
    }
    plain(qmp.execute("chardev-add", arguments::channel(volume, socket, fronts.abilities)).await)
}

async fn shares_memory(qmp: &Qmp) -> Result<bool, qmp::Error> {
    let all = qmp.execute("query-memdev", json!({})).await?;
    Ok(all.as_array().into_iter().flatten().any(|m| m.get("share") == Some(&json!(true))))
}

/// Plugs the device in. Where a vhost-user one is refused, its channel makes way
/// for NBD.
pub async fn add(
    qmp: &Qmp,
    (volume, slot, boot): (VolumeId, u32, bool),
    context: &Context,
    fronts: Fronts,
) -> Result<(), String> {
    let nbd = arguments::block_device(volume, slot, boot);
    if !channels(qmp).await.map_err(|e| e.to_string())?.contains(&volume) {
        return plain(qmp.execute("device_add", nbd).await);
    }
    let guest = arguments::guest_device(volume, slot, boot);
    let Err(reason) = plain(qmp.execute("device_add", guest).await) else { return Ok(()) };
    if !fronts.may_fall_back() {
        return Err(reason);
    }
    say_fallback(volume, &reason);
    close(qmp, volume).await?;
    let sockets = sockets_of(volume, context)?;
    plain(qmp.execute("blockdev-add", arguments::block_node(volume, &sockets.nbd)).await)?;
    plain(qmp.execute("device_add", nbd).await)
}

/// Lets go of the volume, by whichever front; one that is not there is no error.
pub async fn close(qmp: &Qmp, volume: VolumeId) -> Result<(), String> {
    if channels(qmp).await.map_err(|e| e.to_string())?.contains(&volume) {
        let channel = json!({ "id": arguments::channel_name(volume) });
        return plain(qmp.execute("chardev-remove", channel).await);
    }
    let node = json!({ "node-name": arguments::node_name(volume) });
    match qmp.execute("blockdev-del", node).await {
        Err(qmp::Error::Refused { description, .. })
            if description.contains("Failed to find node") =>
        {
            Ok(())
        }
        result => plain(result),
    }
}

/// The volumes that QEMU has a vhost-user channel to.
pub async fn channels(qmp: &Qmp) -> Result<Vec<VolumeId>, qmp::Error> {
    let all = qmp.execute("query-chardev", json!({})).await?;
    let labels = all.as_array().into_iter().flatten();
    Ok(labels.filter_map(|c| arguments::volume_of(c.get("label")?.as_str()?)).collect())
}

/// A disk on vhost-user is told its size by the block server; there is no node then.
///
/// QEMU's NBD client learns an export's size when it connects, and it reconnects
/// when it has something to ask. So after the block server has let go of the
/// connection, a read of one sector makes it look again; then it lets itself be told.
pub async fn show_size(qmp: &Qmp, volume: VolumeId, size: u64) -> Result<(), qmp::Error> {
    let name = arguments::node_name(volume);
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let mut nodes = nodes.as_array().into_iter().flatten();
    let node = nodes.find(|n| n.get("node-name").and_then(Value::as_str) == Some(&name));
    let seen = node.and_then(|n| n.pointer("/image/virtual-size")?.as_u64());
    if seen.is_none_or(|seen| seen >= size) {
        return Ok(());
    }
    let resize = json!({ "node-name": name, "size": size });
    if qmp.execute("block_resize", resize.clone()).await.is_err() {
        let poke = json!({ "command-line": format!("qemu-io {name} \"read 0 512\"") });
        qmp.execute("human-monitor-command", poke).await?;
        qmp.execute("block_resize", resize).await?;
    }
    tracing::info!(%volume, from = seen, to = size, "the guest sees the new size");
    Ok(())
}
