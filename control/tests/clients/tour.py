"""A day with boto3: every action that the guide names, its errors, its waiters.

Run by tests/boto3.rs against a daemon with a scripted agent. Exits with the
first thing that is not as EC2 has it.
"""

import base64
import sys
import time
import urllib.request

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, WaiterError

CONFIG = Config(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=30)
ec2 = boto3.client("ec2", config=CONFIG)
FAST = {"Delay": 1, "MaxAttempts": 20}


def refused(code, call, **arguments):
    try:
        call(**arguments)
    except ClientError as error:
        seen = error.response["Error"]["Code"]
        assert seen == code, f"{call.__name__}: {seen}, not {code}: {error}"
        return error.response["ResponseMetadata"]["HTTPStatusCode"]
    raise AssertionError(f"{call.__name__}({arguments}): not refused with {code}")


def wait(name, **arguments):
    ec2.get_waiter(name).wait(WaiterConfig=FAST, **arguments)


def one(answer, *path):
    for step in path:
        answer = answer[step]
    return answer


def region():
    assert one(ec2.describe_regions(), "Regions", 0, "RegionName") == "local-1"
    assert one(ec2.describe_availability_zones(), "AvailabilityZones", 0, "ZoneName") == "local-1a"
    assert len(ec2.describe_account_attributes()["AccountAttributes"]) >= 3
    types = ec2.describe_instance_types(InstanceTypes=["t3.micro"])["InstanceTypes"]
    assert types[0]["MemoryInfo"]["SizeInMiB"] == 1024, types
    refused("InvalidInstanceType", ec2.describe_instance_types, InstanceTypes=["t9.huge"])
    pages = list(ec2.get_paginator("describe_instance_types").paginate(PaginationConfig={"PageSize": 20}))
    names = [t["InstanceType"] for p in pages for t in p["InstanceTypes"]]
    assert len(pages) > 3 and len(names) == len(set(names)) > 60, names
    offerings = ec2.describe_instance_type_offerings(Filters=[{"Name": "instance-type", "Values": ["t3.*"]}])
    assert {o["Location"] for o in offerings["InstanceTypeOfferings"]} == {"local-1"}
    vpc = one(ec2.describe_vpcs(), "Vpcs", 0)
    assert vpc["IsDefault"] and vpc["CidrBlock"] == "172.31.0.0/16"
    subnet = one(ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc["VpcId"]]}]), "Subnets", 0)
    assert subnet["CidrBlock"] == "172.31.0.0/20" and subnet["AvailableIpAddressCount"] == 4091
    return vpc["VpcId"], subnet["SubnetId"]


def keys():
    made = ec2.create_key_pair(KeyName="made", KeyType="ed25519",
                               TagSpecifications=[{"ResourceType": "key-pair", "Tags": [{"Key": "a", "Value": "b"}]}])
    assert "OPENSSH PRIVATE KEY" in made["KeyMaterial"]
    rsa = ec2.create_key_pair(KeyName="made-rsa")
    assert "BEGIN RSA PRIVATE KEY" in rsa["KeyMaterial"] and rsa["KeyFingerprint"].count(":") == 19
    refused("InvalidKeyPair.Duplicate", ec2.create_key_pair, KeyName="made")
    public = ec2.describe_key_pairs(KeyNames=["made-rsa"], IncludePublicKey=True)["KeyPairs"][0]["PublicKey"]
    again = ec2.import_key_pair(KeyName="imported", PublicKeyMaterial=public.encode())
    assert again["KeyFingerprint"].count(":") == 15, again
    refused("InvalidKey.Format", ec2.import_key_pair, KeyName="bad", PublicKeyMaterial=b"not a key")
    refused("InvalidKeyPair.NotFound", ec2.describe_key_pairs, KeyNames=["absent"])
    ec2.delete_key_pair(KeyName="imported")
    ec2.delete_key_pair(KeyName="imported")
    found = ec2.describe_key_pairs(Filters=[{"Name": "tag:a", "Values": ["?"]}])["KeyPairs"]
    assert [k["KeyName"] for k in found] == ["made"], found


