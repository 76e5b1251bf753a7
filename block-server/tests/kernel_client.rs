//! The kernel's own NBD client, in a guest: the distribution's kernel, its
//! module and its `nbd-client`.

mod fixture;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use fixture::{Bench, engines, free_address, run, skip, succeed, text};

/// Under an emulated processor on a loaded machine.
const GUEST_SECONDS_MAX: u64 = 300;

#[test]
fn a_guests_kernel_makes_fills_checks_and_keeps_a_file_system() {
    const TEST: &str = "a_guests_kernel_makes_fills_checks_and_keeps_a_file_system";
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel-client");
    let make = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/guest/make.sh");
    let init = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/init.sh");
    let programs = "nbd-client mke2fs e2fsck";
    let modules = "virtio_pci virtio_net crc32c_generic ext4 nbd";
    let made = run(TEST, "sh", &[make, text(&folder), init, programs, modules]);
    let Some(made) = made else { return };
    if !made.status.success() {
        let told = String::from_utf8_lossy(&made.stdout).into_owned()
            + &String::from_utf8_lossy(&made.stderr);
        return skip(
            TEST,
            &format!("no guest can be made here: {}", told.trim().replace('\n', "; ")),
        );
    }
    // One engine: what the other does differently is below the protocol.
    let engine = engines()[0];
    let bench = Bench::new(64);
    let free = free_address();
    let export = format!("disk={}", bench.image().display());
    let server =
        bench.serve(&["--engine", engine, "--export", &export, "--tcp", &free.to_string()]);
    let append =
        format!("console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check port={}", free.port());
    let guest = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-kernel", text(&folder.join("vmlinuz")), "-initrd", text(&folder.join("initrd"))])
        .args(["-append", &append, "-serial", "stdio"])
        .args(["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut guest) = guest else { return skip(TEST, "qemu-system-x86_64 is not installed") };
    let mut console = guest.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut told = Vec::new();
        let _ = console.read_to_end(&mut told);
        String::from_utf8_lossy(&told).into_owned()
    });
    let mut ended = false;
    for _ in 0..GUEST_SECONDS_MAX * 10 {
        ended = guest.try_wait().unwrap().is_some();
        if ended {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    if !ended {
        guest.kill().unwrap();
        guest.wait().unwrap();
    }
    let told = reader.join().unwrap();
    assert!(ended && told.contains("HELD"), "{told}");
    eprintln!("{}", told.lines().filter(|l| l.contains("guest:")).collect::<Vec<_>>().join("\n"));
    server.terminate();
    // What the guest wrote is a sound file system by itself, on the host.
    succeed(TEST, "e2fsck", &["-f", "-n", text(&bench.image())]);
}
