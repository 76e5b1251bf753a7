//! The answer as a picture (SVG): for each pattern of flows, what a packet costs over
//! the number of rules, ours and the peers', both scales logarithmic.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::packet::contender::Contender;
use crate::packet::{Flows, Plan, Results};

const LEFT: f64 = 70.0;
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEGEND: f64 = 260.0;
const GAP: f64 = 70.0;

/// Rules and nanoseconds of each contender, whatever its number of rules.
type Lines = BTreeMap<String, Vec<(f64, f64)>>;

/// The SVG document.
pub fn svg(plan: &Plan, results: &Results) -> String {
    let height = 40.0 + (HEIGHT + GAP) * plan.flows.len() as f64;
    let width = LEFT + WIDTH + LEGEND;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (at, flows) in plan.flows.iter().enumerate() {
        let lines = lines(plan, results, *flows);
        chart(&mut svg, 40.0 + (HEIGHT + GAP) * at as f64, &flows.to_string(), &lines);
    }
    svg.push_str("</svg>\n");
    svg
}

fn lines(plan: &Plan, results: &Results, flows: Flows) -> Lines {
    let mut lines = Lines::new();
    for (place, figures) in results.iter().filter(|(place, _)| place.flows == flows) {
        let Some(ns) = figures.ns.median() else { continue };
        let name = place.contender.kind();
        let points = lines.entry(name).or_default();
        if place.contender == Contender::Plain {
            // Without rules it is the same for any number of them.
            let all = plan.contenders.iter().map(|c| c.rules() as f64);
            let (least, most) = (all.clone().fold(10.0, f64::min), all.fold(10.0, f64::max));
            points.extend([(least.max(10.0), ns), (most, ns)]);
        } else {
            points.push((place.contender.rules() as f64, ns));
        }
    }
    lines
}

fn chart(svg: &mut String, top: f64, title: &str, lines: &Lines) {
    let all = || lines.values().flatten();
    let (x0, x1) = decades(all().map(|p| p.0));
    let (y0, y1) = decades(all().map(|p| p.1));
    let x = |rules: f64| LEFT + (rules.log10() - x0) / (x1 - x0) * WIDTH;
    let y = |ns: f64| top + HEIGHT - (ns.log10() - y0) / (y1 - y0) * HEIGHT;
    let _ = writeln!(
        svg,
        r#"<text x="{LEFT}" y="{}" font-weight="bold">{title}: ns a packet over the number of rules</text>"#,
        top - 10.0
    );
    for decade in x0 as i32..=x1 as i32 {
        let (at, end, value) = (x(10f64.powi(decade)), top + HEIGHT, 10u64.pow(decade as u32));
        let _ = writeln!(
            svg,
            r##"<line x1="{at:.1}" y1="{top}" x2="{at:.1}" y2="{end}" stroke="#ddd"/><text x="{at:.1}" y="{}" text-anchor="middle">{value}</text>"##,
            end + 15.0
        );
    }
    for decade in y0 as i32..=y1 as i32 {
        let (at, value) = (y(10f64.powi(decade)), 10u64.pow(decade as u32));
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" y1="{at:.1}" x2="{}" y2="{at:.1}" stroke="#ddd"/><text x="{}" y="{:.1}" text-anchor="end">{value}</text>"##,
            LEFT + WIDTH,
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (nth, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[nth % COLOURS.len()];
        let path: Vec<String> =
            points.iter().map(|(rules, ns)| format!("{:.1},{:.1}", x(*rules), y(*ns))).collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            path.join(" ")
        );
        for (rules, ns) in points {
            let (cx, cy) = (x(*rules), y(*ns));
            let _ = writeln!(svg, r#"<circle cx="{cx:.1}" cy="{cy:.1}" r="3" fill="{colour}"/>"#);
        }
        let (at, line) = (LEFT + WIDTH + 14.0, top + 12.0 + 16.0 * nth as f64);
        let _ = writeln!(svg, r#"<text x="{at}" y="{line}" fill="{colour}">{name}</text>"#);
    }
}

const COLOURS: [&str; 8] =
    ["#1b9e77", "#66a61e", "#377eb8", "#e41a1c", "#ff7f00", "#984ea3", "#999999", "#a65628"];

/// The powers of ten around the values, at least one apart.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.fold(1.0, f64::max);
    let first = if least.is_finite() { least.log10().floor() } else { 0.0 };
    (first, most.log10().ceil().max(first + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Figures, Place};

    #[test]
    fn each_contender_is_a_line_over_its_numbers_of_rules() {
        let contenders =
            vec![Contender::Plain, Contender::OursOnTcx(10), Contender::OursOnTcx(1000)];
        let flows = Flows::New;
        let results = contenders.iter().zip([300.0, 500.0, 600.0]).map(|(&contender, ns)| {
            let ns = [ns].into_iter().collect();
            (Place { flows, contender }, Figures { ns, failure: None })
        });
        let results = results.collect();
        let plan = Plan { flows: vec![flows], contenders, rounds: 1, frames: 1 };
        let picture = svg(&plan, &results);
        assert_eq!(picture.matches("<polyline").count(), 2, "{picture}");
        assert_eq!(picture.matches("<circle").count(), 4);
        assert!(picture.contains(">1000</text>") && picture.contains("hostplane<"), "{picture}");
    }
}