def groups(vpc):
    group = ec2.create_security_group(GroupName="web", Description="for the web", VpcId=vpc)["GroupId"]
    refused("InvalidGroup.Duplicate", ec2.create_security_group, GroupName="web", Description="x")
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
           "IpRanges": [{"CidrIp": "203.0.113.9/24", "Description": "office"}]}
    rules = ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])["SecurityGroupRules"]
    assert rules[0]["CidrIpv4"] == "203.0.113.0/24" and rules[0]["SecurityGroupRuleId"].startswith("sgr-")
    refused("InvalidPermission.Duplicate", ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[ssh])
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[
        {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}])
    shown = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
    assert len(shown["IpPermissions"]) == 2 and shown["IpPermissionsEgress"][0]["IpProtocol"] == "-1"
    ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=[rules[0]["SecurityGroupRuleId"]])
    refused("InvalidPermission.NotFound", ec2.revoke_security_group_ingress, GroupId=group, IpPermissions=[ssh])
    ec2.authorize_security_group_ingress(GroupId=group, IpProtocol="icmp", FromPort=8, ToPort=-1, CidrIp="0.0.0.0/0")
    refused("InvalidParameterValue", ec2.authorize_security_group_ingress, GroupId=group, IpProtocol="tcp",
            FromPort=90, ToPort=80, CidrIp="0.0.0.0/0")
    refused("InvalidGroup.NotFound", ec2.describe_security_groups, GroupIds=["sg-00000000000000001"])
    refused("InvalidGroupId.Malformed", ec2.describe_security_groups, GroupIds=["sg-xyz"])
    listed = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": [group]}])
    assert len(listed["SecurityGroupRules"]) == 3
    other = ec2.create_security_group(GroupName="other", Description="x")["GroupId"]
    ec2.authorize_security_group_egress(GroupId=other, IpPermissions=[
        {"IpProtocol": "tcp", "FromPort": 1, "ToPort": 9, "UserIdGroupPairs": [{"GroupId": group}]}])
    refused("DependencyViolation", ec2.delete_security_group, GroupId=group)
    ec2.delete_security_group(GroupId=other)
    default = ec2.describe_security_groups(GroupNames=["default"])["SecurityGroups"][0]["GroupId"]
    refused("CannotDelete", ec2.delete_security_group, GroupId=default)
    wait("security_group_exists", GroupIds=[group])
    return group


def images():
    refused("InvalidManifest", ec2.register_image, Name="nothing", ImageLocation="absent")
    image = ec2.register_image(Name="tour", ImageLocation="tiny", Description="small")["ImageId"]
    refused("InvalidAMIName.Duplicate", ec2.register_image, Name="tour", ImageLocation="tiny")
    refused("InvalidAMIID.NotFound", ec2.describe_images, ImageIds=["ami-00000000000000001"])
    refused("InvalidAMIID.Malformed", ec2.describe_images, ImageIds=["ami-1"])
    wait("image_available", ImageIds=[image])
    assert ec2.describe_images(Owners=["self"], Filters=[{"Name": "name", "Values": ["to*"]}])["Images"][0]["ImageId"] == image
    return image


