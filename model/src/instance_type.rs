//! Instance types: how many vCPUs and how much memory a name stands for, and
//! its limits of network and volumes.
//!
//! The table `instance-types.csv` stands beside this file. Its figures are
//! those of moto 5.2.5 (`moto/ec2/resources/instance_types.json.gz`,
//! Apache-2.0), cut to the families that make sense on one's own host.

use std::sync::LazyLock;

const TABLE: &str = include_str!("instance-types.csv");

/// Interfaces that a guest has at most, whatever its type has in EC2: they are the functions of
/// one PCI device.
pub const INTERFACES_MAX: u32 = 8;

#[derive(Debug, Clone, PartialEq)]
pub struct InstanceType {
    pub name: &'static str,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// The label that EC2 shows, such as "Up to 5 Gigabit".
    pub network_label: &'static str,
    pub network_base_gbps: Option<f64>,
    pub network_peak_gbps: Option<f64>,
    pub ebs_base_iops: Option<u64>,
    pub ebs_max_iops: Option<u64>,
    /// Megabytes (10^6) a second.
    pub ebs_base_mbps: Option<f64>,
    pub ebs_max_mbps: Option<f64>,
    pub local_gb: u64,
    pub local_disks: u32,
    /// As in EC2, and [`INTERFACES_MAX`] at most.
    pub interfaces_max: u32,
    pub volumes_max: u32,
    pub burstable: bool,
    pub arm: bool,
}

static TYPES: LazyLock<Vec<InstanceType>> =
    LazyLock::new(|| TABLE.lines().skip(1).filter(|l| !l.is_empty()).map(parse_row).collect());

/// Every known type, in the table's order (by family, then by size).
pub fn all() -> &'static [InstanceType] {
    &TYPES
}

pub fn find(name: &str) -> Option<&'static InstanceType> {
    TYPES.iter().find(|t| t.name == name)
}

/// The table is part of the program: a row that does not parse is our mistake
/// and fails the test below, so it may panic.
fn parse_row(row: &'static str) -> InstanceType {
    let columns: Vec<&'static str> = row.split(',').collect();
    assert_eq!(columns.len(), 16, "instance-types.csv: {row}");
    let number = |i: usize| -> u64 {
        columns[i].parse().unwrap_or_else(|e| panic!("{row}: column {i}: {e}"))
    };
    let real = |i: usize| columns[i].parse::<f64>().ok();
    let name = columns[0];
    InstanceType {
        name,
        vcpus: number(1) as u32,
        memory_mib: number(2),
        network_label: columns[3],
        network_base_gbps: real(4),
        network_peak_gbps: real(5),
        ebs_base_iops: columns[6].parse().ok(),
        ebs_max_iops: columns[7].parse().ok(),
        ebs_base_mbps: real(8),
        ebs_max_mbps: real(9),
        local_gb: number(10),
        local_disks: columns[11].parse().unwrap_or(0),
        interfaces_max: (number(12) as u32).min(INTERFACES_MAX),
        volumes_max: number(13) as u32,
        burstable: columns[14] == "True",
        arm: name.starts_with("t4g.") || name.starts_with("m6g."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table_parses_and_has_a_name_of_its_own() {
        let mut names: Vec<_> = all().iter().map(|t| t.name).collect();
        assert!(names.len() > 100);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all().len());
        assert!(all().iter().all(|t| t.vcpus > 0 && t.memory_mib > 0 && t.volumes_max > 0));
    }

    #[test]
    fn a_type_has_its_published_size() {
        let micro = find("t3.micro").unwrap();
        assert_eq!((micro.vcpus, micro.memory_mib), (2, 1024));
        assert_eq!(micro.interfaces_max, 2);
        assert_eq!(find("m5.24xlarge").unwrap().interfaces_max, INTERFACES_MAX);
        assert_eq!(find("t9.huge"), None);
    }
}
