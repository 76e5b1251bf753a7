//! Tells the uplink's neighbours of public addresses that have come to this host, so that
//! none of them goes on sending to the host that had them before.
//!
//! IPv4: an ARP announcement (RFC 5227 section 2.3, a request for one's own address); IPv6:
//! an unsolicited neighbour advertisement that overrides (RFC 4861 section 7.2.6). An address
//! that goes from one interface of this host to another stays at the uplink's hardware
//! address, so nothing is said of it.

use std::collections::BTreeMap;
use std::io;

use aya::Ebpf;
use aya::programs::{TestRun as _, TestRunOptions};
use ebpf::V6;
use ebpf::neighbour::answer;
use ebpf::packet::mac_number;
use ebpf::rewrite::Rewrite;

use super::links::ANNOUNCE;
use super::{Error, why};
use crate::compile::Tables;

/// How often an address is told, a second between: a frame may be lost, and RFC 5227
/// (`ANNOUNCE_NUM`) and RFC 4861 (`MAX_NEIGHBOR_ADVERTISEMENT`) allow 2 and 3.
const TIMES: u8 = 3;
/// Frames at once, so that a host that comes up with thousands floods nobody.
const FRAMES_MAX: usize = 256;
const BROADCAST: [u8; 6] = [0xff; 6];
/// RFC 2464 section 7, of the group of all nodes.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Address {
    Four(u32),
    Six(V6),
}

/// What is still to be said.
#[derive(Debug, Default)]
pub struct Announcer {
    /// How often yet.
    due: BTreeMap<Address, u8>,
    /// Those that were told in this round come after it in the next.
    last: Option<Address>,
}

impl Announcer {
    /// What came with these tables.
    pub fn note(&mut self, from: &Tables, to: &Tables) {
        let uplink = |tables: &Tables| (tables.config.uplink, tables.config.uplink_mac);
        let moved = uplink(from) != uplink(to);
        let come = addresses(to).filter(|address| moved || !has(from, *address));
        self.due.extend(come.map(|address| (address, TIMES)));
    }

    /// The next frames, of addresses that are still here.
    pub fn frames(&mut self, tables: &Tables) -> Vec<Vec<u8>> {
        if tables.config.uplink == 0 {
            self.due.clear();
        }
        self.due.retain(|address, _| has(tables, *address));
        let later = |address: &Address| self.last.is_none_or(|last| *address > last);
        let mut told: Vec<Address> = self.due.keys().copied().filter(later).collect();
        told.truncate(FRAMES_MAX);
        self.last = told.last().copied().filter(|_| told.len() == FRAMES_MAX);
        for address in &told {
            let left = self.due.remove(address).unwrap_or(0);
            if left > 1 {
                self.due.insert(*address, left - 1);
            }
        }
        told.into_iter().map(|address| frame(address, tables.config.uplink_mac)).collect()
    }
}

fn addresses(tables: &Tables) -> impl Iterator<Item = Address> + '_ {
    let four = tables.elastics.keys().map(|address| Address::Four(*address));
    four.chain(tables.holders.keys().map(|address| Address::Six(*address)))
}

fn has(tables: &Tables, address: Address) -> bool {
    match address {
        Address::Four(address) => tables.elastics.contains_key(&address),
        Address::Six(address) => tables.holders.contains_key(&address),
    }
}

fn frame(address: Address, mac: [u8; 6]) -> Vec<u8> {
    match address {
        Address::Four(address) => arp(address.to_be_bytes(), mac),
        Address::Six(source) => {
            let (source_mac, destination_mac) = (mac_number(mac), mac_number(ALL_NODES_MAC));
            let destination = V6::UNSPECIFIED;
            answer(&Rewrite { source, source_mac, destination, destination_mac, ttl: 0 }).to_vec()
        }
    }
}

/// RFC 826: Ethernet and IPv4, a request; the target's hardware address is not known.
fn arp(address: [u8; 4], mac: [u8; 6]) -> Vec<u8> {
    let kind = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1];
    [&BROADCAST[..], &mac, &kind, &mac, &address, &[0; 6], &address].concat()
}

/// Sends the frame by the uplink.
pub fn send(bpf: &Ebpf, uplink: u32, frame: &[u8]) -> Result<(), Error> {
    let program = why::classifier(bpf, ANNOUNCE)?;
    let context = why::context(uplink, 0);
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.ctx_in = Some(&context);
    let failed = |cause: io::Error| Error::new("announce", "the uplink", cause);
    let run = program.test_run(options).map_err(|e| Error::new("run", ANNOUNCE, e))?;
    carried(run.return_value).map_err(failed)
}

/// What a program that sends a frame on answers.
pub fn carried(answer: u32) -> io::Result<()> {
    match answer as i32 {
        0 => Ok(()),
        code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        code => Err(io::Error::other(format!("the device dropped it ({code})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable as _;
    use ebpf::layout::Elastic;

    fn tables(addresses: impl IntoIterator<Item = u32>) -> Tables {
        let mut tables = Tables::default();
        tables.config.uplink = 7;
        tables.config.uplink_mac = [2, 0, 0, 0, 0, 9];
        tables.elastics = addresses.into_iter().map(|a| (a, Elastic::zeroed())).collect();
        tables
    }

    #[test]
    fn what_comes_is_told_three_times_and_what_stays_is_not() {
        let (none, one, both) = (tables([]), tables([1]), tables([1, 2]));
        let mut announcer = Announcer::default();
        announcer.note(&none, &one);
        assert_eq!(announcer.frames(&one), [frame(Address::Four(1), [2, 0, 0, 0, 0, 9])]);
        announcer.note(&one, &both);
        assert_eq!(announcer.frames(&both).len(), 2);
        assert_eq!(announcer.frames(&both).len(), 2);
        assert_eq!(announcer.frames(&both).len(), 1);
        assert_eq!(announcer.frames(&both).len(), 0);
        let mut other = both.clone();
        other.config.uplink_mac[5] = 1;
        announcer.note(&both, &other);
        assert_eq!(announcer.frames(&other).len(), 2, "another hardware address");
    }

    #[test]
    fn what_has_gone_is_not_told_any_more() {
        let mut announcer = Announcer::default();
        announcer.note(&tables([]), &tables([1, 2]));
        assert_eq!(announcer.frames(&tables([2])).len(), 1);
        let mut cut_off = tables([2]);
        cut_off.config.uplink = 0;
        assert!(announcer.frames(&cut_off).is_empty());
        assert!(announcer.frames(&tables([2])).is_empty());
    }

    #[test]
    fn thousands_are_told_in_turns_each_as_often_as_the_others() {
        let all = tables(0..1000);
        let mut announcer = Announcer::default();
        announcer.note(&tables([]), &all);
        let mut times = BTreeMap::<Vec<u8>, u8>::new();
        let mut turns = 0;
        while !announcer.due.is_empty() {
            let frames = announcer.frames(&all);
            assert!(frames.len() <= FRAMES_MAX);
            frames.into_iter().for_each(|f| *times.entry(f).or_default() += 1);
            turns += 1;
            assert!(turns < 100);
        }
        assert_eq!(times.len(), 1000);
        assert!(times.values().all(|n| *n == TIMES), "{turns} turns");
    }
}
