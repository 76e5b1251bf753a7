//! What the daemon was told when it was started.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub region: String,
    pub zone: String,
    /// The host that instances are placed on.
    pub host: String,
    pub uplink: Option<rpc::dataplane::Uplink>,
    pub elastic_range: Option<Ipv4Net>,
    /// Addresses of the range that others have: the uplink's own, its gateway.
    pub elastic_reserved: Vec<Ipv4Addr>,
    pub flow_log: Option<rpc::dataplane::FlowLog>,
    /// Who is asked for names that are of no network here.
    pub name_servers: Vec<IpAddr>,
    /// How many rules a group may have, and how many groups an interface.
    pub rule_limits: model::RuleLimits,
    /// Where the API is reached: `http://127.0.0.1:8773`.
    pub endpoint: String,
}

impl Settings {
    /// The part of the store's keys that is this region's.
    pub fn prefix(&self) -> String {
        format!("/r/{}/", self.region)
    }

    /// A change of these changes what hosts must do.
    pub fn fingerprint(&self) -> String {
        format!(
            "{:?} {} {} {:?}",
            self.uplink,
            self.region,
            self.zone,
            (&self.elastic_range, &self.name_servers, &self.flow_log)
        )
    }
}
