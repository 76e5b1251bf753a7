//! `netctl type`: the sizes that instances come in.

use clap::Subcommand;

use crate::api::session::Filter;
use crate::api::{Parameters, Session};
use crate::failure::Outcome;
use crate::listing::{Column, Listing, Shape};

#[derive(Debug, Subcommand)]
pub enum InstanceType {
    /// List instance types
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl type list\n  netctl type list t3.micro t3.small"
    )]
    List {
        /// Only these
        #[arg(value_name = "TYPE")]
        types: Vec<String>,
        /// Only those that fit, such as instance-type=t3.*
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
}

const LISTING: Listing = Listing {
    id: "type",
    columns: &[
        Column::new("TYPE", "type", "instanceType"),
        Column::new("VCPUS", "vcpus", "vCpuInfo/defaultVCpus").shape(Shape::Number),
        Column::new("MIB", "memory_mib", "memoryInfo/sizeInMiB").shape(Shape::Number),
        Column::new("NETWORK", "network", "networkInfo/networkPerformance"),
        Column::new("ARCH", "architectures", "processorInfo/supportedArchitectures/item")
            .shape(Shape::Texts)
            .wide(),
    ],
};

pub fn run(session: &Session, noun: &InstanceType) -> Outcome {
    let InstanceType::List { types, filters } = noun;
    let types = session.describe(
        "types: list",
        "DescribeInstanceTypes",
        &Parameters::new().list("InstanceType", types).filters(filters),
        "instanceTypeSet/item",
    )?;
    LISTING.show_all(session.format, &types)
}
