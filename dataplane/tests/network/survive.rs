//! The daemon dies and nobody on the wire notices.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, PATIENCE, connects, echo_server, ping_flood};
use crate::world::{World, anywhere, group, ping, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);

#[test]
fn kill_minus_nine_and_restart_lose_no_packet_and_no_flow() {
    let test = "kill_minus_nine_and_restart_lose_no_packet_and_no_flow";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere()), (ping(), anywhere())]);
    world.start();
    world.apply();
    assert!(!world.status().adopted, "nothing was pinned before");
    echo_server(&world, "g1", 22);
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    let flood = ping_flood(&world, "net", ELASTIC, 2000, Duration::from_millis(2));
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..2 {
        world.kill();
        std::thread::sleep(Duration::from_millis(500));
        world.start();
        assert!(world.status().adopted, "the pinned programs were taken over");
        assert_eq!(world.status().generation, world.desired.generation);
    }
    assert_eq!(flood.join().unwrap(), 2000, "every ping came back");
    // The pings say that nothing was lost; how long the slowest round took is the
    // machine's affair, and printed.
    let longest = flow.finish().unwrap();
    eprintln!("the slowest round over two restarts took {longest:?}");

    // What restarted decides anew, too.
    world.desired.groups = vec![group(1, vec![(tcp(23), anywhere())])];
    world.apply();
    echo_server(&world, "g1", 23);
    assert!(connects(&world, "net", ELASTIC, 23, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 22, Duration::from_secs(1)));
}

/// The planted mistake: a restart that begins from nothing. The flood above must
/// be able to tell.
#[test]
fn a_restart_that_adopts_nothing_is_noticed_by_the_flood() {
    let test = "a_restart_that_adopts_nothing_is_noticed_by_the_flood";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(ping(), anywhere())]);
    world.start();
    world.apply();
    let flood = ping_flood(&world, "net", ELASTIC, 500, Duration::from_millis(2));
    std::thread::sleep(Duration::from_millis(300));
    world.kill();
    assert!(world.teardown().status.success());
    world.start();
    assert!(!world.status().adopted);
    let answered = flood.join().unwrap();
    assert!((1..500).contains(&answered), "{answered} of 500 came back");
}

#[test]
fn without_its_daemon_a_host_goes_on_deciding() {
    let test = "without_its_daemon_a_host_goes_on_deciding";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    echo_server(&world, "g1", 23);
    world.kill();
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE), "still allowed");
    assert!(!connects(&world, "net", ELASTIC, 23, Duration::from_secs(1)), "still refused");
}

#[test]
fn sigterm_ends_it_cleanly_and_the_same_state_again_changes_nothing() {
    let test = "sigterm_ends_it_cleanly_and_the_same_state_again_changes_nothing";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    assert!(world.apply().changes > 0);
    assert_eq!(world.try_apply().unwrap().changes, 0);
    assert!(world.terminate().success());
    assert!(!world.path("run/dataplane.sock").exists());
    world.start();
    assert_eq!(world.try_apply().unwrap().changes, 0, "a restart found all as it left it");
}

#[test]
fn an_older_or_unreadable_state_is_refused_and_changes_nothing() {
    let test = "an_older_or_unreadable_state_is_refused_and_changes_nothing";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.desired.generation = 9;
    world.apply();
    let good = world.desired.clone();

    world.desired.generation = 3;
    let error = world.try_apply().unwrap_err();
    assert_eq!(error.kind, rpc::Kind::Conflict);
    assert!(error.message.contains("generation 3"), "{error}");

    world.desired = good.clone();
    world.desired.generation = 11;
    let metadata = world.desired.interfaces[0].metadata.as_mut().unwrap();
    metadata.insert("user-data".into(), "base64:not base64".into());
    let error = world.try_apply().unwrap_err();
    assert_eq!(error.kind, rpc::Kind::Refused);
    assert!(error.message.contains("user-data"), "{error}");

    world.desired = good;
    world.desired.generation = 12;
    let uplink = world.desired.uplink.clone();
    world.desired.uplink.as_mut().unwrap().device = "absent".into();
    let error = world.try_apply().unwrap_err();
    assert!(error.message.contains("absent"), "{error}");

    world.desired.uplink = uplink;
    assert_eq!(world.status().generation, 10);
    echo_server(&world, "g1", 22);
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
    world.apply();
}

#[test]
fn a_new_stores_generations_count_anew_and_an_older_stores_are_refused_with_what_to_do() {
    let test =
        "a_new_stores_generations_count_anew_and_an_older_stores_are_refused_with_what_to_do";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    (world.desired.epoch, world.desired.generation) = (1000, 70);
    world.apply();
    echo_server(&world, "g1", 22);
    let flow = Flow::open(&world, "net", ELASTIC, 22);

    // The store was lost, and a new one knows only what was made since.
    (world.desired.epoch, world.desired.generation) = (2000, 2);
    assert_eq!(world.try_apply().unwrap().changes, 0, "the same state, told by another");
    assert_eq!(world.status().generation, 2);

    // It is the one that counts from now on, also after a restart.
    world.kill();
    world.start();
    (world.desired.epoch, world.desired.generation) = (1000, 71);
    let error = world.try_apply().unwrap_err();
    assert_eq!(error.kind, rpc::Kind::Conflict);
    for part in ["generation 71 of epoch 1000", "generation 2 of epoch 2000", "desired.json"] {
        assert!(error.message.contains(part), "{error}");
    }
    (world.desired.epoch, world.desired.generation) = (2000, 1);
    assert_eq!(world.try_apply().unwrap_err().kind, rpc::Kind::Conflict);
    flow.finish().unwrap();
}
