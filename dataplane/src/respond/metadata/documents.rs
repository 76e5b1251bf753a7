//! What a path below `/latest/` means: the documents as the dataplane was given
//! them, and the folders that follow from their names.
//!
//! ```text
//! "meta-data/instance-id"               = "i-…"      meta-data/ lists instance-id
//! "meta-data/placement/region"          = "…"        meta-data/ lists placement/
//! "meta-data/public-keys/0"             = "my-key"   public-keys/ lists 0=my-key
//! "meta-data/public-keys/0/openssh-key" = "ssh-…"    public-keys/0/ lists openssh-key
//! "user-data"                           = "base64:…" served as the bytes it stands for
//! ```
//! A path that is a document *and* a folder is a labelled folder: its document
//! is the label in the parent's listing and is not served itself.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A value that begins so is base64, for bytes that JSON cannot carry.
const BINARY_PREFIX: &str = "base64:";

/// The dated versions that EC2 lists; all serve the same documents here.
const VERSIONS: [&str; 26] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "latest",
];

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("metadata document `{path}`: read its value: {cause}")]
pub struct MalformedDocument {
    pub path: String,
    pub cause: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Documents(BTreeMap<String, Vec<u8>>);

impl Documents {
    /// Parses the map of `rpc::dataplane::Interface::metadata`.
    pub fn parse(map: &BTreeMap<String, String>) -> Result<Self, MalformedDocument> {
        map.iter()
            .map(|(path, value)| {
                let malformed = |cause: String| MalformedDocument { path: path.clone(), cause };
                if path.is_empty() || path.split('/').any(str::is_empty) {
                    return Err(malformed("its path has an empty segment".into()));
                }
                let bytes = match value.strip_prefix(BINARY_PREFIX) {
                    Some(encoded) => STANDARD
                        .decode(encoded.trim_ascii())
                        .map_err(|e| malformed(format!("after `{BINARY_PREFIX}`: {e}")))?,
                    None => value.clone().into_bytes(),
                };
                Ok((path.clone(), bytes))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The body for an absolute path such as `/latest/meta-data/`, or `None`
    /// where nothing has that name.
    pub fn find(&self, path: &str) -> Option<Vec<u8>> {
        let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
        let Some((version, rest)) = segments.split_first() else {
            return Some(VERSIONS.join("\n").into_bytes());
        };
        if !VERSIONS.contains(version) {
            return None;
        }
        let name = rest.join("/");
        if let Some(listing) = self.list(&name) {
            return Some(listing.into_bytes());
        }
        // As EC2 does, whether or not a slash ends the path: botocore asks so for the zone.
        self.0.get(&name).cloned()
    }

    /// One name a line; folders end in `/`, except at the top, as EC2 has it.
    fn list(&self, folder: &str) -> Option<String> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let below =
            self.0.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix));
        // Child → whether something lies below it.
        let mut children: BTreeMap<&str, bool> = BTreeMap::new();
        for (path, _) in below {
            match path[prefix.len()..].split_once('/') {
                Some((child, _)) => *children.entry(child).or_default() = true,
                None => _ = children.entry(&path[prefix.len()..]).or_default(),
            }
        }
        if children.is_empty() {
            return None;
        }
        let lines: Vec<String> = children
            .iter()
            .map(|(child, is_folder)| match self.0.get(&format!("{prefix}{child}")) {
                Some(label) if *is_folder => {
                    format!("{child}={}", String::from_utf8_lossy(label))
                }
                None if *is_folder && !folder.is_empty() => format!("{child}/"),
                _ => (*child).to_owned(),
            })
            .collect();
        Some(lines.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Documents {
        let map = [
            ("meta-data/instance-id", "i-1"),
            ("meta-data/placement/region", "region-1"),
            ("meta-data/placement/availability-zone", "region-1a"),
            ("meta-data/placement-note", "n"),
            ("meta-data/public-keys/0", "my-key"),
            ("meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA my-key"),
            ("dynamic/instance-identity/document", "{}"),
            ("user-data", "base64:/wAB"),
        ];
        Documents::parse(&map.map(|(k, v)| (k.to_owned(), v.to_owned())).into()).unwrap()
    }

    fn text(path: &str) -> Option<String> {
        documents().find(path).map(|b| String::from_utf8(b).unwrap())
    }

    #[test]
    fn folders_are_listed_as_ec2_lists_them() {
        assert!(text("/").unwrap().ends_with("2021-03-23\nlatest"));
        assert_eq!(text("/latest/").unwrap(), "dynamic\nmeta-data\nuser-data");
        assert_eq!(text("/latest").unwrap(), "dynamic\nmeta-data\nuser-data");
        assert_eq!(
            text("/2021-03-23/meta-data/").unwrap(),
            "instance-id\nplacement/\nplacement-note\npublic-keys/"
        );
        assert_eq!(text("/latest/meta-data/placement").unwrap(), "availability-zone\nregion");
        assert_eq!(text("/latest/meta-data/public-keys/").unwrap(), "0=my-key");
        assert_eq!(text("/latest/meta-data/public-keys/0/").unwrap(), "openssh-key");
        assert_eq!(text("/latest/meta-data/public-keys/0").unwrap(), "openssh-key");
    }

    #[test]
    fn documents_are_served_as_given_and_binary_as_bytes() {
        assert_eq!(text("/latest/meta-data/instance-id").unwrap(), "i-1");
        assert_eq!(text("/2009-04-04/meta-data/placement/region").unwrap(), "region-1");
        assert_eq!(text("/latest/meta-data/instance-id/").unwrap(), "i-1");
        assert_eq!(documents().find("/latest/user-data").unwrap(), [0xff, 0, 1]);
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for path in [
            "/2099-01-01/meta-data/instance-id",
            "/latest/meta-data/instance",
            "/latest/meta-data/instance-id/x",
            "/latest/../latest/meta-data/instance-id",
            "/latest/meta",
        ] {
            assert_eq!(text(path), None, "{path}");
        }
    }

    #[test]
    fn a_value_that_is_not_the_base64_it_says_is_refused_by_name() {
        let map = BTreeMap::from([("user-data".to_owned(), "base64:*".to_owned())]);
        assert!(Documents::parse(&map).unwrap_err().to_string().contains("user-data"));
        let map = BTreeMap::from([("meta-data//x".to_owned(), String::new())]);
        assert!(Documents::parse(&map).is_err());
    }
}
