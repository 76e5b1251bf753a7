//! The region, its zone, the account, and the instance types: what a client asks
//! before it does anything.

use std::borrow::Cow;

use model::InstanceType;

use super::{Context, page_secret};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::Tags;

pub fn describe_regions(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let settings = context.settings;
    let filters = Filters::read(params)?.known(&["endpoint", "opt-in-status", "region-name"])?;
    for name in params.texts("RegionName") {
        if name != settings.region {
            return Err(ApiError::invalid(format!("Invalid region: [{name}]")));
        }
    }
    let endpoint = settings.endpoint.split("//").last().unwrap_or_default();
    let admitted = filters.admit(&Tags::new(), |name| {
        vec![Cow::Borrowed(match name {
            "region-name" => &settings.region,
            "endpoint" => endpoint,
            _ => "opt-in-not-required",
        })]
    });
    let node = Struct::new()
        .with("regionName", &settings.region)
        .with("regionEndpoint", endpoint)
        .with("optInStatus", "opt-in-not-required");
    Ok(Struct::new().list("regionInfo", admitted.then_some(node)))
}

pub fn describe_zones(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let settings = context.settings;
    let filters = Filters::read(params)?.known(&[
        "group-name",
        "opt-in-status",
        "region-name",
        "state",
        "zone-id",
        "zone-name",
        "zone-type",
    ])?;
    let id = format!("{}-az1", settings.region);
    for (name, known) in [("ZoneName", &settings.zone), ("ZoneId", &id)] {
        if let Some(other) = params.texts(name).into_iter().find(|z| z != known) {
            return Err(ApiError::invalid(format!("Invalid availability zone: [{other}]")));
        }
    }
    let admitted = filters.admit(&Tags::new(), |name| {
        vec![Cow::Borrowed(match name {
            "region-name" | "group-name" => &settings.region,
            "zone-name" => &settings.zone,
            "zone-id" => &id,
            "zone-type" => "availability-zone",
            "state" => "available",
            _ => "opt-in-not-required",
        })]
    });
    let node = Struct::new()
        .with("zoneName", &settings.zone)
        .with("zoneId", &id)
        .with("zoneState", "available")
        .with("zoneType", "availability-zone")
        .with("regionName", &settings.region)
        .with("groupName", &settings.region)
        .with("networkBorderGroup", &settings.region)
        .with("optInStatus", "opt-in-not-required");
    Ok(Struct::new().list("availabilityZoneInfo", admitted.then_some(node)))
}

pub fn describe_account_attributes(
    context: &Context<'_>,
    params: &Params,
) -> Result<Struct, ApiError> {
    let vpc = context.state.vpcs.iter().find(|v| v.default).map(|v| v.id.to_string());
    let known = [
        ("supported-platforms", "VPC".to_owned()),
        ("default-vpc", vpc.unwrap_or_else(|| "none".to_owned())),
        ("max-instances", "1000".to_owned()),
        ("vpc-max-security-groups-per-interface", "16".to_owned()),
        ("max-elastic-ips", "0".to_owned()),
        ("vpc-max-elastic-ips", super::address::addresses_max(context).to_string()),
    ];
    let wanted = params.texts("AttributeName");
    let nodes = known.into_iter().filter(|(n, _)| wanted.is_empty() || wanted.contains(n)).map(
        |(name, value)| {
            Struct::new()
                .with("attributeName", name)
                .list("attributeValueSet", [Struct::new().with("attributeValue", value)])
        },
    );
    Ok(Struct::new().list("accountAttributeSet", nodes))
}

/// The types that the hosts can run.
fn types() -> impl Iterator<Item = &'static InstanceType> {
    let mut all: Vec<&InstanceType> =
        model::instance_type::all().iter().filter(|t| !t.arm).collect();
    all.sort_by_key(|t| t.name);
    all.into_iter()
}

const TYPE_FILTERS: &[&str] = &[
    "bare-metal",
    "burstable-performance-supported",
    "current-generation",
    "hypervisor",
    "instance-storage-supported",
    "instance-type",
    "memory-info.size-in-mib",
    "processor-info.supported-architecture",
    "supported-root-device-type",
    "supported-usage-class",
    "supported-virtualization-type",
    "vcpu-info.default-vcpus",
    "vcpu-info.default-cores",
];

