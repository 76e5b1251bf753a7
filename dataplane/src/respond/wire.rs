//! The device that an interface's smoltcp runs on: bare IP, one packet in at a
//! time, a bounded queue out.

use std::collections::VecDeque;

use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// Frames that wait to be written in one turn; more are lost as on any wire.
const FRAMES_OUT_MAX: usize = 256;

pub struct Wire {
    pub incoming: Option<Vec<u8>>,
    pub outgoing: VecDeque<Vec<u8>>,
    pub mtu: usize,
}

impl Wire {
    /// Queues a packet; what the queue has no room for is lost, as on any wire.
    pub fn push(&mut self, packet: Vec<u8>) {
        if self.outgoing.len() < FRAMES_OUT_MAX {
            self.outgoing.push_back(packet);
        }
    }
}

pub struct Incoming(Vec<u8>);
pub struct Outgoing<'a>(&'a mut Wire);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < FRAMES_OUT_MAX).then_some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}
