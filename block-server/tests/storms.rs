//! Clients that mean ill, by the thousand, against the whole program: what they
//! cost is bounded and theirs.

mod fixture;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fixture::client::{Client, FUA, READ, TRIM, WRITE, request};
use fixture::{Bench, Server, engines, skip};
use sim::is_full;

/// What a server may hold with its connections all in use and nothing asked of it.
const RESIDENT_KIB_MAX: u64 = 128 << 10;

fn figure(server: &Server, file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/{file}", server.pid())).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

/// Waits until the server has as few descriptors as before.
fn settles_at(server: &Server, before: usize) {
    for _ in 0..200 {
        if descriptors(server) <= before {
            return;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    panic!("{} descriptors, {before} before", descriptors(server));
}

/// Beyond 64 that say nothing each newcomer ends another; the one that uses an export is served, and
/// when they are gone there is room again.
#[test]
fn ten_thousand_connections_cost_no_more_than_the_limit() {
    const TEST: &str = "ten_thousand_connections_cost_no_more_than_the_limit";
    const CONNECTIONS: usize = 10_000;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // The other tests of this program have theirs meanwhile.
    let wanted = CONNECTIONS as u64 + 4000;
    if files.maximum.is_some_and(|most| most < wanted) {
        return skip(TEST, &format!("RLIMIT_NOFILE cannot be raised to {wanted}"));
    }
    let raised = rustix::process::Rlimit { current: Some(wanted), ..files };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    for engine in engines() {
        let bench = Bench::new(4);
        let server = bench.serve(&["--engine", engine]);
        let mut good = Client::connect(&bench.socket(), "").unwrap();
        let before = descriptors(&server);
        let mut crowd = Vec::new();
        for number in 0..CONNECTIONS {
            crowd.push(UnixStream::connect(bench.socket()).unwrap());
            if number % 500 == 0 {
                good.call(READ, 0, 4096).unwrap();
            }
        }
        good.call(READ, 0, 4096).unwrap();
        let resident = figure(&server, "status", "VmRSS:");
        let open = descriptors(&server) - before;
        eprintln!("{engine}: {resident} KiB resident, {open} connections open");
        // Those for whom another came may not be gone yet.
        assert!(open < 64 + 8, "{engine}: {open} connections");
        assert!(resident < RESIDENT_KIB_MAX, "{engine}: {resident} KiB");
        drop(crowd);
        settles_at(&server, before);
        good.call(READ, 0, 4096).unwrap();
        Client::connect(&bench.socket(), "").unwrap().call(READ, 0, 4096).unwrap();
        server.terminate();
    }
}

/// A conversation that ends after each of its bytes, by hanging up or by half.
#[test]
fn a_conversation_may_end_after_any_byte() {
    for engine in engines() {
        let bench = Bench::new(1);
        let server = bench.serve(&["--engine", engine]);
        let mut good = Client::connect(&bench.socket(), "").unwrap();
        let before = descriptors(&server);
        let mut talk = 3_u32.to_be_bytes().to_vec();
        talk.extend_from_slice(b"IHAVEOPT\0\0\0\x63\0\0\0\x02no");
        talk.extend_from_slice(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        talk.extend_from_slice(b"IHAVEOPT\0\0\0\x07\0\0\0\x08\0\0\0\0\0\x01\0\x03");
        talk.extend(request(0, READ, 1, 0, 1024));
        talk.extend(request(1, WRITE, 2, 512, 512));
        talk.extend([9; 512]);
        talk.extend(request(0, TRIM, 3, 0, 4096));
        talk.extend(request(0, 2, 4, 0, 0));
        for end in 0..=talk.len() {
            let mut bad = UnixStream::connect(bench.socket()).unwrap();
            // The server may be gone already where the talk says goodbye.
            let _ = bad.write_all(&talk[..end]);
            if end % 2 == 0 {
                let _ = bad.shutdown(Shutdown::Write);
                bad.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                bad.read_to_end(&mut Vec::new()).unwrap();
            }
            drop(bad);
            if end % 16 == 0 {
                good.call(READ, 0, 4096).unwrap();
            }
        }
        settles_at(&server, before);
        assert!(figure(&server, "status", "VmRSS:") < RESIDENT_KIB_MAX);
        good.call(READ, 0, 4096).unwrap();
        server.terminate();
    }
}

/// Does harm until it is told to stop, on the export `bad`.
type Storm = fn(&Bench, &AtomicBool);

const STORMS: [(&str, Storm); 6] = [
    ("connections come and go", |bench, done| {
        let mut crowd = Vec::new();
        while !done.load(Ordering::Relaxed) {
            crowd.extend(UnixStream::connect(bench.socket()));
            if crowd.len() > 500 {
                crowd.clear();
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }),
    ("half requests", |bench, done| {
        while !done.load(Ordering::Relaxed) {
            let Ok(mut client) = Client::connect(&bench.socket(), "bad") else { continue };
            let _ = client.send(&request(0, WRITE, 1, 0, 32 << 20)[..17]);
            std::thread::sleep(Duration::from_millis(1));
        }
    }),
    ("slow readers", |bench, done| {
        let mut slow: Vec<Client> =
            (0..8).filter_map(|_| Client::connect(&bench.socket(), "bad").ok()).collect();
        for client in &mut slow {
            let _ = client.stream.set_nonblocking(true);
        }
        while !done.load(Ordering::Relaxed) {
            for client in &mut slow {
                let _ = client.send(&request(0, READ, 1, 0, 1 << 20));
                let _ = client.stream.read(&mut [0; 512]);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }),
    ("a trim storm", |bench, done| {
        let mut client = Client::connect(&bench.socket(), "bad").unwrap();
        while !done.load(Ordering::Relaxed) {
            let burst: Vec<u8> =
                (0..64_u64).flat_map(|n| request(0, TRIM, n, n * 37 % 500 * 8192, 4096)).collect();
            client.send(&burst).unwrap();
            (0..64).for_each(|_| assert_eq!(client.reply().unwrap().1, 0));
        }
    }),
    ("oversize writes", |bench, done| {
        while !done.load(Ordering::Relaxed) {
            let Ok(mut client) = Client::connect(&bench.socket(), "bad") else { continue };
            let _ = client.send(&request(0, WRITE, 1, 0, 40 << 20));
            let chunk = vec![0; 1 << 20];
            for _ in 0..40 {
                if done.load(Ordering::Relaxed) || client.send(&chunk).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }),
    ("unknown commands and flags", |bench, done| {
        let mut client = Client::connect(&bench.socket(), "bad").unwrap();
        let burst: Vec<u8> = (0..64_u16)
            .flat_map(|n| request(0xff00 | n, 9 + n, u64::from(n), u64::MAX, u32::MAX))
            .collect();
        while !done.load(Ordering::Relaxed) {
            client.send(&burst).unwrap();
            (0..64).for_each(|_| assert_eq!(client.reply().unwrap().1, 22));
        }
    }),
];

/// They go by pieces then: no byte of one may get lost or stand elsewhere, at edges within
/// a block neither, and durable ones stay whole.
#[test]
fn large_requests_are_whole_beside_another_volumes_small_ones() {
    const LENGTH: usize = (1 << 20) + 4096 + 700;
    for engine in engines() {
        let bench = Bench::new(8);
        let other = bench.path("other.img");
        std::fs::File::create(&other).unwrap().set_len(8 << 20).unwrap();
        let other = format!("other={}", other.display());
        let server = bench.serve(&["--engine", engine, "--export", &other]);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut small = Client::connect(&bench.socket(), "").unwrap();
                while !done.load(Ordering::Relaxed) {
                    small.call(READ, 0, 4096).unwrap();
                }
            });
            let mut large = Client::connect(&bench.socket(), "other").unwrap();
            let mut image = vec![0; 8 << 20];
            for round in 0..24_usize {
                let at = round * 299_993 % (image.len() - LENGTH);
                let bytes: Vec<u8> =
                    (0..LENGTH).map(|n| (n / 511 * 31 + round * 7) as u8).collect();
                let flags = if round % 3 == 0 { FUA } else { 0 };
                large.send(&request(flags, WRITE, round as u64, at as u64, LENGTH as u32)).unwrap();
                large.send(&bytes).unwrap();
                assert_eq!(large.reply().unwrap(), (round as u64, 0), "{engine}");
                image[at..at + LENGTH].copy_from_slice(&bytes);
                let from = round * 99_991 % (image.len() - 3 * LENGTH);
                let read = large.call(READ, from as u64, 3 * LENGTH as u32).unwrap();
                assert!(read == image[from..from + 3 * LENGTH], "{engine}: round {round}");
            }
            done.store(true, Ordering::Relaxed);
        });
        server.terminate();
    }
}

/// Every storm on one volume, while another is read: it is served throughout, and memory
/// is bounded. What a storm costs the other's p99: `./x bench block --rows beside`.
#[test]
fn storms_on_one_volume_leave_the_other_served() {
    let reads: u64 = if is_full() { 40_000 } else { 400 };
    for engine in engines() {
        let bench = Bench::new(8);
        let bad = bench.path("bad.img");
        std::fs::File::create(&bad).unwrap().set_len(8 << 20).unwrap();
        let bad = format!("bad={}", bad.display());
        let server = bench.serve(&["--engine", engine, "--export", &bad]);
        let mut good = Client::connect(&bench.socket(), "").unwrap();
        for (name, storm) in STORMS {
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| storm(&bench, &done));
                std::thread::sleep(Duration::from_millis(20));
                for n in 0..reads {
                    good.call(READ, n * 37 % 1000 * 4096, 4096).unwrap();
                }
                done.store(true, Ordering::Relaxed);
            });
            let resident = figure(&server, "status", "VmRSS:");
            eprintln!("{engine}: {name}: {resident} KiB resident");
            // Eight slow readers may hold 16 MiB each.
            assert!(resident < 400 << 10, "{engine}: {name}: {resident} KiB");
        }
        server.terminate();
    }
}
