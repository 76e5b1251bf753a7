//! The one definition of each action.

use super::{Read, Write, metadata_options};
use super::{
    address, attribute, group, group_rule, image, instance, interface, key_pair, launch, region,
    tag,
};
use super::{modification, volume, vpc};

pub enum Deed {
    Read(Read),
    Write(Write),
    /// The instance's host is asked.
    Console,
}

pub struct Action {
    pub name: &'static str,
    /// What it does, for the guide.
    pub about: &'static str,
    /// The parameters that it honours; others of the model are refused by name
    /// rather than ignored.
    pub params: &'static [&'static str],
    pub deed: Deed,
}

impl Action {
    pub fn find(name: &str) -> Option<&'static Self> {
        ACTIONS.iter().find(|a| a.name == name)
    }

    /// As a policy names it.
    pub fn permission(&self) -> String {
        format!("ec2:{}", self.name)
    }

    pub fn reads(&self) -> bool {
        !matches!(self.deed, Deed::Write(_))
    }
}

const fn read(
    name: &'static str,
    about: &'static str,
    params: &'static [&'static str],
    deed: Read,
) -> Action {
    Action { name, about, params, deed: Deed::Read(deed) }
}

const fn write(
    name: &'static str,
    about: &'static str,
    params: &'static [&'static str],
    deed: Write,
) -> Action {
    Action { name, about, params, deed: Deed::Write(deed) }
}

const RULE: &[&str] = &[
    "CidrIp",
    "FromPort",
    "GroupId",
    "GroupName",
    "IpPermissions",
    "IpProtocol",
    "SecurityGroupRuleId",
    "SourceSecurityGroupName",
    "SourceSecurityGroupOwnerId",
    "TagSpecification",
    "ToPort",
];

