//! Drops and new flows are told with their rules; rules are counted; a frame is
//! explained by the loaded program; flow logs are written.

use std::net::Ipv4Addr;
use std::sync::mpsc;
use std::time::Duration;

use rpc::dataplane::{FlowLog, FlowLogFormat, FrameQuestion, Observed, Seen};

use crate::elastic::reachable_guest;
use crate::traffic::{PATIENCE, connects, echo_server};
use crate::world::{World, anywhere, now, run, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const SHORT: Duration = Duration::from_millis(500);

/// What is observed from now on, in a thread of its own.
pub fn listen(world: &World, drops: bool) -> mpsc::Receiver<Observed> {
    let client = world.client();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let each = |observed| sender.send(observed).is_ok();
        runtime.block_on(client.dataplane_observe(None, drops, each)).unwrap();
    });
    // It listens when it has heard of a packet that nobody else asks about.
    let begun = now();
    loop {
        connects(world, "net", ELASTIC, 9, Duration::from_millis(50));
        if receiver.recv_timeout(Duration::from_millis(200)).is_ok() {
            return receiver;
        }
        assert!(now() - begun < PATIENCE, "nothing is told of a dropped packet");
    }
}

pub fn seen(events: &mpsc::Receiver<Observed>, port: u16) -> Seen {
    let begun = now();
    while now() - begun < PATIENCE {
        if let Ok(Observed::Seen(seen)) = events.recv_timeout(PATIENCE)
            && seen.destination_port == Some(port)
        {
            return seen;
        }
    }
    panic!("nothing was told of port {port}");
}

#[test]
fn drops_and_new_flows_are_told_with_the_rule_that_decided() {
    let test = "drops_and_new_flows_are_told_with_the_rule_that_decided";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere()), (tcp(99), anywhere())]);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    let (all, drops) = (listen(&world, false), listen(&world, true));
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 23, SHORT));

    let opened = seen(&all, 22);
    let rules = world.desired.groups[0].ingress.clone();
    assert!(opened.allowed && opened.reason == "new-flow", "{opened:?}");
    assert_eq!(opened.ingress_rule, Some(rules[0].id), "{opened:?}");
    assert_eq!(opened.interfaces, [world.desired.interfaces[0].id]);
    assert_eq!(opened.source, Some(crate::world::INTERNET.into()));
    let dropped = seen(&drops, 23);
    assert!(!dropped.allowed && dropped.reason == "ingress-denied", "{dropped:?}");
    let interface = world.status().interfaces.remove(0);
    assert!(interface.traffic.to_bytes > 0 && interface.flows == 1, "{interface:?}");
    assert!(drops.try_iter().all(|o| matches!(o, Observed::Seen(s) if !s.allowed)));
    // An established flow is told once, at its first packet.
    let first =
        all.try_iter().filter(|o| matches!(o, Observed::Seen(s) if s.destination_port == Some(22)));
    assert_eq!(first.count(), 0);

    // Rules are counted, also when their places change.
    let hits = |world: &World| world.ask(|c| async move { c.dataplane_rules().await }).unwrap();
    let of = |world: &World, id| hits(world).iter().find(|r| r.rule == id).unwrap().flows;
    assert_eq!(of(&world, rules[0].id), 1);
    assert_eq!(of(&world, rules[1].id), 0, "never hit");
    world.desired.groups[0].ingress.remove(1);
    let moved = rpc_rule(&rules[0]);
    world.desired.groups[0].ingress.insert(0, moved);
    world.apply();
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
    let sum: u64 = hits(&world).iter().map(|r| r.flows).sum();
    assert!(of(&world, rules[0].id) >= 1 && sum >= 2, "{:?}", hits(&world));
    world.kill();
    world.start();
    let after: u64 = hits(&world).iter().map(|r| r.flows).sum();
    assert_eq!(after, sum, "counts outlive the daemon");
}