def launch(image, subnet, group):
    asked = dict(ImageId=image, InstanceType="t3.micro", MinCount=2, MaxCount=2, KeyName="made",
                 SecurityGroupIds=[group], SubnetId=subnet, UserData="#!/bin/sh\necho hello\n",
                 ClientToken="once", BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 2}}],
                 TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "tour"}]},
                                    {"ResourceType": "volume", "Tags": [{"Key": "of", "Value": "tour"}]}])
    before = len(ec2.describe_instances()["Reservations"])
    assert refused("DryRunOperation", ec2.run_instances, **asked, DryRun=True) == 412
    assert len(ec2.describe_instances()["Reservations"]) == before
    first = ec2.run_instances(**asked)
    assert all(i["State"]["Name"] == "pending" for i in first["Instances"]), first
    again = ec2.run_instances(**asked)
    assert again["ReservationId"] == first["ReservationId"]
    refused("IdempotentParameterMismatch", ec2.run_instances, **{**asked, "MaxCount": 3})
    small = dict(ImageId=image, InstanceType="t3.micro", MinCount=1, MaxCount=1)
    refused("InvalidAMIID.NotFound", ec2.run_instances, **{**small, "ImageId": "ami-00000000000000001"})
    refused("InvalidInstanceType", ec2.run_instances, **{**small, "InstanceType": "t9.huge"})
    refused("Unsupported", ec2.run_instances, **{**small, "InstanceType": "t4g.micro"})
    refused("InvalidKeyPair.NotFound", ec2.run_instances, **small, KeyName="absent")
    refused("InvalidSubnetID.NotFound", ec2.run_instances, **small, SubnetId="subnet-00000000000000001")
    refused("InvalidParameterCombination", ec2.run_instances, **{**small, "MinCount": 3})
    refused("InsufficientInstanceCapacity", ec2.run_instances,
            **{**small, "InstanceType": "m5.4xlarge", "MinCount": 4, "MaxCount": 4})
    refused("UnsupportedOperation", ec2.run_instances, **small, HibernationOptions={"Configured": True})
    ids = [i["InstanceId"] for i in first["Instances"]]
    wait("instance_running", InstanceIds=ids)
    wait("instance_status_ok", InstanceIds=ids)
    shown = ec2.describe_instances(Filters=[
        {"Name": "tag:Name", "Values": ["to*", "x"]}, {"Name": "instance-state-name", "Values": ["running"]}])
    shown = [i for r in shown["Reservations"] for i in r["Instances"]]
    assert sorted(i["InstanceId"] for i in shown) == sorted(ids)
    assert len({i["PrivateIpAddress"] for i in shown}) == 2
    assert shown[0]["SecurityGroups"][0]["GroupName"] == "web" and shown[0]["KeyName"] == "made"
    refused("InvalidParameterValue", ec2.describe_instances, Filters=[{"Name": "colour", "Values": ["red"]}])
    refused("InvalidParameterCombination", ec2.describe_instances, InstanceIds=ids, MaxResults=5)
    refused("InvalidInstanceID.NotFound", ec2.describe_instances, InstanceIds=["i-00000000000000001"])
    refused("InvalidInstanceID.Malformed", ec2.describe_instances, InstanceIds=["i-1", "i-00000000000000001"])
    refused("DependencyViolation", ec2.delete_security_group, GroupId=group)
    other = ec2.run_instances(ImageId=image, InstanceType="t3.nano", MinCount=1, MaxCount=1, NetworkInterfaces=[
        {"DeviceIndex": 0, "SubnetId": subnet, "Groups": [group], "PrivateIpAddress": "172.31.5.5"}])
    assert other["Instances"][0]["PrivateIpAddress"] == "172.31.5.5"
    refused("InvalidIPAddress.InUse", ec2.run_instances, **small, PrivateIpAddress="172.31.5.5")
    spare = other["Instances"][0]["InstanceId"]
    wait("instance_running", InstanceIds=[spare])
    return ids, spare


def attributes(instance):
    assert refused("IncorrectInstanceState", ec2.modify_instance_attribute, InstanceId=instance,
                   InstanceType={"Value": "t3.small"}) == 400
    ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": True})
    refused("OperationNotPermitted", ec2.terminate_instances, InstanceIds=[instance])
    ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": False})
    told = ec2.modify_instance_metadata_options(InstanceId=instance, HttpTokens="optional",
                                                HttpPutResponseHopLimit=2)
    assert told["InstanceId"] == instance and told["InstanceMetadataOptions"]["HttpTokens"] == "optional", told
    ec2.modify_instance_metadata_options(InstanceId=instance, HttpTokens="required")
    shown = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]["MetadataOptions"]
    assert (shown["HttpTokens"], shown["HttpPutResponseHopLimit"]) == ("required", 2), shown
    assert refused("InvalidParameterValue", ec2.modify_instance_metadata_options, InstanceId=instance,
                   HttpPutResponseHopLimit=65) == 400
    data = ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(data) == b"#!/bin/sh\necho hello\n"


