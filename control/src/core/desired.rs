//! What a host should be, derived whole from the state each time.

use std::net::Ipv4Addr;

use model::{GroupId, SecurityGroup, VolumeKind};
use rpc::block::Quality;
use rpc::dataplane;
use rpc::host::{self, AttachedInterface, Desired};

use super::{Context, interface::public_address, metadata};
use crate::record::{Group, Instance, Interface, MetadataOptions, Volume};

/// The name of a tap: `IFNAMSIZ` leaves fifteen bytes.
fn tap_name(interface: &Interface) -> String {
    let digits: String = interface.id.digits().chars().take(11).collect();
    format!("tap{digits}")
}

const DNS_PORT: u16 = 53;

/// Ethernet's own: what the uplink carries without asking.
const MTU: u16 = 1500;

pub fn desired(context: &Context<'_>, host: &str) -> Desired {
    let state = context.state;
    let here = || state.instances.iter().filter(|i| i.host == host && i.terminated_ms.is_none());
    let instances = here().map(instance).collect();
    let volumes = state.volumes.iter().filter(|v| v.host == host).map(|v| host::Volume {
        id: v.id,
        size_bytes: v.size_gib * super::launch::GIB,
        image: v.image_name.clone(),
        quality: quality(v),
        deleted: v.deleted_ms.is_some(),
    });
    let interfaces = here().flat_map(|i| i.interfaces.iter().map(|n| interface(context, i, n)));
    Desired {
        revision: state.desired_revision,
        instances,
        volumes: volumes.collect(),
        network: dataplane::Desired {
            generation: state.desired_revision,
            epoch: super::bootstrap::epoch(state),
            uplink: context.settings.uplink.clone(),
            interfaces: interfaces.collect(),
            groups: state.groups.iter().map(group).collect(),
            elastic_ranges: context.settings.elastic_range.map(Into::into).into_iter().collect(),
            name_servers: context
                .settings
                .name_servers
                .iter()
                .map(|a| (*a, DNS_PORT).into())
                .collect(),
            flow_log: context.settings.flow_log.clone(),
            ..dataplane::Desired::default()
        },
    }
}

/// The figures that its kind lets one ask for; the others follow from the size.
fn quality(volume: &Volume) -> Quality {
    // A record from before there were limits may have a kind that cannot be so large.
    let Ok(kind) = volume.kind.parse::<VolumeKind>() else { return Quality::default() };
    let (iops, throughput) = kind.settable();
    let quality = Quality {
        kind: Some(kind),
        iops: volume.iops.filter(|_| iops),
        throughput_mib: volume.throughput.filter(|_| throughput),
    };
    match quality.limits(volume.size_gib * super::launch::GIB) {
        Ok(_) => quality,
        Err(_) => Quality::default(),
    }
}

fn instance(instance: &Instance) -> host::Instance {
    // Records name only types of the table; were one gone, its guests go on
    // with the smallest size rather than stop.
    let kind = model::instance_type::find(&instance.instance_type)
        .unwrap_or_else(|| &model::instance_type::all()[0]);
    let attached = instance.attachments.iter().filter(|a| !a.detaching);
    let interfaces = instance.interfaces.iter().map(|interface| AttachedInterface {
        id: interface.id,
        device: tap_name(interface),
        mac: interface.mac,
    });
    host::Instance {
        id: instance.id,
        run: instance.run,
        starts: instance.starts,
        reboots: instance.reboots,
        vcpus: kind.vcpus,
        memory_mib: kind.memory_mib,
        image: instance.image_name.clone(),
        interfaces: interfaces.collect(),
        volumes: attached
            .map(|a| host::Attachment {
                volume: a.volume,
                device: a.device.clone(),
                generation: a.generation,
                boot: a.boot,
            })
            .collect(),
        volumes_max: kind.volumes_max,
    }
}

