//! Other people's tools look at an elastic address and press on it: nmap, hping3
//! and iperf3, none of which knows what we believe.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use model::{GroupId, PortRange, Protocol};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, PATIENCE, connects, echo_datagrams, echo_server, inside};
use crate::world::{INTERNET, World, anywhere, has, run, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const NEIGHBOURS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 201);

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;

/// A packet of the world as the guest hears it. An ICMP error is of the guest's
/// own packet that it quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Heard {
    protocol: u8,
    /// The guest's.
    port: u16,
    tcp_flags: u8,
}

/// What a guest hears, below its own firewall and sockets.
struct Ear {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<Heard, usize>>,
}

impl Ear {
    /// It listens when this returns.
    fn at(world: &World, role: &str) -> Self {
        let opened = inside(world, role, || {
            let (family, kind) = (AddressFamily::Packet, SockType::Datagram);
            let flags = SockFlag::empty();
            // Packets of a protocol, and not of all, are only those that come.
            let socket = socket(family, kind, flags, SockProtocol::EthIp).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).unwrap();
            socket
        });
        let socket = opened.join().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut counts, mut packet) = (BTreeMap::new(), [0; 2048]);
            loop {
                // At the end what came is counted, and what still comes is not waited for.
                let last = stopped.load(Ordering::Relaxed);
                let flags = if last { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
                match recv(socket.as_raw_fd(), &mut packet, flags) {
                    Ok(length) => *counts.entry(heard(&packet[..length])).or_default() += 1,
                    Err(_) if last => return counts,
                    Err(_) => {}
                }
            }
        });
        Self { stop, thread }
    }

    fn counts(self) -> BTreeMap<Heard, usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn heard(packet: &[u8]) -> Heard {
    let (protocol, transport) = transport(packet);
    let port =
        |at: usize| transport.get(at..at + 2).map_or(0, |p| u16::from_be_bytes([p[0], p[1]]));
    match (protocol, transport.first()) {
        (TCP, _) => Heard { protocol, port: port(2), tcp_flags: transport[13] },
        (ICMP, Some(3 | 11 | 12)) => {
            let (protocol, quoted) = self::transport(&transport[8..]);
            Heard { protocol, port: u16::from_be_bytes([quoted[0], quoted[1]]), tcp_flags: 0 }
        }
        (UDP, _) => Heard { protocol, port: port(2), tcp_flags: 0 },
        _ => Heard { protocol, port: 0, tcp_flags: 0 },
    }
}

fn transport(packet: &[u8]) -> (u8, &[u8]) {
    (packet[9], &packet[usize::from(packet[0] & 0xf) * 4..])
}

/// How many ports nmap says are in each state, and which are `open`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Scan {
    open: BTreeSet<u16>,
    states: BTreeMap<String, usize>,
}

/// Reads nmap's line for one host (`-oG`): the ports it names, and how many it
/// left out because most are as they are.
fn scan(report: &str) -> Scan {
    let mut scan = Scan::default();
    let host = report.lines().filter(|line| line.starts_with("Host:"));
    for field in host.flat_map(|line| line.split('\t')) {
        if let Some(ports) = field.strip_prefix("Ports: ") {
            for port in ports.split(", ") {
                let mut parts = port.split('/');
                let number = parts.next().unwrap().trim().parse().unwrap();
                let state = parts.next().unwrap();
                *scan.states.entry(state.into()).or_default() += 1;
                if state == "open" {
                    scan.open.insert(number);
                }
            }
        }
        if let Some(rest) = field.strip_prefix("Ignored State: ") {
            let (state, count) = rest.trim().split_once(" (").unwrap();
            let count: usize = count.trim_end_matches(')').parse().unwrap();
            *scan.states.entry(state.into()).or_default() += count;
        }
    }
    scan
}

/// Scans the elastic address in the background, with patience for a busy machine: each
/// probe waits a second and is sent three times.
fn nmap(world: &World, arguments: &str) -> JoinHandle<String> {
    let mut command = world.command("net", "timeout");
    command.args("60 nmap -n -Pn --min-rtt-timeout 1s --initial-rtt-timeout 1s".split(' '));
    command.args("--max-retries 2 --min-rate 500 --max-scan-delay 5ms -oG -".split(' '));
    command.args(arguments.split_whitespace()).arg(ELASTIC.to_string());
    std::thread::spawn(move || run(&mut command))
}

const PORTS: &str = "7,20-25,53,67-68,79-81,123,443,5000,8080,65535";
const PORTS_LEN: usize = 18;

