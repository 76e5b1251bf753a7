//! The responders driven by a client made of smoltcp, and by hostile frames.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::dhcp::Binding;
use super::*;

const NOW: Duration = Duration::from_secs(100);
const PORT: u16 = 40_000;
/// The same in every VPC too.
const OWN6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5);

fn served(n: u8) -> Served {
    let map = [("meta-data/instance-id".to_owned(), format!("i-{n}"))].into();
    Served {
        interface: model::InterfaceId::from_random(n.into()),
        binding: Binding {
            mac: model::Mac([2, 0, 0, 0, 0, n]),
            // The same in every VPC, on purpose.
            address: Ipv4Addr::new(10, 0, 0, 5),
            subnet: "10.0.0.0/24".parse().unwrap(),
            router: Ipv4Addr::new(10, 0, 0, 1),
            hostname: format!("host-{n}"),
            domain: "internal".into(),
            dns: vec![],
            mtu: 1500,
            ntp: vec![],
            netbios: vec![],
            netbios_node: None,
        },
        secondary: vec![],
        metadata: Some(metadata::Documents::parse(&map).unwrap()),
        dns: Some(dns::Resolved {
            vpc: VpcId::from_random(n.into()),
            server: Some(Ipv4Addr::new(10, 0, 0, 2)),
            names: vec![format!("ip-10-0-0-5.region-{n}.internal").parse().unwrap()],
            addresses: vec![Ipv4Addr::new(10, 0, 0, 5).into()],
            subnet: "10.0.0.0/24".parse().unwrap(),
        }),
        six: None,
        tokens: Tokens::Required,
        hop_limit: 1,
    }
}

/// With an address of IPv6.
fn served6(n: u8) -> Served {
    let dhcp = six::dhcp::Binding { addresses: vec![OWN6], ..Default::default() };
    let subnet = "2001:db8:1::/64".parse().unwrap();
    Served { six: Some(six::Binding { subnet, mtu: 1500, dhcp }), ..served(n) }
}

fn responders() -> Responders {
    responders_of(served)
}

fn responders_of(served: impl Fn(u8) -> Served) -> Responders {
    let mut responders = Responders::new(TokenKey::new([5; 32]), || 9);
    let served = (1..=2).map(|n| (u32::from(n) + 10, served(n))).collect();
    responders.configure(served, vec![], || 7, NOW);
    responders
}

fn frame(n: u8, packet: &[u8]) -> Vec<u8> {
    let mut frame = ebpf::punt_mac(u32::from(n) + 10).to_vec();
    frame.extend(served(n).binding.mac.octets());
    frame.extend(if packet.first().is_some_and(|first| first >> 4 == 6) {
        [0x86, 0xdd]
    } else {
        [8, 0]
    });
    frame.extend(packet);
    frame
}

/// A TCP client on bare IP, whose wire is the responders.
mod client {
    use std::collections::VecDeque;

