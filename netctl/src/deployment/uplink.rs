//! The uplink that `netctl up` makes for itself where the user names none: a
//! veth whose far end stands in a namespace that plays the internet.
//!
//! ```text
//!   host                                │ namespace <name>-internet
//!   <name>-up 198.51.100.2/24 ──veth────┼── internet0 198.51.100.1/24 (the gateway)
//!     elastic addresses                 │   lo 203.0.113.10/24, 192.0.2.10/24
//!     198.51.100.128/25 (in eBPF)       │     (clients, to be chosen by `ssh -b`)
//! ```
//! Neither end forwards and the namespace has no other device: nothing leaves
//! the machine. All of it is made by iproute2, the one program that every host
//! with a network has; what exists already and fits is left as it is, since
//! guests may be using it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use ipnet::Ipv4Net;
use rpc::Deployment;

use super::config::Uplink;
use crate::failure::{Failure, Outcome};

/// TEST-NET-2 (RFC 5737).
const SUBNET_FIRST: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24);

/// Where the first is taken: subnets of the range for benchmarks (RFC 2544).
const SUBNETS_FURTHER: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 16);

/// Where the clients live in the namespace that plays the internet: TEST-NET-3
/// and TEST-NET-1. On `lo`, every address of the subnet serves as a source.
pub const CLIENTS: [&str; 2] = ["203.0.113.10/24", "192.0.2.10/24"];

/// The device in that namespace.
pub const FAR_DEVICE: &str = "internet0";

/// The narrowest subnet that holds two ends and a useful half of elastic addresses.
const PREFIX_MAX: u8 = 28;

/// Checks a subnet that the user gave.
pub fn check_subnet(subnet: Ipv4Net) -> Outcome {
    if subnet.prefix_len() > PREFIX_MAX {
        return Err(Failure::unfit(format!(
            "own uplink subnet {subnet}: too narrow; give a /{PREFIX_MAX} or wider"
        )));
    }
    Ok(())
}

/// What the uplink in `subnet` is: `.1` is the gateway, `.2` the host, and the
/// upper half are elastic addresses.
pub fn describe(deployment: &Deployment, subnet: Ipv4Net) -> Outcome<Uplink> {
    check_subnet(subnet)?;
    let subnet = subnet.trunc();
    let upper =
        subnet.subnets(subnet.prefix_len() + 1).ok().and_then(|halves| halves.last()).ok_or_else(
            || Failure::unfit(format!("own uplink subnet {subnet}: cannot be halved")),
        )?;
    Ok(Uplink {
        device: deployment.own_uplink(),
        gateway: address(subnet, 1),
        elastic_range: upper,
        own_subnet: Some(subnet),
    })
}

fn address(subnet: Ipv4Net, index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + index)
}

/// The first subnet that overlaps nothing that this host has an address in.
pub fn choose_subnet(deployment: &Deployment) -> Outcome<Ipv4Net> {
    let taken = addresses_except(&ip(&["-4", "-o", "addr", "show"])?, &deployment.own_uplink());
    free_subnet(&taken).ok_or_else(|| {
        Failure::unfit(format!("own uplink: every subnet of {SUBNETS_FURTHER} is in use"))
            .hint("give one with --own-uplink-subnet")
    })
}

fn free_subnet(taken: &[Ipv4Net]) -> Option<Ipv4Net> {
    let overlaps = |a: &Ipv4Net, b: &Ipv4Net| a.contains(&b.network()) || b.contains(&a.network());
    std::iter::once(SUBNET_FIRST)
        .chain(SUBNETS_FURTHER.subnets(24).into_iter().flatten())
        .find(|candidate| !taken.iter().any(|t| overlaps(candidate, &t.trunc())))
}

/// From `ip -o addr`: `2: eth0    inet 10.0.0.2/24 brd …`.
fn addresses_except(listing: &str, own_device: &str) -> Vec<Ipv4Net> {
    listing
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let device = words.next()?;
            let address = words.skip_while(|w| *w != "inet").nth(1)?;
            (device != own_device).then(|| {
                address.parse().or_else(|_| address.parse::<Ipv4Addr>().map(Ipv4Net::from)).ok()
            })?
        })
        .collect()
}

