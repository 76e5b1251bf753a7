//! Every fault that was found once, in a file of its own.

#[path = "regressions/sync_beside_failed_write.rs"]
mod sync_beside_failed_write;
