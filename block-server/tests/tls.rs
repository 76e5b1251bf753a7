//! TLS 1.3 with certificates on both sides: other people's clients come in, and
//! whoever should not does not.

mod fixture;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fixture::certificates::{Certificates, uri};
use fixture::{Bench, Server, engines, free_address, run, skip, succeed, text};

fn free_port() -> u16 {
    free_address().port()
}

/// A server with an export for all who have a certificate and one for `host-a`.
fn serve(bench: &Bench, engine: &str, port: u16) -> Server {
    Server::start(&["serve", "--config", text(&config(bench, engine, port, ""))])
}

/// Its file; `more` joins the table of TLS.
fn config(bench: &Bench, engine: &str, port: u16, more: &str) -> PathBuf {
    let other = bench.path("other.img");
    std::fs::write(&other, vec![7; 1 << 20]).unwrap();
    let config = bench.path("serve.toml");
    let document = format!(
        "engine = \"{engine}\"\n\
         [tls]\ncertificate = \"{root}/server/server-cert.pem\"\n\
         key = \"{root}/server/server-key.pem\"\nclient-ca = \"{root}/ca/ca-cert.pem\"\n{more}\n\
         [[listen]]\ntcp = \"127.0.0.1:{port}\"\ntls = true\n\
         [[listen]]\nunix = \"{root}/x.sock\"\n\
         [[export]]\nname = \"all\"\npath = \"{root}/disk.img\"\n\
         [[export]]\nname = \"bound\"\npath = \"{root}/other.img\"\nclients = [\"host-a\"]\n",
        root = bench.path("").display().to_string().trim_end_matches('/'),
    );
    std::fs::write(&config, document).unwrap();
    config
}

