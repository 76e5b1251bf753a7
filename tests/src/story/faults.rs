//! Each daemon is killed while a guest writes and a TCP flow runs. Neither may notice.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::Story;
use crate::deployment::DAEMONS;
use crate::internet::{Internet, join};
use crate::program;

const ECHO_PORT: u16 = 7000;

/// How long the flow and the writer run on after each daemon is back.
const SETTLE: Duration = Duration::from_secs(2);

/// A line sent each so often.
const BEAT: Duration = Duration::from_millis(50);

/// A connection whose every line must come back. Retransmission covers a lost
/// packet, so a long gap is reported and a broken connection is an error.
fn beat(
    internet: &Internet,
    target: SocketAddr,
    stop: Arc<AtomicBool>,
) -> std::thread::JoinHandle<anyhow::Result<(u64, Duration)>> {
    internet.inside(move || {
        let stream =
            program::eventually("connect to the echo server", Duration::from_secs(15), || {
                Ok(TcpStream::connect_timeout(&target, Duration::from_secs(2))?)
            })?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_nodelay(true)?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut out = stream;
        let (mut count, mut longest) = (0, Duration::ZERO);
        while !stop.load(Ordering::Relaxed) {
            let sent = Instant::now();
            writeln!(out, "{count}")?;
            let mut line = String::new();
            ensure!(
                lines.read_line(&mut line)? > 0,
                "the guest closed the flow after {count} lines"
            );
            ensure!(line.trim().parse::<u64>()? == count, "line {count} came back as {line:?}");
            longest = longest.max(sent.elapsed());
            count += 1;
            std::thread::sleep(BEAT);
        }
        Ok((count, longest))
    })
}

pub fn kill_daemons(story: &mut Story) -> anyhow::Result<String> {
    let guest = story.guest(1)?;
    story.operator.authorize(&story.group, "tcp", ECHO_PORT, "0.0.0.0/0")?;
    guest.background(&format!("nc -ll -p {ECHO_PORT} -e cat"))?;
    // The writer counts each block only when it has reached the volume.
    guest.background(
        "i=0; while dd if=/dev/zero of=/mnt/beat bs=4k count=1 conv=fsync; \
         do i=$((i+1)); echo $i >/tmp/beat.new; mv /tmp/beat.new /tmp/beat; done; echo failed >/tmp/beat",
    )?;
    program::eventually("the guest's writer begins", Duration::from_secs(10), || {
        guest.sh("test -s /tmp/beat").map(drop)
    })?;
    let written = || -> anyhow::Result<u64> {
        let beat = guest.sh("cat /tmp/beat")?;
        beat.parse().with_context(|| format!("the guest's writer says {beat:?}"))
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flow =
        beat(&story.internet, SocketAddr::from((story.address(1)?, ECHO_PORT)), Arc::clone(&stop));

    let machines = story.deployment.machines();
    let mut told = Vec::new();
    let outcome = DAEMONS.iter().try_for_each(|daemon| {
        let before = written()?;
        let back = story.deployment.kill_and_await(daemon)?;
        std::thread::sleep(SETTLE);
        program::eventually(
            &format!("the guest writes on after {daemon} died"),
            Duration::from_secs(20),
            || {
                let now = written()?;
                ensure!(now > before, "still at {now} blocks");
                Ok(())
            },
        )?;
        ensure!(!flow.is_finished(), "the TCP flow ended when {daemon} died");
        told.push(format!("{daemon} back in {:.1} s", back.as_secs_f64()));
        anyhow::Ok(())
    });
    stop.store(true, Ordering::Relaxed);
    let flow = join(flow).context("the TCP flow");
    outcome.map_err(|error| match &flow {
        Err(flow) => error.context(format!("{flow:#}")),
        Ok(_) => error,
    })?;
    let (lines, longest) = flow?;
    ensure!(story.deployment.machines() == machines, "a guest's QEMU is another process now");
    let errors = guest.sh("killall dd 2>/dev/null; dmesg | grep -ci 'i/o error' || true")?;
    ensure!(errors == "0", "the guest's kernel saw {errors} I/O errors");
    // Orders are obeyed as before.
    for index in 0..story.instances.len() {
        story.await_state(&story.instance(index)?.id.clone(), "running")?;
    }
    Ok(format!(
        "{}; {lines} lines echoed, longest wait {} ms",
        told.join(", "),
        longest.as_millis()
    ))
}
