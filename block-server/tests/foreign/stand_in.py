#!/usr/bin/env python3
"""Stands where a test-suite starts `nbdkit`, `qemu-nbd` or `nbd-server` (by the
name that it is called by) and has `block-server serve` do the work.

It reads their command lines as far as the suites' tests use them, makes the file
that is to be served, listens as they would, and passes the socket on as systemd
does. What it does not know ends with 64 and a word about it: a test that needs
that is in the list of those which cannot be run, with the reason.

STAND_IN_SERVER is block-server's path, STAND_IN_FOLDER a folder for files,
STAND_IN_CACHE how exports treat the kernel's cache (writeback), and
STAND_IN_QEMU_NBD the real qemu-nbd, for when it is asked to be a client."""

import array
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading

SERVER = os.environ["STAND_IN_SERVER"]
FOLDER = os.environ["STAND_IN_FOLDER"]
CACHE = os.environ.get("STAND_IN_CACHE", "writeback")
FIRST_PASSED_ON = 3
PR_SET_PDEATHSIG = 1


def cannot(what):
    print(f"stand-in: {what}: not known here", file=sys.stderr)
    sys.exit(64)


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def size_of(text):
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", text.upper()).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]


def new_file(size):
    fd, path = tempfile.mkstemp(dir=FOLDER, suffix=".img")
    os.ftruncate(fd, size)
    return fd, path


def pattern(size):
    """nbdkit's: each eight bytes are their own offset, big-endian."""
    fd, path = new_file(size)
    numbers = array.array("Q", range(0, size, 8))
    numbers.byteswap()
    os.pwrite(fd, numbers.tobytes()[:size], 0)
    return path


def data(text, size):
    """nbdkit's: bytes, and @OFFSET."""
    at, pieces = 0, []
    for word in text.split():
        if word.startswith("@"):
            at = int(word[1:], 0)
        else:
            pieces.append((at, int(word, 0)))
            at += 1
    fd, path = new_file(size_of(size) if size else at)
    for at, byte in pieces:
        os.pwrite(fd, bytes([byte]), at)
    return path


class Server:
    """What was asked for, in our own terms."""

    def __init__(self):
        self.exports = []
        self.descriptions = {}
        self.is_read_only = False
        self.certificates = None
        self.listen = None
        self.is_inetd = False
        self.is_bound_to_parent = False
        self.pid_file = None
        self.is_background = False
        self.run = None
        self.uri_export = ""

    def arguments(self):
        """A file for --config; JSON's strings are TOML's."""
        lines = []
        if self.certificates:
            for key, file in (
                ("certificate", "server-cert.pem"),
                ("key", "server-key.pem"),
                ("client-ca", "ca-cert.pem"),
            ):
                lines.append(f"{key} = {json.dumps(os.path.join(self.certificates, file))}")
            lines.insert(0, "[tls]")
        lines += ["[[listen]]", "activated = true", f"tls = {json.dumps(bool(self.certificates))}"]
        for name, path in self.exports:
            facts = {"name": name, "path": os.path.abspath(path), "cache": CACHE}
            facts |= {"read-only": self.is_read_only, "description": self.descriptions.get(name, "")}
            lines += ["[[export]]", *(f"{key} = {json.dumps(fact)}" for key, fact in facts.items())]
        fd, path = tempfile.mkstemp(dir=FOLDER, suffix=".toml")
        os.write(fd, "\n".join(lines).encode())
        return [SERVER, "serve", "--config", path]

    def start(self):
        if self.is_bound_to_parent:
            die_with_parent()
        if "LISTEN_PID" in os.environ:
            os.execv(SERVER, self.arguments())
        folder = tempfile.mkdtemp(dir=FOLDER)
        listener = listen_at(self.listen or os.path.join(folder, "s"))
        if self.is_inetd:
            path = listener.getsockname()
            self.relay(self.child(listener), path)
        elif self.run:
            path = listener.getsockname()
            self.run_beside(self.child(listener), path)
        else:
            if self.is_background and os.fork():
                # Who connects from now on is served when the other is up.
                os._exit(0)
            if self.pid_file:
                with open(self.pid_file, "w") as file:
                    print(os.getpid(), file=file)
            self.become(listener)

    def become(self, listener):
        number = listener.detach()
        if number != FIRST_PASSED_ON:
            os.dup2(number, FIRST_PASSED_ON)
            os.close(number)
        os.set_inheritable(FIRST_PASSED_ON, True)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        os.execv(SERVER, self.arguments())

    def child(self, listener):
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            quiet = os.open("/dev/null", os.O_RDWR)
            os.dup2(quiet, 0)
            os.dup2(2, 1)
            self.become(listener.dup())
        # Whoever connects to a server that could not start must hear of it.
        listener.close()
        return pid

    def relay(self, pid, path):
        """One connection, on our standard input, as inetd passes one on."""
        client = socket.socket(fileno=os.dup(0))
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)

        def copy(source, target):
            try:
                while some := source.recv(1 << 18):
                    target.sendall(some)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        there = threading.Thread(target=copy, args=(client, server), daemon=True)
        there.start()
        copy(server, client)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)

    def run_beside(self, pid, path):
        words = {"unixsocket": path, "uri": f"nbd+unix:///{self.uri_export}?socket={path}"}
        words["nbd"] = f"nbd:unix:{path}"
        code = subprocess.call(["sh", "-c", self.run], env={**os.environ, **words})
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        # It may be asked to end before it was up.
        sys.exit(code or (0 if ended == -signal.SIGTERM else ended))


