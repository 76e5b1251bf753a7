//! The frames, and the program that runs on each before it goes on.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use super::kernel::{MapKind, load_xdp, make_map, set_entry};

/// The least Ethernet frame without its check sequence: what floods are made of.
pub const FRAME_BYTES: usize = 60;

/// The port that the guest's group opens.
pub const OPEN_PORT: u16 = 9000;

/// The client's port of the flow that both sides know.
pub const KNOWN_PORT: u16 = 700;

/// The first of the ports that new flows come from; the counter is added to it.
const NEW_PORT_FIRST: u16 = 1024;

/// New flows a measurement can make without one coming twice.
pub const NEW_FLOWS_MAX: u32 = u16::MAX as u32 - NEW_PORT_FIRST as u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// One flow that both sides have spoken in.
    Established,
    /// Every packet is the first of a flow of its own.
    New,
}

impl Traffic {
    pub const ALL: [Self; 2] = [Self::Established, Self::New];
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Established => "established flow",
            Self::New => "every packet a new flow",
        })
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Ends {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
}

/// A UDP frame; its UDP checksum is zero, which says that it has none.
pub fn frame(ends: &Ends) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&ends.destination_mac);
    frame[6..12].copy_from_slice(&ends.source_mac);
    frame[12..14].copy_from_slice(&[8, 0]);
    let length = (FRAME_BYTES - 14) as u16;
    let ip = &mut frame[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&ends.source.octets());
    ip[16..20].copy_from_slice(&ends.destination.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!folded as u16).to_be_bytes());
    frame[34..36].copy_from_slice(&KNOWN_PORT.to_be_bytes());
    frame[36..38].copy_from_slice(&OPEN_PORT.to_be_bytes());
    frame[38..40].copy_from_slice(&(length - 20).to_be_bytes());
    frame
}

/// The program that runs on each frame: writes its headers anew, because the
/// kernel uses a page again and again as the router has left it; gives it a port
/// of its own where every packet is to be a new flow; then calls the router's
/// own XDP program, where it has one, or lets the frame pass.
#[derive(Debug)]
pub struct Generator {
    pub program: OwnedFd,
    state: OwnedFd,
    next: OwnedFd,
}

/// Ethernet, IPv4 and UDP headers.
const HEADER_BYTES: usize = 42;

/// The program's state: how many frames it has made, and their headers.
const HEADERS_AT: usize = 8;
const STATE_BYTES: usize = HEADERS_AT + 48;

impl Generator {
    pub fn load(traffic: Traffic) -> io::Result<Self> {
        let state = make_map(MapKind::Array, STATE_BYTES as u32)?;
        let next = make_map(MapKind::ProgArray, 4)?;
        let program = load_xdp(&instructions(traffic, &state, &next))?;
        Ok(Self { program, state, next })
    }

    /// The program that each frame goes through next.
    pub fn call_next(&self, program: &OwnedFd) -> io::Result<()> {
        set_entry(&self.next, &program.as_raw_fd().to_ne_bytes())
    }

    /// From now on frames look like this one, and their ports begin anew.
    pub fn prepare(&self, frame: &[u8; FRAME_BYTES]) -> io::Result<()> {
        let mut state = [0; STATE_BYTES];
        state[HEADERS_AT..HEADERS_AT + HEADER_BYTES].copy_from_slice(&frame[..HEADER_BYTES]);
        set_entry(&self.state, &state)
    }
}

/// A program that lets every frame pass. A device that runs one has the receive
/// queue that live frames are said to come from.
pub fn load_pass() -> io::Result<OwnedFd> {
    load_xdp(&[op(0xb7, 0, 0, 0, 2), op(0x95, 0, 0, 0, 0)])
}

/// One instruction: code, destination and source register, offset, immediate.
const fn op(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

/// By hand (Documentation/bpf/standardization/instruction-set.rst), so that the
/// benchmark needs no compiler for BPF.
fn instructions(traffic: Traffic, state: &OwnedFd, next: &OwnedFd) -> Vec<u64> {
    // Loads a map: two slots, the source register 1 says "by descriptor".
    let map = |dst: u8, map: &OwnedFd| [op(0x18, dst, 1, 0, map.as_raw_fd()), 0];
    let mut fill = Vec::new();
    for at in (0..HEADER_BYTES as i16 - 2).step_by(8) {
        fill.push(op(0x79, 1, 0, HEADERS_AT as i16 + at, 0)); // r1 = eight bytes of the headers
        fill.push(op(0x7b, 7, 1, at, 0));
    }
    let last = HEADER_BYTES as i16 - 2;
    fill.push(op(0x69, 1, 0, HEADERS_AT as i16 + last, 0)); // and the last two
    fill.push(op(0x6b, 7, 1, last, 0));
    if traffic == Traffic::New {
        fill.extend([
            op(0x79, 1, 0, 0, 0), // r1 = frames so far
            op(0xbf, 2, 1, 0, 0),
            op(0x07, 2, 0, 0, 1),
            op(0x7b, 0, 2, 0, 0), // one more
            op(0x07, 1, 0, 0, NEW_PORT_FIRST as i32),
            op(0xdc, 1, 0, 0, 16), // to big-endian
            op(0x6b, 7, 1, 34, 0), // source port = r1
        ]);
    }
    let fill_length = fill.len() as i16;
    [
        &[
            op(0xbf, 6, 1, 0, 0), // r6 = ctx
            op(0x61, 2, 6, 0, 0), // r2 = ctx->data
            op(0x61, 3, 6, 4, 0), // r3 = ctx->data_end
            op(0xbf, 7, 2, 0, 0), // r7 = r2
            op(0x07, 2, 0, 0, HEADER_BYTES as i32),
            op(0x2d, 2, 3, 7 + fill_length, 0), // if r2 > r3 goto the call below
            op(0x62, 10, 0, -4, 0),             // key = 0
        ][..],
        &map(1, state),
        &[
            op(0xbf, 2, 10, 0, 0), // r2 = &key
            op(0x07, 2, 0, 0, -4),
            op(0x85, 0, 0, 0, 1), // r0 = bpf_map_lookup_elem(state, &key)
            op(0x15, 0, 0, fill_length, 0), // if r0 == 0 goto the call below
        ],
        &fill,
        &[op(0xbf, 1, 6, 0, 0)], // the call: r1 = ctx
        &map(2, next),
        &[
            op(0xb7, 3, 0, 0, 0),
            op(0x85, 0, 0, 0, 12), // bpf_tail_call(ctx, next, 0): does not return where one is there
            op(0xb7, 0, 0, 0, 2),  // XDP_PASS
            op(0x95, 0, 0, 0, 0),
        ],
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_the_checksum_that_its_header_asks_for() {
        let ends = Ends {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source: Ipv4Addr::new(198, 51, 100, 1),
            destination: Ipv4Addr::new(198, 51, 100, 200),
        };
        let frame = frame(&ends);
        let sum: u32 =
            frame[14..34].chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(frame[38..40], 26u16.to_be_bytes());
    }
}
