//! kill -9 of the daemon between answers: what was acknowledged is there, and the
//! same client token gets the same answer.

mod daemon;

use bytes::Bytes;
use daemon::{Agent, Daemon, IMAGE};
use http_body_util::Full;

async fn call(daemon: &Daemon, form: &str) -> Result<String, String> {
    let request = http::Request::post("/")
        .header("host", "localhost")
        .body(Full::new(Bytes::from(form.to_owned())))
        .unwrap();
    let (status, body) = daemon.control().send(request).await.map_err(|e| e.to_string())?;
    let text = String::from_utf8(body.to_vec()).unwrap();
    if status.is_success() { Ok(text) } else { Err(text) }
}

fn between<'a>(text: &'a str, tag: &str) -> &'a str {
    let open = format!("<{tag}>");
    let start = text.find(&open).unwrap_or_else(|| panic!("no {tag} in {text}")) + open.len();
    &text[start..start + text[start..].find('<').unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_outlives_kill_9_of_control() {
    let mut daemon = Daemon::start(&[]);
    let agent = Agent::start(daemon.control()).await;
    let form = format!("Action=RegisterImage&Name=crash&ImageLocation={IMAGE}");
    let image = between(&call(&daemon, &form).await.unwrap(), "imageId").to_owned();
    let run = |token: usize| {
        format!(
            "Action=RunInstances&ImageId={image}&MinCount=1&MaxCount=1&InstanceType=t3.nano&ClientToken=t{token}"
        )
    };
    let mut made: Vec<(usize, String)> = Vec::new();
    for round in 0..4 {
        for token in round * 3..round * 3 + 3 {
            let text = call(&daemon, &run(token)).await.unwrap();
            made.push((token, between(&text, "instanceId").to_owned()));
        }
        // One more is under way when the daemon dies; whether it is there
        // afterwards is open, that it is there once is not.
        let torn = run(100 + round);
        let (asked, ()) = tokio::join!(call(&daemon, &torn), async {
            tokio::time::sleep(std::time::Duration::from_millis(round as u64 * 2)).await;
        });
        daemon.kill();
        daemon.restart();
        for (token, id) in &made {
            let again = call(&daemon, &run(*token)).await.unwrap();
            assert_eq!(between(&again, "instanceId"), id, "token t{token}");
            let shown = call(&daemon, &format!("Action=DescribeInstances&InstanceId.1={id}")).await;
            assert!(shown.is_ok(), "{shown:?}");
        }
        let again = call(&daemon, &torn).await.unwrap();
        if let Ok(first) = asked {
            assert_eq!(between(&first, "instanceId"), between(&again, "instanceId"));
        }
    }
    drop(agent);
    let key = daemon.control().access_key().await.unwrap();
    let file = std::fs::read_to_string(daemon.credentials()).unwrap();
    assert!(file.contains(&key.secret_access_key));
    let mode = std::fs::metadata(daemon.credentials()).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);
}
