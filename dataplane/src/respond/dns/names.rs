//! What a network's own hosts are called, forward and back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use domain::base::iana::{Class, Rcode, Rtype};
use domain::base::name::Label;
use domain::base::{Name, Record, Serial, ToName as _, Ttl};
use domain::rdata::{A, Aaaa, AllRecordData, Ptr, Soa};
use ipnet::Ipv4Net;

use super::Resolved;
use super::message::{Answer, Query, Stored};

pub type Owned = Name<Vec<u8>>;

/// For how long a guest may remember one of our names: a new host comes by the next.
const TTL: Ttl = Ttl::from_secs(60);
/// And that there is none.
const NONE_TTL: Ttl = Ttl::from_secs(5);

/// Labels, with the root's, that a name's parent must have for all below it to be
/// ours: nobody owns `internal.` as a whole.
const APEX_LABELS_MIN: usize = 3;

/// The names of one network.
#[derive(Debug, Default)]
pub struct Zone {
    addresses: BTreeMap<Owned, BTreeSet<IpAddr>>,
    pointers: BTreeMap<Owned, Owned>,
    /// Whatever lies under one of these and is not known does not exist.
    apexes: BTreeSet<Owned>,
    subnets: BTreeSet<Ipv4Net>,
}

impl Zone {
    pub fn add(&mut self, host: &Resolved) {
        self.subnets.insert(host.subnet);
        for name in &host.names {
            self.addresses.entry(name.clone()).or_default().extend(&host.addresses);
            let parent = name.parent().map(|parent| parent.to_vec());
            self.apexes.extend(parent.filter(|p| p.label_count() >= APEX_LABELS_MIN));
        }
        let Some(first) = host.names.first() else { return };
        for address in &host.addresses {
            // An address' name fits always: 73 bytes at most.
            if let Ok(pointer) = Owned::reverse_from_addr(*address) {
                self.pointers.insert(pointer, first.clone());
            }
        }
    }

    /// `None`: not for us to say.
    pub fn answer(&self, query: &Query) -> Option<Answer> {
        if let Some(addresses) = self.addresses.get(&query.name) {
            let all = addresses.iter().filter_map(|a| of_kind(*a, query.kind));
            return Some(self.found(query, all.collect()));
        }
        if let Some(pointer) = self.pointers.get(&query.name) {
            let asked = query.kind == Rtype::PTR;
            let data = asked.then(|| AllRecordData::Ptr(Ptr::new(pointer.clone())));
            return Some(self.found(query, data.into_iter().collect()));
        }
        if let Some(apex) = self.apexes.iter().find(|apex| query.name.ends_with(*apex)) {
            let rcode = if *apex == query.name { Rcode::NOERROR } else { Rcode::NXDOMAIN };
            return Some(none(rcode, apex.clone()));
        }
        let address = reversed(&query.name)?;
        let ours = self.subnets.iter().any(|subnet| subnet.contains(&address));
        ours.then(|| none(Rcode::NXDOMAIN, query.name.clone()))
    }

    fn found(&self, query: &Query, data: Vec<AllRecordData<Vec<u8>, Owned>>) -> Answer {
        if data.is_empty() {
            let apex = self.apexes.iter().find(|apex| query.name.ends_with(*apex));
            return none(Rcode::NOERROR, apex.unwrap_or(&query.name).clone());
        }
        let name = || query.name.clone();
        let records = data.into_iter().map(|d| Record::new(name(), Class::IN, TTL, d));
        Answer { authoritative: true, answers: records.collect(), ..Answer::new(Rcode::NOERROR) }
    }
}

fn of_kind(address: IpAddr, kind: Rtype) -> Option<AllRecordData<Vec<u8>, Owned>> {
    match address {
        IpAddr::V4(a) if kind == Rtype::A => Some(AllRecordData::A(A::new(a))),
        IpAddr::V6(a) if kind == Rtype::AAAA => Some(AllRecordData::Aaaa(Aaaa::new(a))),
        _ => None,
    }
}

/// Nothing there, and for how long that may be remembered (RFC 2308).
fn none(rcode: Rcode, apex: Owned) -> Answer {
    let times = [Ttl::from_secs(60), Ttl::from_secs(60), Ttl::from_secs(3600), NONE_TTL];
    let [refresh, retry, expire, minimum] = times;
    let host = apex.clone();
    let soa = Soa::new(apex.clone(), host, Serial(1), refresh, retry, expire, minimum);
    let record: Stored = Record::new(apex, Class::IN, NONE_TTL, AllRecordData::Soa(soa));
    Answer { authoritative: true, authority: vec![record], ..Answer::new(rcode) }
}

/// The address of a name such as `5.0.0.10.in-addr.arpa`.
fn reversed(name: &Owned) -> Option<Ipv4Addr> {
    let labels: Vec<&Label> = name.iter().collect();
    let [d, c, b, a, kind, arpa, _] = labels[..] else { return None };
    let ours = kind.as_slice().eq_ignore_ascii_case(b"in-addr")
        && arpa.as_slice().eq_ignore_ascii_case(b"arpa");
    let number = |label: &Label| std::str::from_utf8(label.as_slice()).ok()?.parse::<u8>().ok();
    ours.then_some(())?;
    Some(Ipv4Addr::new(number(a)?, number(b)?, number(c)?, number(d)?))
}