/// Another rule of the same words.
fn rpc_rule(rule: &model::Rule) -> model::Rule {
    model::Rule { id: model::RuleId::from_random(0xabc), ..rule.clone() }
}

#[test]
fn a_flood_of_drops_is_told_in_part_and_says_how_many_were_left_out() {
    let test = "a_flood_of_drops_is_told_in_part_and_says_how_many_were_left_out";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.apply();
    let events = listen(&world, true);
    let sent = crate::traffic::inside(&world, "net", || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let begun = now();
        let mut sent = 0_u64;
        while now() - begun < Duration::from_millis(1500) {
            sent += u64::from(socket.send_to(b"x", (ELASTIC, 9)).is_ok());
        }
        sent
    });
    let sent = sent.join().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let (mut told, mut left_out) = (0_u64, 0_u64);
    for observed in events.try_iter() {
        match observed {
            Observed::Seen(_) => told += 1,
            Observed::LeftOut(count) => left_out += count,
        }
    }
    let dropped = world.status().reasons.get("ingress-denied").copied().unwrap_or(0);
    assert!(dropped >= sent / 2, "{dropped} of {sent} arrived");
    assert!(told > 0 && told < 20_000, "{told} were told");
    if dropped > 20_000 {
        assert!(left_out > 0, "of {dropped} dropped {told} were told, and none left out");
    }
    assert!(told + left_out <= dropped + 10, "{told} + {left_out} of {dropped}");
}

#[test]
fn a_captured_frame_is_explained_with_its_interface_rule_and_route() {
    let test = "a_captured_frame_is_explained_with_its_interface_rule_and_route";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.apply();
    // As captured there: addressed to the uplink itself.
    let device = world.desired.uplink.clone().unwrap().device;
    let mut ip = world.command("host", "ip");
    let told: serde_json::Value =
        serde_json::from_str(&run(ip.args(["-j", "link", "show", &device]))).unwrap();
    let uplink: model::Mac = told[0]["address"].as_str().unwrap().parse().unwrap();
    let explain = |world: &World, interface, port| {
        let (from, to) = match interface {
            None => ([203, 0, 113, 9], ELASTIC.octets()),
            Some(_) => ([10, 0, 0, 5], [203, 0, 113, 9]),
        };
        let source = if interface.is_some() { [2, 0, 0, 0, 1, 1] } else { [6; 6] };
        let builder =
            etherparse::PacketBuilder::ethernet2(source, uplink.octets()).ipv4(from, to, 64);
        let mut frame = Vec::new();
        builder.tcp(4000, port, 1, 100).syn().write(&mut frame, b"").unwrap();
        world.ask(|c| async move { c.dataplane_explain(&FrameQuestion { interface, frame }).await })
    };
    let id = world.desired.interfaces[0].id;
    let address = world.desired.interfaces[0].address;
    let allowed = explain(&world, None, 22).unwrap();
    assert_eq!((allowed.allowed, allowed.reason.as_str()), (true, "new-flow"));
    assert_eq!(allowed.ingress_rule, Some(world.desired.groups[0].ingress[0].id));
    assert_eq!(allowed.receiver, Some(id));
    assert!(allowed.route.contains(&address.to_string()), "{allowed:?}");
    let dropped = explain(&world, None, 23).unwrap();
    assert_eq!((dropped.allowed, dropped.reason.as_str()), (false, "ingress-denied"));
    let left = explain(&world, Some(id), 443).unwrap();
    assert_eq!((left.allowed, left.reason.as_str()), (true, "new-flow"));
    assert_eq!(left.egress_rule, Some(world.desired.groups[0].egress[0].id));
    assert!(left.route.contains("by 198.51.100.1"), "{left:?}");
    let before = world.status().reasons;
    explain(&world, None, 22).unwrap();
    assert_eq!(world.status().reasons, before, "a question leaves no trace");
    let short = FrameQuestion { interface: None, frame: vec![0; 5] };
    let refused = world.ask(|c| async move { c.dataplane_explain(&short).await }).unwrap_err();
    assert_eq!(refused.kind, rpc::Kind::Refused);
}

