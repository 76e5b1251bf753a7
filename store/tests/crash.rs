//! kill -9 in the middle of writing: what was answered is there.
//!
//! The test starts itself as the writer, with the store's path in the
//! environment; the writer says each transaction's number once it is answered.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use store::{Embedded, Op, Store, Txn};

const WRITER: &str = "HOSTPLANE_CRASH_WRITER";

#[test]
fn what_was_answered_outlives_kill_9() {
    if let Some(path) = std::env::var_os(WRITER) {
        return write_for_ever(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.redb");
    let mut answered = 0;
    for round in 0..6u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["what_was_answered_outlives_kill_9", "--exact", "--nocapture"])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // A different place in the stream each time.
        for line in lines.map_while(Result::ok).filter_map(|l| l.parse::<u64>().ok()) {
            answered = line;
            if line % 37 == round * 5 + 3 {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let found = read(&path);
        assert!(found >= answered, "{answered} was answered, {found} is there");
        assert!(found <= answered + 1000, "{found} is more than was written");
    }
    assert!(answered > 0);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Both keys change in one transaction: a half of one is never seen.
fn read(path: &Path) -> u64 {
    runtime().block_on(async {
        let store = Embedded::open(path, Arc::new(|| 0)).unwrap();
        let number = |entry: Option<store::KeyValue>| {
            entry.map_or(0, |e| String::from_utf8(e.value).unwrap().parse::<u64>().unwrap())
        };
        let a = number(store.get("a").await.unwrap());
        let b = number(store.get("b").await.unwrap());
        assert_eq!(a, b, "half a transaction");
        a
    })
}

fn write_for_ever(path: &Path) {
    runtime().block_on(async {
        let store = Embedded::open(path, Arc::new(|| 0)).unwrap();
        let mut number = match store.get("a").await.unwrap() {
            Some(entry) => String::from_utf8(entry.value).unwrap().parse::<u64>().unwrap(),
            None => 0,
        };
        loop {
            number += 1;
            let text = number.to_string();
            let then = vec![Op::put("a", text.clone()), Op::put("b", text)];
            store.txn(Txn { then, ..Txn::default() }).await.unwrap();
            println!("{number}");
        }
    });
}
