//! bpf(2) on maps, in bytes, and membarrier(2). aya's typed maps want their own
//! trait on every key and value, and have no batch operations.
//!
//! Called by `load` alone. The sizes of key and value are the caller's word; the
//! kernel copies exactly as many bytes as the map was made with, so [`Map::open`]
//! compares them first.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytemuck::Pod;

const MAP_CREATE: libc::c_long = 0;
const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_TEST_RUN: libc::c_long = 10;
const PROG_QUERY: libc::c_long = 16;
const LOOKUP_AND_DELETE: libc::c_long = 21;
const LOOKUP_BATCH: libc::c_long = 24;
const LINK_DETACH: libc::c_long = 34;

const MAP_TYPE_ARRAY: u32 = 2;
/// linux/bpf.h: only where there is nothing yet.
const NOEXIST: u64 = 1;

/// linux/membarrier.h: wait for a grace period of all CPUs.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// linux/bpf.h, the anonymous structure of `BPF_MAP_*_ELEM`.
#[repr(C)]
struct Element {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// linux/bpf.h, `batch`.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is the structure of this command, and every pointer in it
    // is to memory of the size that the map was checked to have (`Map::open`).
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>() as u32)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// linux/bpf.h, `query`, as far as the kernel writes it: the revision too, whatever
/// size it is told.
#[repr(C)]
#[derive(Default)]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    zero: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}
const _: () = assert!(size_of::<Query>() == 64);

/// linux/bpf.h, `BPF_TCX_INGRESS`.
const TCX_INGRESS: u32 = 46;

/// Asks how many programs are attached to a device by tcx, and forgets it: whether
/// the kernel understands the question is the answer.
pub fn query_tcx(ifindex: u32) -> io::Result<()> {
    let mut query = Query { target_ifindex: ifindex, attach_type: TCX_INGRESS, ..Query::default() };
    bpf(PROG_QUERY, &mut query).map(drop)
}

/// linux/bpf.h, `test`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program_fd: u32,
    answer: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}
const _: () = assert!(size_of::<TestRun>() == 80);

/// Runs a program once on a frame, and on a context that it may change; what it answers.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8], context: &mut [u8]) -> io::Result<u32> {
    let size = context.len() as u32;
    let mut run = TestRun {
        program_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        context_size_in: size,
        context_size_out: size,
        context_in: context.as_ptr() as u64,
        context_out: context.as_mut_ptr() as u64,
        ..TestRun::default()
    };
    bpf(PROG_TEST_RUN, &mut run)?;
    Ok(run.answer)
}

/// linux/bpf.h, the first part of `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// linux/bpf.h, the first part of `BPF_OBJ_*`.
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Pins a text, as an array of one.
pub fn pin_text(path: &Path, text: &str) -> io::Result<()> {
    let mut create = Create {
        map_type: MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: text.len() as u32,
        max_entries: 1,
    };
    let fd = bpf(MAP_CREATE, &mut create)?;
    // SAFETY: the kernel made the descriptor a moment ago, for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let (map_fd, zero_key) = (fd.as_raw_fd() as u32, 0_u32);
    let (key, value) = (&raw const zero_key as u64, text.as_ptr() as u64);
    bpf(UPDATE, &mut Element { map_fd, zero: 0, key, value, flags: 0 })?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(OBJ_PIN, &mut Pin { path: path.as_ptr() as u64, fd: map_fd, flags: 0 }).map(drop)
}

/// Takes the program of a pinned link off its device, before this returns. Removing
/// the pin does it too, but only after a grace period.
pub fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &mut Pin { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the kernel made the descriptor a moment ago, for us alone.
    let link = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    bpf(LINK_DETACH, &mut (link.as_raw_fd() as u32)).map(drop)
}

/// A map whose keys and values are only bytes: one of another layout.
#[derive(Debug)]
pub struct Bytes {
    fd: OwnedFd,
    pub key_len: usize,
    pub value_len: usize,
    /// Of a value of all CPUs together, where each has its own.
    value_space: usize,
}