    use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
    use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium};
    use smoltcp::socket::tcp;
    use smoltcp::time::Instant;
    use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

    use super::*;

    #[derive(Default)]
    pub struct Pipe {
        pub rx: VecDeque<Vec<u8>>,
        pub tx: Vec<Vec<u8>>,
    }

    impl Device for Pipe {
        type RxToken<'a> = Rx;
        type TxToken<'a> = Tx<'a>;
        fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
            let packet = self.rx.pop_front()?;
            Some((Rx(packet), Tx(&mut self.tx)))
        }
        fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
            Some(Tx(&mut self.tx))
        }
        fn capabilities(&self) -> DeviceCapabilities {
            let mut c = DeviceCapabilities::default();
            c.medium = Medium::Ip;
            c.max_transmission_unit = 1500;
            c.checksum = ChecksumCapabilities::default();
            c
        }
    }

    pub struct Rx(Vec<u8>);
    pub struct Tx<'a>(&'a mut Vec<Vec<u8>>);

    impl smoltcp::phy::RxToken for Rx {
        fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
            f(&self.0)
        }
    }
    impl smoltcp::phy::TxToken for Tx<'_> {
        fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
            let mut packet = vec![0; length];
            let result = f(&mut packet);
            self.0.push(packet);
            result
        }
    }

    pub struct Client {
        n: u8,
        pipe: Pipe,
        stack: Interface,
        sockets: SocketSet<'static>,
        pub handle: SocketHandle,
        pub heard: Vec<u8>,
        /// Hop limits of what came back.
        pub hops: Vec<u8>,
        now: Duration,
    }

    impl Client {
        pub fn connect(n: u8, port: u16, now: Duration) -> Self {
            Self::connect_to(metadata::ADDRESSES[0], n, port, now)
        }

        pub fn connect_to(server: IpAddr, n: u8, port: u16, now: Duration) -> Self {
            let mut pipe = Pipe::default();
            let at = Instant::from_micros(now.as_micros() as i64);
            let mut stack = Interface::new(Config::new(HardwareAddress::Ip), &mut pipe, at);
            let own = IpAddress::Ipv4(served(n).binding.address);
            stack.update_ip_addrs(|a| {
                a.push(IpCidr::new(own, 24)).unwrap();
                a.push(IpCidr::new(OWN6.into(), 64)).unwrap();
            });
            stack.routes_mut().add_default_ipv6_route(six::ROUTER).unwrap();
            stack.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 0, 1)).unwrap();
            let mut sockets = SocketSet::new(vec![]);
            let buffer = || tcp::SocketBuffer::new(vec![0; 32 * 1024]);
            let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            socket.connect(stack.context(), (server, 80), port).unwrap();
            Self { n, pipe, stack, sockets, handle, heard: vec![], hops: vec![], now }
        }

        pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
            self.sockets.get_mut(self.handle)
        }

        pub fn say(&mut self, responders: &mut Responders, bytes: &[u8]) {
            let mut left = bytes;
            while !left.is_empty() {
                let sent = self.socket().send_slice(left).unwrap_or(0);
                left = &left[sent..];
                self.exchange(responders);
                if sent == 0 && !self.socket().may_send() {
                    return;
                }
            }
        }

        /// Lets packets go to and fro until both sides are quiet.
        pub fn exchange(&mut self, responders: &mut Responders) {
            loop {
                let at = Instant::from_micros(self.now.as_micros() as i64);
                self.stack.poll(at, &mut self.pipe, &mut self.sockets);
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
                while socket.can_recv() {
                    let heard = &mut self.heard;
                    socket
                        .recv(|b| {
                            heard.extend_from_slice(b);
                            (b.len(), ())
                        })
                        .unwrap();
                }
                let sent = std::mem::take(&mut self.pipe.tx);
                let mut out = Vec::new();
                for packet in &sent {
                    responders.receive(&frame(self.n, packet), self.now, &mut out);
                }
                responders.elapse(self.now, &mut out);
                for reply in &out {
                    assert_eq!(reply[..6], ebpf::punt_mac(u32::from(self.n) + 10));
                    let six = reply[14] >> 4 == 6;
                    self.hops.push(reply[14 + if six { 7 } else { 8 }]);
                }
                if sent.is_empty() && out.is_empty() {
                    return;
                }
                self.pipe.rx.extend(out.into_iter().map(|f| f[14..].to_vec()));
            }
        }

        pub fn advance(&mut self, responders: &mut Responders, by: Duration) {
            self.now += by;
            self.exchange(responders);
        }
    }
}
use client::Client;

fn token(client: &mut Client, responders: &mut Responders) -> String {
    client.exchange(responders);
    client.say(
        responders,
        b"PUT /latest/api/token HTTP/1.1\r\nHost: h\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n",
    );
    let text = String::from_utf8(std::mem::take(&mut client.heard)).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    text.rsplit("\r\n\r\n").next().unwrap().to_owned()
}

fn get(token: &str) -> Vec<u8> {
    format!(
        "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: h\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n"
    )
    .into_bytes()
}

#[test]
fn a_guest_reads_its_documents_over_one_hop() {
    let mut responders = responders();
    let mut client = Client::connect(1, PORT, NOW);
    let token = token(&mut client, &mut responders);
    client.say(&mut responders, &get(&token));
    let text = String::from_utf8(client.heard.clone()).unwrap();
    assert!(text.ends_with("\r\n\r\ni-1"), "{text}");
    assert!(client.hops.iter().all(|&h| h == 1), "{:?}", client.hops);
}

#[test]
fn a_guest_reads_its_documents_over_ipv6_too() {
    let mut responders = responders_of(served6);
    let mut client = Client::connect_to(metadata::ADDRESSES[1], 2, PORT, NOW);
    let token = token(&mut client, &mut responders);
    client.say(&mut responders, &get(&token));
    let text = String::from_utf8(client.heard.clone()).unwrap();
    assert!(text.ends_with("\r\n\r\ni-2"), "{text}");
    assert!(client.hops.iter().all(|&h| h == 1), "{:?}", client.hops);
}

/// A client's question for the time, from an address of its own or of another's.
fn asks_time(from: IpAddr) -> Vec<u8> {
    let to = time::ADDRESSES[usize::from(from.is_ipv6())];
    let mut question = [0; 48];
    question[0] = 4 << 3 | 3;
    wire::datagram((from, 4000).into(), (to, time::PORT).into(), &question)
}

