//! The network question's harness delivers what it says that it delivers, and
//! calls a lost frame a failure. No times are looked at.

use std::net::Ipv4Addr;

use benches::packet::Flows;
use benches::packet::bpf::Sender;
use benches::packet::contender::{Contender, Stage};
use benches::packet::frame::{Client, Ends, Template};
use benches::packet::namespace;
use benches::packet::nftables::{Shape, ruleset};
use benches::packet::ours::{Ours, Way, early_program};
use benches::packet::scene::{CLIENT_MAC, End, Scene, UPLINK_INDEX, UPLINK_MAC, nft};
use benches::packet::world::{PORT, SOURCES, World};
use sim::skip;

const FRAMES: u32 = 1000;
const RULES: usize = 10;

/// Puts the test's thread into mounts of its own, where this can be done.
fn prepared(test: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        skip(test, "not root: network namespaces and eBPF need it");
        return false;
    }
    for program in ["ip", "nft", "ethtool"] {
        let flag = if program == "ethtool" { "--version" } else { "-V" };
        if benches::machine::version(program, flag).is_none() {
            skip(test, &format!("{program} is not installed"));
            return false;
        }
    }
    if let Err(error) = namespace::own_mounts() {
        skip(test, &format!("no mounts of one's own to be had: {error:#}"));
        return false;
    }
    true
}

fn delivers(contender: Contender) {
    let mut stage = Stage::build(contender).unwrap_or_else(|e| panic!("{contender}: {e:#}"));
    for flows in [Flows::Established(1), Flows::Established(64), Flows::New] {
        stage.measure(flows, FRAMES).unwrap_or_else(|e| panic!("{contender}, {flows}: {e:#}"));
    }
}

#[test]
fn plain_forwarding_delivers_every_frame() {
    if prepared("plain_forwarding_delivers_every_frame") {
        delivers(Contender::Plain);
    }
}

#[test]
fn nftables_delivers_every_frame_in_every_shape() {
    if prepared("nftables_delivers_every_frame_in_every_shape") {
        for shape in [Shape::Set, Shape::Sets, Shape::Lines] {
            delivers(Contender::Nft(shape, RULES));
        }
    }
}

#[test]
fn hostplane_delivers_every_frame_with_and_without_its_early_program() {
    if prepared("hostplane_delivers_every_frame_with_and_without_its_early_program") {
        delivers(Contender::OursOnTcx(RULES));
        delivers(Contender::Ours(RULES));
        delivers(Contender::OursToNamespace(RULES));
        delivers(Contender::OursFast(RULES));
    }
}

#[test]
fn frames_that_no_rule_permits_are_counted_nowhere() {
    if !prepared("frames_that_no_rule_permits_are_counted_nowhere") {
        return;
    }
    let mut world = World::with_rules(RULES);
    world.instances[0].rules.pop();
    let instance = world.measured();
    let scene = Scene::build(instance).unwrap();
    scene.router.within(|| nft(&ruleset(&world, Shape::Sets))).unwrap();
    let template = Template::new(
        Ends {
            source_mac: CLIENT_MAC,
            destination_mac: UPLINK_MAC,
            clients: SOURCES.address,
            server: instance.elastic,
            server_port: PORT,
        },
        Client::Sends,
    );
    let sender = Sender::new(&template, 1 << 10, None).unwrap();
    scene.router.within(|| sender.send(UPLINK_INDEX, FRAMES)).unwrap();
    assert_eq!(scene.delivered(End::Instance).unwrap(), 0);
}

/// An elastic address that nobody holds: without the early program the router's
/// stack gets the frame and routes it back, with it nobody sees it again. So the
/// rows that claim to go through the early program do.
#[test]
fn frames_go_through_the_early_program_where_it_is_said() {
    if !prepared("frames_go_through_the_early_program_where_it_is_said") {
        return;
    }
    let world = World::with_rules(RULES);
    let scene = Scene::build(world.measured()).unwrap();
    let _ours = scene.router.within(|| Ours::build(&world, Way::Early)).unwrap();
    let early = scene.router.within(early_program).unwrap();
    let template = Template::new(
        Ends {
            source_mac: CLIENT_MAC,
            destination_mac: UPLINK_MAC,
            clients: SOURCES.address,
            server: Ipv4Addr::new(203, 0, 113, 250),
            server_port: PORT,
        },
        Client::Sends,
    );
    let returned = |next| {
        let before = scene.delivered(End::Client).unwrap();
        let sender = Sender::new(&template, 1 << 10, next).unwrap();
        scene.router.within(|| sender.send(UPLINK_INDEX, FRAMES)).unwrap();
        scene.await_delivered(End::Client, before, FRAMES.into()).unwrap()
    };
    assert_eq!(returned(None), u64::from(FRAMES));
    assert_eq!(returned(Some(early)), 0);
}
