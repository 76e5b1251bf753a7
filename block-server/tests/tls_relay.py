"""Writes by libnbd through TLS, comes again when the connection ends, and keeps
account of what was acknowledged. Ends, and looks at all of it, when its input does.

Each line that it prints is the count of writes and of connections so far."""

import select
import sys
import time

import nbd

uri = sys.argv[1]
BLOCK = 4096
BLOCKS = 256
PATIENCE = 60


def connect():
    until = time.monotonic() + PATIENCE
    while True:
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        try:
            h.connect_uri(uri)
            assert h.get_tls_negotiated()
            return h
        except nbd.Error:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def call(deed):
    """Does it, by another connection where this one has ended; never by one that lives."""
    global handle, connections
    while True:
        try:
            return deed(handle)
        except nbd.Error as error:
            alive = handle.aio_is_ready() or handle.aio_is_processing()
            assert not alive, f"the server answered an error: {error}"
            handle = connect()
            connections += 1


handle = connect()
connections = 1
acknowledged = [0] * BLOCKS
count = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    count += 1
    at = count * 37 % BLOCKS
    data = (at.to_bytes(8, "little") + count.to_bytes(8, "little")) * (BLOCK // 16)
    call(lambda h: h.pwrite(data, at * BLOCK, nbd.CMD_FLAG_FUA if count % 7 == 0 else 0))
    acknowledged[at] = count
    if count % 16 == 0:
        print(count, connections, flush=True)
for at, version in enumerate(acknowledged):
    found = call(lambda h: h.pread(BLOCK, at * BLOCK))
    wanted = (at.to_bytes(8, "little") + version.to_bytes(8, "little")) * (BLOCK // 16)
    assert found == (wanted if version else bytes(BLOCK)), f"block {at}"
print("all there", connections, flush=True)
