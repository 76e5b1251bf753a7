//! Fixed newstyle to an export, with simple replies: blocking, once a
//! connection.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, ensure};

const MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// FIXED_NEWSTYLE and NO_ZEROES.
const CLIENT_FLAGS: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// No option reply that we ask for is longer.
const REPLY_MAX: u32 = 4096;

/// Brings a new connection to transmission; the export's size.
pub fn begin(socket: &mut File, export: &str) -> anyhow::Result<u64> {
    ensure!(u64_of(socket)? == MAGIC, "this is no NBD server");
    ensure!(u64_of(socket)? == OPTION_MAGIC, "the server speaks oldstyle");
    let mut flags = [0; 2];
    socket.read_exact(&mut flags)?;
    // GO, with one information asked for:
    // who does not ask for the block size must not send what is smaller than 512.
    let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    let length = export.len() as u32;
    hello.extend((8 + length).to_be_bytes());
    hello.extend(length.to_be_bytes());
    hello.extend(export.as_bytes());
    hello.extend(1_u16.to_be_bytes());
    hello.extend(INFO_BLOCK_SIZE.to_be_bytes());
    socket.write_all(&hello)?;
    let mut size = None;
    loop {
        ensure!(u64_of(socket)? == OPTION_REPLY_MAGIC, "the answer to GO is none");
        ensure!(u32_of(socket)? == OPTION_GO, "an answer to what was not asked");
        let (kind, length) = (u32_of(socket)?, u32_of(socket)?);
        ensure!(length <= REPLY_MAX, "an answer of {length} bytes to GO");
        let mut data = vec![0; length as usize];
        socket.read_exact(&mut data)?;
        match (kind, &data[..]) {
            (REPLY_ACK, _) => return size.context("the server tells no size"),
            (REPLY_INFO, [a, b, s @ ..]) if u16::from_be_bytes([*a, *b]) == INFO_EXPORT => {
                size = s.first_chunk().map(|s| u64::from_be_bytes(*s));
            }
            (REPLY_INFO, _) => {}
            _ => anyhow::bail!("the server refuses export {export:?}: reply {kind:#x}"),
        }
    }
}

fn u64_of(socket: &mut File) -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn u32_of(socket: &mut File) -> anyhow::Result<u32> {
    let mut bytes = [0; 4];
    socket.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}
