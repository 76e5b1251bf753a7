//! The image `tiny`: a distribution's own kernel, busybox and dropbear, made
//! from packages in seconds, without a mount, a loop device or the network
//! once the packages are cached.
//!
//! ```text
//!   initrd: busybox, the modules in loading order, guest/initrd-init.sh
//!   root:   ext4 by `mke2fs -d`: busybox, dropbear, e2fsprogs, guest/*
//! ```

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archive::Archive;
use super::{Doing, Error, Manifest, Store, kernel, packages, run};

/// The root disk as it is born; it grows into a larger volume at first boot.
const ROOT_BYTES: u64 = 64 << 20;

/// `tsc=reliable no_timer_check` spare the clock calibration, which an emulated
/// timer fails or drags out; one serial port is all there is.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check \
8250.nr_uarts=1 noreplace-smp cryptomgr.notests random.trust_cpu=on";

/// Programs beyond busybox, as they lie in their packages.
const PROGRAMS: [&str; 6] = [
    "usr/sbin/dropbear",
    "usr/bin/dropbearkey",
    "usr/bin/dbclient",
    "sbin/mke2fs",
    "sbin/resize2fs",
    "sbin/e2fsck",
];

/// Files of the guest: path, content, mode.
const FILES: [(&str, &str, u32); 15] = [
    ("etc/rc", include_str!("guest/rc.sh"), 0o755),
    ("etc/metadata", include_str!("guest/metadata.sh"), 0o755),
    ("etc/udhcpc.script", include_str!("guest/udhcpc.script"), 0o755),
    ("etc/inittab", include_str!("guest/inittab"), 0o644),
    (
        "etc/acpi/PWRF/00000080",
        "#!/bin/sh\necho 'hostplane: power button'\nexec /bin/poweroff\n",
        0o755,
    ),
    ("etc/passwd", "root:*:0:0:root:/root:/bin/sh\n", 0o644),
    ("etc/group", "root:x:0:\n", 0o644),
    ("etc/shells", "/bin/sh\n", 0o644),
    ("etc/hostname", "tiny\n", 0o644),
    ("etc/hosts", "127.0.0.1 localhost\n", 0o644),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n", 0o644),
    ("etc/profile", "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n", 0o644),
    (
        "etc/mke2fs.conf",
        "[defaults]\n\tbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr\n\tblocksize = 4096\n\tinode_size = 256\n\tinode_ratio = 16384\n[fs_types]\n\text4 = {\n\t\tfeatures = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize\n\t}\n\tfloppy = {\n\t}\n\tsmall = {\n\t}\n\tbig = {\n\t}\n\thuge = {\n\t}\n",
        0o644,
    ),
    ("etc/motd", "Hostplane tiny image\n", 0o644),
    ("etc/fstab", "", 0o644),
];

/// Builds the image under `name`; packages are kept in `cache`.
pub fn build(store: &Store, name: &str, cache: &Path) -> Result<Manifest, Error> {
    store.put(name, |folder| {
        let work = folder.join(".work");
        let result = fill(folder, &work, cache);
        let _ = fs::remove_dir_all(&work);
        result
    })
}

fn fill(folder: &Path, work: &Path, cache: &Path) -> Result<Option<String>, Error> {
    let kernel_names = packages::kernel()?;
    let mut names = packages::closure(&packages::USER_SPACE)?;
    names.extend(kernel_names.iter().cloned());
    let unpacked = work.join("packages");
    fs::create_dir_all(&unpacked).doing("create folder", &unpacked)?;
    for package in packages::fetch(&names, cache)? {
        packages::unpack(&package, &unpacked)?;
    }
    write_kernel(folder, &unpacked)?;
    let root = work.join("root");
    lay_out(&root, &unpacked)?;
    make_disk(&folder.join("root.raw"), &root)?;
    Ok(Some(COMMAND_LINE.to_owned()))
}

fn write_kernel(folder: &Path, unpacked: &Path) -> Result<(), Error> {
    let image = kernel::find_image(unpacked)?;
    let image = kernel::unpacked(fs::read(&image).doing("read", &image)?);
    write(&folder.join("vmlinuz"), &image, 0o644)?;
    let busybox = find_program(unpacked, "bin/busybox")?;
    let mut initrd = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "root", "lib", "lib/modules"] {
        initrd.folder(name);
    }
    initrd.file("bin/busybox", &fs::read(&busybox).doing("read", &busybox)?);
    initrd.file("init", include_bytes!("guest/initrd-init.sh"));
    let mut order = String::new();
    for module in kernel::modules(unpacked)? {
        initrd.file(&format!("lib/modules/{}.ko", module.name), &module.content);
        order.push_str(&format!("{}.ko\n", module.name));
    }
    initrd.file("lib/modules/order", order.as_bytes());
    write(&folder.join("initrd"), &initrd.finish(), 0o644)
}

