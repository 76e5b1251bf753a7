//! The shape of the EC2 Query API: errors, the table of actions and types, and
//! the XML of answers. Nothing here knows what an action does.

mod error;
mod node;
mod table;

pub use error::ApiError;
pub use node::{Node, Struct, error_document, timestamp};
pub use table::{Params, Value, answer_matches, is_action, read_params};
