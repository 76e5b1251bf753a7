//! The packet path's proofs: compiled tables against the model, the loaded programs
//! against the same decision on the host, and changes of tables against both.

mod acls;
mod agree;
mod checksum;
mod cost;
mod exchange;
mod fast;
mod flows;
mod frames;
mod frames6;
mod fuzz;
mod history;
mod hits;
mod hostile;
mod lists;
mod moved;
mod nat;
mod nftables;
mod oracle;
mod permits;
mod random;
mod rates;
mod routes;
mod scapy;
mod small;
mod told;
mod world;
