use model::{Direction, Peer, PortRange, Protocol};
use rpc::dataplane::{Desired, Device};

use super::super::difference::difference;
use super::super::rule::told;
use super::*;

const WHOLE: &str = r#"
name = "fw"
blocklist = ["203.0.113.0/24"]

[uplink]
device = "eth1"
gateway = "198.51.100.1"
ranges = ["198.51.100.128/25"]

[group.web]
ingress = [
  { protocol = "tcp", ports = 443, from = "0.0.0.0/0" },
  { protocol = "tcp", ports = "8000-8010", from = ["10.0.0.0/8", "group:web"] },
  { protocol = "icmp", type = 8, from = "192.0.2.7" },
]

[group.shut]
egress = []

[interface.a]
device = "veth-a"
mac = "02:00:00:00:00:0a"
address = "10.0.0.10/24"
groups = ["web"]
elastic = "198.51.100.130"

[interface.b]
tap = "tap-b"
owner = 1000
mac = "02:00:00:00:00:0b"
address = "10.0.0.11/24"
groups = ["web", "shut"]
source-check = false
"#;

#[test]
fn a_whole_file_becomes_a_desired_state_under_ids_that_stay() {
    let plan = read(WHOLE).unwrap();
    assert_eq!(plan.deployment, "fw");
    let Desired { interfaces, groups, .. } = &plan.desired;
    assert_eq!(interfaces.len(), 2);
    assert_eq!(interfaces[0].device, Device::Existing { name: "veth-a".into() });
    assert_eq!(interfaces[0].subnet.to_string(), "10.0.0.0/24");
    assert_eq!(interfaces[1].device, Device::Tap { name: "tap-b".into(), owner_uid: 1000 });
    assert!(!interfaces[1].source_check);
    let web = groups.iter().find(|g| g.id == group_id("web")).unwrap();
    assert_eq!(web.ingress.len(), 4, "a rule for each peer");
    assert_eq!(web.ingress[0].protocol, Protocol::Tcp(PortRange::single(443)));
    assert_eq!(web.ingress[2].peer, Peer::Group(group_id("web")));
    assert_eq!(web.egress.len(), 2, "of both families: without a word on egress, all may leave");
    let shut = groups.iter().find(|g| g.id == group_id("shut")).unwrap();
    assert_eq!(shut.egress.len(), 0);
    // Another order and another rule before it: the ids are the same.
    let moved = WHOLE.replace(
        "ingress = [\n",
        "ingress = [\n  { protocol = \"udp\", ports = 53, from = \"10.0.0.0/8\" },\n",
    );
    let moved = read(&moved).unwrap().desired;
    let web_moved = moved.groups.iter().find(|g| g.id == web.id).unwrap();
    assert_eq!(web_moved.ingress[1..], web.ingress[..]);
    assert_eq!(moved.interfaces, *interfaces);
}

#[test]
fn rules_read_as_people_say_them() {
    let plan = read(WHOLE).unwrap();
    let web = plan.desired.groups.iter().find(|g| g.id == group_id("web")).unwrap();
    let said: Vec<String> =
        web.ingress.iter().map(|r| told(Direction::Ingress, r, &plan.names)).collect();
    assert_eq!(
        said,
        [
            "ingress tcp 443 from 0.0.0.0/0",
            "ingress tcp 8000-8010 from 10.0.0.0/8",
            "ingress tcp 8000-8010 from group:web",
            "ingress icmp type 8 from 192.0.2.7/32",
        ]
    );
}

/// Line, a word of what is wrong, a word of what to write.
fn wrong(from: &str, to: &str) -> (usize, String, String) {
    assert!(WHOLE.contains(from), "{from}");
    let error = read(&WHOLE.replacen(from, to, 1)).unwrap_err();
    (error.line, error.what, error.instead)
}

