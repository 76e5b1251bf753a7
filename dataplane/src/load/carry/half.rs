//! Half-open flows, of both families: each goes to the place that our seed gives it.

use std::io;

use bytemuck::Pod;
use ebpf::flow;
use ebpf::half::{Address, Bucket, WORDS4, WORDS6};
use ebpf::layout::{Flow, FlowKey, Interface};
use ebpf::{Ip, V6};

use super::{BATCH, Carry, joined};
use crate::load::Error;
use crate::load::maps::Maps;
use crate::load::sweep::now_s;
use crate::load::syscall::Map;

impl Carry<'_> {
    pub(super) fn half_flows(&mut self, maps: &Maps) -> Result<(), Error> {
        let four = self.half_flows_of::<u32, WORDS4>("HALF_FLOWS", &maps.half)?;
        let six = self.half_flows_of::<V6, WORDS6>("HALF_FLOWS6", &maps.half6)?;
        self.carried.half_flows += four + six;
        Ok(())
    }

    /// How many were put into their places.
    fn half_flows_of<A: Ip, const N: usize>(
        &self,
        name: &str,
        to: &Map<u32, Bucket<N>>,
    ) -> Result<u64, Error>
    where
        FlowKey<A>: Words<N>,
        Bucket<N>: Pod,
    {
        let failed = |e| Error::new("carry over", name, e);
        let now_s = now_s().map_err(failed)?;
        let mut carried = 0;
        for source in &self.sources {
            let Some((from, old)) = source.map(name, &self.own, 1)? else { continue };
            if self.own.find(name) != Some(old) {
                continue;
            }
            for slice in from.slices(BATCH) {
                let slice = slice.map_err(failed)?;
                let buckets = slice.iter().map(|(_, b)| bytemuck::pod_read_unaligned(b));
                for place in buckets.flat_map(|b: Bucket<N>| b.places) {
                    let key = FlowKey::<A>::of_words(&place.words);
                    let interface = self.interfaces.get(&key.interface);
                    let alive = |i: &Interface| flow::alive(&place.flow, key.protocol, i, now_s);
                    // What was not tracked is let in anew, or not.
                    let tracked = place.flow.phase != 0 && place.flow.flags & flow::UNTRACKED == 0;
                    if tracked
                        && interface.is_some_and(|i| alive(i))
                        && put(to, &key, self.seed, place.flow).map_err(failed)?
                    {
                        carried += 1;
                    }
                }
            }
        }
        Ok(carried)
    }
}

/// Whether it was put there.
fn put<A: Ip, const N: usize>(
    to: &Map<u32, Bucket<N>>,
    key: &FlowKey<A>,
    seed: u64,
    flow: Flow,
) -> io::Result<bool>
where
    FlowKey<A>: Words<N>,
    Bucket<N>: Pod,
{
    let address = key.address(seed);
    let Some(mut bucket) = to.get(&address.bucket)? else { return Ok(false) };
    let ours = bucket.find(&address.words);
    let both = ours.map_or(flow, |ours| joined(ours, flow));
    if ours == Some(both) {
        return Ok(false);
    }
    bucket.put(&address.words, both);
    to.put(&address.bucket, &bucket)?;
    Ok(ours.is_none())
}

/// A key as it stands in a bucket.
trait Words<const N: usize> {
    fn address(&self, seed: u64) -> Address<N>;
    /// The other way, without the mark.
    fn of_words(words: &[u64; N]) -> Self;
}

impl Words<WORDS4> for FlowKey {
    fn address(&self, seed: u64) -> Address<WORDS4> {
        Address::of(self, seed)
    }

    fn of_words(&[interface, ends, ports]: &[u64; WORDS4]) -> Self {
        key(interface, ((ends >> 32) as u32, ends as u32), ports)
    }
}

impl Words<WORDS6> for FlowKey<V6> {
    fn address(&self, seed: u64) -> Address<WORDS6> {
        Address::of6(self, seed)
    }

    fn of_words(words: &[u64; WORDS6]) -> Self {
        let [interface, local_high, local_low, remote_high, remote_low, ports] = *words;
        let local = V6 { high: local_high, low: local_low };
        let remote = V6 { high: remote_high, low: remote_low };
        key(interface, (local, remote), ports)
    }
}

fn key<A>(interface: u64, (local, remote): (A, A), ports: u64) -> FlowKey<A> {
    FlowKey {
        interface,
        local,
        remote,
        local_port: (ports >> 48) as u16,
        remote_port: (ports >> 32) as u16,
        protocol: (ports >> 24) as u8,
        zero: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_open_flows_key_is_read_from_its_words() {
        let four = FlowKey {
            interface: 0x0102_0304_0506_0708,
            local: 0x0a00_0005,
            remote: 0xc633_6401,
            local_port: 50_000,
            remote_port: 53,
            protocol: flow::UDP,
            zero: [0; 3],
        };
        assert_eq!(FlowKey::of_words(&four.address(99).words), four);
        let six = FlowKey {
            interface: four.interface,
            local: V6 { high: 0x2001_0db8_0001_0000, low: 5 },
            remote: V6 { high: 0x2600 << 48, low: 0xffff_0000_1234_0001 },
            local_port: 443,
            remote_port: 40_001,
            protocol: flow::TCP,
            zero: [0; 3],
        };
        assert_eq!(FlowKey::of_words(&six.address(7).words), six);
    }
}