#[test]
fn time_is_told_to_an_interfaces_own_addresses_alone() {
    let own = [Ipv4Addr::new(10, 0, 0, 5).into(), OWN6.into()];
    let foreign: [IpAddr; 2] = ["10.0.0.6".parse().unwrap(), "2001:db8:1::6".parse().unwrap()];
    for (from, told) in own.into_iter().zip([1, 1]).chain(foreign.into_iter().zip([0, 0])) {
        let mut out = Vec::new();
        responders_of(served6).receive(&frame(1, &asks_time(from)), NOW, &mut out);
        assert_eq!(out.len(), told, "{from}");
    }
    // A sum that is not its own: nothing is told.
    let mut torn = asks_time(OWN6.into());
    *torn.last_mut().unwrap() ^= 1;
    let mut out = Vec::new();
    responders_of(served6).receive(&frame(1, &torn), NOW, &mut out);
    assert!(out.is_empty());
}

#[test]
fn answers_pass_as_many_routers_as_they_are_told_to() {
    let mut responders = responders();
    let mut before = Client::connect(1, PORT, NOW);
    token(&mut before, &mut responders);
    responders.configure(vec![(11, Served { hop_limit: 3, ..served(1) })], vec![], || 8, NOW);
    before.hops.clear();
    token(&mut before, &mut responders);
    let mut after = Client::connect(1, PORT + 1, NOW);
    token(&mut after, &mut responders);
    let hops: Vec<u8> = before.hops.into_iter().chain(after.hops).collect();
    assert!(!hops.is_empty() && hops.iter().all(|&h| h == 3), "{hops:?}");
}

#[test]
fn a_service_out_of_bounds_is_refused_by_name() {
    let mut interface = rpc::dataplane::Interface::new(
        model::InterfaceId::from_random(1),
        rpc::dataplane::Device::Existing { name: "tap".into() },
        model::Mac([2, 0, 0, 0, 0, 1]),
        model::VpcId::from_random(1),
        (Ipv4Addr::new(10, 0, 0, 5), "10.0.0.0/24".parse().unwrap()),
    );
    for (hops, good) in [(0, false), (1, true), (64, true), (65, false)] {
        interface.services.metadata_hop_limit = hops;
        assert_eq!(Served::try_from(&interface).is_ok(), good, "hop limit {hops}");
    }
    interface.services = Default::default();
    for (node, good) in [(0, false), (1, true), (2, true), (3, false), (8, true), (9, false)] {
        interface.services.netbios_node = Some(node);
        assert_eq!(Served::try_from(&interface).is_ok(), good, "node type {node}");
    }
    interface.services = Default::default();
    for (count, good) in [(4, true), (5, false)] {
        interface.services.ntp = vec![Ipv4Addr::new(10, 0, 0, 7); count];
        assert_eq!(Served::try_from(&interface).is_ok(), good, "{count} time servers");
    }
    interface.services = Default::default();
    interface.subnet6 = Some("2001:db8:1::/64".parse().unwrap());
    for (mtu, good) in [(1279, false), (1280, true)] {
        interface.dhcp.mtu = mtu;
        assert_eq!(Served::try_from(&interface).is_ok(), good, "an MTU of {mtu}");
    }
}

#[test]
fn two_interfaces_with_one_address_are_served_apart() {
    let mut responders = responders();
    let mut one = Client::connect(1, PORT, NOW);
    let mut two = Client::connect(2, PORT, NOW);
    let (first, second) = (token(&mut one, &mut responders), token(&mut two, &mut responders));
    one.say(&mut responders, &get(&first));
    two.say(&mut responders, &get(&second));
    assert!(one.heard.ends_with(b"i-1"));
    assert!(two.heard.ends_with(b"i-2"));
    two.heard.clear();
    two.say(&mut responders, &get(&first));
    assert!(two.heard.starts_with(b"HTTP/1.1 401"), "a token of another interface");
}

#[test]
fn new_documents_keep_the_connection_and_the_token() {
    let mut responders = responders();
    let mut client = Client::connect(1, PORT, NOW);
    let token = token(&mut client, &mut responders);
    let mut changed = served(1);
    let map = [("meta-data/instance-id".to_owned(), "changed".to_owned())].into();
    changed.metadata = Some(metadata::Documents::parse(&map).unwrap());
    responders.configure(vec![(11, changed)], vec![], || 8, NOW);
    client.say(&mut responders, &get(&token));
    assert!(client.heard.ends_with(b"changed"));
}

#[test]
fn a_slow_request_is_told_so_and_a_quiet_connection_closed() {
    let mut responders = responders();
    let mut slow = Client::connect(1, PORT, NOW);
    slow.exchange(&mut responders);
    slow.say(&mut responders, b"GET /la");
    slow.advance(&mut responders, Duration::from_secs(6));
    // More bytes do not buy more time.
    slow.say(&mut responders, b"test");
    slow.advance(&mut responders, Duration::from_secs(6));
    assert!(slow.heard.starts_with(b"HTTP/1.1 408"), "{:?}", String::from_utf8_lossy(&slow.heard));
    let mut quiet = Client::connect(2, PORT, NOW);
    quiet.exchange(&mut responders);
    quiet.advance(&mut responders, Duration::from_secs(11));
    assert!(!quiet.socket().is_active());
}

