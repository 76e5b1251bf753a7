//! `netctl subnet`: the parts of a VPC.

use clap::Subcommand;

use crate::api::{Parameters, Session};
use crate::failure::Outcome;
use crate::listing::{Column, Listing, Shape};

#[derive(Debug, Subcommand)]
pub enum Subnet {
    /// List subnets
    #[command(alias = "ls", after_help = "EXAMPLES:\n  netctl subnet list")]
    List,
}

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("SUBNET", "id", "subnetId"),
        Column::new("STATE", "state", "state"),
        Column::new("CIDR", "cidr", "cidrBlock"),
        Column::new("FREE", "free_addresses", "availableIpAddressCount").shape(Shape::Number),
        Column::new("ZONE", "zone", "availabilityZone"),
        Column::new("VPC", "vpc", "vpcId"),
        Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
    ],
};

pub fn run(session: &Session, noun: &Subnet) -> Outcome {
    match noun {
        Subnet::List => {
            let subnets = session.describe(
                "subnets: list",
                "DescribeSubnets",
                &Parameters::new(),
                "subnetSet/item",
            )?;
            LISTING.show_all(session.format, &subnets)
        }
    }
}
