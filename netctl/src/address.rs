//! `netctl address`: elastic addresses, which stay while instances come and go.

use clap::Subcommand;

use crate::api::session::{Filter, Tag};
use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};
use crate::{instance, output};

#[derive(Debug, Subcommand)]
pub enum Address {
    /// Allocate an elastic address
    #[command(
        after_help = "EXAMPLES:\n  netctl address allocate\n  netctl address associate $(netctl address allocate -o id) web"
    )]
    Allocate {
        /// A tag, KEY=VALUE
        #[arg(long = "tag", value_parser = Tag::parse, value_name = "KEY=VALUE")]
        tags: Vec<Tag>,
    },
    /// Give an elastic address to an instance
    #[command(
        after_help = "EXAMPLES:\n  netctl address associate 198.51.100.129 web\n  netctl address associate eipalloc-0123456789abcdef0 i-0123456789abcdef0"
    )]
    Associate {
        /// The address or the id of its allocation
        address: String,
        /// Its id, or its tag `Name`
        instance: String,
        /// Take it from the instance that has it
        #[arg(long)]
        reassociate: bool,
    },
    /// Take an elastic address from its instance
    #[command(after_help = "EXAMPLES:\n  netctl address disassociate 198.51.100.129")]
    Disassociate {
        /// The address or the id of its allocation or association
        address: String,
    },
    /// Give an elastic address back
    #[command(alias = "rm", after_help = "EXAMPLES:\n  netctl address release 198.51.100.129")]
    Release {
        /// The address or the id of its allocation
        address: String,
    },
    /// List elastic addresses
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl address list\n  netctl eip list -o json"
    )]
    List {
        /// Only those that fit, such as instance-id=i-0123456789abcdef0
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
}

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("ALLOCATION", "id", "allocationId"),
        Column::new("ADDRESS", "address", "publicIp"),
        Column::new("INSTANCE", "instance", "instanceId"),
        Column::new("PRIVATE", "private_address", "privateIpAddress"),
        Column::new("INTERFACE", "interface", "networkInterfaceId").wide(),
        Column::new("ASSOCIATION", "association", "associationId").wide(),
        Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
    ],
};

const ASSOCIATION: Listing =
    Listing { id: "id", columns: &[Column::new("ASSOCIATION", "id", "associationId")] };

pub fn run(session: &Session, noun: &Address) -> Outcome {
    match noun {
        Address::Allocate { tags } => {
            let parameters = Parameters::new().with("Domain", "vpc").tags("elastic-ip", tags);
            let answer = session.call("address: allocate", "AllocateAddress", &parameters)?;
            LISTING.show_one(session.format, &answer)
        }
        Address::Associate { address, instance, reassociate } => {
            let allocation = find(session, address)?.text_at("allocationId").to_owned();
            let instance = instance::resolve(session, instance)?;
            let parameters = Parameters::new()
                .with("AllocationId", &allocation)
                .with("InstanceId", &instance)
                .with("AllowReassociation", reassociate);
            let deed = format!("address {address}: associate with {instance}");
            let answer = session.call(&deed, "AssociateAddress", &parameters)?;
            ASSOCIATION.show_one(session.format, &answer)
        }
        Address::Disassociate { address } => {
            let association = if address.starts_with("eipassoc-") {
                address.clone()
            } else {
                find(session, address)?.text_at("associationId").to_owned()
            };
            let deed = format!("address {address}: disassociate");
            if association.is_empty() {
                return Err(Failure::failed(format!("{deed}: it is associated with nothing"))
                    .hint("netctl address list"));
            }
            let parameters = Parameters::new().with("AssociationId", &association);
            session.call(&deed, "DisassociateAddress", &parameters)?;
            output::note(&format!("disassociated {address}"));
            Ok(())
        }
        Address::Release { address } => {
            let allocation = find(session, address)?.text_at("allocationId").to_owned();
            let parameters = Parameters::new().with("AllocationId", &allocation);
            session.call(&format!("address {address}: release"), "ReleaseAddress", &parameters)?;
            output::note(&format!("released {address}"));
            Ok(())
        }
        Address::List { filters } => LISTING.show_all(session.format, &describe(session, filters)?),
    }
}

fn describe(session: &Session, filters: &[Filter]) -> Outcome<Vec<Element>> {
    let parameters = Parameters::new().filters(filters);
    session.describe("addresses: list", "DescribeAddresses", &parameters, "addressesSet/item")
}

/// What an address, or the id of its allocation, speaks of.
fn find(session: &Session, address: &str) -> Outcome<Element> {
    let key = if address.starts_with("eipalloc-") { "allocation-id" } else { "public-ip" };
    describe(session, &[Filter::new(key, address)])?.into_iter().next().ok_or_else(|| {
        Failure::failed(format!("address {address}: it is not allocated"))
            .hint("netctl address list")
    })
}
