//! The world as iptables has it, a line a rule: what most hosts still run. The state
//! of the connection first, then every rule in turn, those of the measured instance last.

use std::fmt::Write;
use std::process::Command;

use crate::packet::scene::{UPLINK, feed};
use crate::packet::world::World;

/// Puts it in force in the namespace that the thread is in.
pub fn apply(world: &World) -> anyhow::Result<()> {
    feed(&mut Command::new("iptables-legacy-restore"), &ruleset(world))
}

pub fn ruleset(world: &World) -> String {
    let (mut inward, mut outward, mut rules) = (String::new(), String::new(), String::new());
    for instance in world.instances.iter().rev() {
        let (own, elastic) = (instance.address, instance.elastic);
        let _ = writeln!(inward, "-A PREROUTING -i {UPLINK} -d {elastic} -j DNAT --to {own}");
        let _ = writeln!(outward, "-A POSTROUTING -o {UPLINK} -s {own} -j SNAT --to {elastic}");
        for rule in &instance.rules {
            let (protocol, from, port) = (rule.protocol, rule.peer, rule.port);
            let _ = writeln!(
                rules,
                "-A FORWARD -d {own} -s {from} -p {protocol} --dport {port} -j ACCEPT"
            );
        }
    }
    format!(
        "*nat\n{inward}{outward}COMMIT\n*filter\n:FORWARD DROP\n\
         -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
         -A FORWARD ! -i {UPLINK} -j ACCEPT\n{rules}COMMIT\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_a_line_and_the_measured_instances_come_last() {
        let world = World::with_rules(1500);
        let text = ruleset(&world);
        let lines = text.lines().filter(|l| l.contains("--dport")).count();
        assert_eq!(lines, 1500);
        let last = text.lines().rfind(|l| l.contains("--dport")).unwrap();
        assert!(last.contains("198.18.0.0/16") && last.contains("5201"), "{last}");
    }
}
