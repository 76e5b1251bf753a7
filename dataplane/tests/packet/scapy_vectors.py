"""A second builder and dissector of packets: scapy's.

`vectors` prints a line a packet: name, where it comes in, the frame in hexadecimal.
`check` reads name, where, frame, and what the programs made of it (or `-`), and builds
by itself what should have come out: addresses, TTL and every checksum.
"""
import sys

from scapy.all import fragment, ICMP, IP, TCP, UDP, Ether, Raw, IPOption_Router_Alert, IPOption_NOP

GUEST, ELASTIC, WORLD, ROUTER = "10.0.0.10", "198.51.100.10", "203.0.113.9", "203.0.113.77"
GUEST_MAC, UPLINK_MAC, PEER_MAC = "02:00:00:00:01:00", "02:00:00:00:02:00", "02:00:00:00:08:08"
OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (7, 0)), ("NOP", None), ("WScale", 7)]


def from_guest(gateway, **ip):
    return Ether(src=GUEST_MAC, dst=gateway) / IP(src=GUEST, dst=WORLD, **ip)


def from_world(source=WORLD, **ip):
    return Ether(src=PEER_MAC, dst=UPLINK_MAC) / IP(src=source, dst=ELASTIC, **ip)


def vectors(gateway):
    yield "tcp-options-out", "guest", from_guest(gateway) / TCP(sport=4000, dport=80, flags="S", options=OPTIONS)
    yield "tcp-options-in", "world", from_world() / TCP(sport=80, dport=4000, flags="SA", ack=1, options=OPTIONS)
    for size in (0, 1, 2, 3, 63, 1399, 1400):
        segment = dict(seq=1, ack=1, flags="PA")
        yield f"tcp-{size}-out", "guest", from_guest(gateway) / TCP(sport=4000, dport=80, **segment) / Raw(b"\xa5" * size)
        yield f"tcp-{size}-in", "world", from_world() / TCP(sport=80, dport=4000, **segment) / Raw(b"\x5a" * size)
        yield f"udp-{size}-out", "guest", from_guest(gateway) / UDP(sport=5000, dport=53) / Raw(b"\xff" * size)
        yield f"udp-{size}-in", "world", from_world() / UDP(sport=53, dport=5000) / Raw(b"\x00" * size)
    yield "udp-without-checksum-out", "guest", from_guest(gateway) / UDP(sport=5000, dport=53, chksum=0) / Raw(b"abc")
    yield "udp-without-checksum-in", "world", from_world() / UDP(sport=53, dport=5000, chksum=0) / Raw(b"abc")
    # The checksum that is zero when it is summed, and 0xffff when it is sent.
    for word in range(0, 0x10000, 0x0101):
        yield f"udp-sum-{word:04x}", "guest", from_guest(gateway) / UDP(sport=5000, dport=53) / Raw(word.to_bytes(2, "big"))
    options = [IPOption_NOP(), IPOption_NOP(), IPOption_NOP(), IPOption_NOP()]
    for name, option in (("nop", options), ("router-alert", [IPOption_Router_Alert()])):
        yield f"ip-{name}-out", "guest", from_guest(gateway, options=option) / UDP(sport=5000, dport=53) / Raw(b"odd")
        yield f"ip-{name}-in", "world", from_world(options=option) / UDP(sport=53, dport=5000) / Raw(b"odd")
    for ttl in (2, 64, 255):
        yield f"ttl-{ttl}-out", "guest", from_guest(gateway, ttl=ttl) / ICMP(type=8, id=9, seq=ttl) / Raw(b"ping!")
        yield f"ttl-{ttl}-in", "world", from_world(ttl=ttl) / ICMP(type=0, id=9, seq=ttl) / Raw(b"ping!")
    for name, whole in pieces(gateway).items():
        for n, piece in enumerate(cut(whole)):
            yield f"piece-{n}-{name}", name.rsplit("-", 1)[1], piece
    # About packets that the guest sent, as the world saw them.
    tcp = bytes(IP(src=ELASTIC, dst=WORLD) / TCP(sport=4000, dport=80, flags="A"))
    udp = bytes(IP(src=ELASTIC, dst=WORLD) / UDP(sport=5000, dport=53) / Raw(b"x" * 40))
    for kind, inner, code in (("frag-needed", tcp, 4), ("port", udp, 3), ("host", udp, 1)):
        for length in (28, 36, len(inner)):
            error = ICMP(type=3, code=code, nexthopmtu=1400 if code == 4 else 0)
            yield f"{kind}-{length}", "world", from_world(ROUTER) / error / Raw(inner[:length])


def pieces(gateway):
    data = Raw(bytes(n * 7 % 256 for n in range(4001)))
    return {
        "udp-guest": from_guest(gateway, id=77) / UDP(sport=5000, dport=53) / data,
        "udp-world": from_world(id=77) / UDP(sport=53, dport=5000) / data,
        "unsummed-guest": from_guest(gateway, id=78) / UDP(sport=5000, dport=53, chksum=0) / data,
        "tcp-world": from_world(id=79) / TCP(sport=80, dport=4000, seq=1, ack=1, flags="PA") / data,
        "echo-guest": from_guest(gateway, id=80) / ICMP(type=8, id=9, seq=5) / data,
    }


def cut(whole):
    return fragment(Ether(bytes(whole)), fragsize=1480)


def expected_piece(name):
    _, n, whole = name.split("-", 2)
    whole = pieces("02:00:00:00:00:00")[whole]
    came_out = Ether() / IP(expected(name.rsplit("-", 1)[1], bytes(whole)))
    return bytes(cut(came_out)[int(n)])[14:]


def expected(where, frame):
    ip = IP(bytes(frame)[14:])
    ip.ttl -= 1
    if where == "guest":
        ip.src = ELASTIC
    else:
        ip.dst = GUEST
    del ip.chksum
    if TCP in ip and ICMP not in ip:
        del ip[TCP].chksum
    elif UDP in ip and ICMP not in ip and ip[UDP].chksum:
        del ip[UDP].chksum
    elif ICMP in ip:
        if ip[ICMP].type == 3:
            quoted = IP(bytes(ip[ICMP].payload))
            # The quoted transport header may be cut short: its checksum stays.
            head = IP(bytes(quoted)[:20])
            head.src, head.chksum = GUEST, None
            rest = bytes(quoted)[20:]
            quoted_bytes = bytes(head)[:20] + rest
            ip[ICMP].remove_payload()
            ip = ip / Raw(quoted_bytes)
        del ip[ICMP].chksum
    return bytes(ip)


def check(lines):
    wrong = 0
    for line in lines:
        name, where, sent, got = line.split()
        piece = name.startswith("piece-")
        want = (expected_piece(name) if piece else expected(where, bytes.fromhex(sent))).hex()
        if got == "-" or got[28:] != want:
            wrong += 1
            print(f"{name}: sent {sent}\n  got  {got[28:] or got}\n  want {want}")
    print(f"{len(lines)} packets, {wrong} wrong")
    return 1 if wrong or not lines else 0


if __name__ == "__main__":
    if sys.argv[1] == "vectors":
        for name, where, packet in vectors(sys.argv[2]):
            print(name, where, bytes(packet).hex())
    else:
        sys.exit(check(sys.stdin.read().splitlines()))
