//! How a command speaks: data on stdout, messages on stderr, no colour and no
//! moving picture where nobody watches.

use std::io::Write;

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::{Failure, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// One JSON value of a stable shape
    Json,
    /// Only the ids, a line each
    Id,
}

/// One line of data.
pub fn line(text: &str) {
    // A reader that has gone (`| head`) wants no more, and that is no failure.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// A message for the person at the terminal.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

pub fn json<T: Serialize>(value: &T) -> Outcome {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::failed(format!("answer: write as JSON: {e}")))?;
    line(&text);
    Ok(())
}

/// Columns without rules between them: they survive copying and `awk`.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table.add_rows(rows.iter().map(|row| row.iter().map(String::as_str)));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for text in table.to_string().lines() {
        line(text.trim_end());
    }
}