impl Bytes {
    /// `cpus`: how many values an entry has, 1 but in maps that have one a CPU.
    pub fn open(fd: impl AsFd, cpus: usize) -> io::Result<Self> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        let Sizes { key: key_len, value: value_len, .. } = sizes(&fd)?;
        let value_space = if cpus == 1 { value_len } else { value_len.next_multiple_of(8) * cpus };
        Ok(Self { fd, key_len, value_len, value_space })
    }

    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(key.len(), self.key_len, "a key is as long as the map's keys");
        let mut value = vec![0; self.value_space];
        let (map_fd, key) = (self.fd.as_raw_fd() as u32, key.as_ptr() as u64);
        let mut element =
            Element { map_fd, zero: 0, key, value: value.as_mut_ptr() as u64, flags: 0 };
        match bpf(LOOKUP, &mut element) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn slice(&self, cursor: Option<u32>, len: usize) -> io::Result<Slice<Vec<u8>, Vec<u8>>> {
        let mut keys = vec![0; len * self.key_len];
        let mut values = vec![0; len * self.value_space];
        let (read, cursor) =
            batch(&self.fd, cursor, len, keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64)?;
        let keys = keys.chunks(self.key_len).map(<[u8]>::to_vec);
        let values = values.chunks(self.value_space).map(<[u8]>::to_vec);
        Ok(Slice { entries: keys.zip(values).take(read).collect(), cursor })
    }

    /// As [`Map::slices`].
    pub fn slices(
        &self,
        len: usize,
    ) -> impl Iterator<Item = io::Result<Vec<(Vec<u8>, Vec<u8>)>>> + '_ {
        walk(move |cursor| self.slice(cursor, len))
    }
}

/// A map's measures, as the kernel has them.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Bytes.
    pub key: usize,
    pub value: usize,
    pub entries: usize,
}

pub fn sizes(fd: impl AsFd) -> io::Result<Sizes> {
    let fd = fd.as_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().parse::<usize>().ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("no {name} in {info}"))
            })
    };
    Ok(Sizes {
        key: field("key_size:")?,
        value: field("value_size:")?,
        entries: field("max_entries:")?,
    })
}

/// How many entries were read to `keys` and `values`, and the next cursor.
fn batch(
    fd: &OwnedFd,
    cursor: Option<u32>,
    len: usize,
    keys: u64,
    values: u64,
) -> io::Result<(usize, Option<u32>)> {
    let mut next = 0_u32;
    let mut batch = Batch {
        in_batch: cursor.as_ref().map_or(0, |c| &raw const *c as u64),
        out_batch: &raw mut next as u64,
        keys,
        values,
        count: len as u32,
        map_fd: fd.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    let cursor = match bpf(LOOKUP_BATCH, &mut batch) {
        Ok(_) => Some(next),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => return Err(error),
    };
    Ok((batch.count as usize, cursor))
}

/// A map of keys `K` and values `V`.
#[derive(Debug)]
pub struct Map<K, V> {
    fd: OwnedFd,
    of: std::marker::PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Fails where the kernel's map has other sizes.
    pub fn open(fd: impl AsFd) -> io::Result<Self> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        let found = sizes(&fd)?;
        if (found.key, found.value) != (size_of::<K>(), size_of::<V>()) {
            let text = format!("{found:?}, not {} and {}", size_of::<K>(), size_of::<V>());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { fd, of: std::marker::PhantomData })
    }

    fn element(&self, key: *const K, value: u64) -> Element {
        let map_fd = self.fd.as_raw_fd() as u32;
        Element { map_fd, zero: 0, key: key as u64, value, flags: 0 }
    }

    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let mut element = self.element(key, &raw mut value as u64);
        match bpf(LOOKUP, &mut element) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn put(&self, key: &K, value: &V) -> io::Result<()> {
        bpf(UPDATE, &mut self.element(key, &raw const *value as u64)).map(drop)
    }

    /// Puts it where there is nothing yet, and says whether there was not.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<bool> {
        let element = self.element(key, &raw const *value as u64);
        match bpf(UPDATE, &mut Element { flags: NOEXIST, ..element }) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether there was anything.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        match bpf(DELETE, &mut self.element(key, 0)) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes an entry out of a hash map: its value, as it was when it left.
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        match bpf(LOOKUP_AND_DELETE, &mut self.element(key, &raw mut value as u64)) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut last: Option<K> = None;
        loop {
            let mut next = K::zeroed();
            let from = last.as_ref().map_or(std::ptr::null(), |key| &raw const *key);
            match bpf(NEXT_KEY, &mut self.element(from, &raw mut next as u64)) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(entries),
                Err(error) => return Err(error),
            }
            if let Some(value) = self.get(&next)? {
                entries.push((next, value));
            }
            last = Some(next);
        }
    }

    /// Some entries of a hash map, from where `cursor` stands; `None` as the new
    /// cursor says that the end is reached. Entries that are added or removed
    /// meanwhile may be seen or not.
    pub fn slice(&self, cursor: Option<u32>, len: usize) -> io::Result<Slice<K, V>> {
        let mut keys = vec![K::zeroed(); len];
        let mut values = vec![V::zeroed(); len];
        let (read, cursor) =
            batch(&self.fd, cursor, len, keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64)?;
        keys.truncate(read);
        values.truncate(read);
        Ok(Slice { entries: keys.into_iter().zip(values).collect(), cursor })
    }

    /// All of it, `len` entries at once.
    pub fn slices(&self, len: usize) -> impl Iterator<Item = io::Result<Vec<(K, V)>>> + '_ {
        walk(move |cursor| self.slice(cursor, len))
    }
}