#[test]
fn nmap_sees_the_allowed_port_and_the_guest_hears_nothing_else() {
    let test = "nmap_sees_the_allowed_port_and_the_guest_hears_nothing_else";
    if !has(test, "nmap") {
        return;
    }
    let Some(mut world) = World::new(test) else { return };
    let echo = Protocol::Udp(PortRange::single(7));
    reachable_guest(&mut world, vec![(tcp(80), anywhere()), (echo, anywhere())]);
    world.start();
    world.apply();
    // What could be found, were it not for the rules.
    [22, 80, 443].into_iter().for_each(|port| echo_server(&world, "g1", port));
    [7, 53].into_iter().for_each(|port| echo_datagrams(&world, "g1", port));

    // Only a first packet begins a flow: nobody hears of the others, on whatever port.
    let ear = Ear::at(&world, "g1");
    let stray = ["-sA", "-sF", "-sN", "-sX", "-sM", "-sW"]
        .map(|kind| (kind, nmap(&world, &format!("{kind} -p {PORTS}"))));
    for (kind, report) in stray {
        let report = report.join().unwrap();
        let state = if matches!(kind, "-sA" | "-sW") { "filtered" } else { "open|filtered" };
        let states = BTreeMap::from([(state.to_owned(), PORTS_LEN)]);
        assert_eq!(scan(&report), Scan { open: BTreeSet::new(), states }, "{kind}: {report}");
    }
    assert_eq!(ear.counts(), BTreeMap::new(), "packets that begin no flow reached the guest");

    let ear = Ear::at(&world, "g1");
    let datagrams = nmap(&world, &format!("-sU -p {PORTS}"));
    // By a port that careless firewalls let in, and in pieces.
    let from_dns = nmap(&world, &format!("-sS -g 53 -p {PORTS}"));
    let pieces = nmap(&world, &format!("-sS -f -p {PORTS}"));
    let openings = nmap(&world, "-sS -p 1-1024");
    let one_open = |port, others: &str, len: usize| Scan {
        open: [port].into(),
        states: [("open".into(), 1), (others.into(), len - 1)].into(),
    };
    let filtered = one_open(80, "filtered", 1024);
    assert_eq!(scan(&openings.join().unwrap()), filtered);
    assert_eq!(scan(&from_dns.join().unwrap()), one_open(80, "filtered", PORTS_LEN));
    assert_eq!(scan(&datagrams.join().unwrap()), one_open(7, "open|filtered", PORTS_LEN));
    let pieces = scan(&pieces.join().unwrap());
    assert!(pieces.open.is_subset(&[80].into()), "{pieces:?}");

    let counts = ear.counts();
    let allowed = |heard: &Heard| matches!((heard.protocol, heard.port), (TCP, 80) | (UDP, 7));
    let others: Vec<_> = counts.iter().filter(|(heard, _)| !allowed(heard)).collect();
    assert!(others.is_empty(), "no rule allows these: {others:?}");
    assert!(counts.keys().any(|heard| heard.protocol == TCP), "the ear hears");
    assert!(counts.keys().any(|heard| heard.protocol == UDP), "the ear hears");
}

/// More than the half-open table has places (65 536).
const FLOOD: u32 = 100_000;
const FLOWS: usize = 4;

/// Two guests, the first of them pressed on by what `flood` starts, while flows to both talk
/// and afterwards: none may end, and others must begin.
fn a_flood_ends_no_flow(test: &str, flood: impl FnOnce(&World)) {
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(80), anywhere())]);
    let neighbour = world.add_guest(2, 1, "10.0.0.6");
    neighbour.elastic = Some(NEIGHBOURS);
    neighbour.groups = vec![GroupId::from_random(1)];
    world.configure_guest(2);
    world.start();
    world.apply();
    echo_server(&world, "g1", 80);
    echo_server(&world, "g2", 80);
    let to = [ELASTIC, NEIGHBOURS].repeat(FLOWS);
    let flows: Vec<_> = to.iter().map(|to| Flow::open(&world, "net", *to, 80)).collect();
    let before: Vec<_> = flows.iter().map(Flow::rounds).collect();
    let arrived_before = arrived(&world);

    flood(&world);
    let came = arrived(&world) - arrived_before;
    assert!(came > u64::from(FLOOD) / 2, "only {came} of the flood came");

    let during: Vec<_> = flows.iter().zip(before).map(|(flow, n)| flow.rounds() - n).collect();
    eprintln!("{came} openings came; rounds of the flows meanwhile: {during:?}");
    flows.iter().for_each(|flow| flow.goes_on(5));
    let ended: Vec<_> = flows.into_iter().filter_map(|flow| flow.finish().err()).collect();
    assert_eq!(ended, Vec::<String>::new(), "flows ended");
    assert!(connects(&world, "net", NEIGHBOURS, 80, PATIENCE), "another begins at the neighbour");
    assert!(connects(&world, "net", ELASTIC, 80, PATIENCE), "and at the one that was flooded");
}

/// Packets that asked for a flow. Some sources are ones that cannot be in the internet.
fn arrived(world: &World) -> u64 {
    let reasons = &world.status().interfaces[0].reasons;
    ["new-flow", "martian"].iter().filter_map(|reason| reasons.get(*reason)).sum()
}

