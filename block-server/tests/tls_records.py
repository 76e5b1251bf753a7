"""Reads 64 blocks of 4 KiB through TLS and prints the suite, and how many records of
TLS the answers came in: python's ssl over memory, so that records can be counted."""

import socket
import ssl
import struct
import sys

port, authority, certificate, key = sys.argv[1:]
stream = socket.create_connection(("localhost", int(port)), timeout=60)
READS, BLOCK = 64, 4096


def receive_plain(count):
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        assert more, "the server hung up"
        data += more
    return data


receive_plain(18)
stream.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 5, 0))
assert struct.unpack(">QIII", receive_plain(20))[2] == 1
context = ssl.create_default_context(cafile=authority)
context.load_cert_chain(certificate, key)
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
sealed, records = b"", 0


def move():
    """One turn of the wire; counts the records that came."""
    global sealed, records
    if outgoing.pending:
        stream.sendall(outgoing.read())
    more = stream.recv(1 << 20)
    assert more, "the server hung up"
    incoming.write(more)
    sealed += more
    while len(sealed) >= 5:
        length = 5 + struct.unpack(">H", sealed[3:5])[0]
        if len(sealed) < length:
            break
        sealed, records = sealed[length:], records + 1


def patiently(act, *arguments):
    while True:
        try:
            return act(*arguments)
        except ssl.SSLWantReadError:
            move()


def receive(count):
    data = b""
    while len(data) < count:
        data += patiently(tls.read, count - len(data))
    return data


patiently(tls.do_handshake)
name = b"all"
tls.write(b"IHAVEOPT" + struct.pack(">III", 7, 6 + len(name), len(name)) + name + bytes(2))
kind = 0
while kind != 1:
    _magic, _option, kind, length = struct.unpack(">QIII", receive(20))
    receive(length)
records = 0
for n in range(READS):
    tls.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, n, n * BLOCK, BLOCK))
for _ in range(READS):
    magic, error, _handle = struct.unpack(">IIQ", receive(16))
    assert (magic, error) == (0x67446698, 0), (hex(magic), error)
    receive(BLOCK)
print(tls.cipher()[0], records)
