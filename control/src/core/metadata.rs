//! The documents that the metadata service answers at each interface of an instance: whatever
//! cloud-init's Ec2 source asks for (22.4 was watched), by path below `/latest/`.

use std::collections::BTreeMap;

use super::Context;
use super::interface::{private_dns_name, public_address};
use crate::api::timestamp;
use crate::record::{Instance, Interface, OWNER_ID};

pub fn documents(context: &Context<'_>, instance: &Instance) -> BTreeMap<String, String> {
    let mut documents = BTreeMap::new();
    let Some(interface) = instance.primary() else { return documents };
    let state = context.state;
    let settings = context.settings;
    let dns = private_dns_name(settings, interface);
    let (_, names) = groups_of(context, interface);
    let mut put = |path: &str, text: String| {
        documents.insert(path.to_owned(), text);
    };
    put("meta-data/ami-id", instance.image.to_string());
    put("meta-data/ami-launch-index", instance.launch_index.to_string());
    put("meta-data/ami-manifest-path", "(unknown)".to_owned());
    put("meta-data/block-device-mapping/ami", short_device(&instance.root_device).to_owned());
    put("meta-data/block-device-mapping/root", instance.root_device.clone());
    let others = instance.attachments.iter().filter(|a| !a.boot && !a.detaching);
    for (number, attachment) in others.enumerate() {
        let path = format!("meta-data/block-device-mapping/ebs{}", number + 1);
        put(&path, short_device(&attachment.device).to_owned());
    }
    put("meta-data/hostname", dns.clone());
    put("meta-data/instance-action", "none".to_owned());
    put("meta-data/instance-id", instance.id.to_string());
    put("meta-data/instance-life-cycle", "on-demand".to_owned());
    put("meta-data/instance-type", instance.instance_type.clone());
    put("meta-data/local-hostname", dns);
    put("meta-data/local-ipv4", interface.address.to_string());
    put("meta-data/mac", interface.mac.to_string());
    put("meta-data/placement/availability-zone", instance.zone.clone());
    put("meta-data/placement/region", settings.region.clone());
    put("meta-data/profile", "default-hvm".to_owned());
    put("meta-data/reservation-id", instance.reservation.to_string());
    put("meta-data/security-groups", names);
    put("meta-data/services/domain", "amazonaws.com".to_owned());
    put("meta-data/services/partition", "aws".to_owned());
    for interface in &instance.interfaces {
        of_interface(context, interface, &mut put);
    }
    if let Some(public) = public_address(state, interface, interface.address) {
        put("meta-data/public-ipv4", public.to_string());
        put("meta-data/public-hostname", public.to_string());
    }
    if let Some(key) = instance.key.and_then(|k| state.key_pairs.get(k)) {
        put("meta-data/public-keys/0", key.name.clone());
        put("meta-data/public-keys/0/openssh-key", key.public_key.clone());
    }
    if let Some(data) = &instance.user_data {
        // User data may be any bytes; the prefix says how they are written.
        put("user-data", format!("base64:{data}"));
    }
    put("dynamic/instance-identity/document", identity(context, instance, interface));
    documents
}

/// `network/interfaces/macs/…`: what tools configure further interfaces and addresses by.
fn of_interface(context: &Context<'_>, interface: &Interface, put: &mut impl FnMut(&str, String)) {
    let state = context.state;
    let mac = format!("meta-data/network/interfaces/macs/{}", interface.mac);
    let (ids, names) = groups_of(context, interface);
    let lines = |all: Vec<String>| all.join("\n");
    put(&format!("{mac}/device-number"), interface.device_index.to_string());
    put(&format!("{mac}/interface-id"), interface.id.to_string());
    put(&format!("{mac}/local-hostname"), private_dns_name(context.settings, interface));
    put(
        &format!("{mac}/local-ipv4s"),
        lines(interface.addresses().map(|a| a.to_string()).collect()),
    );
    put(&format!("{mac}/mac"), interface.mac.to_string());
    put(&format!("{mac}/owner-id"), OWNER_ID.to_owned());
    put(&format!("{mac}/security-group-ids"), ids);
    put(&format!("{mac}/security-groups"), names);
    put(&format!("{mac}/subnet-id"), interface.subnet.to_string());
    put(&format!("{mac}/vpc-id"), interface.vpc.to_string());
    if let Some(subnet) = state.subnets.get(interface.subnet) {
        put(&format!("{mac}/subnet-ipv4-cidr-block"), subnet.cidr.to_string());
    }
    if let Some(vpc) = state.vpcs.get(interface.vpc) {
        put(&format!("{mac}/vpc-ipv4-cidr-block"), vpc.cidr.to_string());
        put(&format!("{mac}/vpc-ipv4-cidr-blocks"), vpc.cidr.to_string());
    }
    let mut public = Vec::new();
    for private in interface.addresses() {
        if let Some(address) = public_address(state, interface, private) {
            put(&format!("{mac}/ipv4-associations/{address}"), private.to_string());
            public.push(address.to_string());
        }
    }
    if !public.is_empty() {
        put(&format!("{mac}/public-ipv4s"), lines(public));
    }
}

/// The ids and the names of an interface's groups, one a line.
fn groups_of(context: &Context<'_>, interface: &Interface) -> (String, String) {
    let ids = interface.groups.iter().map(ToString::to_string).collect::<Vec<_>>();
    let groups = interface.groups.iter().filter_map(|g| context.state.groups.get(g));
    let names = groups.map(|g| g.name.as_str()).collect::<Vec<_>>();
    (ids.join("\n"), names.join("\n"))
}

/// A device's name without `/dev/`, as the metadata service shows it.
fn short_device(device: &str) -> &str {
    device.strip_prefix("/dev/").unwrap_or(device)
}

fn identity(context: &Context<'_>, instance: &Instance, interface: &Interface) -> String {
    let document = serde_json::json!({
        "accountId": OWNER_ID,
        "architecture": "x86_64",
        "availabilityZone": instance.zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "imageId": instance.image.to_string(),
        "instanceId": instance.id.to_string(),
        "instanceType": instance.instance_type,
        "kernelId": null,
        "marketplaceProductCodes": null,
        "pendingTime": timestamp(instance.launched_ms).replace(".000Z", "Z"),
        "privateIp": interface.address.to_string(),
        "ramdiskId": null,
        "region": context.settings.region,
        "version": "2017-09-30",
    });
    format!("{document:#}")
}
