//! Zeroes and trims that do not begin and end at whole blocks. A device that wants
//! whole blocks cannot zero a part of one: the whole ones are its, and what is left
//! at the edges is read, zeroed in memory and written back.

/// Zeros within one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edge {
    /// Where its block begins.
    pub block: u64,
    /// Within the block.
    pub at: usize,
    pub length: usize,
}

/// The blocks that `offset`, `length` cover whole: where they begin, and how many
/// bytes they have.
pub(super) fn whole(offset: u64, length: u64, alignment: u64) -> (u64, u64) {
    let mask = alignment - 1;
    let start = (offset + mask) & !mask;
    let end = (offset + length) & !mask;
    (start, end.saturating_sub(start))
}

/// The blocks that they cover in part.
pub(super) fn edges(offset: u64, length: u64, alignment: u64) -> [Option<Edge>; 2] {
    let mask = alignment - 1;
    let end = offset + length;
    let (first, last) = (offset & !mask, end & !mask);
    let edge = |block: u64, from: u64, to: u64| {
        (from < to && to - from < alignment).then_some(Edge {
            block,
            at: (from - block) as usize,
            length: (to - from) as usize,
        })
    };
    let head = edge(first, offset, end.min(first + alignment));
    let tail = if last == first { None } else { edge(last, last, end) };
    [head, tail]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_and_edges_are_all_of_a_range_and_nothing_else() {
        const ALIGNMENT: u64 = 8;
        for offset in 0..24_u64 {
            for length in 1..32_u64 {
                let mut covered = vec![0; 64];
                let (start, count) = whole(offset, length, ALIGNMENT);
                assert!(start.is_multiple_of(ALIGNMENT) && count.is_multiple_of(ALIGNMENT));
                covered[start as usize..(start + count) as usize].fill(1);
                for edge in edges(offset, length, ALIGNMENT).into_iter().flatten() {
                    assert!(edge.length < ALIGNMENT as usize);
                    let from = edge.block as usize + edge.at;
                    covered[from..from + edge.length].iter_mut().for_each(|byte| *byte += 1);
                }
                let wanted: Vec<i32> =
                    (0..64).map(|at| i32::from((offset..offset + length).contains(&at))).collect();
                assert_eq!(covered, wanted, "{offset} {length}");
            }
        }
    }
}
