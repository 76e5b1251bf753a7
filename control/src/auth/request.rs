//! From the headers to the canonical request, and whether its signature holds.

use std::collections::BTreeMap;

use http::HeaderMap;
use subtle::ConstantTimeEq;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

use super::sign::{sha256_hex, unhex, verify_v4, verify_v4a};
use crate::api::ApiError;

/// How far a client's clock may be off, as EC2 has it.
const SKEW_MS_MAX: u64 = 15 * 60 * 1000;

const SERVICE: &str = "ec2";
const V4: &str = "AWS4-HMAC-SHA256";
const V4A: &str = "AWS4-ECDSA-P256-SHA256";

/// A request's part that was signed, beside its body.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub query: &'a str,
    pub headers: &'a HeaderMap,
}

/// A signature that held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub access_key: String,
    /// The same for every spelling of the same signed request, and no other:
    /// an ECDSA signature can be rewritten, what it signs cannot.
    pub digest: String,
    /// When it can no longer be accepted.
    pub ends_ms: u64,
}

struct Authorization<'a> {
    algorithm: &'a str,
    access_key: &'a str,
    date: &'a str,
    scope: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

/// What a key is checked with: its secret, where it is known, and its public key.
pub struct KeyMaterial {
    pub secret: Option<String>,
    pub public_key: String,
}

pub fn verify(
    head: Head<'_>,
    body: &[u8],
    region: &str,
    now_ms: u64,
    find: impl FnOnce(&str) -> Option<KeyMaterial>,
) -> Result<Signature, ApiError> {
    let header = head.headers.get(http::header::AUTHORIZATION).ok_or_else(|| {
        ApiError::unauthenticated(
            "MissingAuthenticationToken",
            "The request must contain a signature in its Authorization header.",
        )
    })?;
    let header = header.to_str().map_err(|_| incomplete("it is not ASCII"))?;
    let auth = read_authorization(header)?;
    let signed: Vec<&str> = auth.signed_headers.split(';').collect();
    let at = one_header(head.headers, "x-amz-date")?;
    check_signed(&auth, &signed, head.headers)?;
    check_scope(&auth, at, region)?;
    let at_ms = read_time(at)?;
    if at_ms.abs_diff(now_ms) > SKEW_MS_MAX {
        return Err(ApiError::unauthenticated(
            "RequestExpired",
            format!("Request has expired: it was signed at {at}, at most 15 minutes are allowed."),
        ));
    }
    if auth.algorithm == V4A {
        check_region_set(one_header(head.headers, "x-amz-region-set")?, region)?;
    }
    let payload = payload_hash(head.headers, body)?;
    let canonical = canonical_request(head, &signed, &payload)?;
    let digest = sha256_hex(canonical.as_bytes());
    let to_sign = format!("{}\n{at}\n{}\n{digest}", auth.algorithm, auth.scope);
    let key = find(auth.access_key).ok_or_else(|| {
        ApiError::unauthenticated(
            "AuthFailure",
            "AWS was not able to validate the provided access credentials",
        )
    })?;
    let holds = if auth.algorithm == V4A {
        verify_v4a(&key.public_key, &to_sign, auth.signature)
    } else {
        let secret = key.secret.as_deref().ok_or_else(|| {
            ApiError::unauthenticated(
                "AuthFailure",
                "This access key signs with SigV4A only (signature_version = v4a).",
            )
        })?;
        verify_v4(secret, auth.date, region, SERVICE, &to_sign, auth.signature)
    };
    if !holds {
        return Err(ApiError::unauthenticated(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method.",
        ));
    }
    Ok(Signature {
        access_key: auth.access_key.to_owned(),
        digest: sha256_hex(to_sign.as_bytes()),
        ends_ms: at_ms + SKEW_MS_MAX,
    })
}

fn incomplete(what: &str) -> ApiError {
    ApiError::unauthenticated(
        "IncompleteSignature",
        format!("The Authorization header cannot be read: {what}."),
    )
}