def life(instance):
    states = ec2.stop_instances(InstanceIds=[instance])["StoppingInstances"][0]
    assert (states["PreviousState"]["Name"], states["CurrentState"]["Name"]) == ("running", "stopping")
    wait("instance_stopped", InstanceIds=[instance])
    ec2.modify_instance_attribute(InstanceId=instance, InstanceType={"Value": "t3.small"})
    refused("IncorrectInstanceState", ec2.reboot_instances, InstanceIds=[instance])
    states = ec2.start_instances(InstanceIds=[instance])["StartingInstances"][0]
    assert (states["PreviousState"]["Name"], states["CurrentState"]["Name"]) == ("stopped", "pending")
    wait("instance_running", InstanceIds=[instance])
    ec2.start_instances(InstanceIds=[instance])
    ec2.reboot_instances(InstanceIds=[instance])


def console(instance):
    answer = ec2.get_console_output(InstanceId=instance, Latest=True)
    assert answer["Output"] == "booted\n" and answer["Timestamp"].year == 2026, answer
    refused("InvalidInstanceID.NotFound", ec2.get_console_output, InstanceId="i-00000000000000001")


def volumes(first, second):
    made = ec2.create_volume(AvailabilityZone="local-1a", Size=1, VolumeType="gp3", TagSpecifications=[
        {"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": "data"}]}])
    volume = made["VolumeId"]
    assert made["State"] == "creating" and made["Tags"][0]["Value"] == "data"
    wait("volume_available", VolumeIds=[volume])
    refused("InvalidZone.NotFound", ec2.create_volume, AvailabilityZone="mars-1a", Size=1)
    refused("InvalidVolume.NotFound", ec2.describe_volumes, VolumeIds=["vol-00000000000000001"])
    refused("IncorrectState", ec2.detach_volume, VolumeId=volume)
    ec2.attach_volume(VolumeId=volume, InstanceId=first, Device="/dev/sdf")
    refused("VolumeInUse", ec2.attach_volume, VolumeId=volume, InstanceId=second, Device="/dev/sdf")
    refused("VolumeInUse", ec2.delete_volume, VolumeId=volume)
    wait("volume_in_use", VolumeIds=[volume])
    shown = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [first]},
                                          {"Name": "attachment.device", "Values": ["/dev/sd?"]}])["Volumes"]
    assert [v["VolumeId"] for v in shown] == [volume]
    refused("InvalidParameterValue", ec2.modify_volume, VolumeId=volume, Iops=80001)
    refused("InvalidParameterCombination", ec2.modify_volume, VolumeId=volume, VolumeType="gp2", Iops=3000)
    refused("InvalidVolume.NotFound", ec2.modify_volume, VolumeId="vol-00000000000000001", Size=2)
    change = ec2.modify_volume(VolumeId=volume, Size=12, Iops=6000)["VolumeModification"]
    assert change["ModificationState"] == "modifying", change
    assert (change["OriginalSize"], change["TargetSize"], change["OriginalIops"], change["TargetIops"]) == (1, 12, 3000, 6000)
    for _ in range(100):
        change = ec2.describe_volumes_modifications(VolumeIds=[volume])["VolumesModifications"][0]
        if change["ModificationState"] == "completed":
            break
        time.sleep(0.1)
    assert change["ModificationState"] == "completed" and change["Progress"] == 100, change
    shown = ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]
    assert (shown["Size"], shown["Iops"], shown["Throughput"]) == (12, 6000, 125), shown
    refused("InvalidParameterValue", ec2.modify_volume, VolumeId=volume, Size=11)
    ec2.detach_volume(VolumeId=volume, InstanceId=first)
    wait("volume_available", VolumeIds=[volume])
    ec2.attach_volume(VolumeId=volume, InstanceId=second, Device="/dev/sdf")
    wait("volume_in_use", VolumeIds=[volume])
    root = ec2.describe_instances(InstanceIds=[first])["Reservations"][0]["Instances"][0]["BlockDeviceMappings"][0]
    refused("OperationNotPermitted", ec2.detach_volume, VolumeId=root["Ebs"]["VolumeId"])
    ec2.detach_volume(VolumeId=volume)
    wait("volume_available", VolumeIds=[volume])
    assert ec2.describe_volume_status(VolumeIds=[volume])["VolumeStatuses"][0]["VolumeStatus"]["Status"] == "ok"
    ec2.delete_volume(VolumeId=volume)
    wait("volume_deleted", VolumeIds=[volume])


