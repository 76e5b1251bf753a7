//! A captured packet, from a pcap file or as hexadecimal digits.

use std::path::Path;

/// linux' and tcpdump's Ethernet.
const LINKTYPE_ETHERNET: u32 = 1;
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;

/// `text`: a file's path, or the frame's bytes in hexadecimal. `number`: which packet
/// of the file, from 1.
pub fn read(text: &str, number: usize) -> Result<Vec<u8>, String> {
    if Path::new(text).exists() {
        let bytes = std::fs::read(text).map_err(|e| format!("{text}: read: {e}"))?;
        return packet(&bytes, number).map_err(|e| format!("{text}: {e}"));
    }
    hexadecimal(text)
        .ok_or_else(|| format!("`{text}` is neither a file nor a frame in hexadecimal digits"))
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !c.is_whitespace() && *c != ':')
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    Some(pairs.map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// The nth packet of a pcap file (the classic format, either byte order).
fn packet(file: &[u8], number: usize) -> Result<Vec<u8>, String> {
    let word = |at: usize, swapped: bool| {
        let bytes = *file.get(at..)?.first_chunk::<4>()?;
        Some(if swapped { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    let swapped = match word(0, false) {
        Some(0xa1b2_c3d4 | 0xa1b2_3c4d) => false,
        Some(0xd4c3_b2a1 | 0x4d3c_b2a1) => true,
        _ => return Err("it is no pcap file (`tcpdump -w` writes one; not pcapng)".into()),
    };
    let kind = word(20, swapped).map(|kind| kind & 0xffff);
    if kind != Some(LINKTYPE_ETHERNET) {
        return Err("its packets are not Ethernet frames (capture on one device, not `any`)".into());
    }
    let mut at = FILE_HEADER;
    for n in 1.. {
        let length = word(at + 8, swapped).ok_or(format!("it has only {} packets", n - 1))?;
        let begin = at + PACKET_HEADER;
        let end = begin.saturating_add(length as usize);
        let bytes = file.get(begin..end).ok_or("it is cut off in a packet")?;
        if n == number.max(1) {
            return Ok(bytes.to_vec());
        }
        at = end;
    }
    unreachable!("the loop has no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(big: bool, packets: &[&[u8]]) -> Vec<u8> {
        let word = |n: u32| if big { n.to_be_bytes() } else { n.to_le_bytes() };
        let mut file = Vec::new();
        for n in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65535, 1] {
            file.extend(word(n));
        }
        for packet in packets {
            for n in [0, 0, packet.len() as u32, packet.len() as u32] {
                file.extend(word(n));
            }
            file.extend(*packet);
        }
        file
    }

    #[test]
    fn a_packet_is_read_by_its_number_in_either_byte_order() {
        for big in [false, true] {
            let file = file(big, &[b"first", b"second"]);
            assert_eq!(packet(&file, 1).unwrap(), b"first");
            assert_eq!(packet(&file, 2).unwrap(), b"second");
            assert!(packet(&file, 3).unwrap_err().contains("only 2"));
        }
    }

    #[test]
    fn a_file_that_is_none_or_cut_off_is_named() {
        let whole = file(false, &[b"first", b"second"]);
        for length in 0..whole.len() {
            assert!(packet(&whole[..length], 2).is_err(), "{length}");
        }
        assert!(packet(b"\x0a\x0d\x0d\x0a....", 1).unwrap_err().contains("no pcap"));
    }

    #[test]
    fn hexadecimal_digits_are_read_with_and_without_colons() {
        assert_eq!(hexadecimal("02:00 ff"), Some(vec![2, 0, 255]));
        assert_eq!(hexadecimal("020"), None);
        assert_eq!(hexadecimal("zz"), None);
    }
}
