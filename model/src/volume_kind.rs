//! Kinds of volume by EBS's names: how large one may be, and how fast.
//!
//! What may be asked for is what EC2's API model says of `CreateVolume` (botocore
//! 1.44.5, `ec2/2016-11-15/service-2.json`; gp3 as raised in September 2025). The
//! rest is the EBS user guide's, "Amazon EBS volume types" (gp3, gp2, io1, io2, st1,
//! sc1) and "previous generation volumes" (standard), and of its chapter "I/O
//! characteristics": what one operation is (up to 256 KiB on solid-state kinds, 1 MiB
//! on disks; sequential ones are merged up to that).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const GIB_PER_TIB: u64 = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    Gp3,
    Gp2,
    Io1,
    Io2,
    St1,
    Sc1,
    Standard,
}

/// A rate with its burst. Units are operations or bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Each second, for ever.
    pub sustained: u64,
    /// Each second, while credits last; the same as `sustained` where there are none.
    pub peak: u64,
    /// Units that an idle volume saves up, to be spent above `sustained`.
    pub credits: u64,
}

impl Rate {
    /// The same rate at all times.
    pub const fn steady(per_second: u64) -> Self {
        Self { sustained: per_second, peak: per_second, credits: 0 }
    }
}

/// How much a volume may do. Without a rate there is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub operations: Option<Rate>,
    pub bytes: Option<Rate>,
    /// Bytes that count as one operation; a power of two; 0 is [`Limits::UNIT`].
    pub unit_bytes: u64,
}

impl Limits {
    /// What one operation is where nothing else is said: EBS's for solid state.
    pub const UNIT: u64 = 256 << 10;

    pub const fn none() -> Self {
        Self { operations: None, bytes: None, unit_bytes: Self::UNIT }
    }

    pub const fn is_none(&self) -> bool {
        self.operations.is_none() && self.bytes.is_none()
    }
}

/// What one kind allows.
struct Row {
    name: &'static str,
    gib: (u64, u64),
    /// Operations a second that may be asked for, and how many each GiB allows;
    /// `None` where they follow from the size alone.
    iops: Option<(u64, u64, u64)>,
    /// MiB a second that may be asked for.
    throughput: Option<(u64, u64)>,
}

const fn row(kind: VolumeKind) -> Row {
    match kind {
        VolumeKind::Gp3 => Row {
            name: "gp3",
            gib: (1, 65_536),
            iops: Some((3000, 80_000, 500)),
            throughput: Some((125, 2000)),
        },
        VolumeKind::Gp2 => Row { name: "gp2", gib: (1, 16_384), iops: None, throughput: None },
        VolumeKind::Io1 => {
            Row { name: "io1", gib: (4, 16_384), iops: Some((100, 64_000, 50)), throughput: None }
        }
        VolumeKind::Io2 => Row {
            name: "io2",
            gib: (4, 65_536),
            iops: Some((100, 256_000, 1000)),
            throughput: None,
        },
        VolumeKind::St1 => Row { name: "st1", gib: (125, 16_384), iops: None, throughput: None },
        VolumeKind::Sc1 => Row { name: "sc1", gib: (125, 16_384), iops: None, throughput: None },
        VolumeKind::Standard => {
            Row { name: "standard", gib: (1, 1024), iops: None, throughput: None }
        }
    }
}

/// Why a kind cannot be had so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    Size {
        gib: u64,
        min: u64,
        max: u64,
    },
    NotSettable {
        what: &'static str,
    },
    Missing {
        what: &'static str,
    },
    Range {
        what: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    /// More operations than the size allows.
    IopsPerGib {
        iops: u64,
        gib: u64,
        most: u64,
    },
    /// gp3: more throughput than the operations allow.
    ThroughputPerIops {
        mib: u64,
        most: u64,
    },
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { gib, min, max } => {
                write!(f, "{gib} GiB: it must be between {min} and {max} GiB")
            }
            Self::NotSettable { what } => write!(f, "{what}: it follows from the size"),
            Self::Missing { what } => write!(f, "{what}: it must be given"),
            Self::Range { what, value, min, max } => {
                write!(f, "{what} {value}: it must be between {min} and {max}")
            }
            Self::IopsPerGib { iops, gib, most } => {
                write!(f, "IOPS {iops}: a volume of {gib} GiB has at most {most} a GiB")
            }
            Self::ThroughputPerIops { mib, most } => {
                write!(f, "throughput {mib}: its IOPS allow at most {most} MiB/s")
            }
        }
    }
}

