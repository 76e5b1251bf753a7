//! The dataplane alone: a file, a command, and no daemon.

use std::net::Ipv4Addr;
use std::process::{Command, Output};
use std::time::Duration;

use crate::traffic::{Flow, connects, echo_server};
use crate::world::{INTERNET, World, has, now};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const PATIENCE: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_secs(1);

fn file(world: &World, port: u16) -> String {
    let name = &world.name;
    format!(
        r#"
name = "{name}"
[uplink]
device = "{name}-up"
gateway = "198.51.100.1"
ranges = ["198.51.100.128/25"]
[group.web]
ingress = [{{ protocol = "tcp", ports = {port}, from = "0.0.0.0/0" }}]
[interface.web]
device = "{name}g1"
mac = "02:00:00:00:01:01"
address = "10.0.0.10/24"
groups = ["web"]
elastic = "{ELASTIC}"
"#
    )
}

/// The deed in the host's namespace, with the world's own folders.
fn alone(world: &World, arguments: &[&str]) -> Output {
    let mut command = world.command("host", env!("CARGO_BIN_EXE_dataplane"));
    command.args(arguments);
    if arguments[0] != "check" {
        command.arg("--state-dir").arg(world.path("state"));
        command.arg("--run-dir").arg(world.path("run"));
    }
    command.output().unwrap()
}

fn write(world: &World, text: &str) -> String {
    let path = world.path("fw.toml");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn guest(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    world.add_guest(1, 1, "10.0.0.10");
    world.configure_guest(1);
    Some(world)
}

/// A terminal is shown how far it is, and a file is not.
#[test]
fn an_application_of_many_changes_shows_how_far_it_is() {
    let test = "an_application_of_many_changes_shows_how_far_it_is";
    let Some(world) = guest(test) else { return };
    let blocked = |third: u32| -> String {
        let nets: Vec<String> = (0..200).map(|n| format!("\"203.0.{third}.{n}/32\"")).collect();
        format!("blocklist = [{}]\n{}", nets.join(", "), file(&world, 22))
    };
    let path = write(&world, &blocked(113));
    let program = env!("CARGO_BIN_EXE_dataplane");
    let (state, run) = (world.path("state"), world.path("run"));
    let (state, run) = (state.display(), run.display());
    let deed = format!("{program} apply {path} --state-dir {state} --run-dir {run}");
    let mut terminal = world.command("host", "script");
    let shown = good(&terminal.args(["-qec", &deed, "/dev/null"]).output().unwrap());
    assert!(shown.contains(" changes, ") && shown.contains("in force, after"), "{shown:?}");
    let path = write(&world, &blocked(114));
    let output = alone(&world, &["apply", &path]);
    good(&output);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!told.contains("changes"), "{told}");
}

