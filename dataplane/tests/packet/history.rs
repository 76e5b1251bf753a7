//! Histories of packets, rule changes and time against a plain set of flows.
//!
//! The reference knows what the documents say and nothing of tables: a flow that is known
//! goes on, another one needs a rule that permits it now, and a silent one is forgotten.

use std::collections::HashMap;
use std::net::IpAddr;

use dataplane::compile::{Host, TCP_IDLE_S, UDP_IDLE_S, UDP_STREAM_IDLE_S, compile};
use ebpf::decide::{from_instance, from_world};
use ebpf::flow::{CLOSING_IDLE_S, TCP, TCP_OPENING_IDLE_S, UDP};
use ebpf::packet::{HEAD_LEN, HEAD6_LEN};
use ebpf::six::{from_instance6, from_world6};
use ebpf::{Action, Arrival, GATEWAY_MAC, Head, Head6, Reason, V6, Work};
use etherparse::PacketBuilder;
use ipnet::{Ipv4Net, Ipv6Net};
use model::security_group::{Header, permits};
use model::{Direction, InterfaceId, Peer, Protocol, Rule, SecurityGroup, VpcId};
use rpc::dataplane::{Desired, Device, Interface, Uplink};

use crate::random::Random;
use crate::world::{
    UPLINK, UPLINK_MAC, address, address6, desired, elastic, group, guest, guest_mac,
    imagined_devices, open_some,
};

const STEPS: u64 = 60_000;
const REMOTES: [&str; 4] = ["203.0.113.9", "8.8.8.8", "2001:db8:9::9", "2600::1"];
const PORTS: [u16; 3] = [22, 53, 443];

/// A packet between the world and the guest, as the guest's side sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    remote: IpAddr,
    protocol: u8,
    local_port: u16,
    remote_port: u16,
}

#[derive(Debug, Clone, Copy)]
struct Packet {
    key: Key,
    by_guest: bool,
    /// Of TCP: S, SA, A, FA or R.
    flags: &'static str,
}

impl Packet {
    fn random(random: &mut Random) -> Self {
        let key = Key {
            remote: random.pick(&REMOTES).parse().unwrap(),
            protocol: random.pick(&[TCP, TCP, UDP]),
            local_port: random.pick(&PORTS),
            remote_port: random.pick(&PORTS),
        };
        let flags = random.pick(&["S", "S", "SA", "A", "A", "A", "FA", "R"]);
        Self { key, by_guest: random.chance(50), flags }
    }

    fn is_tcp(&self) -> bool {
        self.key.protocol == TCP
    }

    fn opens(&self) -> bool {
        !self.is_tcp() || self.flags == "S"
    }

    fn frame(&self) -> Vec<u8> {
        let (macs, ports) = match self.by_guest {
            true => {
                ((guest_mac(0).octets(), GATEWAY_MAC), (self.key.local_port, self.key.remote_port))
            }
            false => (
                ([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets()),
                (self.key.remote_port, self.key.local_port),
            ),
        };
        let step = PacketBuilder::ethernet2(macs.0, macs.1);
        let step = match self.key.remote {
            IpAddr::V4(remote) if self.by_guest => {
                step.ipv4(address(0).octets(), remote.octets(), 64)
            }
            IpAddr::V4(remote) => step.ipv4(remote.octets(), elastic(0).octets(), 64),
            IpAddr::V6(remote) if self.by_guest => {
                step.ipv6(address6(0, 0).octets(), remote.octets(), 64)
            }
            IpAddr::V6(remote) => step.ipv6(remote.octets(), address6(0, 0).octets(), 64),
        };
        let mut frame = Vec::new();
        if !self.is_tcp() {
            step.udp(ports.0, ports.1).write(&mut frame, &[1; 8]).unwrap();
            return frame;
        }
        let mut tcp = step.tcp(ports.0, ports.1, 1, 1000);
        for flag in self.flags.chars() {
            tcp = match flag {
                'S' => tcp.syn(),
                'F' => tcp.fin(),
                'R' => tcp.rst(),
                _ => tcp.ack(1),
            };
        }
        tcp.write(&mut frame, &[]).unwrap();
        frame
    }
}

/// What the reference knows of a flow.
#[derive(Debug, Clone, Copy)]
struct Known {
    seen_s: u32,
    by_guest: bool,
    answered: bool,
    /// Whoever began it has spoken again.
    talked: bool,
    /// He has while it was tracked.
    confirmed: bool,
    guest_closed: bool,
    remote_closed: bool,
    ended: bool,
    /// The other end sent a RST, or somebody in its name.
    doubted: bool,
    untracked: bool,
}

impl Known {
    fn idle_s_max(&self, protocol: u8) -> u32 {
        match (self.ended, protocol, self.confirmed) {
            (true, ..) => CLOSING_IDLE_S,
            (_, TCP, true) => TCP_IDLE_S,
            (_, TCP, false) => TCP_OPENING_IDLE_S,
            (_, _, true) => UDP_STREAM_IDLE_S,
            (_, _, false) => UDP_IDLE_S,
        }
    }