/// Lays the root file system out as a folder.
fn lay_out(root: &Path, unpacked: &Path) -> Result<(), Error> {
    let folders = [
        "bin", "sbin", "usr/bin", "usr/sbin", "etc", "dev", "proc", "sys", "run", "tmp", "root",
        "mnt", "var/log", "var/run", "var/lib",
    ];
    for folder in folders {
        let path = root.join(folder);
        fs::create_dir_all(&path).doing("create folder", &path)?;
    }
    for program in PROGRAMS {
        let source = find_program(unpacked, program)?;
        copy(&source, &root.join(program))?;
        for library in libraries(unpacked, &source)? {
            let inside = library.strip_prefix(unpacked).unwrap_or(&library).to_owned();
            copy(&library, &root.join(inside))?;
        }
    }
    link("mke2fs", &root.join("sbin/mkfs.ext4"))?;
    copy_loader(root, unpacked)?;
    let busybox = find_program(unpacked, "bin/busybox")?;
    copy(&busybox, &root.join("bin/busybox"))?;
    let applets = run(Command::new(&busybox).arg("--list"))?;
    for applet in String::from_utf8_lossy(&applets).lines() {
        let taken = ["bin", "sbin", "usr/bin", "usr/sbin"]
            .iter()
            .any(|d| root.join(d).join(applet).exists());
        if !taken {
            link("busybox", &root.join("bin").join(applet))?;
        }
    }
    link("/bin/busybox", &root.join("sbin/init"))?;
    for (path, content, mode) in FILES {
        let path = root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).doing("create folder", parent)?;
        }
        write(&path, content.as_bytes(), mode)?;
    }
    Ok(())
}

fn make_disk(disk: &Path, root: &Path) -> Result<(), Error> {
    let file = fs::File::create(disk).doing("create", disk)?;
    file.set_len(ROOT_BYTES).doing("size", disk)?;
    let mut command = Command::new("mke2fs");
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "hostplane", "-J", "size=4"]);
    command.args(["-E", "root_owner=0:0", "-d"]).arg(root).arg(disk);
    run(&mut command).map(drop)
}

/// A file of an unpacked package; newer distributions keep `/bin` in `/usr/bin`.
fn find_program(unpacked: &Path, path: &str) -> Result<PathBuf, Error> {
    [unpacked.join(path), unpacked.join("usr").join(path)]
        .into_iter()
        .find(|p| p.is_file())
        .ok_or_else(|| Error::Program {
            program: "dpkg-deb".into(),
            cause: format!("no package has {path}"),
        })
}

const LOADER: &str = "ld-linux-x86-64.so.2";

fn loader(unpacked: &Path) -> Result<PathBuf, Error> {
    let places = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64"];
    places.iter().map(|p| unpacked.join(p).join(LOADER)).find(|p| p.is_file()).ok_or_else(|| {
        Error::Program { program: "dpkg-deb".into(), cause: format!("libc6 has no {LOADER}") }
    })
}

/// The loader goes where every program's header says.
fn copy_loader(root: &Path, unpacked: &Path) -> Result<(), Error> {
    copy(&loader(unpacked)?, &root.join("lib64").join(LOADER))
}

/// The shared libraries of a program, as the packages' own loader resolves them.
fn libraries(unpacked: &Path, program: &Path) -> Result<Vec<PathBuf>, Error> {
    let places = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
    let path: Vec<String> =
        places.iter().map(|p| unpacked.join(p).to_string_lossy().into_owned()).collect();
    let mut command = Command::new(loader(unpacked)?);
    command.arg("--library-path").arg(path.join(":")).arg("--list").arg(program);
    let text = run(&mut command)?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| line.split(" => ").nth(1)?.split(" (").next().map(PathBuf::from))
        .filter(|library| library.starts_with(unpacked))
        .collect())
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).doing("create folder", parent)?;
    }
    fs::copy(from, to).doing("copy to", to).map(drop)
}

fn link(target: &str, at: &Path) -> Result<(), Error> {
    symlink(target, at).doing("link", at)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    fs::write(path, content).doing("write", path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).doing("set the mode of", path)
}
