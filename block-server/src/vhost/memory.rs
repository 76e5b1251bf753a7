//! The peer's memory, mapped: every access is checked against what it gave us.
//!
//! The guest writes there whenever it likes, so nothing here hands out a
//! reference: bytes are copied in or out, once. A file that its owner could
//! shrink would kill us by SIGBUS at the next access; only a memfd that is sealed
//! against shrinking is taken (QEMU's memory-backend-memfd seals by itself).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::SealFlags;

/// Regions that one guest may have: a q35 machine has three or four, and each
/// memory device that is plugged in adds one.
pub const REGIONS_MAX: usize = 64;

/// An address that lies in no region of the peer's, or a place in it that is not
/// aligned as the format asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at {at:#x} are outside the guest's memory")]
pub struct Fault {
    pub at: u64,
    pub length: u64,
}

/// What rings are read from and written to.
pub trait Memory {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Fault>;
    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault>;
    /// A little-endian number; what was written before it is seen after it.
    fn load(&self, at: u64) -> Result<u16, Fault>;
    /// What was written before is seen by whoever sees this.
    fn store(&self, at: u64, value: u16) -> Result<(), Fault>;
    fn covers(&self, at: u64, length: u64) -> bool;
}

#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error(
        "the memory is no memfd sealed against shrinking, which could kill this server: \
         give the guest memory-backend-memfd,share=on"
    )]
    Unsealed,
    #[error("the memory file holds {found} bytes, and {wanted} were announced")]
    Short { found: u64, wanted: u64 },
    #[error("the region is empty, unaligned or overflows")]
    Shape,
    #[error("map: {0}")]
    Map(io::Error),
}

/// A shared mapping of a part of a sealed file.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    length: usize,
}

impl Mapping {
    pub fn new(file: &OwnedFd, offset: u64, length: u64) -> Result<Self, Unusable> {
        let end = offset.checked_add(length).ok_or(Unusable::Shape)?;
        let bytes = usize::try_from(length).map_err(|_| Unusable::Shape)?;
        if length == 0 || !offset.is_multiple_of(4096) || end > i64::MAX as u64 {
            return Err(Unusable::Shape);
        }
        let seals = rustix::fs::fcntl_get_seals(file.as_fd()).map_err(|_| Unusable::Unsealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(Unusable::Unsealed);
        }
        let found = rustix::fs::fstat(file).map_err(|e| Unusable::Map(e.into()))?.st_size as u64;
        if found < end {
            return Err(Unusable::Short { found, wanted: end });
        }
        Self::map(file, offset, bytes).map_err(Unusable::Map)
    }

    fn map(file: &OwnedFd, offset: u64, length: usize) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe { mmap(anywhere, length, protection, MapFlags::SHARED, file, offset)? };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, length })
    }

    /// The address of `length` bytes at `at`, if they are within.
    pub fn place(&self, at: u64, length: u64) -> Option<*mut u8> {
        let end = at.checked_add(length)?;
        // SAFETY: `at` was just found to lie within the mapping.
        (end <= self.length as u64).then(|| unsafe { self.base.as_ptr().add(at as usize) })
    }

    fn cell(&self, at: u64) -> Option<&AtomicU16> {
        let place = self.place(at, 2).filter(|place| (*place as usize).is_multiple_of(2))?;
        // SAFETY: two aligned bytes of the mapping, which stays while `self`
        // does; others change them, and an atomic bears that.
        Some(unsafe { AtomicU16::from_ptr(place.cast()) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it came from `map` with this length, and its only owner gives it up.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
        assert!(unmapped.is_ok(), "a mapping of ours can be taken down");
    }
}

/// Addresses are offsets from the mapping's start.
impl Memory for Mapping {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        let fault = Fault { at, length: into.len() as u64 };
        let place = self.place(at, into.len() as u64).ok_or(fault)?;
        // SAFETY: the place holds as many bytes. They may change while they are
        // copied: then the copy is any mix, which every reader must bear.
        unsafe { std::ptr::copy_nonoverlapping(place, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let fault = Fault { at, length: from.len() as u64 };
        let place = self.place(at, from.len() as u64).ok_or(fault)?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len()) };
        Ok(())
    }

    fn load(&self, at: u64) -> Result<u16, Fault> {
        let cell = self.cell(at).ok_or(Fault { at, length: 2 })?;
        Ok(u16::from_le(cell.load(Ordering::Acquire)))
    }

    fn store(&self, at: u64, value: u16) -> Result<(), Fault> {
        let cell = self.cell(at).ok_or(Fault { at, length: 2 })?;
        cell.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    fn covers(&self, at: u64, length: u64) -> bool {
        self.place(at, length).is_some()
    }
}

/// Where a region lies for the guest and for the peer that speaks of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub guest: u64,
    pub user: u64,
    pub length: u64,
    /// Where in its file it begins.
    pub offset: u64,
}

