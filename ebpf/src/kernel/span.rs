//! Bytes of a packet, read and written by the word.

use core::arch::asm;

use ebpf::packet::{HEAD_LEN, HEAD6_LEN};
use ebpf::{Head, Head6, V6};

/// A load or store of a whole word wherever it lies. The compiler would take bytes,
/// for the target is said to want words aligned; packets the verifier lets be read
/// and written anywhere.
macro_rules! word_access {
    ($load:ident, $store:ident, $type:ty, $name:literal) => {
        /// # Safety
        /// The bytes must lie inside the packet.
        #[inline(always)]
        pub unsafe fn $load<const OFFSET: usize>(at: *const u8) -> $type {
            let word: u64;
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("{word} = *(", $name, " *)({at} + {offset})"),
                    word = out(reg) word,
                    at = in(reg) at,
                    offset = const OFFSET,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
            <$type>::from_be(word as $type)
        }

        /// # Safety
        /// The bytes must lie inside the packet.
        #[inline(always)]
        pub unsafe fn $store<const OFFSET: usize>(at: *mut u8, word: $type) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("*(", $name, " *)({at} + {offset}) = {word}"),
                    word = in(reg) u64::from(word.to_be()),
                    at = in(reg) at,
                    offset = const OFFSET,
                    options(nostack, preserves_flags),
                );
            }
        }
    };
}

word_access!(load_u16, store_u16, u16, "u16");
word_access!(load_u32, store_u32, u32, "u32");
word_access!(load_u64, store_u64, u64, "u64");

/// Writes a head's changed words.
///
/// # Safety
/// All 34 bytes must lie inside the packet.
#[inline(always)]
pub unsafe fn store_head(at: *mut u8, head: &Head) {
    // SAFETY: the caller's promise.
    unsafe {
        store_u64::<0>(at, head.macs);
        store_u32::<8>(at, head.macs_rest);
        store_u32::<22>(at, head.third);
        store_u32::<26>(at, head.source);
        store_u32::<30>(at, head.destination);
    }
}

/// What of a packet lies in one piece.
#[derive(Clone, Copy)]
pub struct Span {
    pub start: usize,
    pub end: usize,
}

impl Span {
    /// Where `N` bytes from `offset` are, if they are here.
    #[inline(always)]
    pub fn at<const N: usize>(self, offset: u32) -> Option<*mut u8> {
        let at = self.start + offset as usize;
        if at + N > self.end { None } else { Some(at as *mut u8) }
    }

    #[inline(always)]
    pub fn head(self) -> Option<Head> {
        let at = self.at::<HEAD_LEN>(0)?;
        // SAFETY: all 34 bytes are there.
        unsafe {
            Some(Head {
                macs: load_u64::<0>(at),
                macs_rest: load_u32::<8>(at),
                ether_type: load_u16::<12>(at),
                first: load_u32::<14>(at),
                second: load_u32::<18>(at),
                third: load_u32::<22>(at),
                source: load_u32::<26>(at),
                destination: load_u32::<30>(at),
            })
        }
    }

    #[inline(always)]
    pub fn head6(self) -> Option<Head6> {
        let at = self.at::<HEAD6_LEN>(0)?;
        // SAFETY: all 54 bytes are there.
        unsafe {
            Some(Head6 {
                macs: load_u64::<0>(at),
                macs_rest: load_u32::<8>(at),
                ether_type: load_u16::<12>(at),
                first: load_u32::<14>(at),
                second: load_u32::<18>(at),
                source: V6 { high: load_u64::<22>(at), low: load_u64::<30>(at) },
                destination: V6 { high: load_u64::<38>(at), low: load_u64::<46>(at) },
            })
        }
    }

    /// The few short pieces that every packet has; the rest goes by the helper.
    #[inline(always)]
    pub fn load<const N: usize>(self, offset: u32) -> Option<[u8; N]> {
        // A bound for the verifier; transport headers begin at 74 at the latest.
        if offset > 127 {
            return None;
        }
        let at = self.at::<N>(offset)?;
        let mut bytes = [0; N];
        // SAFETY: all N bytes are there.
        unsafe {
            match N {
                2 => bytes.copy_from_slice(&load_u16::<0>(at).to_be_bytes()),
                8 => bytes.copy_from_slice(&load_u64::<0>(at).to_be_bytes()),
                _ => return None,
            }
        }
        Some(bytes)
    }
}
