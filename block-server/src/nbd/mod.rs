//! The NBD protocol: fixed newstyle handshake, then transmission.

mod context;
pub mod frozen;
pub mod handshake;
mod input;
mod request;
pub mod session;
pub mod transmission;
pub mod wire;

pub use frozen::{Frozen, Terms};
pub use session::{Chunk, Command, Export, Exports, Payload, Request, Session};
pub use wire::Error;