/// Makes what is missing of the uplink.
pub fn make(deployment: &Deployment, uplink: &Uplink) -> Outcome {
    let Some(subnet) = uplink.own_subnet else { return Ok(()) };
    let (near, namespace) = (deployment.own_uplink(), deployment.internet_namespace());
    if !is_whole(&near, &namespace) {
        remove(deployment)?;
        ip(&["netns", "add", &namespace])?;
        ip(&[
            "link", "add", &near, "type", "veth", "peer", "name", FAR_DEVICE, "netns", &namespace,
        ])?;
    }
    // Before it is up, so that it never forwards nor speaks IPv6 by itself.
    set(&format!("ipv4/conf/{near}/forwarding"), "0")?;
    set(&format!("ipv6/conf/{near}/disable_ipv6"), "1")?;
    inside(
        &namespace,
        &format!(
            "echo 0 > /proc/sys/net/ipv4/ip_forward; \
             echo 1 > /proc/sys/net/ipv6/conf/{FAR_DEVICE}/disable_ipv6 || true; \
             echo 2 > /proc/sys/net/ipv4/conf/{FAR_DEVICE}/arp_announce"
        ),
    )?;
    let width = subnet.prefix_len();
    ip(&["addr", "replace", &format!("{}/{width}", address(subnet, 2)), "dev", &near])?;
    let gateway = format!("{}/{width}", uplink.gateway);
    ip(&["-n", &namespace, "addr", "replace", &gateway, "dev", FAR_DEVICE])?;
    for client in CLIENTS {
        ip(&["-n", &namespace, "addr", "replace", client, "dev", "lo"])?;
    }
    ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
    ip(&["-n", &namespace, "link", "set", FAR_DEVICE, "up"])?;
    ip(&["link", "set", &near, "up"])?;
    Ok(())
}

/// Removes the uplink; what is missing of it is no error.
pub fn remove(deployment: &Deployment) -> Outcome {
    let (near, namespace) = (deployment.own_uplink(), deployment.internet_namespace());
    if has_device(&near) {
        ip(&["link", "del", &near])?;
    }
    if has_namespace(&namespace) {
        ip(&["netns", "del", &namespace])?;
    }
    Ok(())
}

pub fn has_device(name: &str) -> bool {
    ip(&["-o", "link", "show", "dev", name]).is_ok()
}

pub fn has_namespace(name: &str) -> bool {
    Path::new("/run/netns").join(name).exists()
}

fn is_whole(near: &str, namespace: &str) -> bool {
    has_device(near)
        && has_namespace(namespace)
        && ip(&["-n", namespace, "-o", "link", "show", "dev", FAR_DEVICE]).is_ok()
}

/// Writes a network setting; a host built without the protocol lacks the file.
fn set(name: &str, value: &str) -> Outcome {
    let path = Path::new("/proc/sys/net").join(name);
    match fs::write(&path, value) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("setting {}: write {value}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}

fn inside(namespace: &str, script: &str) -> Outcome<String> {
    ip(&["netns", "exec", namespace, "sh", "-c", script])
}

/// Runs iproute2; its complaint is the cause of the failure.
pub fn ip(arguments: &[&str]) -> Outcome<String> {
    let deed = || format!("ip {}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).output().map_err(|e| {
        Failure::failed(format!("{}: {e}", deed())).hint("apt-get install iproute2")
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Failure::failed(format!("{}: {}", deed(), String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_uplink_takes_the_upper_half_for_elastic_addresses() {
        let deployment = Deployment::new("hp", "/s", "/r").unwrap();
        let uplink = describe(&deployment, SUBNET_FIRST).unwrap();
        assert_eq!(uplink.device, "hp-up");
        assert_eq!(uplink.gateway, Ipv4Addr::new(198, 51, 100, 1));
        assert_eq!(uplink.elastic_range.to_string(), "198.51.100.128/25");
        assert!(describe(&deployment, "198.51.100.0/29".parse().unwrap()).is_err());
    }

    #[test]
    fn a_subnet_that_the_host_uses_is_passed_over() {
        assert_eq!(free_subnet(&[]), Some(SUBNET_FIRST));
        let taken = ["198.51.100.2/24".parse().unwrap(), "198.18.0.2/23".parse().unwrap()];
        assert_eq!(free_subnet(&taken).unwrap().to_string(), "198.18.2.0/24");
        assert_eq!(free_subnet(&[taken[0], "198.18.0.0/15".parse().unwrap()]), None);
    }

    #[test]
    fn the_listing_of_addresses_is_read_without_the_own_device() {
        let listing = "1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever\n\
                       2: eth0    inet 10.1.2.3/24 brd 10.1.2.255 scope global eth0\\ x\n\
                       9: hp-up    inet 198.51.100.2/24 scope global hp-up\\ x\n\
                       10: tun0    inet 10.9.0.1 peer 10.9.0.2/32 scope global tun0\\ x\n";
        let found: Vec<String> =
            addresses_except(listing, "hp-up").iter().map(Ipv4Net::to_string).collect();
        assert_eq!(found, ["127.0.0.1/8", "10.1.2.3/24", "10.9.0.1/32"]);
    }
}
