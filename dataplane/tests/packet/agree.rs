//! The loaded programs decide as the host does, packet by packet, and leave the
//! same bytes and the same flows.

use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use dataplane::compile::{Host, Tables, compile};
use dataplane::load::{self, Loaded};
use ebpf::decide::{from_instance, from_punt, from_world};
use ebpf::early::{early, early6};
use ebpf::layout::Interface;
use ebpf::nat;
use ebpf::packet::{HEAD_LEN, HEAD6_LEN, IPV6};
use ebpf::six::{from_instance6, from_punt6, from_world6};
use ebpf::{Action, Arrival, Head, Head6, Reason, TRACE_MARK, V6, Verdict, Work};
use ipnet::Ipv6Net;
use model::{Peer, Protocol, Rule, RuleId};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use rpc::Deployment;
use rpc::dataplane::Desired;

use crate::frames::{carried_out, frame, responder_frame};
use crate::frames6::{self, carried_out6};
use crate::random::{Random, many};
use crate::told::{told, told6};
use crate::world::{
    GUESTS, PUNT, UPLINK, UPLINK_MAC, desired, devices, guest, narrow, narrow_devices, open_some,
    peopled,
};

pub use sim::skip as skipped;

const PACKETS: u64 = 120_000;
const PACKETS_FULL: u64 = 10_000_000;
/// Packets under one desired state.
const EPOCH: u64 = 4_000;

/// A namespace of this thread's own with the world's devices in it, and a
/// deployment that is torn down at the end.
pub struct Bench {
    pub deployment: Deployment,
}

impl Bench {
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skipped(test, "needs root");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let names = (0..GUESTS).map(guest).chain([UPLINK.to_owned(), PUNT.to_owned()]);
        for name in names {
            let mac =
                if name == UPLINK { UPLINK_MAC.to_string() } else { "02:00:00:00:07:07".into() };
            let peer = format!("{name}p");
            let args =
                ["link", "add", &name, "address", &mac, "type", "veth", "peer", "name", &peer];
            let made = Command::new("ip").args(args).status().unwrap();
            assert!(made.success(), "ip {args:?}");
        }
        static NTH: AtomicU8 = AtomicU8::new(0);
        let nth = NTH.fetch_add(1, Ordering::Relaxed);
        let name = format!("p{:x}{nth}", std::process::id() & 0xf_ffff);
        let deployment = Deployment::new(&name, "/nowhere", "/nowhere").unwrap();
        load::teardown(&deployment).unwrap();
        Some(Self { deployment })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        load::teardown(&self.deployment).unwrap();
    }
}

fn now_s() -> u32 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).unwrap();
    ebpf::flow::seconds(std::time::Duration::from(now).as_nanos() as u64)
}

/// What the host's copy of the decision says of a frame, and makes of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Decided {
    action: Action,
    reason: Reason,
    rules: (u16, u16),
    bytes: Option<Vec<u8>>,
    /// Whether the frame was long enough that a program reports its verdict.
    told: bool,
    /// Whether its sender is told why it was dropped.
    answered: bool,
}

impl Decided {
    fn untold(action: Action, reason: Reason) -> Self {
        Self { action, reason, rules: (0, 0), bytes: None, told: false, answered: false }
    }

    /// Whether a program did the same.
    pub fn is(&self, run: &load::Run) -> bool {
        let told = (run.reason.unwrap_or(Reason::Undecided), (run.egress_rule, run.ingress_rule));
        // Who only asks is not answered: a dropped packet stays one.
        let bytes = self.bytes.as_ref().filter(|_| !self.answered);
        (!self.told || told == (self.reason, self.rules))
            && run.code == self.code(false)
            && bytes.is_none_or(|bytes| *bytes == run.frame)
    }

    /// As tc knows it, where senders are told or not.
    fn code(&self, telling: bool) -> i32 {
        match self.action {
            Action::Drop if !(telling && self.answered) => 2,
            Action::Pass => -1,
            _ => 7,
        }
    }

    /// `error` goes back to the sender instead, if there is one.
    fn of<A: ebpf::Ip>(
        verdict: &Verdict<A>,
        bytes: Option<Vec<u8>>,
        error: Option<Vec<u8>>,
    ) -> Self {
        let rules = (verdict.egress_rule, verdict.ingress_rule);
        let answered = error.is_some();
        let bytes = error.or(bytes);
        let (action, reason) = (verdict.action, verdict.reason);
        Self { action, reason, rules, bytes, told: true, answered }
    }
}

