//! Several threads: each file on one of them, and connections that find their way to
//! it, with whatever they had said already.

mod fixture;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use block_server::backing::{Backing, Cache};
use block_server::worker::{Access, Carried, EngineChoice, Front, Handle, Home, NewVolume, Served};
use fixture::certificates::{Certificates, uri};
use fixture::client::{Client, FLUSH, Ledger, READ, WRITE, request};
use fixture::wait::wait_for;
use fixture::{Bench, Server, engines, free_address, succeed, text};
use rpc::block::Quality;
use sim::Random;

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

const NAMES: [&str; 3] = ["a", "b", "c"];

/// A server with three exports of 4 MiB each, and what else is asked for.
fn serve(bench: &Bench, engine: &str, threads: usize, more: &[&str]) -> Server {
    let image = |name: &str| {
        let path = bench.path(&format!("{name}.img"));
        if !path.exists() {
            std::fs::write(&path, vec![0; 4 << 20]).unwrap();
        }
        format!("{name}={}", path.display())
    };
    let exports = NAMES.map(image);
    let (socket, threads) = (bench.socket(), threads.to_string());
    let mut arguments = vec!["serve", "--engine", engine, "--socket", text(&socket)];
    arguments.extend(["--threads", &threads]);
    arguments.extend(exports.iter().flat_map(|export| ["--export", export]));
    arguments.extend(more);
    Server::start(&arguments)
}

/// Nanoseconds that each thread has run (proc(5), `schedstat`), by its name.
fn run_times(server: &Server) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let time = |task: PathBuf| {
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap();
        let ran = read("schedstat").split_whitespace().next().unwrap().parse().unwrap();
        (read("comm").trim().to_owned(), ran)
    };
    tasks
        .map(|task| time(task.unwrap().path()))
        .filter(|(name, _)| name.strip_prefix("block-").is_some_and(|n| n.parse::<u8>().is_ok()))
        .collect()
}

#[test]
fn each_file_has_a_thread_that_serves_it() {
    for engine in engines() {
        for (threads, started) in [(1, 1), (2, 2), (8, 3)] {
            let bench = Bench::new(1);
            let server = serve(&bench, engine, threads, &[]);
            for (at, name) in NAMES.iter().enumerate() {
                let mut client = Client::connect(&bench.socket(), name).unwrap();
                client.call(READ, 0, 4096).unwrap();
                let before = run_times(&server);
                assert_eq!(before.len(), started, "{before:?}");
                for _ in 0..2000 {
                    client.call(READ, 0, 4096).unwrap();
                }
                let after = run_times(&server);
                let busiest = after.iter().max_by_key(|(thread, ran)| **ran - before[*thread]);
                assert_eq!(*busiest.unwrap().0, format!("block-{}", at % threads), "{name}");
            }
            server.terminate();
        }
    }
}

/// All that a client has to say in its life, sent in pieces of any size: requests that
/// come together with the handshake's last word are answered by another thread.
#[test]
fn what_comes_behind_the_handshake_goes_with_it() {
    const LONG: u32 = 192 << 10;
    for engine in engines() {
        let bench = Bench::new(1);
        let server = serve(&bench, engine, 3, &[]);
        for (round, name) in NAMES.iter().cycle().take(12).enumerate() {
            let byte = round as u8 + 1;
            let mut says = 3_u32.to_be_bytes().to_vec();
            says.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x01");
            says.extend_from_slice(name.as_bytes());
            says.extend(request(0, WRITE, 1, 512, 512));
            says.extend([byte; 512]);
            says.extend(request(0, WRITE, 2, 4096, LONG));
            says.extend(vec![byte; LONG as usize]);
            says.extend(request(0, FLUSH, 3, 0, 0));
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let pieces = [says.len(), 1, 35, 36, 37, 63, 64, 65, 600, 4000, 70_000, 7];
            // The beginning in small pieces, since so few are enough.
            let (small, rest) = says.split_at(1000);
            for piece in small.chunks(pieces[round]) {
                stream.write_all(piece).unwrap();
            }
            stream.write_all(rest).unwrap();
            stream.read_exact(&mut [0; 18 + 10]).unwrap();
            let mut client = Client { stream, size: 4 << 20 };
            let mut answered: Vec<(u64, u32)> = (0..3).map(|_| client.reply().unwrap()).collect();
            answered.sort_unstable();
            assert_eq!(answered, [(1, 0), (2, 0), (3, 0)], "round {round}");
            assert_eq!(client.call(READ, 512, 512).unwrap(), [byte; 512], "round {round}");
            let long = client.call(READ, 4096, LONG).unwrap();
            assert!(long.iter().all(|b| *b == byte), "round {round}");
        }
        server.terminate();
    }
}