fn interface(
    context: &Context<'_>,
    instance: &Instance,
    interface: &Interface,
) -> dataplane::Interface {
    let [a, b, c, d] = interface.address.octets();
    let options = instance.metadata_options;
    let subnet = context.state.subnets.get(interface.subnet).map(|s| s.cidr);
    let secondary = interface.secondary.iter().map(|a| dataplane::PrivateAddress {
        address: *a,
        elastic: public_address(context.state, interface, *a),
    });
    // The primary one's buckets pay for the whole instance.
    let rates_of = instance.primary().map(|primary| primary.id).filter(|id| *id != interface.id);
    dataplane::Interface {
        elastic: public_address(context.state, interface, interface.address),
        secondary: secondary.collect(),
        groups: interface.groups.clone(),
        source_check: interface.source_check,
        rates: if rates_of.is_none() {
            model::instance_type::find(&instance.instance_type).map_or_else(Default::default, rates)
        } else {
            dataplane::Rates::default()
        },
        rates_of,
        dhcp: dataplane::Dhcp {
            hostname: format!("ip-{a}-{b}-{c}-{d}"),
            domain: format!("{}.compute.internal", context.settings.region),
            dns: Vec::new(),
            mtu: MTU,
        },
        metadata: (!options.disabled).then(|| metadata::documents(context, instance)),
        services: dataplane::Services {
            dns: Some(names(context, instance, interface)),
            ..metadata_by(options)
        },
        untracked: true,
        ..dataplane::Interface::new(
            interface.id,
            dataplane::Device::Tap { name: tap_name(interface), owner_uid: instance.uid },
            interface.mac,
            interface.vpc,
            (interface.address, subnet.unwrap_or_else(|| interface.address.into())),
        )
    }
}

fn metadata_by(options: MetadataOptions) -> dataplane::Services {
    dataplane::Services {
        metadata_hop_limit: options.hop_limit,
        metadata_ipv6: options.ipv6,
        metadata_tokens: match options.tokens_optional {
            true => dataplane::Tokens::Optional,
            false => dataplane::Tokens::Required,
        },
        ..dataplane::Services::default()
    }
}

/// EC2's names of an instance, by its address and, the primary interface's, by its id, and the network's resolver:
/// the base of its range plus two.
fn names(context: &Context<'_>, instance: &Instance, interface: &Interface) -> dataplane::Dns {
    let base = context.state.vpcs.get(interface.vpc).map(|vpc| vpc.cidr.network());
    let domain = format!("{}.compute.internal", context.settings.region);
    let by_address = super::interface::private_dns_name(context.settings, interface);
    let by_id = (interface.device_index == 0).then(|| format!("{}.{domain}", instance.id));
    dataplane::Dns {
        address: base.map(|base| Ipv4Addr::from_bits(base.to_bits() + 2)),
        names: [Some(by_address), by_id].into_iter().flatten().collect(),
    }
}

/// How long a burst may last: EC2 says from 5 to 60 minutes, by size, and no more.
const BURST_S: u64 = 300;

/// Both ways as much as the type has. EC2 publishes no packet rate.
fn rates(kind: &model::InstanceType) -> dataplane::Rates {
    let bits = |gbps: f64| (gbps * 1e9).round() as u64;
    let both = kind.network_base_gbps.map(bits).map(|baseline| {
        let peak = kind.network_peak_gbps.map_or(baseline, bits).max(baseline);
        dataplane::Allowance { baseline, peak, credit: (peak - baseline) * BURST_S }
    });
    dataplane::Rates { incoming: both, outgoing: both, packets: None }
}

fn group(group: &Group) -> SecurityGroup {
    let rules = |rules: &[crate::record::GroupRule]| rules.iter().map(|r| r.rule.clone()).collect();
    let id: GroupId = group.id;
    SecurityGroup {
        id,
        vpc: group.vpc,
        ingress: rules(&group.ingress),
        egress: rules(&group.egress),
    }
}

#[cfg(test)]
mod tests {
    use super::{MetadataOptions, dataplane, metadata_by, rates};

    #[test]
    fn metadata_is_served_as_the_instances_options_say() {
        let plain = MetadataOptions::default();
        assert_eq!(metadata_by(plain), dataplane::Services::default());
        let open = MetadataOptions { tokens_optional: true, hop_limit: 7, ..plain };
        let served = metadata_by(open);
        assert_eq!(served.metadata_hop_limit, 7);
        assert_eq!(served.metadata_tokens, dataplane::Tokens::Optional);
    }

    #[test]
    fn an_interface_has_the_rates_of_its_instance_type() {
        let micro = rates(model::instance_type::find("t3.micro").unwrap());
        let out = micro.outgoing.unwrap();
        assert_eq!((out.baseline, out.peak), (64_000_000, 5_000_000_000));
        assert_eq!(out.credit, 4_936_000_000 * 300);
        assert_eq!((micro.incoming, micro.packets), (Some(out), None));
        for kind in model::instance_type::all() {
            let rates = rates(kind);
            assert!(rates.outgoing.is_none_or(|a| a.baseline >= 1000 && a.peak >= a.baseline));
        }
    }
}
