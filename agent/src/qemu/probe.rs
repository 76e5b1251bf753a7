//! Whether KVM can be trusted here: an open /dev/kvm proves nothing (some hosts
//! offer one under which a stock guest hangs for ever), so a guest of 512 bytes
//! must come up under it first.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::arguments::Accelerator;
use super::process::boot_id;

/// The probe ends within 0.1 s where KVM works.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the probe writes to the debug-exit port; QEMU ends with `value << 1 | 1`.
const PROBE_VALUE: u8 = 0x2a;
const PROBE_STATUS: i32 = (PROBE_VALUE as i32) << 1 | 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub accelerator: Accelerator,
    pub reason: String,
    /// The group by which QEMU may open /dev/kvm.
    pub kvm_group: Option<u32>,
}

/// Chooses once a boot; `cache` remembers.
pub fn choose(cache: &Path) -> Choice {
    let boot = boot_id().unwrap_or_default();
    if let Ok(text) = std::fs::read_to_string(cache) {
        let mut lines = text.lines();
        if let (Some(b), Some(name), Some(reason)) = (lines.next(), lines.next(), lines.next())
            && b == boot
        {
            return choice(name == Accelerator::Kvm.name(), reason.to_owned());
        }
    }
    let (kvm, reason) = judge();
    let chosen = choice(kvm, reason);
    let text = format!("{boot}\n{}\n{}\n", chosen.accelerator.name(), chosen.reason);
    if let Err(error) = std::fs::write(cache, text) {
        tracing::warn!(%error, "cannot remember the accelerator; it is probed again next time");
    }
    chosen
}

fn choice(kvm: bool, reason: String) -> Choice {
    use std::os::unix::fs::MetadataExt;
    let accelerator = if kvm { Accelerator::Kvm } else { Accelerator::Tcg };
    let group = std::fs::metadata("/dev/kvm").ok().map(|m| m.gid());
    Choice { accelerator, reason, kvm_group: group.filter(|_| kvm) }
}

fn judge() -> (bool, String) {
    use std::os::unix::fs::MetadataExt;
    let modules = ["kvm_intel", "kvm_amd"];
    let Some(module) = modules.iter().find(|m| Path::new("/sys/module").join(m).exists()) else {
        return (false, "neither kvm_intel nor kvm_amd is loaded".into());
    };
    // Guests open it as users of their own: its group must be allowed, or everyone.
    match std::fs::metadata("/dev/kvm") {
        Err(e) => return (false, format!("/dev/kvm: {e}")),
        Ok(m) if m.mode() & 0o066 == 0 => {
            return (
                false,
                "/dev/kvm is root's alone; its group must be allowed (mode 0660)".into(),
            );
        }
        Ok(_) => {}
    }
    match probe(Accelerator::Kvm) {
        Ok(()) => (true, format!("{module} is loaded and a probe guest answered")),
        Err(reason) => (false, format!("{module} is loaded, but the probe guest failed: {reason}")),
    }
}

/// `mov al, VALUE; out 0xf4, al; hlt; jmp $-1`, and the boot signature.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![0xb0, PROBE_VALUE, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// Boots the sector and waits for its word.
fn probe(accelerator: Accelerator) -> Result<(), String> {
    let image = std::env::temp_dir().join(format!("hostplane-probe-{}", std::process::id()));
    std::fs::write(&image, boot_sector()).map_err(|e| format!("{}: {e}", image.display()))?;
    let result = run(accelerator, &image);
    let _ = std::fs::remove_file(&image);
    result
}

fn run(accelerator: Accelerator, image: &Path) -> Result<(), String> {
    let drive = format!("file={},format=raw,if=floppy,readonly=on", image.display());
    let mut child = Command::new(super::PROGRAM)
        .args(["-machine", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-m", "16M"])
        .args(accelerator.arguments())
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-sandbox", "on"])
        .args(["-drive", &drive])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("run {}: {e}", super::PROGRAM))?;
    let pause = Duration::from_millis(20);
    let mut waited = Duration::ZERO;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.code() == Some(PROBE_STATUS) => return Ok(()),
            Ok(Some(status)) => return Err(format!("QEMU ended with {status}")),
            Ok(None) if waited < PROBE_TIMEOUT => std::thread::sleep(pause),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer within {} s", PROBE_TIMEOUT.as_secs()));
            }
            Err(e) => return Err(e.to_string()),
        }
        waited += pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same guest under emulation: proves the probe itself, KVM or not.
    #[test]
    fn the_probe_guest_answers_under_emulation() {
        if Command::new(super::super::PROGRAM).arg("--version").output().is_err() {
            sim::skip("the_probe_guest_answers_under_emulation", "QEMU is not installed");
            return;
        }
        assert_eq!(probe(Accelerator::Tcg), Ok(()));
    }
}
