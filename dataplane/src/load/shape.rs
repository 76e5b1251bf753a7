//! What the records in a map look like, told field by field. It is pinned beside the
//! maps, so that a daemon of another layout, which knows nothing of the old one, can
//! still take over what programs and guests have built up there. Pure.
//!
//! ```text
//! FLOWS v1 key 24 interface@0+8 local@8+4 … value 8 seen_s@0+4 rule@4+2 phase@6+1 flags@7+1
//! ```
//! A field goes over by its name; one that is new is 0, and one that is gone is left
//! behind. The version says what the fields mean: where it differs, nothing goes over.

use std::fmt::{self, Display, Formatter};
use std::mem::offset_of;

use ebpf::event::HitKey;
use ebpf::half::{Bucket, Place, WORDS6};
use ebpf::layout::{Flow, FlowKey, Interface};
use ebpf::port::{PortHolder, PortKey};
use ebpf::rate::Levels;
use ebpf::{Reason, V6};

/// Drawn by its name.
type Bucket6 = Bucket<WORDS6>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub offset: usize,
    pub len: usize,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub len: usize,
    pub fields: Vec<Field>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub map: String,
    pub version: u32,
    pub key: Record,
    pub value: Record,
}

macro_rules! record {
    ($type:ty { $($field:ident),* }) => {
        Record {
            len: size_of::<$type>(),
            fields: vec![$(Field {
                name: stringify!($field).to_owned(),
                offset: offset_of!($type, $field),
                len: len_of(|of: &$type| &raw const of.$field),
            }),*],
        }
    };
}

const fn len_of<T, F>(_: fn(&T) -> *const F) -> usize {
    size_of::<F>()
}

fn shape(map: &str, version: u32, key: Record, value: Record) -> Shape {
    Shape { map: map.to_owned(), version, key, value }
}

fn one(name: &str, len: usize) -> Record {
    Record { len, fields: vec![Field { name: name.to_owned(), offset: 0, len }] }
}

/// The maps whose content outlives a change of the layout. Whatever a field means must
/// stay what it means, or its map's version grows.
pub fn shapes() -> Vec<Shape> {
    let flow_key = record!(FlowKey { interface, local, remote, local_port, remote_port, protocol });
    let flow6_key =
        record!(FlowKey<V6> { interface, local, remote, local_port, remote_port, protocol });
    let hit_key = record!(HitKey { slot, rule, direction });
    vec![
        // Only what tells whose a slot was.
        shape("INTERFACES", 1, one("ifindex", 4), record!(Interface { id, slot })),
        shape("FLOWS", 1, flow_key, record!(Flow { seen_s, rule, phase, flags })),
        // Taken as it is: a place's words are drawn in `ebpf::half`.
        shape("FLOWS6", 1, flow6_key, record!(Flow { seen_s, rule, phase, flags })),
        shape("HALF_FLOWS", 1, one("bucket", 4), record!(Bucket { places })),
        shape("HALF_FLOWS6", 1, one("bucket", 4), record!(Bucket6 { places })),
        shape(
            "NAT_PORTS",
            1,
            record!(PortKey { public, peer, port, peer_port, protocol }),
            record!(PortHolder { interface, local, seen_s, local_port, flags }),
        ),
        shape("COUNTERS", 1, one("slot_and_reason", 4), one("packets", 8)),
        shape("HITS", 1, hit_key, one("flows", 8)),
        shape("LEVELS", 1, one("slot", 4), record!(Levels { full_at })),
    ]
}
const _: () = assert!(size_of::<Bucket>() == 4 * size_of::<Place>());

/// Reasons by name, as they are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reasons {
    pub block: u32,
    pub numbers: Vec<(String, u32)>,
}

impl Reasons {
    pub fn own() -> Self {
        let numbers = Reason::ALL.iter().map(|r| (r.name().to_owned(), *r as u32)).collect();
        Self { block: ebpf::REASONS_MAX, numbers }
    }

    /// The same reason's number in another layout.
    pub fn in_other(&self, number: u32, other: &Self) -> Option<u32> {
        let (name, _) = self.numbers.iter().find(|(_, n)| *n == number)?;
        other.numbers.iter().find(|(n, _)| n == name).map(|(_, number)| *number)
    }
}

