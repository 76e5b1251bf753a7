//! Other people's NBD clients against the whole program, on both engines.

mod fixture;

use std::process::{Command, Stdio};
use std::time::Duration;

use fixture::{Bench, engines, free_address, qemu_image, run, skip, succeed, text};

#[test]
fn nbdinfo_sees_what_is_served() {
    const TEST: &str = "nbdinfo_sees_what_is_served";
    for engine in engines() {
        let bench = Bench::new(64);
        let image = bench.image();
        let other = format!("other={}", image.display());
        let _server = bench.serve(&["--engine", engine, "--export", &other]);
        let uri = bench.uri();
        let Some(told) = succeed(TEST, "nbdinfo", &["--json", &uri]) else { return };
        for fact in [
            "\"export-size\": 67108864",
            "\"can_multi_conn\": true",
            "\"can_fua\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"can_fast_zero\": true",
            "\"can_df\": true",
            "\"block_size_minimum\": 512",
            "\"block_size_maximum\": 33554432",
        ] {
            assert!(told.contains(fact), "{fact}: {told}");
        }
        let Some(list) = succeed(TEST, "nbdinfo", &["--list", &uri]) else { return };
        assert!(list.contains("export=\"other\""), "{list}");
        let Some(map) = succeed(TEST, "nbdinfo", &["--map", &uri]) else { return };
        assert!(map.contains("hole,zero"), "{map}");
        let depth = succeed(TEST, "nbdinfo", &["--map=qemu:allocation-depth", &uri]);
        assert!(depth.is_some_and(|depth| depth.contains("absent")));
    }
}