/// Two floods, each on a thread of its own: their requests wait for their turns, as they
/// would on one thread. One alone never waits.
#[test]
fn volumes_take_turns_on_whichever_threads() {
    const DEPTH: usize = 16;
    const LENGTH: u32 = 1 << 20;
    const ROUNDS_MAX: usize = 1000;
    for engine in engines() {
        let bench = Bench::new(1);
        let metrics = bench.path("metrics.sock");
        let server = serve(&bench, engine, 2, &["--metrics", text(&metrics)]);
        let waited = |name: &str| -> u64 {
            let told = fixture::metrics(&metrics).unwrap();
            let path = bench.path(&format!("{name}.img"));
            let start = format!(
                "hostplane_volume_throttled_operations_total{{volume=\"{}\"}} ",
                path.display()
            );
            let count = told.lines().find_map(|line| line.strip_prefix(&start));
            count.unwrap_or_else(|| panic!("{told}")).parse().unwrap()
        };
        // Up to so many rounds, until it is over.
        let flood = |name: &str, rounds: usize, is_over: &dyn Fn() -> bool| {
            let mut client = Client::connect(&bench.socket(), name).unwrap();
            let mut replies = vec![0; DEPTH * (16 + LENGTH as usize)];
            for _ in 0..rounds {
                let burst: Vec<u8> =
                    (0..DEPTH as u64).flat_map(|at| request(0, READ, at, 0, LENGTH)).collect();
                client.send(&burst).unwrap();
                client.stream.read_exact(&mut replies).unwrap();
                if is_over() {
                    break;
                }
            }
        };
        flood("a", 8, &|| false);
        assert_eq!(waited("a"), 0, "nobody was beside it");
        let have_both_waited = || waited("a") > 0 && waited("b") > 0;
        std::thread::scope(|scope| {
            let flood = &flood;
            for name in ["a", "b"] {
                scope.spawn(move || flood(name, ROUNDS_MAX, &have_both_waited));
            }
        });
        assert!(have_both_waited(), "{} and {}", waited("a"), waited("b"));
        server.terminate();
    }
}

