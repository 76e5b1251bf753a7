//! What this host's packets are told and spared: options of the daemon.

use std::path::PathBuf;

use rpc::dataplane::{FastPath, FlowLog, FlowLogFormat, Uplink};

use crate::record::OWNER_ID;

const FILE_BYTES_MAX: u64 = 64 << 20;
const FILES_KEPT: u32 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// AWS's version 2
    Aws,
    /// The same fields, a JSON object a line
    Json,
}

#[derive(Debug, Clone, clap::Args)]
pub struct Packets {
    /// A folder for flow logs of all interfaces; none are written without it.
    #[arg(long, value_name = "DIRECTORY")]
    pub flow_log: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "aws", requires = "flow_log")]
    pub flow_log_format: Format,
    /// Seconds of an interval of the flow log.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub flow_log_interval: u32,
    /// Whether XDP drops early on the uplink; else unless the uplink is a veth.
    #[arg(long, requires = "uplink")]
    pub early_drop: Option<bool>,
    /// Blocks sources that cannot be in the internet.
    #[arg(long, requires = "uplink")]
    pub bogons: bool,
    /// Packets a second that may open a flow, of one source.
    #[arg(long, requires = "uplink", value_parser = clap::value_parser!(u64).range(1..))]
    pub source_packets: Option<u64>,
    /// The uplink hands over complete checksums: XDP delivers what is established.
    #[arg(long, requires = "uplink")]
    pub fast_path: bool,
}

impl Packets {
    pub fn flow_log(&self) -> Option<FlowLog> {
        Some(FlowLog {
            directory: self.flow_log.clone()?,
            format: match self.flow_log_format {
                Format::Aws => FlowLogFormat::Aws,
                Format::Json => FlowLogFormat::Json,
            },
            account: OWNER_ID.to_owned(),
            interval_s: self.flow_log_interval,
            file_bytes_max: FILE_BYTES_MAX,
            files_kept: FILES_KEPT,
        })
    }

    pub fn uplink(&self, device: String, gateway: std::net::Ipv4Addr) -> Uplink {
        let Self { early_drop, bogons, source_packets, .. } = *self;
        let fast_path = if self.fast_path { FastPath::Declared } else { FastPath::Off };
        Uplink { device, gateway, gateway6: None, early_drop, bogons, source_packets, fast_path }
    }
}