#[test]
fn each_mistake_is_named_with_its_line_and_what_to_write() {
    let line_of = |text: &str| 1 + WHOLE[..WHOLE.find(text).unwrap()].matches('\n').count();
    for (from, to, what, instead) in [
        ("device = \"eth1\"", "devise = \"eth1\"", "unknown field `devise`", "docs/guide"),
        ("gateway = \"198.51.100.1\"", "gateway = \"here\"", "`here` is not", "192.0.2.1"),
        ("ports = 443", "ports = 70000", "70000 is no port", "ports = 443"),
        ("ports = \"8000-8010\"", "ports = \"9-8\"", "no port and no range", "8000-8010"),
        ("protocol = \"icmp\"", "protocol = \"icpm\"", "`icpm` is none", "\"tcp\""),
        ("type = 8", "ports = 8", "protocol `icmp` has none", "\"tcp\""),
        ("from = \"192.0.2.7\"", "to = \"192.0.2.7\"", "no such end", "from ="),
        ("type = 8, from = \"192.0.2.7\"", "type = 8", "must say `from`", "0.0.0.0/0"),
        ("\"group:web\"]", "\"group:wbe\"]", "`group:wbe` is neither", "group:NAME"),
        ("mac = \"02:00:00:00:00:0a\"", "mac = \"2:x\"", "not a hardware address", "mac = "),
        ("10.0.0.10/24", "10.0.0.300/24", "not an address", "10.0.0.10/24"),
        ("10.0.0.10/24", "10.0.0.1/24", "the subnet's router", "later"),
        ("10.0.0.10/24", "10.0.0.255/24", "no room", "10.0.0.10/24"),
        ("groups = [\"web\"]", "groups = [\"wbe\"]", "no group `wbe`", "shut, web"),
        ("tap = \"tap-b\"", "tap = \"a-name-that-is-too-long\"", "cannot be", "1 to 15"),
        ("name = \"fw\"", "name = \"FW-1\"", "deployment name", "leave it out"),
        ("203.0.113.0/24", "203.0.113.0/33", "not a prefix", "192.0.2.0/24"),
    ] {
        let (line, said, advice) = wrong(from, to);
        assert_eq!(line, line_of(from), "{from} → {to}: {said}");
        assert!(said.contains(what), "{to}: {said}");
        assert!(advice.contains(instead), "{to}: {advice}");
    }
    let (_, said, _) = wrong("tap = \"tap-b\"\n", "");
    assert!(said.contains("either `device` or `tap`"), "{said}");
    let no_uplink = WHOLE.replace("[uplink]", "[group.uplink]");
    assert!(read(&no_uplink).is_err());
}

#[test]
fn a_difference_says_what_would_change_and_nothing_where_nothing_would() {
    let old = read(WHOLE).unwrap();
    let none = Desired::default();
    let all = difference(&none, &old.desired, &old.names);
    assert_eq!(all.iter().filter(|l| l.what == "interface").count(), 2);
    assert_eq!(all.iter().filter(|l| l.what == "rule").count(), 6);
    assert!(difference(&old.desired, &old.desired, &old.names).is_empty());
    let changed = WHOLE
        .replace("ports = 443", "ports = 444")
        .replace("elastic = \"198.51.100.130\"", "elastic = \"198.51.100.131\"");
    let new = read(&changed).unwrap();
    let said: Vec<String> = difference(&old.desired, &new.desired, &new.names)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        said,
        [
            "~ interface a: elastic 198.51.100.130 → 198.51.100.131",
            "- rule web: ingress tcp 443 from 0.0.0.0/0",
            "+ rule web: ingress tcp 444 from 0.0.0.0/0",
        ]
    );
}

#[test]
fn an_interface_may_have_the_rates_of_another() {
    let plain = read(WHOLE).unwrap();
    let names: Vec<&str> =
        WHOLE.lines().filter_map(|l| l.strip_prefix("[interface.")?.strip_suffix(']')).collect();
    let last = names[plain.desired.interfaces.len() - 1];
    let with = |of: &str| format!("{WHOLE}rates.of = \"{of}\"\n");
    let plan = read(&with(names[0])).unwrap();
    let id_of = |name: &str| {
        let found = plan.names.iter().find(|(id, n)| *n == name && id.starts_with("eni-"));
        found.unwrap().0.clone()
    };
    let shared: Vec<String> =
        plan.desired.interfaces.iter().filter_map(|i| i.rates_of).map(|i| i.to_string()).collect();
    assert_eq!(shared, [id_of(names[0])]);
    let lines = difference(&plain.desired, &plan.desired, &plan.names);
    let told: Vec<String> = lines.iter().map(ToString::to_string).collect();
    let line = format!("rates of none → {}", names[0]);
    assert!(told.iter().any(|l| l.contains(&line)), "{told:?}");
    for (of, wrong) in [("nobody", "there is no interface `nobody`"), (last, "of another itself")] {
        let error = read(&with(of)).unwrap_err();
        assert!(error.what.contains(wrong), "{error}");
    }
    let both = with(names[0]) + "rates.packets = { baseline = \"20k\" }\n";
    assert!(read(&both).unwrap_err().what.contains("rates beside those of"));
}

