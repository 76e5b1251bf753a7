//! The bytes of a peer that wait to be parsed.

/// Bytes received and not yet used.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) buffer: Vec<u8>,
    /// What the buffer is to grow to.
    pub(super) capacity: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Input {
    pub(super) fn new(capacity: usize) -> Self {
        Self { buffer: vec![0; capacity], capacity, start: 0, end: 0 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Moves nothing: the kernel may be writing behind `end`.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "more input consumed than received");
    }

    /// Moves what is left to the front. Only here may the buffer move or grow,
    /// since only here the kernel is known not to write to it.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // A thawed one holds what it came with, which may be more.
        if self.buffer.len() != self.capacity && self.end <= self.capacity {
            self.buffer.resize(self.capacity, 0);
            self.buffer.shrink_to(self.capacity);
        }
        &mut self.buffer[self.end..]
    }
}
