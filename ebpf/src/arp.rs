//! ARP, answered at the device where it is asked.

use crate::decide::own;
use crate::layout::Interface;
use crate::packet::{Frame, mac_number};
use crate::reason::Reason;
use crate::tables::Tables;
use crate::verdict::{Action, Work};
use crate::{DNS_ADDRESS, GATEWAY, METADATA_ADDRESS, TIME_ADDRESS};

/// ARP for any other address of the subnet, and for the host's services, is
/// answered with the gateway's address: guests never see each other's frames.
#[inline(always)]
pub fn arp_from_instance<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    interface: &Interface,
    work: &mut Work,
) -> Result<(), Reason> {
    let arp = Arp::parse(frame).ok_or(Reason::Malformed)?;
    // A probe (RFC 5227) has no sender address yet.
    let as_itself = arp.sender == 0 || own(tables, interface, arp.sender).is();
    if mac_number(arp.sender_mac) != interface.mac_number() || !as_itself {
        return Err(Reason::SpoofedArp);
    }
    let in_subnet = arp.target & interface.mask == interface.subnet;
    let service = [METADATA_ADDRESS, TIME_ADDRESS, DNS_ADDRESS].contains(&arp.target);
    let answered = in_subnet || service;
    if !arp.request || !answered || own(tables, interface, arp.target).is() {
        return Err(Reason::ArpIgnored);
    }
    work.verdict.rewrite.source_mac = GATEWAY;
    work.verdict.accept(Action::AnswerArp, Reason::Arp);
    Ok(())
}

struct Arp {
    request: bool,
    sender_mac: [u8; 6],
    sender: u32,
    target: u32,
}

impl Arp {
    #[inline(always)]
    fn parse<F: Frame + ?Sized>(frame: &F) -> Option<Self> {
        let a: [u8; 28] = frame.load(14)?;
        // Ethernet and IPv4, in addresses of 6 and 4 bytes.
        if u32::from_be_bytes([a[0], a[1], a[2], a[3]]) != 0x0001_0800 || a[4] != 6 || a[5] != 4 {
            return None;
        }
        Some(Self {
            request: a[6] == 0 && a[7] == 1,
            sender_mac: [a[8], a[9], a[10], a[11], a[12], a[13]],
            sender: u32::from_be_bytes([a[14], a[15], a[16], a[17]]),
            target: u32::from_be_bytes([a[24], a[25], a[26], a[27]]),
        })
    }
}

/// The uplink answers for the elastic addresses that interfaces hold.
#[inline(always)]
pub fn arp_from_world<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    work: &mut Work,
) {
    if let Some(arp) = Arp::parse(frame)
        && arp.request
        && tables.elastic(arp.target).is_some()
    {
        work.verdict.rewrite.source_mac = mac_number(tables.config().uplink_mac);
        work.verdict.accept(Action::AnswerArp, Reason::Arp);
    }
}
