//! The words between a volume's core and those who drive it: requests in,
//! operations out, outcomes in, replies out.

/// The caller's name of a request and of its buffer.
pub type Ticket = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub size: u64,
    /// What offsets, lengths and memory of file operations must be multiples of.
    pub alignment: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    /// `hole`: may be deallocated; `fast`: fail rather than write zeros.
    Zero {
        hole: bool,
        fast: bool,
    },
    Prefetch,
    Extents,
}

impl Kind {
    pub(crate) const fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::Zero { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub ticket: Ticket,
    pub kind: Kind,
    pub offset: u64,
    pub length: u64,
    pub fua: bool,
    /// Of the writer that asks; `None` for readers, who are never fenced.
    pub generation: Option<u64>,
}

/// How a request's buffer must be laid out: `capacity` bytes, aligned, the
/// payload at `payload_at`. What is before and behind serves partial blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub capacity: usize,
    pub payload_at: usize,
}

/// Names one operation until its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Read {
        ticket: Ticket,
        at: usize,
        offset: u64,
        length: usize,
    },
    Write {
        ticket: Ticket,
        at: usize,
        offset: u64,
        length: usize,
        durable: bool,
    },
    /// Within one buffer, done at once; has no completion.
    Copy {
        ticket: Ticket,
        from: usize,
        to: usize,
        length: usize,
    },
    /// Zeros into a buffer, done at once; has no completion.
    Fill {
        ticket: Ticket,
        at: usize,
        length: usize,
    },
    Punch {
        offset: u64,
        length: u64,
    },
    /// Zeros that stay allocated, without writing them.
    Zero {
        offset: u64,
        length: u64,
    },
    /// Zeros from a buffer of the engine's own, at most [`ZEROS_MAX`] at once.
    WriteZeros {
        offset: u64,
        length: u64,
    },
    /// Makes every completed change durable.
    Sync,
    Prefetch {
        offset: u64,
        length: u64,
    },
    Extents {
        offset: u64,
        length: u64,
    },
}

/// Bytes that one [`Op::WriteZeros`] may cover.
pub const ZEROS_MAX: u64 = 256 << 10;

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Bytes moved, where any were.
    Done(usize),
    Extents(Vec<(u64, u32)>),
    /// An errno.
    Failed(i32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub ticket: Ticket,
    /// What was found, for `Extents`; an errno otherwise.
    pub result: Result<Vec<(u64, u32)>, i32>,
}

/// Something that an operator should hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    Refused {
        deed: &'static str,
        offset: u64,
        length: u64,
        errno: i32,
    },
    /// The volume is failed from now on.
    Failed {
        reason: String,
    },
}
