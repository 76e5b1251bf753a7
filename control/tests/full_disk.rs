//! A full disk: what cannot be recorded is refused and changes nothing, what was
//! acknowledged is there, and with room the same daemon goes on.

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

/// The status, and what was said.
async fn create(daemon: &Daemon, name: &str) -> (u16, String) {
    let form = format!("Action=CreateSecurityGroup&GroupName={name}&GroupDescription=d");
    let request = http::Request::post("/").header("host", "x");
    let request = request.body(Full::new(Bytes::from(form))).unwrap();
    let (status, body) = daemon.control().send(request).await.unwrap();
    (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
}

async fn groups(daemon: &Daemon) -> usize {
    let request = http::Request::get("/?Action=DescribeSecurityGroups").header("host", "x");
    let request = request.body(Full::new(Bytes::new())).unwrap();
    let (_, body) = daemon.control().send(request).await.unwrap();
    String::from_utf8_lossy(&body).matches("<groupName>g").count()
}

/// Creates groups until one is refused; gives how many there are then.
async fn create_until_refused(daemon: &Daemon, first: usize) -> usize {
    for number in first..first + 2000 {
        let (status, told) = create(daemon, &format!("g{number}")).await;
        if status != 200 {
            assert_eq!(status, 500, "{told}");
            assert!(told.contains("<Code>InternalError</Code>"), "{told}");
            assert!(told.contains("nothing was changed"), "{told}");
            return number;
        }
    }
    panic!("2000 groups on a disk that is full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_changes_and_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let Some(small) = Small::mount(&state) else {
        let reason = "cannot mount a tmpfs (root is needed)";
        const TEST: &str = "a_full_disk_refuses_changes_and_loses_nothing_that_was_acknowledged";
        return sim::skip(TEST, reason);
    };
    let mut daemon = Daemon::start_in(folder, &[]);
    let mut acknowledged = 0;
    while acknowledged < 20 {
        assert_eq!(create(&daemon, &format!("g{acknowledged}")).await.0, 200);
        acknowledged += 1;
    }
    for round in 0..3 {
        // Fills what is left; that it does not fit whole is the point.
        let _ = std::fs::write(state.join("fill"), vec![0; 4 << 20]);
        acknowledged = create_until_refused(&daemon, acknowledged).await;
        // Opened anew it may have found a page; what is told is what is there.
        for _ in 0..3 {
            let (status, told) = create(&daemon, &format!("g{acknowledged}")).await;
            assert!(status == 200 || status == 500, "{told}");
            acknowledged += usize::from(status == 200);
        }
        assert_eq!(groups(&daemon).await, acknowledged, "round {round}");
        if round == 1 {
            // Nor does a crash bring back what was refused.
            daemon.kill();
            std::fs::remove_file(state.join("fill")).unwrap();
            daemon.restart();
            assert_eq!(groups(&daemon).await, acknowledged, "after a crash");
        } else {
            std::fs::remove_file(state.join("fill")).unwrap();
        }
        let (status, told) = create(&daemon, &format!("g{acknowledged}")).await;
        assert_eq!(status, 200, "round {round}, with room: {told}");
        acknowledged += 1;
        assert_eq!(groups(&daemon).await, acknowledged);
    }
    assert!(daemon.log().contains("No space left"), "{}", daemon.log());
    daemon.kill();
    daemon.restart();
    assert_eq!(groups(&daemon).await, acknowledged);
    daemon.kill();
    drop(small);
}