/// Decides, and writes the flows that follow.
fn decided(host: &mut Host, ifindex: u32, frame: &[u8], tables: &Tables) -> Decided {
    let (decided, written) = decide(host, ifindex, frame, tables);
    match written {
        Written::Nothing => {}
        Written::Four(work) => {
            host.account(&work.verdict);
            host.keep(&work, now_s());
            host.translate(&work);
        }
        Written::Six(work) => {
            host.account(&work.verdict);
            host.keep(&work, now_s());
        }
    }
    decided
}

/// Decides, and leaves no trace.
pub fn decided_unwritten(host: &Host, ifindex: u32, frame: &[u8], tables: &Tables) -> Decided {
    decide(host, ifindex, frame, tables).0
}

/// The verdict whose flows and fragments are to be written.
enum Written {
    Nothing,
    Four(Box<Work>),
    Six(Box<Work<V6>>),
}

fn decide(host: &Host, ifindex: u32, frame: &[u8], tables: &Tables) -> (Decided, Written) {
    let uplink = tables.config.uplink == ifindex && ifindex != 0;
    let punt = tables.attachments.get(&ifindex).is_some_and(|a| a.device == PUNT);
    let six = frame.get(12..14) == Some(&[0x86, 0xdd]);
    if frame.len() < if six { HEAD6_LEN } else { HEAD_LEN } {
        let untold = match (uplink, punt) {
            (true, _) => Decided::untold(Action::Pass, Reason::NotOurs),
            (_, true) => Decided::untold(Action::Drop, Reason::PuntStray),
            _ => Decided::untold(Action::Drop, Reason::Malformed),
        };
        return (untold, Written::Nothing);
    }
    let to_host = frame[..6] == UPLINK_MAC.octets();
    let arrival = Arrival { ifindex, vlan: false, to_host, now_s: now_s() };
    if six {
        let head = Head6::of(frame[..HEAD6_LEN].try_into().unwrap());
        let mut work: Work<V6> = bytemuck::Zeroable::zeroed();
        match (uplink, punt) {
            (true, _) => from_world6(host, frame, &head, &arrival, &mut work),
            (_, true) => from_punt6(host, &head, &mut work),
            _ => from_instance6(host, frame, &head, &arrival, &mut work),
        }
        let told = told6(frame, &work.verdict, uplink);
        let decided = Decided::of(&work.verdict, carried_out6(frame, &work.verdict), told);
        return (decided, Written::Six(Box::new(work)));
    }
    let head = Head::of(frame[..HEAD_LEN].try_into().unwrap());
    let mut work: Work = bytemuck::Zeroable::zeroed();
    match (uplink, punt) {
        (true, _) => from_world(host, frame, &head, &arrival, &mut work),
        (_, true) => from_punt(host, &head, &mut work),
        _ => from_instance(host, frame, &head, &arrival, &mut work),
    }
    if work.verdict.action == Action::Translate {
        match uplink {
            true => nat::from_outside(host, frame, &head, &arrival, &mut work),
            false => nat::from_guest(host, frame, &arrival, &mut work),
        }
    }
    let told = told(frame, &work.verdict, uplink);
    let decided = Decided::of(&work.verdict, carried_out(frame, &work), told);
    (decided, Written::Four(Box::new(work)))
}

#[derive(Default)]
pub struct Tally {
    pub packets: u64,
    pub disagreements: Vec<String>,
    reasons: std::collections::BTreeMap<&'static str, u64>,
    /// Of those, the IPv6 ones.
    six: std::collections::BTreeMap<&'static str, u64>,
}

/// Sends one random frame through both.
fn compare(random: &mut Random, loaded: &Loaded, host: &mut Host, tally: &mut Tally) {
    let tables = loaded.tables().clone();
    let guests: Vec<Interface> = tables.interfaces.values().copied().collect();
    let index = |name: &str| if_nametoindex(name).unwrap();
    let six = random.chance(45);
    let made = |random: &mut Random, from: Option<&Interface>| match six {
        true => frames6::frame(random, from, &tables),
        false => frame(random, from, &guests),
    };
    let expected = if six { None } else { crate::nat::expected(random, host, &tables) };
    let (ifindex, frame) = match random.below(10) {
        1 | 6 if expected.is_some() => expected.unwrap(),
        0 => {
            let to = index(&guest(random.below(GUESTS as u64) as usize));
            let frame = match six {
                true => frames6::responder_frame(random, to),
                false => responder_frame(random, to),
            };
            (index(PUNT), frame)
        }
        1..=5 if !guests.is_empty() => {
            let from = random.pick(&guests);
            (from.ifindex, made(random, Some(&from)))
        }
        _ if tables.config.uplink != 0 => (index(UPLINK), made(random, None)),
        _ => return,
    };
    compare_frame(loaded, host, tally, ifindex, &frame);
}