#[test]
fn a_flood_of_openings_from_anywhere_ends_no_flow() {
    let test = "a_flood_of_openings_from_anywhere_ends_no_flow";
    if !has(test, "hping3") {
        return;
    }
    a_flood_ends_no_flow(test, |world| {
        let mut flood = world.command("net", "timeout");
        flood.args("60 hping3 -n -q -S -p 80 --rand-source -i u1".split(' '));
        flood.args(["-c", &FLOOD.to_string(), &ELASTIC.to_string()]);
        let said = flood.output().unwrap();
        let said = String::from_utf8_lossy(&said.stderr);
        assert!(said.contains(&format!("{FLOOD} packets transmitted")), "{said}");
    });
}

/// What trafgen sends by turns: an opening, a datagram to any port, any protocol, anything
/// that calls itself IPv4, anything that calls itself IPv6.
fn trafgen_turns(from: &str, to: &str) -> String {
    let [a, b, c, d] = ELASTIC.octets();
    let address = format!("{a}, {b}, {c}, {d}");
    let ethernet = format!("eth(da={to}, sa={from}");
    let address_in = format!("ipv4(sa=drnd(), da={ELASTIC}, ttl=64)");
    let any_protocol = "const16(80), drnd(2), const16(0), 64, drnd(1), csumip(14, 33), drnd(4)";
    [
        format!("{{ {ethernet}), {address_in}, tcp(sp=drnd(), dp=80, syn, seq=drnd()) }}"),
        format!("{{ {ethernet}), {address_in}, udp(sp=drnd(), dp=drnd()), drnd(40) }}"),
        format!("{{ {ethernet}, type=0x0800), 0x45, 0, {any_protocol}, {address}, drnd(60) }}"),
        format!("{{ {ethernet}, type=0x0800), drnd(50) }}"),
        format!("{{ {ethernet}, type=0x86dd), drnd(70) }}"),
    ]
    .join("\n")
}

fn mac_of(world: &World, role: &str, device: &str) -> String {
    let shown = run(world.command(role, "ip").args(["-j", "link", "show", "dev", device]));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    shown[0]["address"].as_str().unwrap().to_owned()
}

#[test]
fn a_flood_of_garbage_and_openings_ends_no_flow_and_only_openings_arrive() {
    let test = "a_flood_of_garbage_and_openings_ends_no_flow_and_only_openings_arrive";
    if !has(test, "trafgen") {
        return;
    }
    a_flood_ends_no_flow(test, |world| {
        let uplink = &world.desired.uplink.as_ref().unwrap().device;
        let (from, to) = (mac_of(world, "net", "eth0"), mac_of(world, "host", uplink));
        let turns = world.path("turns.trafgen");
        std::fs::write(&turns, trafgen_turns(&from, &to)).unwrap();
        let ear = Ear::at(world, "g1");
        let mut flood = world.command("net", "timeout");
        flood.args("60 trafgen --cpus 1 --no-sock-mem --dev eth0 --num".split(' '));
        let packets = (FLOOD * TURNS).to_string();
        let said = run(flood.args([&packets, "--conf"]).arg(&turns));
        assert!(said.contains(&format!("{packets} packets outgoing")), "{said}");
        let heard = ear.counts();
        let others: Vec<_> = heard.keys().filter(|h| (h.protocol, h.port) != (TCP, 80)).collect();
        assert!(others.is_empty(), "no rule allows these: {others:?}");
    });
}

/// As many as `trafgen_turns` has.
const TURNS: u32 = 5;

const IPERF_BYTES: u64 = 100 << 20;

/// One conversation of iperf3, which must say that all was sent and no error happened.
fn iperf(world: &World, server: &str, client: &str, to: Ipv4Addr, port: u16, way: &[&str]) {
    let port = port.to_string();
    let mut serving = world.command(server, "timeout");
    serving.args(["60", "iperf3", "-s", "-1", "--forceflush", "-p", &port]);
    let mut serving = serving.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(serving.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "iperf3 does not listen");
    }
    let mut asking = world.command(client, "timeout");
    asking.args(["60", "iperf3", "-J", "-n", &IPERF_BYTES.to_string(), "-p", &port]);
    let report = run(asking.args(["-c", &to.to_string()]).args(way));
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert!(serving.wait().unwrap().success(), "{rest}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report.get("error"), None, "{report}");
    let end = &report["end"];
    let bytes = |sum: &str| end[sum]["bytes"].as_u64().unwrap();
    assert!(bytes("sum_sent") >= IPERF_BYTES, "{end}");
    // Those that were under way at the last moment are not counted.
    assert!(bytes("sum_received") > IPERF_BYTES / 2, "{end}");
}

#[test]
fn iperf3_ends_well_both_ways_with_default_offloads() {
    let test = "iperf3_ends_well_both_ways_with_default_offloads";
    if !has(test, "iperf3") {
        return;
    }
    let Some(mut world) = World::new(test) else { return };
    let ports = Protocol::Tcp(PortRange::new(5201, 5202).unwrap());
    reachable_guest(&mut world, vec![(ports, anywhere())]);
    world.start();
    world.apply();
    for (port, way) in [(5201, &[][..]), (5202, &["-R"])] {
        iperf(&world, "g1", "net", ELASTIC, port, way);
        iperf(&world, "net", "g1", INTERNET, port, way);
    }
}
