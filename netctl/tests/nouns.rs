//! What netctl's nouns say to `control`, and what they make of its answers: the
//! real program against a control socket that answers as it was told.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use percent_encoding::percent_decode_str;
use rpc::server::{ControlListener, Peer};
use serde_json::{Value, json};
use tempfile::TempDir;

type Form = BTreeMap<String, String>;

#[derive(Default)]
struct Script {
    answers: HashMap<String, VecDeque<(StatusCode, String)>>,
    calls: Vec<Form>,
}

struct Control {
    dir: TempDir,
    script: Arc<Mutex<Script>>,
    _runtime: tokio::runtime::Runtime,
}

impl Control {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = Arc::new(Mutex::new(Script::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let socket = dir.path().join("control.sock");
        let shared = Arc::clone(&script);
        let answer = move |body: String| {
            let form: Form = body
                .split('&')
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap();
                    let decode =
                        |t: &str| percent_decode_str(t).decode_utf8().unwrap().into_owned();
                    (decode(name), decode(value))
                })
                .collect();
            let mut script = shared.lock().unwrap();
            let action = form["Action"].clone();
            script.calls.push(form);
            let queue = script.answers.get_mut(&action);
            let answer = queue.and_then(VecDeque::pop_front).unwrap_or_else(|| {
                (StatusCode::NOT_IMPLEMENTED, format!("no answer was written for {action}"))
            });
            async move { answer }
        };
        let router = Router::new().route("/", post(answer));
        let listener = runtime.block_on(async { ControlListener::bind(&socket).unwrap() });
        runtime.spawn(async move {
            axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
        });
        Self { dir, script, _runtime: runtime }
    }

    /// The next answer to `action`: `inner` inside its response element.
    fn answers(&self, action: &str, inner: &str) -> &Self {
        let xml = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?><{action}Response \
             xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>r</requestId>{inner}</{action}Response>"
        );
        self.push(action, StatusCode::OK, xml)
    }

    fn refuses(&self, action: &str, code: &str, message: &str) -> &Self {
        let xml = format!(
            "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>\
             <RequestID>r</RequestID></Response>"
        );
        self.push(action, StatusCode::BAD_REQUEST, xml)
    }

    fn push(&self, action: &str, status: StatusCode, body: String) -> &Self {
        let mut script = self.script.lock().unwrap();
        script.answers.entry(action.to_owned()).or_default().push_back((status, body));
        self
    }

    fn netctl(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_netctl"))
            .args(words)
            .env("HOSTPLANE_RUN_DIR", self.dir.path())
            .env("HOSTPLANE_STATE_DIR", self.dir.path().join("state"))
            .env_remove("HOSTPLANE_NAME")
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    fn succeeds(&self, words: &[&str]) -> String {
        let output = self.netctl(words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "netctl {words:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        let text = self.succeeds(words);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    fn fails(&self, words: &[&str], code: i32) -> String {
        let output = self.netctl(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "netctl {words:?}: {error}");
        assert!(output.stdout.is_empty(), "a failure leaves stdout empty");
        error
    }

    /// What the last call of `action` said, besides the action and the version.
    fn said(&self, action: &str) -> Vec<(String, String)> {
        let script = self.script.lock().unwrap();
        let call = script.calls.iter().rev().find(|c| c["Action"] == action).unwrap();
        assert_eq!(call["Version"], "2016-11-15");
        call.iter()
            .filter(|(k, _)| *k != "Action" && *k != "Version")
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    }
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut pairs: Vec<_> =
        expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    pairs.sort();
    pairs
}

fn instance(id: &str, state: &str) -> String {
    format!(
        "<item><instanceId>{id}</instanceId><imageId>ami-1</imageId><instanceState><code>0</code>\
         <name>{state}</name></instanceState><instanceType>t3.micro</instanceType>\
         <privateIpAddress>172.31.0.4</privateIpAddress><groupSet><item><groupId>sg-1</groupId>\
         <groupName>web</groupName></item></groupSet><blockDeviceMapping><item>\
         <deviceName>/dev/sdf</deviceName><ebs><volumeId>vol-1</volumeId><status>attached</status>\
         </ebs></item></blockDeviceMapping><tagSet><item><key>Name</key><value>a &amp; b</value>\
         </item></tagSet></item>"
    )
}

fn described(instances: &str) -> String {
    format!(
        "<reservationSet><item><instancesSet>{instances}</instancesSet></item></reservationSet>"
    )
}

#[test]
fn a_launch_finds_image_and_group_by_name_and_prints_the_id() {
    let control = Control::new();
    control
        .answers(
            "DescribeImages",
            "<imagesSet><item><imageId>ami-1</imageId><name>tiny</name>\
             <rootDeviceName>/dev/vda</rootDeviceName></item></imagesSet>",
        )
        .answers(
            "DescribeSecurityGroups",
            "<securityGroupInfo><item><groupId>sg-1</groupId></item></securityGroupInfo>",
        )
        .answers(
            "RunInstances",
            &format!("<instancesSet>{}</instancesSet>", instance("i-1", "pending")),
        );
    let user_data = control.dir.path().join("user-data");
    std::fs::write(&user_data, "#!/bin/sh\n").unwrap();
    let stdout = control.succeeds(&[
        "instance",
        "launch",
        "--image",
        "tiny",
        "--type",
        "t3.small",
        "--key",
        "me",
        "--group",
        "web",
        "--group",
        "sg-2",
        "--tag",
        "Name=a & b",
        "--root-size",
        "3",
        "--user-data",
        user_data.to_str().unwrap(),
        "-o",
        "id",
    ]);
    assert_eq!(stdout, "i-1\n");
    assert_eq!(
        control.said("DescribeImages"),
        pairs(&[("Filter.1.Name", "name"), ("Filter.1.Value.1", "tiny")])
    );
    assert_eq!(
        control.said("RunInstances"),
        pairs(&[
            ("ImageId", "ami-1"),
            ("InstanceType", "t3.small"),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("KeyName", "me"),
            ("SecurityGroupId.1", "sg-2"),
            ("SecurityGroupId.2", "sg-1"),
            ("UserData", "IyEvYmluL3NoCg=="),
            ("BlockDeviceMapping.1.DeviceName", "/dev/vda"),
            ("BlockDeviceMapping.1.Ebs.VolumeSize", "3"),
            ("TagSpecification.1.ResourceType", "instance"),
            ("TagSpecification.1.Tag.1.Key", "Name"),
            ("TagSpecification.1.Tag.1.Value", "a & b"),
        ])
    );
}

#[test]
fn a_launch_that_waits_looks_until_the_instance_runs_and_shows_it_as_it_is_then() {
    let control = Control::new();
    control
        .answers("DescribeImages", "<imagesSet><item><imageId>ami-1</imageId></item></imagesSet>")
        .answers(
            "RunInstances",
            &format!("<instancesSet>{}</instancesSet>", instance("i-1", "pending")),
        )
        .answers("DescribeInstances", &described(&instance("i-1", "pending")))
        .answers("DescribeInstances", &described(&instance("i-1", "running")))
        .answers("DescribeInstances", &described(&instance("i-1", "running")));
    let shown = control.json(&["instance", "launch", "--image", "ami-1", "--wait", "-o", "json"]);
    assert_eq!(shown[0]["state"], "running");
}

#[test]
fn a_listing_follows_its_pages_and_has_one_shape_in_json_and_in_columns() {
    let control = Control::new();
    let page = |id| described(&instance(id, "running"));
    for _ in 0..2 {
        control
            .answers("DescribeInstances", &(page("i-1") + "<nextToken>more</nextToken>"))
            .answers("DescribeInstances", &page("i-2"));
    }
    let shown = control.json(&["instance", "list", "-o", "json"]);
    assert_eq!(control.said("DescribeInstances"), pairs(&[("NextToken", "more")]));
    assert_eq!(
        shown[0],
        json!({
            "id": "i-1", "name": "a & b", "state": "running", "type": "t3.micro",
            "private_address": "172.31.0.4", "public_address": null, "image": "ami-1", "key": null,
            "groups": ["sg-1"], "zone": null, "launched_at": null, "vpc": null, "subnet": null,
            "interfaces": [], "root_device": null, "reason": null, "tags": { "Name": "a & b" },
            "volumes": [{ "device": "/dev/sdf", "volume": "vol-1", "state": "attached" }],
        })
    );
    assert_eq!(shown[1]["id"], "i-2");
    let table = control.succeeds(&["instance", "list"]);
    assert_eq!(
        table,
        "INSTANCE  NAME   STATE    TYPE      PRIVATE     PUBLIC  IMAGE\n\
         i-1       a & b  running  t3.micro  172.31.0.4  -       ami-1\n\
         i-2       a & b  running  t3.micro  172.31.0.4  -       ami-1\n"
    );
}

#[test]
fn a_refusal_names_the_object_the_code_and_what_to_type_next() {
    let control = Control::new();
    let message = "The instance ID 'i-9' does not exist";
    control.refuses("TerminateInstances", "InvalidInstanceID.NotFound", message);
    let error = control.fails(&["instance", "terminate", "i-9"], 1);
    assert_eq!(
        error,
        format!(
            "netctl: instance i-9: terminate: InvalidInstanceID.NotFound: {message}\n  next: netctl instance list\n"
        )
    );
}

#[test]
fn an_answer_that_is_not_xml_is_told_as_such() {
    let control = Control::new();
    control.push("DescribeVpcs", StatusCode::OK, "<html>".to_owned());
    let error = control.fails(&["vpc", "list"], 1);
    assert!(
        error.contains("not well-formed XML") && error.contains("netctl logs control"),
        "{error}"
    );
}

#[test]
fn without_a_control_daemon_the_advice_is_to_start_it() {
    let control = Control::new();
    std::fs::remove_file(control.dir.path().join("control.sock")).unwrap();
    let error = control.fails(&["volume", "list"], 1);
    assert!(error.contains("volumes: list") && error.contains("next: "), "{error}");
}

#[test]
fn waiting_for_what_cannot_come_ends_at_once_with_the_reason() {
    let control = Control::new();
    let gone = instance("i-1", "terminated").replace(
        "<tagSet>",
        "<stateReason><message>Server.InternalError: no room</message></stateReason><tagSet>",
    );
    control.answers("DescribeInstances", &described(&gone));
    let error = control.fails(&["instance", "wait", "i-1", "--for", "running"], 1);
    assert!(error.contains("i-1 is terminated: Server.InternalError: no room"), "{error}");
}

#[test]
fn a_name_that_two_instances_have_is_not_guessed_at() {
    let control = Control::new();
    let both = instance("i-1", "running") + &instance("i-2", "running");
    control.answers("DescribeInstances", &described(&both));
    let error = control.fails(&["instance", "stop", "web"], 1);
    assert!(error.contains("2 have that name: i-1, i-2"), "{error}");
}

#[test]
fn a_volume_is_attached_under_the_first_free_name() {
    let control = Control::new();
    control.answers("DescribeInstances", &described(&instance("i-1", "running"))).answers(
        "AttachVolume",
        "<volumeId>vol-2</volumeId><instanceId>i-1</instanceId><device>/dev/sdg</device>\
             <status>attaching</status>",
    );
    let shown = control.json(&["volume", "attach", "vol-2", "i-1", "-o", "json"]);
    assert_eq!(
        control.said("AttachVolume"),
        pairs(&[("VolumeId", "vol-2"), ("InstanceId", "i-1"), ("Device", "/dev/sdg")])
    );
    assert_eq!(
        shown,
        json!({ "id": "vol-2", "instance": "i-1", "device": "/dev/sdg", "state": "attaching" })
    );
}

#[test]
fn a_volume_is_created_in_the_first_zone() {
    let control = Control::new();
    control
        .answers(
            "DescribeAvailabilityZones",
            "<availabilityZoneInfo><item><zoneName>local-1a</zoneName></item></availabilityZoneInfo>",
        )
        .answers("CreateVolume", "<volumeId>vol-2</volumeId><size>2</size><status>creating</status>");
    assert_eq!(control.succeeds(&["volume", "create", "--size", "2", "-o", "id"]), "vol-2\n");
    assert_eq!(
        control.said("CreateVolume"),
        pairs(&[("AvailabilityZone", "local-1a"), ("Size", "2")])
    );
}

#[test]
fn rules_are_listed_with_their_ids_peers_and_descriptions() {
    let control = Control::new();
    let rules = "<securityGroupRuleSet><item><securityGroupRuleId>sgr-1</securityGroupRuleId>\
        <groupId>sg-1</groupId><isEgress>false</isEgress><ipProtocol>tcp</ipProtocol>\
        <fromPort>22</fromPort><toPort>22</toPort><cidrIpv4>203.0.113.0/24</cidrIpv4>\
        <description>ssh</description></item><item><securityGroupRuleId>sgr-2</securityGroupRuleId>\
        <groupId>sg-1</groupId><isEgress>true</isEgress><ipProtocol>-1</ipProtocol>\
        <referencedGroupInfo><groupId>sg-2</groupId></referencedGroupInfo></item>\
        </securityGroupRuleSet>";
    control.answers("DescribeSecurityGroupRules", rules);
    let shown = control.json(&["group", "rules", "sg-1", "-o", "json"]);
    assert_eq!(
        control.said("DescribeSecurityGroupRules"),
        pairs(&[("Filter.1.Name", "group-id"), ("Filter.1.Value.1", "sg-1")])
    );
    assert_eq!(
        shown,
        json!([
            { "id": "sgr-1", "group": "sg-1", "egress": false, "protocol": "tcp",
              "first_port": 22, "last_port": 22, "peer": "203.0.113.0/24", "description": "ssh" },
            { "id": "sgr-2", "group": "sg-1", "egress": true, "protocol": "-1",
              "first_port": null, "last_port": null, "peer": "sg-2", "description": null },
        ])
    );
}

#[test]
fn a_rule_is_said_in_ec2s_form_for_each_direction_and_kind_of_peer() {
    let control = Control::new();
    let group = "<securityGroupInfo><item><groupId>sg-1</groupId><groupName>web</groupName>\
        <ipPermissions><item><ipProtocol>tcp</ipProtocol><fromPort>22</fromPort><toPort>22</toPort>\
        <ipRanges><item><cidrIp>203.0.113.0/24</cidrIp></item></ipRanges></item></ipPermissions>\
        </item></securityGroupInfo>";
    control
        .answers("AuthorizeSecurityGroupIngress", "<return>true</return>")
        .answers("DescribeSecurityGroups", group);
    let shown = control.json(&[
        "group",
        "authorize",
        "sg-1",
        "-p",
        "tcp",
        "--port",
        "22",
        "--cidr",
        "203.0.113.0/24",
        "-o",
        "json",
    ]);
    assert_eq!(
        control.said("AuthorizeSecurityGroupIngress"),
        pairs(&[
            ("GroupId", "sg-1"),
            ("IpPermissions.1.IpProtocol", "tcp"),
            ("IpPermissions.1.FromPort", "22"),
            ("IpPermissions.1.ToPort", "22"),
            ("IpPermissions.1.IpRanges.1.CidrIp", "203.0.113.0/24"),
        ])
    );
    assert_eq!(
        shown["ingress"],
        json!([{ "protocol": "tcp", "first_port": 22, "last_port": 22, "cidrs": ["203.0.113.0/24"],
                 "cidrs_v6": [], "groups": [] }])
    );
    control
        .answers("DescribeSecurityGroups", group)
        .answers("RevokeSecurityGroupEgress", "<return>true</return>")
        .answers("DescribeSecurityGroups", group);
    control.succeeds(&["sg", "revoke", "sg-1", "--egress", "-p", "all", "--source", "web"]);
    assert_eq!(
        control.said("RevokeSecurityGroupEgress"),
        pairs(&[
            ("GroupId", "sg-1"),
            ("IpPermissions.1.IpProtocol", "-1"),
            ("IpPermissions.1.Groups.1.GroupId", "sg-1"),
        ])
    );
}

#[test]
fn a_private_key_is_for_its_owner_only_and_overwrites_nothing() {
    let control = Control::new();
    let file = control.dir.path().join("me.pem");
    control.refuses("CreateKeyPair", "InvalidKeyPair.Duplicate", "it exists");
    control.fails(&["key", "create", "me", "--file", "me.pem"], 1);
    assert!(!file.exists(), "an empty key file was left");
    let key = "<keyPairId>key-1</keyPairId><keyName>me</keyName><keyMaterial>-----BEGIN\nx\n-----END\n</keyMaterial>";
    control.answers("CreateKeyPair", key);
    assert_eq!(
        control.succeeds(&["key", "create", "me", "--file", "me.pem", "-o", "id"]),
        "key-1\n"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "-----BEGIN\nx\n-----END\n");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let error = control.fails(&["key", "create", "me", "--file", "me.pem"], 2);
    assert!(error.contains("File exists"), "{error}");
    control.answers("CreateKeyPair", key);
    assert_eq!(control.succeeds(&["key", "create", "me"]), "-----BEGIN\nx\n-----END\n");
}

#[test]
fn an_address_is_found_by_itself_or_by_its_allocation() {
    let control = Control::new();
    let address = "<addressesSet><item><publicIp>198.51.100.129</publicIp>\
        <allocationId>eipalloc-1</allocationId></item></addressesSet>";
    control
        .answers("DescribeAddresses", address)
        .answers("AssociateAddress", "<associationId>eipassoc-1</associationId>")
        .answers("DescribeAddresses", address);
    let id = control.succeeds(&["eip", "associate", "198.51.100.129", "i-1", "-o", "id"]);
    assert_eq!(id, "eipassoc-1\n");
    assert_eq!(
        control.said("AssociateAddress"),
        pairs(&[
            ("AllocationId", "eipalloc-1"),
            ("InstanceId", "i-1"),
            ("AllowReassociation", "false")
        ])
    );
    let error = control.fails(&["address", "disassociate", "eipalloc-1"], 1);
    assert!(error.contains("associated with nothing"), "{error}");
}

#[test]
fn a_wrong_argument_is_refused_before_anything_is_asked() {
    let control = Control::new();
    for words in [
        &["volume", "create", "--size", "0"][..],
        &["group", "authorize", "web", "-p", "tpc", "--cidr", "10.0.0.0/8"],
        &["group", "authorize", "web", "-p", "tcp"],
        &["instance", "launch", "--image", "tiny", "--tag", "web"],
        &["instance", "wait", "i-1", "--for", "flying"],
        &["why", "web"],
    ] {
        control.fails(words, 2);
    }
    assert!(control.script.lock().unwrap().calls.is_empty());
}