impl VolumeKind {
    pub const ALL: [Self; 7] =
        [Self::Gp3, Self::Gp2, Self::Io1, Self::Io2, Self::St1, Self::Sc1, Self::Standard];

    pub const fn name(self) -> &'static str {
        row(self).name
    }

    /// Smallest and greatest size in GiB.
    pub const fn sizes_gib(self) -> (u64, u64) {
        row(self).gib
    }

    /// Whether IOPS and throughput may be asked for.
    pub const fn settable(self) -> (bool, bool) {
        let row = row(self);
        (row.iops.is_some(), row.throughput.is_some())
    }

    /// What a volume of this kind and size has: operations and MiB a second, as
    /// EC2 shows them. `iops` and `throughput` are what was asked for.
    pub fn provision(
        self,
        gib: u64,
        iops: Option<u64>,
        throughput: Option<u64>,
    ) -> Result<(Option<u64>, Option<u64>), Unfit> {
        let row = row(self);
        let (min, max) = row.gib;
        if !(min..=max).contains(&gib) {
            return Err(Unfit::Size { gib, min, max });
        }
        let iops = match (row.iops, iops) {
            (None, Some(_)) => return Err(Unfit::NotSettable { what: "IOPS" }),
            (None, None) if self == Self::Gp2 => Some((gib * 3).clamp(100, 16_000)),
            (None, None) => None,
            // gp3 has a baseline; the provisioned kinds must be told.
            (Some((base, ..)), None) if self == Self::Gp3 => Some(base),
            (Some(_), None) => return Err(Unfit::Missing { what: "IOPS" }),
            (Some((min, max, per_gib)), Some(value)) => {
                if !(min..=max).contains(&value) {
                    return Err(Unfit::Range { what: "IOPS", value, min, max });
                }
                if value > min && value > gib * per_gib {
                    return Err(Unfit::IopsPerGib { iops: value, gib, most: per_gib });
                }
                Some(value)
            }
        };
        let throughput = match (row.throughput, throughput) {
            (None, Some(_)) => return Err(Unfit::NotSettable { what: "throughput" }),
            (None, None) => None,
            (Some((base, _)), None) => Some(base),
            (Some((min, max)), Some(value)) => {
                if !(min..=max).contains(&value) {
                    return Err(Unfit::Range { what: "throughput", value, min, max });
                }
                // 0.25 MiB/s for each operation a second.
                let most = iops.unwrap_or(0) / 4;
                if value > min && value > most {
                    return Err(Unfit::ThroughputPerIops { mib: value, most });
                }
                Some(value)
            }
        };
        Ok((iops, throughput))
    }

    /// The limits that go with it.
    pub fn limits(
        self,
        gib: u64,
        iops: Option<u64>,
        throughput: Option<u64>,
    ) -> Result<Limits, Unfit> {
        let (iops, throughput) = self.provision(gib, iops, throughput)?;
        let steady_mib = |mib: u64| Some(Rate::steady(mib * MIB));
        // Of a figure for each TiB, at least 1.
        let share = |per_tib: u64, most: u64| (gib * per_tib / GIB_PER_TIB).clamp(1, most) * MIB;
        let disk = |base, burst, most_base, most| {
            let rate = Rate {
                sustained: share(base, most_base),
                peak: share(burst, most),
                credits: gib * TIB / GIB_PER_TIB,
            };
            Some(rate)
        };
        let iops_of = |n: Option<u64>| n.map(Rate::steady);
        let (operations, bytes, unit_bytes) = match self {
            Self::Gp3 => (iops_of(iops), throughput.and_then(steady_mib), Limits::UNIT),
            Self::Gp2 => {
                let base = iops.unwrap_or(100);
                let rate = Rate {
                    sustained: base,
                    peak: base.max(3000),
                    credits: if base < 3000 { 5_400_000 } else { 0 },
                };
                (Some(rate), steady_mib(if gib <= 170 { 128 } else { 250 }), Limits::UNIT)
            }
            Self::Io1 => {
                // 256 KiB for each operation up to 500 MiB/s; above 32 000 it is 16 KiB.
                let mib = iops.map(|n| if n <= 32_000 { (n / 4).clamp(1, 500) } else { n / 64 });
                (iops_of(iops), mib.and_then(steady_mib), Limits::UNIT)
            }
            // 0.256 MiB/s for each operation a second.
            Self::Io2 => {
                let mib = iops.map(|n| (n * 256 / 1000).clamp(1, 4000));
                (iops_of(iops), mib.and_then(steady_mib), Limits::UNIT)
            }
            Self::St1 => (Some(Rate::steady(500)), disk(40, 250, 500, 500), MIB),
            Self::Sc1 => (Some(Rate::steady(250)), disk(12, 80, 192, 250), MIB),
            Self::Standard => (Some(Rate::steady(200)), steady_mib(90), Limits::UNIT),
        };
        Ok(Limits { operations, bytes, unit_bytes })
    }
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for VolumeKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|k| k.name()).collect();
            format!("`{text}` is none of {}", known.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_the_figures_of_the_user_guide() {
        let of = |kind: VolumeKind, gib, iops| {
            let limits = kind.limits(gib, iops, None).unwrap();
            let rate = |rate: Option<Rate>, unit| rate.map(|r| (r.sustained / unit, r.peak / unit));
            (rate(limits.operations, 1), rate(limits.bytes, MIB))
        };
        assert_eq!(of(VolumeKind::Gp3, 1, None), (Some((3000, 3000)), Some((125, 125))));
        assert_eq!(of(VolumeKind::Gp2, 10, None), (Some((100, 3000)), Some((128, 128))));
        assert_eq!(of(VolumeKind::Gp2, 2000, None), (Some((6000, 6000)), Some((250, 250))));
        assert_eq!(
            of(VolumeKind::Io2, 300, Some(256_000)),
            (Some((256_000, 256_000)), Some((4000, 4000)))
        );
        assert_eq!(of(VolumeKind::Io1, 100, Some(4000)), (Some((4000, 4000)), Some((500, 500))));
        assert_eq!(
            of(VolumeKind::Io1, 960, Some(48_000)),
            (Some((48_000, 48_000)), Some((750, 750)))
        );
        assert_eq!(of(VolumeKind::St1, 1024, None), (Some((500, 500)), Some((40, 250))));
        assert_eq!(of(VolumeKind::St1, 16_384, None), (Some((500, 500)), Some((500, 500))));
        assert_eq!(of(VolumeKind::Sc1, 1024, None), (Some((250, 250)), Some((12, 80))));
        let credits = VolumeKind::St1.limits(2048, None, None).unwrap().bytes.unwrap().credits;
        assert_eq!(credits, 2 * TIB);
    }

    #[test]
    fn what_a_kind_does_not_have_is_refused_at_its_edge() {
        use VolumeKind::{Gp2, Gp3, Io2, St1};
        for (kind, gib, iops, throughput, lawful) in [
            (Gp3, 0, None, None, false),
            (Gp3, 65_536, None, None, true),
            (Gp3, 65_537, None, None, false),
            (Gp3, 160, Some(80_000), Some(2000), true),
            (Gp3, 160, Some(80_000), Some(2001), false),
            (Gp3, 159, Some(80_000), None, false),
            (Gp3, 161, Some(80_001), None, false),
            (Gp3, 1, Some(2999), None, false),
            (Gp3, 1, None, Some(751), false),
            (Gp3, 1, None, Some(750), true),
            (Gp2, 10, Some(3000), None, false),
            (Io2, 4, None, None, false),
            (Io2, 256, Some(256_000), None, true),
            (Io2, 255, Some(256_000), None, false),
            (Io2, 3, Some(100), None, false),
            (St1, 124, None, None, false),
            (St1, 125, None, None, true),
        ] {
            let found = kind.limits(gib, iops, throughput);
            assert_eq!(found.is_ok(), lawful, "{kind} {gib} {iops:?} {throughput:?}: {found:?}");
        }
        assert!("gp4".parse::<VolumeKind>().unwrap_err().contains("sc1"));
    }
}
