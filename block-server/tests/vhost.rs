//! The second front, spoken to as QEMU does: what goes in comes out, a server
//! that is killed loses and repeats nothing, and a hostile peer hurts itself.

mod fixture;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use block_server::vhost::memory::Memory;
use block_server::vhost::wire::ask;
use fixture::front::{DATA, Front, Machine};
use fixture::{Bench, Server, engines, succeed, text};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;

fn serve(bench: &Bench, more: &[&str]) -> Server {
    let (image, place) = (bench.image(), bench.path("v.sock"));
    let mut arguments = vec!["serve", "--file", text(&image), "--vhost-user", text(&place)];
    arguments.extend(more);
    Server::start(&arguments)
}

fn connected(bench: &Bench, event_index: bool) -> (Front, Machine) {
    let mut machine = Machine::new(event_index);
    let mut front = Front::connect(&bench.path("v.sock"));
    front.start(&mut machine, 0);
    (front, machine)
}

fn filled(machine: &Machine, at: u64, length: usize, byte: u8) {
    machine.memory.write(at, &vec![byte; length]).unwrap();
}

fn bytes(machine: &Machine, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    machine.memory.read(at, &mut bytes).unwrap();
    bytes
}

fn range(machine: &Machine, sector: u64, count: u32, flags: u32) {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(count.to_le_bytes());
    range.extend(flags.to_le_bytes());
    machine.memory.write(DATA, &range).unwrap();
}

#[test]
fn a_guest_finds_again_what_it_wrote_however_its_memory_lies() {
    for engine in engines() {
        for event_index in [true, false] {
            let bench = Bench::new(4);
            let server = serve(&bench, &["--engine", engine]);
            let (mut front, mut machine) = connected(&bench, event_index);
            assert_eq!(front.config()[..8], (4_u64 << 11).to_le_bytes());
            let far = DATA + (1 << 20);
            // (where, in which pieces): whole pages, odd places, odd cuts.
            let layouts: [&[(u64, u32)]; 5] = [
                &[(DATA, 4096)],
                &[(DATA, 4096), (DATA + 8192, 4096), (DATA + 65536, 65536)],
                &[(DATA + 512, 512), (DATA + 4096, 1024)],
                &[(DATA + 3, 512)],
                &[(DATA + 1, 511), (DATA + 4097, 1)],
            ];
            for (round, layout) in layouts.iter().enumerate() {
                let sector = 7 + 300 * round as u64;
                let length: usize = layout.iter().map(|(_, l)| *l as usize).sum();
                for (i, (at, l)) in layout.iter().enumerate() {
                    filled(&machine, *at, *l as usize, (16 * round + i + 1) as u8);
                }
                assert_eq!(machine.ask(OUT, sector, layout, false), OK);
                assert_eq!(machine.ask(FLUSH, 0, &[], false), OK);
                filled(&machine, far, length, 0xee);
                assert_eq!(machine.ask(IN, sector, &[(far, length as u32)], true), OK);
                let expected: Vec<u8> = layout
                    .iter()
                    .enumerate()
                    .flat_map(|(i, (_, l))| vec![(16 * round + i + 1) as u8; *l as usize])
                    .collect();
                assert_eq!(bytes(&machine, far, length), expected, "{engine} layout {round}");
                let file = std::fs::read(bench.image()).unwrap();
                assert_eq!(file[sector as usize * 512..][..length], expected);
            }
            assert_eq!(machine.ask(GET_ID, 0, &[(DATA, 20)], true), OK);
            assert!(bytes(&machine, DATA, 20).starts_with(b"tmp"));
            range(&machine, 0, 2400, 1);
            assert_eq!(machine.ask(WRITE_ZEROES, 0, &[(DATA, 16)], false), OK);
            assert!(std::fs::read(bench.image()).unwrap()[..2400 * 512].iter().all(|b| *b == 0));
            range(&machine, 0, 8192, 0);
            assert_eq!(machine.ask(DISCARD, 0, &[(DATA, 16)], false), OK);
            assert_eq!(machine.ask(IN, 8192, &[(DATA, 512)], true), IO_ERROR, "behind the end");
            let before = machine.used();
            assert_eq!(front.stop(), before, "a quiet ring goes on where it stopped");
            server.terminate();
        }
    }
}

#[test]
fn a_read_only_disk_keeps_what_it_has() {
    let bench = Bench::new(1);
    let _server = serve(&bench, &["--read-only"]);
    let (_front, mut machine) = connected(&bench, true);
    filled(&machine, DATA, 512, 1);
    assert_eq!(machine.ask(OUT, 0, &[(DATA, 512)], false), IO_ERROR);
    assert_eq!(machine.ask(IN, 0, &[(DATA, 512)], true), OK);
    assert!(std::fs::read(bench.image()).unwrap().iter().all(|b| *b == 0));
}

