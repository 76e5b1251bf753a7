//! The story of `./x demo`, told as tests by the stock `aws` client.
//!
//! The steps stand on each other and share one deployment: after a failed one
//! the rest fail at once and say so. A name given on the command line selects
//! nothing here; the tale is told whole or not at all.

#![forbid(unsafe_code)]

#[path = "story/interfaces.rs"]
mod interfaces;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tests::deployment::Deployment;
use tests::operator::{Aws, Operator};
use tests::program;
use tests::story::{STEPS, Step, Story};

/// Above the port of a Hostplane that the developer may be running.
const PORT: u16 = 18773;

/// A story that is being told, or why it cannot be told any further.
enum Tale {
    Unbegun,
    Told(Box<Story>),
    Broken(&'static str),
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    arguments.filter = None;
    let tale = Arc::new(Mutex::new(Tale::Unbegun));
    let trials = STEPS
        .iter()
        .chain([&INTERFACES, &BOTO3])
        .map(|step| {
            let tale = Arc::clone(&tale);
            (position(step), Trial::test(step.name, move || tell(step, &tale)))
        })
        .collect::<BTreeMap<_, _>>()
        .into_values()
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Takes a deployment down that a failure left up.
    drop(tale);
    conclusion.exit_code()
}

/// Steps of its own, told between two of the story's: the guests run, and
/// nothing that these make is in their way.
const BOTO3: Step = Step { name: "serves_boto3", title: "Serve boto3", act: serve_boto3 };
const INTERFACES: Step = Step {
    name: "serves_an_instance_with_two_interfaces",
    title: "Run an instance with two interfaces",
    act: serve_interfaces,
};
const OWN_BEFORE: &str = "survives_kill_9_of_each_daemon";

fn position(step: &Step) -> (usize, u8) {
    let place = |name| STEPS.iter().position(|s| s.name == name).unwrap_or(STEPS.len());
    match step.name {
        name if name == INTERFACES.name => (place(OWN_BEFORE), 0),
        name if name == BOTO3.name => (place(OWN_BEFORE), 1),
        name => (place(name), 2),
    }
}

fn serve_interfaces(story: &mut Story) -> anyhow::Result<String> {
    interfaces::serve(story, &Aws::new(&venv("aws"), &story.deployment)?)
}

fn serve_boto3(story: &mut Story) -> anyhow::Result<String> {
    let mut python = Command::new(venv("python"));
    python
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boto3_client.py"))
        .arg(story.image());
    python.envs(Aws::new(&venv("aws"), &story.deployment)?.environment());
    python.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    let said = program::output(&mut python, Duration::from_secs(180))?;
    Ok(format!("{} groups of checks", said.lines().count()))
}

fn tell(step: &Step, tale: &Mutex<Tale>) -> Result<(), Failed> {
    let mut tale = tale.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(*tale, Tale::Unbegun) {
        // A panic on the way leaves this behind, not a half-begun story.
        *tale = Tale::Broken(step.name);
        *tale = Tale::Told(Box::new(begin().map_err(|e| failed(&e))?));
    }
    let story = match &mut *tale {
        Tale::Told(story) => story,
        Tale::Broken(earlier) => return Err(format!("not reached: `{earlier}` failed").into()),
        Tale::Unbegun => return Err("the story did not begin".into()),
    };
    match (step.act)(story) {
        Ok(note) => {
            eprintln!("{}: {note}", step.name);
            Ok(())
        }
        Err(error) => {
            let logs = story.deployment.logs();
            *tale = Tale::Broken(step.name);
            Err(format!("{error:#}\n{logs}").into())
        }
    }
}

fn begin() -> anyhow::Result<Story> {
    Story::begin(Deployment::new("e2e", PORT)?, |deployment| {
        Ok(Box::new(Aws::new(&venv("aws"), deployment)?) as Box<dyn Operator>)
    })
}

/// A program of the stock clients that `./x` installs into `.venv`.
fn venv(program: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin").join(program)
}

fn failed(error: &anyhow::Error) -> Failed {
    format!("{error:#}").into()
}
