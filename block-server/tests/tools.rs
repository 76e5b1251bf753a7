//! More of other people's tools: over TCP with several connections, and file
//! systems of the kernel's over nbdfuse.

mod fixture;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fixture::fuse::Fuse;
use fixture::{Bench, engines, free_address, run, skip, succeed, text};
use sim::{Random, is_full, seed_from_environment};

#[test]
fn nbdcopy_and_nbddump_agree_over_tcp() {
    const TEST: &str = "nbdcopy_and_nbddump_agree_over_tcp";
    for engine in engines() {
        let bench = Bench::new(16);
        let source = bench.path("source");
        let mut bytes = vec![0; 16 << 20];
        let mut random = Random::new(5);
        for chunk in bytes[..6 << 20].chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_le_bytes());
        }
        std::fs::write(&source, &bytes).unwrap();
        let free = free_address();
        let _server = bench.serve(&["--engine", engine, "--tcp", &free.to_string()]);
        let (uri, back) = (format!("nbd://{free}"), bench.path("back"));
        let many = ["--connections=8", "--requests=32", "--flush"];
        if succeed(TEST, "nbdcopy", &[&many[..], &[text(&source), &uri]].concat()).is_none() {
            return;
        }
        succeed(TEST, "nbdcopy", &[many[0], many[1], &uri, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == bytes, "{engine}: what came back differs");
        // From the same bytes of a file, by a server that is not ours.
        let limit = ["--length", "4096"];
        let Some(ours) = succeed(TEST, "nbddump", &[&limit[..], &[&uri]].concat()) else { return };
        let plain = ["--length", "4096", "--", "[", "nbdkit", "file", text(&source), "]"];
        let Some(theirs) = succeed(TEST, "nbddump", &plain) else { return };
        assert_eq!(ours, theirs);
    }
}

const NO_FUSE: &str = "nbdfuse cannot mount here (libnbd-bin, /dev/fuse, root)";

/// What fsx does to a device: random reads and writes at block bounds, each read
/// held against a copy in memory; the file is closed and opened again in between.
fn exercise(path: &Path, bytes: usize, operations: usize, random: &mut Random) {
    let open = || OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (mut file, mut copy) = (open(), vec![0; bytes]);
    for number in 0..operations {
        let length = 512 * (1 + random.below(255) as usize);
        let at = 512 * random.below(((bytes - length) / 512 + 1) as u64) as usize;
        match random.below(100) {
            0..45 => {
                for chunk in copy[at..at + length].chunks_mut(8) {
                    chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
                }
                file.write_all_at(&copy[at..at + length], at as u64).unwrap();
            }
            45..96 => {
                let mut found = vec![0; length];
                file.read_exact_at(&mut found, at as u64).unwrap();
                assert!(found == copy[at..at + length], "operation {number}: read {at}+{length}");
            }
            96..98 => file.sync_all().unwrap(),
            _ => file = open(),
        }
    }
}

#[test]
fn random_reads_and_writes_over_nbdfuse_agree_with_memory() {
    const TEST: &str = "random_reads_and_writes_over_nbdfuse_agree_with_memory";
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    for engine in engines() {
        let bench = Bench::new(16);
        let _server = bench.serve(&["--engine", engine]);
        let Some(fuse) = Fuse::mount(bench.path("fuse"), &bench.uri()) else {
            return skip(TEST, NO_FUSE);
        };
        let operations = if is_full() { 100_000 } else { 1500 };
        exercise(&fuse.file(), 16 << 20, operations, &mut Random::new(seed));
    }
}

#[test]
fn a_file_system_on_a_loop_device_over_nbdfuse_is_sound() {
    const TEST: &str = "a_file_system_on_a_loop_device_over_nbdfuse_is_sound";
    for engine in engines() {
        let bench = Bench::new(64);
        let server = bench.serve(&["--engine", engine]);
        let Some(fuse) = Fuse::mount(bench.path("fuse"), &bench.uri()) else {
            return skip(TEST, NO_FUSE);
        };
        let device = fuse.file();
        if succeed(TEST, "mkfs.ext4", &["-q", "-F", text(&device)]).is_none() {
            return;
        }
        let place = bench.path("mnt");
        std::fs::create_dir(&place).unwrap();
        let Some(mounted) = run(TEST, "mount", &["-o", "loop", text(&device), text(&place)]) else {
            return;
        };
        if !mounted.status.success() {
            return skip(TEST, "no loop device can be mounted here");
        }
        let made = std::panic::catch_unwind(|| fill(&place));
        let gone = run(TEST, "umount", &[text(&place)]);
        made.unwrap();
        assert!(gone.is_some_and(|output| output.status.success()), "it is busy");
        succeed(TEST, "e2fsck", &["-f", "-n", text(&device)]);
        drop(fuse);
        server.terminate();
        succeed(TEST, "e2fsck", &["-f", "-n", text(&bench.image())]);
    }
}

fn fill(place: &Path) {
    let mut random = Random::new(9);
    let large = place.join("large");
    std::fs::File::create(&large).unwrap().set_len(8 << 20).unwrap();
    exercise(&large, 8 << 20, 400, &mut random);
    for number in 0..300_u32 {
        let path = place.join(format!("f{number}"));
        std::fs::write(&path, number.to_le_bytes().repeat(1 + number as usize * 7)).unwrap();
        if number % 3 == 0 {
            std::fs::remove_file(place.join(format!("f{}", number / 3 * 2))).unwrap_or_default();
        }
    }
}
