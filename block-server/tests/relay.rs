//! A hand-over in which either server is killed, or stands still, after each word
//! that is said: the other serves, never two do, and nothing that was acknowledged
//! is lost. For `serve` and for the daemon.

mod fixture;

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fixture::client::{Client, Ledger};
use fixture::home::Home;
use fixture::relay::{BEGUN, Relay, WORDS};
use fixture::wait::wait_for;
use fixture::{Bench, Server, text};
use rustix::process::{Pid, Signal, kill_process};
use sim::Random;

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is replaced.
enum Place {
    Serve(Bench),
    Daemon(Home),
}

impl Place {
    fn arguments(&self) -> Vec<String> {
        match self {
            Self::Serve(bench) => {
                let (image, socket, asked) = (bench.image(), bench.socket(), self.asked());
                ["serve", "--file", text(&image), "--socket", text(&socket), "--take-over"]
                    .into_iter()
                    .chain([text(&asked)])
                    .map(str::to_owned)
                    .collect()
            }
            Self::Daemon(home) => home.arguments(&["--threads", "2", "--take-over"]),
        }
    }

    fn start(&self) -> Server {
        let all = self.arguments();
        Server::start(&all.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// One that may come to nothing.
    fn successor(&self) -> Successor {
        let child = Command::new(env!("CARGO_BIN_EXE_block-server"))
            .args(self.arguments())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Successor(child.unwrap())
    }

    fn asked(&self) -> PathBuf {
        match self {
            Self::Serve(bench) => bench.path("up.sock"),
            Self::Daemon(home) => home.path("r/block-server-take-over.sock"),
        }
    }

    /// Makes what is to be served; gives where, and by which name.
    async fn export(&self) -> (PathBuf, &'static str) {
        match self {
            Self::Serve(bench) => (bench.socket(), ""),
            Self::Daemon(home) => (home.export(1, "e", 4).await, "e"),
        }
    }
}

/// Ended with the test, whatever becomes of it.
struct Successor(Child);

impl Successor {
    fn has_ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that comes again until it is served, and keeps account of all it wrote.
fn write_on(socket: PathBuf, export: &str, [done, gone]: [&AtomicBool; 2], bursts: &AtomicU64) {
    let mut ledger = Ledger::new(0, 64);
    let mut random = Random::new(7);
    let mut client = None;
    while !gone.load(Ordering::Relaxed) {
        let Some(present) = &mut client else {
            client = Client::connect(&socket, export).ok();
            if let Some(new) = &mut client {
                // What was sent and not acknowledged may be there or not.
                if ledger.verify(new, "after a reconnection", |l, i| l.acknowledged[i]).is_err() {
                    client = None;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        let burst = ledger.burst(present, &mut random, |_| ());
        if burst.is_err() {
            client = None;
            continue;
        }
        bursts.fetch_add(1, Ordering::Relaxed);
        if done.load(Ordering::Relaxed)
            && ledger.verify(present, "at the end", |l, i| l.acknowledged[i]).is_ok()
        {
            return;
        }
    }
}

/// A test that failed waits for nobody.
struct Gone<'a>(&'a AtomicBool);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.store(std::thread::panicking(), Ordering::Relaxed);
    }
}

/// Who is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Old,
    New,
}

/// The client goes on: once more than was under way.
fn is_served(bursts: &AtomicU64, what: &str) {
    let before = bursts.load(Ordering::Relaxed);
    wait_for(what, PATIENCE, || bursts.load(Ordering::Relaxed) > before + 1);
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

/// One hand-over in which `victim` gets `blow` at `word`. A victim that stands
/// still is waked when the other is known to serve.
async fn hand_over(place: Place, word: &str, victim: Victim, blow: Signal) {
    let what = format!("{victim:?} {blow:?} at {word}");
    let mut old = place.start();
    let (socket, export) = place.export().await;
    let (done, bursts) = (AtomicBool::new(false), AtomicU64::new(0));
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _goes = Gone(&gone);
        let writer = scope.spawn(|| write_on(socket, export, [&done, &gone], &bursts));
        is_served(&bursts, &format!("{what}: the beginning"));
        let relay = Relay::at(&place.asked());
        let mut new = place.successor();
        let hit = match victim {
            Victim::Old => old.pid(),
            Victim::New => new.0.id(),
        };
        let mut was_hit = false;
        let begun = relay.carry(|said, is_passed| {
            // Who stands still has not heard it, so that what it does next is known.
            let is_time = said == word && is_passed == (blow == Signal::KILL);
            if is_time && !std::mem::replace(&mut was_hit, true) {
                signal(hit, blow);
            }
        });
        assert!(was_hit, "{what}: it was not said");
        drop(relay);
        if blow == Signal::STOP {
            // It had its time; the hand-over is over, and it has to see that.
            signal(hit, Signal::CONT);
        }
        // The one that does not serve ends by itself.
        let (mut old_ended, mut new_ended) = (false, false);
        wait_for(&format!("{what}: one of the two ends"), PATIENCE, || {
            old_ended |= old.has_ended().is_some();
            new_ended |= new.has_ended().is_some();
            old_ended || new_ended
        });
        let is_crash = begun && victim == Victim::New && blow == Signal::KILL;
        if is_crash {
            // It served when it was killed: whoever keeps it starts it anew.
            wait_for(&format!("{what}: the old one ends"), PATIENCE, || old.has_ended().is_some());
            old = place.start();
        }
        is_served(&bursts, &format!("{what}: served"));
        let (old_lives, new_lives) = (old.has_ended().is_none(), new.has_ended().is_none());
        assert!(old_lives != new_lives, "{what}: old {old_lives}, new {new_lives}");
        done.store(true, Ordering::Relaxed);
        // It looks at all that it wrote, and needs whoever serves for that.
        writer.join().unwrap();
    });
    drop(old);
}

/// In a runtime of its own: several go on beside each other.
fn one(is_daemon: bool, word: &str, victim: Victim, blow: Signal) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let place =
            if is_daemon { Place::Daemon(Home::new()) } else { Place::Serve(Bench::new(4)) };
        hand_over(place, word, victim, blow).await;
    });
}

#[test]
fn whoever_is_killed_in_a_hand_over_the_other_serves() {
    for word in WORDS.into_iter().chain([BEGUN]) {
        for victim in [Victim::Old, Victim::New] {
            std::thread::scope(|scope| {
                for is_daemon in [false, true] {
                    scope.spawn(move || one(is_daemon, word, victim, Signal::KILL));
                }
            });
        }
    }
}

/// Who stands still is given up after ten seconds, and finds that out when it goes on:
/// also one that has been told to begin, and has not said that it does.
#[test]
fn whoever_stands_still_in_a_hand_over_the_old_one_serves() {
    const STILL: [(&str, Victim); 5] = [
        ("Hello", Victim::Old),
        ("Ready", Victim::Old),
        ("Welcome", Victim::New),
        ("End", Victim::New),
        ("Go", Victim::New),
    ];
    std::thread::scope(|scope| {
        for (word, victim) in STILL {
            for is_daemon in [false, true] {
                // `serve` has no calls that wait, and gives a successor a minute to prepare.
                if is_daemon || word != "Welcome" {
                    scope.spawn(move || one(is_daemon, word, victim, Signal::STOP));
                }
            }
        }
    });
}
