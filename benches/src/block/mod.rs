//! How fast is a block server, and what does each operation cost it?
//!
//! Called by `src/bin/block.rs`. Every contender serves the same fully written
//! file, one after the other, in rounds; the order turns with each round, so
//! that none is always the one that comes after the disk was busy. A row whose
//! rounds disagree is measured anew, as a whole, while there is time.
//!
//! ```text
//! round × row × contender:
//!   settle the file (synced; out of the page cache, or in it) ─▶ start the server
//!   ─▶ CPU read ─▶ load ─▶ CPU read ─▶ end the server
//! ```

#![expect(clippy::disallowed_methods, reason = "a benchmark is a shell: it measures time")]

pub mod address;
pub mod beside;
pub mod certificates;
pub mod client;
pub mod contender;
pub mod file;
pub mod fio;
pub mod guest;
pub mod load;
pub mod plot;
pub mod report;
pub mod row;
pub mod storm;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::process::{cpu_seconds, interrupted};
use crate::statistic::Sample;
use beside::Beside;
use contender::Contender;
use file::DataFile;
use load::Done;
use row::{Client, Row};

/// Rounds that agree less than this are no measurement (least by greatest).
pub const SPREAD_MIN: f64 = 0.8;

#[derive(Debug, Clone)]
pub struct Plan {
    pub rows: Vec<Row>,
    pub rounds: usize,
    pub duration: Duration,
    pub size_mib: u64,
    /// The folder for the data file; it should be on the disk in question.
    pub directory: PathBuf,
    /// Rows are measured anew only until so much time has gone.
    pub time_max: Duration,
    /// Another build of our server, to stand beside it.
    pub against: Option<PathBuf>,
    /// No peers, and no fio.
    pub alone: bool,
}

/// What was measured of one contender in one row.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub iops: Sample,
    pub p50_us: Sample,
    pub p99_us: Sample,
    /// Server CPU an operation; empty where there is no server.
    pub cpu_us: Sample,
    /// The load's own; empty where it was fio's.
    pub client_us: Sample,
    /// Why a round has no figure, where one has none.
    pub failure: Option<String>,
}

/// By row's place in the plan.
pub type Results = BTreeMap<(usize, Contender), Figures>;

struct Bench<'a> {
    plan: &'a Plan,
    data: DataFile,
    tell: &'a mut dyn FnMut(&str),
}

/// Measures all of the plan. `tell` gets a line for each measurement.
pub fn run(plan: &Plan, mut tell: impl FnMut(&str)) -> anyhow::Result<Results> {
    let begin = Instant::now();
    let data = DataFile::create(&plan.directory, plan.size_mib)?;
    let mut bench = Bench { plan, data, tell: &mut tell };
    let mut results = Results::new();
    for round in 0..plan.rounds {
        for row in 0..plan.rows.len() {
            bench.round(row, round, &mut results)?;
        }
    }
    for row in 0..plan.rows.len() {
        let begun = Instant::now();
        let spread = spread(&results, row);
        let took = plan.duration * (plan.rounds * bench.contenders(row).len()) as u32;
        if spread >= SPREAD_MIN || begun - begin + took * 5 / 4 > plan.time_max {
            continue;
        }
        (bench.tell)(&format!("{}: spread {spread:.2}: measured anew", plan.rows[row].id));
        let mut anew = Results::new();
        for round in 0..plan.rounds {
            bench.round(row, round, &mut anew)?;
        }
        if self::spread(&anew, row) > spread {
            results.extend(anew);
        }
    }
    Ok(results)
}

/// The worst of a row's servers, ours and others'.
fn spread(results: &Results, row: usize) -> f64 {
    let of_row = results.iter().filter(|((at, c), _)| *at == row && *c != Contender::RawFile);
    of_row.filter_map(|(_, f)| Some(f.iops.summary()?.spread())).fold(1.0, f64::min)
}

impl Bench<'_> {
    fn contenders(&self, row: usize) -> Vec<Contender> {
        let mut all = self.plan.rows[row].contenders().to_vec();
        all.retain(|c| matches!(c, Contender::Ours | Contender::Alone) || !self.plan.alone);
        all.extend(self.plan.against.is_some().then_some(Contender::Other));
        all
    }

    /// Contenders of one row are measured within seconds of each other.
    fn round(&mut self, row: usize, round: usize, results: &mut Results) -> anyhow::Result<()> {
        let contenders = self.contenders(row);
        for turn in 0..contenders.len() {
            anyhow::ensure!(!interrupted(), "interrupted");
            let contender = contenders[(turn + round) % contenders.len()];
            let figures = results.entry((row, contender)).or_default();
            if let Some(missing) = contender.missing() {
                figures.failure = Some(missing);
                continue;
            }
            let what = format!("round {}: {}, {contender}", round + 1, self.plan.rows[row].id);
            match self.measure(&self.plan.rows[row], contender) {
                Ok(figure) => {
                    (self.tell)(&format!("{what}: {:.0} a second", figure.done.iops));
                    figures.add(&figure);
                }
                Err(error) => {
                    (self.tell)(&format!("{what}: failed: {error:#}"));
                    figures.failure = Some(format!("failed: {error:#}"));
                }
            }
        }
        Ok(())
    }

    fn measure(&self, row: &Row, contender: Contender) -> anyhow::Result<Figure> {
        match row.medium {
            contender::Medium::Disk => self.data.cool()?,
            contender::Medium::PageCache => self.data.warm()?,
        }
        let against = self.plan.against.as_deref();
        let file = self.data.path();
        let Some(server) = contender.serve(row.medium, row.transport, file, against)? else {
            let done = fio::on_file(&self.data, row.load, self.plan.duration)?;
            return Ok(Figure { done, cpu_us: None, client_us: None });
        };
        let (before, own_before) = (cpu_seconds(server.id())?, cpu_seconds(std::process::id())?);
        let done = self.put_load(row, contender, &server)?;
        let used = cpu_seconds(server.id())? - before;
        let own_used = cpu_seconds(std::process::id())? - own_before;
        let each = |seconds: f64| seconds * 1e6 / done.operations as f64;
        // What others ask costs the server, and us, as well.
        let is_alone = row.beside == Beside::Nobody || contender == Contender::Alone;
        let client_us = (row.client == Client::Lean && is_alone).then(|| each(own_used));
        Ok(Figure { done, cpu_us: is_alone.then(|| each(used)), client_us })
    }

    fn put_load(
        &self,
        row: &Row,
        contender: Contender,
        server: &contender::Server,
    ) -> anyhow::Result<Done> {
        match row.client {
            Client::Lean if contender == Contender::Alone => {
                beside::alone(server.address(), row.load, self.plan.duration)
            }
            Client::Lean => row.beside.run(server.address(), row.load, self.plan.duration),
            Client::Fio => {
                fio::over_nbd(server.address(), &self.data, row.load, self.plan.duration)
            }
        }
    }
}

struct Figure {
    done: Done,
    cpu_us: Option<f64>,
    client_us: Option<f64>,
}

impl Figures {
    fn add(&mut self, figure: &Figure) {
        self.iops.push(figure.done.iops);
        self.p50_us.push(figure.done.p50_us);
        self.p99_us.push(figure.done.p99_us);
        for (sample, value) in
            [(&mut self.cpu_us, figure.cpu_us), (&mut self.client_us, figure.client_us)]
        {
            if let Some(value) = value {
                sample.push(value);
            }
        }
    }
}