fn read_authorization(header: &str) -> Result<Authorization<'_>, ApiError> {
    let (algorithm, rest) = header.split_once(' ').ok_or_else(|| incomplete("it has no fields"))?;
    if algorithm != V4 && algorithm != V4A {
        return Err(incomplete("the algorithm is unknown"));
    }
    let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
    for field in rest.split(',') {
        let (name, value) =
            field.trim().split_once('=').ok_or_else(|| incomplete("a field is empty"))?;
        if fields.insert(name, value).is_some() {
            return Err(incomplete("a field stands twice"));
        }
    }
    let field = |name: &str| {
        fields
            .get(name)
            .copied()
            .filter(|v| !v.is_empty())
            .ok_or_else(|| incomplete(&format!("it lacks {name}")))
    };
    let (access_key, scope) = field("Credential")?
        .split_once('/')
        .ok_or_else(|| incomplete("Credential has no scope"))?;
    let date = scope.split('/').next().unwrap_or_default();
    Ok(Authorization {
        algorithm,
        access_key,
        date,
        scope,
        signed_headers: field("SignedHeaders")?,
        signature: field("Signature")?,
    })
}

/// A header that decides something must stand once: of two, another reader
/// might take the other.
fn one_header<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, ApiError> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(|v| v.to_str()), values.next()) {
        (Some(Ok(value)), None) => Ok(value),
        _ => Err(incomplete(&format!("the header {name} must stand once"))),
    }
}

fn check_signed(
    auth: &Authorization<'_>,
    signed: &[&str],
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    let mut required = vec!["host", "x-amz-date"];
    if auth.algorithm == V4A {
        required.push("x-amz-region-set");
    }
    // Whatever EC2 might read as an instruction must be under the signature.
    required.extend(headers.keys().map(|k| k.as_str()).filter(|k| k.starts_with("x-amz-")));
    if let Some(name) = required.iter().find(|name| !signed.contains(name)) {
        return Err(ApiError::unauthenticated(
            "SignatureDoesNotMatch",
            format!("The header {name} must be signed."),
        ));
    }
    if !signed.is_sorted() {
        return Err(incomplete("SignedHeaders must be sorted"));
    }
    Ok(())
}

fn check_scope(auth: &Authorization<'_>, at: &str, region: &str) -> Result<(), ApiError> {
    let expected = if auth.algorithm == V4A {
        format!("{}/{SERVICE}/aws4_request", auth.date)
    } else {
        format!("{}/{region}/{SERVICE}/aws4_request", auth.date)
    };
    if auth.scope != expected || !at.starts_with(auth.date) || auth.date.len() != 8 {
        return Err(ApiError::unauthenticated(
            "SignatureDoesNotMatch",
            format!("Credential should be scoped to {expected}, it is scoped to {}.", auth.scope),
        ));
    }
    Ok(())
}

/// The set is a list of regions, in which `*` stands for any part of a name.
fn check_region_set(set: &str, region: &str) -> Result<(), ApiError> {
    if set.split(',').map(str::trim).any(|p| crate::filter::glob_matches(p, region)) {
        return Ok(());
    }
    Err(ApiError::unauthenticated(
        "SignatureDoesNotMatch",
        format!("The request was signed for the regions {set}, this is {region}."),
    ))
}

fn read_time(at: &str) -> Result<u64, ApiError> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = PrimitiveDateTime::parse(at, format)
        .map_err(|_| incomplete("x-amz-date is no time of the form 20260102T030405Z"))?;
    let seconds = OffsetDateTime::unix_timestamp(time.assume_utc());
    u64::try_from(seconds).map(|s| s * 1000).map_err(|_| incomplete("x-amz-date is before 1970"))
}

