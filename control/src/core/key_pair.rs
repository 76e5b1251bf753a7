//! Key pairs by which users log in. The private half is made, told once, and
//! never kept.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use md5::{Digest, Md5};
use model::KeyPairId;
use rand_chacha::ChaCha20Rng;
use rsa::pkcs1::EncodeRsaPrivateKey;
use rsa::pkcs8::EncodePublicKey;
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha1::Sha1;
use sha2::Sha256;
use ssh_key::public::KeyData;
use ssh_key::{LineEnding, PrivateKey, PublicKey};

use super::lookup::{find_all, tag_set, with_tags};
use super::{Answer, Context, Draft, tag};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::filter::Filters;
use crate::record::{KeyPair, Name};
use crate::state::State;

const RSA_BITS: usize = 2048;

/// A key's text, imported: no public key that is used is longer.
const PUBLIC_KEY_BYTES_MAX: usize = 8 * 1024;

/// A new key pair.
pub struct KeyMaterial {
    pub kind: &'static str,
    pub private_pem: String,
    pub public_key: String,
    pub fingerprint: String,
}

#[derive(Debug, thiserror::Error)]
#[error("key pair: cannot be made: {0}")]
pub struct KeyGenerationError(String);

fn failed(error: impl std::fmt::Display) -> KeyGenerationError {
    KeyGenerationError(error.to_string())
}

/// Slow for RSA (tenths of a second): not to be called on a server's thread.
pub fn generate_key(kind: &str, rng: &mut ChaCha20Rng) -> Result<KeyMaterial, KeyGenerationError> {
    if kind == "ed25519" {
        let key = PrivateKey::random(rng, ssh_key::Algorithm::Ed25519).map_err(failed)?;
        let blob = key.public_key().to_bytes().map_err(failed)?;
        return Ok(KeyMaterial {
            kind: "ed25519",
            private_pem: key.to_openssh(LineEnding::LF).map_err(failed)?.to_string(),
            public_key: key.public_key().to_openssh().map_err(failed)?,
            fingerprint: ed25519_fingerprint(&blob),
        });
    }
    let key = RsaPrivateKey::new(rng, RSA_BITS).map_err(failed)?;
    let private = rsa::pkcs8::EncodePrivateKey::to_pkcs8_der(&key).map_err(failed)?;
    let public = RsaPublicKey::from(&key);
    let public = ssh_key::public::RsaPublicKey::try_from(&public).map_err(failed)?;
    Ok(KeyMaterial {
        kind: "rsa",
        private_pem: key.to_pkcs1_pem(rsa::pkcs8::LineEnding::LF).map_err(failed)?.to_string(),
        public_key: PublicKey::from(KeyData::Rsa(public)).to_openssh().map_err(failed)?,
        // As EC2 for keys that it made: SHA-1 of the private key's PKCS#8 form.
        fingerprint: colons(&Sha1::digest(private.as_bytes())),
    })
}

fn colons(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}

/// SHA-256 of the public key's blob, in base64, as EC2 shows it.
fn ed25519_fingerprint(blob: &[u8]) -> String {
    STANDARD.encode(Sha256::digest(blob))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let lawful = name.len() <= 255 && name.is_ascii() && !name.contains(|c: char| c.is_control());
    if lawful && name.trim() == name {
        Ok(())
    } else {
        Err(ApiError::invalid(
            "Value for parameter KeyName is invalid. A name has up to 255 ASCII characters, without leading and trailing spaces.",
        ))
    }
}

fn check_free(state: &State, name: &str) -> Result<(), ApiError> {
    if state.names.get(row_name(name)).is_some() {
        return Err(ApiError::new(
            "InvalidKeyPair.Duplicate",
            format!("The keypair '{name}' already exists."),
        ));
    }
    Ok(())
}

fn row_name(name: &str) -> String {
    format!("key-pair/{name}")
}

pub fn by_name<'a>(state: &'a State, name: &str) -> Result<&'a KeyPair, ApiError> {
    let id = state.names.get(row_name(name)).map(|n| &n.owner);
    id.and_then(|id| state.key_pairs.get(id)).ok_or_else(|| {
        ApiError::new("InvalidKeyPair.NotFound", format!("The key pair '{name}' does not exist"))
    })
}

fn put(context: &Context<'_>, draft: &mut Draft, key: &KeyPair) {
    let row = Name { name: row_name(&key.name), owner: key.id.to_string() };
    draft.plan.put(context.state, &row);
    draft.plan.put(context.state, key);
}

pub fn create_key_pair(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let name = params.need("KeyName")?;
    check_name(name)?;
    if params.text("KeyFormat").is_some_and(|f| f != "pem") {
        return Err(ApiError::new("Unsupported", "Keys are made in the format pem only."));
    }
    let tags = tag::specified_one(params, "key-pair")?;
    check_free(context.state, name)?;
    let material = draft
        .key_material
        .take()
        .ok_or_else(|| ApiError::internal("no key was made beforehand"))?;
    let key = KeyPair {
        id: KeyPairId::from_random(draft.bits()),
        name: name.to_owned(),
        kind: material.kind.to_owned(),
        fingerprint: material.fingerprint,
        public_key: format!("{} {name}", material.public_key),
        created_ms: context.now_ms,
        tags,
    };
    put(context, draft, &key);
    Ok(Box::new(move |_| {
        with_tags(
            Struct::new()
                .with("keyName", &key.name)
                .with("keyPairId", key.id)
                .with("keyFingerprint", &key.fingerprint)
                .with("keyMaterial", material.private_pem),
            &key.tags,
        )
    }))
}

