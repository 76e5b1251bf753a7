//! The arithmetic of both signatures.

use hmac::{Hmac, Mac};
use p256::ecdsa::signature::hazmat::PrehashVerifier;
use p256::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};

type HmacSha256 = Hmac<Sha256>;

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// HMAC takes a key of any length, so making one cannot fail.
fn hmac(key: &[u8], message: &[u8]) -> HmacSha256 {
    let mut mac = <HmacSha256 as Mac>::new_from_slice(key)
        .unwrap_or_else(|e| panic!("HMAC takes a key of any length: {e}"));
    mac.update(message);
    mac
}

fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac(key, message).finalize().into_bytes().to_vec()
}

fn v4_key(secret: &str, date: &str, region: &str, service: &str) -> Vec<u8> {
    let key = mac(format!("AWS4{secret}").as_bytes(), date.as_bytes());
    let key = mac(&key, region.as_bytes());
    let key = mac(&key, service.as_bytes());
    mac(&key, b"aws4_request")
}

/// The signature in hexadecimal.
pub fn sign_v4(secret: &str, date: &str, region: &str, service: &str, to_sign: &str) -> String {
    hex(&mac(&v4_key(secret, date, region, service), to_sign.as_bytes()))
}

/// Compares in constant time.
pub fn verify_v4(
    secret: &str,
    date: &str,
    region: &str,
    service: &str,
    to_sign: &str,
    signature: &str,
) -> bool {
    let Some(signature) = unhex(signature) else { return false };
    hmac(&v4_key(secret, date, region, service), to_sign.as_bytes())
        .verify_slice(&signature)
        .is_ok()
}

/// The key that SigV4A derives from an access key's secret (NIST SP 800-108,
/// counter mode, HMAC-SHA256): candidates are tried until one is at most n - 2,
/// and one is added.
pub fn derive_signing_key(id: &str, secret: &str) -> Option<SigningKey> {
    /// n - 2 of P-256 (FIPS 186-4, D.1.2.3).
    const LIMIT: [u8; 32] = [
        0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63,
        0x25, 0x4f,
    ];
    let input = format!("AWS4A{secret}");
    for counter in 1..=254u8 {
        let mut message = Vec::new();
        message.extend_from_slice(&1u32.to_be_bytes());
        message.extend_from_slice(b"AWS4-ECDSA-P256-SHA256");
        message.push(0);
        message.extend_from_slice(id.as_bytes());
        message.push(counter);
        message.extend_from_slice(&256u32.to_be_bytes());
        let mut candidate = mac(input.as_bytes(), &message);
        if candidate.as_slice() > LIMIT.as_slice() {
            continue;
        }
        for byte in candidate.iter_mut().rev() {
            let (sum, carry) = byte.overflowing_add(1);
            *byte = sum;
            if !carry {
                break;
            }
        }
        return SigningKey::from_slice(&candidate).ok();
    }
    None
}

/// SEC1, uncompressed, hexadecimal.
pub fn derive_public_key(id: &str, secret: &str) -> Option<String> {
    let key = derive_signing_key(id, secret)?;
    Some(hex(key.verifying_key().to_encoded_point(false).as_bytes()))
}

pub fn verify_v4a(public_key: &str, to_sign: &str, signature: &str) -> bool {
    let verified = || -> Option<bool> {
        let key = VerifyingKey::from_sec1_bytes(&unhex(public_key)?).ok()?;
        let signature = DerSignature::try_from(unhex(signature)?.as_slice()).ok()?;
        let signature = p256::ecdsa::Signature::try_from(signature).ok()?;
        Some(key.verify_prehash(&Sha256::digest(to_sign.as_bytes()), &signature).is_ok())
    };
    verified().unwrap_or(false)
}

pub fn hmac_hex(key: &[u8], message: &[u8]) -> String {
    hex(&mac(key, message))
}
