//! The form of a request: `Filter.1.Value.2=x` as a tree.
//!
//! Called by the front for the query string of a GET and the body of a POST.
//! Pure; hostile input ends here in an error, never in much memory: the number
//! of parameters, the depth and the length are bounded.

use std::collections::BTreeMap;

use crate::api::ApiError;

/// Parameters in one request. RunInstances with all its lists full stays below.
const PARAMETERS_MAX: usize = 4000;

/// The deepest path of the supported actions has seven parts.
const DEPTH_MAX: usize = 12;

const NAME_BYTES_MAX: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tree {
    Leaf(String),
    Branch(BTreeMap<String, Tree>),
}

/// Reads `application/x-www-form-urlencoded` text.
pub fn parse_form(text: &[u8]) -> Result<Vec<(String, String)>, ApiError> {
    let mut pairs = Vec::new();
    for part in text.split(|b| *b == b'&').filter(|p| !p.is_empty()) {
        if pairs.len() == PARAMETERS_MAX {
            return Err(malformed(format!("more than {PARAMETERS_MAX} parameters")));
        }
        let at = part.iter().position(|b| *b == b'=').unwrap_or(part.len());
        let value = part.get(at + 1..).unwrap_or_default();
        pairs.push((decode(&part[..at])?, decode(value)?));
    }
    Ok(pairs)
}

fn decode(text: &[u8]) -> Result<String, ApiError> {
    let spaced: Vec<u8> = text.iter().map(|b| if *b == b'+' { b' ' } else { *b }).collect();
    percent_encoding::percent_decode(&spaced)
        .decode_utf8()
        .map(|t| t.into_owned())
        .map_err(|_| malformed("a parameter is not UTF-8".to_owned()))
}

fn malformed(what: String) -> ApiError {
    ApiError::new("MalformedQueryString", format!("The query string is malformed: {what}."))
}

/// Puts the pairs into a tree by the dots of their names.
pub fn grow(pairs: Vec<(String, String)>) -> Result<BTreeMap<String, Tree>, ApiError> {
    let mut root = BTreeMap::new();
    for (name, value) in pairs {
        if name.len() > NAME_BYTES_MAX || name.split('.').count() > DEPTH_MAX {
            return Err(malformed("a parameter's name is too long".to_owned()));
        }
        insert(&mut root, &name, &name, value)?;
    }
    Ok(root)
}

fn insert(
    at: &mut BTreeMap<String, Tree>,
    rest: &str,
    name: &str,
    value: String,
) -> Result<(), ApiError> {
    let twice = || malformed(format!("the parameter {name} stands twice"));
    match rest.split_once('.') {
        None => {
            if at.contains_key(rest) {
                return Err(twice());
            }
            at.insert(rest.to_owned(), Tree::Leaf(value));
            Ok(())
        }
        Some((first, rest)) => {
            let child = at.entry(first.to_owned()).or_insert_with(|| Tree::Branch(BTreeMap::new()));
            match child {
                Tree::Branch(branch) => insert(branch, rest, name, value),
                Tree::Leaf(_) => Err(twice()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_become_branches_and_escapes_become_bytes() {
        let pairs = parse_form(b"Filter.1.Name=a%20b&Filter.1.Value.2=c+d&Empty=&Bare").unwrap();
        let tree = grow(pairs).unwrap();
        let Tree::Branch(filter) = &tree["Filter"] else { panic!("{tree:?}") };
        let Tree::Branch(first) = &filter["1"] else { panic!("{tree:?}") };
        assert_eq!(first["Name"], Tree::Leaf("a b".to_owned()));
        assert_eq!(tree["Bare"], Tree::Leaf(String::new()));
    }

    #[test]
    fn a_parameter_that_stands_twice_or_is_both_leaf_and_branch_is_refused() {
        for text in ["a=1&a=2", "a.b=1&a=2", "a=1&a.b=2", "a=%ff"] {
            assert!(parse_form(text.as_bytes()).and_then(grow).is_err(), "{text}");
        }
        let deep = format!("{}=1", "a.".repeat(40));
        assert!(parse_form(deep.as_bytes()).and_then(grow).is_err());
    }
}
