//! `netctl interface`: the network interfaces of instances.

use clap::Subcommand;

use crate::api::session::Filter;
use crate::api::{Parameters, Session};
use crate::failure::Outcome;
use crate::listing::{Column, Listing, Shape};

#[derive(Debug, Subcommand)]
pub enum Interface {
    /// List network interfaces
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl interface list\n  netctl interface list --filter attachment.instance-id=i-0123456789abcdef0"
    )]
    List {
        /// Only those that fit
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
}

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("INTERFACE", "id", "networkInterfaceId"),
        Column::new("STATE", "state", "status"),
        Column::new("PRIVATE", "private_address", "privateIpAddress"),
        Column::new("PUBLIC", "public_address", "association/publicIp"),
        Column::new("INSTANCE", "instance", "attachment/instanceId"),
        Column::new("INDEX", "device_index", "attachment/deviceIndex").shape(Shape::Number),
        Column::new("MAC", "mac", "macAddress").wide(),
        Column::new("GROUPS", "groups", "groupSet/item/groupId").shape(Shape::Texts).wide(),
        Column::new("SUBNET", "subnet", "subnetId").wide(),
        Column::new("", "vpc", "vpcId").json(),
    ],
};

pub fn run(session: &Session, noun: &Interface) -> Outcome {
    let Interface::List { filters } = noun;
    let interfaces = session.describe(
        "interfaces: list",
        "DescribeNetworkInterfaces",
        &Parameters::new().filters(filters),
        "networkInterfaceSet/item",
    )?;
    LISTING.show_all(session.format, &interfaces)
}