#[test]
fn rates_the_early_drop_and_the_flow_log_are_read_and_their_changes_told() {
    let plain = read(WHOLE).unwrap();
    let text = WHOLE.replace(
        "ranges = [",
        "early-drop = true\nbogons = true\nfast-path = \"declared\"\nsource-packets = 5000\nranges = [",
    );
    let text = format!(
        "{text}rates.outgoing = {{ baseline = \"100M\", peak = \"1G\", credit = \"270G\" }}\n\
         rates.packets = {{ baseline = \"20k\" }}\n\
         idle = {{ tcp-established = 3600, udp-stream = 120 }}\n\
         [flow-log]\ndirectory = \"/var/log/fw\"\nformat = \"json\"\n"
    );
    let plan = read(&text).unwrap();
    let uplink = plan.desired.uplink.clone().unwrap();
    assert_eq!((uplink.early_drop, uplink.bogons), (Some(true), true));
    assert_eq!(uplink.source_packets, Some(5000));
    assert_eq!(uplink.fast_path, rpc::dataplane::FastPath::Declared);
    let rates = plan.desired.interfaces[1].rates;
    let outgoing = rates.outgoing.unwrap();
    assert_eq!(
        (outgoing.baseline, outgoing.peak, outgoing.credit),
        (100_000_000, 1_000_000_000, 270_000_000_000)
    );
    let packets = rates.packets.unwrap();
    assert_eq!((packets.baseline, packets.peak, packets.credit), (20_000, 20_000, 0));
    assert_eq!(rates.incoming, None);
    let idle = plan.desired.interfaces[1].idle;
    assert_eq!((idle.tcp_established, idle.udp, idle.udp_stream), (Some(3600), None, Some(120)));
    let log = plan.desired.flow_log.clone().unwrap();
    assert_eq!((log.interval_s, log.files_kept, log.account.as_str()), (60, 7, "-"));
    let lines = difference(&plain.desired, &plan.desired, &plan.names);
    let told: Vec<String> = lines.iter().map(ToString::to_string).collect();
    let says = |what: &str| told.iter().any(|line| line.contains(what));
    assert!(says("5000 packets a second a source") && says("early drop on"), "{told:?}");
    assert!(says("idle none → tcp-established 3600 s udp-stream 120 s"), "{told:?}");
    assert!(says("+ flow-log /var/log/fw, json, each 60 s"), "{told:?}");
    assert!(says("outgoing none → 100000000 to 1000000000 a second"), "{told:?}");
    let line_of = |text: &str, part: &str| 1 + text.lines().position(|l| l == part).unwrap();
    for (right, wrong) in [
        ("directory = \"/var/log/fw\"", "directory = \"log\""),
        ("format = \"json\"", "interval = 0"),
    ] {
        let text = text.replace(right, wrong);
        let error = read(&text).unwrap_err();
        assert_eq!(error.line, line_of(&text, wrong), "{error}");
    }
    let error = read(&text.replace("\"20k\"", "\"20 k\"")).unwrap_err();
    assert!(error.what.contains("baseline"), "{error}");
    let error = read(&text.replace("udp-stream = 120", "udp-stream = 181")).unwrap_err();
    assert!(error.to_string().contains("udp-stream of 181 s") && error.instead.contains("180"));
}

const ROUTED: &str = r#"
[route-table.private]
local = ["10.0.0.0/16"]
routes = [
  { to = "0.0.0.0/0", via = "internet" },
  { to = "10.0.2.9/24", via = "interface:b" },
  { to = "203.0.113.0/24", via = "blackhole" },
]
"#;