/// Sends a frame through both; what came out, where the programs sent it on.
pub fn compare_frame(
    loaded: &Loaded,
    host: &mut Host,
    tally: &mut Tally,
    ifindex: u32,
    frame: &[u8],
) -> Option<Vec<u8>> {
    let decided = decided(host, ifindex, frame, loaded.tables());
    let run = loaded.run(ifindex, frame, TRACE_MARK).unwrap();
    let code = decided.code(true);
    let nothing = (Reason::Undecided, (0, 0));
    let verdict = if decided.told { (decided.reason, decided.rules) } else { nothing };
    let told = (run.reason.unwrap_or(Reason::Undecided), (run.egress_rule, run.ingress_rule));
    let told = if decided.told { told } else { nothing };
    let same_bytes = decided.bytes.as_ref().is_none_or(|bytes| *bytes == run.frame);
    tally.packets += 1;
    *tally.reasons.entry(decided.reason.name()).or_default() += 1;
    if frame[12..14] == [0x86, 0xdd] {
        *tally.six.entry(decided.reason.name()).or_default() += 1;
    }
    if (told, run.code) != (verdict, code) || !same_bytes {
        tally.disagreements.push(format!(
            "{told:?} {} instead of {verdict:?} {code} on {ifindex} for\n  {frame:02x?}\n→ {:02x?}\n≠ {:02x?}",
            run.code, run.frame, decided.bytes
        ));
    }
    (run.code == 7).then_some(run.frame)
}

/// IPv6 frames met these too.
const SIX: [Reason; 36] = [
    Reason::Untracked,
    Reason::TtlExpired,
    Reason::TooBig,
    Reason::FragmentFollows,
    Reason::FragmentTiny,
    Reason::FragmentOverlap,
    Reason::FragmentLost,
    Reason::Established,
    Reason::NewFlow,
    Reason::Related,
    Reason::PuntDhcp,
    Reason::PuntRouter,
    Reason::PuntReply,
    Reason::Neighbour,
    Reason::NotOurs,
    Reason::Malformed,
    Reason::SpoofedMac,
    Reason::SpoofedAddress,
    Reason::SpoofedNeighbour,
    Reason::NeighbourIgnored,
    Reason::Ipv6,
    Reason::Fragment,
    Reason::ExtensionHeader,
    Reason::EgressDenied,
    Reason::IngressDenied,
    Reason::NoFlow,
    Reason::IcmpType,
    Reason::Unrelated,
    Reason::NoRoute,
    Reason::AclEgressDenied,
    Reason::AclIngressDenied,
    Reason::Blackhole,
    Reason::DestinationCheck,
    Reason::NoUplink,
    Reason::Blocked,
    Reason::SpoofedDhcp,
];

#[test]
fn the_loaded_programs_decide_as_the_host_does() {
    let name = "the_loaded_programs_decide_as_the_host_does";
    let Some(bench) = Bench::new(name) else { return };
    let mut random = Random::seeded("agree", 21);
    let devices = narrow_devices();
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut host = Host::default();
    let mut tally = Tally::default();
    let packets = many(PACKETS, PACKETS_FULL);
    while tally.packets < packets {
        let rules_max = random.pick(&[1, 4, 30]);
        let mut desired = desired(&mut random, rules_max);
        if random.chance(50) {
            open_some(&mut desired.groups, &mut random);
            desired.interfaces.iter_mut().for_each(|i| i.untracked = true);
        }
        let desired = narrow(&mut random, desired);
        let tables = compile(&desired, &devices, loaded.tables()).unwrap();
        loaded.update(tables.clone()).unwrap();
        host.load(tables);
        for _ in 0..EPOCH {
            compare(&mut random, &loaded, &mut host, &mut tally);
        }
        early_agrees(&mut random, &loaded, &host);
        assert!(tally.disagreements.is_empty(), "{}", tally.disagreements[0]);
    }
    eprintln!("{} packets, 0 disagreements: {:#?}", tally.packets, tally.reasons);
    eprintln!("IPv6 among them: {:#?}", tally.six);
    for reason in SIX {
        assert!(tally.six.contains_key(reason.name()), "never seen in IPv6: {}", reason.name());
    }
    // Every reason that can come about here did.
    let elsewhere = [
        Reason::Undecided,
        Reason::NoInterface,
        Reason::Vlan,
        Reason::FlowQuota,
        Reason::Unmarked,
        Reason::EstablishedEarly,
        // Counted beside the reason why.
        Reason::Told,
        // Where a daemon keeps them.
        Reason::FragmentHeld,
    ];
    // `rates` and `fast` in these tests see to these.
    let rates = Reason::BandwidthIn..=Reason::SourceRate;
    for reason in Reason::ALL.iter().filter(|r| !elsewhere.contains(r) && !rates.contains(r)) {
        assert!(tally.reasons.contains_key(reason.name()), "never seen: {}", reason.name());
    }
}

