//! A tag `Name` in place of an id: good only where it means exactly one thing.

use crate::failure::{Failure, Outcome};

/// The one of `ids` that were found under the name `asked`; `noun` is what they are.
pub fn the_only(noun: &str, asked: &str, ids: &[&str]) -> Outcome<String> {
    match ids {
        [id] => Ok((*id).to_owned()),
        [] => Err(Failure::failed(format!("{noun} {asked}: none has that id or name"))
            .hint(format!("netctl {noun} list"))),
        many => Err(Failure::failed(format!(
            "{noun} {asked}: {} have that name: {}",
            many.len(),
            many.join(", ")
        ))
        .hint("say which by its id")),
    }
}