/// A whole layout, as far as it goes over to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub shapes: Vec<Shape>,
    pub reasons: Reasons,
}

impl Layout {
    pub fn own() -> Self {
        Self { shapes: shapes(), reasons: Reasons::own() }
    }

    pub fn find(&self, map: &str) -> Option<&Shape> {
        self.shapes.iter().find(|s| s.map == map)
    }

    /// `None`: nobody wrote that. Lines of a kind that is not known are left out.
    pub fn parse(text: &str) -> Option<Self> {
        let mut layout = Self { shapes: Vec::new(), reasons: Reasons::default() };
        for line in text.lines() {
            match line.strip_prefix("reasons ") {
                Some(rest) => layout.reasons = Reasons::parse(rest)?,
                None => layout.shapes.push(Shape::parse(line)?),
            }
        }
        (!layout.shapes.is_empty()).then_some(layout)
    }
}

impl Display for Layout {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for shape in &self.shapes {
            writeln!(f, "{shape}")?;
        }
        write!(f, "reasons {}", self.reasons.block)?;
        self.reasons.numbers.iter().try_for_each(|(name, n)| write!(f, " {name}={n}"))
    }
}

impl Reasons {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let block = words.next()?.parse().ok()?;
        let number = |word: &str| {
            let (name, number) = word.split_once('=')?;
            Some((name.to_owned(), number.parse().ok()?))
        };
        Some(Self { block, numbers: words.map(number).collect::<Option<_>>()? })
    }
}

impl Shape {
    fn parse(line: &str) -> Option<Self> {
        let (head, rest) = line.split_once(" key ")?;
        let (map, version) = head.split_once(" v")?;
        let (key, value) = rest.split_once(" value ")?;
        Some(Self {
            map: map.to_owned(),
            version: version.parse().ok()?,
            key: Record::parse(key)?,
            value: Record::parse(value)?,
        })
    }
}

impl Display for Shape {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} v{} key {} value {}", self.map, self.version, self.key, self.value)
    }
}

impl Display for Record {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.len)?;
        self.fields.iter().try_for_each(|x| write!(f, " {}@{}+{}", x.name, x.offset, x.len))
    }
}