fn early_agrees(random: &mut Random, loaded: &Loaded, host: &Host) {
    let guests: Vec<Interface> = loaded.tables().interfaces.values().copied().collect();
    for _ in 0..200 {
        let frame = frame(random, None, &guests);
        let Some(head) = frame.get(..34).and_then(|b| b.try_into().ok()).map(Head::of) else {
            continue;
        };
        // What the packet before left there, which a report must not tell.
        let mut work: Work = bytemuck::Zeroable::zeroed();
        (work.verdict.egress_rule, work.verdict.ingress_rule) = (7, 7);
        let expected = early(host, frame.as_slice(), &head, &mut work);
        let passes = loaded.run_early(&frame).unwrap();
        assert_eq!(passes, expected.is_ok(), "{expected:?} for {frame:02x?}");
        assert_eq!((work.verdict.egress_rule, work.verdict.ingress_rule), (0, 0), "{expected:?}");
    }
    for _ in 0..200 {
        let frame = frames6::frame(random, None, loaded.tables());
        let Some(head) = frame.get(..HEAD6_LEN).and_then(|b| b.try_into().ok()).map(Head6::of)
        else {
            continue;
        };
        if head.ether_type != IPV6 {
            continue;
        }
        // What the packet before left there, which a report must not tell.
        let mut work: Work<V6> = bytemuck::Zeroable::zeroed();
        (work.verdict.egress_rule, work.verdict.ingress_rule) = (7, 7);
        let expected = early6(host, frame.as_slice(), &head, &mut work);
        let passes = loaded.run_early(&frame).unwrap();
        assert_eq!(passes, expected.is_ok(), "{expected:?} for {frame:02x?}");
        assert_eq!((work.verdict.egress_rule, work.verdict.ingress_rule), (0, 0), "{expected:?}");
    }
}

#[test]
fn a_fault_in_either_is_caught() {
    let Some(bench) = Bench::new("a_fault_in_either_is_caught") else { return };
    let mut random = Random::seeded("agree, sabotaged", 22);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut tally = Tally::default();
    for _ in 0..4 {
        let desired = desired(&mut random, 8);
        let tables = compile(&desired, &devices, loaded.tables()).unwrap();
        loaded.update(tables.clone()).unwrap();
        // The planted fault: the host takes each interface's egress rules for its ingress.
        let mut sabotaged = tables;
        sabotaged.records_mut().for_each(|i| i.ingress = i.egress);
        let mut host = Host::new(sabotaged);
        for _ in 0..1000 {
            compare(&mut random, &loaded, &mut host, &mut tally);
        }
    }
    assert!(!tally.disagreements.is_empty(), "the planted fault went unnoticed");
    eprintln!("planted fault: {} disagreements in {}", tally.disagreements.len(), tally.packets);
}

/// Interfaces go and come back, and the kernel has let go of their devices by then.
#[test]
fn a_device_is_dressed_anew_as_soon_as_it_was_undressed() {
    let name = "a_device_is_dressed_anew_as_soon_as_it_was_undressed";
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let mut random = Random::seeded("dressed", 25);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let full = desired(&mut random, 3);
    let mut bare = full.clone();
    bare.interfaces.clear();
    for _ in 0..200 {
        for state in [&full, &bare] {
            let tables = compile(state, &devices, loaded.tables()).unwrap();
            loaded.update(tables).unwrap();
        }
    }
}