/// Each successor has another number of threads, while clients write and keep account,
/// and others come, ask and go: none of them sees an error or an end.
#[test]
fn threads_come_and_go_under_verified_load() {
    const BLOCKS: usize = 256;
    for engine in engines() {
        let bench = Bench::new(1);
        let upgrades = bench.path("upgrade.sock");
        let more = ["--take-over", text(&upgrades)];
        let mut server = serve(&bench, engine, 1, &more);
        let done = AtomicBool::new(false);
        let turns: [AtomicU64; 6] = Default::default();
        let socket = bench.socket();
        std::thread::scope(|scope| {
            for (at, name) in NAMES.into_iter().enumerate() {
                let (done, socket) = (&done, &socket);
                let (writes, comes) = (&turns[at], &turns[at + 3]);
                scope.spawn(move || {
                    let mut client = Client::connect(socket, name).unwrap();
                    let mut ledger = Ledger::new(0, BLOCKS);
                    let mut random = Random::new(at as u64);
                    while !done.load(Ordering::Relaxed) {
                        let burst = ledger.burst(&mut client, &mut random, |_| ());
                        burst.expect("no error and no reconnection");
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                    ledger.verify(&mut client, "at the end", |l, i| l.acknowledged[i]).unwrap();
                });
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let mut client = Client::connect(socket, name).expect("it is let in");
                        client.call(READ, 3 << 20, 4096).expect("it is served");
                        comes.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for threads in [2, 3, 1, 3, 2, 2, 1, 3, 2, 1] {
                let before: Vec<u64> = turns.iter().map(|t| t.load(Ordering::Relaxed)).collect();
                wait_for("every client goes on", PATIENCE, || {
                    turns.iter().zip(&before).all(|(t, was)| t.load(Ordering::Relaxed) > was + 1)
                });
                let successor = serve(&bench, engine, threads, &more);
                std::mem::replace(&mut server, successor).ended();
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(run_times(&server).len(), 1);
        server.terminate();
    }
}

/// Who fills an export's places keeps nobody from another one, on the same socket.
#[test]
fn an_export_without_places_keeps_nobody_from_another() {
    for engine in engines() {
        let bench = Bench::new(1);
        let server = serve(&bench, engine, 3, &[]);
        let come = |name: &str| {
            let mut client = Client::connect(&bench.socket(), name).ok()?;
            client.send(&request(0, READ, 5, 0, 512)).ok()?;
            client.reply().ok()?;
            client.stream.read_exact(&mut [0; 512]).ok()?;
            Some(client)
        };
        for name in ["b", "a"] {
            let served: Vec<Client> = (0..80).filter_map(|_| come(name)).collect();
            assert_eq!(served.len(), 64, "of {name}");
            assert!(come("c").is_some(), "beside a full {name}");
            drop(served);
            wait_for("there are places again", PATIENCE, || come(name).is_some());
        }
        server.terminate();
    }
}

fn served(name: &str, volume: u32, home: Option<Home>) -> Served {
    Served {
        name: name.to_owned(),
        volume,
        size: 1 << 20,
        read_only: false,
        generation: 0,
        description: String::new(),
        clients: None,
        connections: Arc::default(),
        home,
    }
}

/// A hand-over that came to nothing: who was sent to a thread that stood still already is
/// served once it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_sent_to_a_thread_that_stands_still_is_served_when_it_goes_on() {
    let bench = Bench::new(1);
    let (events, _) = tokio::sync::mpsc::unbounded_channel();
    let threads = Handle::start(2, EngineChoice::Auto, &events).unwrap();
    let [door, home] = &threads[..] else { unreachable!("two were asked for") };
    let backing = Backing::open_cached(&bench.image(), false, Cache::Writeback).unwrap();
    let volume = NewVolume {
        name: "b".to_owned(),
        fd: backing.fd,
        geometry: backing.geometry,
        generation: 0,
        counters: Arc::default(),
        limits: Quality::default().limits(0).unwrap(),
        carried: Carried::default(),
    };
    let volume = home.add_volume(volume).await.unwrap();
    let (nbd, anyone) = (Front::Nbd, Access::Anyone);
    let own = vec![served("b", volume, None)];
    let listener = home.add_listener(None, nbd, anyone.clone(), own).await.unwrap();
    let sent_on = served("b", volume, Some(Home { door: home.door(), listener }));
    let socket = UnixListener::bind(bench.socket()).unwrap();
    door.add_listener(Some(socket.into()), nbd, anyone, vec![sent_on]).await.unwrap();

    assert!(home.park().await.unwrap().connections.is_empty());
    let path = bench.socket();
    let client = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&path, "b")?;
        client.call(READ, 0, 4096)
    });
    // Sent on, and answered by nobody: the handshake's last word is the home's to send.
    while home.connections().await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!client.is_finished(), "nobody is served by a thread that stands still");
    home.add_connections(Vec::new()).unwrap();
    assert_eq!(client.await.unwrap().unwrap(), [0; 4096]);
    for worker in [&door, &home] {
        worker.begin_stop();
        worker.await_stop();
    }
}

/// TLS goes to the other thread as it stands.
#[test]
fn tls_goes_with_its_connection() {
    const TEST: &str = "tls_goes_with_its_connection";
    for engine in engines() {
        let bench = Bench::new(1);
        let Some(certificates) = Certificates::new(TEST, &bench) else { return };
        let folder = certificates.client("ca", "host", "DNS:host");
        let server_folder = bench.path("server");
        std::fs::copy(bench.path("ca/ca-cert.pem"), server_folder.join("ca-cert.pem")).unwrap();
        let free = free_address();
        let tcp = free.to_string();
        let more = ["--tcp", &tcp, "--tls-certificates", text(&server_folder)];
        let server = serve(&bench, engine, 3, &more);
        let mut random = Random::new(5);
        for name in NAMES {
            let bytes: Vec<u8> =
                (0..(4 << 20) / 8).flat_map(|_| random.next().to_le_bytes()).collect();
            let source = bench.path("source");
            std::fs::write(&source, &bytes).unwrap();
            let place = uri(free.port(), name, &folder);
            let copy = ["--connections=4", "--flush", text(&source), &place];
            let Some(_) = succeed(TEST, "nbdcopy", &copy) else { return };
            let image = std::fs::read(bench.path(&format!("{name}.img"))).unwrap();
            assert!(image == bytes, "{engine}: {name} differs");
        }
        server.terminate();
    }
}