#[derive(Debug)]
pub struct Region {
    pub span: Span,
    mapping: Mapping,
}

impl Region {
    pub fn new(span: Span, file: &OwnedFd) -> Result<Self, Unusable> {
        let overflows = |start: u64| start.checked_add(span.length).is_none();
        if overflows(span.guest) || overflows(span.user) {
            return Err(Unusable::Shape);
        }
        Ok(Self { span, mapping: Mapping::new(file, span.offset, span.length)? })
    }

    /// How far in `at` is, if it is.
    fn within(&self, at: u64) -> Option<u64> {
        at.checked_sub(self.span.guest).filter(|inner| *inner < self.span.length)
    }
}

/// The memory of one guest at one time; a change makes another.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    regions: Vec<Rc<Region>>,
}

impl GuestMemory {
    /// Refused where two regions overlap in the guest.
    pub fn new(regions: Vec<Rc<Region>>) -> Option<Self> {
        let clash =
            |a: &Span, b: &Span| a.guest < b.guest + b.length && b.guest < a.guest + a.length;
        let overlaps = regions
            .iter()
            .enumerate()
            .any(|(i, a)| regions[..i].iter().any(|b| clash(&a.span, &b.span)));
        (!overlaps && regions.len() <= REGIONS_MAX).then_some(Self { regions })
    }

    pub fn with(&self, region: Region) -> Option<Self> {
        let mut regions = self.regions.clone();
        regions.push(Rc::new(region));
        Self::new(regions)
    }

    pub fn without(&self, span: Span) -> Option<Self> {
        let same = |r: &Rc<Region>| (r.span.guest, r.span.length) == (span.guest, span.length);
        let regions: Vec<_> = self.regions.iter().filter(|r| !same(r)).cloned().collect();
        (regions.len() < self.regions.len()).then_some(Self { regions })
    }

    /// The guest's address of what the peer knows by an address of its own.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let inner = user.checked_sub(r.span.user)?;
            (inner < r.span.length).then(|| r.span.guest + inner)
        })
    }

    fn find(&self, at: u64, length: u64) -> Result<(&Region, u64), Fault> {
        self.regions.iter().find_map(|r| Some((&**r, r.within(at)?))).ok_or(Fault { at, length })
    }

    /// Appends where these bytes are mapped: one piece for each region that they
    /// touch.
    pub fn pieces(
        &self,
        mut at: u64,
        mut length: u64,
        into: &mut Vec<libc::iovec>,
    ) -> Result<(), Fault> {
        while length > 0 {
            let (region, inner) = self.find(at, length)?;
            let here = length.min(region.span.length - inner);
            let place = region.mapping.place(inner, here).ok_or(Fault { at, length })?;
            into.push(libc::iovec { iov_base: place.cast(), iov_len: here as usize });
            length -= here;
            at = at.checked_add(here).ok_or(Fault { at, length })?;
        }
        Ok(())
    }
}

impl Memory for GuestMemory {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < into.len() {
            let place = at.checked_add(done as u64).ok_or(Fault { at, length: 1 })?;
            let (region, inner) = self.find(place, (into.len() - done) as u64)?;
            let here = (into.len() - done).min((region.span.length - inner) as usize);
            region.mapping.read(inner, &mut into[done..done + here])?;
            done += here;
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < from.len() {
            let place = at.checked_add(done as u64).ok_or(Fault { at, length: 1 })?;
            let (region, inner) = self.find(place, (from.len() - done) as u64)?;
            let here = (from.len() - done).min((region.span.length - inner) as usize);
            region.mapping.write(inner, &from[done..done + here])?;
            done += here;
        }
        Ok(())
    }

    fn load(&self, at: u64) -> Result<u16, Fault> {
        let (region, inner) = self.find(at, 2)?;
        region.mapping.load(inner).map_err(|_| Fault { at, length: 2 })
    }

    fn store(&self, at: u64, value: u16) -> Result<(), Fault> {
        let (region, inner) = self.find(at, 2)?;
        region.mapping.store(inner, value).map_err(|_| Fault { at, length: 2 })
    }

    fn covers(&self, mut at: u64, mut length: u64) -> bool {
        while length > 0 {
            let Ok((region, inner)) = self.find(at, length) else { return false };
            let here = length.min(region.span.length - inner);
            length -= here;
            let Some(next) = at.checked_add(here) else { return length == 0 };
            at = next;
        }
        true
    }
}

/// A file in memory of `length` zeros that nobody can shrink or grow.
pub fn sealed_file(name: &str, length: u64) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, length)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Whether the kernel calls this descriptor an event counter: anything else
/// could block us or keep us busy where a bell was asked for.
pub fn is_eventfd(fd: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|name| name.as_os_str() == "anon_inode:[eventfd]")
}
