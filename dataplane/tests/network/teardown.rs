//! Taps as QEMU wants them, and nothing left behind.

use std::process::Command;

use rpc::dataplane::Device;

use crate::world::{World, has, run};

const NOBODY: u32 = 65_534;

fn links(world: &World) -> String {
    run(world.command("host", "ip").args(["-d", "link"]))
}

fn tap_name(world: &World) -> String {
    format!("{}t9", world.name)
}

/// A guest on a tap that the dataplane makes.
fn add_tap(world: &mut World) {
    world.add_guest(9, 1, "10.0.0.9");
    let name = tap_name(world);
    world.desired.interfaces.last_mut().unwrap().device = Device::Tap { name, owner_uid: NOBODY };
}

fn pins(world: &World) -> bool {
    std::path::Path::new("/sys/fs/bpf").join(format!("hostplane-{}", world.name)).exists()
}

#[test]
fn a_tap_is_opened_by_its_owner_by_name_and_by_no_other_user() {
    let test = "a_tap_is_opened_by_its_owner_by_name_and_by_no_other_user";
    let Some(mut world) = World::new(test) else { return };
    if !has(test, "python3") {
        return;
    }
    add_tap(&mut world);
    world.start();
    world.apply();
    let name = tap_name(&world);
    // The file is opened first: its mode is the machine's matter, the tap is ours.
    // Then as QEMU does: TUNSETIFF by name with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, then offloads.
    let script = format!(
        r#"
import fcntl, os, struct, sys
f = os.open("/dev/net/tun", os.O_RDWR)
os.setgid({NOBODY}); os.setuid(int(sys.argv[1]))
try:
    fcntl.ioctl(f, 0x400454ca, struct.pack("16sH22s", b"{name}", 0x5002, b""))
    fcntl.ioctl(f, 0x400454d0, 0x1f)
    print("opened")
except OSError as e:
    print("refused", e.errno)
"#
    );
    let open_as = |uid: u32| {
        let uid = uid.to_string();
        run(world.command("host", "/usr/bin/env").args(["python3", "-c", &script, &uid]))
    };
    assert_eq!(open_as(NOBODY).trim(), "opened");
    assert_eq!(open_as(12_345).trim(), "refused 1");
    let shown = links(&world);
    let tap = shown.split(&name).nth(1).unwrap();
    assert!(tap.contains("NOARP") && tap.contains("mtu 1400"), "{shown}");
}

#[test]
fn a_tap_leaves_with_its_interface_and_a_foreign_device_is_never_taken() {
    let test = "a_tap_leaves_with_its_interface_and_a_foreign_device_is_never_taken";
    let Some(mut world) = World::new(test) else { return };
    add_tap(&mut world);
    world.start();
    world.apply();
    let name = tap_name(&world);
    assert!(links(&world).contains(&name));
    let interfaces = std::mem::take(&mut world.desired.interfaces);
    world.apply();
    assert!(!links(&world).contains(&name));

    run(world.command("host", "ip").args(["tuntap", "add", &name, "mode", "tap"]));
    world.desired.interfaces = interfaces;
    world.desired.generation += 1;
    let error = world.try_apply().unwrap_err();
    assert_eq!(error.kind, rpc::Kind::Conflict, "{error}");
    world.desired.interfaces.clear();
    world.apply();
    assert!(links(&world).contains(&name), "what others made stays");
}

#[test]
fn teardown_leaves_nothing_also_after_kill_minus_nine_and_twice() {
    let test = "teardown_leaves_nothing_also_after_kill_minus_nine_and_twice";
    let Some(mut world) = World::new(test) else { return };
    add_tap(&mut world);
    world.start();
    world.apply();
    assert!(pins(&world));
    let refused = world.teardown();
    assert!(!refused.status.success(), "a daemon is alive");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("alive"));
    assert!(pins(&world));

    world.kill();
    assert!(pins(&world));
    for _ in 0..2 {
        let torn = world.teardown();
        assert!(torn.status.success(), "{}", String::from_utf8_lossy(&torn.stderr));
        let shown = links(&world);
        assert!(!shown.contains(&tap_name(&world)), "{shown}");
        assert!(!shown.contains("-punt"), "{shown}");
        assert!(!pins(&world));
    }
    let programs = Command::new("bpftool").args(["net", "show"]).output();
    if let Ok(programs) = programs {
        let shown = run(world.command("host", "bpftool").args(["net", "show"]));
        assert!(!shown.contains("tcx"), "{shown}\n{programs:?}");
    }

    // All of it comes back by itself: the state is kept.
    world.start();
    assert!(!world.status().adopted);
    assert!(links(&world).contains(&tap_name(&world)));
}

#[test]
fn a_tap_made_just_before_a_crash_is_no_orphan() {
    let test = "a_tap_made_just_before_a_crash_is_no_orphan";
    let Some(mut world) = World::new(test) else { return };
    add_tap(&mut world);
    world.start();
    world.apply();
    let name = tap_name(&world);
    // As after a crash between the record and the ioctl, and right after the ioctl:
    // the names are on disk, one tap is there and one is not.
    world.kill();
    let record = world.path("state/dataplane/devices.json");
    let noted = std::fs::read_to_string(&record).unwrap();
    assert!(noted.contains(&name), "{noted}");
    let absent = format!("{}t8", world.name);
    std::fs::write(
        &record,
        noted.replace(&format!("\"{name}\""), &format!("\"{absent}\": 0, \"{name}\"")),
    )
    .unwrap();
    assert!(world.teardown().status.success());
    assert!(!links(&world).contains(&name));
    assert!(!std::fs::read_to_string(&record).unwrap().contains(&absent));
}

#[test]
fn a_second_daemon_of_the_same_name_says_so_and_ends() {
    let test = "a_second_daemon_of_the_same_name_says_so_and_ends";
    let Some(mut world) = World::new(test) else { return };
    world.start();
    world.apply();
    let second = world.try_second();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another dataplane is alive"));
    world.status();
}
