//! Questions to the loaded programs, by BPF_PROG_TEST_RUN.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use ebpf::icmp::HEADERS6_LEN;
use ebpf::layout::{Interface, LocalKey};
use ebpf::neighbour::ANSWER_LEN;
use ebpf::{ASK_MARK, Reason, V6};
use model::Direction;
use rpc::dataplane::{AclDenied, Explained, FrameQuestion, Question, Routed, Translated, Verdict};

use super::ask::{Asked, asked};
use super::links::{TAP_INGRESS, UPLINK_EARLY, UPLINK_INGRESS, missing};
use super::watch::named_rule;
use super::{Error, Refused, Run};
use crate::compile::{Role, Tables, acl_denied, group_rules};
use crate::observe::Ends;

/// Bytes of linux/bpf.h's `struct __sk_buff` (6.6); a kernel with more zeroes the rest.
const SKB_LEN: usize = 192;
const MARK: usize = 8;
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;
const CB: usize = 48;
/// A rewritten frame is no longer than it was, but for a neighbour's answer and an ICMP
/// error, which puts headers before what it is about.
const FRAME_LEN_MAX: usize = 65_550;

const XDP_PASS: u32 = 2;

pub fn run(
    bpf: &Ebpf,
    tables: &Tables,
    ifindex: u32,
    frame: &[u8],
    mark: u32,
) -> Result<Run, Error> {
    let name = match tables.attachments.get(&ifindex).map(|a| a.role) {
        Some(Role::Uplink | Role::UplinkEarly) => UPLINK_INGRESS,
        Some(Role::Punt) => "punt_ingress",
        _ => TAP_INGRESS,
    };
    let program = classifier(bpf, name)?;
    let context = context(ifindex, mark);
    let mut context_out = [0; SKB_LEN];
    let mut out = vec![0; (frame.len() + HEADERS6_LEN).clamp(ANSWER_LEN, FRAME_LEN_MAX)];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    options.ctx_in = Some(&context);
    options.ctx_out = Some(&mut context_out);
    let result = program.test_run(options).map_err(|e| Error::new("run", name, e))?;
    let word = |at: usize| {
        let bytes =
            [context_out[at], context_out[at + 1], context_out[at + 2], context_out[at + 3]];
        u32::from_ne_bytes(bytes)
    };
    out.truncate(result.data_size_out as usize);
    let translated = (word(CB + 12) != 0).then(|| word(CB + 16) as u16);
    Ok(Run {
        reason: reason(&context_out),
        egress_rule: word(CB + 4) as u16,
        ingress_rule: word(CB + 8) as u16,
        code: result.return_value as i32,
        frame: out,
        translated,
        took: result.duration,
    })
}

/// What stands in the control block of a frame that was asked about.
pub fn reason(context: &[u8; SKB_LEN]) -> Option<Reason> {
    let number = [context[CB], context[CB + 1], context[CB + 2], context[CB + 3]];
    u8::try_from(u32::from_ne_bytes(number)).ok().and_then(Reason::from_number)
}

