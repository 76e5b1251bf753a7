//! A day with boto3 against the real daemon.

mod daemon;

use std::path::Path;

use daemon::{Agent, Daemon};

#[tokio::test(flavor = "multi_thread")]
async fn boto3_finds_every_action_as_ec2_has_it() {
    let Some(venv) = daemon::venv("boto3_finds_every_action_as_ec2_has_it") else { return };
    let daemon = Daemon::start(&[]);
    let _agent = Agent::start(daemon.control()).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/tour.py");
    let output = daemon.client(&venv.join("bin/python")).arg(script).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