/// A log that is written every other second.
pub fn short_flow_log(world: &World) -> FlowLog {
    FlowLog {
        directory: world.path("flow-log"),
        format: FlowLogFormat::Aws,
        account: "123456789012".into(),
        interval_s: 2,
        file_bytes_max: 1 << 20,
        files_kept: 1,
    }
}

#[test]
fn flow_logs_hold_what_passed_and_what_did_not_with_packets_and_bytes() {
    let test = "flow_logs_hold_what_passed_and_what_did_not_with_packets_and_bytes";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.desired.flow_log = Some(short_flow_log(&world));
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    std::thread::sleep(Duration::from_millis(1200));
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 23, SHORT));
    let begun = now();
    let address = world.desired.interfaces[0].address.to_string();
    loop {
        let text = std::fs::read_to_string(world.path("flow-log/flow.log")).unwrap_or_default();
        let found = |port: &str, action: &str| {
            text.lines().map(|l| l.split(' ').collect::<Vec<_>>()).any(|f| {
                let whole = f.len() == 14 && f[0] == "2" && f[1] == "123456789012";
                let packets: u64 = f[8].parse().unwrap_or(0);
                let bytes: u64 = f[9].parse().unwrap_or(0);
                whole
                    && f[4] == address
                    && f[6] == port
                    && f[12] == action
                    && packets >= 1
                    && bytes >= 40 * packets
            })
        };
        if found("22", "ACCEPT") && found("23", "REJECT") && text.contains("NODATA") {
            return;
        }
        assert!(now() - begun < Duration::from_secs(60), "the log says:\n{text}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn what_the_early_drop_and_the_guard_refuse_is_told_too() {
    let test = "what_the_early_drop_and_the_guard_refuse_is_told_too";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.desired.uplink.as_mut().unwrap().early_drop = Some(true);
    world.start();
    world.apply();
    let device = world.desired.uplink.clone().unwrap().device;
    let mut ip = world.command("host", "ip");
    let told: serde_json::Value =
        serde_json::from_str(&run(ip.args(["-j", "link", "show", &device]))).unwrap();
    let mac = told[0]["address"].as_str().unwrap().to_owned();
    // Nobody answers for this one, so nobody would send to it otherwise.
    let nobody = Ipv4Addr::new(198, 51, 100, 222);
    let mut ip = world.command("net", "ip");
    let entry = ["neigh", "replace", "198.51.100.222", "lladdr", &mac, "dev", "eth0"];
    run(ip.args(entry).args(["nud", "permanent"]));
    let events = listen(&world, true);
    let guest = world.desired.interfaces[0].device.name().to_owned();
    let find = |reason: &str, provoke: &dyn Fn()| {
        let begun = now();
        while now() - begun < Duration::from_secs(30) {
            provoke();
            while let Ok(observed) = events.recv_timeout(Duration::from_millis(200)) {
                match observed {
                    Observed::Seen(seen) if seen.reason == reason => return seen,
                    _ => {}
                }
            }
        }
        panic!("nothing was told of {reason}");
    };
    let early = find("unknown-elastic-address", &|| {
        let send = move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"x", (nobody, 7777)).unwrap();
        };
        crate::traffic::inside(&world, "net", send).join().unwrap();
    });
    assert_eq!((early.device.as_str(), early.destination_port), (device.as_str(), Some(7777)));
    assert_eq!(early.source, Some(crate::world::INTERNET.into()));
    assert!(early.interfaces.is_empty() && !early.allowed, "{early:?}");
    // The host's own words to a guest carry no verdict.
    let guarded = find("unmarked", &|| {
        let mut ping = world.command("host", "ping");
        _ = ping.args(["-c", "1", "-W", "1", "-I", &guest, "10.0.0.5"]).output().unwrap();
    });
    assert_eq!(guarded.device, guest);
    assert_eq!(guarded.interfaces, [world.desired.interfaces[0].id]);
}
