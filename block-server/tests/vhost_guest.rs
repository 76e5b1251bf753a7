//! A real guest of a real QEMU on the second front: its disk is plugged in while
//! it runs, the server is killed under its load, and the disk is taken out.

mod fixture;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fixture::{Bench, Server, skip, text};

const TEST: &str = "a_guest_works_on_while_its_server_is_killed";

/// Patience with a guest on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(300);

const KILLS: usize = 5;

/// What the guest's kernel needs for a PCI disk and a file system on it.
const MODULES: [&str; 13] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext2",
    "ext4",
];

fn output(program: &str, arguments: &[&str], within: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .current_dir(within)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(told) } else { Err(format!("{program}: {complaint}")) }
}

/// The distribution's own kernel for guests, fetched once and kept.
fn kernel() -> Result<PathBuf, String> {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-kernel");
    if kept.join("whole").exists() {
        return Ok(kept);
    }
    let _ = std::fs::remove_dir_all(&kept);
    std::fs::create_dir_all(&kept).map_err(|e| e.to_string())?;
    let depends = output("apt-cache", &["depends", "linux-image-cloud-amd64"], &kept)?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or("no package linux-image-cloud-amd64 is known")?
        .to_owned();
    output("apt-get", &["-qq", "-o", "APT::Sandbox::User=root", "download", &package], &kept)?;
    let file = files(&kept).into_iter().find(|p| p.extension().is_some_and(|e| e == "deb"));
    let file = file.ok_or("no package came")?;
    output("dpkg-deb", &["-x", text(&file), "."], &kept)?;
    std::fs::write(kept.join("whole"), "").map_err(|e| e.to_string())?;
    Ok(kept)
}

/// All files below.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|e| match e.file_type() {
            Ok(kind) if kind.is_dir() => files(&e.path()),
            _ => vec![e.path()],
        })
        .collect()
}

/// Kernel and initrd of the guest.
fn guest(bench: &Bench) -> Result<(PathBuf, PathBuf), String> {
    let tree = kernel()?;
    let all = files(&tree);
    let named = |start: &str| {
        all.iter().find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start)))
    };
    let image = named("vmlinuz-").ok_or("the package has no vmlinuz")?.clone();
    let root = bench.path("initrd.d");
    let copy = |from: &Path, to: &str| {
        let to = root.join(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).map(drop).map_err(|e| format!("{}: {e}", from.display()))
    };
    for folder in ["dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    copy(Path::new("/bin/busybox"), "bin/busybox")?;
    copy(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vhost_init.sh")), "init")?;
    for module in MODULES {
        if let Some(found) = named(&format!("{module}.ko")) {
            copy(found, &format!("modules/{module}.ko"))?;
        }
    }
    let initrd = bench.path("initrd");
    let pack = format!("chmod 755 init && find . | busybox cpio -o -H newc > {}", initrd.display());
    output("sh", &["-c", &pack], &root)?;
    Ok((image, initrd))
}

struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    console: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(bench: &Bench, kernel: &Path, initrd: &Path) -> std::io::Result<Self> {
        let (console, place) = (bench.path("console"), bench.path("qmp"));
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,tb-size=128", "-machine", "q35,memory-backend=m", "-m", "192"])
            .args(["-object", "memory-backend-memfd,id=m,size=192M,share=on", "-smp", "2"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", place.display())])
            .args(["-device", "pcie-root-port,id=slot1,chassis=1"])
            .args(["-kernel", text(kernel), "-initrd", text(initrd)])
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null())
            .spawn()?;
        eventually("QEMU listens", || place.exists());
        let stream = UnixStream::connect(&place)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qemu = Self { child, qmp: BufReader::new(stream), console };
        qemu.line();
        qemu.order(r#"{"execute":"qmp_capabilities"}"#);
        Ok(qemu)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.qmp.read_line(&mut line).expect("QEMU speaks");
        line
    }

    fn order(&mut self, order: &str) {
        writeln!(self.qmp.get_mut(), "{order}").expect("QEMU listens");
        loop {
            let line = self.line();
            assert!(!line.contains("\"error\""), "{order}: {line}");
            if line.contains("\"return\"") {
                return;
            }
        }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn awaits(&self, words: &str) {
        eventually(&format!("the guest says `{words}`: {}", self.console()), || {
            let console = self.console();
            assert!(!console.contains("GUEST failed"), "{console}");
            console.contains(words)
        });
    }
}

#[expect(clippy::disallowed_methods, reason = "a test bounds its own patience")]
fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_works_on_while_its_server_is_killed() {
    let bench = Bench::new(64);
    let (kernel, initrd) = match guest(&bench) {
        Ok(found) => found,
        Err(obstacle) => return skip(TEST, &obstacle),
    };
    let (image, place) = (bench.image(), bench.path("v.sock"));
    let serve = || Server::start(&["serve", "--file", text(&image), "--vhost-user", text(&place)]);
    let mut server = serve();
    let mut qemu = match Qemu::start(&bench, &kernel, &initrd) {
        Ok(qemu) => qemu,
        Err(error) => return skip(TEST, &format!("qemu-system-x86_64: {error}")),
    };
    qemu.awaits("GUEST booted");
    qemu.order(&format!(
        r#"{{"execute":"chardev-add","arguments":{{"id":"c","backend":{{"type":"socket","data":{{
        "addr":{{"type":"unix","data":{{"path":"{}"}}}},"server":false,"reconnect":1}}}}}}}}"#,
        place.display()
    ));
    qemu.order(
        r#"{"execute":"device_add","arguments":{"driver":"vhost-user-blk-pci","chardev":"c","id":"disk","bus":"slot1"}}"#,
    );
    qemu.awaits("GUEST disk");
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(700));
        server.kill();
        server = serve();
    }
    qemu.awaits("GUEST found all again");
    qemu.order(r#"{"execute":"device_del","arguments":{"id":"disk"}}"#);
    qemu.awaits("GUEST gave the disk back");
    server.terminate();
}
