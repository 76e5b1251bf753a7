//! The nouns of Hostplane: identifiers, addresses, security groups, volumes,
//! instances, and the lawful moves between their states.
//!
//! Every other crate builds on this one. It performs no I/O and knows no clock;
//! nothing here may ever depend on another crate of ours.

#![forbid(unsafe_code)]

pub mod id;
pub mod instance;
pub mod instance_type;
pub mod mac;
pub mod network_acl;
pub mod prefix_list;
pub mod route_table;
pub mod security_group;
pub mod volume;
pub mod volume_kind;

pub use id::{
    AllocationId, AssociationId, GroupId, ImageId, InstanceId, InterfaceId, KeyPairId, MalformedId,
    NatGatewayId, NetworkAclId, PrefixListId, ReservationId, RouteTableId, RuleId, SnapshotId,
    SubnetId, VolumeId, VpcId,
};
pub use instance::InstanceState;
pub use instance_type::InstanceType;
pub use mac::Mac;
pub use network_acl::NetworkAcl;
pub use prefix_list::{ListEntry, PrefixList};
pub use route_table::{Route, RouteTable};
pub use security_group::{Direction, Peer, PortRange, Protocol, Rule, RuleLimits, SecurityGroup};
pub use volume::{AttachmentState, VolumeState};
pub use volume_kind::{Limits, Rate, VolumeKind};