#[test]
fn a_file_is_in_force_without_a_daemon_and_again_changes_nothing() {
    let test = "a_file_is_in_force_without_a_daemon_and_again_changes_nothing";
    let Some(world) = guest(test) else { return };
    let path = write(&world, &file(&world, 22));
    for port in [22, 23] {
        echo_server(&world, "g1", port);
    }
    // A dry run leaves nothing behind.
    let said = good(&alone(&world, &["apply", &path, "--dry-run"]));
    assert!(said.contains("+ interface web: device"), "{said}");
    assert!(said.contains("+ rule web: ingress tcp 22 from 0.0.0.0/0"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert!(!connects(&world, "net", ELASTIC, 22, SHORT));

    good(&alone(&world, &["apply", &path]));
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 23, SHORT));
    let again = good(&alone(&world, &["apply", &path]));
    assert!(again.contains("in force as it was"), "{again}");

    // Another rule: the open flow goes on, a new one is judged anew.
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    let path = write(&world, &file(&world, 23));
    let said = good(&alone(&world, &["apply", &path, "--json"]));
    let told: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told["difference"].as_array().unwrap().len(), 2, "{said}");
    assert!(connects(&world, "net", ELASTIC, 23, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 22, SHORT));
    let before = flow.rounds();
    std::thread::sleep(Duration::from_millis(200));
    assert!(flow.rounds() > before, "the open flow stood still");
    flow.finish().unwrap();

    let said = good(&alone(&world, &["show", "--name", &world.name, "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&said).unwrap();
    let web = &shown["interfaces"][0];
    assert_eq!((&web["name"], &web["attached"]), (&"web".into(), &true.into()), "{said}");
    assert!(web["packets"]["ingress-denied"].as_u64().unwrap() >= 2, "{said}");
    assert!(web["flows"].as_u64().unwrap() >= 1, "{said}");

    good(&alone(&world, &["remove", "--name", &world.name]));
    assert!(!world.path("state").exists() && !world.path("run").exists());
    let pins = format!("/sys/fs/bpf/hostplane-{}", world.name);
    assert!(!std::path::Path::new(&pins).exists(), "pins are left");
    // The kernel lets go of an unpinned link by a worker of its own, in its own time.
    let begun = now();
    while connects(&world, "net", ELASTIC, 23, SHORT) {
        assert!(now() - begun < Duration::from_secs(60), "packets still pass");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_file_brings_a_private_guest_to_the_world_by_a_nat_gateway() {
    let test = "a_file_brings_a_private_guest_to_the_world_by_a_nat_gateway";
    let Some(world) = guest(test) else { return };
    let private = file(&world, 22)
        .replace(&format!("elastic = \"{ELASTIC}\""), "route-table = \"private\"")
        + "[route-table.private]\nlocal = [\"10.0.0.0/16\"]\n\
           routes = [{ to = \"0.0.0.0/0\", via = \"nat:out\" }]\n";
    let gateway = format!("[nat-gateway.out]\naddress = \"10.0.1.9\"\nelastic = \"{ELASTIC}\"\n");
    echo_server(&world, "net", 7);
    let path = write(&world, &(private + &gateway));
    good(&alone(&world, &["apply", &path]));
    assert!(connects(&world, "g1", INTERNET, 7, PATIENCE));
    assert!(!connects(&world, "net", ELASTIC, 22, SHORT), "nobody comes in");
    let again = good(&alone(&world, &["apply", &path]));
    assert!(again.contains("in force as it was"), "{again}");
    let said = good(&alone(&world, &["show", "--name", &world.name, "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&said).unwrap();
    let out = &shown["nat_gateways"][0];
    assert_eq!((&out["name"], &out["elastic"]), (&"out".into(), &ELASTIC.to_string().into()));
    assert!(out["packets"]["new-flow"].as_u64().unwrap() >= 1, "{said}");
    assert!(out["packets"]["nat-unsolicited"].as_u64().unwrap() >= 1, "{said}");
    let said = good(&alone(&world, &["show", "--name", &world.name]));
    assert!(said.contains(&format!("out: NAT gateway, elastic {ELASTIC}")), "{said}");
}

#[test]
fn a_wrong_file_or_a_missing_device_changes_nothing_and_says_what_to_write() {
    let test = "a_wrong_file_or_a_missing_device_changes_nothing_and_says_what_to_write";
    let Some(world) = guest(test) else { return };
    let path = write(&world, &file(&world, 22));
    good(&alone(&world, &["apply", &path]));
    echo_server(&world, "g1", 22);
    let wrong = file(&world, 23).replace("groups = [\"web\"]", "groups = [\"wbe\"]");
    let path = write(&world, &wrong);
    for deed in ["check", "apply"] {
        let output = alone(&world, &[deed, &path]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(said.contains("line 13: groups: there is no group `wbe`"), "{said}");
        assert!(said.contains("one of: web"), "{said}");
    }
    let path = write(&world, &file(&world, 23).replace("g1\"", "g9\""));
    let output = alone(&world, &["apply", &path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("g9: it is not on this host"), "{said}");
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE), "what was in force stays");
}

#[test]
fn a_server_of_the_file_is_asked_while_it_lives_and_reads_it_again_on_sighup() {
    let test = "a_server_of_the_file_is_asked_while_it_lives_and_reads_it_again_on_sighup";
    let Some(world) = guest(test) else { return };
    let path = write(&world, &file(&world, 22));
    good(&alone(&world, &["apply", &path]));
    for port in [22, 23, 24] {
        echo_server(&world, "g1", port);
    }
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    let mut server = world
        .command("host", env!("CARGO_BIN_EXE_dataplane"))
        .args(["serve", &path, "--state-dir"])
        .arg(world.path("state"))
        .arg("--run-dir")
        .arg(world.path("run"))
        .spawn()
        .unwrap();
    let begun = now();
    while !world.path("run/dataplane.sock").exists() {
        assert!(now() - begun < Duration::from_secs(20), "the server did not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    let path = write(&world, &file(&world, 23));
    let said = good(&alone(&world, &["apply", &path]));
    assert!(said.contains("in force, after"), "{said}");
    assert!(connects(&world, "net", ELASTIC, 23, PATIENCE));
    write(&world, &file(&world, 24));
    let pid = nix::unistd::Pid::from_raw(server.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let begun = now();
    while !connects(&world, "net", ELASTIC, 24, SHORT) {
        assert!(now() - begun < Duration::from_secs(10), "SIGHUP was not heard");
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(connects(&world, "net", ELASTIC, 24, PATIENCE), "in force without it");
    flow.finish().unwrap();
}

/// Runs the page's own commands, with names of this world's.
#[test]
fn the_guides_five_minutes_work_as_they_are_written() {
    let test = "the_guides_five_minutes_work_as_they_are_written";
    if !has(test, "ping") {
        return;
    }
    let Some(world) = World::new(test) else { return };
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/guide/dataplane.md");
    let page = std::fs::read_to_string(page).unwrap();
    let name = &world.name;
    let own = |text: &str| {
        // Longest first, so that none is half replaced.
        text.replace("name = \"box\"", &format!("name = \"{name}\""))
            .replace("--name box", &format!("--name {name}"))
            .replace("box-", &format!("{name}-b"))
    };
    let (five_minutes, _) = page.split_once("## The file").unwrap();
    let blocks = |kind: &str| -> Vec<String> {
        let begin = format!("```{kind}\n");
        let parts = five_minutes.split(&begin).skip(1);
        parts.map(|part| own(part.split_once("```").unwrap().0)).collect()
    };
    std::fs::write(world.path("firewall.toml"), &blocks("toml")[0]).unwrap();
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_dataplane")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let script = blocks("sh").join("\n");
    let mut shell = world.command("host", "sh");
    shell.args(["-exc", &script]).current_dir(world.dir.path()).env("PATH", path);
    let output = shell.output().unwrap();
    for n in ["a", "b"] {
        let namespace = format!("{name}-b{n}");
        _ = Command::new("ip").args(["netns", "del", &namespace]).output();
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(script.matches("dataplane ").count(), 6, "every command was found");
}