/// A frame of that device and mark.
pub fn context(ifindex: u32, mark: u32) -> [u8; SKB_LEN] {
    let mut context = [0; SKB_LEN];
    for (at, word) in [(MARK, mark), (IFINDEX, ifindex), (INGRESS_IFINDEX, ifindex)] {
        context[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    context
}

/// How long one run of a guest's program takes, of `times`, on a frame that it drops: what it
/// lets pass it rewrites, and the next run would meet another frame.
pub fn time(bpf: &Ebpf, ifindex: u32, frame: &[u8], times: u32) -> Result<Duration, Error> {
    let context = context(ifindex, 0);
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.ctx_in = Some(&context);
    options.repeat = times;
    let run = classifier(bpf, TAP_INGRESS)?.test_run(options);
    Ok(run.map_err(|e| Error::new("run", TAP_INGRESS, e))?.duration)
}

pub fn classifier<'a>(bpf: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier, Error> {
    bpf.program(name)
        .ok_or_else(|| missing(name))?
        .try_into()
        .map_err(|e: ProgramError| Error::new("find", name, e))
}

pub fn run_early(bpf: &Ebpf, frame: &[u8]) -> Result<bool, Error> {
    Ok(run_early_frame(bpf, frame)?.0 == XDP_PASS)
}

/// The same: what the program answers, and the frame as it left it.
pub fn run_early_frame(bpf: &Ebpf, frame: &[u8]) -> Result<(u32, Vec<u8>), Error> {
    let program: &Xdp = bpf
        .program(UPLINK_EARLY)
        .ok_or_else(|| missing(UPLINK_EARLY))?
        .try_into()
        .map_err(|e: ProgramError| Error::new("find", UPLINK_EARLY, e))?;
    let mut out = vec![0; frame.len()];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = program.test_run(options).map_err(|e| Error::new("run", UPLINK_EARLY, e))?;
    Ok((result.return_value, out))
}

/// An egress question is asked where the guest's packets come in; an ingress one
/// where the remote's would: at another local interface's device, where the remote
/// is one of the same network, else at the uplink.
pub fn answer(bpf: &Ebpf, tables: &Tables, question: &Question) -> Result<Verdict, Error> {
    let Some(interface) = interface(tables, question) else {
        let cause =
            std::io::Error::new(std::io::ErrorKind::NotFound, "no such interface is loaded");
        return Err(Error::new("ask", question.interface, cause));
    };
    let (ifindex, frame) = match asked(tables, interface, question)? {
        Asked::Frame(ifindex, frame) => (ifindex, frame),
        Asked::Refused(reason) => return Ok(refusal(reason)),
    };
    let run = run(bpf, tables, ifindex, &frame, ASK_MARK)?;
    let reason = run.reason.unwrap_or(Reason::Undecided);
    let entries = (run.egress_rule, run.ingress_rule);
    let (egress, ingress) = group_rules(reason, entries);
    let rule = match question.direction {
        Direction::Egress => egress,
        Direction::Ingress => ingress,
    };
    let rule = usize::from(rule).checked_sub(1);
    let rules = tables.names.rules.get(&(interface.ifindex, question.direction));
    let rule = rule.and_then(|rule| rules?.get(rule).copied());
    Ok(Verdict {
        allowed: reason.accepts(),
        reason: reason.name().to_owned(),
        rule,
        listed: tables.names.listed(rule, Some(question.remote)),
        routed: routed(tables, ifindex, &frame),
        denied: denied(tables, ifindex, &frame, reason, entries),
        translated: translated(tables, ifindex, &frame, &run),
    })
}

fn refusal(reason: Reason) -> Verdict {
    Verdict {
        allowed: false,
        reason: reason.name().to_owned(),
        rule: None,
        routed: None,
        denied: None,
        translated: None,
        listed: None,
    }
}

fn interface<'a>(tables: &'a Tables, question: &Question) -> Option<&'a Interface> {
    let named = tables.names.interfaces.iter();
    let (ifindex, _) = named.into_iter().find(|(_, id)| **id == question.interface)?;
    tables.interfaces.get(ifindex)
}

/// The longest frame that is run: a superframe.
const EXPLAINED_LEN_MAX: usize = 65_550;

/// Runs the loaded program on a frame as it came in.
pub fn explain(bpf: &Ebpf, tables: &Tables, q: &FrameQuestion) -> Result<Explained, Error> {
    let refused = |cause: String| Error::from(Refused(format!("frame: explain: {cause}")));
    if !(14..=EXPLAINED_LEN_MAX).contains(&q.frame.len()) {
        return Err(refused(format!(
            "{} bytes; 14 to {EXPLAINED_LEN_MAX} are a frame",
            q.frame.len()
        )));
    }
    let ifindex = match q.interface {
        Some(id) => {
            let named = tables.names.interfaces.iter().find(|(_, named)| **named == id);
            *named.ok_or_else(|| refused(format!("interface {id} is not on this host")))?.0
        }
        None => match tables.config.uplink {
            0 => return Err(refused("this host has no uplink".into())),
            uplink => uplink,
        },
    };
    let run = run(bpf, tables, ifindex, &q.frame, ASK_MARK)?;
    let reason = run.reason.unwrap_or(Reason::Undecided);
    let sender = tables.interfaces.get(&ifindex);
    let (gateway, behind) = behind(tables, &q.frame, &run.frame).unzip();
    let receiver = receiver(tables, sender, &q.frame).or(behind.flatten());
    let rule = |interface: Option<&Interface>, direction, place| {
        named_rule(tables, interface?, direction, place)
    };
    let device = tables.attachments.get(&ifindex);
    let entries = (run.egress_rule, run.ingress_rule);
    let (egress, ingress) = group_rules(reason, entries);
    let rules =
        (rule(sender, Direction::Egress, egress), rule(receiver, Direction::Ingress, ingress));
    let ends = Ends::read(&q.frame);
    let ends = (ends.map(|e| e.source), ends.map(|e| e.destination));
    Ok(Explained {
        device: device.map_or_else(String::new, |a| a.device.clone()),
        allowed: reason.accepts(),
        reason: reason.name().to_owned(),
        egress_rule: rules.0,
        ingress_rule: rules.1,
        listed: tables.names.both_listed(rules, ends),
        route: route(tables, sender, receiver, reason, ends.1),
        receiver: receiver.and_then(|r| tables.names.interfaces.get(&r.ifindex)).copied(),
        routed: routed(tables, ifindex, &q.frame),
        denied: denied(tables, ifindex, &q.frame, reason, entries),
        translated: translated(tables, ifindex, &q.frame, &run).or(gateway),
    })
}

