//! `netctl tag`: names and notes on anything that has an id.

use clap::Subcommand;

use crate::api::session::{Filter, Tag as Pair};
use crate::api::{Parameters, Session};
use crate::failure::Outcome;
use crate::listing::{Column, Listing};
use crate::output;

#[derive(Debug, Subcommand)]
pub enum Tag {
    /// Put tags on resources
    #[command(
        after_help = "EXAMPLES:\n  netctl tag create i-0123456789abcdef0 vol-0123456789abcdef0 --tag Name=web"
    )]
    Create {
        /// Ids of instances, volumes, groups, …
        #[arg(required = true, value_name = "RESOURCE")]
        resources: Vec<String>,
        /// The tag, KEY=VALUE; may be given many times
        #[arg(long = "tag", required = true, value_parser = Pair::parse, value_name = "KEY=VALUE")]
        tags: Vec<Pair>,
    },
    /// Take tags off resources
    #[command(
        alias = "rm",
        after_help = "EXAMPLES:\n  netctl tag delete i-0123456789abcdef0 --key Name"
    )]
    Delete {
        /// Ids of instances, volumes, groups, …
        #[arg(required = true, value_name = "RESOURCE")]
        resources: Vec<String>,
        /// The key of a tag; may be given many times
        #[arg(long = "key", required = true, value_name = "KEY")]
        keys: Vec<String>,
    },
    /// List tags
    #[command(alias = "ls", after_help = "EXAMPLES:\n  netctl tag list --filter key=Name")]
    List {
        /// Only those that fit, such as resource-type=volume
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
}

const LISTING: Listing = Listing {
    id: "resource",
    columns: &[
        Column::new("RESOURCE", "resource", "resourceId"),
        Column::new("TYPE", "type", "resourceType"),
        Column::new("KEY", "key", "key"),
        Column::new("VALUE", "value", "value"),
    ],
};

pub fn run(session: &Session, noun: &Tag) -> Outcome {
    match noun {
        Tag::Create { resources, tags } => {
            let parameters = tags.iter().enumerate().fold(
                Parameters::new().list("ResourceId", resources),
                |p, (i, tag)| {
                    p.with(&format!("Tag.{}.Key", i + 1), &tag.key)
                        .with(&format!("Tag.{}.Value", i + 1), &tag.value)
                },
            );
            let deed = format!("{}: tag", resources.join(", "));
            session.call(&deed, "CreateTags", &parameters)?;
            output::note(&format!("tagged {}", resources.join(", ")));
            Ok(())
        }
        Tag::Delete { resources, keys } => {
            let parameters = keys
                .iter()
                .enumerate()
                .fold(Parameters::new().list("ResourceId", resources), |p, (i, key)| {
                    p.with(&format!("Tag.{}.Key", i + 1), key)
                });
            let deed = format!("{}: delete tags", resources.join(", "));
            session.call(&deed, "DeleteTags", &parameters)?;
            output::note(&format!("tags deleted from {}", resources.join(", ")));
            Ok(())
        }
        Tag::List { filters } => {
            let parameters = Parameters::new().filters(filters);
            let tags =
                session.describe("tags: list", "DescribeTags", &parameters, "tagSet/item")?;
            LISTING.show_all(session.format, &tags)
        }
    }
}
