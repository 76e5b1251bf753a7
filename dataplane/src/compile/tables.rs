//! The tables as the host holds them: plain maps, whole and comparable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ebpf::V6;
use ebpf::layout::{
    Config, Elastic, Holder, Hop, Interface, Local, LocalKey, Policy, Prefix, Prefix6, ROW_NONE,
    RouteKey, Six, Span, Step, Step6,
};
use ebpf::rate::Rates;
use model::{Direction, InterfaceId, NatGatewayId, NetworkAclId, PrefixList, RouteTableId, RuleId};

/// What the programs decide by, all of it, and where they are attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    pub config: Config,
    /// By ifindex.
    pub interfaces: BTreeMap<u32, Interface>,
    pub locals: BTreeMap<LocalKey, Local>,
    /// By ifindex.
    pub sixes: BTreeMap<u32, Six>,
    pub holders: BTreeMap<V6, Holder>,
    pub elastics: BTreeMap<u32, Elastic>,
    /// By slot.
    pub policies: BTreeMap<u32, Placed>,
    /// Of every route table, under its number.
    pub routes: BTreeMap<RouteKey, Hop>,
    pub blocked: BTreeSet<Prefix>,
    pub blocked6: BTreeSet<Prefix6>,
    /// 1: a range; 0: an exception.
    pub ranges: BTreeMap<Prefix, u32>,
    pub ranges6: BTreeMap<Prefix6, u32>,
    /// By counter slot; the uplink's is 0. Only those that limit something.
    pub rates: BTreeMap<u32, Rates>,
    /// By ifindex.
    pub attachments: BTreeMap<u32, Attachment>,
    /// Names for what the kernel knows by number; empty after adoption until the
    /// first desired state is compiled.
    pub names: Names,
}

impl Tables {
    /// Every copy of every interface's record.
    pub fn records_mut(&mut self) -> impl Iterator<Item = &mut Interface> {
        let elastics = self.elastics.values_mut().map(|e| &mut e.interface);
        self.interfaces.values_mut().chain(elastics)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub device: String,
    pub role: Role,
}

/// Which programs a device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Guest,
    Uplink,
    /// With the early drop by XDP before it.
    UplinkEarly,
    Punt,
}

/// An ACL, and the numbers of its entries in the order of its policy's bits.
pub type NamedAcl = (NetworkAclId, Arc<[u16]>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// By ifindex.
    pub interfaces: BTreeMap<u32, InterfaceId>,
    /// The rules of an interface by ifindex, in the order of its policy's bits. Not by the
    /// policy: other rules with the same content share it.
    pub rules: BTreeMap<(u32, Direction), Arc<[RuleId]>>,
    /// By ifindex.
    pub acls: BTreeMap<(u32, Direction), NamedAcl>,
    /// Of rules that name one.
    pub lists: BTreeMap<RuleId, PrefixList>,
    /// By ifindex. Two with the same content share a number.
    pub route_tables: BTreeMap<u32, RouteTableId>,
    /// By public address.
    pub nat_gateways: BTreeMap<u32, NatGatewayId>,
}

/// A policy without its place. Two with the same content share one place.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content {
    /// In the order of [`Policy`]'s spans.
    pub classes: [Vec<Class>; CLASS_TABLES],
    pub remotes6: Vec<Class<V6>>,
    /// All rows, one after the other.
    pub rows: Vec<u64>,
    /// [`Policy::allow`].
    pub allow: u64,
}

/// remotes, identities, tcp, udp, icmp, others, icmp6.
pub const CLASS_TABLES: usize = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class<K = u64> {
    pub key: K,
    /// Where its row begins among the policy's; `None`: no rule.
    pub row: Option<u32>,
}

/// A policy in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub content: Arc<Content>,
    pub first_step: u32,
    pub first_step6: u32,
    pub first_word: u32,
}

impl Content {
    pub fn steps_len(&self) -> u32 {
        self.classes.iter().map(Vec::len).sum::<usize>() as u32
    }

    pub fn steps6_len(&self) -> u32 {
        self.remotes6.len() as u32
    }

    pub fn words_len(&self) -> u32 {
        self.rows.len() as u32
    }
}

impl Placed {
    /// As it stands in `POLICIES`.
    pub fn record(&self) -> Policy {
        let mut first = self.first_step;
        let mut span = |table: usize| {
            let span = Span { first, len: self.content.classes[table].len() as u32 };
            first += span.len;
            span
        };
        Policy {
            remotes: span(0),
            identities: span(1),
            tcp: span(2),
            udp: span(3),
            icmp: span(4),
            others: span(5),
            icmp6: span(6),
            remotes6: Span { first: self.first_step6, len: self.content.steps6_len() },
            allow: self.content.allow,
        }
    }

    /// As they stand in `STEPS`, from `first_step`.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.content.classes.iter().flatten().map(move |class| Step {
            key: class.key,
            row: self.row(class.row),
            zero: 0,
        })
    }

    /// As they stand in `STEPS6`, from `first_step6`.
    pub fn steps6(&self) -> impl Iterator<Item = Step6> + '_ {
        self.content.remotes6.iter().map(move |class| Step6 {
            key: class.key,
            row: self.row(class.row),
            zero: 0,
        })
    }

    fn row(&self, row: Option<u32>) -> u32 {
        match row {
            Some(row) => self.first_word + row,
            None => ROW_NONE,
        }
    }
}
