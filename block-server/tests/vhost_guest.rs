//! A real guest of a real QEMU on the second front: its disk is plugged in while
//! it runs, the server is killed or replaced under its load, and the disk is taken out.

mod fixture;

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use fixture::guest::{Guest, Image};
use fixture::home::{Home, MIB, id, writer};
use fixture::{Bench, Server, skip, succeed, text};
use rpc::block::{NewExport, NewVolume, VolumeHealth};

static IMAGE: LazyLock<Result<Image, String>> = LazyLock::new(|| Image::make("vhost.sh"));

/// A guest that has booted; `None`, and a word about it, where none can be.
fn boot(test: &str, place: &Path) -> Option<Guest> {
    let guest = IMAGE.as_ref().map_err(String::clone).and_then(|image| {
        Guest::start(place, image).map_err(|error| format!("qemu-system-x86_64: {error}"))
    });
    match guest {
        Ok(guest) => {
            guest.awaits("GUEST booted");
            Some(guest)
        }
        Err(obstacle) => {
            skip(test, &obstacle);
            None
        }
    }
}

/// Each of the guest's three writers goes on about once.
fn work_goes_on(guest: &Guest) {
    const ROUND: &str = "GUEST went round";
    guest.awaits_so_often(ROUND, guest.console().matches(ROUND).count() + 3);
}

fn all_is_found_again(guest: &mut Guest) {
    work_goes_on(guest);
    guest.tell("stop");
    guest.awaits("GUEST found all again");
    guest.unplug();
    guest.awaits("GUEST gave the disk back");
}

#[test]
fn a_guest_works_on_while_its_server_is_killed() {
    const TEST: &str = "a_guest_works_on_while_its_server_is_killed";
    let bench = Bench::new(64);
    let (image, place) = (bench.image(), bench.path("v.sock"));
    let serve = || Server::start(&["serve", "--file", text(&image), "--vhost-user", text(&place)]);
    let mut server = serve();
    let Some(mut guest) = boot(TEST, bench.folder()) else { return };
    guest.plug(&place);
    guest.awaits("GUEST disk");
    for _ in 0..5 {
        work_goes_on(&guest);
        server.kill();
        server = serve();
    }
    all_is_found_again(&mut guest);
    server.terminate();
}

/// By hand-overs, and by a death in between: QEMU comes to whoever serves next, and
/// the guest sees a pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_works_on_while_its_daemon_is_replaced_and_killed() {
    const TEST: &str = "a_guest_works_on_while_its_daemon_is_replaced_and_killed";
    let home = Home::new();
    let (mut server, client) = home.start();
    home.export(1, "disk", 64).await;
    let export = client.exports().await.unwrap().remove(0);
    let Some(mut guest) = boot(TEST, home.folder()) else { return };
    guest.plug(&export.vhost_user.expect("a daemon's exports have both fronts"));
    guest.awaits("GUEST disk");
    for round in 0..6 {
        work_goes_on(&guest);
        let threads = (round % 3 + 1).to_string();
        if round == 3 {
            server.kill();
            server = home.start_with(&["--threads", &threads]).0;
        } else {
            let (successor, _) = home.start_with(&["--threads", &threads, "--take-over"]);
            std::mem::replace(&mut server, successor).ended();
        }
    }
    all_is_found_again(&mut guest);
    client.delete_export("disk").await.unwrap();
    let volume = home.volumes().join(format!("{}.img", id(1)));
    succeed(TEST, "e2fsck", &["-f", "-n", text(&volume)]);
    server.terminate();
}

/// The guest is told so before it asks, and what it reads is what there is.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_sees_that_its_disk_is_read_only_and_cannot_write() {
    const TEST: &str = "a_guest_sees_that_its_disk_is_read_only_and_cannot_write";
    let home = Home::new();
    let source = home.source(4);
    let Some(sum) = succeed(TEST, "sha256sum", &[text(&source)]) else { return };
    let (server, client) = home.start();
    let new = NewVolume { size_bytes: 4 * MIB, source: Some(source) };
    client.put_volume(id(1), &new).await.unwrap();
    while client.volumes().await.unwrap()[0].state != VolumeHealth::Ready {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let new = NewExport { read_only: true, ..writer(id(1), 1) };
    let export = client.put_export("disk", &new).await.unwrap();
    let Some(mut guest) = boot(TEST, home.folder()) else { return };
    guest.plug(&export.vhost_user.expect("a daemon's exports have both fronts"));
    guest.awaits("ro=1");
    let sum = sum.split_whitespace().next().unwrap();
    guest.awaits(&format!("GUEST read {sum} and could not write"));
    guest.unplug();
    guest.awaits("GUEST gave the disk back");
    server.terminate();
}
