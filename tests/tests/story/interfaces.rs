//! An instance with two interfaces, an elastic address on each: the guest answers each by the
//! interface that was asked, and each interface's groups decide for themselves.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tests::guest::Guest;
use tests::operator::Aws;
use tests::program::eventually;
use tests::story::Story;

/// A guest boots, or one ends, on a machine that emulates others.
const BOUND: Duration = Duration::from_secs(180);

struct Interface {
    id: String,
    mac: String,
    private: String,
    allocation: String,
    elastic: Ipv4Addr,
}

pub fn serve(story: &Story, aws: &Aws) -> anyhow::Result<String> {
    let (id, interfaces) = launch(story, aws)?;
    let guests = interfaces.iter().map(|i| story.guest_at(i.elastic)).collect::<Vec<_>>();
    for (guest, interface) in guests.iter().zip(&interfaces) {
        guest.await_ssh(BOUND)?;
        // The client's address and port, then the server's.
        let asked = guest.sh("echo $SSH_CONNECTION")?;
        let at = asked.split_whitespace().nth(2).unwrap_or_default();
        ensure!(at == interface.private, "asked at {}, heard at `{asked}`", interface.private);
    }
    let [first, second] = &guests[..] else { bail!("not two guests") };
    let devices = first.sh("cat /sys/class/net/eth0/address /sys/class/net/eth1/address")?;
    let told = first.metadata("network/interfaces/macs/")?;
    for (Interface { mac, .. }, device) in interfaces.iter().zip(devices.lines()) {
        ensure!(mac == device, "{mac} is {device} in the guest");
        ensure!(told.contains(mac), "the metadata service does not tell {mac}: {told}");
    }

    renews(second, &interfaces[1].private)?;
    let named = ["--group-name", "closed", "--description", "nobody"];
    let closed = aws.call(&[&["create-security-group"], &named[..]].concat())?;
    let closed = text(&closed["GroupId"])?;
    regroup(aws, &interfaces[0], &closed)?;
    answers_alone(second, first)?;
    regroup(aws, &interfaces[1], &closed)?;
    regroup(aws, &interfaces[0], story.group())?;
    answers_alone(first, second)?;

    aws.run(&["terminate-instances", "--instance-ids", &id])?.success()?;
    eventually("the instance is terminated", BOUND, || {
        let seen = instance(aws, &id)?;
        ensure!(seen["State"]["Name"] == "terminated", "{}", seen["State"]);
        Ok(())
    })?;
    for Interface { allocation, .. } in &interfaces {
        aws.run(&["release-address", "--allocation-id", allocation])?.success()?;
    }
    aws.run(&["delete-security-group", "--group-id", &closed])?.success()?;
    let [one, two] =
        [&interfaces[0], &interfaces[1]].map(|i| format!("{} ({})", i.elastic, i.private));
    Ok(format!("{id} at {one} and {two}"))
}

/// What its further interface's lease says anew adds no rule, and takes away those of other addresses.
fn renews(guest: &Guest, private: &str) -> anyhow::Result<()> {
    let renewed = format!(
        "ip rule add from 192.0.2.9 table 101 && interface=eth1 ip={private} mask=24 \
         /etc/udhcpc.script renew && ip rule"
    );
    let rules = guest.sh(&renewed)?;
    let own = rules.lines().filter(|line| line.contains("lookup 101")).collect::<Vec<_>>();
    ensure!(matches!(own[..], [rule] if rule.contains(&format!("from {private} "))), "{rules}");
    Ok(())
}

/// Gives an interface this one group.
fn regroup(aws: &Aws, interface: &Interface, group: &str) -> anyhow::Result<()> {
    let change = ["modify-network-interface-attribute", "--network-interface-id", &interface.id];
    aws.run(&[&change[..], &["--groups", group]].concat())?.success().map(drop)
}

/// Waits until one interface lets us in and the other does not. The same guest stands behind
/// both: what it answers at one, before and after, says that it is not slow at the other.
fn answers_alone(open: &Guest, shut: &Guest) -> anyhow::Result<()> {
    let what = format!("{} answers, and {} does not", open.address, shut.address);
    let bound = Duration::from_secs(15);
    eventually(&what, BOUND, || {
        open.sh_within("true", bound)?;
        let Err(refused) = shut.sh_within("true", bound) else { bail!("both answer") };
        // Not even its kernel says a word.
        let silent = format!("{refused:#}").contains("connect to host");
        ensure!(silent, "it is slow, but answers: {refused:#}");
        open.sh_within("true", bound).map(drop)
    })
}

fn launch(story: &Story, aws: &Aws) -> anyhow::Result<(String, Vec<Interface>)> {
    let subnets = aws.call(&["describe-subnets"])?;
    let subnet = &subnets["Subnets"][0]["SubnetId"];
    let wanted =
        [0, 1].map(|n| json!({"DeviceIndex": n, "SubnetId": subnet, "Groups": [story.group()]}));
    let wanted = Value::from(wanted.to_vec()).to_string();
    let words = ["run-instances", "--instance-type", "t3.micro", "--key-name", "story"];
    let image = ["--image-id", story.image(), "--network-interfaces", &wanted];
    let id = text(&aws.call(&[&words[..], &image].concat())?["Instances"][0]["InstanceId"])?;
    let running = eventually("the instance runs", BOUND, || {
        let seen = instance(aws, &id)?;
        ensure!(seen["State"]["Name"] == "running", "{}", seen["State"]);
        Ok(seen)
    })?;
    let mut shown = running["NetworkInterfaces"].as_array().context("no interfaces")?.clone();
    shown.sort_by_key(|i| i["Attachment"]["DeviceIndex"].as_u64());
    let indices = shown.iter().map(|i| i["Attachment"]["DeviceIndex"].as_u64());
    ensure!(indices.eq([Some(0), Some(1)]), "{shown:#?}");
    let interfaces = shown.iter().map(|interface| associate(aws, interface));
    Ok((id, interfaces.collect::<anyhow::Result<_>>()?))
}

/// Gives it an elastic address.
fn associate(aws: &Aws, interface: &Value) -> anyhow::Result<Interface> {
    let id = text(&interface["NetworkInterfaceId"])?;
    let address = aws.call(&["allocate-address", "--domain", "vpc"])?;
    let allocation = text(&address["AllocationId"])?;
    let words = ["associate-address", "--allocation-id", &allocation];
    aws.call(&[&words[..], &["--network-interface-id", &id]].concat())?;
    Ok(Interface {
        id,
        allocation,
        mac: text(&interface["MacAddress"])?,
        private: text(&interface["PrivateIpAddress"])?,
        elastic: text(&address["PublicIp"])?.parse()?,
    })
}

fn instance(aws: &Aws, id: &str) -> anyhow::Result<Value> {
    let seen = aws.call(&["describe-instances", "--instance-ids", id])?;
    Ok(seen["Reservations"][0]["Instances"][0].clone())
}

fn text(value: &Value) -> anyhow::Result<String> {
    value.as_str().map(str::to_owned).with_context(|| format!("{value} is no text"))
}
