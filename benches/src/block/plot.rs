//! The answer as a picture (SVG): for each row two bars a server, its operations
//! and its CPU, each by the best peer's.

use std::fmt::Write;

use crate::block::contender::Contender;
use crate::block::report::Best;
use crate::block::{Plan, Results};
use crate::statistic::ratio;

const NAMES: f64 = 250.0;
/// Of one bar whose ratio is 1.
const UNIT: f64 = 110.0;
/// Longer bars are cut, and their number says how long they are.
const RATIO_MAX: f64 = 3.2;
const COLUMN: f64 = UNIT * RATIO_MAX + 50.0;
const LINE: f64 = 15.0;

/// The SVG document.
pub fn svg(plan: &Plan, results: &Results) -> String {
    let mut body = String::new();
    let mut y = 50.0;
    for (at, row) in plan.rows.iter().enumerate() {
        let best = Best::of(results, at, row.medium);
        let _ = writeln!(body, r#"<text x="8" y="{y}" font-weight="bold">{row}</text>"#);
        y += LINE;
        for ((_, contender), figures) in results.iter().filter(|((r, _), _)| *r == at) {
            let _ = writeln!(body, r#"<text x="20" y="{}">{contender}</text>"#, y + 10.0);
            let operations = ratio(figures.iops.median(), best.iops);
            let cpu = ratio(figures.cpu_us.median(), best.cpu_us);
            bar(&mut body, NAMES, y, operations, colour(*contender));
            bar(&mut body, NAMES + COLUMN, y, cpu, colour(*contender));
            y += LINE;
        }
        y += LINE;
    }
    let width = NAMES + 2.0 * COLUMN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (column, title) in [
        "operations, best peer = 1 (longer is better)",
        "CPU an operation, best peer = 1 (shorter is better)",
    ]
    .iter()
    .enumerate()
    {
        let x = NAMES + COLUMN * column as f64;
        let one = x + UNIT;
        let _ = writeln!(svg, r#"<text x="{x}" y="24" font-weight="bold">{title}</text>"#);
        let _ = writeln!(
            svg,
            r##"<line x1="{one}" y1="32" x2="{one}" y2="{y}" stroke="#999" stroke-dasharray="3"/>"##
        );
    }
    svg.push_str(&body);
    svg.push_str("</svg>\n");
    svg
}

fn bar(svg: &mut String, x: f64, y: f64, ratio: Option<f64>, colour: &str) {
    let Some(ratio) = ratio else { return };
    let length = ratio.min(RATIO_MAX) * UNIT;
    let _ = writeln!(
        svg,
        r#"<rect x="{x}" y="{y}" width="{length:.1}" height="12" fill="{colour}"/><text x="{:.1}" y="{}">{ratio:.2}</text>"#,
        x + length + 4.0,
        y + 10.0,
    );
}

fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::RawFile | Contender::Alone => "#bbbbbb",
        Contender::QemuUring => "#8da0cb",
        Contender::QemuNative => "#a6bddb",
        Contender::Nbdkit => "#fdb462",
        Contender::Other => "#b3de69",
        Contender::Ours => "#1b9e77",
    }
}
