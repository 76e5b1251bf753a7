//! Found by the crash campaign when the simulated disk learned that a failed
//! durable write uses up the error that was everybody's.
//!
//! A durable write fails with EIO while a sync runs. The kernel tells an error of
//! a file once for each open file: the write got it, so the sync ends well,
//! although what it was to make durable is lost. It must not be believed.

use block_server::volume::{Core, Geometry, Kind, Op, Outcome, Request, Token};

const EIO: i32 = 5;

fn request(ticket: u32, kind: Kind, fua: bool) -> Request {
    let (offset, length) =
        if kind == Kind::Flush { (0, 0) } else { (u64::from(ticket) * 4096, 4096) };
    Request { ticket, kind, offset, length, fua, generation: None }
}

fn start(core: &mut Core, request: Request) -> (Token, Op) {
    core.submit(request);
    core.next_op().expect("it starts at once")
}

#[test]
fn a_sync_is_not_believed_when_a_durable_write_failed_beside_it() {
    let mut core = Core::new(Geometry { size: 1 << 20, alignment: 4096 }, 0, None);
    let (written, _) = start(&mut core, request(1, Kind::Write, false));
    core.complete(written, Outcome::Done(4096));
    assert_eq!(core.next_reply().map(|r| r.result.is_ok()), Some(true));

    let (durable, _) = start(&mut core, request(2, Kind::Write, true));
    let (other, _) = start(&mut core, request(4, Kind::Write, true));
    let (sync, op) = start(&mut core, request(3, Kind::Flush, false));
    assert_eq!(op, Op::Sync);
    core.complete(durable, Outcome::Failed(EIO));
    core.complete(sync, Outcome::Done(0));
    core.complete(other, Outcome::Done(4096));
    let mut told = Vec::new();
    while let Some(reply) = core.next_reply() {
        told.push((reply.ticket, reply.result));
    }
    assert_eq!(told, [(2, Err(EIO)), (3, Err(EIO)), (4, Err(EIO))]);
    assert!(core.failed().is_some());
}
