//! Rates in a file: numbers a second with a prefix, such as `"100M"`.

use std::str::FromStr;

use model::InterfaceId;
use rpc::dataplane::{Allowance, Rates};
use serde::Deserialize;
use toml::Spanned;

use super::file::{File, Text, Wrong, interface_id};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    incoming: Option<AllowanceEntry>,
    outgoing: Option<AllowanceEntry>,
    packets: Option<AllowanceEntry>,
    /// An interface whose rates hold for both together, in place of own ones.
    pub of: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AllowanceEntry {
    baseline: Spanned<String>,
    /// As the baseline, where it is left out.
    peak: Option<Spanned<String>>,
    #[serde(default)]
    credit: Option<Spanned<String>>,
}

/// A whole number, in units or in thousands, millions, … of them.
struct Amount(u64);

impl FromStr for Amount {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (digits, factor) = match text.find(|c: char| !c.is_ascii_digit()) {
            None => (text, 1),
            Some(at) => {
                let factor = match &text[at..] {
                    "k" => 1_000,
                    "M" => 1_000_000,
                    "G" => 1_000_000_000,
                    "T" => 1_000_000_000_000,
                    _ => return Err(()),
                };
                (&text[..at], factor)
            }
        };
        digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).map(Self).ok_or(())
    }
}

pub fn rates(text: &Text<'_>, entry: &Entry) -> Result<Rates, Wrong> {
    let one =
        |allowance: &Option<AllowanceEntry>| allowance.as_ref().map(|a| read(text, a)).transpose();
    Ok(Rates {
        incoming: one(&entry.incoming)?,
        outgoing: one(&entry.outgoing)?,
        packets: one(&entry.packets)?,
    })
}

/// The interface that `rates.of` names.
pub fn payer(text: &Text<'_>, entry: &Entry, file: &File) -> Result<Option<InterfaceId>, Wrong> {
    let Some(word) = &entry.of else { return Ok(None) };
    let name = word.get_ref().as_str();
    if entry.incoming.is_some() || entry.outgoing.is_some() || entry.packets.is_some() {
        let what = format!("rates.of: there are rates beside those of `{name}`");
        return Err(text.wrong(word.span(), what, "either `of` or rates of its own"));
    }
    match file.interface.get(name) {
        Some(to) if to.get_ref().rates.of.is_none() => Ok(Some(interface_id(name))),
        Some(_) => {
            let what = format!("rates.of: `{name}` has the rates of another itself");
            Err(text.wrong(word.span(), what, "the interface that has rates of its own"))
        }
        None => {
            let what = format!("rates.of: there is no interface `{name}`");
            Err(text.wrong(word.span(), what, &format!("a table [interface.{name}]")))
        }
    }
}

fn read(text: &Text<'_>, entry: &AllowanceEntry) -> Result<Allowance, Wrong> {
    let amount = |key: &str, word: &Spanned<String>| {
        let kind = "a whole number, with k, M, G or T after it";
        text.parse::<Amount>(key, word, kind, "100M").map(|a| a.0)
    };
    let baseline = amount("baseline", &entry.baseline)?;
    let given = |key, word: &Option<Spanned<String>>, default| match word {
        Some(word) => amount(key, word),
        None => Ok(default),
    };
    let peak = given("peak", &entry.peak, baseline)?;
    Ok(Allowance { baseline, peak, credit: given("credit", &entry.credit, 0)? })
}

/// As people read it in a difference.
pub fn told(allowance: Option<Allowance>) -> Option<String> {
    allowance.map(|a| format!("{} to {} a second, {} of credit", a.baseline, a.peak, a.credit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_prefixes_of_a_thousand() {
        let amount = |text: &str| text.parse::<Amount>().ok().map(|a| a.0);
        assert_eq!(amount("12"), Some(12));
        assert_eq!(amount("5k"), Some(5000));
        assert_eq!(amount("100M"), Some(100_000_000));
        assert_eq!((amount("2G"), amount("1T")), (Some(2_000_000_000), Some(1_000_000_000_000)));
        for wrong in ["", "M", "1 M", "1m", "-1", "1.5G", "99999999T", "1MM"] {
            assert_eq!(amount(wrong), None, "{wrong}");
        }
    }
}
