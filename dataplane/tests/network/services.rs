//! What the host serves at the tap, asked by clients that are not ours.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::GroupId;
use rpc::dataplane::{Services, Tokens};

use crate::world::{World, has, now, run, skip};

/// How long what must happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn world(test: &str, services: Services) -> Option<World> {
    let mut world = World::new(test)?;
    world.add_guest(1, 1, "10.0.0.5").services = services;
    world.start();
    world.apply();
    Some(world)
}

fn script(world: &World, text: &str) -> PathBuf {
    let path = world.path("told.sh");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The file's lines, once there are as many.
fn lines(path: &Path, count: usize) -> Vec<String> {
    let begun = now();
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let whole = text.matches('\n').count();
        if whole >= count || now() - begun > PATIENCE {
            return text.lines().take(whole).map(str::to_owned).collect();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn option_set() -> Services {
    Services {
        ntp: vec![Ipv4Addr::new(169, 254, 169, 123), Ipv4Addr::new(10, 0, 0, 7)],
        netbios: vec![Ipv4Addr::new(10, 0, 0, 8)],
        netbios_node: Some(2),
        ..Services::default()
    }
}

#[test]
fn dhcpcd_learns_an_option_set_and_comes_back_to_its_lease() {
    let test = "dhcpcd_learns_an_option_set_and_comes_back_to_its_lease";
    if !has(test, "dhcpcd") {
        return;
    }
    let Some(world) = world(test, option_set()) else { return };
    let told = world.path("told");
    let hook = script(
        &world,
        &format!(
            "#!/bin/sh\n[ -n \"$new_ip_address\" ] || exit 0\n\
             echo \"$reason $new_ip_address/$new_subnet_cidr router=$new_routers \
             mtu=$new_interface_mtu host=$new_host_name domain=$new_domain_name \
             dns=$new_domain_name_servers ntp=$new_ntp_servers \
             netbios=$new_netbios_name_servers/$new_netbios_node_type \
             routes=$new_classless_static_routes\" >> {}\n",
            told.display()
        ),
    );
    let configuration = world.path("dhcpcd.conf");
    std::fs::write(
        &configuration,
        "option domain_name_servers, domain_name, host_name, ntp_servers, interface_mtu\n\
         option classless_static_routes, netbios_name_servers, netbios_node_type\n\
         ipv4only\nnoarp\nnoipv4ll\ntimeout 50\n",
    )
    .unwrap();
    // Leases, pids and the resolver's file go into folders that only it sees.
    let once = format!("dhcpcd -q -1 -B -f {} -c {} eth0", configuration.display(), hook.display());
    let both = format!(
        "set -e; mkdir -p /var/lib/dhcpcd /run/dhcpcd
         mount -t tmpfs none /var/lib/dhcpcd; mount -t tmpfs none /run/dhcpcd
         {once}; {once}"
    );
    run(world.command("g1", "unshare").args(["-m", "sh", "-c", &both]));
    let told: Vec<String> =
        lines(&told, 2).into_iter().filter(|l| !l.starts_with("CARRIER")).collect();
    let expected = "10.0.0.5/24 router=10.0.0.1 mtu=1400 host=host-1 domain=region-1.internal \
                    dns=10.0.0.2 ntp=169.254.169.123 10.0.0.7 netbios=10.0.0.8/2 \
                    routes=169.254.169.254/32 10.0.0.1 0.0.0.0/0 10.0.0.1";
    assert_eq!(told.first(), Some(&format!("BOUND {expected}")), "{told:#?}");
    assert!(told.contains(&format!("REBOOT {expected}")), "{told:#?}");
}

#[test]
fn a_client_renews_its_lease_with_the_server_that_gave_it() {
    let test = "a_client_renews_its_lease_with_the_server_that_gave_it";
    if !has(test, "busybox") {
        return;
    }
    let Some(world) = world(test, option_set()) else { return };
    let told = world.path("told");
    let hook = script(
        &world,
        &format!(
            "#!/bin/sh\ncase $1 in bound|renew) ip addr replace $ip/$mask dev eth0\n\
             echo \"$1 $ip ntp=$ntpsrv wins=$wins routes=$staticroutes\" >> {};; esac\n",
            told.display()
        ),
    );
    let mut client = world
        .command("g1", "busybox")
        .args(["udhcpc", "-i", "eth0", "-f", "-t", "30", "-T", "1", "-O", "ntpsrv", "-O", "wins"])
        .args(["-O", "staticroutes", "-s"])
        .arg(hook)
        .spawn()
        .unwrap();
    let bound = lines(&told, 1);
    let pid = nix::unistd::Pid::from_raw(client.id() as i32);
    // nsenter has become it.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).unwrap();
    let both = lines(&told, 2);
    client.kill().unwrap();
    client.wait().unwrap();
    let expected = "10.0.0.5 ntp=169.254.169.123 10.0.0.7 wins=10.0.0.8 \
                    routes=169.254.169.254/32 10.0.0.1 0.0.0.0/0 10.0.0.1";
    assert_eq!(bound, [format!("bound {expected}")]);
    assert_eq!(both.get(1), Some(&format!("renew {expected}")), "{both:?}");
}

#[test]
fn a_client_of_another_makes_sets_its_clock_by_the_hosts() {
    let test = "a_client_of_another_makes_sets_its_clock_by_the_hosts";
    if !has(test, "ntpdig") {
        return;
    }
    let Some(world) = world(test, Services::default()) else { return };
    world.configure_guest(1);
    let said = run(world.command("g1", "ntpdig").args(["-j", "-t", "30", "169.254.169.123"]));
    let said: serde_json::Value = serde_json::from_str(said.trim()).unwrap();
    assert_eq!(said["stratum"], 10, "{said}");
    let offset = said["offset"].as_f64().unwrap();
    // Both read one clock: what differs is the way there and back.
    assert!(offset.abs() < PATIENCE.as_secs_f64(), "{said}");
    let reasons = world.status().reasons;
    assert!(reasons["time"] > 0, "{reasons:?}");
}

fn documented(test: &str, tokens: Tokens) -> Option<World> {
    let mut world = World::new(test)?;
    let interface = world.add_guest(1, 1, "10.0.0.5");
    interface.services.metadata_tokens = tokens;
    let document = |(path, text): (&str, &str)| (path.to_owned(), text.to_owned());
    let credentials = r#"{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","Type":"AWS-HMAC",
        "AccessKeyId":"AKIDEXAMPLE","SecretAccessKey":"secret","Token":"session",
        "Expiration":"2099-01-01T00:00:00Z"}"#;
    let documents: BTreeMap<String, String> = [
        ("meta-data/ami-id", "ami-1"),
        ("meta-data/instance-id", "i-1"),
        ("meta-data/instance-type", "t3.micro"),
        ("meta-data/local-hostname", "host-1.region-1.internal"),
        ("meta-data/local-ipv4", "10.0.0.5"),
        ("meta-data/placement/availability-zone", "region-1a"),
        ("meta-data/placement/region", "region-1"),
        ("meta-data/public-keys/0", "my-key"),
        ("meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA my-key"),
        ("meta-data/iam/security-credentials/my-role", credentials),
        ("dynamic/instance-identity/document", r#"{"region":"region-1"}"#),
        ("user-data", "base64:IyEvYmluL3NoCg=="),
    ]
    .map(document)
    .into();
    interface.metadata = Some(documents);
    interface.groups = Vec::<GroupId>::new();
    world.start();
    world.apply();
    world.configure_guest(1);
    Some(world)
}

#[test]
fn cloud_inits_ec2_source_reads_its_documents() {
    let test = "cloud_inits_ec2_source_reads_its_documents";
    const PYTHON: &str = "/usr/bin/python3";
    let there = std::process::Command::new(PYTHON).args(["-c", "import cloudinit"]).output();
    if !there.is_ok_and(|o| o.status.success()) {
        return skip(test, "`cloud-init` is not installed");
    }
    let Some(world) = documented(test, Tokens::Required) else { return };
    let source = r#"
import sys
from cloudinit import helpers, settings
from cloudinit.sources import DataSourceEc2 as ec2
class Source(ec2.DataSourceEc2):
    cloud_name = ec2.CloudNames.AWS
folder = sys.argv[1]
source = Source(settings.CFG_BUILTIN, None, helpers.Paths({"cloud_dir": folder, "run_dir": folder}))
crawled = source.crawl_metadata()
meta = crawled["meta-data"]
print(meta["instance-id"], meta["placement"]["region"], meta["public-keys"], crawled["user-data"])
print(crawled["dynamic"]["instance-identity"]["document"]["region"], sorted(source._api_token) != [])
"#;
    let folder = world.path("cloud");
    let said = run(world.command("g1", PYTHON).args(["-c", source]).arg(folder));
    assert_eq!(
        said,
        "i-1 region-1 {'my-key': 'ssh-ed25519 AAAA my-key'} b'#!/bin/sh\\n'\nregion-1 True\n"
    );
}

#[test]
fn ec2metadata_reads_its_documents() {
    let test = "ec2metadata_reads_its_documents";
    if !has(test, "ec2metadata") {
        return;
    }
    let Some(world) = documented(test, Tokens::Required) else { return };
    let said = run(&mut world.command("g1", "ec2metadata"));
    for line in ["instance-id: i-1", "local-ipv4: 10.0.0.5", "availability-zone: region-1a"] {
        assert!(said.lines().any(|l| l == line), "{line}: {said}");
    }
}

/// botocore's fetchers, which fall back to version 1 only where a token is refused.
#[test]
fn boto3_finds_its_credentials_and_its_region() {
    let test = "boto3_finds_its_credentials_and_its_region";
    let python = concat!(env!("CARGO_MANIFEST_DIR"), "/../.venv/bin/python");
    let there = std::process::Command::new(python).args(["-c", "import boto3"]).output();
    if !there.is_ok_and(|o| o.status.success()) {
        return skip(test, "boto3 is not installed in .venv");
    }
    let Some(world) = documented(test, Tokens::Required) else { return };
    let script = r#"
import botocore.session
from botocore.utils import IMDSRegionProvider, InstanceMetadataFetcher, InstanceMetadataRegionFetcher
found = InstanceMetadataFetcher(timeout=30, num_attempts=2).retrieve_iam_role_credentials()
print(found["role_name"], found["access_key"], found["token"])
print(InstanceMetadataRegionFetcher(timeout=30, num_attempts=2).retrieve_region())
"#;
    let said = run(world.command("g1", python).args(["-c", script]));
    assert_eq!(said, "my-role AKIDEXAMPLE session\nregion-1\n");
}

#[test]
fn version_1_is_answered_where_tokens_are_optional() {
    let test = "version_1_is_answered_where_tokens_are_optional";
    if !has(test, "curl") {
        return;
    }
    let Some(mut world) = documented(test, Tokens::Optional) else { return };
    let status = |world: &World, header: &str| {
        run(world
            .command("g1", "curl")
            .args(["-s", "-m", "30", "-o", "/dev/null", "-w", "%{http_code}", "-H", header])
            .arg("http://169.254.169.254/latest/meta-data/instance-id"))
    };
    assert_eq!(status(&world, "X-Plain: 1"), "200");
    assert_eq!(status(&world, "X-aws-ec2-metadata-token: forged"), "401");
    world.desired.interfaces[0].services.metadata_tokens = Tokens::Required;
    world.apply();
    assert_eq!(status(&world, "X-Plain: 1"), "401");
}