impl Record {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let len = words.next()?.parse().ok()?;
        let field = |word: &str| {
            let (name, place) = word.split_once('@')?;
            let (offset, size) = place.split_once('+')?;
            let (offset, size): (usize, usize) = (offset.parse().ok()?, size.parse().ok()?);
            let within = offset.checked_add(size)? <= len;
            within.then(|| Field { name: name.to_owned(), offset, len: size })
        };
        Some(Self { len, fields: words.map(field).collect::<Option<_>>()? })
    }

    /// A record of this shape out of one of another. A number that grows wider keeps
    /// its value; one that grows narrower must fit.
    pub fn converted(&self, other: &Self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut record = vec![0; self.len];
        for field in &self.fields {
            let Some(old) = other.fields.iter().find(|f| f.name == field.name) else { continue };
            let from = bytes.get(old.offset..old.offset + old.len)?;
            let len = field.len.min(old.len);
            let (kept, lost) = if cfg!(target_endian = "little") {
                (&from[..len], &from[len..])
            } else {
                (&from[old.len - len..], &from[..old.len - len])
            };
            if lost.iter().any(|byte| *byte != 0) {
                return None;
            }
            let first = if cfg!(target_endian = "little") { 0 } else { field.len - len };
            record[field.offset + first..][..len].copy_from_slice(kept);
        }
        Some(record)
    }

    /// A field of four or eight bytes, as a number.
    pub fn number(&self, name: &str, bytes: &[u8]) -> Option<u64> {
        let field = self.fields.iter().find(|f| f.name == name)?;
        let bytes = bytes.get(field.offset..field.offset + field.len)?;
        match field.len {
            4 => Some(u32::from_ne_bytes(bytes.try_into().ok()?).into()),
            8 => Some(u64::from_ne_bytes(bytes.try_into().ok()?)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::load::maps::NAMES;

    #[test]
    fn a_layout_reads_back_as_it_was_written() {
        let layout = Layout::own();
        let text = layout.to_string();
        assert_eq!(Layout::parse(&text), Some(layout));
        assert!(text.len() < 8000, "{} bytes", text.len());
        assert_eq!(Layout::parse(""), None);
        assert_eq!(Layout::parse("FLOWS v1 key 4 a@2+4 value 0"), None, "outside its record");
    }

    /// Every pinned map is carried over, or made anew from the desired state, or
    /// neither is needed: whoever adds one says which.
    #[test]
    fn every_pinned_map_is_carried_over_or_made_anew() {
        const ANEW: [&str; 22] = [
            "HALF",
            "CONFIG",
            "LOCALS",
            "ELASTICS",
            "POLICIES",
            "STEPS",
            "WORDS",
            "BLOCKED",
            "RANGES",
            "RANGES6",
            "RATES", // Counted from the flows that were carried.
            "QUOTAS",
            "SWEPT",
            "SIXES",
            "HOLDERS",
            "STEPS6",
            "BLOCKED6",
            "PROGRAMS",
            "ROUTES",
            // From the ports that were carried.
            "NAT_FLOWS",
            "NAT_OPENED",
            "NAT_SWEPT",
        ];
        for name in NAMES {
            let carried = Layout::own().find(name).is_some();
            assert!(
                carried != ANEW.contains(&name),
                "{name}: either `shapes` describes it for the next layout to take over, or it \
                 stands here as made anew from the desired state"
            );
        }
    }

    #[test]
    fn flows_of_a_layout_that_nobody_knows_any_more_keep_their_fields() {
        // Another order, a wider number, a field that is gone and padding that moved.
        let text = "FLOWS v1 key 40 protocol@0+4 interface@8+8 remote@16+4 local@20+4 \
                    vlan@24+2 remote_port@32+2 local_port@34+2 value 24 packets@0+8 flags@8+1 \
                    phase@9+1 seen_s@16+8";
        let old = Layout::parse(text).unwrap();
        let (old, own) = (old.find("FLOWS").unwrap(), Layout::own());
        let own = own.find("FLOWS").unwrap();
        let mut key = [0_u8; 40];
        key[0] = 6;
        key[8..16].copy_from_slice(&77_u64.to_ne_bytes());
        key[16..20].copy_from_slice(&1_u32.to_ne_bytes());
        key[20..24].copy_from_slice(&2_u32.to_ne_bytes());
        key[24] = 9;
        key[32..34].copy_from_slice(&443_u16.to_ne_bytes());
        key[34..36].copy_from_slice(&50_000_u16.to_ne_bytes());
        let mut value = [0xff_u8; 24];
        (value[8], value[9]) = (1, 3);
        value[16..24].copy_from_slice(&99_u64.to_ne_bytes());
        let key = own.key.converted(&old.key, &key).unwrap();
        let key: FlowKey = bytemuck::pod_read_unaligned(&key);
        let expected = FlowKey {
            interface: 77,
            local: 2,
            remote: 1,
            local_port: 50_000,
            remote_port: 443,
            protocol: 6,
            ..FlowKey::zeroed()
        };
        assert_eq!(key, expected);
        let flow = own.value.converted(&old.value, &value).unwrap();
        let flow: Flow = bytemuck::pod_read_unaligned(&flow);
        assert_eq!(flow, Flow { seen_s: 99, rule: 0, phase: 3, flags: 1 });
        // A number that would lose its head is not carried as another.
        value[16..24].copy_from_slice(&(1_u64 << 40).to_ne_bytes());
        assert_eq!(own.value.converted(&old.value, &value), None);
    }

    #[test]
    fn reasons_go_over_by_name() {
        let old =
            Reasons { block: 32, numbers: vec![("gone".into(), 1), ("established".into(), 2)] };
        let own = Reasons::own();
        assert_eq!(old.in_other(2, &own), Some(Reason::Established as u32));
        assert_eq!(old.in_other(1, &own), None);
        assert_eq!(old.in_other(3, &own), None);
    }
}
