//! `netctl image`: the machine images that instances start from.
//!
//! Building and importing is this host's business and asked of the agent; what
//! comes of it is then registered with the API like any other image.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use rpc::agent::{BuildImage, ImportImage};

use crate::api::session::Filter;
use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};
use crate::{output, waiting};

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Build an image on this host and register it
    #[command(
        after_help = "EXAMPLES:\n  netctl image build tiny\n  ami=$(netctl image build tiny --as small-1 -o id)"
    )]
    Build {
        /// What to build: tiny, a Linux of 15 MiB with ssh, from Debian's packages
        recipe: String,
        /// Name of the image [default: the recipe's]
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
    },
    /// Take a raw or qcow2 file as an image and register it
    #[command(
        after_help = "EXAMPLES:\n  netctl image import debian-12-generic-amd64.qcow2 --as debian-12"
    )]
    Import {
        /// A disk image of a whole disk
        file: PathBuf,
        /// Name of the image [default: the file's, without its ending]
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
    },
    /// List registered images
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl image list\n  netctl image list -o json"
    )]
    List {
        /// Only those that fit, such as name=tiny
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
    /// Show everything about an image
    #[command(after_help = "EXAMPLES:\n  netctl image show tiny")]
    Show {
        /// Its id or name
        image: String,
    },
    /// Register an image that is on the host already
    #[command(after_help = "EXAMPLES:\n  netctl image register tiny --as tiny-again")]
    Register {
        /// Its name on the host
        location: String,
        /// Name of the image [default: the same]
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
    },
    /// Take an image off the list; instances that run from it run on
    #[command(
        alias = "rm",
        after_help = "EXAMPLES:\n  netctl image deregister tiny\n  netctl image deregister tiny --delete"
    )]
    Deregister {
        /// Its id or name
        image: String,
        /// Delete its files on the host too
        #[arg(long)]
        delete: bool,
    },
}

/// An agent reports within a second when something has changed.
const REPORTED_WITHIN: Duration = Duration::from_secs(20);

const COLUMNS: &[Column] = &[
    Column::new("IMAGE", "id", "imageId"),
    Column::new("NAME", "name", "name"),
    Column::new("STATE", "state", "imageState"),
    Column::new("LOCATION", "location", "imageLocation").wide(),
    Column::new("ARCH", "architecture", "architecture"),
    Column::new("ROOT", "root_device", "rootDeviceName").wide(),
    Column::new("GIB", "size_gib", "blockDeviceMapping/item/ebs/volumeSize").shape(Shape::Number),
    Column::new("CREATED", "created_at", "creationDate").wide(),
    Column::new("", "description", "description").json(),
    Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
];

const LISTING: Listing = Listing { id: "id", columns: COLUMNS };

pub fn run(session: &Session, noun: &Image) -> Outcome {
    match noun {
        Image::Build { recipe, name } => {
            let name = name.as_ref().unwrap_or(recipe);
            let deed = format!("image {name}: build {recipe}");
            let build = BuildImage { recipe: recipe.clone(), name: name.clone() };
            let agent = session.daemon("agent");
            waiting::during(&deed, || crate::wait_for(agent.build_image(&build)))
                .map_err(|e| session.unreachable(&deed, e))?;
            register_new(session, name)
        }
        Image::Import { file, name } => {
            let name = match name {
                Some(name) => name.clone(),
                None => {
                    file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).ok_or_else(
                        || Failure::unfit(format!("file {}: names no image", file.display())),
                    )?
                }
            };
            let deed = format!("image {name}: import {}", file.display());
            // The agent's working directory is another.
            let file =
                std::fs::canonicalize(file).map_err(|e| Failure::unfit(format!("{deed}: {e}")))?;
            let import = ImportImage { file, name: name.clone() };
            let agent = session.daemon("agent");
            waiting::during(&deed, || crate::wait_for(agent.import_image(&import)))
                .map_err(|e| session.unreachable(&deed, e))?;
            register_new(session, &name)
        }
        Image::List { filters } => {
            let parameters = Parameters::new().filters(filters);
            let images = session.describe(
                "images: list",
                "DescribeImages",
                &parameters,
                "imagesSet/item",
            )?;
            LISTING.show_all(session.format, &images)
        }
        Image::Show { image } => LISTING.show_one(session.format, &find(session, image)?),
        Image::Register { location, name } => {
            register(session, location, name.as_ref().unwrap_or(location))
        }
        Image::Deregister { image, delete } => {
            let found = find(session, image)?;
            let id = found.text_at("imageId");
            let deed = format!("image {id}: deregister");
            session.call(&deed, "DeregisterImage", &Parameters::new().with("ImageId", id))?;
            if *delete {
                let deed = format!("image {id}: delete its files");
                let location = found.text_at("imageLocation");
                crate::wait_for(session.daemon("agent").delete_image(location))
                    .map_err(|e| session.unreachable(&deed, e))?;
            }
            output::note(&format!("deregistered {id}"));
            Ok(())
        }
    }
}

/// Registers what the agent has just made. `control` learns of it with the
/// agent's next report, and says `InvalidManifest` until then.
fn register_new(session: &Session, name: &str) -> Outcome {
    let mut done = Ok(());
    waiting::until(&format!("image {name}: register"), REPORTED_WITHIN, || {
        done = register(session, name, name);
        let is_unknown =
            matches!(&done, Err(Failure::Api { code, .. }) if code == "InvalidManifest");
        Ok(waiting::Look { is_done: !is_unknown, seen: "not reported yet".to_owned() })
    })
    .and(done)
}

fn register(session: &Session, location: &str, name: &str) -> Outcome {
    let parameters = Parameters::new()
        .with("Name", name)
        .with("ImageLocation", location)
        .with("Architecture", "x86_64");
    let answer = session.call(&format!("image {name}: register"), "RegisterImage", &parameters)?;
    LISTING.show_one(session.format, &find(session, answer.text_at("imageId"))?)
}

/// The image that an id or a name speaks of.
fn find(session: &Session, image: &str) -> Outcome<Element> {
    let by_id = image.starts_with("ami-");
    let parameters = if by_id {
        Parameters::new().list("ImageId", [image])
    } else {
        Parameters::new().filters(&[Filter::new("name", image)])
    };
    let deed = format!("image {image}: show");
    let found = session.describe(&deed, "DescribeImages", &parameters, "imagesSet/item")?;
    found.into_iter().next().ok_or_else(|| {
        Failure::failed(format!("image {image}: none has that id or name"))
            .hint("netctl image list; netctl image build tiny")
    })
}

/// The id and the root device of the image that an id or a name speaks of.
pub fn resolve(session: &Session, image: &str) -> Outcome<(String, String)> {
    let found = find(session, image)?;
    Ok((found.text_at("imageId").to_owned(), found.text_at("rootDeviceName").to_owned()))
}