pub fn import_key_pair(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let name = params.need("KeyName")?;
    check_name(name)?;
    let (public, kind, fingerprint) = read_public(params.need("PublicKeyMaterial")?)?;
    let tags = tag::specified_one(params, "key-pair")?;
    check_free(context.state, name)?;
    let key = KeyPair {
        id: KeyPairId::from_random(draft.bits()),
        name: name.to_owned(),
        kind: kind.to_owned(),
        fingerprint,
        public_key: public,
        created_ms: context.now_ms,
        tags,
    };
    put(context, draft, &key);
    Ok(Box::new(move |_| {
        with_tags(
            Struct::new()
                .with("keyName", &key.name)
                .with("keyPairId", key.id)
                .with("keyFingerprint", &key.fingerprint),
            &key.tags,
        )
    }))
}

/// The key as one line of `authorized_keys`, its kind and its fingerprint.
fn read_public(material: &str) -> Result<(String, &'static str, String), ApiError> {
    let wrong =
        || ApiError::new("InvalidKey.Format", "Key is not in valid OpenSSH public key format");
    let material: String = material.split_ascii_whitespace().collect();
    let bytes = STANDARD
        .decode(&material)
        .or_else(|_| STANDARD_NO_PAD.decode(&material))
        .map_err(|_| wrong())?;
    if bytes.len() > PUBLIC_KEY_BYTES_MAX {
        return Err(wrong());
    }
    let text = String::from_utf8(bytes).map_err(|_| wrong())?;
    let text = text.trim();
    // More than one line would be more than one key for the guest.
    if text.contains(|c: char| c.is_control()) {
        return Err(wrong());
    }
    let key = PublicKey::from_openssh(text).map_err(|_| wrong())?;
    match key.key_data() {
        KeyData::Rsa(public) => {
            let public = RsaPublicKey::try_from(public).map_err(|_| wrong())?;
            let der = public.to_public_key_der().map_err(|_| wrong())?;
            Ok((text.to_owned(), "rsa", colons(&Md5::digest(der.as_bytes()))))
        }
        KeyData::Ed25519(_) => {
            let blob = key.to_bytes().map_err(|_| wrong())?;
            Ok((text.to_owned(), "ed25519", ed25519_fingerprint(&blob)))
        }
        _ => Err(ApiError::new(
            "InvalidKeyPair.Format",
            "Only keys of the types RSA and ED25519 are supported",
        )),
    }
}

pub fn describe_key_pairs(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let state = context.state;
    let filters =
        Filters::read(params)?.known(&["key-name", "key-pair-id", "fingerprint", "tag-key"])?;
    let public = params.flag("IncludePublicKey") == Some(true);
    let ids = params.texts("KeyPairId");
    let names = params.texts("KeyName");
    let mut keys: Vec<&KeyPair> = find_all(state, &ids)?;
    for name in &names {
        keys.push(by_name(state, name)?);
    }
    if ids.is_empty() && names.is_empty() {
        keys = state.key_pairs.iter().collect();
    }
    keys.sort_by(|a, b| a.name.cmp(&b.name));
    let nodes = keys
        .into_iter()
        .filter(|key| {
            filters.admit(&key.tags, |name| {
                vec![Cow::Owned(match name {
                    "key-name" => key.name.clone(),
                    "key-pair-id" => key.id.to_string(),
                    "fingerprint" => key.fingerprint.clone(),
                    _ => return Vec::new(),
                })]
            })
        })
        .map(|key| {
            Struct::new()
                .with("keyName", &key.name)
                .with("keyPairId", key.id)
                .with("keyType", &key.kind)
                .with("keyFingerprint", &key.fingerprint)
                .with("createTime", timestamp(key.created_ms))
                .with_some("publicKey", public.then_some(&key.public_key))
                .list("tagSet", tag_set(&key.tags))
        });
    Ok(Struct::new().list("keySet", nodes))
}

/// A key pair that is not there is deleted already, as with EC2.
pub fn delete_key_pair(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let found = match (params.text("KeyPairId"), params.text("KeyName")) {
        (None, None) => return Err(ApiError::missing("KeyName")),
        (Some(id), _) => {
            let id = super::lookup::parse::<KeyPair>(id)?;
            state.key_pairs.get(id)
        }
        (None, Some(name)) => by_name(state, name).ok(),
    };
    let id = found.map(|k| k.id.to_string());
    if let Some(key) = found {
        draft.plan.delete::<KeyPair>(state, key.id);
        draft.plan.delete::<Name>(state, row_name(&key.name));
    }
    Ok(Box::new(move |_| Struct::new().with("return", true).with_some("keyPairId", id)))
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    #[test]
    fn an_ed25519_key_that_was_made_has_the_fingerprint_of_its_import() {
        let made = generate_key("ed25519", &mut ChaCha20Rng::seed_from_u64(1)).unwrap();
        assert!(made.private_pem.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----"));
        let (_, kind, fingerprint) = read_public(&STANDARD.encode(&made.public_key)).unwrap();
        assert_eq!((kind, fingerprint), ("ed25519", made.fingerprint));
    }

    #[test]
    fn what_is_not_one_public_key_is_refused() {
        let made = generate_key("ed25519", &mut ChaCha20Rng::seed_from_u64(1)).unwrap();
        let two = format!("{0}\n{0}", made.public_key);
        for text in ["", "ssh-rsa", "ssh-rsa AAAA", two.as_str()] {
            assert!(read_public(&STANDARD.encode(text)).is_err(), "{text}");
        }
    }
}