pub struct Slice<K, V> {
    pub entries: Vec<(K, V)>,
    pub cursor: Option<u32>,
}

/// All of a map by its slices, up to its end or the first that fails.
fn walk<K, V>(
    mut slice: impl FnMut(Option<u32>) -> io::Result<Slice<K, V>>,
) -> impl Iterator<Item = io::Result<Vec<(K, V)>>> {
    let mut next = Some(None);
    std::iter::from_fn(move || {
        let slice = slice(next?);
        next = slice.as_ref().ok().and_then(|slice| slice.cursor).map(Some);
        Some(slice.map(|slice| slice.entries))
    })
}

impl<V: Pod> Map<u32, V> {
    /// A per-CPU array's values. Each takes whole words (linux/bpf.h).
    pub fn every_cpu(&self, index: u32, cpus: usize) -> io::Result<Vec<V>> {
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        let mut values = vec![V::zeroed(); cpus];
        bpf(LOOKUP, &mut self.element(&index, values.as_mut_ptr() as u64))?;
        Ok(values)
    }
}

impl Map<u32, u64> {
    /// A per-CPU array's value, added up.
    pub fn sum(&self, index: u32, cpus: usize) -> io::Result<u64> {
        let mut values = vec![0_u64; cpus];
        bpf(LOOKUP, &mut self.element(&index, values.as_mut_ptr() as u64))?;
        Ok(values.iter().sum())
    }

    /// Adds to a per-CPU array's values, those of one CPU after the other.
    pub fn add(&self, index: u32, more: &[u64]) -> io::Result<()> {
        let mut values = self.every_cpu(index, more.len())?;
        values.iter_mut().zip(more).for_each(|(value, more)| *value += more);
        bpf(UPDATE, &mut self.element(&index, values.as_ptr() as u64)).map(drop)
    }

    /// Sets a per-CPU array's value to 0 on every CPU.
    pub fn clear(&self, index: u32, cpus: usize) -> io::Result<()> {
        let values = vec![0_u64; cpus];
        bpf(UPDATE, &mut self.element(&index, values.as_ptr() as u64)).map(drop)
    }
}

/// Returns when every program that runs now has ended.
pub fn await_readers() -> io::Result<()> {
    // SAFETY: the call takes no pointer.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