#[test]
fn libnbd_and_qemu_copy_through_tls() {
    const TEST: &str = "libnbd_and_qemu_copy_through_tls";
    for engine in engines() {
        let bench = Bench::new(24);
        let Some(certificates) = Certificates::new(TEST, &bench) else { return };
        let folder = certificates.client("ca", "host-a", "DNS:host-a");
        let port = free_port();
        let _server = serve(&bench, engine, port);
        let place = uri(port, "all", &folder);
        let Some(told) = succeed(TEST, "nbdinfo", &[&place]) else { return };
        assert!(told.contains("protocol: newstyle-fixed with TLS"), "{told}");
        let (source, back) = (bench.path("source"), bench.path("back"));
        let mut random = sim::Random::new(3);
        let bytes: Vec<u8> =
            (0..(24 << 20) / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        std::fs::write(&source, &bytes).unwrap();
        succeed(TEST, "nbdcopy", &["--connections=4", "--flush", text(&source), &place]);
        assert!(std::fs::read(bench.image()).unwrap() == bytes, "{engine}: what came differs");
        succeed(TEST, "nbdcopy", &["--connections=4", &place, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == bytes, "{engine}: what went differs");
        let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={}", folder.display());
        let image = format!("driver=nbd,host=localhost,port={port},export=all,tls-creds=t");
        let compared = succeed(
            TEST,
            "qemu-io",
            &[
                "--object",
                &credentials,
                "--image-opts",
                &image,
                "-c",
                "write -P 9 1M 8M",
                "-c",
                "flush",
                "-c",
                "read -P 9 1M 8M",
                "-c",
                "write -z 2M 64k",
                "-c",
                "read -P 0 2M 64k",
            ],
        );
        let Some(told) = compared else { return };
        assert!(!told.contains("failed") && !told.contains("rror"), "{engine}: {told}");
    }
}

/// A reply's header and payload share a record, and replies that are ready together do;
/// the suite is the cheapest for this processor, whatever the client prefers.
#[test]
fn replies_share_records_of_the_cheapest_suite() {
    const TEST: &str = "replies_share_records_of_the_cheapest_suite";
    for engine in engines() {
        let bench = Bench::new(1);
        let Some(certificates) = Certificates::new(TEST, &bench) else { return };
        let folder = certificates.client("ca", "host", "DNS:host");
        let port = free_port();
        let server = serve(&bench, engine, port);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls_records.py");
        let file = |name: &str| folder.join(name);
        let (ca, own, key) = (file("ca-cert.pem"), file("client-cert.pem"), file("client-key.pem"));
        let port = port.to_string();
        let arguments = [script, &port, text(&ca), text(&own), text(&key)];
        let Some(told) = succeed(TEST, "python3", &arguments) else { return };
        let (suite, records) = told.trim().split_once(' ').unwrap();
        if std::arch::is_x86_feature_detected!("aes") {
            assert_eq!(suite, "TLS_AES_128_GCM_SHA256");
        }
        assert!(records.parse::<u32>().unwrap() <= 64, "64 replies in {records} records");
        server.terminate();
    }
}

#[test]
fn who_has_no_lawful_certificate_stays_out() {
    const TEST: &str = "who_has_no_lawful_certificate_stays_out";
    let bench = Bench::new(1);
    let Some(certificates) = Certificates::new(TEST, &bench) else { return };
    certificates.authority("forger");
    let port = free_port();
    let _server = serve(&bench, "auto", port);
    let lawful = certificates.client("ca", "host-a", "DNS:host-a");
    let by_common_name = certificates.sign("ca", "cn", "/O=Test/CN=host-a", "", "clientAuth");
    let other = certificates.client("ca", "host-b", "DNS:host-b");
    // A subject's common name counts for nothing beside an alternative name.
    let disguised =
        certificates.sign("ca", "disguised", "/O=Test/CN=host-a", "DNS:host-c", "clientAuth");
    let forged = certificates.client("forger", "forged", "DNS:host-a");
    let for_servers = certificates.sign("ca", "wrong", "/CN=host-a", "DNS:host-a", "serverAuth");
    for kind in ["cert", "key"] {
        let place = |who: &str| for_servers.join(format!("{who}-{kind}.pem"));
        std::fs::rename(place("server"), place("client")).unwrap();
    }
    let expired = certificates.expired("ca", "expired", "DNS:host-a");
    let bare = bench.path("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(bench.path("ca/ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
    for (folder, export, enters) in [
        (&lawful, "bound", true),
        (&by_common_name, "bound", true),
        (&other, "all", true),
        (&other, "bound", false),
        (&disguised, "bound", false),
        (&forged, "all", false),
        (&expired, "all", false),
        (&for_servers, "all", false),
        (&bare, "all", false),
    ] {
        let Some(told) = run(TEST, "nbdinfo", &[&uri(port, export, folder)]) else { return };
        let told_of = String::from_utf8_lossy(&told.stderr).into_owned();
        assert_eq!(told.status.success(), enters, "{} {export}: {told_of}", folder.display());
    }
    let Some(list) = run(TEST, "nbdinfo", &["--list", &uri(port, "", &other)]) else { return };
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("\"all\"") && !list.contains("\"bound\""), "{list}");
    // Without TLS: refused over TCP, and on the other socket what is bound is not there.
    let Some(plain) = run(TEST, "nbdinfo", &[&format!("nbd://localhost:{port}/all")]) else {
        return;
    };
    assert!(!plain.status.success());
    let unix = |export| format!("nbd+unix:///{export}?socket={}", bench.socket().display());
    assert!(run(TEST, "nbdinfo", &[&unix("all")]).unwrap().status.success());
    assert!(!run(TEST, "nbdinfo", &[&unix("bound")]).unwrap().status.success());
}

/// libnbd and QEMU send no certificate that the server's authority did not sign;
/// this client sends whatever it has.
#[test]
fn a_certificate_that_is_foreign_over_or_missing_is_refused() {
    const TEST: &str = "a_certificate_that_is_foreign_over_or_missing_is_refused";
    let bench = Bench::new(1);
    let Some(certificates) = Certificates::new(TEST, &bench) else { return };
    certificates.authority("forger");
    let san = "DNS:host-a";
    let lawful = certificates.client("ca", "lawful", san);
    let foreign = certificates.client("forger", "foreign", san);
    // Signed by one who is no authority.
    let friend = certificates.client("ca", "friend", san);
    std::fs::copy(friend.join("client-cert.pem"), friend.join("ca-cert.pem")).unwrap();
    std::fs::copy(friend.join("client-key.pem"), friend.join("ca-key.pem")).unwrap();
    let by_friend = certificates.client("friend", "by-friend", san);
    let chain = |name: &str| std::fs::read(bench.path(name).join("client-cert.pem")).unwrap();
    let both = [chain("by-friend"), chain("friend")].concat();
    std::fs::write(by_friend.join("client-cert.pem"), both).unwrap();
    let over = certificates.sign_for("ca", "over", "/CN=over", san, "clientAuth", -1);
    let port = free_port();
    for engine in engines() {
        let _server = serve(&bench, engine, port);
        let says = |folder: &Path, newest: &str| {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls_client.py");
            let authority = bench.path("ca/ca-cert.pem");
            let (own, key) = (folder.join("client-cert.pem"), folder.join("client-key.pem"));
            let own = if own.exists() { text(&own) } else { "none" };
            let arguments = [script, &port.to_string(), text(&authority), own, text(&key), newest];
            succeed(TEST, "python3", &arguments)
        };
        let Some(told) = says(&lawful, "1.3") else { return };
        assert_eq!(told, "entered TLSv1.3\n");
        for (folder, newest, why) in [
            (&foreign, "1.3", "unknown ca"),
            (&by_friend, "1.3", ""),
            (&over, "1.3", "expired"),
            (&bench.path("ca"), "1.3", "certificate required"),
            (&lawful, "1.2", "protocol version"),
        ] {
            let told = says(folder, newest).unwrap();
            assert!(told.starts_with("refused"), "{} {newest}: {told}", folder.display());
            assert!(told.contains(why), "{} {newest}: {told}", folder.display());
        }
        assert_eq!(says(&lawful, "1.3").unwrap(), "entered TLSv1.3\n");
    }
}

/// Two certificates of one authority, for the same name: only the revoked one is out.
#[test]
fn a_revoked_certificate_stays_out() {
    const TEST: &str = "a_revoked_certificate_stays_out";
    let bench = Bench::new(1);
    let Some(certificates) = Certificates::new(TEST, &bench) else { return };
    let lost = certificates.client("ca", "lost", "DNS:host-a");
    let renewed = certificates.client("ca", "renewed", "DNS:host-a");
    let list = certificates.revoke("ca", &["lost"]);
    let port = free_port();
    let more = format!("client-crl = \"{}\"", list.display());
    let server = Server::start(&["serve", "--config", text(&config(&bench, "auto", port, &more))]);
    for (folder, enters) in [(&lost, false), (&renewed, true), (&lost, false)] {
        let Some(told) = run(TEST, "nbdinfo", &[&uri(port, "bound", folder)]) else { return };
        let told_of = String::from_utf8_lossy(&told.stderr).into_owned();
        assert_eq!(told.status.success(), enters, "{}: {told_of}", folder.display());
    }
    server.terminate();
    // Without the list it is a certificate as any other.
    let _server = serve(&bench, "auto", port);
    assert!(run(TEST, "nbdinfo", &[&uri(port, "bound", &lost)]).unwrap().status.success());
}

/// A list that cannot be read lets nobody in: the server does not start.
#[test]
fn a_wrong_revocation_list_is_told_at_start() {
    const TEST: &str = "a_wrong_revocation_list_is_told_at_start";
    let bench = Bench::new(1);
    let Some(_certificates) = Certificates::new(TEST, &bench) else { return };
    let list = bench.path("list.pem");
    let more = format!("client-crl = \"{}\"", list.display());
    let file = config(&bench, "auto", free_port(), &more);
    let broken = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    for (content, told) in [
        (None, "read the revocation lists"),
        (Some(""), "it holds no revocation list; give one in PEM, or leave it out"),
        (Some(broken), "use them to check clients"),
    ] {
        if let Some(content) = content {
            std::fs::write(&list, content).unwrap();
        }
        let done = Command::new(env!("CARGO_BIN_EXE_block-server"))
            .args(["serve", "--check", "--config", text(&file)])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && error.contains(told), "{content:?}: {error}");
        assert!(error.contains(text(&list)), "{error}");
    }
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &kind.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn reply(stream: &mut TcpStream) -> (u32, u32) {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    std::io::copy(&mut stream.take(u64::from(field(16))), &mut std::io::sink()).unwrap();
    (field(8), field(12))
}

/// As the document's FORCEDTLS says it, byte by byte.
#[test]
fn before_tls_there_is_nothing_but_tls() {
    const TEST: &str = "before_tls_there_is_nothing_but_tls";
    const TLS_REQUIRED: u32 = (1 << 31) | 5;
    let bench = Bench::new(1);
    let Some(_certificates) = Certificates::new(TEST, &bench) else { return };
    let port = free_port();
    let _server = serve(&bench, "auto", port);
    let mut stream = connect(port);
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    for kind in [3, 6, 7, 8, 9, 10, 11, 4711] {
        stream.write_all(&option(kind, &[0; 6])).unwrap();
        assert_eq!(reply(&mut stream), (kind, TLS_REQUIRED));
    }
    stream.write_all(&option(5, b"data")).unwrap();
    assert_eq!(reply(&mut stream), (5, (1 << 31) | 3));
    // Abort is heard; an export's name can only be answered by hanging up.
    stream.write_all(&option(2, b"")).unwrap();
    assert_eq!(reply(&mut stream), (2, 1));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let mut stream = connect(port);
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&[&3_u32.to_be_bytes()[..], &option(1, b"all")].concat()).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
}

/// What stands behind STARTTLS in the clear was put there by somebody between.
#[test]
fn plain_bytes_behind_starttls_end_the_connection() {
    const TEST: &str = "plain_bytes_behind_starttls_end_the_connection";
    let bench = Bench::new(1);
    let Some(_certificates) = Certificates::new(TEST, &bench) else { return };
    let port = free_port();
    let _server = serve(&bench, "auto", port);
    for injected in [option(3, b""), vec![0x16, 3, 1], option(7, b"\0\0\0\x03all\0\0")] {
        let mut stream = connect(port);
        stream.read_exact(&mut [0; 18]).unwrap();
        let bytes = [&3_u32.to_be_bytes()[..], &option(5, b""), &injected].concat();
        stream.write_all(&bytes).unwrap();
        assert_eq!(reply(&mut stream), (5, 1));
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0, "{injected:?} was answered");
    }
}

