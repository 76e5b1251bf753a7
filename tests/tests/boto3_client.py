"""What a boto3 user does all day, against a running deployment.

Takes its endpoint and keys from the environment, as `netctl up` prints them,
and the id of an image as its argument. Prints one line `ok <check>` for each
check and ends with a traceback and a non-zero status at the first that fails.
"""

import sys
import uuid

import boto3
from botocore.exceptions import ClientError


def check(name):
    print(f"ok {name}", flush=True)


def refused(code, call, **arguments):
    """The error code that `call` must be refused with."""
    try:
        answer = call(**arguments)
    except ClientError as error:
        seen = error.response["Error"]["Code"]
        assert seen == code, f"{call.__name__}({arguments}) was refused with {seen}, not {code}: {error}"
        assert error.response["ResponseMetadata"]["RequestId"], "an error without a request id"
        return
    raise AssertionError(f"{call.__name__}({arguments}) was not refused: {answer}")


def regions_and_types(ec2):
    region = ec2.describe_regions()["Regions"][0]["RegionName"]
    assert region == ec2.meta.region_name, region
    zones = ec2.describe_availability_zones()["AvailabilityZones"]
    assert zones and all(z["State"] == "available" for z in zones), zones
    names = [t["InstanceType"] for page in ec2.get_paginator("describe_instance_types").paginate()
             for t in page["InstanceTypes"]]
    assert "t3.micro" in names and len(names) == len(set(names)), names
    micro = ec2.describe_instance_types(InstanceTypes=["t3.micro"])["InstanceTypes"][0]
    assert micro["VCpuInfo"]["DefaultVCpus"] == 2 and micro["MemoryInfo"]["SizeInMiB"] == 1024, micro
    vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc["VpcId"]]}])["Subnets"][0]
    assert subnet["AvailableIpAddressCount"] > 0, subnet
    check("regions, zones, types, the default VPC and its subnet")


def errors(ec2, image):
    refused("InvalidInstanceID.Malformed", ec2.describe_instances, InstanceIds=["i-nonsense"])
    refused("InvalidInstanceID.NotFound", ec2.describe_instances, InstanceIds=["i-0123456789abcdef0"])
    refused("InvalidVolume.NotFound", ec2.describe_volumes, VolumeIds=["vol-0123456789abcdef0"])
    refused("InvalidGroup.NotFound", ec2.describe_security_groups, GroupIds=["sg-0123456789abcdef0"])
    refused("InvalidAllocationID.NotFound", ec2.release_address, AllocationId="eipalloc-0123456789abcdef0")
    refused("InvalidKeyPair.NotFound", ec2.describe_key_pairs, KeyNames=["no-such-key"])
    refused("InvalidAMIID.NotFound", ec2.run_instances, ImageId="ami-0123456789abcdef0",
            InstanceType="t3.micro", MinCount=1, MaxCount=1)
    refused("DryRunOperation", ec2.run_instances, ImageId=image, InstanceType="t3.micro",
            MinCount=1, MaxCount=1, DryRun=True)
    assert ec2.delete_key_pair(KeyName="no-such-key")["ResponseMetadata"]["HTTPStatusCode"] == 200
    check("errors carry EC2's codes")


def keys_and_groups(ec2):
    name = f"boto3-{uuid.uuid4().hex[:8]}"
    key = ec2.create_key_pair(KeyName=name, KeyType="rsa")
    assert "PRIVATE KEY" in key["KeyMaterial"], key
    refused("InvalidKeyPair.Duplicate", ec2.create_key_pair, KeyName=name)
    group = ec2.create_security_group(GroupName=name, Description="by boto3")["GroupId"]
    refused("InvalidGroup.Duplicate", ec2.create_security_group, GroupName=name, Description="again")
    rule = {"IpProtocol": "tcp", "FromPort": 80, "ToPort": 81, "IpRanges": [{"CidrIp": "192.0.2.0/24", "Description": "docs"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    refused("InvalidPermission.Duplicate", ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[rule])
    seen = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
    assert seen["IpPermissions"][0]["IpRanges"][0]["CidrIp"] == "192.0.2.0/24", seen
    assert seen["IpPermissionsEgress"][0]["IpProtocol"] == "-1", seen
    ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[rule])
    refused("InvalidPermission.NotFound", ec2.revoke_security_group_ingress, GroupId=group, IpPermissions=[rule])
    ec2.create_tags(Resources=[group], Tags=[{"Key": "made-by", "Value": "boto3"}])
    found = ec2.describe_security_groups(Filters=[{"Name": "tag:made-by", "Values": ["bot*"]}])["SecurityGroups"]
    assert [g["GroupId"] for g in found] == [group], found
    ec2.delete_security_group(GroupId=group)
    ec2.get_waiter("key_pair_exists").wait(KeyNames=[name])
    ec2.delete_key_pair(KeyName=name)
    check("key pairs, groups, rules, tags and filters")


def volumes(ec2):
    zone = ec2.describe_availability_zones()["AvailabilityZones"][0]["ZoneName"]
    token = uuid.uuid4().hex
    order = dict(Size=1, AvailabilityZone=zone, ClientToken=token,
                 TagSpecifications=[{"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": "v"}]}])
    volume = ec2.create_volume(**order)["VolumeId"]
    assert ec2.create_volume(**order)["VolumeId"] == volume, "the same token made a second volume"
    ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    refused("IncorrectState", ec2.detach_volume, VolumeId=volume)
    ec2.delete_volume(VolumeId=volume)
    ec2.get_waiter("volume_deleted").wait(VolumeIds=[volume], WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    check("volumes, idempotent creation and waiters")


def main():
    image = sys.argv[1]
    ec2 = boto3.client("ec2")
    regions_and_types(ec2)
    errors(ec2, image)
    keys_and_groups(ec2)
    volumes(ec2)


main()
