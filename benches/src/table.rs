//! Tables as text: the first column leans left, the others right.

/// Stands in a cell for which there is no figure.
pub const NO_FIGURE: &str = "–";

/// A program's complaint may be long; the whole of it goes to standard error.
const REMARK_CHARACTERS_MAX: usize = 120;

#[derive(Debug, Clone)]
pub struct Table {
    heading: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Debug, Clone)]
enum Row {
    Cells(Vec<String>),
    /// A name, and a sentence in place of figures.
    Remark(String, String),
}

impl Table {
    pub fn new<S: Into<String>>(heading: impl IntoIterator<Item = S>) -> Self {
        Self { heading: heading.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        assert_eq!(cells.len(), self.heading.len(), "a cell for each column: {cells:?}");
        self.rows.push(Row::Cells(cells));
    }

    /// A row that says, on one line, why it has no figures.
    pub fn remark(&mut self, name: impl Into<String>, why: impl Into<String>) {
        let mut why = why.into().split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some((end, _)) = why.char_indices().nth(REMARK_CHARACTERS_MAX) {
            why.truncate(end);
            why.push('…');
        }
        self.rows.push(Row::Remark(name.into(), why));
    }

    pub fn text(&self) -> String {
        let widths = self.widths();
        let mut text = line(&self.heading, &widths);
        let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
        text.push_str(&line(&rule, &widths));
        for row in &self.rows {
            match row {
                Row::Cells(cells) => text.push_str(&line(cells, &widths)),
                Row::Remark(name, why) => {
                    let pad = widths[0].saturating_sub(name.chars().count());
                    text.push_str(&format!("{name}{}  {why}\n", " ".repeat(pad)));
                }
            }
        }
        text
    }

    fn widths(&self) -> Vec<usize> {
        let length = |s: &String| s.chars().count();
        let mut widths: Vec<usize> = self.heading.iter().map(length).collect();
        for row in &self.rows {
            match row {
                Row::Cells(cells) => {
                    for (width, cell) in widths.iter_mut().zip(cells) {
                        *width = (*width).max(length(cell));
                    }
                }
                Row::Remark(name, _) => widths[0] = widths[0].max(length(name)),
            }
        }
        widths
    }
}

fn line(cells: &[String], widths: &[usize]) -> String {
    let mut text = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let pad = " ".repeat(width - cell.chars().count());
        if column == 0 {
            text.push_str(&format!("{cell}{pad}"));
        } else {
            text.push_str(&format!("  {pad}{cell}"));
        }
    }
    format!("{}\n", text.trim_end())
}

/// A figure with `decimals` digits behind the point, or the sign for none.
pub fn figure(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| NO_FIGURE.to_owned(), |v| format!("{v:.decimals$}"))
}

/// A ratio, as `0.58x`.
pub fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| NO_FIGURE.to_owned(), |r| format!("{r:.2}x"))
}

/// Thousands, as `52.8k`.
pub fn thousands(value: Option<f64>) -> String {
    value.map_or_else(|| NO_FIGURE.to_owned(), |v| format!("{:.1}k", v / 1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_a_remark_takes_the_place_of_figures() {
        let mut table = Table::new(["who", "ns", "ratio"]);
        table.row(["nft".to_owned(), figure(Some(718.2), 0), times(Some(1.0))]);
        table.row(["ours — tcx".to_owned(), figure(Some(41.0), 0), times(None)]);
        table.remark("ovs", "not\n installed");
        assert_eq!(
            table.text(),
            "who          ns  ratio\n\
             ----------  ---  -----\n\
             nft         718  1.00x\n\
             ours — tcx   41      –\n\
             ovs         not installed\n"
        );
    }

    #[test]
    fn thousands_keep_one_decimal() {
        assert_eq!(thousands(Some(52_841.0)), "52.8k");
        assert_eq!(thousands(None), NO_FIGURE);
    }

    #[test]
    #[should_panic(expected = "a cell for each column")]
    fn a_row_of_the_wrong_length_is_refused() {
        Table::new(["a", "b"]).row(["1"]);
    }
}
