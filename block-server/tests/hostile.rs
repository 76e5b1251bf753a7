//! Peers that mean ill harm only their own connection.

mod fixture;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fixture::{Bench, engines, free_address};
use sim::Random;

fn connect(bench: &Bench) -> UnixStream {
    let stream = UnixStream::connect(bench.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// Through the handshake with the default export, by EXPORT_NAME.
fn enter(stream: &mut UnixStream) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    greet(stream, greeting);
}

fn greet(stream: &mut UnixStream, greeting: [u8; 18]) {
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
}

fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// A read of one block; how long it took.
fn read_block(stream: &mut UnixStream) -> Duration {
    let start = now();
    stream.write_all(&request(0, 7, 0, 4096)).unwrap();
    let mut reply = [0; 16 + 4096];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..16], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
    start.elapsed()
}

#[expect(clippy::disallowed_methods, reason = "a test against a real program takes real time")]
fn now() -> Instant {
    Instant::now()
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn noise_closes_its_own_connection_and_nothing_else() {
    for engine in engines() {
        let bench = Bench::new(4);
        let server = bench.serve(&["--engine", engine]);
        let mut good = connect(&bench);
        enter(&mut good);
        let seed = sim::seed_from_environment();
        eprintln!("SEED={seed}");
        let mut random = Random::new(seed);
        for round in 0..150 {
            let mut bad = connect(&bench);
            if round % 2 == 0 {
                enter(&mut bad);
            }
            let mut noise: Vec<u8> =
                (0..1 + random.below(400)).map(|_| random.next() as u8).collect();
            if round % 4 == 0 {
                // A lawful beginning, so that it gets further in.
                noise.splice(0..0, request(random.below(9) as u16, 1, 0, random.next() as u32));
            }
            // The server may have hung up already.
            let _ = bad.write_all(&noise);
            if round % 3 == 0 {
                read_block(&mut good);
            }
        }
        read_block(&mut good);
        server.terminate();
    }
}

/// Slow readers, half requests and silent peers: the others are served on, and
/// what the server holds for them is bounded.
#[test]
fn idlers_neither_stall_the_others_nor_fill_the_memory() {
    for engine in engines() {
        let bench = Bench::new(64);
        let server = bench.serve(&["--engine", engine]);
        let mut good = connect(&bench);
        enter(&mut good);
        let mut idlers = Vec::new();
        for kind in 0..48 {
            let mut idler = connect(&bench);
            match kind % 4 {
                // Says nothing at all.
                0 => {}
                // Half an option.
                1 => idler.write_all(b"\0\0\0\x03IHAVE").unwrap(),
                // Announces 32 MiB and sends a little.
                2 => {
                    enter(&mut idler);
                    idler.write_all(&request(1, 1, 0, 32 << 20)).unwrap();
                    idler.write_all(&[1; 100]).unwrap();
                }
                // Asks for much and reads nothing.
                _ => {
                    enter(&mut idler);
                    idler.set_nonblocking(true).unwrap();
                    for cookie in 0..20_000 {
                        if idler.write_all(&request(0, cookie, 0, 1 << 20)).is_err() {
                            break;
                        }
                    }
                }
            }
            idlers.push(idler);
        }
        std::thread::sleep(Duration::from_millis(300));
        let mut times: Vec<Duration> = (0..200).map(|_| read_block(&mut good)).collect();
        times.sort_unstable();
        eprintln!("{engine}: median {:?}, slowest {:?}", times[100], times[199]);
        // Generous: a stalled reader waits for ever, a busy machine does not.
        assert!(times[100] < Duration::from_secs(5), "{engine}: {:?}", times[100]);
        let resident = resident_kib(server.pid());
        eprintln!("{engine}: {resident} KiB resident");
        // Twelve greedy readers may hold 16 MiB each, and what they announced but
        // did not send is not touched.
        assert!(resident < 400 << 10, "{engine}: {resident} KiB");
        drop(idlers);
        read_block(&mut good);
        server.terminate();
    }
}

/// The server notices in its own time that connections have ended.
fn connect_when_there_is_room(bench: &Bench) -> UnixStream {
    for _ in 0..600 {
        let mut stream = connect(bench);
        let mut greeting = [0; 18];
        if stream.read_exact(&mut greeting).is_ok() {
            greet(&mut stream, greeting);
            return stream;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("no room again in 30 s");
}

/// The default export by EXPORT_NAME; whether the server let it in.
fn may_enter(stream: &mut UnixStream) -> bool {
    let mut answer = [0; 28];
    // One that was ended may be so at each of these.
    let _ = stream.write_all(&[0, 0, 0, 3]);
    let _ = stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
    stream.read_exact(&mut answer).is_ok()
        && stream.write_all(&request(0, 7, 0, 512)).is_ok()
        && stream.read_exact(&mut [0; 16 + 512]).is_ok()
}

#[test]
fn connections_beyond_the_limit_are_closed_and_the_limit_is_regained() {
    for engine in engines() {
        let bench = Bench::new(4);
        let _server = bench.serve(&["--engine", engine]);
        let mut all: Vec<UnixStream> = (0..300).map(|_| connect(&bench)).collect();
        let served = all.iter_mut().filter_map(|s| may_enter(s).then_some(())).count();
        assert!((1..=64).contains(&served), "{served}");
        let mut more: Vec<UnixStream> = (0..100).map(|_| connect(&bench)).collect();
        let more_served = more.iter_mut().filter_map(|s| may_enter(s).then_some(())).count();
        assert_eq!(served + more_served, 64, "one more is one too many");
        drop((all, more));
        let mut again = connect_when_there_is_room(&bench);
        read_block(&mut again);
    }
}

/// Through the handshake slowly: `between` goes on after the greeting.
fn come_in_over(stream: &mut TcpStream, between: impl FnOnce()) {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    between();
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 10]).expect("it is let in");
    stream.write_all(&request(0, 7, 0, 512)).unwrap();
    stream.read_exact(&mut [0; 16 + 512]).expect("it is served");
}

/// A connection from another address of this host.
fn connect_from(source: &str, to: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let stream = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&stream, &SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    connect(&stream, &to).unwrap();
    stream.into()
}

/// Hundreds that say nothing, or only a little, hold all places of those who have
/// not come to use an export: whoever comes then is served, and one who takes his
/// time is not ended for a flood from another address.
#[test]
fn silent_strangers_keep_nobody_out() {
    for engine in engines() {
        let bench = Bench::new(4);
        let free = free_address();
        let server = bench.serve(&["--engine", engine, "--tcp", &free.to_string()]);
        let strangers = |count| {
            let come = |number| {
                let mut stranger = connect_from("127.0.0.2", free);
                if number % 2 == 0 {
                    // It may be ended already.
                    let _ = stranger.write_all(&[0, 0, 0, 3]);
                }
                stranger
            };
            (0..count).map(come).collect::<Vec<_>>()
        };
        let first = strangers(200);
        come_in_over(&mut TcpStream::connect(free).unwrap(), || ());
        let mut served = connect_from("127.0.0.2", free);
        come_in_over(&mut served, || ());
        let mut more = Vec::new();
        come_in_over(&mut TcpStream::connect(free).unwrap(), || more = strangers(200));
        // Who uses an export stays.
        served.write_all(&request(0, 7, 0, 512)).unwrap();
        served.read_exact(&mut [0; 16 + 512]).unwrap();
        let files = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
        assert!(files < 64 + 64 + 40, "{engine}: {files} descriptors");
        drop((first, more));
        server.terminate();
    }
}
