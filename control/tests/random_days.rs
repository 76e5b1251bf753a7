//! Random calls and reports on the pure core, no socket and no disk: whatever
//! comes, certain things hold after each transaction.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::Ipv4Addr;

use control::api::{ApiError, Struct, answer_matches, read_params};
use control::core::{
    Action, Context, Deed, Draft, bootstrap, desired, instance_state, observe, sweep,
};
use control::query::grow;
use control::record::{Instance, Interface};
use control::settings::Settings;
use control::state::State;
use model::{AttachmentState, InstanceState, VolumeState};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rpc::host::{Observed, ObservedAttachment, ObservedInstance, ObservedVolume, Run};
use store::Reference;

const HOST: &str = "h";

struct Day {
    store: Reference,
    state: State,
    settings: Settings,
    rng: ChaCha20Rng,
    now_ms: u64,
    observed: Observed,
    seed: u64,
    shown: BTreeMap<model::InstanceId, InstanceState>,
}

impl Day {
    fn new(seed: u64) -> Self {
        let settings = Settings {
            region: "local-1".to_owned(),
            zone: "local-1a".to_owned(),
            host: HOST.to_owned(),
            uplink: None,
            elastic_range: Some("198.51.100.0/29".parse().unwrap()),
            flow_log: None,
            elastic_reserved: vec![],
            name_servers: vec![],
            rule_limits: model::RuleLimits::default(),
            endpoint: "http://127.0.0.1:8773".to_owned(),
        };
        let observed = Observed {
            vcpus: 8,
            memory_mib: 16 * 1024,
            images: vec![rpc::agent::Image {
                name: "tiny".to_owned(),
                size_bytes: 1 << 20,
                direct_boot: true,
                sha256: String::new(),
            }],
            ..Observed::default()
        };
        let mut day = Self {
            store: Reference::default(),
            state: State::default(),
            settings,
            rng: ChaCha20Rng::seed_from_u64(seed),
            now_ms: 1_000_000,
            observed,
            seed,
            shown: BTreeMap::new(),
        };
        day.change(|c, d| {
            bootstrap(c, d);
            Ok(())
        })
        .unwrap();
        day.report();
        day
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.rng.next_u64() % sides
    }

