"""Every command and flag that libnbd knows, against a server with a 16 MiB
default export and the same file as export `ro`. Fails on the first surprise."""

import errno
import sys

import nbd

MIB = 1 << 20


def connect(path, name="", structured=True, strict=True):
    handle = nbd.NBD()
    handle.set_export_name(name)
    handle.set_request_structured_replies(structured)
    if structured:
        handle.add_meta_context("base:allocation")
        handle.add_meta_context("qemu:allocation-depth")
    if not strict:
        # Lets malformed requests through, to see the server refuse them.
        handle.set_strict_mode(0)
    handle.connect_unix(path)
    return handle


def refused(expected, deed):
    try:
        deed()
    except nbd.Error as error:
        assert error.errnum == expected, (error.errnum, expected, error.string)
    else:
        raise AssertionError(f"not refused with {expected}")


path, program, image = sys.argv[1:]
for structured in (True, False):
    h = connect(path, structured=structured)
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_size() == 16 * MIB
    assert not h.is_read_only() and h.can_multi_conn() and h.can_fua()

    data = bytes(range(256)) * 256
    h.pwrite(data, 4096)
    assert h.pread(len(data), 4096) == data
    h.pwrite(data[:512], 512, nbd.CMD_FLAG_FUA)
    assert h.pread(512, 512) == data[:512]
    h.flush()
    h.cache(65536, 0)

    h.zero(32768, 8192)
    assert h.pread(32768, 8192) == bytes(32768)
    h.pwrite(data, 4096)
    h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert h.pread(4096, 8192) == bytes(4096)
    h.zero(4096, 16384, nbd.CMD_FLAG_FAST_ZERO)
    h.trim(MIB, 0)
    h.trim(MIB, MIB, nbd.CMD_FLAG_FUA)

    # The largest payload, and a queue of many requests.
    big = b"\xa5" * (32 * MIB // 4)
    h.pwrite(big, 4 * MIB)
    assert h.pread(len(big), 4 * MIB) == big
    pending = []
    for index in range(200):
        buffer = nbd.Buffer.from_bytearray(bytearray(bytes([index])) * 4096)
        pending.append(h.aio_pwrite(buffer, index * 4096))
    while not all(h.aio_command_completed(cookie) for cookie in pending[:1]):
        h.poll(-1)
        pending = [c for c in pending if not h.aio_command_completed(c)] or pending[:0]
        if not pending:
            break
    h.flush()
    for index in range(0, 200, 17):
        assert h.pread(4096, index * 4096) == bytes([index]) * 4096, index

    if structured:
        pieces = []
        keep = lambda part, offset, _status, _error: pieces.append((offset, bytes(part))) or 0
        assert h.pread_structured(len(data), 4096, keep, nbd.CMD_FLAG_DF) is not None
        assert len(pieces) == 1 and pieces[0][0] == 4096, [p[0] for p in pieces]
        h.trim(MIB, 14 * MIB)
        found = {}
        h.block_status(16 * MIB, 0, lambda c, _o, entries, _e: found.update({c: entries}) or 0)
        for context, wanted in (("base:allocation", {0, 3}), ("qemu:allocation-depth", {0, 1})):
            lengths, states = found[context][0::2], found[context][1::2]
            assert sum(lengths) == 16 * MIB, found
            assert set(states) == wanted, found
        one = {}
        h.block_status(
            16 * MIB,
            0,
            lambda c, _o, entries, _e: one.update({c: entries}) or 0,
            nbd.CMD_FLAG_REQ_ONE,
        )
        assert [len(entries) for entries in one.values()] == [2, 2], one
    h.shutdown()

    h = connect(path, structured=structured, strict=False)
    refused(errno.EINVAL, lambda: h.pread(512, 16 * MIB))
    refused(errno.ENOSPC, lambda: h.pwrite(bytes(512), 16 * MIB))
    refused(errno.ENOSPC, lambda: h.zero(512, 16 * MIB))
    refused(errno.EINVAL, lambda: h.trim(512, 16 * MIB))
    refused(errno.EINVAL, lambda: h.pread(100, 0))
    refused(errno.EINVAL, lambda: h.pwrite(bytes(100), 0))
    refused(errno.EINVAL, lambda: h.flush(nbd.CMD_FLAG_FAST_ZERO))
    refused(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE))
    # It is still in step after all that.
    assert h.pread(4096, 17 * 4096) == bytes([17]) * 4096
    h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
names = []
h.opt_list(lambda name, _description: names.append(name) or 0)
assert names == ["", "ro"], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
assert contexts == ["base:allocation", "qemu:allocation-depth"], contexts
h.set_export_name("nowhere")
refused(errno.ENOENT, h.opt_info)
h.set_export_name("ro")
h.opt_info()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
h.opt_go()
assert h.pread(4096, 17 * 4096) == bytes([17]) * 4096
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
h.opt_abort()
# A socket that the client made and passed on, as systemd does.
h = nbd.NBD()
h.connect_systemd_socket_activation([program, "serve", "--file", image])
h.pwrite(bytes([17]) * 4096, 17 * 4096)
assert h.pread(4096, 17 * 4096) == bytes([17]) * 4096
h.shutdown()
print("all held")
