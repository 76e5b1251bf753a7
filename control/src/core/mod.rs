//! What each action does: `(state, parameters, now, randomness) → (plan, answer)`
//! or an error. No socket, no clock, no store: a plan is one transaction, which
//! the shell makes durable before the answer is given.
//!
//! One definition an action ([`ACTIONS`]): the router, the permission's name and
//! the page `docs/guide/ec2-actions.md` come from it.

mod actions;
mod address;
mod attribute;
mod bootstrap;
mod desired;
mod group;
mod group_rule;
mod image;
mod instance;
mod interface;
mod key_pair;
mod launch;
mod lookup;
mod metadata;
mod metadata_options;
mod modification;
mod observe;
mod place;
mod region;
mod tag;
mod volume;
mod vpc;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::RngCore;

use crate::api::{ApiError, Params, Struct};
use crate::plan::Plan;
use crate::settings::Settings;
use crate::state::State;

pub use actions::{ACTIONS, Action, Deed, guide_page};
pub use bootstrap::{bootstrap, page_secret};
pub use desired::desired;
pub use instance::{console_answer, console_of, instance_state};
pub use key_pair::{KeyMaterial, generate_key};
pub use observe::{observe, sweep};

/// What a core sees.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub state: &'a State,
    pub settings: &'a Settings,
    pub now_ms: u64,
}

/// What a core brings forth: a plan, from randomness that the shell gave.
pub struct Draft {
    pub plan: Plan,
    pub rng: ChaCha20Rng,
    /// A new key pair: made before the transaction, as it takes long.
    pub key_material: Option<KeyMaterial>,
}

impl Draft {
    pub fn new(rng: ChaCha20Rng) -> Self {
        Self { plan: Plan::default(), rng, key_material: None }
    }

    /// Random bits, for an id.
    pub fn bits(&mut self) -> u128 {
        u128::from(self.rng.next_u64()) << 64 | u128::from(self.rng.next_u64())
    }
}

/// The answer, told from the state that holds the plan's changes.
pub type Answer = Box<dyn FnOnce(&Context<'_>) -> Struct + Send>;

/// The answer of an action that has nothing to say.
pub fn done() -> Answer {
    Box::new(|_| Struct::new().with("return", true))
}

pub type Read = fn(&Context<'_>, &Params) -> Result<Struct, ApiError>;
pub type Write = fn(&Context<'_>, &Params, &mut Draft) -> Result<Answer, ApiError>;