    fn change<T>(
        &mut self,
        decide: impl FnOnce(&Context<'_>, &mut Draft) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut draft = Draft::new(ChaCha20Rng::seed_from_u64(self.rng.next_u64()));
        let context = Context { state: &self.state, settings: &self.settings, now_ms: self.now_ms };
        let decided = decide(&context, &mut draft)?;
        let from = self.store.revision() + 1;
        let prefix = self.settings.prefix();
        let answer = self.store.txn(&draft.plan.into_txn(&prefix)).unwrap();
        assert!(answer.succeeded, "seed {}: a plan's comparison failed", self.seed);
        for batch in self.store.history(&prefix, from) {
            self.state.apply(&prefix, &batch).unwrap();
        }
        Ok(decided)
    }

    fn call(&mut self, form: &[(&str, String)]) -> Result<Struct, ApiError> {
        let pairs = form.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        let name = form[0].1.as_str();
        let action = Action::find(name).unwrap();
        let params = read_params(name, grow(pairs).unwrap())?;
        let before = self.store.revision();
        let answer = match action.deed {
            Deed::Read(read) => read(
                &Context { state: &self.state, settings: &self.settings, now_ms: self.now_ms },
                &params,
            ),
            Deed::Write(write) => self.change(|c, d| write(c, &params, d)).map(|answer| {
                answer(&Context {
                    state: &self.state,
                    settings: &self.settings,
                    now_ms: self.now_ms,
                })
            }),
            Deed::Console => unreachable!("the day asks for no console"),
        };
        match &answer {
            Ok(answer) => assert_eq!(answer_matches(name, answer), Ok(()), "seed {}", self.seed),
            Err(_) => assert_eq!(self.store.revision(), before, "a refusal changed something"),
        }
        answer
    }

    /// What the host says, some of it late, some of it by its own will.
    fn report(&mut self) {
        let context = Context { state: &self.state, settings: &self.settings, now_ms: self.now_ms };
        let wish = desired(&context, HOST);
        self.observed.revision = wish.revision;
        let mut instances = Vec::new();
        for instance in &wish.instances {
            let seen = self.observed.instances.iter().find(|i| i.id == instance.id).cloned();
            let dice = self.rng.next_u64() % 10;
            let state = match (instance.run, seen.as_ref().map(|s| s.state)) {
                // Late, or an agent that starts anew.
                (_, Some(state)) if dice < 2 => state,
                (Run::Running, _) if dice == 2 => InstanceState::Pending,
                (Run::Running, Some(InstanceState::Running)) if dice == 3 => InstanceState::Stopped,
                (Run::Running, _) => InstanceState::Running,
                (Run::Stopped, _) if dice < 5 => InstanceState::Stopping,
                (Run::Stopped, _) => InstanceState::Stopped,
                (Run::Terminated, _) if dice < 5 => InstanceState::ShuttingDown,
                (Run::Terminated, _) => InstanceState::Terminated,
            };
            let starts = match &seen {
                Some(seen) if dice < 2 => seen.starts,
                // An agent counts a start once it is done, and one whose memory is
                // lost begins at none; an instance may end without any.
                None if dice == 2 => 0,
                _ if state == InstanceState::Terminated && dice > 7 => 0,
                _ => instance.starts,
            };
            let volumes = instance.volumes.iter().filter(|_| state == InstanceState::Running);
            instances.push(ObservedInstance {
                id: instance.id,
                state,
                starts,
                reboots: instance.reboots,
                reason: None,
                attachments: volumes
                    .map(|v| ObservedAttachment {
                        volume: v.volume,
                        state: AttachmentState::Attached,
                    })
                    .collect(),
            });
        }
        self.observed.instances = instances;
        self.observed.volumes = wish
            .volumes
            .iter()
            .filter(|v| !v.deleted)
            .map(|v| ObservedVolume {
                id: v.id,
                state: VolumeState::Available,
                reason: None,
                size_bytes: v.size_bytes,
            })
            .collect();
        let observed = self.observed.clone();
        while !self.change(|c, d| Ok(observe(c, HOST, &observed, d))).unwrap() {}
    }

    fn any(&mut self, ids: Vec<String>) -> String {
        let strangers = ["i-00000000000000001", "vol-00000000000000001", "nonsense", ""];
        if ids.is_empty() || self.roll(12) == 0 {
            return strangers[self.roll(4) as usize].to_owned();
        }
        let at = self.roll(ids.len() as u64) as usize;
        ids[at].clone()
    }

    /// An interface and one of its private addresses, or strangers.
    fn any_address(&mut self) -> (String, String) {
        let of_interface = |n: &Interface| {
            let id = n.id.to_string();
            n.addresses().map(|a| format!("{id} {a}")).collect::<Vec<_>>()
        };
        let instances = self.state.instances.iter();
        let all = instances.flat_map(|i| &i.interfaces).flat_map(of_interface).collect();
        let one = self.any(all);
        let (interface, private) = one.split_once(' ').unwrap_or(("eni-00000000000000001", "::"));
        (interface.to_owned(), private.to_owned())
    }

    fn step(&mut self) {
        let instances: Vec<String> =
            self.state.instances.iter().map(|i| i.id.to_string()).collect();
        let volumes: Vec<String> = self.state.volumes.iter().map(|v| v.id.to_string()).collect();
        let groups: Vec<String> = self.state.groups.iter().map(|g| g.id.to_string()).collect();
        let images: Vec<String> = self.state.images.iter().map(|i| i.id.to_string()).collect();
        let addresses: Vec<String> =
            self.state.addresses.iter().map(|a| a.allocation.to_string()).collect();
        let action = |name: &str| ("Action", name.to_owned());
        let instance = self.any(instances);
        let volume = self.any(volumes);
        let group = self.any(groups);
        let address = self.any(addresses);
        let number = self.roll(4);
        let by_id = |name: &str| vec![action(name), ("InstanceId.1", instance.clone())];
        let (interface, private) = self.any_address();
        let form = match self.roll(25) {
            22 | 23 => vec![
                action("RunInstances"),
                ("ImageId", self.any(images)),
                ("MinCount", "1".to_owned()),
                ("MaxCount", "1".to_owned()),
                ("InstanceType", ["t3.micro", "m5.large"][self.roll(2) as usize].to_owned()),
                ("NetworkInterface.1.DeviceIndex", "0".to_owned()),
                ("NetworkInterface.1.SecurityGroupId.1", group.clone()),
                ("NetworkInterface.2.DeviceIndex", (1 + number).to_string()),
                ("NetworkInterface.2.SecurityGroupId.1", group),
                ("NetworkInterface.2.SecondaryPrivateIpAddressCount", number.to_string()),
            ],
            24 => vec![
                action("AssociateAddress"),
                ("AllocationId", address),
                ("NetworkInterfaceId", interface),
                ("PrivateIpAddress", private),
            ],
            0 | 1 => vec![
                action("RunInstances"),
                ("ImageId", self.any(images)),
                ("MinCount", "1".to_owned()),
                ("MaxCount", (1 + number).to_string()),
                (
                    "InstanceType",
                    ["t3.nano", "t3.micro", "m5.large"][self.roll(3) as usize].to_owned(),
                ),
                ("ClientToken", format!("token-{}", self.roll(40))),
                ("SecurityGroupId.1", group),
            ],
            2 => by_id("StartInstances"),
            3 => by_id("StopInstances"),
            4 => by_id("RebootInstances"),
            5 => by_id("TerminateInstances"),
            6 => vec![
                action("CreateVolume"),
                ("AvailabilityZone", "local-1a".to_owned()),
                ("Size", number.to_string()),
            ],
            7 | 8 => vec![
                action("AttachVolume"),
                ("VolumeId", volume),
                ("InstanceId", instance),
                ("Device", format!("/dev/sd{}", ["f", "g", "h", "i"][number as usize])),
            ],
            9 => vec![action("DetachVolume"), ("VolumeId", volume)],
            10 => vec![action("DeleteVolume"), ("VolumeId", volume)],
            11 => vec![action("AllocateAddress")],
            12 | 13 => vec![
                action("AssociateAddress"),
                ("AllocationId", address),
                ("InstanceId", instance),
            ],
            14 => vec![action("ReleaseAddress"), ("AllocationId", address)],
            15 => vec![
                action("CreateSecurityGroup"),
                ("GroupName", format!("g{number}")),
                ("GroupDescription", "d".to_owned()),
            ],
            16 => vec![action("DeleteSecurityGroup"), ("GroupId", group)],
            17 => vec![
                action("AuthorizeSecurityGroupIngress"),
                ("GroupId", group.clone()),
                ("IpPermissions.1.IpProtocol", "tcp".to_owned()),
                ("IpPermissions.1.FromPort", "1".to_owned()),
                ("IpPermissions.1.ToPort", (1 + number).to_string()),
                ("IpPermissions.1.Groups.1.GroupId", group),
            ],
            18 => vec![
                action("RegisterImage"),
                ("Name", format!("image-{number}")),
                ("ImageLocation", "tiny".to_owned()),
            ],
            19 => vec![action("DescribeInstances")],
            20 => vec![action("DescribeVolumes")],
            _ => vec![action("DescribeSecurityGroups")],
        };
        let _refused_or_not = self.call(&form);
    }

    fn check(&mut self) {
        let seed = self.seed;
        let mut addresses: HashSet<Ipv4Addr> = HashSet::new();
        let mut uids = HashSet::new();
        let mut attached = HashSet::new();
        for instance in self.state.instances.iter() {
            for attachment in &instance.attachments {
                assert!(attached.insert(attachment.volume), "seed {seed}: attached twice");
                let volume = self.state.volumes.get(attachment.volume);
                let volume = volume.unwrap_or_else(|| panic!("seed {seed}: no such volume"));
                assert!(volume.deleted_ms.is_none(), "seed {seed}: attached and deleted");
                assert!(attachment.generation <= volume.generation.max(1), "seed {seed}");
            }
            if instance.terminated_ms.is_some() {
                assert!(instance.interfaces.is_empty() && instance.attachments.is_empty());
                continue;
            }
            assert!(uids.insert(instance.uid), "seed {seed}: two guests of one user");
            assert_eq!(instance.primary().unwrap().device_index, 0, "seed {seed}");
            for interface in &instance.interfaces {
                self.check_interface(instance, interface, &mut addresses);
            }
        }
        let rows = self.state.names.iter().filter(|n| n.name.starts_with("private/")).count();
        assert_eq!(rows, addresses.len(), "seed {seed}: rows without an interface");
        let mut elastic = BTreeSet::new();
        for address in self.state.addresses.iter() {
            if let Some(association) = &address.association {
                let (interface, private) = (association.interface, association.private);
                assert!(elastic.insert((interface, private)), "seed {seed}: two on one address");
                let holder = self.state.instances.get(association.instance).unwrap();
                let held = holder.interfaces.iter().find(|n| n.id == interface);
                assert!(held.is_some_and(|n| n.addresses().any(|a| a == private)), "seed {seed}");
                assert!(holder.terminated_ms.is_none(), "seed {seed}: held by the dead");
            }
        }
        self.check_moves();
    }

    fn check_interface(
        &self,
        instance: &Instance,
        interface: &Interface,
        addresses: &mut HashSet<Ipv4Addr>,
    ) {
        let seed = self.seed;
        for address in interface.addresses() {
            assert!(addresses.insert(address), "seed {seed}: one address twice");
            let row = format!("private/{}/{address}", interface.subnet);
            let owner = self.state.names.get(&row).map(|n| n.owner.clone());
            assert_eq!(owner, Some(instance.id.to_string()), "seed {seed}: {row}");
        }
        for group in &interface.groups {
            assert!(self.state.groups.get(group).is_some(), "seed {seed}: its group is gone");
        }
    }

    /// Stock waiters give up at the sight of a state out of order.
    fn check_moves(&mut self) {
        let now: BTreeMap<_, _> =
            self.state.instances.iter().map(|i| (i.id, instance_state(&self.state, i))).collect();
        for (id, next) in &now {
            let Some(before) = self.shown.get(id) else { continue };
            let lawful = before == next
                || before.may_become(*next)
                // A report may tell two moves at once.
                || InstanceState::ALL.iter().any(|m| before.may_become(*m) && m.may_become(*next));
            let flap = *next == InstanceState::Pending
                && matches!(before, InstanceState::Running | InstanceState::Stopping);
            assert!(lawful && !flap, "seed {}: {id}: {before} then {next}", self.seed);
        }
        self.shown = now;
    }
}

fn live(seed: u64, steps: usize) -> State {
    let mut day = Day::new(seed);
    let report_of_ten = 1 + day.roll(6);
    let (call, tags) = (("Action", "RegisterImage".to_owned()), ("Name", "first".to_owned()));
    day.call(&[call, tags, ("ImageLocation", "tiny".to_owned())]).unwrap();
    for _ in 0..steps {
        day.now_ms += 1000;
        if day.roll(10) < report_of_ten {
            day.report();
        } else {
            day.step();
        }
        if day.roll(50) == 0 {
            day.now_ms += 3_600_000;
            day.change(|c, d| {
                sweep(c, d);
                Ok(())
            })
            .unwrap();
        }
        day.check();
    }
    day.state
}

#[test]
fn whatever_comes_the_state_is_sound() {
    let seeds: Vec<u64> = match std::env::var("HOSTPLANE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..60).map(|n| u64::from(std::process::id()) * 1000 + n).collect(),
    };
    eprintln!("seeds {seeds:?}");
    let (mut terminated, mut attached, mut stopped) = (0, 0, 0);
    for seed in seeds {
        let state = live(seed, 250);
        for instance in state.instances.iter() {
            terminated += usize::from(instance.terminated_ms.is_some());
            attached += instance.attachments.iter().filter(|a| !a.boot).count();
            let now = instance_state(&state, instance);
            stopped += usize::from(now == InstanceState::Stopped);
        }
    }
    // The days must have been eventful, or they prove nothing.
    if std::env::var("HOSTPLANE_SEED").is_err() {
        assert!(terminated > 0 && attached > 0 && stopped > 0, "{terminated} {attached} {stopped}");
    }
}

/// Writes one record behind the core's back, and expects the check to see it.
fn caught(spoil: impl FnOnce(&mut Day) -> control::record::Instance) -> bool {
    let mut day = Day::new(7);
    let register = ("Action", "RegisterImage".to_owned());
    let named = ("Name", "first".to_owned());
    day.call(&[register, named, ("ImageLocation", "tiny".to_owned())]).unwrap();
    let image = day.state.images.iter().next().unwrap().id.to_string();
    let run = [
        ("Action", "RunInstances".to_owned()),
        ("ImageId", image),
        ("MinCount", "2".to_owned()),
        ("MaxCount", "2".to_owned()),
        ("InstanceType", "t3.nano".to_owned()),
    ];
    day.call(&run).unwrap();
    day.check();
    let spoiled = spoil(&mut day);
    day.change(|c, d| {
        d.plan.put(c.state, &spoiled);
        Ok(())
    })
    .unwrap();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| day.check())).is_err()
}

