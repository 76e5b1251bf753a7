//! What the world may do to the guests, and what guests see of themselves.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use model::instance_type;
use sha2::{Digest, Sha256};
use socket2::{Domain, Socket, Type};

use super::Story;
use super::launch::TYPES;
use crate::guest::Guest;
use crate::internet::{FRIEND, FRIENDS, STRANGER, join};
use crate::program;

/// Two guests boot at once under emulation.
const BOOT_BOUND: Duration = Duration::from_secs(180);

/// How long to try a port that must be closed: three SYNs leave in this time.
const CLOSED_BOUND: Duration = Duration::from_secs(4);

/// How long an opened or closed port may take to be seen.
const RULE_BOUND: Duration = Duration::from_secs(10);

/// Enough that windows open and offloads come into play, little enough for an
/// emulated guest.
const BULK_BYTES: usize = 24 << 20;

pub fn ssh(story: &mut Story) -> anyhow::Result<String> {
    let started = Instant::now();
    for index in 0..story.instances.len() {
        story.guest(index)?.await_ssh(BOOT_BOUND)?;
    }
    let name = story.guest(0)?.sh("hostname")?;
    ensure!(name.starts_with("ip-"), "the guest's hostname is {name}");
    Ok(format!("{name} let us in after {:.1} s", started.elapsed().as_secs_f64()))
}

pub fn stranger(story: &mut Story) -> anyhow::Result<String> {
    let guest = Guest::new(&story.internet, story.address(0)?, STRANGER, &story.key_file);
    ensure!(guest.sh_within("true", Duration::from_secs(5)).is_err(), "{STRANGER} got in");
    Ok(format!("{STRANGER} hears nothing"))
}

pub fn size(story: &mut Story) -> anyhow::Result<String> {
    let mut told = Vec::new();
    for (index, name) in TYPES.iter().enumerate() {
        let kind = instance_type::find(name).context("an unknown type")?;
        let guest = story.guest(index)?;
        let vcpus: u32 = guest.sh("grep -c ^processor /proc/cpuinfo")?.parse()?;
        let kib: u64 = guest.sh("awk '/^MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
        ensure!(vcpus == kind.vcpus, "{name}: the guest sees {vcpus} vCPUs, not {}", kind.vcpus);
        // The kernel keeps some for itself: up to an eighth of a small guest.
        let mib = kib / 1024;
        ensure!(
            mib <= kind.memory_mib && mib * 8 >= kind.memory_mib * 7,
            "{name}: the guest sees {mib} MiB of {}",
            kind.memory_mib
        );
        told.push(format!("{name}: {vcpus} vCPU, {mib} MiB usable of {}", kind.memory_mib));
    }
    Ok(told.join("; "))
}

pub fn metadata(story: &mut Story) -> anyhow::Result<String> {
    let guest = story.guest(0)?;
    let v1 = guest.imds("GET /latest/meta-data/instance-id HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n")?;
    ensure!(v1.starts_with("HTTP/1.") && v1.contains(" 401 "), "without a token: {v1}");
    let answer = guest.metadata("instance-id")?;
    let id = &story.instance(0)?.id;
    ensure!(answer.trim_end().ends_with(id.as_str()), "with a token: {answer}, not {id}");
    Ok(format!("{id}, told to itself only with a token"))
}

/// A server in the guest that greets whoever connects to `port`; it is there
/// when this returns, so that a closed port is not just an idle one.
fn greet(guest: &Guest, port: u16) -> anyhow::Result<()> {
    guest.background(&format!("nc -ll -p {port} -e echo hello"))?;
    program::eventually("the guest's own server", RULE_BOUND, || {
        let said = guest.sh(&format!("nc -w 2 127.0.0.1 {port} </dev/null"))?;
        ensure!(said.contains("hello"), "it says {said:?}");
        Ok(())
    })
}

/// Whether the greeting of `address`:`port` is heard at [`FRIEND`].
fn heard(story: &Story, address: Ipv4Addr, port: u16) -> anyhow::Result<bool> {
    let target = SocketAddr::from((address, port));
    join(story.internet.inside(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((FRIEND, 0)).into())?;
        if socket.connect_timeout(&target.into(), CLOSED_BOUND).is_err() {
            return Ok(false);
        }
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(RULE_BOUND))?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said.contains("hello"))
    }))
}

pub fn port(story: &mut Story) -> anyhow::Result<String> {
    let address = story.address(0)?;
    greet(&story.guest(0)?, 8080)?;
    ensure!(!heard(story, address, 8080)?, "port 8080 is open without a rule");
    story.operator.authorize(&story.group, "tcp", 8080, FRIENDS)?;
    let ordered = Instant::now();
    program::eventually("port 8080 opens", RULE_BOUND, || {
        ensure!(heard(story, address, 8080)?, "nothing is heard from it");
        Ok(())
    })?;
    let opened = ordered.elapsed();
    story.operator.revoke(&story.group, "tcp", 8080, FRIENDS)?;
    program::eventually("port 8080 closes", RULE_BOUND, || {
        ensure!(!heard(story, address, 8080)?, "it is still open");
        Ok(())
    })?;
    Ok(format!("opened within {:.1} s of the order, then closed", opened.as_secs_f64()))
}

