//! `netctl vpc`: the networks that instances live in.

use clap::Subcommand;

use crate::api::session::Filter;
use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};

#[derive(Debug, Subcommand)]
pub enum Vpc {
    /// List VPCs
    #[command(alias = "ls", after_help = "EXAMPLES:\n  netctl vpc list")]
    List,
}

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("VPC", "id", "vpcId"),
        Column::new("STATE", "state", "state"),
        Column::new("CIDR", "cidr", "cidrBlock"),
        Column::new("DEFAULT", "default", "isDefault").shape(Shape::Flag),
        Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
    ],
};

pub fn run(session: &Session, noun: &Vpc) -> Outcome {
    match noun {
        Vpc::List => LISTING.show_all(session.format, &describe(session, &[])?),
    }
}

fn describe(session: &Session, filters: &[Filter]) -> Outcome<Vec<Element>> {
    let parameters = Parameters::new().filters(filters);
    session.describe("vpcs: list", "DescribeVpcs", &parameters, "vpcSet/item")
}

/// The VPC that is meant where none is named.
pub fn default(session: &Session) -> Outcome<String> {
    describe(session, &[Filter::new("is-default", "true")])?
        .first()
        .map(|vpc| vpc.text_at("vpcId").to_owned())
        .ok_or_else(|| {
            Failure::failed("vpcs: list: there is no default one").hint("netctl vpc list")
        })
}
