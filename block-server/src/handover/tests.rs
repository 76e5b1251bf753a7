//! The last step alone: whether the new one begins or the old one goes on is decided
//! by the kernel, in one place, however late either of them is.

use std::sync::Barrier;

use super::*;

/// So long the old one waits here.
const SHORT: Duration = Duration::from_millis(1);

fn channels() -> [Channel; 2] {
    let (old, new) = UnixStream::pair().expect("a pair of sockets");
    let channels = [Channel::new(old), Channel::new(new)];
    channels[0].wait_at_most(SHORT).expect("a bound");
    channels
}

#[test]
fn one_that_is_told_to_begin_and_does_not_cannot_begin_later() {
    let [mut old, mut new] = channels();
    let given = let_begin(&mut old);
    assert!(matches!(given, Err(Error::Silent { .. })), "{given:?}");
    assert!(matches!(new.receive().expect("it was told").message, Message::Go));
    let said = new.send(&Message::Begun);
    assert_eq!(said.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn what_was_said_in_the_last_moment_is_heard() {
    let [mut old, mut new] = channels();
    new.send(&Message::Begun).expect("it is there");
    old.hear_no_more().expect("a connected socket");
    assert!(matches!(old.receive().expect("it was sent before").message, Message::Begun));
    assert!(new.send(&Message::Begun).is_err());
}

/// Both at the same moment, again and again: never do both serve, and never neither.
#[test]
fn of_two_that_decide_at_the_same_moment_exactly_one_serves() {
    let mut by_new = 0;
    for round in 0..400 {
        let [mut old, mut new] = channels();
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            let begins = scope.spawn(|| {
                start.wait();
                // Around the bound, a little more with each round.
                std::thread::sleep(SHORT * (round % 40) / 4);
                new.send(&Message::Begun).is_ok()
            });
            start.wait();
            let has_given = let_begin(&mut old).is_ok();
            drop(old);
            let has_begun = begins.join().expect("it only sends");
            assert_eq!(has_begun, has_given, "round {round}");
            by_new += u32::from(has_begun);
        });
    }
    eprintln!("{by_new} of 400 began");
}