def addresses(first, second):
    made = ec2.allocate_address(Domain="vpc")
    assert made["PublicIp"] == "198.51.100.2", made  # .0 is the network, .1 the gateway
    allocation = made["AllocationId"]
    association = ec2.associate_address(AllocationId=allocation, InstanceId=first)["AssociationId"]
    refused("InvalidIPAddress.InUse", ec2.release_address, AllocationId=allocation)
    refused("Resource.AlreadyAssociated", ec2.associate_address, AllocationId=allocation, InstanceId=second,
            AllowReassociation=False)
    shown = ec2.describe_instances(InstanceIds=[first])["Reservations"][0]["Instances"][0]
    assert shown["PublicIpAddress"] == "198.51.100.2"
    interface = ec2.describe_network_interfaces(Filters=[{"Name": "attachment.instance-id", "Values": [first]}])
    assert interface["NetworkInterfaces"][0]["Association"]["PublicIp"] == "198.51.100.2"
    ec2.associate_address(AllocationId=allocation, InstanceId=second)
    refused("InvalidAssociationID.NotFound", ec2.disassociate_address, AssociationId=association)
    assert ec2.describe_addresses(AllocationIds=[allocation])["Addresses"][0]["InstanceId"] == second
    ec2.disassociate_address(AssociationId=ec2.describe_addresses()["Addresses"][0]["AssociationId"])
    ec2.release_address(AllocationId=allocation)
    refused("InvalidAllocationID.NotFound", ec2.release_address, AllocationId=allocation)
    taken = []
    for _ in range(13):
        taken.append(ec2.allocate_address(Domain="vpc")["AllocationId"])
    refused("AddressLimitExceeded", ec2.allocate_address, Domain="vpc")
    for allocation in taken:
        ec2.release_address(AllocationId=allocation)


