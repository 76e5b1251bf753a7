//! How a frame on the punt device says to which interface it belongs.
//!
//! What a guest asks of us (DHCP, the time, metadata) is redirected to one device that
//! the daemon owns, the punt device. The interface is named in the destination
//! hardware address, in both directions:
//!
//! ```text
//!   02 70 | ii ii ii ii        ii: the interface's ifindex, big-endian
//! ```
//!
//! - **Guest to daemon:** destination [`punt_mac`] of the guest's device, source
//!   the guest's own address. Everything else in the frame is as the guest sent it.
//! - **Daemon to guest:** the daemon writes a frame whose destination is
//!   [`punt_mac`] of the guest's device; the source may be anything. The program
//!   puts the guest's address and [`GATEWAY_MAC`](crate::GATEWAY_MAC) there
//!   and hands the frame to the guest's device. No ARP is ever needed or answered here.
//!
//! Whatever else comes out of the punt device is dropped and counted.

use crate::packet::{mac_bytes, mac_number};

/// Locally administered, unicast; never a guest's or the gateway's address.
pub const PUNT_MAC_PREFIX: [u8; 2] = [0x02, 0x70];

/// The destination that stands for the device `ifindex` on the punt device.
#[inline(always)]
pub const fn punt_mac(ifindex: u32) -> [u8; 6] {
    mac_bytes(punt_number(ifindex))
}

/// [`punt_mac`] as a number.
#[inline(always)]
pub const fn punt_number(ifindex: u32) -> u64 {
    (PUNT_MAC_PREFIX[0] as u64) << 40 | (PUNT_MAC_PREFIX[1] as u64) << 32 | ifindex as u64
}

/// The device that `mac` stands for, or `None` where it stands for none.
#[inline(always)]
pub const fn ifindex_of(mac: [u8; 6]) -> Option<u32> {
    ifindex_of_number(mac_number(mac))
}

/// [`ifindex_of`] an address as a number.
#[inline(always)]
pub const fn ifindex_of_number(mac: u64) -> Option<u32> {
    if mac >> 32 == punt_number(0) >> 32 { Some(mac as u32) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_back_from_its_address() {
        for ifindex in [1, 7, 0x0102_0304, u32::MAX] {
            assert_eq!(ifindex_of(punt_mac(ifindex)), Some(ifindex));
        }
        assert_eq!(ifindex_of([0x02, 0x68, 0, 0, 0, 1]), None);
        assert_eq!(ifindex_of([0xff; 6]), None);
    }
}
