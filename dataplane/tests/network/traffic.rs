//! Traffic of our own making, in a namespace of a world: each runs in a thread
//! that has entered it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, socket,
};

use crate::world::{World, now};

/// Runs `deed` in a thread inside a namespace of the world.
pub fn inside<T: Send + 'static>(
    world: &World,
    role: &str,
    deed: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let namespace = File::open(format!("/run/netns/{}", world.namespace(role))).unwrap();
    std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
        deed()
    })
}

/// A server on a port of a guest that says back what it hears. It listens when
/// this returns, and ends with the test.
pub fn echo_server(world: &World, role: &str, port: u16) {
    let listening =
        inside(world, role, move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    let listener = listening.join().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 || stream.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// How long what must come is waited for, however busy the machine is. What must not
/// come is waited for shortly.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// A flood that nothing answers has ended after this.
const UNHEARD: Duration = Duration::from_secs(1);

/// Whether a TCP connection opens within `wait`. Asked again and again, for the
/// kernel gives up at once where it asked for the hardware address in vain before.
pub fn connects(world: &World, role: &str, to: Ipv4Addr, port: u16, wait: Duration) -> bool {
    let address = SocketAddrV4::new(to, port).into();
    let opens = move || {
        let start = now();
        while let Some(left) = wait.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
            if TcpStream::connect_timeout(&address, left).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    };
    inside(world, role, opens).join().unwrap()
}

/// A TCP flow that says something every few milliseconds and wants it back.
pub struct Flow {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<Duration, String>>,
}

impl Flow {
    /// Opens it; rounds go on until [`Self::finish`].
    pub fn open(world: &World, role: &str, to: Ipv4Addr, port: u16) -> Self {
        // Long enough that a sender with offloads makes superframes of it.
        Self::of(world, role, to, port, 20_000, Duration::from_millis(5))
    }

    /// One that says `bytes` and then pauses.
    pub fn of(
        world: &World,
        role: &str,
        to: Ipv4Addr,
        port: u16,
        bytes: usize,
        pause: Duration,
    ) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let thread = inside(world, role, move || {
            converse(to, port, bytes, pause, &stopped, &counted).map_err(|e| e.to_string())
        });
        let flow = Self { stop, rounds, thread };
        let begun = now();
        while flow.rounds() < 3 {
            assert!(now() - begun < PATIENCE, "the flow did not get going");
            assert!(!flow.thread.is_finished(), "the flow ended: {:?}", flow.finish());
            std::thread::sleep(Duration::from_millis(10));
        }
        flow
    }

    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Waits until `more` further rounds are done.
    pub fn goes_on(&self, more: u64) {
        let (before, begun) = (self.rounds(), now());
        while self.rounds() < before + more {
            assert!(now() - begun < PATIENCE, "the flow stands still");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it, and gives the longest time that a round took.
    pub fn finish(self) -> Result<Duration, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn converse(
    to: Ipv4Addr,
    port: u16,
    bytes: usize,
    pause: Duration,
    stop: &AtomicBool,
    rounds: &AtomicU64,
) -> std::io::Result<Duration> {
    let mut stream = TcpStream::connect_timeout(&SocketAddrV4::new(to, port).into(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let said = vec![0x5a; bytes];
    let mut heard = vec![0; said.len()];
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let begun = now();
        stream.write_all(&said)?;
        stream.read_exact(&mut heard)?;
        longest = longest.max(now() - begun);
        if heard != said {
            return Err(std::io::Error::other("what came back is not what was said"));
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
    Ok(longest)
}

/// Says back every datagram that comes to a port. It listens when this returns.
pub fn echo_datagrams(world: &World, role: &str, port: u16) {
    let bound =
        inside(world, role, move || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    let socket = bound.join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// A stream of numbered datagrams that are said back.
pub struct Stream {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, u64)>,
}

impl Stream {
    /// Opens it: the first are answered when this returns.
    pub fn open(world: &World, role: &str, to: Ipv4Addr, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (opened, is_open)) = (stop.clone(), std::sync::mpsc::channel());
        let thread = inside(world, role, move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.connect((to, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
            let (mut sent, mut heard, mut bytes) = (0_u64, 0, [0; 64]);
            while !stopped.load(Ordering::Relaxed) {
                socket.send(&sent.to_ne_bytes()).unwrap();
                sent += 1;
                heard += u64::from(socket.recv(&mut bytes).is_ok());
                if heard == 3 {
                    _ = opened.send(());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let last = now();
            while heard < sent && now() - last < Duration::from_secs(30) {
                heard += u64::from(socket.recv(&mut bytes).is_ok());
            }
            (sent, heard)
        });
        is_open.recv_timeout(Duration::from_secs(30)).expect("a stream begins");
        Self { stop, thread }
    }

    /// How many were sent, and how many came back.
    pub fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Sends `count` echo requests, one every `interval`, and gives how many came back.
pub fn ping_flood(
    world: &World,
    role: &str,
    to: Ipv4Addr,
    count: u16,
    interval: Duration,
) -> JoinHandle<usize> {
    inside(world, role, move || {
        let socket =
            socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::Icmp)
                .unwrap();
        let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
        let id = (std::process::id() as u16).to_be_bytes();
        let mut answered = vec![false; count.into()];
        let hear = |answered: &mut Vec<bool>| {
            let mut packet = [0; 256];
            while let Ok(length) = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                let icmp = &packet[20..length.max(20)];
                if icmp.len() >= 8 && icmp[0] == 0 && icmp[4..6] == id {
                    let sequence = usize::from(u16::from_be_bytes([icmp[6], icmp[7]]));
                    if let Some(slot) = answered.get_mut(sequence) {
                        *slot = true;
                    }
                }
            }
        };
        let begun = now();
        for sequence in 0..count {
            let request = echo_request(id, sequence);
            sendto(socket.as_raw_fd(), &request, &to, MsgFlags::empty()).unwrap();
            while now() - begun < interval * u32::from(sequence + 1) {
                hear(&mut answered);
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        let last = now();
        let wait =
            |answered: &[bool]| if answered.contains(&true) { PATIENCE / 3 } else { UNHEARD };
        while answered.contains(&false) && now() - last < wait(&answered) {
            hear(&mut answered);
            std::thread::sleep(Duration::from_millis(5));
        }
        answered.into_iter().filter(|&a| a).count()
    })
}

fn echo_request(id: [u8; 2], sequence: u16) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0, id[0], id[1]];
    packet.extend(sequence.to_be_bytes());
    packet.extend([0x42; 48]);
    let sum = packet
        .chunks(2)
        .fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}
