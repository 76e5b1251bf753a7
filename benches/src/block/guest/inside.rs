//! The guest's side: an order comes in as a line, is carried out by Linux AIO past the
//! guest's page cache, and what came of it goes out as a line. Run by
//! `src/bin/guest-load.rs`, the guest's only program.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;

use crate::block::file::xorshift;
use crate::block::load::{Deed, Done, Load};

/// Begins each answer; all else on a console is somebody else's.
pub const ANSWER: &str = "load: ";

/// Latencies above this count as this.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// O_DIRECT into memory asks for no more.
const ALIGNED_TO: usize = 4096;

/// What is done with the disk in a PCI slot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Order {
    pub slot: u8,
    pub load: Load,
    pub duration: Duration,
}

impl Order {
    pub fn text(&self) -> String {
        let Load { deed, block_bytes, depth, .. } = self.load;
        let deed = match deed {
            Deed::Read => "read",
            Deed::Write => "write",
        };
        format!("{:02x} {deed} {block_bytes} {depth} {}", self.slot, self.duration.as_millis())
    }

    pub fn parse(line: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [slot, deed, block_bytes, depth, ms] = words[..] else {
            anyhow::bail!("`{line}` is no order");
        };
        let deed = match deed {
            "read" => Deed::Read,
            "write" => Deed::Write,
            other => anyhow::bail!("`{other}` is neither read nor write"),
        };
        let (block_bytes, depth) = (block_bytes.parse()?, depth.parse()?);
        Ok(Self {
            slot: u8::from_str_radix(slot, 16)?,
            load: Load { deed, block_bytes, depth, connections: 1 },
            duration: Duration::from_millis(ms.parse()?),
        })
    }

    /// The device, whatever the kernel has named it.
    fn device(&self) -> anyhow::Result<PathBuf> {
        let slot = PathBuf::from(format!("/sys/bus/pci/devices/0000:00:{:02x}.0", self.slot));
        let named = |folder: PathBuf, start: &str| {
            let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string());
            let mut names = entries?.flatten().map(|entry| entry.file_name());
            let found = names.find(|name| name.to_string_lossy().starts_with(start));
            found.with_context(|| format!("{}: no {start}", folder.display()))
        };
        let virtio = slot.join(named(slot.clone(), "virtio")?);
        Ok(PathBuf::from("/dev").join(named(virtio.join("block"), "vd")?))
    }

    pub fn obey(&self) -> anyhow::Result<Done> {
        let path = self.device()?;
        let file = File::options()
            .read(true)
            .write(self.load.deed == Deed::Write)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        Run::new(&file, self.load)?.drive(self.duration)
    }
}

pub fn answer(done: &Done) -> String {
    let Done { operations, iops, p50_us, p99_us } = done;
    format!("{ANSWER}done {operations} {iops} {p50_us} {p99_us}")
}

/// Reads a line of the guest's; `None` where it is not an answer.
pub fn parse_answer(line: &str) -> Option<anyhow::Result<Done>> {
    let answer = line.trim().strip_prefix(ANSWER)?;
    let words: Vec<&str> = answer.split_whitespace().collect();
    let ["done", operations, iops, p50_us, p99_us] = words[..] else {
        return (answer != "ready").then(|| Err(anyhow::anyhow!("guest: {answer}")));
    };
    let parse = || -> anyhow::Result<Done> {
        Ok(Done {
            operations: operations.parse()?,
            iops: iops.parse()?,
            p50_us: p50_us.parse()?,
            p99_us: p99_us.parse()?,
        })
    };
    Some(parse())
}

/// Of linux/aio_abi.h.
const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

struct Run {
    context: libc::c_ulong,
    /// One for each request in flight; they point into `memory`.
    requests: Vec<libc::iocb>,
    began: Vec<Instant>,
    /// Held for the kernel.
    _memory: Vec<u8>,
    blocks: u64,
    load: Load,
    random: u64,
}

