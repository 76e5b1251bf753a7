//! Stock `aws` against the real daemon, with a scripted agent.

mod daemon;

use daemon::{Agent, Daemon, IMAGE};

#[tokio::test(flavor = "multi_thread")]
async fn aws_runs_an_instance_and_sees_it_run() {
    let Some(venv) = daemon::venv("aws_runs_an_instance_and_sees_it_run") else { return };
    let daemon = Daemon::start(&[]);
    let _agent = Agent::start(daemon.control()).await;
    let aws = |arguments: &[&str]| daemon.aws(&venv, arguments);
    let image = aws(&["register-image", "--name", "tiny-1", "--image-location", IMAGE]).unwrap();
    let image = image["ImageId"].as_str().unwrap();
    let run = aws(&["run-instances", "--image-id", image, "--instance-type", "t3.micro"]).unwrap();
    assert_eq!(run["Instances"][0]["State"]["Name"], "pending");
    let id = run["Instances"][0]["InstanceId"].as_str().unwrap();
    aws(&["wait", "instance-running", "--instance-ids", id]).unwrap();
    let shown = aws(&["describe-instances", "--instance-ids", id]).unwrap();
    let shown = &shown["Reservations"][0]["Instances"][0];
    assert_eq!(shown["State"]["Name"], "running");
    assert_eq!(shown["PrivateIpAddress"], "172.31.0.4");
    assert_eq!(shown["BlockDeviceMappings"][0]["Ebs"]["Status"], "attached");
    aws(&["terminate-instances", "--instance-ids", id]).unwrap();
    aws(&["wait", "instance-terminated", "--instance-ids", id]).unwrap();
}
