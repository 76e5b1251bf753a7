//! What to type after an error of the API.

/// Commands that show what an error's code speaks of, by the code's beginning;
/// the first that fits counts.
const ADVICE: &[(&str, &str)] = &[
    ("InvalidInstanceID", "netctl instance list"),
    ("IncorrectInstanceState", "netctl instance list; netctl instance wait ID --for STATE"),
    ("InsufficientInstanceCapacity", "choose a smaller --type, or terminate an instance"),
    ("InvalidInstanceType", "netctl type list"),
    ("InvalidAMIName.Duplicate", "netctl image list; choose another name with --as"),
    ("InvalidAMI", "netctl image list; netctl image build tiny"),
    ("InvalidVolume", "netctl volume list"),
    ("VolumeInUse", "netctl volume detach ID, then try again"),
    ("IncorrectState", "netctl volume list; netctl instance list"),
    ("InvalidAllocationID", "netctl address list"),
    ("InvalidAssociationID", "netctl address list"),
    ("InvalidAddress", "netctl address list"),
    ("InvalidIPAddress.InUse", "netctl address disassociate ADDRESS, then try again"),
    ("Resource.AlreadyAssociated", "netctl address disassociate ADDRESS, then try again"),
    ("InvalidGroup.Duplicate", "netctl group list; choose another name"),
    ("InvalidGroup.InUse", "netctl instance list: instances that have it must end first"),
    (
        "DependencyViolation",
        "netctl instance list; netctl group list: what refers to it must go first",
    ),
    ("InvalidGroup", "netctl group list"),
    ("InvalidPermission", "netctl group show GROUP"),
    ("InvalidKeyPair.Duplicate", "netctl key list; netctl key delete NAME"),
    ("InvalidKeyPair", "netctl key list"),
    ("InvalidKey.Format", "give a public key in OpenSSH's format, such as ~/.ssh/id_ed25519.pub"),
    ("InvalidSubnet", "netctl subnet list"),
    ("InvalidVpc", "netctl vpc list"),
    ("InvalidZone", "netctl zone list"),
    ("RequestLimitExceeded", "wait a moment, then try again"),
    ("Unavailable", "netctl status"),
    ("InternalError", "netctl status; netctl logs control"),
];

pub fn for_code(code: &str) -> Option<&'static str> {
    ADVICE.iter().find(|(beginning, _)| code.starts_with(beginning)).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_particular_code_is_found_first() {
        for (i, (code, _)) in ADVICE.iter().enumerate() {
            let first = ADVICE.iter().position(|(b, _)| code.starts_with(b));
            assert_eq!(first, Some(i), "{code} is hidden by a shorter beginning above it");
        }
        assert_eq!(for_code("InvalidInstanceID.NotFound"), Some("netctl instance list"));
        assert_eq!(for_code("Strange"), None);
    }
}
