//! `netctl flow`: what the packet path drops and lets in, and by which rules.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;
use rpc::dataplane::{AclDenied, Observed, Routed, RuleHits, Seen};
use serde_json::json;

use crate::api::Session;
use crate::failure::Outcome;
use crate::output::{self, Format};
use crate::why;

#[derive(Debug, Subcommand)]
pub enum Flow {
    /// Show dropped packets and new flows as they come, with the rules that decided
    #[command(after_help = "EXAMPLES:
  netctl flow observe --drops --instance web
  netctl flow observe --follow -o json")]
    Observe {
        /// Only what is dropped
        #[arg(long)]
        drops: bool,
        /// Only of this instance, or of this interface
        #[arg(long, value_name = "INSTANCE")]
        instance: Option<String>,
        /// Go on until interrupted
        #[arg(long, short)]
        follow: bool,
        /// Without --follow: how long
        #[arg(long, default_value_t = 5, value_name = "SECONDS")]
        seconds: u64,
    },
    /// Count the flows that each rule let in
    #[command(after_help = "EXAMPLES:\n  netctl flow rules\n  netctl flow rules --never-hit")]
    Rules {
        /// Only rules that let in none since they are counted
        #[arg(long)]
        never_hit: bool,
    },
}

pub fn run(session: &Session, noun: &Flow) -> Outcome {
    match noun {
        Flow::Observe { drops, instance, follow, seconds } => {
            let limit = (!follow).then(|| Duration::from_secs(*seconds));
            observe(session, *drops, instance.as_deref(), limit)
        }
        Flow::Rules { never_hit } => rules(session, *never_hit),
    }
}

fn observe(
    session: &Session,
    drops: bool,
    instance: Option<&str>,
    limit: Option<Duration>,
) -> Outcome {
    let deed = "flow: observe";
    let interface = instance.map(|name| why::interface(session, name)).transpose()?;
    let client = session.daemon("dataplane");
    let json = session.format == Format::Json;
    let observing = client.dataplane_observe(interface, drops, |observed| {
        tell(&observed, json);
        true
    });
    let observed = crate::wait_for(async {
        match limit {
            None => observing.await,
            Some(limit) => tokio::time::timeout(limit, observing).await.unwrap_or(Ok(())),
        }
    });
    observed.map_err(|e| session.unreachable(deed, e))
}

fn tell(observed: &Observed, json: bool) {
    match observed {
        _ if json => output::line(&serde_json::to_string(observed).unwrap_or_default()),
        Observed::LeftOut(count) => output::note(&format!("{count} more at once: not shown")),
        Observed::Seen(seen) => output::line(&line(seen)),
    }
}

/// A packet on one line: verdict, reason, ends, rules.
fn line(seen: &Seen) -> String {
    let word = if seen.allowed { "allowed" } else { "dropped" };
    let end = |address: Option<std::net::IpAddr>, port: Option<u16>| match (address, port) {
        (Some(address), Some(port)) => format!("{address}:{port}"),
        (Some(address), None) => address.to_string(),
        _ => "-".into(),
    };
    let protocol = match seen.protocol {
        Some(1) => "icmp".into(),
        Some(6) => "tcp".into(),
        Some(17) => "udp".into(),
        Some(number) => format!("protocol {number}"),
        None => "no IP".into(),
    };
    let rules = [("egress", seen.egress_rule), ("ingress", seen.ingress_rule)];
    let rules: String =
        rules.iter().filter_map(|(way, rule)| rule.map(|rule| format!(" {way} {rule}"))).collect();
    let routed = seen.routed.map_or_else(String::new, |Routed { table, destination }| {
        let by = destination.map_or_else(|| "none".into(), |d| d.to_string());
        format!(" route {table} {by}")
    });
    let denied = seen.denied.map_or_else(String::new, |AclDenied { acl, entry }| {
        format!(" acl {acl} {}", entry.map_or_else(|| "*".into(), |n| n.to_string()))
    });
    let translated = seen.translated.map_or_else(String::new, |t| {
        let port = t.port.map(|port| format!(":{port}")).unwrap_or_default();
        format!(" nat {} {}{port}", t.gateway, t.address)
    });
    let listed: String = seen.listed.iter().map(|l| format!(" list {l}")).collect();
    let interfaces: Vec<String> = seen.interfaces.iter().map(ToString::to_string).collect();
    format!(
        "{}.{:03} {word} {}: {protocol} {} > {} on {} [{}]{rules}{listed}{routed}{translated}{denied}",
        seen.time_ms / 1000,
        seen.time_ms % 1000,
        seen.reason,
        end(seen.source, seen.source_port),
        end(seen.destination, seen.destination_port),
        seen.device,
        interfaces.join(" "),
    )
}

