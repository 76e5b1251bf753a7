//! Questions in flight between guests and name servers, as a core: queries, answers
//! and `now` in; answers and what to send out.
//!
//! ```text
//! asked ─UDP─▶ answered ─────────────────────▶ told, remembered
//!    │  truncated, letters turned ─stream─▶ ─┘
//!    └─ silent, refused, senseless ─▶ next server ─▶ … ─▶ SERVFAIL
//! ```
//! Each attempt has an id, letters and a socket of its own, so that a late answer
//! to one is never taken for another's.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use domain::base::iana::Rcode;

use super::cache::Cache;
use super::message::{self, Asked, Heard, Query};
use super::names::Zone;

/// Name servers that are asked in turn.
pub const UPSTREAMS_MAX: usize = 4;

/// Questions in flight of one interface, and of all: each has a socket. At the latter
/// limit, whoever has most gives way to whoever has fewer.
const IN_FLIGHT_AN_INTERFACE_MAX: usize = 32;
const IN_FLIGHT_MAX: usize = 256;

/// Attempts before a guest is told that there is no answer: it gives up after five
/// seconds as a rule, so all must have been tried by then.
const ATTEMPTS_MAX: u32 = 3;
const PATIENCE: Duration = Duration::from_millis(1500);
const STREAM_PATIENCE: Duration = Duration::from_secs(3);

/// What a stream carries at most.
const STREAM_BYTES_MAX: usize = u16::MAX as usize;

/// By what way a guest asked, and is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Datagram { server: IpAddr, asker: SocketAddr, bytes_max: usize },
    Stream(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    pub ifindex: u32,
    pub origin: Origin,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// By a socket of its own, which `token` names from now on.
    Send {
        token: u64,
        server: SocketAddr,
        stream: bool,
        message: Vec<u8>,
    },
    Close {
        token: u64,
    },
    Answer {
        client: Client,
        message: Vec<u8>,
    },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub own: u64,
    pub remembered: u64,
    pub forwarded: u64,
    /// Neither name server answered, or there was no room.
    pub failed: u64,
    /// No query, or one that is not answered.
    pub refused: u64,
}

struct InFlight {
    client: Client,
    query: Query,
    asked: Asked,
    /// Place among the servers.
    server: usize,
    attempt: u32,
    stream: bool,
    due: Duration,
}

pub struct Forwarder {
    servers: Vec<SocketAddr>,
    /// Who answered last is asked first.
    preferred: usize,
    in_flight: BTreeMap<u64, InFlight>,
    caches: BTreeMap<u32, Cache>,
    counters: BTreeMap<u32, Counters>,
    actions: VecDeque<Action>,
    tokens: u64,
    random: Box<dyn FnMut() -> u128 + Send>,
}

impl Forwarder {
    pub fn new(random: impl FnMut() -> u128 + Send + 'static) -> Self {
        Self {
            servers: Vec::new(),
            preferred: 0,
            in_flight: BTreeMap::new(),
            caches: BTreeMap::new(),
            counters: BTreeMap::new(),
            actions: VecDeque::new(),
            tokens: 0,
            random: Box::new(random),
        }
    }

    /// Asks these servers from now on. `keeps`: whether a device still has the same
    /// interface; another's questions and answers are forgotten.
    pub fn configure(&mut self, servers: Vec<SocketAddr>, keeps: impl Fn(u32) -> bool) {
        if servers != self.servers {
            (self.servers, self.preferred) = (servers, 0);
            self.caches.clear();
        }
        self.caches.retain(|ifindex, _| keeps(*ifindex));
        self.counters.retain(|ifindex, _| keeps(*ifindex));
        let gone = |f: &InFlight| !keeps(f.client.ifindex);
        let tokens = self.in_flight.iter().filter(|(_, f)| gone(f)).map(|(token, _)| *token);
        for token in tokens.collect::<Vec<_>>() {
            self.take(token);
        }
    }

    pub fn counters(&self, ifindex: u32) -> Counters {
        self.counters.get(&ifindex).copied().unwrap_or_default()
    }

    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub fn next_due(&self) -> Option<Duration> {
        self.in_flight.values().map(|f| f.due).min()
    }

    /// A guest's message.
    pub fn ask(&mut self, client: Client, message: &[u8], zone: Option<&Zone>, now: Duration) {
        let counters = self.counters.entry(client.ifindex).or_default();
        let query = match message::read(message) {
            Ok(query) => query,
            Err(refusal) => {
                counters.refused += 1;
                let refusal = refusal.map(|message| Action::Answer { client, message });
                return self.actions.extend(refusal);
            }
        };
        if let Some(answer) = zone.and_then(|zone| zone.answer(&query)) {
            counters.own += 1;
            let message = message::reply(&query, &answer, 0, bytes_max(&client, &query));
            return self.actions.push_back(Action::Answer { client, message });
        }
        if !query.recursion {
            counters.refused += 1;
            return self.refuse(client, &query, Rcode::REFUSED);
        }
        let known = self.caches.get(&client.ifindex).and_then(|c| c.find(&query, now));
        if let Some((answer, age)) = known {
            counters.remembered += 1;
            let message = message::reply(&query, &answer, age, bytes_max(&client, &query));
            return self.actions.push_back(Action::Answer { client, message });
        }
        // A guest that asks again while the first is on its way gets one answer.
        if self.in_flight.values().any(|f| f.client == client && f.query == query) {
            return;
        }
        if self.servers.is_empty() || !self.make_room(client.ifindex) {
            return self.fail(client, &query);
        }
        self.attempt(client, query, self.preferred, 1, false, now);
    }