    fn after(mut self, packet: &Packet, now_s: u32) -> Self {
        self.seen_s = now_s;
        let by_initiator = packet.by_guest == self.by_guest;
        if !self.answered {
            self.answered = !by_initiator;
        } else if by_initiator && !(packet.is_tcp() && packet.flags == "S") {
            self.talked = true;
            self.confirmed |= !self.untracked;
        }
        if packet.is_tcp() {
            self.guest_closed |= packet.flags == "FA" && packet.by_guest;
            self.remote_closed |= packet.flags == "FA" && !packet.by_guest;
            // The guest's own RST is true.
            let doubted = packet.flags == "R" && !packet.by_guest && self.talked && !self.ended;
            self.ended |=
                packet.flags == "R" && !doubted || self.guest_closed && self.remote_closed;
            if !packet.by_guest && packet.flags != "S" {
                self.doubted = doubted;
            }
        }
        self
    }
}

/// A plain set of flows.
#[derive(Default)]
struct Reference(HashMap<Key, Known>);

impl Reference {
    fn passes(&mut self, desired: &Desired, packet: &Packet, now_s: u32) -> (bool, &'static str) {
        let protocol = packet.key.protocol;
        if let Some(known) = self.0.get_mut(&packet.key) {
            let alive = now_s - known.seen_s <= known.idle_s_max(protocol);
            let anew = (known.ended || known.doubted) && packet.opens() && packet.is_tcp();
            if alive && anew && !known.ended {
                if permitted(desired, &packet.key, packet.by_guest).is_none() {
                    return (false, "denied");
                }
                // The old connection goes on here, if it was not ended at all.
                known.seen_s = now_s;
                known.by_guest = packet.by_guest;
                known.doubted = false;
                (known.guest_closed, known.remote_closed) = (false, false);
                return (true, "doubted");
            }
            let open = untracked(desired, &packet.key);
            // What is not tracked hangs on the rules as they are now, and is tracked from
            // then on where they let it in and not everybody.
            let stands = !known.untracked
                || open.is_some()
                || permitted(desired, &packet.key, known.by_guest).is_some();
            if alive && !anew && stands {
                let word = if known.untracked { "known, not tracked" } else { "known" };
                known.untracked &= open.is_some();
                *known = known.after(packet, now_s);
                return (true, word);
            }
        }
        let picked_up = desired.interfaces[0].loose_tcp && packet.is_tcp() && packet.flags == "A";
        let opens = packet.opens() || picked_up;
        if opens && permitted(desired, &packet.key, packet.by_guest).is_none() {
            return (false, "denied");
        }
        let open = untracked(desired, &packet.key);
        if !opens && open.is_none() {
            return (false, "belongs to none");
        }
        let known = Known {
            seen_s: now_s,
            by_guest: if opens { packet.by_guest } else { open == Some(Direction::Egress) },
            untracked: open.is_some(),
            answered: false,
            talked: false,
            confirmed: false,
            guest_closed: false,
            remote_closed: false,
            ended: false,
            doubted: false,
        };
        self.0.insert(packet.key, known);
        (true, if open.is_some() { "new, not tracked" } else { "new" })
    }
}

fn groups(desired: &Desired) -> impl Iterator<Item = &SecurityGroup> {
    let own = &desired.interfaces[0].groups;
    desired.groups.iter().filter(|g| own.contains(&g.id))
}

/// The rule by which that end may begin the flow.
fn permitted(desired: &Desired, key: &Key, by_guest: bool) -> Option<model::RuleId> {
    let (direction, detail) = match by_guest {
        true => (Direction::Egress, key.remote_port),
        false => (Direction::Ingress, key.local_port),
    };
    let header = Header { remote: key.remote, protocol: key.protocol, detail };
    permits(groups(desired), &desired.prefix_lists, direction, &Default::default(), &header)
}

/// As EC2's guide says it: a rule permits the flow from everywhere, and a rule of the other
/// direction permits every answer, from any port to everywhere.
fn untracked(desired: &Desired, key: &Key) -> Option<Direction> {
    let everywhere = if key.remote.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
    let everywhere = Peer::Cidr(everywhere.parse().unwrap());
    let permits = |rule: &&Rule, from: u16, to: u16| {
        let ports = match rule.protocol {
            Protocol::Any => (0, u16::MAX),
            Protocol::Number(number) if number == key.protocol => (0, u16::MAX),
            Protocol::Tcp(ports) if key.protocol == TCP => (ports.first(), ports.last()),
            Protocol::Udp(ports) if key.protocol == UDP => (ports.first(), ports.last()),
            _ => return false,
        };
        rule.peer == everywhere && ports.0 <= from && to <= ports.1
    };
    let open = |way, port| {
        groups(desired).flat_map(|g| g.rules(way)).any(|rule| permits(&rule, port, port))
    };
    let all =
        |way| groups(desired).flat_map(|g| g.rules(way)).any(|rule| permits(&rule, 0, u16::MAX));
    let (inward, outward) = (Direction::Ingress, Direction::Egress);
    if !desired.interfaces[0].untracked {
        None
    } else if open(inward, key.local_port) && all(outward) {
        Some(inward)
    } else if open(outward, key.remote_port) && all(inward) {
        Some(outward)
    } else {
        None
    }
}

/// Groups, and the lists that their rules name.
fn rules(random: &mut Random) -> Desired {
    let Desired { mut groups, prefix_lists, .. } = desired(random, 12);
    open_some(&mut groups, random);
    Desired { groups, prefix_lists, ..Desired::default() }
}

/// One guest that the world reaches by both families.
fn one_guest(random: &mut Random) -> Desired {
    let device = Device::Existing { name: guest(0) };
    let subnet = Ipv4Net::new(address(0), 24).unwrap().trunc();
    let vpc = VpcId::from_random(1);
    let interface = Interface {
        elastic: Some(elastic(0)),
        ipv6: vec![address6(0, 0)],
        subnet6: Some(Ipv6Net::new(address6(0, 0), 64).unwrap().trunc()),
        groups: vec![group(0), group(1)],
        ..Interface::new(
            InterfaceId::from_random(7),
            device,
            guest_mac(0),
            vpc,
            (address(0), subnet),
        )
    };
    Desired {
        generation: 1,
        uplink: Some(Uplink {
            device: UPLINK.to_owned(),
            gateway: [198, 51, 100, 254].into(),
            gateway6: Some("fe80::1".parse().unwrap()),
            early_drop: None,
            bogons: false,
            source_packets: None,
            fast_path: Default::default(),
        }),
        interfaces: vec![interface],
        ..rules(random)
    }
}

fn load(host: &mut Host, desired: &Desired) {
    let tables = compile(desired, &imagined_devices(), host.tables()).unwrap();
    host.load(tables);
}

/// What the decision says, and what it writes down.
fn decided(host: &mut Host, packet: &Packet, now_s: u32) -> (bool, Reason) {
    let device = if packet.by_guest { guest(0) } else { UPLINK.to_owned() };
    let ifindex = imagined_devices().by_name[&device].ifindex;
    let arrival = Arrival { ifindex, vlan: false, to_host: true, now_s };
    let frame = packet.frame();
    let (action, reason) = if packet.key.remote.is_ipv6() {
        let head = Head6::of(frame[..HEAD6_LEN].try_into().unwrap());
        let mut work: Work<V6> = bytemuck::Zeroable::zeroed();
        match packet.by_guest {
            true => from_instance6(host, frame.as_slice(), &head, &arrival, &mut work),
            false => from_world6(host, frame.as_slice(), &head, &arrival, &mut work),
        }
        host.account(&work.verdict);
        (work.verdict.action, work.verdict.reason)
    } else {
        let head = Head::of(frame[..HEAD_LEN].try_into().unwrap());
        let mut work: Work = bytemuck::Zeroable::zeroed();
        match packet.by_guest {
            true => from_instance(host, frame.as_slice(), &head, &arrival, &mut work),
            false => from_world(host, frame.as_slice(), &head, &arrival, &mut work),
        }
        host.account(&work.verdict);
        (work.verdict.action, work.verdict.reason)
    };
    (!matches!(action, Action::Drop | Action::Pass), reason)
}

/// The first packet on which both disagree, and how often each word was said.
fn play(
    random: &mut Random,
    steps: u64,
    forgets: bool,
) -> (Option<String>, HashMap<(&'static str, bool), u64>) {
    let mut desired_state = one_guest(random);
    let (mut host, mut reference) = (Host::default(), Reference::default());
    let (mut now_s, mut said) = (1000, HashMap::new());
    load(&mut host, &desired_state);
    for step in 0..steps {
        match random.below(100) {
            0 => {
                let Desired { groups, prefix_lists, .. } = rules(random);
                (desired_state.groups, desired_state.prefix_lists) = (groups, prefix_lists);
                desired_state.interfaces[0].loose_tcp = random.chance(30);
                desired_state.interfaces[0].untracked = random.chance(60);
                load(&mut host, &desired_state);
            }
            1..=8 => {
                now_s += match random.below(4) {
                    0 => 1,
                    1 => random.below(40) as u32,
                    2 => random.below(400) as u32,
                    _ if random.chance(5) => TCP_IDLE_S + 1,
                    _ => 9,
                };
            }
            _ => {
                if forgets && random.chance(1) {
                    // The planted fault: a restart that knows nothing of flows.
                    host = Host::default();
                    load(&mut host, &desired_state);
                }
                let packet = Packet::random(random);
                let (passes, why) = reference.passes(&desired_state, &packet, now_s);
                let got = decided(&mut host, &packet, now_s);
                *said.entry((why, packet.key.remote.is_ipv6())).or_default() += 1;
                if got.0 != passes {
                    let known = reference.0.get(&packet.key);
                    let text = format!("step {step}: {packet:?} {why}, but {got:?}; {known:?}");
                    return (Some(text), said);
                }
            }
        }
    }
    (None, said)
}

#[test]
fn histories_of_packets_rules_and_time_pass_as_a_plain_set_of_flows_says() {
    for seed in 51..=58 {
        let mut random = Random::seeded("history", seed);
        let (wrong, said) = play(&mut random, STEPS, false);
        assert_eq!(wrong, None, "seed {seed}");
        eprintln!("{said:?}");
        let words =
            ["known", "known, not tracked", "new", "new, not tracked", "denied", "belongs to none"];
        for six in [false, true] {
            let times = |why| said.get(&(why, six)).copied().unwrap_or(0);
            for why in words {
                assert!(times(why) > STEPS / 1000, "{why} (IPv6: {six}) only {} times", times(why));
            }
            assert!(times("doubted") > 2, "IPv6: {six}: {said:?}");
        }
    }
}

#[test]
fn a_history_that_forgets_its_flows_is_noticed() {
    let mut random = Random::seeded("history, sabotaged", 52);
    let (wrong, _) = play(&mut random, STEPS, true);
    assert!(wrong.is_some(), "nobody noticed that flows were forgotten");
}