#[test]
fn a_route_table_is_read_and_what_is_wrong_in_it_is_told() {
    let text = WHOLE.replace("[interface.b]", "route-table = \"private\"\n[interface.b]") + ROUTED;
    let plan = read(&text).unwrap();
    let table = &plan.desired.route_tables[0];
    assert_eq!(plan.desired.interfaces[0].route_table, Some(table.id));
    let said: Vec<String> = table.routes.iter().map(|r| route::told(r, &plan.names)).collect();
    assert_eq!(
        said,
        ["0.0.0.0/0 via internet", "10.0.2.0/24 via interface:b", "203.0.113.0/24 via blackhole",]
    );
    for (from, to, error) in [
        ("interface:b", "interface:c", "via: there is no interface `c`"),
        ("\"blackhole\"", "\"nowhere\"", "via: `nowhere` is no target"),
        ("203.0.113.0/24\", via", "10.0.0.0/16\", via", "has a route already, or is local"),
        ("table = \"private\"", "table = \"public\"", "there is no route table `public`"),
        ("[route-table.private]", "[route-table.private]\nnetwork = \"x\"", "another network"),
    ] {
        let wrong = read(&text.replace(from, to)).unwrap_err().to_string();
        assert!(wrong.contains(error), "{wrong}");
    }
    let lines = difference(&read(WHOLE).unwrap().desired, &plan.desired, &plan.names);
    let said: Vec<String> = lines.iter().map(ToString::to_string).collect();
    assert!(said.contains(&"~ interface a: route-table none → private".to_owned()), "{said:#?}");
    assert!(said.contains(&"+ route private: 0.0.0.0/0 via internet".to_owned()), "{said:#?}");
}

const GUARDED: &str = r#"
[network-acl.edge]
ingress = [
  { number = 100, deny = "203.0.113.9/24" },
  { number = 200, allow = "0.0.0.0/0", protocol = "tcp", ports = 22 },
]
egress = [{ number = 100, allow = "0.0.0.0/0" }]
"#;

#[test]
fn a_network_acl_is_read_and_what_is_wrong_in_it_is_told() {
    let text = WHOLE.replace("[interface.b]", "network-acl = \"edge\"\n[interface.b]") + GUARDED;
    let plan = read(&text).unwrap();
    let acl = &plan.desired.network_acls[0];
    assert_eq!(plan.desired.interfaces[0].network_acl, Some(acl.id));
    let said: Vec<String> = acl.entries.iter().map(acl::told).collect();
    assert_eq!(
        said,
        [
            "100 deny ingress any from 203.0.113.0/24",
            "200 allow ingress tcp 22 from 0.0.0.0/0",
            "100 allow egress any to 0.0.0.0/0",
        ]
    );
    for (from, to, error) in [
        ("number = 200", "number = 100", "number: 100 is there already"),
        ("number = 200", "number = 32767", "number: 32767 is there already, or no number"),
        ("deny = \"203.0.113.9/24\"", "protocol = \"tcp\"", "either `allow` or `deny`"),
        ("acl = \"edge\"", "acl = \"core\"", "there is no network ACL `core`"),
        ("acl.edge]", "acl.edge]\nnetwork = \"x\"", "belongs to another network"),
        ("ports = 22", "ports = \"9-8\"", "is no port and no range"),
    ] {
        let wrong = read(&text.replace(from, to)).unwrap_err().to_string();
        assert!(wrong.contains(error), "{wrong}");
    }
    let lines = difference(&read(WHOLE).unwrap().desired, &plan.desired, &plan.names);
    let said: Vec<String> = lines.iter().map(ToString::to_string).collect();
    assert!(said.contains(&"~ interface a: network-acl none → edge".to_owned()), "{said:#?}");
    assert!(said.iter().any(|l| l.starts_with("+ entry edge: 100 deny ingress")), "{said:#?}");
}

#[test]
fn secondary_addresses_are_read_and_what_is_wrong_with_one_is_told() {
    let with = |secondary: &str| {
        let elastic = "elastic = \"198.51.100.130\"";
        WHOLE.replace(elastic, &format!("{elastic}\nsecondary = [{secondary}]"))
    };
    let two =
        "{ address = \"10.0.0.20\", elastic = \"198.51.100.131\" }, { address = \"10.0.0.21\" }";
    let plan = read(&with(two)).unwrap();
    let [first, second] = plan.desired.interfaces[0].secondary[..] else { panic!("two") };
    assert_eq!(first.address, Ipv4Addr::new(10, 0, 0, 20));
    assert_eq!(first.elastic, Some(Ipv4Addr::new(198, 51, 100, 131)));
    assert_eq!((second.address, second.elastic), (Ipv4Addr::new(10, 0, 0, 21), None));
    let before = read(WHOLE).unwrap().desired;
    let told = difference(&before, &plan.desired, &plan.names);
    assert!(format!("{told:?}").contains("10.0.0.20=198.51.100.131 10.0.0.21"), "{told:?}");
    for wrong in ["10.0.1.20", "10.0.0.1", "10.0.0.255", "here"] {
        let error = read(&with(&format!("{{ address = \"{wrong}\" }}"))).unwrap_err();
        assert!(error.to_string().contains(wrong), "{error}");
    }
}