    /// Whether there is room for one more of this interface.
    fn make_room(&mut self, ifindex: u32) -> bool {
        let mut each: BTreeMap<u32, (usize, u64)> = BTreeMap::new();
        for (token, f) in &self.in_flight {
            let (count, _oldest) = each.entry(f.client.ifindex).or_insert((0, *token));
            *count += 1;
        }
        let own = each.get(&ifindex).map_or(0, |(count, _)| *count);
        if own >= IN_FLIGHT_AN_INTERFACE_MAX {
            return false;
        }
        if self.in_flight.len() < IN_FLIGHT_MAX {
            return true;
        }
        let most = each.values().max_by_key(|(count, _)| *count).copied();
        let Some((_, oldest)) = most.filter(|(count, _)| *count > own + 1) else { return false };
        if let Some(out) = self.take(oldest) {
            self.fail(out.client, &out.query);
        }
        true
    }

    fn attempt(
        &mut self,
        client: Client,
        query: Query,
        server: usize,
        attempt: u32,
        stream: bool,
        now: Duration,
    ) {
        let Some(address) = self.servers.get(server % self.servers.len().max(1)).copied() else {
            return self.fail(client, &query);
        };
        let asked = Asked::new(&query, &mut self.random);
        let token = self.tokens;
        self.tokens += 1;
        let message = asked.message.clone();
        self.actions.push_back(Action::Send { token, server: address, stream, message });
        let due = now + if stream { STREAM_PATIENCE } else { PATIENCE };
        let flight = InFlight { client, query, asked, server, attempt, stream, due };
        self.in_flight.insert(token, flight);
    }

    /// Ends an attempt.
    fn take(&mut self, token: u64) -> Option<InFlight> {
        let flight = self.in_flight.remove(&token)?;
        self.actions.push_back(Action::Close { token });
        Some(flight)
    }

    /// What an attempt's socket received.
    pub fn hear(&mut self, token: u64, bytes: &[u8], now: Duration) {
        let Some(flight) = self.in_flight.get(&token) else { return };
        match message::hear(bytes, &flight.asked, &flight.query) {
            // On a stream there is nothing else to wait for.
            Heard::Stray if !flight.stream => {}
            Heard::Turned | Heard::Truncated if !flight.stream => {
                let Some(f) = self.take(token) else { return };
                self.attempt(f.client, f.query, f.server, f.attempt, true, now);
            }
            // A stream's letters need not be ours: nobody could have sent them blindly.
            Heard::Stray | Heard::Turned | Heard::Truncated | Heard::Failed => {
                self.give_up(token, now);
            }
            Heard::Answer(answer) => {
                let Some(f) = self.take(token) else { return };
                self.preferred = f.server % self.servers.len().max(1);
                self.counters.entry(f.client.ifindex).or_default().forwarded += 1;
                let answer = Arc::new(answer);
                let cache = self.caches.entry(f.client.ifindex).or_default();
                cache.keep(&f.query, &answer, now);
                let bytes_max = bytes_max(&f.client, &f.query);
                let message = message::reply(&f.query, &answer, 0, bytes_max);
                self.actions.push_back(Action::Answer { client: f.client, message });
            }
        }
    }

    /// An attempt comes to nothing: its server is silent, or not there.
    pub fn give_up(&mut self, token: u64, now: Duration) {
        let Some(f) = self.take(token) else { return };
        if f.attempt >= ATTEMPTS_MAX {
            return self.fail(f.client, &f.query);
        }
        self.attempt(f.client, f.query, f.server + 1, f.attempt + 1, false, now);
    }

    pub fn elapse(&mut self, now: Duration) {
        let due = self.in_flight.iter().filter(|(_, f)| f.due <= now).map(|(token, _)| *token);
        for token in due.collect::<Vec<_>>() {
            self.give_up(token, now);
        }
    }

    fn fail(&mut self, client: Client, query: &Query) {
        self.counters.entry(client.ifindex).or_default().failed += 1;
        self.refuse(client, query, Rcode::SERVFAIL);
    }

    fn refuse(&mut self, client: Client, query: &Query, rcode: Rcode) {
        let message = message::refuse(query, rcode);
        self.actions.push_back(Action::Answer { client, message });
    }
}

fn bytes_max(client: &Client, query: &Query) -> usize {
    match client.origin {
        Origin::Datagram { bytes_max, .. } => query.datagram_bytes_max().min(bytes_max),
        Origin::Stream(_) => STREAM_BYTES_MAX,
    }
}
