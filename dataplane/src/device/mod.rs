//! The host's network devices: the taps that this deployment makes, the punt
//! device, and what the rest of the dataplane must know of them.
//!
//! Called by `apply` around each change and by `teardown`. A tap's name is on
//! disk before the tap is made and until after it is gone, so that a crash
//! between leaves no orphan. What may never be true: a device that this
//! deployment did not make is removed or taken over.
//!
//! ```text
//! ensure: record names → make → silence → up     (before the tables change)
//! prune:  remove → record names                   (after the tables changed)
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use rpc::Deployment;
use rpc::dataplane::{Desired, Device};
use serde::{Deserialize, Serialize};

use crate::compile::{DeviceFact, DeviceKind, Devices};
use crate::record;

pub mod link;
mod tap;

use link::{Kind, Links};

/// The punt device carries what every guest may send.
const PUNT_MTU: u32 = 9216;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("device `{device}`: {deed}: {cause}")]
    Tap { device: String, deed: &'static str, cause: io::Error },
    #[error("device `{device}`: {deed}: {cause}")]
    Link { device: String, deed: &'static str, cause: io::Error },
    #[error("routing netlink: ask for this host's links: {0}")]
    Netlink(io::Error),
    #[error(
        "device `{device}`: make: one of that name is there, and this deployment did not make it"
    )]
    Foreign { device: String },
    #[error("device `{device}`: find: the desired state names it, and it is not on this host")]
    Missing { device: String },
    #[error("device `{device}`: silence: {path}: {cause}")]
    Silence { device: String, path: String, cause: io::Error },
    #[error("/dev/urandom: read: {0}")]
    Random(io::Error),
    #[error(transparent)]
    Record(#[from] record::Error),
}

/// What this deployment has made, as it stands on disk.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    /// Name → the user who may open it. The punt device has none.
    taps: BTreeMap<String, Option<u32>>,
}

pub struct Host {
    links: Links,
    punt_name: String,
    record: PathBuf,
    made: Made,
}

impl Host {
    pub fn open(deployment: &Deployment) -> Result<Self, Error> {
        let record = deployment.state_of("dataplane").join("devices.json");
        Ok(Self {
            links: Links::open()?,
            punt_name: deployment.punt_device(),
            made: record::read(&record)?.unwrap_or_default(),
            record,
        })
    }

    /// Opens the punt device, making it where it is not there yet.
    pub fn open_punt(&mut self) -> Result<File, Error> {
        let name = self.punt_name.clone();
        self.refuse_foreign(&name)?;
        self.note([(name.as_str(), None)])?;
        let file = tap::open_punt(&name)?;
        let ifindex = self.existing(&name)?.ifindex;
        silence(&name)?;
        self.links.bring_up_silent(&name, ifindex, PUNT_MTU)?;
        Ok(file)
    }

    /// Makes the taps that are missing and looks up every device named, which
    /// is the answer; and how many it made.
    pub fn ensure(&mut self, desired: &Desired) -> Result<(Devices, usize), Error> {
        // Where no daemon ever was, nobody reads from one.
        let punt = self.made.taps.contains_key(&self.punt_name).then(|| self.punt_name.clone());
        let mut devices = Devices {
            punt: punt.clone(),
            host_addresses: host_addresses()?,
            seed: seed()?,
            ..Devices::default()
        };
        let taps: Vec<(&str, u32, u16)> = desired
            .interfaces
            .iter()
            .filter_map(|interface| match &interface.device {
                Device::Tap { name, owner_uid } => {
                    Some((name.as_str(), *owner_uid, interface.dhcp.mtu))
                }
                Device::Existing { .. } => None,
            })
            .collect();
        for (name, ..) in &taps {
            self.refuse_foreign(name)?;
        }
        // All at once: one sync, however many there are.
        self.note(taps.iter().map(|(name, owner_uid, _)| (*name, Some(*owner_uid))))?;
        let mut made = 0;
        for (name, owner_uid, mtu) in taps {
            made += usize::from(self.ensure_tap(name, owner_uid, mtu)?);
        }
        let named = desired.interfaces.iter().map(|i| i.device.name());
        let uplink = desired.uplink.iter().map(|u| u.device.as_str());
        for name in named.chain(uplink).chain(punt.as_deref()) {
            let link = self.existing(name)?;
            if !self.made.taps.contains_key(name) {
                self.links.bring_up(name, link.ifindex)?;
            }
            let fact = DeviceFact {
                ifindex: link.ifindex,
                mac: link.mac,
                mtu: link.mtu.try_into().unwrap_or(u16::MAX),
                kind: match link.kind {
                    Kind::Veth => DeviceKind::Veth,
                    Kind::VethToNamespace => DeviceKind::VethToNamespace,
                    Kind::Tun { .. } | Kind::Other => DeviceKind::Other,
                },
            };
            devices.by_name.insert(name.to_owned(), fact);
        }
        if let Some(uplink) = &desired.uplink {
            let (address, address6) = addresses_on(&uplink.device)?;
            devices.uplink_address = address;
            devices.uplink_address6 = address6;
        }
        Ok((devices, made))
    }

    /// Removes the taps that the desired state no longer names; answers how many.
    pub fn prune(&mut self, desired: &Desired) -> Result<usize, Error> {
        let wanted = |name: &str| {
            name == self.punt_name || desired.interfaces.iter().any(|i| i.device.name() == name)
        };
        let stale: Vec<String> =
            self.made.taps.keys().filter(|name| !wanted(name)).cloned().collect();
        self.remove(&stale)?;
        Ok(stale.len())
    }