#[test]
fn what_guests_are_served_is_read_told_and_checked() {
    let plain = read(WHOLE).unwrap();
    let text = WHOLE.replace(
        "name = \"fw\"",
        "name = \"fw\"\nname-servers = [\"192.0.2.53\", \"[2001:db8::1]:5353\"]",
    );
    let text = format!(
        "{text}[interface.b.services]\nntp = [\"169.254.169.123\"]\nnetbios = [\"10.0.0.9\"]\n\
         netbios-node = 2\nmetadata-hop-limit = 2\nmetadata-tokens = \"optional\"\n\
         resolve = {{ address = \"10.0.0.2\", names = [\"b.fw.lan\"] }}\n\
         metadata = {{ \"meta-data/instance-id\" = \"i-b\" }}\n"
    );
    let plan = read(&text).unwrap();
    let servers: Vec<String> = plan.desired.name_servers.iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["192.0.2.53:53", "[2001:db8::1]:5353"]);
    let (a, b) = (&plan.desired.interfaces[0], &plan.desired.interfaces[1]);
    assert_eq!((&a.services, &a.metadata), (&rpc::dataplane::Services::default(), &None));
    assert_eq!(b.services.ntp.len() + b.services.netbios.len(), 2);
    assert_eq!((b.services.netbios_node, b.services.metadata_hop_limit), (Some(2), 2));
    assert_eq!(b.services.metadata_tokens, rpc::dataplane::Tokens::Optional);
    assert_eq!(b.services.dns.as_ref().unwrap().names, ["b.fw.lan"]);
    assert_eq!(b.metadata.as_ref().unwrap()["meta-data/instance-id"], "i-b");
    let lines = difference(&plain.desired, &plan.desired, &plan.names);
    let told: Vec<String> = lines.iter().map(ToString::to_string).collect();
    let says = |what: &str| told.iter().any(|line| line.contains(what));
    assert!(says("resolve at 10.0.0.2") && says("metadata-hop-limit 2"), "{told:?}");
    assert!(says("+ name-servers 192.0.2.53:53 [2001:db8::1]:5353"), "{told:?}");
    let other = read(&text.replace("i-b", "i-c")).unwrap();
    assert_eq!(difference(&plan.desired, &other.desired, &plan.names).len(), 1);
    for (right, wrong, what) in [
        ("metadata-hop-limit = 2", "metadata-hop-limit = 65", "hop limit"),
        ("netbios-node = 2", "netbios-node = 3", "NetBIOS"),
        ("b.fw.lan", "b..lan", "no host's"),
        ("192.0.2.53", "here", "`here` is not"),
        ("ntp = [", "nntp = [", "nntp"),
    ] {
        let error = read(&text.replacen(right, wrong, 1)).unwrap_err();
        assert!(error.what.contains(what), "{wrong}: {error}");
    }
}

#[test]
fn nat_gateways_are_read_told_and_checked() {
    let text = WHOLE.replace("[interface.b]", "route-table = \"private\"\n[interface.b]")
        + "[route-table.private]\nlocal = [\"10.0.0.0/16\"]\n\
           routes = [{ to = \"0.0.0.0/0\", via = \"nat:out\" }]\n\
           [nat-gateway.out]\naddress = \"10.0.0.9\"\nelastic = \"198.51.100.140\"\n";
    let plan = read(&text).unwrap();
    let [gateway] = plan.desired.nat_gateways[..] else { panic!("one") };
    assert_eq!(gateway.elastic, Ipv4Addr::new(198, 51, 100, 140));
    assert_eq!((gateway.address, gateway.ports_max), (Ipv4Addr::new(10, 0, 0, 9), None));
    let target = plan.desired.route_tables[0].routes[0].target;
    assert_eq!(target, model::route_table::Target::NatGateway(gateway.id));
    let lines = difference(&read(WHOLE).unwrap().desired, &plan.desired, &plan.names);
    let said: Vec<String> = lines.iter().map(ToString::to_string).collect();
    let line = "+ nat-gateway out: elastic 198.51.100.140, address 10.0.0.9, ports all";
    assert!(said.contains(&line.to_owned()), "{said:#?}");
    assert!(said.iter().any(|l| l.contains("0.0.0.0/0 via nat:out")), "{said:#?}");
    for (right, wrong, what) in [
        ("nat:out", "nat:in", "there is no NAT gateway `in`"),
        ("[nat-gateway.out]", "[nat-gateway.out]\nnetwork = \"x\"", "another network"),
        ("\"198.51.100.140\"", "\"here\"", "`here` is not"),
        ("address = \"10.0.0.9\"", "address = \"10.0.0.9\"\nports-max = 0", "no number of ports"),
    ] {
        let error = read(&text.replacen(right, wrong, 1)).unwrap_err();
        assert!(error.what.contains(what), "{wrong}: {error}");
    }
}

