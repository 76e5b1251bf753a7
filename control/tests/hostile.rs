//! Bytes that no client sends: each gets an answer or a closed connection, and
//! nothing changes.

mod daemon;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use daemon::Daemon;
use http_body_util::Full;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// What the server says to these bytes, followed by the end of the stream.
fn exchange(endpoint: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(endpoint).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // It may hang up before it has read all: that is an answer too.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

const GOOD: &str = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 56\r\nAuthorization: AWS4-HMAC-SHA256 Credential=A/20260101/local-1/ec2/aws4_request, SignedHeaders=host;x-amz-date, Signature=00\r\nX-Amz-Date: 20260101T000000Z\r\n\r\nAction=RunInstances&MinCount=1&MaxCount=1&ImageId=ami-12";

fn seed() -> u64 {
    let given = std::env::var("HOSTPLANE_SEED").ok().and_then(|s| s.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("seed {seed}");
    seed
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_gets_an_error_and_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let before = daemon.control().control_status().await.unwrap().revision;
    let mut dice = Dice(seed());
    for _ in 0..300 {
        let mut bytes = GOOD.as_bytes().to_vec();
        for _ in 0..=dice.roll(6) {
            let at = dice.roll(bytes.len() as u64) as usize;
            match dice.roll(4) {
                0 => bytes[at] = dice.roll(256) as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, dice.roll(256) as u8),
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                bytes.push(b'x');
            }
        }
        let answer = exchange(daemon.endpoint, &bytes);
        assert!(
            !answer.starts_with("HTTP/1.1 200"),
            "{answer}\nto {:?}",
            bytes.escape_ascii().to_string()
        );
        assert!(
            !answer.starts_with("HTTP/1.1 5"),
            "{answer}\nto {:?}",
            bytes.escape_ascii().to_string()
        );
    }
    let unsigned =
        exchange(daemon.endpoint, b"GET /?Action=DescribeVpcs HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(unsigned.contains("<Code>MissingAuthenticationToken</Code>"), "{unsigned}");
    let huge = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{}",
        3 << 20,
        "a".repeat(3 << 20)
    );
    let huge = exchange(daemon.endpoint, huge.as_bytes());
    assert!(huge.is_empty() || huge.contains("RequestEntityTooLarge"), "{huge}");
    let other = exchange(daemon.endpoint, b"GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(other.starts_with("HTTP/1.1 404"), "{other}");
    assert_eq!(daemon.control().control_status().await.unwrap().revision, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_its_half_still_gets_its_answer() {
    let daemon = Daemon::start(&[]);
    for _ in 0..500 {
        let answer =
            exchange(daemon.endpoint, b"GET /?Action=DescribeVpcs HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.contains("<Code>MissingAuthenticationToken</Code>"), "{answer}");
    }
}

/// Past the signature, where more code is reached: random forms on the control
/// socket, made of words that the API knows.
#[tokio::test(flavor = "multi_thread")]
async fn nonsense_forms_get_an_error_and_change_nothing() {
    let daemon = Daemon::start(&[]);
    let before = daemon.control().control_status().await.unwrap().revision;
    let mut dice = Dice(seed());
    let words = [
        "Filter",
        "Name",
        "Value",
        "1",
        "2",
        "0",
        "InstanceId",
        "VolumeId",
        "Tag",
        "Key",
        "Ebs",
        "BlockDeviceMapping",
        "IpPermissions",
        "IpRanges",
        "CidrIp",
        "",
        "ñ",
        "%00",
        "%zz",
        "+",
        "ResourceId",
        "GroupId",
        "MaxResults",
        "NextToken",
        "DryRun",
        "Device",
        "SecurityGroupId",
    ];
    let values = [
        "",
        "1",
        "-1",
        "true",
        "i-00000000000000001",
        "sg-1",
        "%ff",
        "99999999999999999999",
        "*",
        "a",
    ];
    for _ in 0..400 {
        let action =
            &control::core::ACTIONS[dice.roll(control::core::ACTIONS.len() as u64) as usize];
        // A change must not come about by chance: it gets a word too many.
        let spoiled = if action.reads() { "" } else { "&Nonsense=1" };
        let mut form = format!("Action={}{spoiled}", action.name);
        for _ in 0..dice.roll(6) {
            form.push('&');
            for part in 0..=dice.roll(4) {
                if part > 0 {
                    form.push('.');
                }
                form.push_str(words[dice.roll(words.len() as u64) as usize]);
            }
            form.push('=');
            form.push_str(values[dice.roll(values.len() as u64) as usize]);
        }
        let request = http::Request::post("/").header("host", "x");
        let request = request.body(Full::new(Bytes::from(form.clone()))).unwrap();
        let (status, body) = daemon.control().send(request).await.unwrap();
        let body = String::from_utf8_lossy(&body).into_owned();
        let read = action.reads() && status.is_success();
        assert!(status.is_client_error() || read, "{form}: {status} {body}");
        assert!(read || body.contains("<Errors><Error><Code>"), "{form}: {body}");
    }
    assert_eq!(daemon.control().control_status().await.unwrap().revision, before);
}
