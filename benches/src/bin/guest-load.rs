//! The only program of the guest of `block --rows guest`: obeys orders that come by
//! its console, one a line.

use benches::block::guest::inside::{ANSWER, Order, answer};

fn main() -> anyhow::Result<()> {
    println!("{ANSWER}ready");
    for line in std::io::stdin().lines() {
        match Order::parse(&line?).and_then(|order| order.obey()) {
            Ok(done) => println!("{}", answer(&done)),
            Err(error) => println!("{ANSWER}failed: {error:#}"),
        }
    }
    Ok(())
}
