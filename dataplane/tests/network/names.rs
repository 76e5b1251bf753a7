//! Names, asked for with dig by guests, of name servers that the test plays in the
//! internet's namespace.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use domain::base::iana::{Class, Rtype};
use domain::base::{Message, MessageBuilder, Name, Record, ToName as _, Ttl};
use domain::rdata::A;
use rpc::dataplane::{Dns, Services};

use crate::traffic::inside;
use crate::world::{INTERNET, World, has, run};

/// Two guests of one network and one of another with the same address; the first name
/// server is not there.
fn world(test: &str) -> Option<World> {
    if !has(test, "dig") {
        return None;
    }
    let mut world = World::new(test)?;
    for (n, vpc, address) in [(1, 1, "10.0.0.5"), (2, 1, "10.0.0.6"), (3, 2, "10.0.0.5")] {
        let names = [format!("i-{n}.net-{vpc}.internal"), format!("host-{n}.net-{vpc}.internal")];
        let dns = Dns { address: Some(Ipv4Addr::new(10, 0, 0, 2)), names: names.into() };
        world.add_guest(n, vpc, address).services =
            Services { dns: Some(dns), ..Services::default() };
        world.configure_guest(n);
    }
    world.desired.name_servers = vec![(INTERNET, 5353).into(), (INTERNET, 53).into()];
    name_server(&world);
    world.start();
    world.apply();
    Some(world)
}

/// `n7.example` has seven addresses; whoever has more than twenty must be asked by TCP.
fn answer(question: &[u8], stream: bool) -> Option<Vec<u8>> {
    let question = Message::from_slice(question).ok()?;
    let asked = question.sole_question().ok()?;
    let name: Name<Vec<u8>> = asked.qname().to_vec();
    let digits: String = name.to_string().chars().filter(char::is_ascii_digit).collect();
    let count: u8 = digits.parse().ok()?;
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(question.header().id());
    builder.header_mut().set_qr(true);
    let truncated = count > 20 && !stream;
    builder.header_mut().set_tc(truncated);
    let mut told = builder.question();
    told.push(asked).ok()?;
    let mut told = told.answer();
    for n in 0..if truncated || asked.qtype() != Rtype::A { 0 } else { count } {
        let data = A::new(Ipv4Addr::new(203, 0, 113, n));
        told.push(Record::new(&name, Class::IN, Ttl::from_secs(300), data)).ok()?;
    }
    Some(told.finish())
}

fn name_server(world: &World) {
    let address = SocketAddr::from((INTERNET, 53));
    let bound = inside(world, "net", move || {
        (UdpSocket::bind(address).unwrap(), TcpListener::bind(address).unwrap())
    });
    let (datagrams, streams) = bound.join().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            if let Some(answer) = answer(&bytes[..length], false) {
                _ = datagrams.send_to(&answer, from);
            }
        }
    });
    std::thread::spawn(move || {
        for mut stream in streams.incoming().flatten() {
            let mut length = [0; 2];
            _ = stream.read_exact(&mut length);
            let mut question = vec![0; u16::from_be_bytes(length).into()];
            _ = stream.read_exact(&mut question);
            if let Some(answer) = answer(&question, true) {
                let length = u16::try_from(answer.len()).unwrap();
                _ = stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat());
            }
        }
    });
}

/// What dig prints, line by line and sorted.
fn dig(world: &World, guest: u8, words: &str) -> Vec<String> {
    let role = format!("g{guest}");
    let mut command = world.command(&role, "dig");
    command.args(["+time=20", "+tries=3"]).args(words.split_whitespace());
    let mut lines: Vec<String> = run(&mut command).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn guests_resolve_their_own_networks_names_at_both_addresses() {
    let test = "guests_resolve_their_own_networks_names_at_both_addresses";
    let Some(world) = world(test) else { return };
    for server in ["@10.0.0.2", "@169.254.169.253"] {
        for by in ["+short", "+short +tcp"] {
            let ask = |guest, words: &str| dig(&world, guest, &format!("{server} {by} {words}"));
            assert_eq!(ask(1, "i-2.net-1.internal"), ["10.0.0.6"]);
            assert_eq!(ask(2, "host-1.net-1.internal"), ["10.0.0.5"]);
            assert_eq!(ask(1, "-x 10.0.0.6"), ["i-2.net-1.internal."]);
            assert_eq!(ask(3, "-x 10.0.0.5"), ["i-3.net-2.internal."]);
        }
    }
    // Of another network nothing is told, whatever addresses both have.
    assert!(dig(&world, 3, "@10.0.0.2 -x 10.0.0.6").iter().any(|l| l.contains("NXDOMAIN")));
    assert!(dig(&world, 1, "@10.0.0.2 i-9.net-1.internal").iter().any(|l| l.contains("NXDOMAIN")));
    let reasons = world.status().reasons;
    assert!(reasons["dns"] > 8, "{reasons:?}");
}

#[test]
fn names_of_others_are_asked_of_the_server_that_answers_and_remembered() {
    let test = "names_of_others_are_asked_of_the_server_that_answers_and_remembered";
    let Some(mut world) = world(test) else { return };
    assert_eq!(dig(&world, 1, "@10.0.0.2 +short n3.example").len(), 3);
    assert_eq!(dig(&world, 1, "@10.0.0.2 +short n3.example").len(), 3);
    // Longer than a datagram: dig comes back by TCP by itself, and so do we.
    assert_eq!(dig(&world, 2, "@10.0.0.2 +short n200.example").len(), 200);
    assert_eq!(dig(&world, 2, "@10.0.0.2 +short +tcp n199.example").len(), 199);
    let status = world.status();
    let of = |n: usize, name: &str| status.interfaces[n].reasons.get(name).copied().unwrap_or(0);
    assert_eq!((of(0, "respond-dns-forwarded"), of(0, "respond-dns-remembered")), (1, 1));
    // No server any more: told so, and at once, for the port is closed.
    world.desired.name_servers = vec![(INTERNET, 5353).into()];
    world.apply();
    assert!(dig(&world, 1, "@10.0.0.2 n3.example").iter().any(|l| l.contains("SERVFAIL")));
    assert_eq!(dig(&world, 1, "@10.0.0.2 +short i-2.net-1.internal"), ["10.0.0.6"]);
    // Another service's address and another port are nobody's.
    let drops = |world: &World| world.status().reasons.get("no-route").copied().unwrap_or(0);
    let before = drops(&world);
    let mut command = world.command("g1", "dig");
    command.args(["@10.0.0.2", "-p", "54", "+time=1", "+tries=1", "i-2.net-1.internal"]);
    assert!(!command.output().unwrap().status.success());
    assert!(drops(&world) > before);
}

#[test]
fn the_resolvers_address_is_no_interfaces() {
    let Some(mut world) = world("the_resolvers_address_is_no_interfaces") else { return };
    world.desired.generation += 1;
    let dns = world.desired.interfaces[0].services.dns.as_mut().unwrap();
    dns.address = Some(Ipv4Addr::new(10, 0, 0, 6));
    let refused = world.try_apply().unwrap_err().to_string();
    assert!(refused.contains("10.0.0.6") && refused.contains("twice"), "{refused}");
}
