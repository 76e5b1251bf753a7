"""A client that shows its certificate whatever the server asks for, and says
`entered` or why it could not: python's TLS is OpenSSL, which is not choosy."""

import socket
import ssl
import struct
import sys

port, authority, certificate, key, newest = sys.argv[1:]
stream = socket.create_connection(("localhost", int(port)), timeout=60)


def receive(count):
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise EOFError("the server hung up")
        data += more
    return data


def option(kind):
    stream.sendall(b"IHAVEOPT" + struct.pack(">II", kind, 0))
    _magic, _option, answer, length = struct.unpack(">QIII", receive(20))
    receive(length)
    return answer


receive(18)
stream.sendall(struct.pack(">I", 3))
assert option(5) == 1
context = ssl.create_default_context(cafile=authority)
if certificate != "none":
    context.load_cert_chain(certificate, key)
if newest == "1.2":
    context.maximum_version = ssl.TLSVersion.TLSv1_2
try:
    stream = context.wrap_socket(stream, server_hostname="localhost")
    # In TLS 1.3 a client learns at its first read whether it was let in.
    answer = option(3)
    assert answer in (1, 2), answer
    print("entered", stream.version())
except (ssl.SSLError, EOFError, ConnectionError) as error:
    print("refused:", error)