#[test]
fn a_prefix_list_is_named_by_rules_and_told_in_a_difference() {
    let with = WHOLE
        .replace(
            "[group.web]",
            "[prefix-list.office]\nversion = 3\nmax-entries = 9\nentries = [\n  \
             { prefix = \"192.0.2.0/24\", description = \"first floor\" },\n  \
             { prefix = \"203.0.113.7/24\" },\n]\n\n[limits]\nrules-a-group = 100\n\
             groups-an-interface = 10\n\n[group.web]",
        )
        .replace("from = \"192.0.2.7\"", "from = \"list:office\"");
    let plan = read(&with).unwrap();
    let [list] = &plan.desired.prefix_lists[..] else { panic!("{plan:?}") };
    assert_eq!((list.version, list.entries_max, list.entries.len()), (3, 9, 2));
    assert_eq!(list.entries[1].net.to_string(), "203.0.113.0/24");
    let web = plan.desired.groups.iter().find(|g| g.id == group_id("web")).unwrap();
    assert_eq!(web.ingress[3].peer, Peer::PrefixList(list.id));
    assert_eq!(
        told(Direction::Ingress, &web.ingress[3], &plan.names),
        "ingress icmp type 8 from list:office"
    );
    let limits = plan.desired.rule_limits.unwrap();
    assert_eq!((limits.rules_a_group, limits.groups_an_interface), (100, 10));
    let old = read(WHOLE).unwrap();
    assert_eq!(old.desired.rule_limits, Some(RuleLimits::default()));
    let lines: Vec<String> = difference(&old.desired, &plan.desired, &plan.names)
        .iter()
        .map(ToString::to_string)
        .collect();
    for line in [
        "+ limits 100 rules a group, 10 groups an interface",
        "+ prefix-list office: version 3, room 9",
        "+ list-entry office: 192.0.2.0/24 (first floor)",
        "+ rule web: ingress icmp type 8 from list:office",
    ] {
        assert!(lines.iter().any(|l| l == line), "{line} in {lines:#?}");
    }
}

#[test]
fn a_wrong_prefix_list_and_wrong_limits_are_told_with_their_line() {
    let wrong = |text: &str| read(&format!("{WHOLE}\n{text}")).unwrap_err().to_string();
    let both = "[prefix-list.l]\nentries = [{ prefix = \"10.0.0.0/8\" }, { prefix = \"::/0\" }]";
    assert!(wrong(both).contains("both families"), "{}", wrong(both));
    let small = "[prefix-list.l]\nmax-entries = 1\n\
                 entries = [{ prefix = \"10.0.0.0/8\" }, { prefix = \"11.0.0.0/8\" }]";
    assert!(wrong(small).contains("room for 1"), "{}", wrong(small));
    let limits = "[limits]\nrules-a-group = 500";
    let told = wrong(limits);
    assert!(told.contains("500 rules a group x 5 groups an interface are 2500"), "{told}");
    let unknown = WHOLE.replace("from = \"192.0.2.7\"", "from = \"list:none\"");
    let told = read(&unknown).unwrap_err().to_string();
    assert!(told.contains("`list:none`") && told.starts_with("line"), "{told}");
}

#[test]
fn connections_are_picked_up_where_the_file_says_so() {
    let old = read(WHOLE).unwrap();
    assert!(old.desired.interfaces.iter().all(|i| !i.loose_tcp));
    let text = WHOLE.replace("source-check = false", "source-check = false\nloose-tcp = true");
    let new = read(&text).unwrap();
    assert!(new.desired.interfaces[1].loose_tcp);
    let lines = difference(&old.desired, &new.desired, &new.names);
    let said: Vec<String> = lines.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["~ interface b: loose-tcp none → on"]);
    let untracked =
        read(&WHOLE.replace("source-check = false", "source-check = false\nuntracked = true"));
    assert!(untracked.unwrap().desired.interfaces[1].untracked);
}