def listen_at(where):
    if isinstance(where, tuple):
        listener = socket.create_server(where)
    elif isinstance(where, int):
        listener = socket.create_server(("::", where), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(where)
        listener.listen(16)
    return listener


def export_of(plugin, words):
    """What an nbdkit plugin would serve: (name, path) pairs."""
    first = next((w for w in words if "=" not in w), None)
    given = dict(w.split("=", 1) for w in words if "=" in w)
    if plugin == "null":
        # Of no bytes by default, which we do not serve: a sector stands for them.
        return [("", new_file(size_of(given.get("size", first or "512")))[1])]
    if plugin == "memory":
        return [("", new_file(size_of(given.get("size", first)))[1])]
    if plugin == "pattern":
        return [("", pattern(size_of(given.get("size", first))))]
    if plugin == "data":
        return [("", data(given["data"], given.get("size")))]
    if plugin == "file" and "dir" in given:
        return [(name, os.path.join(given["dir"], name)) for name in sorted(os.listdir(given["dir"]))]
    if plugin == "file":
        return [("", given.get("file", first))]
    return cannot(f"plugin {plugin}")


def nbdkit(words):
    server, rest, filters = Server(), [], []
    if "--dump-config" in words:
        print("version_minor=32\ntls=yes")
        sys.exit(0)
    if "--dump-plugin" in words:
        sys.exit(0)
    words = iter(words)
    for word in words:
        key, _, value = word.partition("=")
        if rest and not word.startswith("-"):
            rest.append(word)
        elif word in ("-v", "-f", "-fv", "-n", "--tls-verify-peer", "--newstyle"):
            pass
        elif word == "--exit-with-parent":
            server.is_bound_to_parent = True
        elif word == "-s":
            server.is_inetd = True
        elif word == "-r":
            server.is_read_only = True
        elif word == "-U":
            where = next(words)
            server.listen = None if where == "-" else where
        elif word == "-p":
            server.listen = int(next(words))
        elif word == "-P":
            server.pid_file = next(words)
        elif word == "--run":
            server.run = next(words)
        elif word == "--tls=require" or word == "--tls=off":
            pass
        elif key == "--tls-certificates":
            server.certificates = os.path.abspath(value)
        elif key == "--filter" and value == "cow":
            pass
        elif key == "--filter" and value == "blocksize-policy":
            filters.append(value)
        elif word.startswith("-"):
            cannot(word)
        else:
            rest.append(word)
    policy = [w for w in rest if w.startswith("blocksize-")]
    if any(w not in ("blocksize-minimum=512", "blocksize-error-policy=error") for w in policy):
        cannot(" ".join(policy))
    rest = [w for w in rest if w not in policy]
    server.exports = export_of(rest[0], rest[1:])
    server.start()


def qemu_nbd(words):
    if {"-L", "--list"} & set(words):
        real = os.environ["STAND_IN_QEMU_NBD"]
        os.execv(real, [real, *words])
    os.environ.setdefault("RUST_LOG", "error")
    server, name, description, folder, path = Server(), "", "", None, None
    address, port = "0.0.0.0", None
    words = iter(words)
    for word in words:
        if word in ("-v", "-t"):
            pass
        elif word == "-e":
            next(words)
        elif word == "--fork":
            server.is_background = True
        elif word.startswith("--pid-file="):
            server.pid_file = word.partition("=")[2]
        elif word == "-k":
            server.listen = next(words)
        elif word == "-b":
            address = next(words)
        elif word == "-p":
            port = int(next(words))
        elif word == "-f":
            if next(words) != "raw":
                cannot("an image that is not raw")
        elif word == "-x":
            name = next(words)
        elif word == "-r":
            server.is_read_only = True
        elif word == "-D":
            description = next(words)
        elif word == "--object":
            kind, *facts = next(words).split(",")
            folder = dict(f.split("=", 1) for f in facts)["dir"]
            if kind != "tls-creds-x509":
                cannot(kind)
        elif word == "--tls-creds":
            next(words)
            server.certificates = folder
        elif word.startswith("-"):
            cannot(word)
        else:
            path = word
    if port is not None:
        server.listen = (address, port)
    server.exports, server.descriptions = [(name, path)], {name: description}
    server.start()


def nbd_server(words):
    """`-d -C /dev/null 0 FILE`: inetd's way."""
    if words[:4] != ["-d", "-C", "/dev/null", "0"]:
        cannot(shlex.join(words))
    server = Server()
    server.is_inetd = True
    server.exports = [("", words[4])]
    server.start()


if "--version" in sys.argv:
    print("nbdkit 1.32.0")
    sys.exit(0)
KNOWN = {"nbdkit": nbdkit, "qemu-nbd": qemu_nbd, "nbd-server": nbd_server}
KNOWN[os.path.basename(sys.argv[0])](sys.argv[1:])
