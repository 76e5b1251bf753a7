"""Writes, says so, waits until another writer has taken over, and must then fail."""

import errno
import os
import sys
import time

import nbd

path, wrote, go_on = sys.argv[1:]
h = nbd.NBD()
h.set_export_name("old")
h.connect_unix(path)
h.pwrite(b"\1" * 4096, 0)
open(wrote, "w").close()
while not os.path.exists(go_on):
    time.sleep(0.02)
for deed in (lambda: h.pwrite(b"\2" * 4096, 0), h.flush, lambda: h.pread(4096, 0)):
    try:
        deed()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error.string
    else:
        raise AssertionError("a fenced writer's request succeeded")