/// Asking leaves no trace; adoption finds the very tables that were loaded.
#[test]
fn a_restarted_loader_adopts_what_is_pinned() {
    let name = "a_restarted_loader_adopts_what_is_pinned";
    let Some(bench) = Bench::new(name) else { return };
    let mut random = Random::seeded("adopt", 23);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    assert!(!loaded.adopted());
    let desired = desired(&mut random, 30);
    let tables = compile(&desired, &devices, loaded.tables()).unwrap();
    loaded.update(tables.clone()).unwrap();
    drop(loaded);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    assert!(loaded.adopted());
    let names = tables.names.clone();
    assert_eq!(Tables { names, ..loaded.tables().clone() }, tables);
    // The same desired state again is no change at all.
    let again = compile(&desired, &devices, loaded.tables()).unwrap();
    assert_eq!(loaded.update(again).unwrap(), 0);
    load::teardown(&bench.deployment).unwrap();
    assert!(!bench.deployment.bpf_dir().exists());
}

/// A world in which flows of both families come about soon, whatever the dice say.
fn talkative(random: &mut Random) -> Desired {
    let mut made = peopled(random);
    for group in &mut made.groups {
        let anything = |n: u128, net: &str| Rule {
            id: RuleId::from_random(n),
            protocol: Protocol::Any,
            peer: Peer::Cidr(net.parse().unwrap()),
        };
        let rules = vec![anything(1, "0.0.0.0/0"), anything(2, "::/0")];
        (group.ingress, group.egress) = (rules.clone(), rules);
    }
    for (n, interface) in made.interfaces.iter_mut().enumerate() {
        interface.groups = vec![crate::world::group(if n < 3 { 0 } else { 4 })];
        interface.elastic = Some(crate::world::elastic(n));
        interface.ipv6 = vec![crate::world::address6(n, 0)];
        interface.subnet6 = Some(Ipv6Net::new(interface.ipv6[0], 64).unwrap().trunc());
        interface.route_table = None;
        interface.network_acl = None;
    }
    made
}

/// A kernel walks through a million instructions of a program at most, each as often as it may
/// be reached in another state; another kernel takes other steps than this one.
#[test]
fn the_verifier_has_room_left() {
    const WALKED_MAX: u32 = 700_000;
    let Some(bench) = Bench::new("the_verifier_has_room_left") else { return };
    let all = || aya::programs::loaded_programs().flatten();
    let before: Vec<u32> = all().map(|info| info.id()).collect();
    let _loaded = Loaded::open(&bench.deployment).unwrap();
    let mut walked = Vec::new();
    for info in all().filter(|info| !before.contains(&info.id())) {
        let name = info.name_as_str().unwrap_or_default().to_owned();
        if ["tap_", "uplink_", "punt_", "nat_", "tell_"].iter().any(|of| name.starts_with(of)) {
            walked.push((info.verified_instruction_count().unwrap_or(0), name));
        }
    }
    walked.sort();
    eprintln!("{walked:?}");
    assert!(walked.len() >= 11, "{walked:?}");
    assert!(walked.iter().all(|(count, _)| *count <= WALKED_MAX), "{walked:?}");
}

/// A confirmed flow is counted, by the programs and by the sweep, and goes with its interface.
#[test]
fn the_sweep_forgets_the_flows_of_an_interface_that_left() {
    let name = "the_sweep_forgets_the_flows_of_an_interface_that_left";
    let Some(bench) = Bench::new(name) else { return };
    let mut random = Random::seeded("sweep", 24);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut host = Host::default();
    let mut tally = Tally::default();
    let mut desired = talkative(&mut random);
    let tables = compile(&desired, &devices, loaded.tables()).unwrap();
    loaded.update(tables.clone()).unwrap();
    host.load(tables);
    while host.flows().is_empty() || host.flows6().is_empty() {
        compare(&mut random, &loaded, &mut host, &mut tally);
    }
    let tracked = (host.flows().len() + host.flows6().len()) as u64;
    assert_eq!(
        loaded.sweep().unwrap(),
        load::Swept { looked_at: tracked, removed: 0, flows: tracked }
    );
    let counters = loaded.counters().unwrap();
    let established = tally.reasons["established"];
    let counted: u64 = counters.interfaces.values().filter_map(|r| r.get("established")).sum();
    assert!(counted >= established, "{counted} counted, {established} seen");
    desired.interfaces.clear();
    let tables = compile(&desired, &devices, loaded.tables()).unwrap();
    loaded.update(tables).unwrap();
    assert_eq!(
        loaded.sweep().unwrap(),
        load::Swept { looked_at: tracked, removed: tracked, flows: 0 }
    );
}
