//! Checksums of whole frames, by the library and not by what rewrites packets.

use etherparse::{Icmpv4Slice, IpNumber, Ipv4Slice, TcpSlice, UdpSlice};

/// What is wrong with a frame's checksums; a header that does not lie whole within the
/// frame has none.
pub fn wrong(frame: &[u8]) -> Option<&'static str> {
    if frame.get(12..14) != Some(&[8, 0]) {
        return None;
    }
    let ip = Ipv4Slice::from_slice(&frame[14..]).ok()?;
    let header = ip.header();
    if header.to_header().calc_header_checksum() != header.header_checksum() {
        return Some("the IP header's");
    }
    let payload = ip.payload();
    if payload.fragmented {
        return None;
    }
    let (bytes, source, destination) = (payload.payload, header.source(), header.destination());
    match payload.ip_number {
        IpNumber::TCP => {
            let tcp = TcpSlice::from_slice(bytes).ok()?;
            let right = tcp.calc_checksum_ipv4(source, destination).ok()?;
            (tcp.checksum() != right).then_some("TCP's")
        }
        IpNumber::UDP => {
            let udp = UdpSlice::from_slice(bytes).ok()?;
            let right =
                udp.to_header().calc_checksum_ipv4_raw(source, destination, udp.payload()).ok()?;
            (udp.checksum() != 0 && udp.checksum() != right).then_some("UDP's")
        }
        IpNumber::ICMP => {
            let icmp = Icmpv4Slice::from_slice(bytes).ok()?;
            let right = icmp.icmp_type().calc_checksum(icmp.payload());
            (icmp.checksum() != right).then_some("ICMP's")
        }
        _ => None,
    }
}

#[test]
fn a_wrong_checksum_is_seen_and_a_right_one_is_not() {
    for change in 0..3 {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(1, 2)
            .write(&mut frame, &[7; 3])
            .unwrap();
        let at = [None, Some(22), Some(43)][change];
        at.inspect(|at| frame[*at] ^= 1);
        assert_eq!(wrong(&frame), [None, Some("the IP header's"), Some("UDP's")][change]);
    }
}
