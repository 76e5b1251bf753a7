//! Whom a client's certificate names.
//!
//! The DNS names among its subject alternative names; in a certificate that has
//! none, as QEMU's and GnuTLS's documents make them, the subject's common names.
//! Names are compared as a whole and without case; a wildcard is only a letter.

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// `id-at-commonName` (2.5.4.3) with its tag and length.
const COMMON_NAME: [u8; 5] = [0x06, 0x03, 0x55, 0x04, 0x03];

const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(Vec<String>);

impl Names {
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else {
            return Self::default();
        };
        let names: Vec<String> =
            certificate.valid_dns_names().map(str::to_ascii_lowercase).collect();
        if names.is_empty() { Self(common_names(certificate.subject())) } else { Self(names) }
    }

    pub fn any_of(&self, allowed: &[String]) -> bool {
        allowed.iter().any(|name| self.0.iter().any(|own| own.eq_ignore_ascii_case(name)))
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { f.write_str("(no name)") } else { f.write_str(&self.0.join(", ")) }
    }
}

/// The subject is a sequence of sets of pairs, each a type and a string: the
/// pairs whose type is the common name are found by walking it.
fn common_names(subject: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = subject;
    while let Some((_, set, after)) = element(rest) {
        rest = after;
        let mut pairs = set;
        while let Some((_, pair, after)) = element(pairs) {
            pairs = after;
            let Some(value) = pair.strip_prefix(&COMMON_NAME) else { continue };
            if let Some((UTF8_STRING | PRINTABLE_STRING, text, _)) = element(value)
                && let Ok(text) = std::str::from_utf8(text)
            {
                found.push(text.to_ascii_lowercase());
            }
        }
    }
    found
}

/// Tag, content and what follows, of the first element; names are shorter than 64 KiB.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        ..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), &rest[2..]),
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(oid_end: u8, tag: u8, text: &str) -> Vec<u8> {
        let value = [&[tag, text.len() as u8], text.as_bytes()].concat();
        let pair = [&[0x06, 0x03, 0x55, 0x04, oid_end], &value[..]].concat();
        let pair = [&[0x30, pair.len() as u8], &pair[..]].concat();
        [&[0x31, pair.len() as u8], &pair[..]].concat()
    }

    #[test]
    fn a_subject_gives_its_common_names_only() {
        let subject =
            [set(10, UTF8_STRING, "Example Ltd"), set(3, PRINTABLE_STRING, "Host-A")].concat();
        assert_eq!(common_names(&subject), ["host-a"]);
        assert!(Names(common_names(&subject)).any_of(&["HOST-a".to_owned()]));
        assert!(!Names(common_names(&subject)).any_of(&["host-b".to_owned()]));
    }

    #[test]
    fn any_bytes_are_walked_without_harm() {
        let whole = set(3, UTF8_STRING, "name");
        for cut in 0..whole.len() {
            let _ = common_names(&whole[..cut]);
            for flip in 0..=255 {
                let mut other = whole.clone();
                other[cut] = flip;
                let _ = common_names(&other);
            }
        }
    }
}