    /// Names in the desired state whose device is not on this host and that nobody
    /// here would make.
    pub fn missing(&self, desired: &Desired) -> Result<Vec<String>, Error> {
        let existing = desired.interfaces.iter().filter_map(|i| match &i.device {
            Device::Existing { name } => Some(name),
            Device::Tap { .. } => None,
        });
        let mut missing = Vec::new();
        for name in existing.chain(desired.uplink.iter().map(|u| &u.device)) {
            if self.links.find(name)?.is_none() {
                missing.push(name.clone());
            }
        }
        Ok(missing)
    }

    /// Removes everything that this deployment made.
    pub fn teardown(&mut self) -> Result<usize, Error> {
        let all: Vec<String> = self.made.taps.keys().cloned().collect();
        self.remove(&all)?;
        Ok(all.len())
    }

    fn remove(&mut self, names: &[String]) -> Result<(), Error> {
        for name in names {
            if let Some(link) = self.links.find(name)? {
                // Another kind of device took the name after ours had gone.
                if matches!(link.kind, Kind::Tun { .. }) {
                    self.links.remove(name, link.ifindex)?;
                }
            }
            self.made.taps.remove(name);
        }
        if names.is_empty() { Ok(()) } else { Ok(record::write(&self.record, &self.made)?) }
    }

    /// Whether it had to be made.
    fn ensure_tap(&self, name: &str, owner_uid: u32, mtu: u16) -> Result<bool, Error> {
        let found = self.links.find(name)?;
        let right =
            found.as_ref().is_some_and(|l| l.kind == Kind::Tun { owner_uid: Some(owner_uid) });
        if let (Some(link), false) = (&found, right) {
            self.links.remove(name, link.ifindex)?;
        }
        if !right {
            tap::create(name, owner_uid)?;
            silence(name)?;
        }
        let link = self.existing(name)?;
        self.links.bring_up_silent(name, link.ifindex, mtu.into())?;
        Ok(!right)
    }

    fn refuse_foreign(&self, name: &str) -> Result<(), Error> {
        let ours = self.made.taps.contains_key(name);
        match self.links.find(name)? {
            Some(link) if !ours || !matches!(link.kind, Kind::Tun { .. }) => {
                Err(Error::Foreign { device: name.to_owned() })
            }
            _ => Ok(()),
        }
    }

    fn existing(&self, name: &str) -> Result<link::Link, Error> {
        self.links.find(name)?.ok_or_else(|| Error::Missing { device: name.to_owned() })
    }

    /// Puts names on disk before the devices are made.
    fn note<'a>(
        &mut self,
        names: impl IntoIterator<Item = (&'a str, Option<u32>)>,
    ) -> Result<(), Error> {
        let mut noted = self.made.clone();
        noted.taps.extend(names.into_iter().map(|(name, owner)| (name.to_owned(), owner)));
        if noted != self.made {
            record::write(&self.record, &noted)?;
            self.made = noted;
        }
        Ok(())
    }
}

/// A number that no stranger knows, and not 0.
fn seed() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    let path = "/dev/urandom";
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(Error::Random)?;
    Ok(u64::from_ne_bytes(bytes) | 1)
}

/// The host's own addresses, on whatever device.
fn host_addresses() -> Result<Vec<IpAddr>, Error> {
    let addresses = nix::ifaddrs::getifaddrs().map_err(|e| Error::Netlink(e.into()))?;
    let mut own: Vec<IpAddr> = addresses
        .filter_map(|entry| {
            let address = entry.address?;
            let v4 = address.as_sockaddr_in().map(|a| a.ip().into());
            v4.or_else(|| address.as_sockaddr_in6().map(|a| a.ip().into()))
        })
        .collect();
    own.sort_unstable();
    own.dedup();
    Ok(own)
}

/// The first IPv4 address of a device and its first global IPv6 address.
fn addresses_on(device: &str) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), Error> {
    let entries = nix::ifaddrs::getifaddrs().map_err(|e| Error::Netlink(e.into()))?;
    let (mut address, mut address6) = (None, None);
    for found in entries.filter(|e| e.interface_name == device).filter_map(|e| e.address) {
        if let Some(v4) = found.as_sockaddr_in() {
            address = address.or(Some(v4.ip()));
        }
        if let Some(v6) = found.as_sockaddr_in6().map(|a| a.ip()) {
            address6 = address6.or((!v6.is_unicast_link_local()).then_some(v6));
        }
    }
    Ok((address, address6))
}

/// Keeps the host's own stack off a device before it comes up: no IPv6 address
/// of its own, no neighbour discovery, no answer to ARP.
fn silence(device: &str) -> Result<(), Error> {
    for (path, value) in [
        (format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1"),
        (format!("/proc/sys/net/ipv4/conf/{device}/arp_ignore"), "8"),
        (format!("/proc/sys/net/ipv4/conf/{device}/forwarding"), "0"),
    ] {
        match std::fs::write(&path, value) {
            // A kernel without that protocol has nothing to silence.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => {
                return Err(Error::Silence { device: device.to_owned(), path, cause });
            }
            Ok(()) => {}
        }
    }
    Ok(())
}
