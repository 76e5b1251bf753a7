//! Options of `up` that are passed on to `control` as they are.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

use crate::failure::{Failure, Outcome};

#[derive(Debug, Clone, Args)]
pub struct Packets {
    /// A name server that the host asks for what is no guest's name, several with commas [default: those of /etc/resolv.conf]
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    pub dns: Vec<IpAddr>,

    /// Rules of a security group each way [default: 60]; times the groups of an interface, 1000 at most
    #[arg(long, value_name = "RULES")]
    pub rules_a_group: Option<u32>,

    /// Security groups of an interface, 16 at most [default: 5]
    #[arg(long, value_name = "GROUPS")]
    pub groups_an_interface: Option<u32>,

    /// A folder for flow logs of all interfaces, written by the dataplane
    #[arg(long, value_name = "DIRECTORY")]
    pub flow_log: Option<PathBuf>,

    /// Format of the flow log: AWS's version 2, or its fields as JSON
    #[arg(long, value_parser = ["aws", "json"], requires = "flow_log")]
    pub flow_log_format: Option<String>,

    /// Seconds of an interval of the flow log [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400), requires = "flow_log")]
    pub flow_log_interval: Option<u32>,

    /// Whether XDP drops early on the uplink [default: unless it is a veth]
    #[arg(long, value_name = "BOOL")]
    pub early_drop: Option<bool>,

    /// Block sources that cannot be in the internet
    #[arg(long)]
    pub bogons: bool,

    /// Packets a second that may open a flow, of one source; needs the early drop
    #[arg(long, value_name = "PACKETS", value_parser = clap::value_parser!(u64).range(1..))]
    pub source_packets: Option<u64>,

    /// The uplink hands over complete checksums: let XDP deliver packets of established flows
    #[arg(long)]
    pub fast_path: bool,
}

impl Packets {
    pub fn arguments(&self) -> Outcome<Vec<String>> {
        let mut all = Vec::new();
        let mut push = |option: &str, value: Option<String>| {
            if let Some(value) = value {
                all.extend([option.to_owned(), value]);
            }
        };
        for address in &self.dns {
            push("--dns", Some(address.to_string()));
        }
        if let Some(directory) = &self.flow_log {
            let text = directory.to_str().filter(|_| directory.is_absolute());
            let text = text.ok_or_else(|| {
                Failure::unfit(format!(
                    "--flow-log {}: give an absolute path in UTF-8",
                    directory.display()
                ))
            })?;
            push("--flow-log", Some(text.to_owned()));
        }
        push("--rules-a-group", self.rules_a_group.map(|n| n.to_string()));
        push("--groups-an-interface", self.groups_an_interface.map(|n| n.to_string()));
        push("--flow-log-format", self.flow_log_format.clone());
        push("--flow-log-interval", self.flow_log_interval.map(|n| n.to_string()));
        push("--early-drop", self.early_drop.map(|b| b.to_string()));
        push("--source-packets", self.source_packets.map(|n| n.to_string()));
        if self.bogons {
            all.push("--bogons".to_owned());
        }
        if self.fast_path {
            all.push("--fast-path".to_owned());
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::Packets;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        packets: Packets,
    }

    #[test]
    fn what_is_not_said_is_not_passed_on() {
        let of = |words: &[&str]| {
            let line = Line::try_parse_from([&["up"], words].concat()).unwrap();
            line.packets.arguments().map_err(|e| e.to_string())
        };
        assert_eq!(of(&[]).unwrap(), Vec::<String>::new());
        let words = ["--flow-log", "/l", "--flow-log-interval", "60", "--source-packets", "9"];
        assert_eq!(of(&words).unwrap(), words);
        assert_eq!(of(&["--bogons", "--fast-path", "--early-drop", "true"]).unwrap().len(), 4);
        let two = of(&["--dns", "192.0.2.1,192.0.2.2"]).unwrap();
        assert_eq!(two, ["--dns", "192.0.2.1", "--dns", "192.0.2.2"]);
        let limits = ["--rules-a-group", "62", "--groups-an-interface", "16"];
        assert_eq!(of(&limits).unwrap(), limits);
        assert!(of(&["--flow-log", "l"]).is_err());
    }
}
