//! Filters and pages of Describe calls.
//!
//! All filters must hold, each for any of its values; `*` and `?` stand for any
//! text and any character, `\` takes their meaning away.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::api::{ApiError, Params};
use crate::record::Tags;

/// EC2 allows 200 values in a filter and 50 filters (user guide, "Filter your resources").
const FILTERS_MAX: usize = 50;
const VALUES_MAX: usize = 200;

pub fn glob_matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    // Where the last star was, and what it has swallowed: on a mismatch it
    // swallows one more. Linear in memory, at worst quadratic in time.
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            Some('?') => {
                p += 1;
                t += 1;
                continue;
            }
            Some('\\') if pattern.get(p + 1) == Some(&text[t]) => {
                p += 2;
                t += 1;
                continue;
            }
            Some(c) if *c != '\\' && *c == text[t] => {
                p += 1;
                t += 1;
                continue;
            }
            _ => {}
        }
        let Some((at, swallowed)) = star else { return false };
        star = Some((at, swallowed + 1));
        p = at + 1;
        t = swallowed + 1;
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// The filters of one request.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    filters: Vec<(String, Vec<String>)>,
}

impl Filters {
    pub fn read(params: &Params) -> Result<Self, ApiError> {
        let mut filters = Vec::new();
        let given = params.structs("Filter");
        if given.len() > FILTERS_MAX {
            return Err(ApiError::new(
                "FilterLimitExceeded",
                format!("At most {FILTERS_MAX} filters are possible."),
            ));
        }
        for filter in given {
            let name = filter.need("Name")?.to_owned();
            let values: Vec<String> =
                filter.texts("Value").into_iter().map(str::to_owned).collect();
            if values.is_empty() {
                return Err(ApiError::missing(&format!("Filter.{name}.Value")));
            }
            if values.len() > VALUES_MAX {
                return Err(ApiError::new(
                    "FilterLimitExceeded",
                    format!("The filter {name} has more than {VALUES_MAX} values."),
                ));
            }
            filters.push((name, values));
        }
        Ok(Self { filters })
    }

    /// Refuses a name that is none of the known, whether or not there is
    /// anything to filter.
    pub fn known(self, names: &[&str]) -> Result<Self, ApiError> {
        let tagged = names.contains(&"tag-key");
        for (name, _) in &self.filters {
            let known = names.contains(&name.as_str()) || tagged && name.starts_with("tag:");
            if !known {
                return Err(ApiError::invalid(format!("The filter '{name}' is invalid")));
            }
        }
        Ok(self)
    }

    pub fn admit<'a>(&self, tags: &'a Tags, field: impl Fn(&str) -> Vec<Cow<'a, str>>) -> bool {
        self.filters.iter().all(|(name, wanted)| {
            let held: Vec<Cow<'_, str>> = if let Some(key) = name.strip_prefix("tag:") {
                tags.get(key).map(|v| Cow::Borrowed(v.as_str())).into_iter().collect()
            } else if name == "tag-key" {
                tags.keys().map(|k| Cow::Borrowed(k.as_str())).collect()
            } else {
                field(name)
            };
            held.iter().any(|h| wanted.iter().any(|w| glob_matches(w, h)))
        })
    }
}

/// One page of a list whose items have keys in rising order. A page begins
/// after the last key of the one before, so that what comes and goes in between
/// neither repeats nor hides another item.
#[derive(Debug, Clone)]
pub struct Page {
    max: usize,
    after: Option<String>,
}

/// Items on a page where none is asked for, and at most.
const PAGE_MAX: usize = 1000;
const PAGE_MIN: i64 = 5;

impl Page {
    pub fn read(
        params: &Params,
        action: &str,
        named: bool,
        secret: &[u8],
    ) -> Result<Self, ApiError> {
        let max = params.number("MaxResults");
        if named && max.is_some() {
            return Err(ApiError::combination(
                "The parameter MaxResults cannot be used with a list of ids in the same request",
            ));
        }
        let max = match max {
            None => usize::MAX,
            Some(n) if (PAGE_MIN..=PAGE_MAX as i64).contains(&n) => n.unsigned_abs() as usize,
            Some(n) => {
                return Err(ApiError::invalid(format!(
                    "Value ( {n} ) for parameter maxResults is invalid. Expecting a value between {PAGE_MIN} and {PAGE_MAX}."
                )));
            }
        };
        let after = match params.text("NextToken").filter(|t| !t.is_empty()) {
            None => None,
            Some(token) => Some(open_token(token, action, secret).ok_or_else(|| {
                ApiError::new("InvalidNextToken", "The token is not one that this action gave.")
            })?),
        };
        Ok(Self { max, after })
    }

    /// The items of this page, and the token of the next.
    pub fn cut<T>(
        &self,
        items: impl Iterator<Item = T>,
        key: impl Fn(&T) -> String,
        action: &str,
        secret: &[u8],
    ) -> (Vec<T>, Option<String>) {
        let mut page = Vec::new();
        for item in items {
            if self.after.as_ref().is_some_and(|after| key(&item) <= *after) {
                continue;
            }
            if page.len() == self.max {
                let token = page.last().map(|last| seal_token(&key(last), action, secret));
                return (page, token);
            }
            page.push(item);
        }
        (page, None)
    }
}

/// Sealed, so that a client cannot make one that we never gave.
fn seal_token(key: &str, action: &str, secret: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}{key}", token_seal(key, action, secret)))
}

fn open_token(token: &str, action: &str, secret: &[u8]) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (seal, key) = text.split_at_checked(SEAL_DIGITS)?;
    let same: bool =
        subtle::ConstantTimeEq::ct_eq(seal.as_bytes(), token_seal(key, action, secret).as_bytes())
            .into();
    same.then(|| key.to_owned())
}

const SEAL_DIGITS: usize = 64;

fn token_seal(key: &str, action: &str, secret: &[u8]) -> String {
    crate::auth::hmac_hex(secret, format!("{action}\n{key}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text_and_a_backslash_for_itself() {
        for (pattern, text, expected) in [
            ("web*", "web-1", true),
            ("*-1", "web-1", true),
            ("w*b*1", "web-1", true),
            ("we?-1", "web-1", true),
            ("we?", "web-1", false),
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("*a*a*a*b", &"a".repeat(300), false),
        ] {
            assert_eq!(glob_matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_token_that_was_not_given_or_was_given_by_another_action_is_refused() {
        let token = seal_token("i-5", "DescribeInstances", b"secret");
        assert_eq!(open_token(&token, "DescribeInstances", b"secret").as_deref(), Some("i-5"));
        assert_eq!(open_token(&token, "DescribeVolumes", b"secret"), None);
        assert_eq!(open_token(&token, "DescribeInstances", b"other"), None);
        assert_eq!(open_token("nonsense", "DescribeInstances", b"secret"), None);
    }
}