/// Each round announces sixteen writes, kills the server at some moment of them,
/// and lets the next one go on. Each is answered exactly once, with success, and
/// its bytes are in the file.
#[test]
fn a_killed_server_loses_no_request_and_answers_none_twice() {
    let bench = Bench::new(8);
    let mut machine = Machine::new(true);
    let mut server = serve(&bench, &[]);
    let mut base = 0;
    let mut cut_short = 0;
    for round in 0..30_u64 {
        let mut front = Front::connect(&bench.path("v.sock"));
        front.start(&mut machine, base);
        for slot in 0..16 {
            let at = DATA + 65536 * u64::from(slot);
            filled(&machine, at, 65536, (round as u8).wrapping_mul(17).wrapping_add(slot as u8));
            machine.add(slot, OUT, u64::from(slot) * 128, &[(at, 65536)], false);
        }
        machine.ring();
        std::thread::sleep(Duration::from_micros(150 * (round % 12)));
        server.kill();
        cut_short += u32::from(machine.used() != base.wrapping_add(16));
        base = machine.used();
        server = serve(&bench, &[]);
        let mut front = Front::connect(&bench.path("v.sock"));
        front.start(&mut machine, base);
        let mut answered = [false; 16];
        for _ in 0..16 {
            let (slot, status) = machine.await_answer();
            assert_eq!(status, OK, "round {round}");
            let twice = std::mem::replace(&mut answered[usize::from(slot)], true);
            assert!(!twice, "round {round}: request {slot} was answered twice");
        }

        base = front.stop();
        assert_eq!(machine.reap(), None, "round {round}: an answer that nobody asked for");
        assert_eq!(base, machine.used());
        drop(front);
        let file = std::fs::read(bench.image()).unwrap();
        for slot in 0..16_usize {
            let byte = (round as u8).wrapping_mul(17).wrapping_add(slot as u8);
            assert!(file[slot * 65536..][..65536].iter().all(|b| *b == byte), "round {round}");
        }
    }
    assert!(cut_short > 0, "no kill came between a request and its answer");
}

/// A peer whose answers nobody fetches, with memory that nobody sealed, bells
/// that are none and messages that mean nothing: its own connection ends or its
/// own disk stays silent, and an NBD client of the same server notices nothing.
#[test]
fn a_hostile_front_hurts_nobody_else() {
    let bench = Bench::new(4);
    let socket = bench.socket();
    let server = serve(&bench, &["--socket", text(&socket)]);
    let place = bench.path("v.sock");
    let plain = || {
        let file = rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 16 << 20).unwrap();
        file
    };
    let served = || {
        let uri = bench.uri();
        succeed("hostile vhost-user", "nbdinfo", &["--size", &uri])
            .inspect(|size| assert_eq!(size.trim(), "4194304"));
    };
    // Bytes without sense, oversize, and a conversation that breaks off.
    for garbage in [vec![0xff; 300], vec![1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1], vec![5, 0]] {
        let mut front = Front::connect(&place);
        std::io::Write::write_all(&mut front.stream, &garbage).unwrap();
        front.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(front.is_cut());
    }
    served();
    // Memory that its owner could take away under us is not touched.
    {
        let mut machine = Machine::new(true);
        machine.file = plain();
        let mut front = Front::connect(&place);
        front.agree(true);
        front.share_memory(&machine);
        front.start_ring(&machine, 0);
        rustix::fs::ftruncate(&machine.file, 0).unwrap();
        machine.ring();
        assert_eq!(front.config()[..8], (4_u64 << 11).to_le_bytes(), "it is still spoken to");
    }
    served();
    // A bell that is a file, always readable: nobody listens to it.
    {
        let mut machine = Machine::new(true);
        machine.kick = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
        let mut front = Front::connect(&place);
        front.agree(true);
        front.share_memory(&machine);
        front.start_ring(&machine, 0);
        machine.add(0, IN, 0, &[(DATA, 512)], true);
        front.config();
        assert_eq!(machine.reap(), None);
    }
    served();
    // A ring that is broken while its requests run, begun again, and left.
    for _ in 0..50 {
        let (mut front, mut machine) = connected(&bench, true);
        for slot in 0..8 {
            machine.add(slot, IN, 0, &[(DATA + 65536 * u64::from(slot), 65536)], true);
        }
        machine.announce(999);
        machine.ring();
        front.start_ring(&machine, machine.used());
        front.tell(ask::SET_VRING_KICK, &0_u64.to_ne_bytes(), &[machine.kick.as_fd()]);
        machine.ring();
    }
    served();
    let (_front, mut machine) = connected(&bench, true);
    assert_eq!(machine.ask(FLUSH, 0, &[], false), OK, "the next guest is served");
    server.terminate();
}
