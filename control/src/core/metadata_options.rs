//! How an instance's metadata service is reached: whether at all, with tokens alone,
//! and over how many routers.

use super::lookup::find;
use super::{Answer, Context, Draft};
use crate::api::{ApiError, Params, Struct};
use crate::record::{Instance, MetadataOptions};

/// What EC2 takes (`HttpPutResponseHopLimit`).
const HOPS: std::ops::RangeInclusive<i64> = 1..=64;

/// The options as `given` changes them; what it does not name stays.
pub fn changed(before: MetadataOptions, given: &Params) -> Result<MetadataOptions, ApiError> {
    let mut options = before;
    if given.text("InstanceMetadataTags").is_some_and(|v| v != "disabled") {
        let said = "MetadataOptions.InstanceMetadataTags=enabled is not supported.";
        return Err(ApiError::new("Unsupported", said));
    }
    // The model has checked that each is one of two.
    if let Some(endpoint) = given.text("HttpEndpoint") {
        options.disabled = endpoint == "disabled";
    }
    if let Some(ipv6) = given.text("HttpProtocolIpv6") {
        options.ipv6 = ipv6 == "enabled";
    }
    if let Some(tokens) = given.text("HttpTokens") {
        options.tokens_optional = tokens == "optional";
    }
    if let Some(hops) = given.number("HttpPutResponseHopLimit") {
        let fits = Some(hops).filter(|n| HOPS.contains(n)).and_then(|n| u8::try_from(n).ok());
        options.hop_limit = fits.ok_or_else(|| {
            let (least, most) = (HOPS.start(), HOPS.end());
            ApiError::invalid(format!(
                "The value '{hops}' for HttpPutResponseHopLimit is not between {least} and {most}."
            ))
        })?;
    }
    Ok(options)
}

/// As `DescribeInstances` and the answer to a change show them.
pub fn shown(options: MetadataOptions) -> Struct {
    Struct::new()
        .with("state", "applied")
        .with("httpTokens", if options.tokens_optional { "optional" } else { "required" })
        .with("httpPutResponseHopLimit", options.hop_limit)
        .with("httpEndpoint", if options.disabled { "disabled" } else { "enabled" })
        .with("httpProtocolIpv6", if options.ipv6 { "enabled" } else { "disabled" })
        .with("instanceMetadataTags", "disabled")
}

pub fn modify_metadata_options(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let before = find::<Instance>(context.state, params.need("InstanceId")?)?;
    if before.terminated_ms.is_some() || before.deleted_ms.is_some() {
        let said = format!("The instance '{}' is terminated.", before.id);
        return Err(ApiError::new("IncorrectInstanceState", said));
    }
    let named = ["HttpEndpoint", "HttpProtocolIpv6", "HttpPutResponseHopLimit", "HttpTokens"];
    if !named.iter().any(|name| params.has(name)) {
        return Err(ApiError::combination("No metadata option specified."));
    }
    let options = changed(before.metadata_options, params)?;
    draft.plan.put(context.state, &Instance { metadata_options: options, ..before.clone() });
    let id = before.id;
    Ok(Box::new(move |_| {
        Struct::new().with("instanceId", id).with("instanceMetadataOptions", shown(options))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::read_params;
    use crate::query::grow;

    fn given(pairs: &[(&str, &str)]) -> Result<MetadataOptions, ApiError> {
        let instance = [("InstanceId", "i-1234567890abcdef0")];
        let pairs = pairs.iter().chain(&instance);
        let pairs = pairs.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let params = read_params("ModifyInstanceMetadataOptions", grow(pairs)?)?;
        changed(MetadataOptions::default(), &params)
    }

    #[test]
    fn what_is_not_named_stays_and_what_does_not_fit_is_refused() {
        let plain = MetadataOptions::default();
        assert_eq!(given(&[]).unwrap(), plain);
        let hops = given(&[("HttpPutResponseHopLimit", "64")]).unwrap();
        assert_eq!(hops, MetadataOptions { hop_limit: 64, ..plain });
        let six = given(&[("HttpProtocolIpv6", "enabled")]).unwrap();
        assert_eq!(six, MetadataOptions { ipv6: true, ..plain });
        let open = given(&[("HttpTokens", "optional"), ("HttpEndpoint", "disabled")]).unwrap();
        assert_eq!(open, MetadataOptions { tokens_optional: true, disabled: true, ..plain });
        for (name, value) in [
            ("HttpPutResponseHopLimit", "0"),
            ("HttpPutResponseHopLimit", "65"),
            ("HttpPutResponseHopLimit", "-1"),
            ("HttpTokens", "maybe"),
            ("HttpEndpoint", "off"),
            ("HttpProtocolIpv6", "on"),
            ("InstanceMetadataTags", "enabled"),
        ] {
            assert!(given(&[(name, value)]).is_err(), "{name}={value}");
        }
        assert_eq!(given(&[("InstanceMetadataTags", "disabled")]).unwrap(), plain);
    }
}
