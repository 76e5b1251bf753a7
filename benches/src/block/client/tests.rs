//! The client against a server of a few lines: what it counts is what was answered.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::super::address::Address;
use super::super::load::{Deed, Load};
use super::{Client, run};

const SIZE: u64 = 1 << 20;

fn greet(socket: &mut UnixStream) {
    socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    let mut hello = [0; 28];
    socket.read_exact(&mut hello).unwrap();
    let reply = |kind: u32, data: &[u8]| {
        let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &7_u32.to_be_bytes()].concat();
        [&head[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 1]].concat();
    socket.write_all(&reply(3, &export)).unwrap();
    socket.write_all(&reply(1, &[])).unwrap();
}

/// Answers until the client says goodbye; how many requests there were.
fn serve(mut socket: UnixStream, error: u32) -> u64 {
    greet(&mut socket);
    let mut count = 0;
    loop {
        let mut request = [0; 28];
        if socket.read_exact(&mut request).is_err() {
            return count;
        }
        let (command, length) =
            (request[7], u32::from_be_bytes(*request[24..].first_chunk().unwrap()));
        let offset = u64::from_be_bytes(*request[16..24].first_chunk().unwrap());
        assert!(offset + u64::from(length) <= SIZE);
        let mut data = vec![0; length as usize];
        match command {
            0 => {}
            1 => socket.read_exact(&mut data).unwrap(),
            _ => return count,
        }
        count += 1;
        let head = [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &request[8..16]];
        let mut reply = head.concat();
        reply.extend(if command == 0 { &data[..] } else { &[] });
        if socket.write_all(&reply).is_err() {
            return count;
        }
    }
}

fn load_against(load: Load, error: u32) -> (anyhow::Result<super::Done>, u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let servers: Vec<_> = (0..load.connections)
        .map(|_| {
            let listener = listener.try_clone().unwrap();
            std::thread::spawn(move || serve(listener.accept().unwrap().0, error))
        })
        .collect();
    let done = run(&Address::Unix(path), load, Duration::from_millis(50));
    (done, servers.into_iter().map(|server| server.join().unwrap()).sum())
}

#[test]
fn each_answer_is_counted_once_whatever_its_size() {
    for (deed, block_bytes, depth, connections) in [
        (Deed::Read, 4096, 64, 1),
        (Deed::Write, 4096, 64, 1),
        (Deed::Read, 4096, 16, 4),
        (Deed::Read, 1 << 20, 8, 1),
        (Deed::Write, 1 << 20, 8, 1),
    ] {
        let (done, served) = load_against(Load { deed, block_bytes, depth, connections }, 0);
        let done = done.unwrap();
        assert_eq!(done.operations, served);
        assert!(served >= u64::from(depth * connections));
        assert!(done.p50_us > 0.0 && done.p50_us <= done.p99_us && done.iops > 0.0);
    }
}

#[test]
fn an_error_is_no_operation() {
    let load = Load { deed: Deed::Read, block_bytes: 4096, depth: 1, connections: 1 };
    let (done, _) = load_against(load, 5);
    assert!(done.unwrap_err().to_string().contains("error 5"));
}

#[test]
fn an_export_is_asked_for_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut socket = listener.accept().unwrap().0;
        socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
        // Flags, magic, GO, its length; the name's length, the name, one information.
        let mut hello = [0; 34];
        socket.read_exact(&mut hello).unwrap();
        hello
    });
    let load = Load { deed: Deed::Read, block_bytes: 4096, depth: 1, connections: 1 };
    // The server goes away without an answer.
    assert!(Client::open(&Address::Unix(path), "beside", load).is_err());
    let hello = server.join().unwrap();
    assert_eq!(hello[16..20], 14_u32.to_be_bytes());
    assert_eq!(hello[20..24], 6_u32.to_be_bytes());
    assert_eq!(hello[24..30], *b"beside");
}
