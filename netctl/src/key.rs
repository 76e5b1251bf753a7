//! `netctl key`: key pairs, of which guests get the public half.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Subcommand, ValueEnum};

use crate::api::{Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing};
use crate::output::{self, Format};

#[derive(Debug, Subcommand)]
pub enum Key {
    /// Create a key pair; its private key is told once and never kept
    #[command(
        after_help = "EXAMPLES:\n  netctl key create me --file me.pem\n  netctl key create me > me.pem && chmod 600 me.pem"
    )]
    Create {
        /// How it is called
        name: String,
        /// Write the private key there, for the owner only [default: stdout]
        #[arg(long, short, value_name = "FILE")]
        file: Option<PathBuf>,
        /// The algorithm
        #[arg(long = "type", value_enum, default_value_t = Kind::Ed25519)]
        kind: Kind,
    },
    /// Take a public key that you have already
    #[command(after_help = "EXAMPLES:\n  netctl key import me ~/.ssh/id_ed25519.pub")]
    Import {
        /// How it is called
        name: String,
        /// The file with the public key, in OpenSSH's format
        file: PathBuf,
    },
    /// List key pairs
    #[command(alias = "ls", after_help = "EXAMPLES:\n  netctl key list")]
    List,
    /// Forget a key pair; guests that have it keep it
    #[command(alias = "rm", after_help = "EXAMPLES:\n  netctl key delete me")]
    Delete {
        /// How it is called
        name: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Ed25519,
    Rsa,
}

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("KEY", "id", "keyPairId"),
        Column::new("NAME", "name", "keyName"),
        Column::new("TYPE", "type", "keyType"),
        Column::new("FINGERPRINT", "fingerprint", "keyFingerprint"),
    ],
};

pub fn run(session: &Session, noun: &Key) -> Outcome {
    match noun {
        Key::Create { name, file, kind } => create(session, name, file.as_deref(), *kind),
        Key::Import { name, file } => {
            let bytes = std::fs::read(file).map_err(|e| {
                Failure::unfit(format!("key {name}: import {}: {e}", file.display()))
            })?;
            let parameters = Parameters::new()
                .with("KeyName", name)
                .with("PublicKeyMaterial", STANDARD.encode(bytes));
            let answer =
                session.call(&format!("key {name}: import"), "ImportKeyPair", &parameters)?;
            LISTING.show_one(session.format, &answer)
        }
        Key::List => {
            let keys = session.describe(
                "keys: list",
                "DescribeKeyPairs",
                &Parameters::new(),
                "keySet/item",
            )?;
            LISTING.show_all(session.format, &keys)
        }
        Key::Delete { name } => {
            let parameters = Parameters::new().with("KeyName", name);
            session.call(&format!("key {name}: delete"), "DeleteKeyPair", &parameters)?;
            output::note(&format!("deleted {name}"));
            Ok(())
        }
    }
}

fn create(session: &Session, name: &str, file: Option<&Path>, kind: Kind) -> Outcome {
    // Before the call: a private key that cannot be written is lost for ever.
    let mut target = file
        .map(|path| {
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
                Failure::unfit(format!("key {name}: write to {}: {e}", path.display()))
            })
        })
        .transpose()?;
    let parameters = Parameters::new().with("KeyName", name).with(
        "KeyType",
        match kind {
            Kind::Ed25519 => "ed25519",
            Kind::Rsa => "rsa",
        },
    );
    let answer = match session.call(&format!("key {name}: create"), "CreateKeyPair", &parameters) {
        Ok(answer) => answer,
        Err(failure) => {
            if let Some(path) = file {
                // It is empty, and ours.
                let _ = std::fs::remove_file(path);
            }
            return Err(failure);
        }
    };
    let material = format!("{}\n", answer.text_at("keyMaterial"));
    if let (Some(target), Some(path)) = (&mut target, file) {
        target.write_all(material.as_bytes()).and_then(|()| target.sync_all()).map_err(|e| {
            Failure::failed(format!("key {name}: write to {}: {e}", path.display()))
                .hint(format!("netctl key delete {name}, then create it anew"))
        })?;
        output::note(&format!("the private key is in {}", path.display()));
        return LISTING.show_one(session.format, &answer);
    }
    if session.format == Format::Json {
        let mut object = LISTING.object(&answer);
        object["private_key"] = material.into();
        return output::json(&object);
    }
    output::note(&format!("created {name}; this is its private key, keep it"));
    output::line(material.trim_end());
    Ok(())
}
