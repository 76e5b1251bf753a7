//! Clients that mean ill, at the export beside the one that is measured.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::address::Address;
use super::beside::EXPORT;
use super::client;

const READ: u16 = 0;
const WRITE: u16 = 1;
const TRIM: u16 = 4;

/// What the protocol's document lets a server refuse: 32 MiB are the most.
const OVERSIZE: u32 = 40 << 20;

const PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storm {
    /// Five hundred at a time, which say nothing and go.
    Connections,
    /// Each connection ends in the midst of a request.
    HalfRequests,
    /// Replies of 1 MiB that are fetched half a KiB at a time.
    SlowReaders,
    Trims,
    /// Payloads that are refused and must be read over.
    OversizeWrites,
    /// Commands and flags that nobody knows, 64 at a time.
    Unknown,
}

impl Storm {
    /// Does harm until it is over.
    pub fn rage(self, address: &Address, is_over: &AtomicBool) -> anyhow::Result<()> {
        let goes_on = || !is_over.load(Ordering::Relaxed);
        match self {
            Self::Connections => {
                let mut crowd = Vec::new();
                while goes_on() {
                    crowd.extend(address.connect());
                    if crowd.len() > 500 {
                        crowd.clear();
                        std::thread::sleep(5 * PAUSE);
                    }
                }
            }
            Self::HalfRequests => {
                while goes_on() {
                    let mut socket = open(address)?;
                    socket.write_all(&client::header(WRITE, 1, 0, 32 << 20)[..17])?;
                    std::thread::sleep(PAUSE);
                }
            }
            Self::SlowReaders => {
                let mut slow = (0..8).map(|_| open(address)).collect::<Result<Vec<_>, _>>()?;
                for socket in &slow {
                    fcntl(socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                }
                while goes_on() {
                    for socket in &mut slow {
                        later(socket.write(&client::header(READ, 1, 0, 1 << 20)))?;
                        later(socket.read(&mut [0; 512]))?;
                    }
                    std::thread::sleep(PAUSE);
                }
            }
            Self::Trims => {
                let header = |n: u16| client::header(TRIM, n, u64::from(n) * 37 % 500 * 8192, 4096);
                ask_again_and_again(address, header, goes_on)?;
            }
            Self::OversizeWrites => {
                let chunk = vec![0; 1 << 20];
                while goes_on() {
                    let mut socket = open(address)?;
                    socket.write_all(&client::header(WRITE, 1, 0, OVERSIZE))?;
                    // The server may end the connection.
                    while goes_on() && socket.write_all(&chunk).is_ok() {
                        std::thread::sleep(PAUSE);
                    }
                }
            }
            Self::Unknown => {
                let header = |n: u16| client::header(9 + n, n, u64::MAX, u32::MAX);
                ask_again_and_again(address, header, goes_on)?;
            }
        }
        Ok(())
    }
}

fn open(address: &Address) -> anyhow::Result<File> {
    let mut socket = address.connect()?;
    client::begin(&mut socket, EXPORT)?;
    Ok(socket)
}

/// Requests without payload, sixty-four at a time, and their answers without data.
fn ask_again_and_again(
    address: &Address,
    header: impl Fn(u16) -> client::Header,
    goes_on: impl Fn() -> bool,
) -> anyhow::Result<()> {
    let mut socket = open(address)?;
    let burst: Vec<u8> = (0..64).flat_map(header).collect();
    let mut answers = [0; 64 * client::REPLY_BYTES];
    while goes_on() {
        socket.write_all(&burst)?;
        socket.read_exact(&mut answers)?;
    }
    Ok(())
}

/// What cannot be done without waiting is done at another time.
fn later(done: std::io::Result<usize>) -> std::io::Result<()> {
    match done {
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections that come and go",
            Self::HalfRequests => "half requests",
            Self::SlowReaders => "readers that fetch 512 bytes a millisecond",
            Self::Trims => "another volume's trims, 64 in flight",
            Self::OversizeWrites => "another volume's writes of 40 MiB",
            Self::Unknown => "unknown commands, 64 in flight",
        })
    }
}