/// One instance whose host counts `starts` starts when control asks for its end,
/// and none when it says `terminated`.
fn ends(seed: u64, starts: u64, delete_on_termination: bool) {
    let action = |name: &str| ("Action", name.to_owned());
    let mut day = Day::new(seed);
    let named = ("Name", "first".to_owned());
    day.call(&[action("RegisterImage"), named, ("ImageLocation", "tiny".to_owned())]).unwrap();
    let image = day.state.images.iter().next().unwrap().id.to_string();
    day.call(&[
        action("RunInstances"),
        ("ImageId", image),
        ("MinCount", "1".to_owned()),
        ("MaxCount", "1".to_owned()),
        ("InstanceType", "t3.nano".to_owned()),
        ("BlockDeviceMapping.1.DeviceName", "/dev/xvda".to_owned()),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", delete_on_termination.to_string()),
    ])
    .unwrap();
    let instance = day.state.instances.iter().next().unwrap().clone();
    let volume = instance.attachments[0].volume;
    day.call(&[action("AllocateAddress")]).unwrap();
    let allocation = day.state.addresses.iter().next().unwrap().allocation.to_string();
    let id = instance.id.to_string();
    day.call(&[
        action("AssociateAddress"),
        ("AllocationId", allocation),
        ("InstanceId", id.clone()),
    ])
    .unwrap();

    let say = |day: &mut Day, state, starts, volumes| {
        let context = Context { state: &day.state, settings: &day.settings, now_ms: day.now_ms };
        let observed = Observed {
            revision: desired(&context, HOST).revision,
            instances: vec![ObservedInstance {
                id: instance.id,
                state,
                starts,
                reboots: 0,
                reason: None,
                attachments: Vec::new(),
            }],
            volumes,
            ..day.observed.clone()
        };
        assert!(day.change(|c, d| Ok(observe(c, HOST, &observed, d))).unwrap());
        day.check();
    };
    let there = || {
        vec![ObservedVolume {
            id: volume,
            state: VolumeState::Available,
            reason: None,
            size_bytes: 0,
        }]
    };
    let first = if starts == 0 { InstanceState::Pending } else { InstanceState::Running };
    say(&mut day, first, starts, there());
    day.call(&[action("TerminateInstances"), ("InstanceId.1", id)]).unwrap();
    say(&mut day, InstanceState::ShuttingDown, 0, there());
    let now = |day: &Day| {
        let instance = day.state.instances.get(instance.id).unwrap();
        (instance.terminated_ms.is_some(), instance_state(&day.state, instance))
    };
    assert_eq!(now(&day), (false, InstanceState::ShuttingDown));
    say(&mut day, InstanceState::Terminated, 0, there());

    assert_eq!(now(&day), (true, InstanceState::Terminated));
    assert!(day.state.addresses.iter().all(|a| a.association.is_none()));
    let context = Context { state: &day.state, settings: &day.settings, now_ms: day.now_ms };
    let wish = desired(&context, HOST);
    assert!(wish.instances.is_empty() && wish.network.interfaces.is_empty());
    assert_eq!(wish.volumes[0].deleted, delete_on_termination);
    say(&mut day, InstanceState::Terminated, 0, Vec::new());
    assert_eq!(day.state.volumes.get(volume).is_none(), delete_on_termination);
}

