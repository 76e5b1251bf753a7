//! The shell of [`Forwarder`](super::Forwarder): a socket for each question in flight.
//!
//! UDP sockets are bound to a port of the kernel's choice and connected, so that only
//! the server's own address is heard; each goes with its question.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::PollFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// A server may send more than it was asked for.
const DATAGRAM_BYTES_MAX: usize = 4096;

#[derive(Default)]
pub struct Sockets(BTreeMap<u64, Socket>);

enum Socket {
    Datagram(UdpSocket),
    Stream { socket: TcpStream, unsent: Vec<u8>, read: Vec<u8> },
}

/// What a socket has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Nothing,
    Message(Vec<u8>),
    /// It will say no more.
    Ended,
}

impl Sockets {
    pub fn send(
        &mut self,
        token: u64,
        server: SocketAddr,
        stream: bool,
        message: &[u8],
    ) -> io::Result<()> {
        let socket = if stream { connect(server, message)? } else { datagram(server, message)? };
        self.0.insert(token, socket);
        Ok(())
    }

    pub fn close(&mut self, token: u64) {
        self.0.remove(&token);
    }

    /// What each waits for.
    pub fn waiting(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, PollFlags)> {
        self.0.iter().map(|(token, socket)| match socket {
            Socket::Datagram(socket) => (*token, socket.as_fd(), PollFlags::POLLIN),
            Socket::Stream { socket, unsent, .. } if unsent.is_empty() => {
                (*token, socket.as_fd(), PollFlags::POLLIN)
            }
            Socket::Stream { socket, .. } => (*token, socket.as_fd(), PollFlags::POLLOUT),
        })
    }

    pub fn turn(&mut self, token: u64) -> Said {
        let said = match self.0.get_mut(&token) {
            None => Ok(Said::Nothing),
            Some(Socket::Datagram(socket)) => {
                let mut bytes = [0; DATAGRAM_BYTES_MAX];
                socket.recv(&mut bytes).map(|length| Said::Message(bytes[..length].to_vec()))
            }
            Some(Socket::Stream { socket, unsent, read }) => exchange(socket, unsent, read),
        };
        match said {
            Ok(said) => said,
            Err(error) if waits(&error) => Said::Nothing,
            Err(error) => {
                tracing::debug!(%error, "name server: no answer");
                Said::Ended
            }
        }
    }
}

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn datagram(server: SocketAddr, message: &[u8]) -> io::Result<Socket> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(server)?;
    socket.send(message)?;
    Ok(Socket::Datagram(socket))
}

fn connect(server: SocketAddr, message: &[u8]) -> io::Result<Socket> {
    let family = match server {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &server) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let unsent = [&length.to_be_bytes(), message].concat();
    Ok(Socket::Stream { socket: TcpStream::from(socket), unsent, read: Vec::new() })
}

fn exchange(socket: &mut TcpStream, unsent: &mut Vec<u8>, read: &mut Vec<u8>) -> io::Result<Said> {
    while !unsent.is_empty() {
        let sent = socket.write(unsent)?;
        unsent.drain(..sent);
    }
    let mut bytes = [0; DATAGRAM_BYTES_MAX];
    loop {
        if let Some((length, rest)) = read.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            if rest.len() >= length {
                return Ok(Said::Message(rest[..length].to_vec()));
            }
        }
        match socket.read(&mut bytes)? {
            0 => return Ok(Said::Ended),
            length => read.extend(&bytes[..length]),
        }
    }
}