/// Peers that stop in the middle of the handshake, or babble, cost others nothing.
#[test]
fn a_slow_or_babbling_tls_peer_stops_nobody() {
    const TEST: &str = "a_slow_or_babbling_tls_peer_stops_nobody";
    let bench = Bench::new(4);
    let Some(certificates) = Certificates::new(TEST, &bench) else { return };
    let folder = certificates.client("ca", "host-a", "DNS:host-a");
    let port = free_port();
    let _server = serve(&bench, "auto", port);
    let mut random = sim::Random::new(9);
    let mut held = Vec::new();
    for index in 0..40 {
        let mut stream = connect(port);
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[&3_u32.to_be_bytes()[..], &option(5, b"")].concat()).unwrap();
        assert_eq!(reply(&mut stream), (5, 1));
        let length = 5 + (random.next() % 2000) as usize;
        let mut bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        if index % 2 == 0 {
            // A record's header, and less than it promises.
            bytes[..5].copy_from_slice(&[0x16, 3, 1, 0x3f, 0xff]);
        }
        let _ = stream.write_all(&bytes);
        held.push(stream);
    }
    let place = uri(port, "all", &folder);
    let source = bench.path("source");
    std::fs::write(&source, vec![5; 4 << 20]).unwrap();
    if succeed(TEST, "nbdcopy", &["--connections=4", text(&source), &place]).is_none() {
        return;
    }
    assert!(std::fs::read(bench.image()).unwrap().iter().all(|byte| *byte == 5));
}