/// The body's own digest. A header that says otherwise, or that the body is not
/// signed, is refused.
fn payload_hash(headers: &HeaderMap, body: &[u8]) -> Result<String, ApiError> {
    let hash = sha256_hex(body);
    if !headers.contains_key("x-amz-content-sha256") {
        return Ok(hash);
    }
    let said = one_header(headers, "x-amz-content-sha256")?;
    let same = unhex(said).zip(unhex(&hash)).is_some_and(|(a, b)| a.ct_eq(&b).into());
    if same {
        return Ok(hash);
    }
    Err(ApiError::unauthenticated(
        "SignatureDoesNotMatch",
        "The body is not the one that was signed; unsigned bodies are refused.",
    ))
}

fn canonical_request(head: Head<'_>, signed: &[&str], payload: &str) -> Result<String, ApiError> {
    let mut text = format!("{}\n{}\n{}\n", head.method, head.path, canonical_query(head.query));
    for name in signed {
        let values = head.headers.get_all(*name);
        let mut joined = Vec::new();
        for value in values {
            let value = value.to_str().map_err(|_| incomplete("a signed header is not ASCII"))?;
            joined.push(value.split_ascii_whitespace().collect::<Vec<_>>().join(" "));
        }
        if joined.is_empty() {
            return Err(incomplete(&format!("the signed header {name} is missing")));
        }
        text.push_str(&format!("{name}:{}\n", joined.join(",")));
    }
    text.push_str(&format!("\n{}\n{payload}", signed.join(";")));
    Ok(text)
}