#[test]
fn nbdcopy_brings_an_image_in_and_out_unchanged() {
    const TEST: &str = "nbdcopy_brings_an_image_in_and_out_unchanged";
    for (engine, cache) in engines().into_iter().flat_map(|e| [(e, "none"), (e, "writeback")]) {
        let bench = Bench::new(48);
        let source = bench.path("source");
        let mut random = sim::Random::new(1);
        let mut bytes = vec![0; 48 << 20];
        for chunk in bytes.chunks_mut(8).step_by(3) {
            chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
        }
        bytes[(20 << 20)..(28 << 20)].fill(0);
        std::fs::write(&source, &bytes).unwrap();
        let _server = bench.serve(&["--engine", engine, "--cache", cache]);
        let (uri, back) = (bench.uri(), bench.path("back"));
        let many = ["--connections=4", "--flush"];
        if succeed(TEST, "nbdcopy", &[many[0], many[1], text(&source), &uri]).is_none() {
            return;
        }
        succeed(TEST, "nbdcopy", &[many[0], &uri, text(&back)]);
        assert!(
            std::fs::read(&back).unwrap() == bytes,
            "{engine}, cache {cache}: what came back differs"
        );
        assert!(std::fs::read(bench.image()).unwrap() == bytes);
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    const TEST: &str = "qemu_img_converts_compares_and_maps";
    for engine in engines() {
        let bench = Bench::new(32);
        let source = bench.path("source.qcow2");
        let uri = bench.uri();
        let _server = bench.serve(&["--engine", engine]);
        let made = succeed(TEST, "qemu-img", &["create", "-f", "qcow2", text(&source), "32M"]);
        if made.is_none() {
            return;
        }
        let writes = ["-c", "write -P 5 1M 3M", "-c", "write -P 6 20M 64k"];
        succeed(TEST, "qemu-io", &[&writes[..], &[text(&source)]].concat());
        succeed(TEST, "qemu-img", &["convert", "-n", "-O", "raw", text(&source), &uri]);
        let compared = succeed(TEST, "qemu-img", &["compare", text(&source), &uri]).unwrap();
        assert!(compared.contains("identical"), "{compared}");
        let map = succeed(TEST, "qemu-img", &["map", "--output=json", &uri]).unwrap();
        assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
        succeed(TEST, "qemu-img", &["bench", "-w", "-c", "2000", "-d", "32", "-f", "raw", &uri]);
    }
}

#[test]
fn qemu_io_reads_the_patterns_it_wrote() {
    const TEST: &str = "qemu_io_reads_the_patterns_it_wrote";
    for engine in engines() {
        let bench = Bench::new(16);
        let _server = bench.serve(&["--engine", engine]);
        let script = [
            "write -P 7 4096 1M",
            "write -f -P 9 512 1536",
            "flush",
            "read -P 7 4096 1M",
            "read -P 9 512 1536",
            "read -P 0 0 512",
            "read -P 0 2048 2048",
            "write -z 64k 64k",
            "read -P 0 64k 64k",
            "write -z -u 256k 128k",
            "read -P 0 256k 128k",
            "discard 512k 256k",
            "read -P 7 1M 4k",
            "aio_write -P 1 2M 64k",
            "aio_write -P 2 2M 64k",
            "aio_flush",
            "read -P 2 2M 64k",
        ];
        let uri = bench.uri();
        let commands = script.iter().flat_map(|c| ["-c", c]);
        let arguments: Vec<&str> =
            ["-f", "raw"].into_iter().chain(commands).chain([&*uri]).collect();
        let Some(told) = succeed(TEST, "qemu-io", &arguments) else { return };
        assert!(!told.contains("failed"), "{engine}: {told}");
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    const TEST: &str = "fio_verifies_what_it_wrote";
    for engine in engines() {
        let bench = Bench::new(48);
        let _server = bench.serve(&["--engine", engine]);
        let uri = format!("--uri={}", bench.uri());
        let arguments = [
            "--name=v",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--size=48M",
            "--io_size=48M",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ];
        if succeed(TEST, "fio", &arguments).is_none() {
            return;
        }
    }
}

/// Every command and flag that libnbd knows, by a script of its Python binding.
#[test]
fn libnbd_drives_every_command_and_flag() {
    const TEST: &str = "libnbd_drives_every_command_and_flag";
    const PYTHON: &str = "/usr/bin/python3";
    match run(TEST, PYTHON, &["-c", "import nbd"]) {
        Some(output) if !output.status.success() => {
            return skip(TEST, "python3-libnbd is not installed");
        }
        None => return,
        Some(_) => {}
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/libnbd.py");
    for engine in engines() {
        let bench = Bench::new(16);
        let read_only = format!("ro={}", bench.image().display());
        let _server = bench.serve(&["--engine", engine, "--export", &read_only]);
        // Another server's, while the first one has its own.
        let image = bench.path("other.img");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let program = env!("CARGO_BIN_EXE_block-server");
        succeed(TEST, PYTHON, &[script, text(&bench.socket()), program, text(&image)]);
    }
}

/// The client waits for the server's return, sends again what was not answered,
/// and sees no error.
#[test]
fn qemu_goes_on_after_kill_9() {
    const TEST: &str = "qemu_goes_on_after_kill_9";
    for engine in engines() {
        let bench = Bench::new(16);
        let server = bench.serve(&["--engine", engine]);
        let image = qemu_image(&bench.socket(), "");
        let client = Command::new("qemu-io")
            .args(["--image-opts", &image])
            .args(["-c", "write -P 8 0 1M", "-c", "sleep 600"])
            .args(["-c", "write -P 9 1M 1M", "-c", "flush"])
            .args(["-c", "read -P 8 0 1M", "-c", "read -P 9 1M 1M"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(client) = client else { return skip(TEST, "qemu-io is not installed") };
        until_written(&bench, 8);
        server.kill();
        std::thread::sleep(Duration::from_millis(1000));
        let server = bench.serve(&["--engine", engine]);
        let output = client.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
        assert!(!told.contains("failed") && !told.contains("rror"), "{engine}: {told}");
        server.terminate();
    }
}

/// Waits until the first MiB is this byte's: a client is connected, and has written it.
fn until_written(bench: &Bench, byte: u8) {
    for _ in 0..600 {
        let image = std::fs::read(bench.image()).unwrap();
        if image[..1 << 20].iter().all(|b| *b == byte) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("the client wrote nothing in 30 s");
}

/// The server is killed again and again while a client writes, flushes and
/// reads back: all that it was told is true, and it is told of no error.
#[test]
fn kills_under_load_lose_nothing() {
    const TEST: &str = "kills_under_load_lose_nothing";
    const KILLS: usize = 8;
    for engine in engines() {
        let bench = Bench::new(16);
        let mut server = bench.serve(&["--engine", engine]);
        let image = qemu_image(&bench.socket(), "");
        let mut commands = Vec::new();
        for round in 1..=120_usize {
            let at = round * 37 % 100 * 128;
            commands.push(format!("write -P {round} {at}k 128k"));
            commands.push(if round % 5 == 0 { "flush" } else { "sleep 10" }.to_owned());
            commands.push(format!("read -P {round} {at}k 128k"));
        }
        let client = Command::new("qemu-io")
            .args(["--image-opts", &image])
            .args(commands.iter().flat_map(|c| ["-c", c]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut client) = client else { return skip(TEST, "qemu-io is not installed") };
        let mut kills = 0;
        while kills < KILLS && client.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(120));
            server.kill();
            kills += 1;
            server = bench.serve(&["--engine", engine]);
        }
        let output = client.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(kills > 1, "the client was done before it was disturbed");
        assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
        assert!(!told.contains("failed") && !told.contains("rror"), "{engine}: {told}");
        assert_eq!(told.matches("read 131072/131072").count(), 120, "{engine}: {told}");
        // What lies in the file is what was said of it.
        let bytes = std::fs::read(bench.image()).unwrap();
        let last: Vec<u8> =
            (101..=120).map(|round| bytes[round * 37 % 100 * (128 << 10)]).collect();
        assert_eq!(last, (101..=120).collect::<Vec<u8>>());
        server.terminate();
    }
}

#[test]
fn exports_of_one_name_or_of_no_file_are_refused_by_name() {
    let bench = Bench::new(1);
    let (image, socket) = (bench.image(), bench.socket());
    let (named, unnamed) = (format!("a={}", image.display()), format!("={}", image.display()));
    let missing = format!("b={}", bench.path("missing").display());
    let taken = "another export has that name";
    for (exports, told) in [
        (["--export", &*named, "--export", &*named], ["--export a=…", taken]),
        (["--file", text(&image), "--export", &*unnamed], ["--export =…", taken]),
        (["--export", &*named, "--export", &*missing], ["export \"b\": /", "/missing"]),
    ] {
        let mut serve = Command::new(env!("CARGO_BIN_EXE_block-server"));
        // With --check it ends whatever it finds.
        serve.args(["serve", "--check", "--socket", text(&socket)]).args(exports);
        let output = serve.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{error}");
        assert!(told.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn a_read_only_export_refuses_changes_and_serves_reads() {
    const TEST: &str = "a_read_only_export_refuses_changes_and_serves_reads";
    for engine in engines() {
        let bench = Bench::new(1);
        std::fs::write(bench.image(), vec![3; 1 << 20]).unwrap();
        let _server = bench.serve(&["--engine", engine, "--read-only"]);
        let uri = bench.uri();
        let read = succeed(TEST, "qemu-io", &["-r", "-f", "raw", "-c", "read -P 3 0 1M", &uri]);
        let Some(read) = read else { return };
        assert!(!read.contains("failed"), "{read}");
        let Some(write) = run(TEST, "qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]) else {
            return;
        };
        assert!(!write.status.success());
        assert!(std::fs::read(bench.image()).unwrap().iter().all(|b| *b == 3));
    }
}

#[test]
fn tcp_serves_as_a_socket_does() {
    const TEST: &str = "tcp_serves_as_a_socket_does";
    for engine in engines() {
        let bench = Bench::new(4);
        let free = free_address();
        let _server = bench.serve(&["--engine", engine, "--tcp", &free.to_string()]);
        let uri = format!("nbd://{free}");
        let script = ["-f", "raw", "-c", "write -P 4 0 2M", "-c", "read -P 4 0 2M", &uri];
        let Some(told) = succeed(TEST, "qemu-io", &script) else { return };
        assert!(!told.contains("failed"), "{told}");
    }
}

/// Metrics at a socket, limits from the command line, and the slow operations in the log.
#[test]
fn a_server_alone_keeps_limits_tells_metrics_and_what_was_slow() {
    const TEST: &str = "a_server_alone_keeps_limits_tells_metrics_and_what_was_slow";
    let bench = Bench::new(8);
    let metrics = bench.path("metrics.sock");
    let log = bench.path("log");
    let server = std::process::Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["serve", "--file", text(&bench.image()), "--socket", text(&bench.socket())])
        .args(["--iops", "20", "--slow-log-ms", "20", "--metrics", text(&metrics)])
        .stderr(std::fs::File::create(&log).unwrap())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let server = Ended(server);
    for _ in 0..200 {
        if metrics.exists() && bench.socket().exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let uri = bench.uri();
    // Eight that are apart: two at once, the others at twenty a second.
    let writes: Vec<String> = (0..8).map(|i| format!("write {i}M 4k")).collect();
    let mut arguments = vec!["-f", "raw"];
    writes.iter().for_each(|write| arguments.extend(["-c", write.as_str()]));
    arguments.push(&uri);
    if succeed(TEST, "qemu-io", &arguments).is_none() {
        return;
    }
    let told = fixture::metrics(&metrics).unwrap();
    assert!(told.contains("text/plain; version=0.0.4"), "{told}");
    let count = |name: &str| -> u64 {
        let line = told.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{told}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(count("hostplane_volume_throttled_operations_total") >= 4, "{told}");
    assert!(count("hostplane_volume_slow_operations_total") >= 4, "{told}");
    drop(server);
    let log = std::fs::read_to_string(&log).unwrap();
    let slow = log.lines().find(|l| l.contains("slow Write of 4096 bytes at")).expect(&log);
    assert!(slow.contains("throttled") && slow.contains("disk"), "{slow}");
}

struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
