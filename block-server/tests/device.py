"""A block device behind the default export, and the file that it lies in: what
each command does to it. Fails on the first surprise."""

import os
import sys

import nbd

MIB = 1 << 20
socket, beneath, sector = sys.argv[1], sys.argv[2], int(sys.argv[3])

h = nbd.NBD()
h.connect_unix(socket)
assert h.get_size() == 32 * MIB
data = os.urandom(4 * MIB)


def lies_there(offset, expected):
    h.flush()
    with open(beneath, "rb") as file:
        file.seek(offset)
        assert file.read(len(expected)) == expected, offset


h.pwrite(data, 8 * MIB)
lies_there(8 * MIB, data)
assert h.pread(len(data), 8 * MIB) == data

# Less than a sector of the device, where it has large ones, and across two.
h.pwrite(data[:512], 8 * MIB + 512, nbd.CMD_FLAG_FUA)
h.pwrite(data[:1536], 8 * MIB + sector - 512)
expected = bytearray(data)
expected[512:1024] = data[:512]
expected[sector - 512 : sector + 1024] = data[:1536]
lies_there(8 * MIB, bytes(expected))

# Zeroes: at once, in place, and with edges inside a sector.
h.zero(MIB, 8 * MIB)
expected[:MIB] = bytes(MIB)
h.zero(MIB, 9 * MIB, nbd.CMD_FLAG_NO_HOLE)
expected[MIB : 2 * MIB] = bytes(MIB)
h.zero(64 * 1024 + 1024, 10 * MIB + 512)
expected[2 * MIB + 512 : 2 * MIB + 512 + 65 * 1024] = bytes(65 * 1024)
lies_there(8 * MIB, bytes(expected))
assert h.pread(len(data), 8 * MIB) == bytes(expected)

# A trim gives the room back.
h.flush()
before = os.stat(beneath).st_blocks
h.trim(4 * MIB, 8 * MIB)
h.flush()
assert os.stat(beneath).st_blocks < before, (os.stat(beneath).st_blocks, before)
h.shutdown()
