//! Session tokens, sealed rather than stored: a guest may ask for as many as it
//! likes and costs no memory, and a restarted daemon honours those it gave.
//!
//! ```text
//!  0        8                24                       40 bytes, then base64url
//!  | expiry | nonce          | HMAC-SHA256(key, interface · expiry · nonce), first 16 |
//! ```
//! `expiry` is in milliseconds of the boot clock. A token is good for the
//! interface that asked for it and no other.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use hmac::{Hmac, Mac as _};
use model::InterfaceId;
use sha2::Sha256;

/// How long a token may be asked to live (EC2 user guide: one second to six hours).
pub const LIFETIME_S_MIN: u32 = 1;
pub const LIFETIME_S_MAX: u32 = 21_600;

const NONCE_AT: usize = 8;
const TAG_AT: usize = 24;
const LENGTH: usize = 40;

/// What seals; made once a boot, and known to this daemon alone.
#[derive(Clone)]
pub struct TokenKey([u8; 32]);

impl TokenKey {
    pub const LENGTH: usize = 32;

    pub const fn new(bytes: [u8; Self::LENGTH]) -> Self {
        Self(bytes)
    }

    /// A token for `interface`. The `nonce` only tells tokens apart.
    pub fn seal(
        &self,
        interface: InterfaceId,
        lifetime_s: u32,
        nonce: u128,
        now: Duration,
    ) -> String {
        let expiry = now + Duration::from_secs(lifetime_s.into());
        let mut token = [0; LENGTH];
        token[..NONCE_AT].copy_from_slice(&millis(expiry).to_be_bytes());
        token[NONCE_AT..TAG_AT].copy_from_slice(&nonce.to_be_bytes());
        let tag = self.mac(interface, &token[..TAG_AT]).finalize().into_bytes();
        token[TAG_AT..].copy_from_slice(&tag[..LENGTH - TAG_AT]);
        URL_SAFE.encode(token)
    }

    /// The seconds that a token still has, or `None` where it is not one of
    /// ours, of another interface, or expired.
    pub fn open(&self, interface: InterfaceId, text: &[u8], now: Duration) -> Option<u64> {
        let token: [u8; LENGTH] = URL_SAFE.decode(text).ok()?.try_into().ok()?;
        self.mac(interface, &token[..TAG_AT]).verify_truncated_left(&token[TAG_AT..]).ok()?;
        let (expiry, _) = token.split_first_chunk::<NONCE_AT>()?;
        let left_ms = u64::from_be_bytes(*expiry).checked_sub(millis(now)).filter(|&ms| ms > 0)?;
        // The boot clock began anew, and this token is from before.
        (left_ms <= u64::from(LIFETIME_S_MAX) * 1000).then_some(left_ms.div_ceil(1000))
    }

    fn mac(&self, interface: InterfaceId, sealed: &[u8]) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256>>::new_from_slice(&self.0)
            .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length"));
        mac.update(interface.to_string().as_bytes());
        mac.update(sealed);
        mac
    }
}

fn millis(t: Duration) -> u64 {
    u64::try_from(t.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn interface(n: u128) -> InterfaceId {
        InterfaceId::from_random(n)
    }

    #[test]
    fn a_token_is_good_until_it_expires_and_for_its_interface_only() {
        let key = TokenKey::new([7; 32]);
        let token = key.seal(interface(1), 60, 1, NOW);
        assert_eq!(token.len(), 56);
        let open = |i, at| key.open(interface(i), token.as_bytes(), at);
        assert_eq!(open(1, NOW), Some(60));
        assert_eq!(open(1, NOW + Duration::from_millis(59_999)), Some(1));
        assert_eq!(open(1, NOW + Duration::from_secs(60)), None);
        assert_eq!(open(2, NOW), None);
        assert_eq!(TokenKey::new([8; 32]).open(interface(1), token.as_bytes(), NOW), None);
    }

    #[test]
    fn a_token_from_before_a_reboot_is_not_good_for_longer() {
        let key = TokenKey::new([7; 32]);
        let late = Duration::from_secs(1_000_000);
        let token = key.seal(interface(1), 60, 1, late);
        assert_eq!(key.open(interface(1), token.as_bytes(), Duration::from_secs(5)), None);
    }

    #[test]
    fn no_change_of_a_single_bit_goes_unseen() {
        let key = TokenKey::new([7; 32]);
        let token = URL_SAFE.decode(key.seal(interface(1), 60, 99, NOW)).unwrap();
        for bit in 0..LENGTH * 8 {
            let mut forged = token.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            let forged = URL_SAFE.encode(forged);
            assert_eq!(key.open(interface(1), forged.as_bytes(), NOW), None, "bit {bit}");
        }
        assert_eq!(key.open(interface(1), b"", NOW), None);
        assert_eq!(key.open(interface(1), &[0xff; 56], NOW), None);
    }
}