/// A client that ends without a word, again and again.
#[test]
fn cut_tls_connections_leave_nothing_behind() {
    const TEST: &str = "cut_tls_connections_leave_nothing_behind";
    let bench = Bench::new(8);
    let Some(certificates) = Certificates::new(TEST, &bench) else { return };
    let folder = certificates.client("ca", "host-a", "DNS:host-a");
    let port = free_port();
    let server = serve(&bench, "auto", port);
    let place = uri(port, "all", &folder);
    for _ in 0..5 {
        let copying = Command::new("nbdcopy")
            .args(["--", &place, "null:"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut copying) = copying else { return skip(TEST, "nbdcopy is not installed") };
        std::thread::sleep(Duration::from_millis(30));
        copying.kill().unwrap();
        copying.wait().unwrap();
    }
    assert!(run(TEST, "nbdinfo", &[&place]).unwrap().status.success());
    server.terminate();
}

/// The next line of a client that tells how far it is: writes and connections.
fn progress(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> (String, u64) {
    let line = lines.next().expect("it goes on").expect("it can be read");
    let (done, connections) = line.rsplit_once(' ').expect("two words");
    (done.to_owned(), connections.parse().expect("a number"))
}

/// What TLS sealed is not handed on: each connection ends between two requests, its
/// client comes again to the successor, and nothing that was acknowledged is lost.
#[test]
fn clients_of_tls_come_again_after_each_upgrade_and_lose_nothing() {
    const TEST: &str = "clients_of_tls_come_again_after_each_upgrade_and_lose_nothing";
    const PYTHON: &str = "/usr/bin/python3";
    const UPGRADES: u64 = 6;
    if !run(TEST, PYTHON, &["-c", "import nbd"]).is_some_and(|o| o.status.success()) {
        return skip(TEST, "python3-libnbd is not installed");
    }
    for engine in engines() {
        let bench = Bench::new(4);
        let Some(certificates) = Certificates::new(TEST, &bench) else { return };
        let folder = certificates.client("ca", "host-a", "DNS:host-a");
        let port = free_port();
        let (file, upgrades) = (config(&bench, engine, port, ""), bench.path("up.sock"));
        let own = ["serve", "--config", text(&file), "--take-over", text(&upgrades)];
        let mut server = Server::start(&own);
        let mut client = Command::new(PYTHON)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls_relay.py"))
            .arg(uri(port, "all", &folder))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines =
            std::io::BufRead::lines(std::io::BufReader::new(client.stdout.take().unwrap()));
        for upgrade in 1..=UPGRADES {
            // It works by the connection that came after the last one.
            while progress(&mut lines).1 < upgrade {}
            let successor = Server::start(&own);
            std::mem::replace(&mut server, successor).ended();
        }
        while progress(&mut lines).1 <= UPGRADES {}
        drop(client.stdin.take());
        let last = loop {
            let (done, connections) = progress(&mut lines);
            if done == "all there" {
                break connections;
            }
        };
        assert!(client.wait().unwrap().success());
        assert_eq!(last, UPGRADES + 1, "{engine}: a connection for each server");
        server.terminate();
    }
}
