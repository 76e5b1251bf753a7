//! A full disk: what was acknowledged is there, the daemon says why it ends, and
//! goes on when there is room.

mod daemon;

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use daemon::Daemon;
use http_body_util::Full;

/// A file system of a few mebibytes, unmounted at the end.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        let mut command = Command::new("mount");
        let mounted = command.args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"]).arg(at);
        mounted.status().is_ok_and(|s| s.success()).then_some(Self(at))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

async fn create(daemon: &Daemon, name: &str) -> bool {
    let form = format!("Action=CreateSecurityGroup&GroupName={name}&GroupDescription=d");
    let request = http::Request::post("/").header("host", "x");
    let request = request.body(Full::new(Bytes::from(form))).unwrap();
    daemon.control().send(request).await.is_ok_and(|(status, _)| status.is_success())
}

async fn groups(daemon: &Daemon) -> usize {
    let request = http::Request::get("/?Action=DescribeSecurityGroups").header("host", "x");
    let request = request.body(Full::new(Bytes::new())).unwrap();
    let (_, body) = daemon.control().send(request).await.unwrap();
    String::from_utf8_lossy(&body).matches("<groupName>g").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let Some(small) = Small::mount(&state) else {
        let reason = "cannot mount a tmpfs (root is needed)";
        return daemon::skip("a_full_disk_loses_nothing_that_was_acknowledged", reason);
    };
    let mut daemon = Daemon::start_in(folder, &[]);
    let mut acknowledged = 0;
    while acknowledged < 2000 && create(&daemon, &format!("g{acknowledged}")).await {
        acknowledged += 1;
        if acknowledged == 20 {
            // Fills what is left; that it does not fit whole is the point.
            let _ = std::fs::write(state.join("fill"), vec![0; 4 << 20]);
        }
    }
    assert!((20..2000).contains(&acknowledged), "{acknowledged}");
    assert!(!daemon.await_end().success());
    assert!(daemon.log().contains("must be opened anew"), "{}", daemon.log());
    std::fs::remove_file(state.join("fill")).unwrap();
    daemon.restart();
    // The one that failed may be there or not.
    let there = groups(&daemon).await;
    assert!(there == acknowledged || there == acknowledged + 1, "{there} of {acknowledged}");
    assert!(create(&daemon, "after").await);
    daemon.kill();
    drop(small);
}
