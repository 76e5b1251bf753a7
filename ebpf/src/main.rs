//! The kernel programs; an empty `main` on the host.
fn main() {}