#[test]
fn a_crowd_of_connections_leaves_room_for_one_more() {
    let mut responders = responders();
    let mut crowd: Vec<Client> = (0..100)
        .map(|i| Client::connect(1, PORT + i, NOW + Duration::from_millis(i.into())))
        .collect();
    for client in &mut crowd {
        client.exchange(&mut responders);
        client.say(&mut responders, b"GET / HTTP/1.1\r\n");
    }
    let mut late = Client::connect(1, PORT - 1, NOW + Duration::from_secs(2));
    let token = token(&mut late, &mut responders);
    late.say(&mut responders, &get(&token));
    assert!(late.heard.ends_with(b"i-1"));
}

#[test]
fn a_flood_is_cut_to_its_rate_and_costs_another_interface_nothing() {
    let mut responders = responders();
    let mut out = Vec::new();
    for _ in 0..5000 {
        responders.receive(&frame(1, &[0; 40]), NOW, &mut out);
    }
    assert!(out.is_empty());
    let counters = responders.counters();
    let one = counters[&served(1).interface];
    assert_eq!(one.ignored, u64::from(limit::FRAMES_AT_ONCE_MAX));
    assert_eq!(one.limited, 5000 - one.ignored);
    let mut other = Client::connect(2, PORT, NOW);
    token(&mut other, &mut responders);
}

fn syn() -> Vec<u8> {
    let mut responders = responders();
    let mut client = Client::connect(1, PORT, NOW);
    client.exchange(&mut responders);
    // Captured from a client's first packet: 20 bytes of IPv4, TCP with options.
    let mut bytes =
        vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 5, 169, 254, 169, 254];
    bytes.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(bytes.as_mut_slice());
    ip.fill_checksum();
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    smoltcp::wire::TcpPacket::new_unchecked(&mut bytes[20..]).fill_checksum(&from, &to);
    bytes
}

#[test]
fn a_plain_syn_is_answered_so_that_the_property_below_says_something() {
    let (mut responders, mut out) = (responders(), Vec::new());
    responders.receive(&frame(1, &syn()), NOW, &mut out);
    assert_eq!(out.len(), 1);
    assert_eq!(out[0][14 + 20 + 13], 0x12, "SYN and ACK");
}

#[test]
fn a_frame_with_a_bad_checksum_or_anothers_address_is_ignored() {
    let (mut responders, mut out) = (responders(), Vec::new());
    let good = syn();
    for at in [12, 15, 36] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        responders.receive(&frame(1, &bad), NOW, &mut out);
    }
    let mut stranger = frame(1, &good);
    stranger[11] ^= 1;
    responders.receive(&stranger, NOW, &mut out);
    assert!(out.is_empty());
}

proptest! {
    #[test]
    fn hostile_frames_never_panic_and_never_reach_another_interface(
        frames in proptest::collection::vec(
            (1u8..=2, proptest::collection::vec(any::<u8>(), 0..200)), 1..40),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..40),
    ) {
        let mut responders = responders();
        let mut now = NOW;
        for (i, (n, garbage)) in frames.iter().enumerate() {
            let mut bytes = frame(*n, if i % 2 == 0 { garbage } else { &[] });
            if i % 2 == 1 {
                bytes.extend(syn());
                if let Some((at, to)) = damage.get(i) {
                    let length = bytes.len();
                    bytes[6 + at % (length - 6)] = *to;
                }
                bytes.extend(&garbage[..garbage.len().min(6)]);
            }
            let mut out = Vec::new();
            now += Duration::from_millis(700);
            responders.receive(&bytes, now, &mut out);
            for reply in &out {
                prop_assert_eq!(&reply[..6], &ebpf::punt_mac(u32::from(*n) + 10));
            }
            out.clear();
            responders.elapse(now, &mut out);
            for reply in &out {
                let to = ebpf::ifindex_of(reply[..6].try_into().unwrap());
                prop_assert!(to == Some(11) || to == Some(12));
            }
        }
    }

    #[test]
    fn a_frame_to_no_interface_is_a_stray(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let mut responders = responders();
        let mut out = Vec::new();
        prop_assume!(!bytes.starts_with(&ebpf::PUNT_MAC_PREFIX));
        responders.receive(&bytes, NOW, &mut out);
        prop_assert!(out.is_empty());
        prop_assert_eq!(responders.strays, 1);
    }
}
