//! IPv6 as guests are told of it: the kernel takes its route from the router's word, and
//! clients that are not ours get their addresses by DHCPv6.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use model::{GroupId, Protocol};

use crate::six::{WORLD, everyone, ip, pings};
use crate::world::{World, group, has, now, run};

const PATIENCE: Duration = Duration::from_secs(60);
const FIRST: &str = "2001:db8:1::1:5";
const SECOND: &str = "2001:db8:1::1:6";
const ROUTER: &str = "fe80::68:70ff:fe00:1";

/// A guest with two IPv6 addresses of which it knows nothing, and a world to reach.
fn world(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    let (host, net) = (world.namespace("host"), world.namespace("net"));
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    ip(&format!("-n {host} addr add fe80::2/64 dev {uplink} nodad"));
    ip(&format!("-n {net} addr add fe80::1/64 dev eth0 nodad"));
    ip(&format!("-n {net} addr add {WORLD}/64 dev eth0 nodad"));
    ip(&format!("-n {net} route add 2001:db8:1::/64 dev eth0"));
    world.desired.uplink.as_mut().unwrap().gateway6 = Some("fe80::1".parse().unwrap());
    let mut all = group(1, vec![(Protocol::Icmpv6 { kind: Some(128), code: None }, everyone())]);
    let rule = model::RuleId::from_random(66);
    all.egress.push(model::Rule { id: rule, protocol: Protocol::Any, peer: everyone() });
    let interface = world.add_guest(1, 1, "10.0.0.5");
    interface.ipv6 = vec![FIRST.parse().unwrap(), SECOND.parse().unwrap()];
    interface.subnet6 = Some("2001:db8:1::/64".parse().unwrap());
    interface.groups = vec![GroupId::from_random(1)];
    world.desired.groups = vec![all];
    world.start();
    world.apply();
    Some(world)
}

/// What the guest's `ip -6 …` shows, once it has `wanted` in it.
fn shows(world: &World, what: &str, wanted: &str) -> String {
    let begun = now();
    loop {
        let shown = run(world.command("g1", "ip").arg("-6").args(what.split_whitespace()));
        if shown.contains(wanted) {
            return shown;
        }
        assert!(now() - begun < PATIENCE, "no {wanted} in {shown}; {}", world.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Notes what it was told, and sets the addresses: for dhclient and dhcpcd alike.
fn script(world: &World) -> PathBuf {
    let path = world.path("told.sh");
    let told = world.path("told");
    let text = format!(
        "#!/bin/sh\n\
         address=\"${{new_ip6_address:-$new_dhcp6_ia_na1_ia_addr1}}\"\n\
         if [ -n \"$address\" ]; then\n\
         echo \"$reason $address $new_dhcp6_ia_na1_ia_addr2 \
         life=$new_preferred_life$new_dhcp6_ia_na1_ia_addr1_pltime \
         domain=$new_dhcp6_domain_search\" >> {told}\n\
         [ -z \"$new_ip6_address\" ] || ip -6 addr replace $address/128 dev eth0 nodad\n\
         fi\nexit 0\n",
        told = told.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What a client was told, once a line has it.
fn told(world: &World, wanted: &str) -> String {
    let begun = now();
    loop {
        let text = std::fs::read_to_string(world.path("told")).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| line.contains(wanted)) {
            return line.to_owned();
        }
        assert!(now() - begun < PATIENCE, "no {wanted} in {text}; {}", world.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_has_its_route_from_the_router_and_its_addresses_by_dhclient() {
    let test = "a_guest_has_its_route_from_the_router_and_its_addresses_by_dhclient";
    if !has(test, "dhclient") {
        return;
    }
    let Some(world) = world(test) else { return };
    let route = shows(&world, "route show default", "proto ra");
    assert!(route.contains(&format!("via {ROUTER} dev eth0")) && route.contains("mtu 1400"));
    shows(&world, "route show dev eth0", "2001:db8:1::/64");
    let own = shows(&world, "addr show dev eth0", "fe80::");
    assert!(!own.contains("2001:db8:1:"), "no address was made from the prefix: {own}");
    let mut client = world
        .command("g1", "dhclient")
        .args(["-6", "-d", "-1", "-v", "eth0", "-sf"])
        .arg(script(&world))
        .arg("-lf")
        .arg(world.path("leases6"))
        .arg("-pf")
        .arg(world.path("dhclient6.pid"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let first = told(&world, FIRST);
    let second = told(&world, SECOND);
    client.kill().unwrap();
    client.wait().unwrap();
    assert!(first.starts_with("BOUND6") && first.contains("life=140"), "{first}");
    assert!(first.contains("domain=region-1.internal"), "{first}");
    assert_eq!(second.split(' ').nth(1), Some(SECOND));
    assert!(pings(&world, "g1", WORLD), "by its route, from its address");
    assert!(pings(&world, "net", SECOND));
}

#[test]
fn dhcpcd_hears_the_router_and_gets_its_addresses() {
    let test = "dhcpcd_hears_the_router_and_gets_its_addresses";
    if !has(test, "dhcpcd") {
        return;
    }
    let Some(world) = world(test) else { return };
    let configuration = world.path("dhcpcd.conf");
    std::fs::write(&configuration, "ipv6only\noption dhcp6_domain_search\ntimeout 50\n").unwrap();
    let hook = script(&world);
    let once = format!("dhcpcd -q -1 -B -f {} -c {} eth0", configuration.display(), hook.display());
    let apart = format!(
        "set -e; mkdir -p /var/lib/dhcpcd /run/dhcpcd
         mount -t tmpfs none /var/lib/dhcpcd; mount -t tmpfs none /run/dhcpcd
         {once}"
    );
    run(world.command("g1", "unshare").args(["-m", "sh", "-c", &apart]));
    let line = told(&world, FIRST);
    assert!(line.starts_with("BOUND6") && line.contains(SECOND), "{line}");
    assert!(line.contains("life=140") && line.contains("domain=region-1.internal"), "{line}");
}
