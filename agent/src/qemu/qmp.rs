//! A QMP client (docs/interop/qmp-spec.txt): one JSON object a line each way.
//!
//! ```text
//!   ◀ {"QMP": …}                      greeting
//!   ▶ {"execute": "qmp_capabilities"}
//!   ▶ {"execute": NAME, "arguments": …, "id": N}
//!   ◀ {"return": …, "id": N}  or  {"error": {"desc": …}, "id": N}  or  {"event": NAME, "data": …}
//! ```
//! QEMU is half trusted: a guest may have taken it over. So a line has a bound,
//! an answer has a deadline, and nothing that it says is believed beyond the
//! instance that it belongs to.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// The longest answer that we ask for is a list of some dozens of devices.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// QEMU answers in milliseconds; `blockdev-add` waits for the block server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long QEMU may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

const REQUESTS_MAX: usize = 64;
const EVENTS_MAX: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// QEMU understood and said no.
    #[error("{command}: {description}")]
    Refused { command: String, class: String, description: String },
    #[error("{command}: QEMU does not answer: {cause}")]
    Unavailable { command: String, cause: String },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

struct Request {
    command: String,
    arguments: Value,
    answer: oneshot::Sender<Result<Value, Error>>,
}

/// A connection; it ends when the last clone is dropped or QEMU closes it.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
}

impl Qmp {
    /// Connects and negotiates. Events come until the connection ends.
    pub async fn connect(socket: &Path) -> Result<(Self, mpsc::Receiver<Event>), Error> {
        let failed = |cause: String| Error::Unavailable { command: "connect".into(), cause };
        let stream = UnixStream::connect(socket).await.map_err(|e| failed(e.to_string()))?;
        let (read, write) = stream.into_split();
        let mut lines = Lines { reader: BufReader::new(read), line: Vec::new() };
        let greeting = tokio::time::timeout(GREETING_TIMEOUT, lines.next())
            .await
            .map_err(|_| failed("no greeting; another client may hold the socket".into()))?
            .ok_or_else(|| failed("it closed the connection".into()))?;
        if greeting.get("QMP").is_none() {
            return Err(failed("this is not QMP".into()));
        }
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        let (event_sender, events) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(converse(lines, write, inbox, event_sender));
        let qmp = Self { requests };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, events))
    }

    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let unavailable =
            |cause: &str| Error::Unavailable { command: command.into(), cause: cause.into() };
        let (answer, result) = oneshot::channel();
        let request = Request { command: command.into(), arguments, answer };
        self.requests.send(request).await.map_err(|_| unavailable("the connection is closed"))?;
        tokio::time::timeout(ANSWER_TIMEOUT, result)
            .await
            .map_err(|_| unavailable("no answer in time"))?
            .map_err(|_| unavailable("the connection was closed"))?
    }
}

struct Lines {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    /// Safe to drop while it waits: what was read stays in `line`.
    async fn next(&mut self) -> Option<Value> {
        let room = LINE_BYTES_MAX.saturating_sub(self.line.len() as u64);
        let n = (&mut self.reader).take(room).read_until(b'\n', &mut self.line).await.ok()?;
        if n == 0 || self.line.last() != Some(&b'\n') {
            return None;
        }
        let value = serde_json::from_slice(&self.line).ok();
        self.line.clear();
        value
    }
}

async fn converse(
    mut lines: Lines,
    mut write: OwnedWriteHalf,
    mut inbox: mpsc::Receiver<Request>,
    events: mpsc::Sender<Event>,
) {
    let mut waiting: HashMap<u64, (String, oneshot::Sender<Result<Value, Error>>)> = HashMap::new();
    let mut next_id = 0_u64;
    loop {
        tokio::select! {
            request = inbox.recv() => {
                let Some(request) = request else { return };
                next_id += 1;
                waiting.retain(|_, (_, answer)| !answer.is_closed());
                let mut text = json!({ "execute": request.command, "arguments": request.arguments, "id": next_id }).to_string();
                text.push('\n');
                waiting.insert(next_id, (request.command, request.answer));
                if write.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
            line = lines.next() => {
                let Some(line) = line else { return };
                if let Some(name) = line.get("event").and_then(Value::as_str) {
                    let data = line.get("data").cloned().unwrap_or_default();
                    // A reader that is gone or that lags means that nobody acts
                    // on events: close, and let the next connection look afresh.
                    if events.try_send(Event { name: name.to_owned(), data }).is_err() {
                        return;
                    }
                } else if let Some((command, answer)) = line.get("id").and_then(Value::as_u64).and_then(|id| waiting.remove(&id)) {
                    let _ = answer.send(meaning(command, &line));
                }
            }
        }
    }
}

fn meaning(command: String, line: &Value) -> Result<Value, Error> {
    if let Some(value) = line.get("return") {
        return Ok(value.clone());
    }
    let text = |key: &str| {
        line.pointer(key).and_then(Value::as_str).unwrap_or("unknown").chars().take(500).collect()
    };
    Err(Error::Refused { command, class: text("/error/class"), description: text("/error/desc") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn serve(listener: UnixListener, script: Vec<&'static str>) {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        write.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        for answer in script {
            lines.next_line().await.unwrap();
            write.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn answers_find_their_question_and_events_pass() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(serve(
            listener,
            vec![
                "{\"return\": {}, \"id\": 1}\n",
                "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true}}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 2}\n",
                "not json\n",
            ],
        ));
        let (qmp, mut events) = Qmp::connect(&path).await.unwrap();
        let refused = qmp.execute("device_del", json!({ "id": "x" })).await.unwrap_err();
        assert_eq!(refused.to_string(), "device_del: no");
        assert_eq!(events.recv().await.unwrap().name, "SHUTDOWN");
        assert!(matches!(qmp.execute("x", json!({})).await, Err(Error::Unavailable { .. })));
        assert!(events.recv().await.is_none());
    }
}