/// Names and values decoded, encoded anew by RFC 3986, and sorted.
fn canonical_query(query: &str) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    let encode = |text: &str| {
        let text = text.replace('+', " ");
        let decoded = percent_decode_str(&text).decode_utf8_lossy().into_owned();
        utf8_percent_encode(&decoded, KEPT).to_string()
    };
    let mut pairs: Vec<(String, String)> = query
        .split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (encode(name), encode(value))
        })
        .collect();
    pairs.sort();
    pairs.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use p256::ecdsa::signature::hazmat::PrehashSigner;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::auth::sign::{derive_public_key, derive_signing_key, hex, sign_v4};

    const NOW_MS: u64 = 1_788_004_800_000; // 2026-08-29T12:00:00Z
    const AT: &str = "20260829T120000Z";
    const BODY: &[u8] = b"Action=DescribeVpcs";

    fn headers(pairs: &[(&'static str, String)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect()
    }

    fn head(headers: &HeaderMap) -> Head<'_> {
        Head { method: "POST", path: "/", query: "b=%7e&a=x+y", headers }
    }

    fn signed_v4(secret: &str, at: &str, signed: &str) -> HeaderMap {
        let mut headers =
            headers(&[("host", "127.0.0.1:8773".to_owned()), ("x-amz-date", at.to_owned())]);
        let names: Vec<&str> = signed.split(';').collect();
        let canonical = canonical_request(head(&headers), &names, &sha256_hex(BODY)).unwrap();
        let date = &at[..8];
        let scope = format!("{date}/local-1/ec2/aws4_request");
        let to_sign = format!("{V4}\n{at}\n{scope}\n{}", sha256_hex(canonical.as_bytes()));
        let signature = sign_v4(secret, date, "local-1", "ec2", &to_sign);
        let value =
            format!("{V4} Credential=AKID/{scope}, SignedHeaders={signed}, Signature={signature}");
        headers.insert("authorization", value.parse().unwrap());
        headers
    }

    fn check(headers: &HeaderMap, body: &[u8]) -> Result<Signature, ApiError> {
        verify(head(headers), body, "local-1", NOW_MS, |id| {
            (id == "AKID").then(|| KeyMaterial {
                secret: Some("secret".to_owned()),
                public_key: derive_public_key("AKID", "secret").unwrap(),
            })
        })
    }

    fn code(headers: &HeaderMap, body: &[u8]) -> String {
        check(headers, body).unwrap_err().code.into_owned()
    }

    #[test]
    fn the_example_of_the_aws_documentation_is_signed_as_it_says() {
        // "Signature Version 4 signing process", the example of IAM ListUsers.
        let to_sign = "AWS4-HMAC-SHA256\n20150830T123600Z\n20150830/us-east-1/iam/aws4_request\nf536975d06c0309214f805bb90ccff089219ecd68b2577efef23edd43b7e1a59";
        let secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
        assert_eq!(
            sign_v4(secret, "20150830", "us-east-1", "iam", to_sign),
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
        );
    }

    #[test]
    fn a_request_passes_as_it_was_signed_and_in_no_other_form() {
        let good = signed_v4("secret", AT, "host;x-amz-date");
        assert_eq!(check(&good, BODY).unwrap().access_key, "AKID");
        assert_eq!(code(&good, b"Action=RunInstances"), "SignatureDoesNotMatch");
        let mut other = good.clone();
        other.insert("host", "elsewhere".parse().unwrap());
        assert_eq!(code(&other, BODY), "SignatureDoesNotMatch");
        let mut unsigned = good.clone();
        unsigned.insert("x-amz-content-sha256", "UNSIGNED-PAYLOAD".parse().unwrap());
        assert_eq!(code(&unsigned, BODY), "SignatureDoesNotMatch");
        assert_eq!(code(&signed_v4("wrong", AT, "host;x-amz-date"), BODY), "SignatureDoesNotMatch");
        assert_eq!(code(&signed_v4("secret", AT, "x-amz-date"), BODY), "SignatureDoesNotMatch");
        assert_eq!(code(&HeaderMap::new(), BODY), "MissingAuthenticationToken");
    }

    #[test]
    fn a_clock_that_is_off_by_more_than_fifteen_minutes_is_refused() {
        for (at, expected) in [
            ("20260829T114500Z", None),
            ("20260829T114459Z", Some("RequestExpired")),
            ("20260829T121500Z", None),
            ("20260829T121501Z", Some("RequestExpired")),
        ] {
            let refused = check(&signed_v4("secret", at, "host;x-amz-date"), BODY).err();
            assert_eq!(refused.map(|e| e.code.into_owned()).as_deref(), expected, "{at}");
        }
    }

    #[test]
    fn an_authorization_that_cannot_be_read_is_incomplete() {
        for text in [
            "Basic YQ==",
            "AWS4-HMAC-SHA256",
            "AWS4-HMAC-SHA256 Credential=a",
            "AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host, SignedHeaders=host, Signature=00",
        ] {
            let headers =
                headers(&[("authorization", text.to_owned()), ("x-amz-date", AT.to_owned())]);
            assert_eq!(code(&headers, BODY), "IncompleteSignature", "{text}");
        }
    }

    #[test]
    fn an_asymmetric_signature_holds_for_its_regions_only() {
        let signed = |set: &str| {
            let mut headers = headers(&[
                ("host", "127.0.0.1:8773".to_owned()),
                ("x-amz-date", AT.to_owned()),
                ("x-amz-region-set", set.to_owned()),
            ]);
            let names = ["host", "x-amz-date", "x-amz-region-set"];
            let canonical = canonical_request(head(&headers), &names, &sha256_hex(BODY)).unwrap();
            let scope = "20260829/ec2/aws4_request";
            let to_sign = format!("{V4A}\n{AT}\n{scope}\n{}", sha256_hex(canonical.as_bytes()));
            let key = derive_signing_key("AKID", "secret").unwrap();
            let signature: p256::ecdsa::Signature =
                key.sign_prehash(&Sha256::digest(to_sign.as_bytes())).unwrap();
            let value = format!(
                "{V4A} Credential=AKID/{scope}, SignedHeaders={}, Signature={}",
                names.join(";"),
                hex(signature.to_der().as_bytes())
            );
            headers.insert("authorization", value.parse().unwrap());
            headers
        };
        assert!(check(&signed("*"), BODY).is_ok());
        assert!(check(&signed("eu-*, local-1"), BODY).is_ok());
        assert_eq!(code(&signed("eu-west-1"), BODY), "SignatureDoesNotMatch");
        assert_eq!(code(&signed("*"), b"Action=x"), "SignatureDoesNotMatch");
    }
}