pub fn group_source(story: &mut Story) -> anyhow::Result<String> {
    let target = story.instance(1)?.private_address.context("no private address")?;
    greet(&story.guest(1)?, 8081)?;
    let guest = story.guest(0)?;
    let ask = format!("nc -w 3 {target} 8081 </dev/null");
    let unasked = guest.sh(&ask);
    ensure!(!unasked.is_ok_and(|said| said.contains("hello")), "port 8081 is open without a rule");
    story.operator.authorize_group(&story.group, "tcp", 8081, &story.group)?;
    program::eventually("port 8081 opens to the group", RULE_BOUND, || {
        let said = guest.sh(&ask)?;
        ensure!(said.contains("hello"), "port 8081 says {said:?}");
        Ok(())
    })?;
    Ok(format!("{target}:8081 answers members of {}", story.group))
}

/// By both names that EC2 gives an instance, and what its address is called.
pub fn names(story: &mut Story) -> anyhow::Result<String> {
    let other = story.instance(1)?;
    let address = other.private_address.context("no private address")?;
    let guest = story.guest(0)?;
    let domain = guest.sh("sed -n 's/^search //p' /etc/resolv.conf")?;
    let by_address = format!("ip-{}.{domain}", address.to_string().replace('.', "-"));
    for name in [by_address.clone(), format!("{}.{domain}", other.id)] {
        let told = guest.sh(&format!("nslookup {name} || true"))?;
        ensure!(told.contains(&address.to_string()), "{name}: {told}");
    }
    let back = guest.sh(&format!("nslookup {address} || true"))?;
    ensure!(back.contains(&by_address), "{address}: {back}");
    Ok(format!("{by_address} is {address}, and back"))
}

/// Bytes whose loss, doubling or change shows in the digest.
fn pattern() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(BULK_BYTES);
    while bytes.len() < BULK_BYTES {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

pub fn bulk(story: &mut Story) -> anyhow::Result<String> {
    carry_both_ways(story).with_context(|| connections(story))
}

/// What stands still, when TCP does: both ends of every connection, and what is dropped.
fn connections(story: &Story) -> String {
    let bound = Duration::from_secs(20);
    let world = program::output(story.internet.command("ss").arg("-tinmo"), bound);
    let observe = ["flow", "observe", "--seconds", "5"];
    let flows = program::output(&mut story.deployment.netctl(observe), bound);
    let inside = story
        .guest(0)
        .and_then(|guest| guest.sh_within("cat /proc/net/tcp; ps; cat /proc/loadavg", bound));
    let shown = |told: anyhow::Result<String>| told.unwrap_or_else(|error| format!("{error:#}"));
    format!(
        "the world's connections:\n{}\ndrops and new flows:\n{}\nthe guest's connections:\n{}",
        shown(world),
        shown(flows),
        shown(inside)
    )
}

fn carry_both_ways(story: &Story) -> anyhow::Result<String> {
    const INTO: u16 = 9000;
    const OUT: u16 = 9001;
    let guest = story.guest(0)?;
    story.operator.authorize(&story.group, "tcp", INTO, "0.0.0.0/0")?;
    guest.background(&format!("nc -l -p {INTO} | sha256sum >/tmp/into"))?;

    let target = SocketAddr::from((story.address(0)?, INTO));
    let began = Instant::now();
    join(story.internet.inside(move || {
        let mut stream = program::eventually("connect to the guest", RULE_BOUND, || {
            Ok(TcpStream::connect_timeout(&target, Duration::from_secs(2))?)
        })?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(&pattern())?;
        stream.shutdown(Shutdown::Write)?;
        Ok(())
    }))?;
    let expected = digest(&pattern());
    program::eventually("the guest has it all", Duration::from_secs(60), || {
        let seen = guest.sh("cut -d' ' -f1 /tmp/into")?;
        ensure!(seen == expected, "the guest received {seen:?}, not {expected}");
        Ok(())
    })?;
    let into = began.elapsed();

    let listener = story.internet.inside(move || Ok(TcpListener::bind((FRIEND, OUT))?));
    let listener = join(listener)?;
    let receiver = std::thread::spawn(move || -> anyhow::Result<(String, SocketAddr)> {
        let (mut stream, peer) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok((digest(&bytes), peer))
    });
    let began = Instant::now();
    let sent = guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/out bs=1M count={} 2>/dev/null; sha256sum /tmp/out | cut -d' ' -f1; nc -w 30 {FRIEND} {OUT} </tmp/out; rm -f /tmp/out",
        BULK_BYTES >> 20
    ));
    let (received, peer) = match sent {
        Ok(_) => join(receiver)?,
        Err(error) => return Err(error),
    };
    let sent = sent?;
    ensure!(sent.lines().next() == Some(received.as_str()), "sent {sent}, received {received}");
    ensure!(peer.ip() == story.address(0)?, "the guest's own connection came from {peer}");
    Ok(format!(
        "{} MiB whole each way, digests compared, in {:.1} s and {:.1} s",
        BULK_BYTES >> 20,
        into.as_secs_f64(),
        began.elapsed().as_secs_f64()
    ))
}