fn rules(session: &Session, never_hit: bool) -> Outcome {
    let all = crate::wait_for(session.daemon("dataplane").dataplane_rules())
        .map_err(|e| session.unreachable("flow: list rules", e))?;
    let shown: Vec<&RuleHits> = all.iter().filter(|r| !never_hit || r.flows == 0).collect();
    if session.format == Format::Json {
        return output::json(&json!(shown));
    }
    // A rule of a group of several interfaces is one line.
    let mut rows: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for r in shown {
        let row = vec![
            r.rule.to_string(),
            r.group.to_string(),
            r.direction.to_string(),
            r.flows.to_string(),
        ];
        rows.insert((r.group.to_string(), r.rule.to_string()), row);
    }
    if session.format == Format::Id {
        rows.keys().for_each(|(_, rule)| output::line(rule));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = rows.into_values().collect();
    output::table(&["RULE", "GROUP", "DIRECTION", "FLOWS"], &rows);
    Ok(())
}

#[cfg(test)]
mod tests {
    use rpc::dataplane::Translated;

    use super::*;

    #[test]
    fn a_packet_is_one_line_with_all_that_decided() {
        let mut seen = Seen {
            time_ms: 1_700_000_000_042,
            interfaces: vec![model::InterfaceId::from_random(1)],
            allowed: true,
            reason: "new-flow".into(),
            egress_rule: None,
            ingress_rule: Some(model::RuleId::from_random(2)),
            device: "up0".into(),
            length: 60,
            protocol: Some(6),
            source: "192.0.2.1".parse().ok(),
            destination: "192.0.2.2".parse().ok(),
            source_port: Some(4000),
            destination_port: Some(22),
            routed: None,
            denied: None,
            translated: None,
            listed: vec![],
        };
        assert_eq!(
            line(&seen),
            "1700000000.042 allowed new-flow: tcp 192.0.2.1:4000 > 192.0.2.2:22 on up0 \
             [eni-00000000000000001] ingress sgr-00000000000000002"
        );
        seen.listed = vec![rpc::dataplane::Listed {
            list: model::PrefixListId::from_random(5),
            version: 3,
            net: "192.0.2.0/24".parse().unwrap(),
            description: "office".into(),
        }];
        let listed = " list pl-00000000000000005 version 3, 192.0.2.0/24 (office)";
        assert!(line(&seen).ends_with(listed), "{}", line(&seen));
        let (table, net) = (model::RouteTableId::from_random(3), "192.0.2.0/24".parse().ok());
        seen.routed = Some(Routed { table, destination: net });
        let routed = " route rtb-00000000000000003 192.0.2.0/24";
        assert!(line(&seen).ends_with(routed), "{}", line(&seen));
        let gateway = model::NatGatewayId::from_random(5);
        let address = "192.0.2.9".parse().unwrap();
        seen.translated = Some(Translated { gateway, address, port: Some(1025) });
        let nat = " 192.0.2.0/24 nat nat-00000000000000005 192.0.2.9:1025";
        assert!(line(&seen).ends_with(nat), "{}", line(&seen));
        let acl = model::NetworkAclId::from_random(4);
        seen.denied = Some(AclDenied { acl, entry: Some(100) });
        assert!(line(&seen).ends_with(" acl acl-00000000000000004 100"), "{}", line(&seen));
        seen.denied = Some(AclDenied { acl, entry: None });
        assert!(line(&seen).ends_with(" *"), "{}", line(&seen));
        (seen.protocol, seen.source, seen.source_port) = (None, None, None);
        assert!(line(&seen).contains("no IP - > "), "{}", line(&seen));
    }
}
