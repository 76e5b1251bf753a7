//! The packet path's proofs: compiled tables against the model, the loaded programs
//! against the same decision on the host, and changes of tables against both.

mod agree;
mod exchange;
mod fast;
mod flows;
mod frames;
mod hostile;
mod permits;
mod random;
mod rates;
mod world;
