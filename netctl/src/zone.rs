//! `netctl zone`: availability zones.

use clap::Subcommand;

use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing};

#[derive(Debug, Subcommand)]
pub enum Zone {
    /// List availability zones
    #[command(alias = "ls", after_help = "EXAMPLES:\n  netctl zone list")]
    List,
}

const LISTING: Listing = Listing {
    id: "name",
    columns: &[
        Column::new("ZONE", "name", "zoneName"),
        Column::new("STATE", "state", "zoneState"),
        Column::new("REGION", "region", "regionName"),
        Column::new("ID", "id", "zoneId"),
    ],
};

pub fn run(session: &Session, noun: &Zone) -> Outcome {
    match noun {
        Zone::List => LISTING.show_all(session.format, &describe(session)?),
    }
}

fn describe(session: &Session) -> Outcome<Vec<Element>> {
    session.describe(
        "zones: list",
        "DescribeAvailabilityZones",
        &Parameters::new(),
        "availabilityZoneInfo/item",
    )
}

/// The zone that is meant where none is named.
pub fn first(session: &Session) -> Outcome<String> {
    let zones = describe(session)?;
    zones
        .first()
        .map(|zone| zone.text_at("zoneName").to_owned())
        .ok_or_else(|| Failure::failed("zones: list: there is none").hint("netctl status"))
}