#[test]
fn an_instance_that_ends_before_its_first_start_lets_go_of_all() {
    ends(11, 0, true);
    ends(12, 0, false);
}

#[test]
fn an_end_is_believed_of_an_agent_that_lost_its_memory() {
    ends(13, 1, true);
    ends(14, 1, false);
}

#[test]
fn planted_mistakes_are_caught() {
    let both = |day: &Day| {
        let mut all = day.state.instances.iter().cloned();
        (all.next().unwrap(), all.next().unwrap())
    };
    assert!(caught(|day| {
        let (mut one, other) = both(day);
        one.uid = other.uid;
        one
    }));
    assert!(caught(|day| {
        let (mut one, other) = both(day);
        one.attachments.clone_from(&other.attachments);
        one
    }));
    assert!(caught(|day| {
        let (mut one, other) = both(day);
        let address = other.interfaces[0].address;
        one.interfaces[0].address = address;
        one
    }));
    // Forgets to let go of what the instance held.
    assert!(caught(|day| {
        let (mut one, _) = both(day);
        one.terminated_ms = Some(day.now_ms);
        one
    }));
}

#[test]
fn each_interface_reaches_its_host_and_the_metadata_names_them_all() {
    let mut day = Day::new(7);
    let call = |day: &mut Day, form: &[(&str, &str)]| {
        let form: Vec<_> = form.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        day.call(&form).unwrap();
    };
    call(&mut day, &[("Action", "RegisterImage"), ("Name", "first"), ("ImageLocation", "tiny")]);
    let image = day.state.images.iter().next().unwrap().id.to_string();
    call(
        &mut day,
        &[
            ("Action", "RunInstances"),
            ("ImageId", &image),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("InstanceType", "t3.micro"),
            ("NetworkInterface.1.DeviceIndex", "1"),
            ("NetworkInterface.1.SecondaryPrivateIpAddressCount", "1"),
            ("NetworkInterface.2.DeviceIndex", "0"),
        ],
    );
    call(&mut day, &[("Action", "AllocateAddress")]);
    let launched = day.state.instances.iter().next().unwrap().interfaces.clone();
    let [first, second] = launched.as_slice() else { panic!("two interfaces were asked for") };
    let Some(address) = day.state.addresses.iter().next() else { panic!("an address") };
    let (allocation, elastic) = (address.allocation.to_string(), address.address);
    let (id, private) = (second.id.to_string(), second.secondary[0]);
    call(
        &mut day,
        &[
            ("Action", "AssociateAddress"),
            ("AllocationId", &allocation),
            ("NetworkInterfaceId", &id),
            ("PrivateIpAddress", &private.to_string()),
        ],
    );
    let context = Context { state: &day.state, settings: &day.settings, now_ms: day.now_ms };
    let wish = desired(&context, HOST);
    let attached: Vec<_> = wish.instances[0].interfaces.iter().map(|n| (n.id, n.mac)).collect();
    assert_eq!(attached, [(first.id, first.mac), (second.id, second.mac)]);
    let [one, two] = wish.network.interfaces.as_slice() else { panic!("two interfaces") };
    assert_eq!((one.elastic, two.elastic), (None, None));
    assert_eq!((one.rates_of, two.rates_of), (None, Some(first.id)));
    assert!(one.rates.outgoing.is_some() && two.rates == Default::default());
    assert_eq!(two.secondary.len(), 1);
    assert_eq!((two.secondary[0].address, two.secondary[0].elastic), (private, Some(elastic)));
    assert_eq!(one.metadata, two.metadata);
    let documents = two.metadata.as_ref().unwrap();
    assert_eq!(documents["meta-data/mac"], first.mac.to_string());
    assert!(!documents.contains_key("meta-data/public-ipv4"));
    for (number, interface) in [first, second].into_iter().enumerate() {
        let told = |what: &str| {
            let path = format!("meta-data/network/interfaces/macs/{}/{what}", interface.mac);
            documents.get(&path).cloned().unwrap_or_default()
        };
        assert_eq!(told("device-number"), number.to_string());
        assert_eq!(told("interface-id"), interface.id.to_string());
        assert_eq!(told("subnet-id"), interface.subnet.to_string());
        let all: Vec<_> = interface.addresses().map(|a| a.to_string()).collect();
        assert_eq!(told("local-ipv4s"), all.join("\n"));
        let public = if number == 1 { elastic.to_string() } else { String::new() };
        assert_eq!(told("public-ipv4s"), public);
        let association = told(&format!("ipv4-associations/{elastic}"));
        assert_eq!(association, if number == 1 { private.to_string() } else { String::new() });
    }
}

#[test]
fn the_guide_is_what_the_actions_say() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/ec2-actions.md");
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == control::core::guide_page(),
        "{}: run `cargo run -p control -- guide >docs/guide/ec2-actions.md`",
        path.display()
    );
}

#[test]
fn the_definitions_and_the_model_name_the_same_actions() {
    let list = include_str!("../model/actions.txt");
    let model: BTreeSet<&str> = list.split_whitespace().collect();
    let ours: BTreeSet<&str> = control::core::ACTIONS.iter().map(|a| a.name).collect();
    assert_eq!(model, ours);
    assert!(ours.iter().all(|name| control::api::is_action(name)));
}
