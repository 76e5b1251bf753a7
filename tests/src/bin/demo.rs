//! `./x demo`: the whole machine, run once, narrated and timed.
//!
//! Exit code 0 only when every step held; 1 otherwise. Whatever happens, what
//! was started is taken down again.

#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, reason = "a demo is timed by the clock on the wall")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use tests::deployment::Deployment;
use tests::operator::{Netctl, Operator};
use tests::story::{STEPS, Story};

/// Runs the whole machine once: two guests, a volume, elastic IPs, security
/// groups, kill -9 of every daemon; then takes it all down.
#[derive(Debug, Parser)]
#[command(name = "./x demo")]
struct Options {
    /// Port of 127.0.0.1 on which the EC2 API is served meanwhile.
    #[arg(long, default_value_t = 28773)]
    port: u16,
}

struct Line {
    title: &'static str,
    took: Duration,
    told: Result<String, String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let began = Instant::now();
    let lines = tell(&options);
    println!("\n{}", table(&lines));
    let held = lines.iter().filter(|l| l.told.is_ok()).count();
    println!(
        "{held} of {} steps held, {:.1} s in all.",
        STEPS.len(),
        began.elapsed().as_secs_f64()
    );
    if held == STEPS.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tell(options: &Options) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut story = None;
    for (number, step) in STEPS.iter().enumerate() {
        println!("{:2}. {} …", number + 1, step.title);
        let began = Instant::now();
        // Bringing it up is the first step's work and counts as its time.
        let told = match &mut story {
            Some(story) => (step.act)(story),
            none => begin(options).and_then(|begun| (step.act)(none.insert(begun))),
        };
        let took = began.elapsed();
        let told = told.map_err(|error| format!("{error:#}"));
        match &told {
            Ok(note) => println!("    {note}  [{:.1} s]", took.as_secs_f64()),
            Err(error) => println!("    FAILED after {:.1} s: {error}", took.as_secs_f64()),
        }
        let failed = told.is_err();
        lines.push(Line { title: step.title, took, told });
        if failed {
            if let Some(story) = &story {
                println!("{}", story.deployment.logs());
            }
            break;
        }
    }
    lines
}

fn begin(options: &Options) -> anyhow::Result<Story> {
    Story::begin(Deployment::new("demo", options.port)?, |deployment| {
        Ok(Box::new(Netctl::new(deployment)) as Box<dyn Operator>)
    })
}

fn table(lines: &[Line]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(["step", "time", "held"]);
    for line in lines {
        let held = if line.told.is_ok() { "yes" } else { "NO" };
        table.add_row([
            line.title.to_owned(),
            format!("{:.1} s", line.took.as_secs_f64()),
            held.to_owned(),
        ]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