pub fn describe_instance_types(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeInstanceTypes";
    let filters = Filters::read(params)?.known(TYPE_FILTERS)?;
    let wanted = params.texts("InstanceType");
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, !wanted.is_empty(), &secret)?;
    let absent: Vec<&str> =
        wanted.iter().copied().filter(|w| !types().any(|t| t.name == *w)).collect();
    if !absent.is_empty() {
        return Err(ApiError::new(
            "InvalidInstanceType",
            format!("The following supplied instance types do not exist: [{}]", absent.join(", ")),
        ));
    }
    let admitted = types().filter(|t| wanted.is_empty() || wanted.contains(&t.name)).filter(|t| {
        filters.admit(&Tags::new(), |name| {
            vec![Cow::Owned(match name {
                "instance-type" => t.name.to_owned(),
                "memory-info.size-in-mib" => t.memory_mib.to_string(),
                "vcpu-info.default-vcpus" | "vcpu-info.default-cores" => t.vcpus.to_string(),
                "burstable-performance-supported" => t.burstable.to_string(),
                "processor-info.supported-architecture" => "x86_64".to_owned(),
                "supported-root-device-type" => "ebs".to_owned(),
                "supported-usage-class" => "on-demand".to_owned(),
                "supported-virtualization-type" => "hvm".to_owned(),
                "current-generation" => "true".to_owned(),
                "hypervisor" => "kvm".to_owned(),
                _ => "false".to_owned(),
            })]
        })
    });
    let (types, next) = page.cut(admitted, |t| t.name.to_owned(), ACTION, &secret);
    let nodes = types.into_iter().map(type_node);
    Ok(Struct::new().list("instanceTypeSet", nodes).with_some("nextToken", next))
}

fn type_node(kind: &InstanceType) -> Struct {
    let item = |text: &str| vec![text.to_owned()];
    Struct::new()
        .with("instanceType", kind.name)
        .with("currentGeneration", true)
        .with("freeTierEligible", false)
        .with("bareMetal", false)
        .with("hypervisor", "kvm")
        .with("burstablePerformanceSupported", kind.burstable)
        .with("hibernationSupported", false)
        .with("dedicatedHostsSupported", false)
        .with("instanceStorageSupported", false)
        .with("autoRecoverySupported", false)
        .list("supportedUsageClasses", item("on-demand"))
        .list("supportedRootDeviceTypes", item("ebs"))
        .list("supportedVirtualizationTypes", item("hvm"))
        .list("supportedBootModes", item("legacy-bios"))
        .with("processorInfo", Struct::new().list("supportedArchitectures", item("x86_64")))
        .with(
            "vCpuInfo",
            Struct::new()
                .with("defaultVCpus", kind.vcpus)
                .with("defaultCores", kind.vcpus)
                .with("defaultThreadsPerCore", 1u8),
        )
        .with("memoryInfo", Struct::new().with("sizeInMiB", kind.memory_mib))
        .with(
            "networkInfo",
            Struct::new()
                .with("networkPerformance", kind.network_label)
                .with("maximumNetworkInterfaces", kind.interfaces_max)
                .with("maximumNetworkCards", 1u8)
                .with("ipv4AddressesPerInterface", super::launch::ADDRESSES_AN_INTERFACE_MAX as u32)
                .with("ipv6AddressesPerInterface", 0u8)
                .with("ipv6Supported", false)
                .with("enaSupport", "unsupported"),
        )
        .with(
            "ebsInfo",
            Struct::new()
                .with("ebsOptimizedSupport", "unsupported")
                .with("encryptionSupport", "unsupported")
                .with("nvmeSupport", "unsupported"),
        )
}

pub fn describe_offerings(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeInstanceTypeOfferings";
    let settings = context.settings;
    let filters = Filters::read(params)?.known(&["instance-type", "location"])?;
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, false, &secret)?;
    let kind = params.text("LocationType").unwrap_or("region");
    let id = format!("{}-az1", settings.region);
    let location = match kind {
        "region" => settings.region.as_str(),
        "availability-zone" => settings.zone.as_str(),
        "availability-zone-id" => id.as_str(),
        other => {
            return Err(ApiError::new(
                "Unsupported",
                format!("The location type {other} is not supported."),
            ));
        }
    };
    let admitted = types().filter(|t| {
        filters.admit(&Tags::new(), |name| match name {
            "location" => vec![Cow::Borrowed(location)],
            _ => vec![Cow::Borrowed(t.name)],
        })
    });
    let (types, next) = page.cut(admitted, |t| t.name.to_owned(), ACTION, &secret);
    let nodes = types.into_iter().map(|t| {
        Struct::new()
            .with("instanceType", t.name)
            .with("locationType", kind)
            .with("location", location)
    });
    Ok(Struct::new().list("instanceTypeOfferingSet", nodes).with_some("nextToken", next))
}
