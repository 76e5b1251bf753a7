//! Resource identifiers: a prefix and 17 hexadecimal digits, as EC2 writes them
//! (`i-0123456789abcdef0`). Parsed once at the border; a value of these types
//! is always well formed. Whoever creates an id brings the randomness.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How many hexadecimal digits follow the prefix.
pub const HEX_DIGITS: usize = 17;

/// The greatest number that 17 hexadecimal digits can write.
const NUMBER_MAX: u128 = (1 << (4 * HEX_DIGITS)) - 1;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id of the form {prefix}0123456789abcdef0")]
pub struct MalformedId {
    pub prefix: &'static str,
    pub text: String,
}

fn parse(prefix: &'static str, text: &str) -> Result<u128, MalformedId> {
    let malformed = || MalformedId { prefix, text: text.chars().take(64).collect() };
    let digits = text.strip_prefix(prefix).ok_or_else(malformed)?;
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if digits.len() != HEX_DIGITS || !digits.bytes().all(lower_hex) {
        return Err(malformed());
    }
    u128::from_str_radix(digits, 16).map_err(|_| malformed())
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id from random bits; those beyond 68 are dropped.
            pub const fn from_random(bits: u128) -> Self {
                Self(bits & NUMBER_MAX)
            }

            /// The digits without their prefix, for names derived from the id.
            pub fn digits(self) -> String {
                format!("{:017x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{:017x}", $prefix, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = MalformedId;

            fn from_str(text: &str) -> Result<Self, MalformedId> {
                parse($prefix, text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

ids! {
    InstanceId "i-";
    VolumeId "vol-";
    SnapshotId "snap-";
    ImageId "ami-";
    /// A security group.
    GroupId "sg-";
    /// One rule of a security group.
    RuleId "sgr-";
    /// A network interface (ENI).
    InterfaceId "eni-";
    /// An elastic address's allocation.
    AllocationId "eipalloc-";
    /// An elastic address's association with an interface.
    AssociationId "eipassoc-";
    KeyPairId "key-";
    VpcId "vpc-";
    SubnetId "subnet-";
    RouteTableId "rtb-";
    NatGatewayId "nat-";
    NetworkAclId "acl-";
    PrefixListId "pl-";
    ReservationId "r-";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_was_written() {
        let id = InstanceId::from_random(u128::MAX);
        assert_eq!(id.to_string(), "i-fffffffffffffffff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(
            serde_json::from_str::<InstanceId>("\"i-0000000000000000f\"").unwrap().digits().len(),
            17
        );
    }

    #[test]
    fn an_id_of_another_kind_length_or_case_is_malformed() {
        for text in [
            "",
            "i-",
            "vol-0123456789abcdef0",
            "i-0123456789abcdef",
            "i-0123456789ABCDEF0",
            "i-+123456789abcdef0",
        ] {
            assert!(text.parse::<InstanceId>().is_err(), "{text}");
        }
    }
}