impl Run {
    fn new(file: &File, load: Load) -> anyhow::Result<Self> {
        let bytes = io::Seek::seek(&mut &*file, io::SeekFrom::End(0))?;
        let (block, depth) = (load.block_bytes as usize, load.depth as usize);
        let mut memory = vec![0x5a; block * depth + ALIGNED_TO];
        let first = memory.as_mut_ptr() as usize;
        let first = first.next_multiple_of(ALIGNED_TO);
        let opcode = match load.deed {
            Deed::Read => IOCB_CMD_PREAD,
            Deed::Write => IOCB_CMD_PWRITE,
        };
        let request = |slot: usize| {
            // SAFETY: a plain structure of integers, of which zeros are a lawful value.
            let mut request: libc::iocb = unsafe { std::mem::zeroed() };
            request.aio_data = slot as u64;
            request.aio_lio_opcode = opcode;
            request.aio_fildes = file.as_raw_fd() as u32;
            request.aio_buf = (first + slot * block) as u64;
            request.aio_nbytes = block as u64;
            request
        };
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word, which lives as long as the call.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, load.depth, &raw mut context) };
        ensure!(made == 0, "io_setup: {}", io::Error::last_os_error());
        Ok(Self {
            context,
            requests: (0..depth).map(request).collect(),
            began: vec![now(); depth],
            _memory: memory,
            blocks: (bytes / block as u64).max(1),
            load,
            random: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// Starts these requests, each at a place of its own.
    fn submit(&mut self, slots: &[usize]) -> anyhow::Result<()> {
        let begin = now();
        let mut list: Vec<*mut libc::iocb> = Vec::with_capacity(slots.len());
        for &slot in slots {
            self.random = xorshift(self.random);
            let block = self.random % self.blocks;
            self.requests[slot].aio_offset = (block * u64::from(self.load.block_bytes)) as i64;
            self.began[slot] = begin;
            list.push(&raw mut self.requests[slot]);
        }
        let mut rest = &list[..];
        while !rest.is_empty() {
            // SAFETY: each points to a request of ours, whose buffer and file outlive it:
            // `drive` ends only when nothing is in flight, and `drop` awaits what is.
            let taken = unsafe {
                libc::syscall(libc::SYS_io_submit, self.context, rest.len(), rest.as_ptr())
            };
            ensure!(taken > 0, "io_submit: {}", io::Error::last_os_error());
            rest = &rest[taken as usize..];
        }
        Ok(())
    }

    fn reap(&self, events: &mut [Event]) -> anyhow::Result<usize> {
        let none: *mut libc::timespec = std::ptr::null_mut();
        // SAFETY: the kernel writes so many events at most into the slice.
        let count = unsafe {
            let room = events.len();
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1_usize,
                room,
                events.as_mut_ptr(),
                none,
            )
        };
        ensure!(count > 0, "io_getevents: {}", io::Error::last_os_error());
        Ok(count as usize)
    }

    fn drive(mut self, duration: Duration) -> anyhow::Result<Done> {
        let mut latencies = Histogram::<u64>::new_with_bounds(1, LATENCY_NS_MAX, 3)?;
        let depth = self.requests.len();
        let mut events = vec![Event::default(); depth];
        let begin = now();
        self.submit(&(0..depth).collect::<Vec<_>>())?;
        let mut in_flight = depth;
        while in_flight > 0 {
            let count = self.reap(&mut events)?;
            let time = now();
            in_flight -= count;
            for event in &events[..count] {
                let result = event.result;
                ensure!(result == i64::from(self.load.block_bytes), "an operation gave {result}");
                let ns = (time - self.began[event.data as usize]).as_nanos() as u64;
                latencies.saturating_record(ns);
            }
            if time - begin < duration {
                let again: Vec<usize> = events[..count].iter().map(|e| e.data as usize).collect();
                self.submit(&again)?;
                in_flight += count;
            }
        }
        let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1000.0;
        Ok(Done {
            operations: latencies.len(),
            iops: latencies.len() as f64 / begin.elapsed().as_secs_f64(),
            p50_us: us(0.50),
            p99_us: us(0.99),
        })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the call waits for what is in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_and_its_answer_come_over_as_lines() {
        let load = Load { deed: Deed::Write, block_bytes: 4096, depth: 32, connections: 1 };
        let order = Order { slot: 0x1a, load, duration: Duration::from_millis(700) };
        assert_eq!(order.text(), "1a write 4096 32 700");
        assert_eq!(Order::parse(&order.text()).unwrap(), order);
        for wrong in ["", "1a erase 4096 32 700", "1a read 4096 32", "zz read 1 1 1"] {
            assert!(Order::parse(wrong).is_err(), "{wrong}");
        }
        let done = Done { operations: 7, iops: 3.5, p50_us: 1.0, p99_us: 2.25 };
        assert_eq!(parse_answer(&format!("{}\r\n", answer(&done))).unwrap().unwrap(), done);
        assert!(parse_answer("load: failed /dev/vda").unwrap().is_err());
        assert!(parse_answer("load: ready").is_none());
        assert!(parse_answer("1a write 4096 32 700").is_none());
    }

    /// The same calls on a file, which AIO reads past the page cache as it does a disk.
    #[test]
    fn a_file_is_read_and_written_so_many_at_a_time() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        for (deed, depth) in [(Deed::Read, 8), (Deed::Write, 1)] {
            let load = Load { deed, block_bytes: 4096, depth, connections: 1 };
            let mut options = File::options();
            let file = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
            let done = Run::new(&file.unwrap(), load).unwrap().drive(Duration::from_millis(20));
            assert!(done.unwrap().operations >= u64::from(depth));
        }
        assert!(std::fs::read(&path).unwrap().contains(&0x5a));
    }
}