def interfaces(image, subnet, group):
    default = ec2.describe_security_groups(GroupNames=["default"])["SecurityGroups"][0]["GroupId"]
    of = {"SubnetId": subnet}
    two = [{"DeviceIndex": 1, **of, "Groups": [default], "Description": "second",
            "PrivateIpAddresses": [{"PrivateIpAddress": "172.31.6.1", "Primary": True},
                                   {"PrivateIpAddress": "172.31.6.2"}]},
           {"DeviceIndex": 0, **of, "Groups": [group], "SecondaryPrivateIpAddressCount": 2}]
    small = dict(ImageId=image, InstanceType="t3.micro", MinCount=1, MaxCount=1)
    run = ec2.run_instances
    limit = ec2.describe_instance_types(InstanceTypes=["t3.micro"])["InstanceTypes"][0]["NetworkInfo"]
    assert limit["MaximumNetworkInterfaces"] == 2
    refused("AttachmentLimitExceeded", run, **small, NetworkInterfaces=two + [{"DeviceIndex": 2, **of}])
    refused("InvalidParameterValue", run, **small, NetworkInterfaces=[{"DeviceIndex": 0, **of}] * 2)
    refused("InvalidParameterValue", run, **small, NetworkInterfaces=two[:1])
    refused("InvalidParameterCombination", run, **{**small, "MaxCount": 2}, NetworkInterfaces=two)
    refused("PrivateIpAddressLimitExceeded", run, **small, NetworkInterfaces=[
        {"DeviceIndex": 0, **of, "SecondaryPrivateIpAddressCount": 50}])
    instance = run(**small, NetworkInterfaces=two)["Instances"][0]
    id = instance["InstanceId"]
    wait("instance_running", InstanceIds=[id])
    first, second = ec2.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]["NetworkInterfaces"]
    assert [n["Attachment"]["DeviceIndex"] for n in (first, second)] == [0, 1]
    assert instance["PrivateIpAddress"] == first["PrivateIpAddress"] and second["PrivateIpAddress"] == "172.31.6.1"
    assert first["Groups"][0]["GroupId"] == group and second["Groups"][0]["GroupId"] == default
    assert len({p["PrivateIpAddress"] for p in first["PrivateIpAddresses"]}) == 3
    assert [p["PrivateIpAddress"] for p in second["PrivateIpAddresses"]] == ["172.31.6.1", "172.31.6.2"]
    shown = ec2.describe_network_interfaces(Filters=[
        {"Name": "attachment.instance-id", "Values": [id]}, {"Name": "attachment.device-index", "Values": ["1"]}])
    assert [n["Description"] for n in shown["NetworkInterfaces"]] == ["second"]
    by_address = [{"Name": "network-interface.addresses.private-ip-address", "Values": ["172.31.6.2"]}]
    assert ec2.describe_instances(Filters=by_address)["Reservations"][0]["Instances"][0]["InstanceId"] == id
    interface_addresses(id, first["NetworkInterfaceId"], second["NetworkInterfaceId"])
    interface_attributes(id, second["NetworkInterfaceId"], group)
    ec2.terminate_instances(InstanceIds=[id])
    wait("instance_terminated", InstanceIds=[id])
    refused("InvalidNetworkInterfaceID.NotFound", ec2.describe_network_interfaces,
            NetworkInterfaceIds=[second["NetworkInterfaceId"]])
    assert all("AssociationId" not in a for a in ec2.describe_addresses()["Addresses"])
    for address in ec2.describe_addresses()["Addresses"]:
        ec2.release_address(AllocationId=address["AllocationId"])


def interface_addresses(id, first, second):
    """Elastic addresses of the second interface: one of each private address, none the instance's own."""
    a, b, c = (ec2.allocate_address(Domain="vpc") for _ in range(3))
    refused("InvalidInstanceID", ec2.associate_address, AllocationId=a["AllocationId"], InstanceId=id)
    refused("InvalidParameterValue", ec2.associate_address, AllocationId=a["AllocationId"],
            NetworkInterfaceId=first, PrivateIpAddress="172.31.6.2")
    ec2.associate_address(AllocationId=a["AllocationId"], NetworkInterfaceId=second)
    ec2.associate_address(AllocationId=b["AllocationId"], NetworkInterfaceId=second, PrivateIpAddress="172.31.6.2")
    shown = ec2.describe_network_interfaces(NetworkInterfaceIds=[second])["NetworkInterfaces"][0]
    held = [p["Association"]["PublicIp"] for p in shown["PrivateIpAddresses"]]
    assert held == [a["PublicIp"], b["PublicIp"]], shown
    instance = ec2.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]
    assert "PublicIpAddress" not in instance, instance
    ec2.associate_address(AllocationId=c["AllocationId"], NetworkInterfaceId=first)
    instance = ec2.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]
    assert instance["PublicIpAddress"] == c["PublicIp"]


def interface_attributes(id, second, group):
    modify = ec2.modify_network_interface_attribute
    refused("InvalidInstanceID", ec2.modify_instance_attribute, InstanceId=id, Groups=[group])
    refused("InvalidInstanceID", ec2.modify_instance_attribute, InstanceId=id, SourceDestCheck={"Value": False})
    refused("InvalidParameterCombination", modify, NetworkInterfaceId=second)
    refused("InvalidGroup.NotFound", modify, NetworkInterfaceId=second, Groups=["sg-00000000000000001"])
    modify(NetworkInterfaceId=second, Groups=[group])
    modify(NetworkInterfaceId=second, SourceDestCheck={"Value": False})
    modify(NetworkInterfaceId=second, Description={"Value": "changed"})
    shown = ec2.describe_network_interfaces(NetworkInterfaceIds=[second])["NetworkInterfaces"][0]
    assert (shown["Description"], shown["SourceDestCheck"]) == ("changed", False)
    assert [g["GroupId"] for g in shown["Groups"]] == [group]


