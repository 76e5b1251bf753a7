//! A guest learns its address and what it is, and only what is its own.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use crate::traffic::inside;
use crate::world::{USER_DATA_BYTES, World, has, now, run};

/// A script for udhcpc and dhclient alike: notes what it was told, sets the address.
const CLIENT_SCRIPT: &str = r#"#!/bin/sh
reason="${reason:-$1}"
case "$reason" in
bound|renew)
    echo "address=$ip/$mask router=$router mtu=$mtu hostname=$hostname dns=$dns domain=$domain lease=$lease" >> "$TOLD"
    ip addr flush dev eth0; ip addr add "$ip/$mask" dev eth0
    ip route replace default via "$router" ;;
BOUND|RENEW|REBIND|REBOOT)
    echo "address=$new_ip_address/$new_subnet_mask router=$new_routers mtu=$new_interface_mtu hostname=$new_host_name dns=$new_domain_name_servers domain=$new_domain_name lease=$new_dhcp_lease_time" >> "$TOLD"
    ip addr flush dev eth0; ip addr add "$new_ip_address/$new_subnet_mask" dev eth0
    ip route replace default via "$new_routers" ;;
esac
exit 0
"#;

fn write_script(world: &World) -> std::path::PathBuf {
    let path = world.path("script");
    std::fs::write(&path, CLIENT_SCRIPT).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn udhcpc(world: &World, role: &str) -> String {
    let (script, told) = (write_script(world), world.path(&format!("told-{role}")));
    run(world
        .command(role, "busybox")
        .args(["udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "5", "-T", "1", "-O", "mtu", "-s"])
        .arg(script)
        .env("TOLD", &told));
    std::fs::read_to_string(told).unwrap()
}

fn dhclient(world: &World, role: &str) -> String {
    let (script, told) = (write_script(world), world.path(&format!("told-{role}")));
    let configuration = world.path("dhclient.conf");
    std::fs::write(
        &configuration,
        "timeout 10; request subnet-mask, routers, interface-mtu, host-name, \
         domain-name, domain-name-servers;\n",
    )
    .unwrap();
    // In the foreground, for it would stay to renew; ended once it has told.
    let mut client = world
        .command(role, "dhclient")
        .args(["-d", "-1", "eth0", "-sf"])
        .arg(script)
        .arg("-cf")
        .arg(configuration)
        .arg("-lf")
        .arg(world.path("leases"))
        .arg("-pf")
        .arg(world.path("dhclient.pid"))
        .arg("-e")
        .arg(format!("TOLD={}", told.display()))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = now();
    let mut heard = String::new();
    while !heard.ends_with('\n') && now() - begun < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
        heard = std::fs::read_to_string(&told).unwrap_or_default();
    }
    client.kill().unwrap();
    client.wait().unwrap();
    heard
}

fn curl(world: &World, role: &str, arguments: &[&str]) -> Output {
    world.command(role, "curl").args(["-s", "-m", "5", "-i"]).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const BASE: &str = "http://169.254.169.254";

fn token(world: &World, role: &str) -> String {
    let answer = text(&curl(
        world,
        role,
        &[
            "-X",
            "PUT",
            "-H",
            "X-aws-ec2-metadata-token-ttl-seconds: 60",
            &format!("{BASE}/latest/api/token"),
        ],
    ));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    answer.rsplit("\r\n").next().unwrap().to_owned()
}

fn get(world: &World, role: &str, token: &str, path: &str) -> String {
    let header = format!("X-aws-ec2-metadata-token: {token}");
    text(&curl(world, role, &["-H", &header, &format!("{BASE}{path}")]))
}

#[test]
fn two_dhcp_clients_learn_the_address_and_its_surroundings() {
    let test = "two_dhcp_clients_learn_the_address_and_its_surroundings";
    let Some(mut world) = World::new(test) else { return };
    world.add_guest(1, 1, "10.0.0.5");
    world.add_guest(2, 1, "10.0.0.6");
    world.start();
    world.apply();
    if has(test, "busybox") {
        let told = udhcpc(&world, "g1");
        assert!(told.contains("address=10.0.0.5/24 router=10.0.0.1 mtu=1400"), "{told}");
        assert!(told.contains("hostname=host-1 dns=10.0.0.2 domain=region-1.internal"), "{told}");
        assert!(told.contains("lease=3600"), "{told}");
    }
    if has(test, "dhclient") {
        let told = dhclient(&world, "g2");
        assert!(told.contains("address=10.0.0.6/255.255.255.0 router=10.0.0.1 mtu=1400"), "{told}");
        assert!(told.contains("hostname=host-2 dns=10.0.0.2 domain=region-1.internal"), "{told}");
    }
}

#[test]
fn metadata_is_read_with_a_token_and_not_without() {
    let test = "metadata_is_read_with_a_token_and_not_without";
    let Some(mut world) = World::new(test) else { return };
    if !has(test, "curl") {
        return;
    }
    world.add_guest(1, 1, "10.0.0.5");
    world.start();
    world.apply();
    world.configure_guest(1);
    let url = format!("{BASE}/latest/meta-data/instance-id");
    assert!(text(&curl(&world, "g1", &[&url])).starts_with("HTTP/1.1 401"));
    let token = token(&world, "g1");
    assert!(get(&world, "g1", &token, "/latest/meta-data/instance-id").ends_with("\r\n\r\ni-1"));
    assert!(get(&world, "g1", &token, "/2021-03-23/meta-data/public-keys/").ends_with("0=my-key"));
    assert!(get(&world, "g1", "forged", "/latest/user-data").starts_with("HTTP/1.1 401"));
    let forwarded = curl(
        &world,
        "g1",
        &[
            "-X",
            "PUT",
            "-H",
            "X-aws-ec2-metadata-token-ttl-seconds: 60",
            "-H",
            "X-Forwarded-For: 10.0.0.9",
            &format!("{BASE}/latest/api/token"),
        ],
    );
    assert!(text(&forwarded).starts_with("HTTP/1.1 403"), "{forwarded:?}");

    let header = format!("X-aws-ec2-metadata-token: {token}");
    let data = world
        .command("g1", "curl")
        .args(["-s", "-m", "10", "-H", &header, &format!("{BASE}/latest/user-data")])
        .output()
        .unwrap()
        .stdout;
    assert_eq!(data.len(), USER_DATA_BYTES);
    assert!(data.iter().all(|&b| b == 0xff), "binary user data arrives as it is");
}

#[test]
fn a_second_http_client_keeps_its_connection() {
    let test = "a_second_http_client_keeps_its_connection";
    let Some(mut world) = World::new(test) else { return };
    if !has(test, "python3") {
        return;
    }
    world.add_guest(1, 1, "10.0.0.5");
    world.start();
    world.apply();
    world.configure_guest(1);
    let script = r#"
import http.client
c = http.client.HTTPConnection("169.254.169.254", 80, timeout=5)
c.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
r = c.getresponse(); token = r.read().decode(); assert r.status == 200, r.status
socket = c.sock
for _ in range(50):
    c.request("GET", "/latest/meta-data/instance-id", headers={"X-aws-ec2-metadata-token": token})
    r = c.getresponse(); body = r.read(); assert (r.status, body) == (200, b"i-1"), (r.status, body)
assert c.sock is socket, "the connection was not kept"
c.request("HEAD", "/latest/user-data", headers={"X-aws-ec2-metadata-token": token})
r = c.getresponse(); assert r.read() == b"" and r.status == 200
print("kept")
"#;
    let said = run(world.command("g1", "python3").args(["-c", script]));
    assert_eq!(said.trim(), "kept");
}

#[test]
fn the_same_private_address_in_two_vpcs_is_served_apart() {
    let test = "the_same_private_address_in_two_vpcs_is_served_apart";
    let Some(mut world) = World::new(test) else { return };
    if !has(test, "curl") || !has(test, "busybox") {
        return;
    }
    world.add_guest(1, 1, "10.0.0.5");
    world.add_guest(2, 2, "10.0.0.5");
    world.start();
    world.apply();
    assert!(udhcpc(&world, "g1").contains("address=10.0.0.5/24"));
    assert!(udhcpc(&world, "g2").contains("hostname=host-2"));
    let (one, two) = (token(&world, "g1"), token(&world, "g2"));
    assert!(get(&world, "g1", &one, "/latest/meta-data/instance-id").ends_with("i-1"));
    assert!(get(&world, "g2", &two, "/latest/meta-data/instance-id").ends_with("i-2"));
    assert!(
        get(&world, "g2", &one, "/latest/meta-data/instance-id").starts_with("HTTP/1.1 401"),
        "a token is good for its own interface only"
    );
}

/// Says `pieces` over one connection, each in packets of its own, and gives all
/// that came back until the service closed it.
fn say(world: &World, role: &str, pieces: &[&[u8]]) -> String {
    let pieces: Vec<Vec<u8>> = pieces.iter().map(|p| p.to_vec()).collect();
    inside(world, role, move || {
        let mut stream = TcpStream::connect((Ipv4Addr::new(169, 254, 169, 254), 80)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        for piece in pieces {
            // The service may close before it has heard all.
            if stream.write_all(&piece).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut heard = Vec::new();
        _ = stream.read_to_end(&mut heard);
        String::from_utf8_lossy(&heard).into_owned()
    })
    .join()
    .unwrap()
}

#[test]
fn hostile_http_gets_its_status_and_the_next_client_is_served() {
    let test = "hostile_http_gets_its_status_and_the_next_client_is_served";
    let Some(mut world) = World::new(test) else { return };
    world.add_guest(1, 1, "10.0.0.5");
    world.start();
    world.apply();
    world.configure_guest(1);
    let long = [b'a'; 20_000];
    let request = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let bytes: Vec<&[u8]> = request.chunks(1).collect();
    for (pieces, status) in [
        (vec![&b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"[..]], "400"),
        (vec![&b"GET /"[..], &long, b" HTTP/1.1\r\n\r\n"], "414"),
        (vec![&b"GET / HTTP/1.1\r\nHost: "[..], &long], "431"),
        (vec![&b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"[..]], "405"),
        (bytes, "401"),
    ] {
        let heard = say(&world, "g1", &pieces);
        assert!(heard.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {heard:?}");
    }
}

#[test]
fn a_guest_that_floods_the_responder_takes_nothing_from_another() {
    let test = "a_guest_that_floods_the_responder_takes_nothing_from_another";
    let Some(mut world) = World::new(test) else { return };
    if !has(test, "curl") {
        return;
    }
    world.add_guest(1, 1, "10.0.0.5");
    world.add_guest(2, 2, "10.0.0.5");
    world.start();
    world.apply();
    world.configure_guest(1);
    world.configure_guest(2);
    let flood = inside(&world, "g1", || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68)).unwrap();
        socket.set_broadcast(true).unwrap();
        for _ in 0..30_000 {
            _ = socket.send_to(&[0x42; 300], (Ipv4Addr::BROADCAST, 67));
        }
    });
    for _ in 0..10 {
        let token = token(&world, "g2");
        assert!(get(&world, "g2", &token, "/latest/meta-data/instance-id").ends_with("i-2"));
    }
    flood.join().unwrap();
    let status = world.status();
    let count = |n: usize, reason: &str| {
        status.interfaces[n].reasons.get(reason).copied().unwrap_or_default()
    };
    // The programs stop what comes faster than the responder would take it.
    let limited = |n: usize| count(n, "linklocal-allowance-exceeded") + count(n, "respond-limited");
    assert!(limited(0) > 0, "{:?}", status.interfaces);
    assert_eq!(limited(1), 0, "{:?}", status.interfaces);
    assert_eq!(count(1, "respond-metadata-answered"), 20);
}
