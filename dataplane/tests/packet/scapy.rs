//! Packets built by scapy, through the loaded programs, and what comes out dissected by
//! scapy again: it knows nothing of our builder, our rewriting or our checksums.

use std::io::Write as _;
use std::process::{Command, Stdio};

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::{GATEWAY_MAC, TRACE_MARK};
use model::Mac;
use nix::net::if_::if_nametoindex;

use crate::agree::{Bench, skipped};
use crate::hostile::open_world;
use crate::random::Random;
use crate::world::{UPLINK, devices, guest};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/packet/scapy_vectors.py");
const REDIRECT: i32 = 7;

/// The distribution's Python: the package is for that one.
fn scapy(arguments: &[&str]) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.arg(SCRIPT).args(arguments);
    command
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(byte).collect()
}

/// scapy's own judgement of what came out, and whether it found all right.
fn judged(lines: &str) -> (bool, String) {
    let mut child = scapy(&["check"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn what_scapy_builds_comes_out_as_scapy_would_have_it() {
    let name = "what_scapy_builds_comes_out_as_scapy_would_have_it";
    let built = scapy(&["vectors", &Mac(GATEWAY_MAC).to_string()]).output();
    let built = match built {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout).unwrap(),
        _ => return skipped(name, "python3-scapy is not installed"),
    };
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let mut random = Random::seeded("scapy", 91);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let world = open_world(&mut random);
    let tables = compile(&world, &devices, loaded.tables()).unwrap();
    loaded.update(tables).unwrap();
    let mut lines = String::new();
    for line in built.lines() {
        let [name, place, frame] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let device = if place == "guest" { guest(0) } else { UPLINK.to_owned() };
        let ifindex = if_nametoindex(device.as_str()).unwrap();
        let run = loaded.run(ifindex, &bytes(frame), TRACE_MARK).unwrap();
        let out = if run.code == REDIRECT { hex(&run.frame) } else { "-".to_owned() };
        if out == "-" {
            eprintln!("{name}: {:?}", run.reason);
        }
        lines += &format!("{name} {place} {frame} {out}\n");
    }
    let (right, told) = judged(&lines);
    assert!(right, "{told}");
    eprint!("{told}");

    // The planted fault: one bit of the last packet that came out.
    let last = lines.trim_end();
    let end = if last.ends_with('0') { '1' } else { '0' };
    let (right, _) = judged(&format!("{}{end}\n", &last[..last.len() - 1]));
    assert!(!right, "a wrong bit went unnoticed");
}
