//! How fast is a block server, and what does each operation cost it?
//!
//! Called by `src/bin/block.rs`. Every contender serves the same fully written
//! file, one after the other, in rounds; the order turns with each round, so
//! that none is always the one that comes after the disk was busy.
//!
//! ```text
//! round × workload × transport × contender:
//!   settle the file (synced; out of the page cache, or in it) ─▶ start the server
//!   ─▶ CPU read ─▶ fio ─▶ CPU read ─▶ end the server
//! ```

pub mod contender;
pub mod file;
pub mod fio;
pub mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::process::{cpu_seconds, interrupted};
use crate::statistic::Sample;
use contender::{Contender, Transport};
use file::DataFile;
use fio::Workload;

#[derive(Debug, Clone)]
pub struct Plan {
    pub workloads: Vec<Workload>,
    pub transports: Vec<Transport>,
    pub rounds: usize,
    pub seconds: u64,
    pub size_mib: u64,
    /// The folder for the data file; it should be on the disk in question.
    pub directory: PathBuf,
}

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub workload: Workload,
    pub transport: Transport,
    pub contender: Contender,
}

/// What was measured of one contender in one place.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub iops: Sample,
    pub p99_us: Sample,
    /// Server CPU an operation; empty where there is no server.
    pub cpu_us: Sample,
    /// Why a round has no figure, where one has none.
    pub failure: Option<String>,
}

pub type Results = BTreeMap<Place, Figures>;

/// Measures all of the plan. `tell` gets a line for each measurement.
pub fn run(plan: &Plan, mut tell: impl FnMut(&str)) -> anyhow::Result<Results> {
    let data = DataFile::create(&plan.directory, plan.size_mib)?;
    let places = places(plan);
    let mut results = Results::new();
    for round in 0..plan.rounds {
        for turn in 0..places.len() {
            anyhow::ensure!(!interrupted(), "interrupted");
            let place = places[(turn + round) % places.len()];
            let figures = results.entry(place).or_default();
            if let Some(missing) = place.contender.missing() {
                figures.failure = Some(missing);
                continue;
            }
            match measure(plan, &data, place) {
                Ok(figure) => {
                    tell(&format!("round {}: {place}: {:.0} a second", round + 1, figure.iops));
                    figures.iops.push(figure.iops);
                    figures.p99_us.push(figure.p99_us);
                    if let Some(cpu_us) = figure.cpu_us {
                        figures.cpu_us.push(cpu_us);
                    }
                }
                Err(error) => {
                    tell(&format!("round {}: {place}: failed: {error:#}", round + 1));
                    figures.failure = Some(format!("failed: {error:#}"));
                }
            }
        }
    }
    Ok(results)
}

/// Contenders of one workload and transport stand together, so that they are
/// measured within seconds of each other.
fn places(plan: &Plan) -> Vec<Place> {
    let mut places = Vec::new();
    for &workload in &plan.workloads {
        for &transport in &plan.transports {
            for contender in Contender::ALL {
                // Raw fio has no transport: it is measured beside the first one.
                if contender != Contender::RawFile || transport == plan.transports[0] {
                    places.push(Place { workload, transport, contender });
                }
            }
        }
    }
    places
}

struct Figure {
    iops: f64,
    p99_us: f64,
    cpu_us: Option<f64>,
}

fn measure(plan: &Plan, data: &DataFile, place: Place) -> anyhow::Result<Figure> {
    if place.contender.uses_page_cache() {
        data.warm()?
    } else {
        data.cool()?
    }
    let Some(server) = place.contender.serve(place.transport, data.path())? else {
        let done = fio::on_file(data, place.workload, plan.seconds)?;
        return Ok(Figure { iops: done.iops, p99_us: done.p99_us, cpu_us: None });
    };
    let before = cpu_seconds(server.id())?;
    let done = fio::over_nbd(server.uri(), data, place.workload, plan.seconds)?;
    let used = cpu_seconds(server.id())? - before;
    Ok(Figure {
        iops: done.iops,
        p99_us: done.p99_us,
        cpu_us: Some(used * 1e6 / done.operations as f64),
    })
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { workload, transport, contender } = self;
        write!(f, "{workload}, {transport}, {contender}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_fio_is_measured_once_a_workload_and_every_server_on_each_transport() {
        let plan = Plan {
            workloads: fio::RANDOM_4K.to_vec(),
            transports: vec![Transport::Unix, Transport::Tcp],
            rounds: 1,
            seconds: 1,
            size_mib: 1,
            directory: PathBuf::new(),
        };
        let places = places(&plan);
        let raw = places.iter().filter(|p| p.contender == Contender::RawFile).count();
        assert_eq!(raw, plan.workloads.len());
        let servers = Contender::ALL.len() - 1;
        assert_eq!(places.len(), plan.workloads.len() * (1 + 2 * servers));
    }
}
