//! A mix of operations drawn from the seed.

use crate::Random;

/// How often each of several kinds of operation comes, in one history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swarm {
    weights: Vec<u64>,
}

impl Swarm {
    /// Some kinds are left out of a history altogether, some rule it. At least
    /// one is always there.
    pub fn draw(kinds: usize, random: &mut Random) -> Self {
        assert!(kinds > 0, "a history needs something to do");
        let mut weights: Vec<u64> =
            (0..kinds).map(|_| if random.chance(30) { 0 } else { 1 << random.below(5) }).collect();
        if weights.iter().all(|w| *w == 0) {
            weights[random.below(kinds as u64) as usize] = 1;
        }
        Self { weights }
    }

    /// One kind, as often as its weight says.
    pub fn pick(&self, random: &mut Random) -> usize {
        let mut left = random.below(self.weights.iter().sum());
        for (kind, weight) in self.weights.iter().enumerate() {
            if left < *weight {
                return kind;
            }
            left -= weight;
        }
        unreachable!("the draw is below the sum of the weights")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_differ_in_what_they_leave_out() {
        let mut random = Random::new(1);
        let swarms: Vec<Swarm> = (0..100).map(|_| Swarm::draw(4, &mut random)).collect();
        for kind in 0..4 {
            assert!(swarms.iter().any(|s| s.weights[kind] == 0));
            assert!(swarms.iter().any(|s| s.weights[kind] > 0));
        }
        for swarm in &swarms {
            assert!(swarm.weights[swarm.pick(&mut random)] > 0);
        }
    }
}