/// The network ACL that denied a frame, and by which entry.
fn denied(
    tables: &Tables,
    ifindex: u32,
    frame: &[u8],
    reason: Reason,
    entries: (u16, u16),
) -> Option<AclDenied> {
    let sender = tables.interfaces.get(&ifindex);
    let receiver = receiver(tables, sender, frame);
    let ends = (sender.map(|i| i.ifindex), receiver.map(|i| i.ifindex));
    acl_denied(tables, reason, ends, entries)
}

/// What the route table of whoever sent the frame says of its destination.
fn routed(tables: &Tables, ifindex: u32, frame: &[u8]) -> Option<Routed> {
    tables.routed(ifindex, Ends::read(frame)?.destination)
}

/// What the frame is to the world, where a NAT gateway translates it.
fn translated(tables: &Tables, ifindex: u32, frame: &[u8], run: &Run) -> Option<Translated> {
    tables.translated(ifindex, Ends::read(frame)?.destination, run.translated.unwrap_or(0))
}

/// Of a frame to a NAT gateway's address: as what it came, and the interface that its connection
/// belongs to, which stands in the frame as it went on.
fn behind<'a>(
    tables: &'a Tables,
    frame: &[u8],
    after: &[u8],
) -> Option<(Translated, Option<&'a Interface>)> {
    let came = Ends::read(frame)?;
    let IpAddr::V4(address) = came.destination else { return None };
    let elastic = tables.elastics.get(&u32::from(address)).filter(|e| e.nat != 0)?;
    let gateway = *tables.names.nat_gateways.get(&u32::from(address))?;
    let IpAddr::V4(inner) = Ends::read(after)?.destination else { return None };
    let key = LocalKey { vpc: elastic.interface.vpc, address: inner.into(), zero: 0 };
    let local = tables.locals.get(&key);
    let receiver = local.and_then(|local| tables.interfaces.get(&local.ifindex));
    let port = came.ports.map(|(_, port)| port);
    Some((Translated { gateway, address, port }, receiver))
}

/// The local interface that a frame is for, as the tables route it.
fn receiver<'a>(
    tables: &'a Tables,
    sender: Option<&Interface>,
    frame: &[u8],
) -> Option<&'a Interface> {
    let destination = Ends::read(frame)?.destination;
    if let Some(appliance) = sender.and_then(|s| tables.appliance(s, destination)) {
        return Some(appliance);
    }
    let to = match destination {
        IpAddr::V4(to) => u32::from(to),
        IpAddr::V6(to) => {
            let holder = tables.holders.get(&V6::from_bits(to.to_bits()))?;
            return tables.interfaces.get(&holder.ifindex);
        }
    };
    let near = sender.and_then(|sender| {
        let key = LocalKey { vpc: sender.vpc, address: to, zero: 0 };
        tables.interfaces.get(&tables.locals.get(&key)?.ifindex)
    });
    near.or_else(|| Some(&tables.elastics.get(&to).filter(|e| e.nat == 0)?.interface))
}

fn route(
    tables: &Tables,
    sender: Option<&Interface>,
    receiver: Option<&Interface>,
    reason: Reason,
    destination: Option<IpAddr>,
) -> String {
    let six = destination.filter(IpAddr::is_ipv6);
    let device = |ifindex: u32| {
        tables.attachments.get(&ifindex).map_or_else(|| ifindex.to_string(), |a| a.device.clone())
    };
    match (sender, receiver, reason) {
        (_, _, Reason::Arp) => "answered where it came in".into(),
        (
            _,
            _,
            Reason::PuntDhcp
            | Reason::PuntMetadata
            | Reason::PuntTime
            | Reason::PuntDns
            | Reason::PuntRouter,
        ) => "the host's own service".into(),
        (_, _, Reason::NotOurs) => "the host's own stack".into(),
        (_, Some(to), _) => {
            let address = six.unwrap_or_else(|| Ipv4Addr::from(to.address).into());
            format!("{} ({address})", device(to.ifindex))
        }
        (Some(sender), None, _) if reason.accepts() => {
            let hop6 = tables.sixes.get(&sender.ifindex).filter(|_| six.is_some());
            let hop6 = hop6.map(|six| Ipv6Addr::from_bits(six.next_hop.bits()).into());
            let hop: IpAddr = hop6.unwrap_or_else(|| Ipv4Addr::from(sender.next_hop).into());
            format!("{} by {hop}", device(sender.uplink))
        }
        _ => "none".into(),
    }
}