def tags(instance, group):
    ec2.create_tags(Resources=[instance, group], Tags=[{"Key": "team", "Value": "x"}, {"Key": "empty", "Value": ""}])
    found = ec2.describe_tags(Filters=[{"Name": "key", "Values": ["team"]}])["Tags"]
    assert {t["ResourceId"] for t in found} == {instance, group}, found
    ec2.delete_tags(Resources=[instance], Tags=[{"Key": "team", "Value": "other"}])
    ec2.delete_tags(Resources=[group], Tags=[{"Key": "team"}])
    found = ec2.describe_tags(Filters=[{"Name": "key", "Values": ["team"]}])["Tags"]
    assert [t["ResourceId"] for t in found] == [instance], found
    refused("InvalidID", ec2.create_tags, Resources=["i-00000000000000001"], Tags=[{"Key": "a", "Value": "b"}])
    refused("InvalidParameterValue", ec2.create_tags, Resources=[instance], Tags=[{"Key": "aws:x", "Value": "b"}])
    many = [{"Key": f"k{n}", "Value": "v"} for n in range(51)]
    refused("TagLimitExceeded", ec2.create_tags, Resources=[instance], Tags=many)


def signatures():
    asymmetric = boto3.client("ec2", config=CONFIG.merge(Config(signature_version="v4a")))
    assert asymmetric.describe_vpcs()["Vpcs"]
    asymmetric.create_tags(Resources=[asymmetric.describe_vpcs()["Vpcs"][0]["VpcId"]], Tags=[{"Key": "s", "Value": "v4a"}])
    for version in ("v4", "v4a"):
        wrong = boto3.client("ec2", aws_secret_access_key="wrong", config=CONFIG.merge(Config(signature_version=version)),
                             aws_access_key_id=boto3.Session().get_credentials().access_key)
        refused("SignatureDoesNotMatch", wrong.describe_vpcs)
        unknown = boto3.client("ec2", aws_access_key_id="AKIAUNKNOWN", aws_secret_access_key="x",
                               config=CONFIG.merge(Config(signature_version=version)))
        refused("AuthFailure", unknown.describe_vpcs)
    elsewhere = boto3.client("ec2", region_name="elsewhere-1", config=CONFIG)
    refused("SignatureDoesNotMatch", elsewhere.describe_vpcs)


def end(ids, group, image):
    roots = [m["Ebs"]["VolumeId"] for r in ec2.describe_instances(InstanceIds=ids)["Reservations"]
             for i in r["Instances"] for m in i["BlockDeviceMappings"]]
    ec2.terminate_instances(InstanceIds=ids)
    wait("instance_terminated", InstanceIds=ids)
    for root in roots:
        wait("volume_deleted", VolumeIds=[root])
    refused("IncorrectInstanceState", ec2.start_instances, InstanceIds=ids)
    assert ec2.describe_instances(InstanceIds=ids)["Reservations"], "terminated instances stay visible"
    ec2.terminate_instances(InstanceIds=ids)
    ec2.delete_security_group(GroupId=group)
    ec2.deregister_image(ImageId=image)
    refused("InvalidAMIID.NotFound", ec2.deregister_image, ImageId=image)


vpc, subnet = region()
keys()
group = groups(vpc)
image = images()
ids, spare = launch(image, subnet, group)
attributes(ids[0])
life(ids[0])
console(ids[0])
volumes(ids[0], ids[1])
addresses(ids[0], ids[1])
interfaces(image, subnet, group)
tags(ids[0], group)
signatures()
end(ids + [spare], group, image)
print("as EC2 has it")
