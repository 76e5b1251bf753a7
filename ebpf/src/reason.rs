//! Why a packet was dropped or let through: one definition for the verdict, the
//! counters, the exporter and `netctl why`.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $kind:ident, $text:literal;)*) => {
        /// The number is an index into the counters, and stands in pinned maps:
        /// never reuse one.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name = $number,)* }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// As the counters show it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Whether the packet went on.
            pub const fn accepts(self) -> bool {
                match self { $(Self::$name => reasons!(@$kind),)* }
            }
        }
    };
    (@accept) => { true };
    (@drop) => { false };
}

/// Counters reserved for each interface; more reasons than this cannot be.
pub const REASONS_MAX: u32 = 64;

reasons! {
    /// Nothing is decided yet; no packet ends with it.
    Undecided = 0, drop, "undecided";
    /// A packet of a flow that is known already.
    Established = 1, accept, "established";
    /// The first packet of a flow, permitted by a rule.
    NewFlow = 2, accept, "new-flow";
    /// An ICMP error about a known flow.
    Related = 3, accept, "related";
    /// ARP, answered here.
    Arp = 4, accept, "arp-answered";
    /// DHCP, handed to the responder.
    PuntDhcp = 5, accept, "dhcp";
    /// The metadata service, handed to the responder.
    PuntMetadata = 6, accept, "metadata";
    /// The responder's answer, handed to the guest.
    PuntReply = 7, accept, "responder-reply";
    /// Not for us: left to the host's own stack.
    NotOurs = 8, accept, "not-ours";
    /// An IPv6 neighbour's solicitation, answered here.
    Neighbour = 9, accept, "neighbour-answered";
    /// A router solicitation, handed to the responder.
    PuntRouter = 10, accept, "router-solicitation";
    /// A packet of a flow that EC2 does not track, when it is let in by its rule.
    Untracked = 11, accept, "untracked";
    /// The time service, handed to the responder.
    PuntTime = 12, accept, "time";
    /// A name to be resolved, handed to the responder.
    PuntDns = 13, accept, "dns";

    /// A packet of a known flow, delivered before the kernel made anything of it.
    EstablishedEarly = 15, accept, "established-early";

    /// The device belongs to no interface of ours.
    NoInterface = 16, drop, "no-interface";
    /// A header is cut short or contradicts itself.
    Malformed = 17, drop, "malformed";
    /// A VLAN tag from a guest.
    Vlan = 18, drop, "vlan";
    /// The source hardware address is not the interface's.
    SpoofedMac = 19, drop, "spoofed-mac";
    /// The source address is not the interface's; from the world: it is one of ours.
    SpoofedAddress = 20, drop, "spoofed-address";
    /// The sender in an ARP packet is not the interface.
    SpoofedArp = 21, drop, "spoofed-arp";
    /// ARP that asks for nothing that we answer.
    ArpIgnored = 22, drop, "arp-ignored";
    /// Neither ARP, IPv4 nor IPv6.
    EtherType = 23, drop, "ether-type";
    /// The interface has no IPv6 address.
    Ipv6 = 24, drop, "ipv6";
    /// A fragment of what only comes whole: for a service of the host, an ICMP error, a
    /// message of the link.
    Fragment = 25, drop, "fragment";
    /// No rule of the sender's groups permits the flow.
    EgressDenied = 26, drop, "egress-denied";
    /// No rule of the receiver's groups permits the flow.
    IngressDenied = 27, drop, "ingress-denied";
    /// It opens no flow and belongs to none.
    NoFlow = 28, drop, "no-flow";
    /// An ICMP type that we do not forward.
    IcmpType = 29, drop, "icmp-type";
    /// An ICMP error about no known flow.
    Unrelated = 30, drop, "unrelated";
    /// The interface has as many tracked flows as it may.
    FlowQuota = 31, drop, "flow-quota";
    /// Nothing has that address, or it may not be routed.
    NoRoute = 32, drop, "no-route";
    /// It would leave the network, but the interface has no elastic address.
    NoElastic = 33, drop, "no-elastic-address";
    NoUplink = 34, drop, "no-uplink";
    TtlExpired = 35, drop, "ttl-expired";
    /// The interface has no metadata service.
    NoMetadata = 36, drop, "no-metadata";
    /// Came out of the punt device, but is not the responder's answer to a guest.
    PuntStray = 37, drop, "punt-stray";
    /// Towards a guest without our verdict.
    Unmarked = 38, drop, "unmarked";
    /// Its source stands on the blocklist.
    Blocked = 39, drop, "blocked";
    /// For an address of the elastic ranges that no interface holds.
    UnknownElastic = 40, drop, "unknown-elastic-address";
    /// From the world with a source that cannot be there.
    Martian = 41, drop, "martian";
    /// A guest that plays the DHCP server.
    SpoofedDhcp = 42, drop, "spoofed-dhcp";

    /// The most specific route leads nowhere, or to an interface that is not here.
    Blackhole = 55, drop, "blackhole";
    /// Routed to an interface that takes only what is addressed to it.
    DestinationCheck = 54, drop, "destination-check";

    /// The network ACL of the sender's subnet does not let it out.
    AclEgressDenied = 53, drop, "acl-egress-denied";
    /// The network ACL of the receiver's subnet does not let it in.
    AclIngressDenied = 52, drop, "acl-ingress-denied";

    /// More bytes to the interface than it may have (ENA's names, here and below).
    BandwidthIn = 56, drop, "bw-in-allowance-exceeded";
    /// More bytes from the interface than it may send.
    BandwidthOut = 57, drop, "bw-out-allowance-exceeded";
    /// More packets, both ways together.
    PacketRate = 58, drop, "pps-allowance-exceeded";
    /// More packets to the host's own services.
    ServiceRate = 59, drop, "linklocal-allowance-exceeded";
    /// More packets that open a flow than one source of the world may send.
    SourceRate = 60, drop, "source-rate-exceeded";
    /// A neighbour's message about an address that is not the interface's, or a
    /// guest that plays the router.
    SpoofedNeighbour = 43, drop, "spoofed-neighbour";
    /// A message of the link that nobody else need hear.
    NeighbourIgnored = 44, drop, "neighbour-ignored";
    /// Longer than the MTU of the way; its sender was told so.
    TooBig = 62, drop, "too-big";
    /// A later fragment of a datagram whose first one went on.
    FragmentFollows = 14, accept, "fragment-follows";
    /// A first fragment without its whole transport header, or a later one that would
    /// write into it (RFC 1858, RFC 3128).
    FragmentTiny = 46, drop, "tiny-fragment";
    /// A later fragment that begins before the first one ends.
    FragmentOverlap = 47, drop, "overlapping-fragment";
    /// A later fragment whose first one did not come, or did not pass.
    FragmentLost = 48, drop, "fragment-without-first";
    /// A later fragment that came before its first one, and waits for it.
    FragmentHeld = 63, drop, "fragment-held";
    /// An ICMP error of our own, about a packet that was dropped.
    Told = 61, accept, "icmp-error-sent";
    /// A NAT gateway found no free port towards that peer (EC2's ErrorPortAllocation).
    NatNoPort = 49, drop, "nat-port-allocation";
    /// For a NAT gateway's address, and no connection through it.
    NatUnsolicited = 50, drop, "nat-unsolicited";
    /// What a NAT gateway does not translate: neither TCP, UDP nor an ICMP request, or from
    /// an address that is not the interface's own.
    NatUnsupported = 51, drop, "nat-unsupported";
    /// IPv6 extension headers: too many, or a routing header.
    ExtensionHeader = 45, drop, "extension-header";
}

impl Reason {
    /// Whether a rule let the packet in, and not a flow.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        matches!(self, Self::NewFlow | Self::Untracked)
    }

    /// The reason with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|r| *r as u8 == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_number_and_a_name_of_its_own() {
        for (i, a) in Reason::ALL.iter().enumerate() {
            assert!((*a as u32) < REASONS_MAX, "{a:?}");
            assert_eq!(Reason::from_number(*a as u8), Some(*a));
            assert!(Reason::ALL[i + 1..].iter().all(|b| b.name() != a.name()), "{a:?}");
        }
        assert_eq!(Reason::from_number(255), None);
    }
}