#[rustfmt::skip]
pub static ACTIONS: &[Action] = &[
    read("DescribeRegions", "the one region", &["AllRegions", "Filter", "RegionName"], region::describe_regions),
    read("DescribeAvailabilityZones", "the one zone", &["AllAvailabilityZones", "Filter", "ZoneId", "ZoneName"], region::describe_zones),
    read("DescribeAccountAttributes", "the default VPC and the limits", &["AttributeName"], region::describe_account_attributes),
    read("DescribeInstanceTypes", "the x86_64 types of the table", &["Filter", "InstanceType", "MaxResults", "NextToken"], region::describe_instance_types),
    read("DescribeInstanceTypeOfferings", "each type is offered in the zone", &["Filter", "LocationType", "MaxResults", "NextToken"], region::describe_offerings),
    write("RunInstances", "all or none of MinCount; repeatable by ClientToken", &[
        "BlockDeviceMapping", "ClientToken", "DisableApiStop", "DisableApiTermination", "EbsOptimized",
        "ImageId", "InstanceInitiatedShutdownBehavior", "InstanceType", "KeyName", "MaxCount",
        "MetadataOptions", "MinCount", "Monitoring", "NetworkInterface", "Placement",
        "PrivateIpAddress", "SecurityGroup", "SecurityGroupId", "SubnetId", "TagSpecification", "UserData",
    ], launch::run_instances),
    read("DescribeInstances", "terminated ones are shown for an hour", &["Filter", "IncludeManagedResources", "InstanceId", "MaxResults", "NextToken"], instance::describe_instances),
    read("DescribeInstanceStatus", "running ones, unless all are asked for", &["Filter", "IncludeAllInstances", "IncludeManagedResources", "InstanceId", "MaxResults", "NextToken"], instance::describe_instance_status),
    write("StartInstances", "of a running one: nothing happens", &["InstanceId"], instance::start_instances),
    write("StopInstances", "refused while pending", &["Force", "InstanceId", "SkipOsShutdown"], instance::stop_instances),
    write("RebootInstances", "counted: none is lost or done twice", &["InstanceId"], instance::reboot_instances),
    write("TerminateInstances", "refused where DisableApiTermination is set", &["Force", "InstanceId", "SkipOsShutdown"], instance::terminate_instances),
    read("DescribeInstanceAttribute", "one attribute", &["Attribute", "InstanceId"], attribute::describe_attribute),
    write("ModifyInstanceAttribute", "one attribute; type and user data only while stopped", &[
        "Attribute", "BlockDeviceMapping", "DisableApiStop", "DisableApiTermination", "GroupId",
        "InstanceId", "InstanceInitiatedShutdownBehavior", "InstanceType", "SourceDestCheck", "UserData", "Value",
    ], attribute::modify_attribute),
    write("ModifyInstanceMetadataOptions", "at once; without tags", &[
        "HttpEndpoint", "HttpProtocolIpv6", "HttpPutResponseHopLimit", "HttpTokens", "InstanceId", "InstanceMetadataTags",
    ], metadata_options::modify_metadata_options),
    Action { name: "GetConsoleOutput", about: "the last 64 KiB of the serial console", params: &["InstanceId", "Latest"], deed: Deed::Console },
    read("DescribeImages", "one's own; there are no others", &["ExecutableBy", "Filter", "ImageId", "IncludeDeprecated", "IncludeDisabled", "MaxResults", "NextToken", "Owner"], image::describe_images),
    write("RegisterImage", "ImageLocation is an image's name on the hosts", &[
        "Architecture", "Description", "EnaSupport", "ImageLocation", "Name", "RootDeviceName", "TagSpecification", "VirtualizationType",
    ], image::register_image),
    write("DeregisterImage", "instances that run from it go on", &["ImageId"], image::deregister_image),
    write("CreateKeyPair", "RSA (2048 bits) or ED25519; the private key is not kept", &["KeyFormat", "KeyName", "KeyType", "TagSpecification"], key_pair::create_key_pair),
    write("ImportKeyPair", "an OpenSSH public key", &["KeyName", "PublicKeyMaterial", "TagSpecification"], key_pair::import_key_pair),
    read("DescribeKeyPairs", "with the public key where asked", &["Filter", "IncludePublicKey", "KeyName", "KeyPairId"], key_pair::describe_key_pairs),
    write("DeleteKeyPair", "of an unknown one: nothing happens", &["KeyName", "KeyPairId"], key_pair::delete_key_pair),
    write("CreateSecurityGroup", "lets all out and nothing in", &["GroupDescription", "GroupName", "TagSpecification", "VpcId"], group::create_group),
    read("DescribeSecurityGroups", "with their rules", &["Filter", "GroupId", "GroupName", "MaxResults", "NextToken"], group::describe_groups),
    read("DescribeSecurityGroupRules", "one by one", &["Filter", "MaxResults", "NextToken", "SecurityGroupRuleId"], group_rule::describe_rules),
    write("DeleteSecurityGroup", "refused while used or referred to", &["GroupId", "GroupName"], group::delete_group),
    write("AuthorizeSecurityGroupIngress", "all of the rules or none", RULE, group_rule::authorize_ingress),
    write("AuthorizeSecurityGroupEgress", "all of the rules or none", RULE, group_rule::authorize_egress),
    write("RevokeSecurityGroupIngress", "by rule or by id", RULE, group_rule::revoke_ingress),
    write("RevokeSecurityGroupEgress", "by rule or by id", RULE, group_rule::revoke_egress),
    write("AllocateAddress", "from the range that the daemon was given", &["Address", "Domain", "NetworkBorderGroup", "PublicIpv4Pool", "TagSpecification"], address::allocate_address),
    write("AssociateAddress", "moves unless told not to", &["AllocationId", "AllowReassociation", "InstanceId", "NetworkInterfaceId", "PrivateIpAddress", "PublicIp"], address::associate_address),
    write("DisassociateAddress", "", &["AssociationId", "PublicIp"], address::disassociate_address),
    write("ReleaseAddress", "refused while associated", &["AllocationId", "NetworkBorderGroup", "PublicIp"], address::release_address),
    read("DescribeAddresses", "", &["AllocationId", "Filter", "PublicIp"], address::describe_addresses),
    write("CreateVolume", "every type that EC2 has; empty", &[
        "AvailabilityZone", "AvailabilityZoneId", "ClientToken", "Encrypted", "Iops", "MultiAttachEnabled", "Size", "TagSpecification", "Throughput", "VolumeType",
    ], volume::create_volume),
    read("DescribeVolumes", "", &["Filter", "IncludeManagedResources", "MaxResults", "NextToken", "VolumeId"], volume::describe_volumes),
    read("DescribeVolumeStatus", "", &["Filter", "IncludeManagedResources", "MaxResults", "NextToken", "VolumeId"], volume::describe_volume_status),
    write("DeleteVolume", "refused while attached", &["VolumeId"], volume::delete_volume),
    write("AttachVolume", "to a running or a stopped instance", &["Device", "InstanceId", "VolumeId"], volume::attach_volume),
    write("ModifyVolume", "in use or not; the host has done it when it is `completed`", &["Iops", "MultiAttachEnabled", "Size", "Throughput", "VolumeId", "VolumeType"], modification::modify_volume),
    read("DescribeVolumesModifications", "the last one of each volume", &["Filter", "IncludeManagedResources", "MaxResults", "NextToken", "VolumeId"], modification::describe_modifications),
    write("DetachVolume", "not of a root volume", &["Device", "Force", "InstanceId", "VolumeId"], volume::detach_volume),
    write("CreateTags", "50 a resource", &["ResourceId", "Tag"], tag::create_tags),
    write("DeleteTags", "", &["ResourceId", "Tag"], tag::delete_tags),
    read("DescribeTags", "", &["Filter", "MaxResults", "NextToken"], tag::describe_tags),
    read("DescribeVpcs", "the default one", &["Filter", "MaxResults", "NextToken", "VpcId"], vpc::describe_vpcs),
    read("DescribeSubnets", "the default one of the zone", &["Filter", "MaxResults", "NextToken", "SubnetId"], vpc::describe_subnets),
    read("DescribeNetworkInterfaces", "each goes with its instance", &["Filter", "IncludeManagedResources", "MaxResults", "NetworkInterfaceId", "NextToken"], interface::describe_interfaces),
    write("ModifyNetworkInterfaceAttribute", "one attribute", &["Description", "NetworkInterfaceId", "SecurityGroupId", "SourceDestCheck"], interface::modify_attribute),
];

/// `docs/guide/ec2-actions.md`; a test compares it, `control guide` prints it.
pub fn guide_page() -> String {
    let mut page = String::from(
        "# EC2 actions\n\n\
         Printed by `control guide` from the actions' own definitions; a test compares.\n\
         A parameter of the EC2 model that is not named here is refused (`UnsupportedOperation`),\n\
         one that EC2 does not know is `UnknownParameter`. `DryRun` serves everywhere.\n\n\
         | action | permission | what to know | parameters |\n|---|---|---|---|\n",
    );
    for action in ACTIONS {
        let params = action.params.iter().map(|p| format!("`{p}`")).collect::<Vec<_>>().join(" ");
        page.push_str(&format!(
            "| {} | `{}` | {} | {params} |\n",
            action.name,
            action.permission(),
            action.about
        ));
    }
    page
}
