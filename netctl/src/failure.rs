//! Why a command did not succeed, said for the person who typed it: the noun,
//! the deed, the object, the cause, and what to type next.

use std::fmt;

/// Exit codes: 0 done; 1 it was tried and failed; 2 it could not be tried (a
/// wrong argument, or this machine lacks something).
#[derive(Debug)]
pub enum Failure {
    /// Not tried: each line says what is missing and how to get it.
    Unfit(Vec<String>),
    /// Tried, and failed.
    Failed { what: String, hint: Option<String> },
    /// The EC2 API said no.
    Api { deed: String, code: String, message: String, hint: Option<String> },
    /// A daemon said no, or could not be asked.
    Daemon { deed: String, error: rpc::Error, hint: Option<String> },
}

impl Failure {
    pub fn unfit(line: impl Into<String>) -> Self {
        Self::Unfit(vec![line.into()])
    }

    pub fn failed(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), hint: None }
    }

    pub fn daemon(deed: impl Into<String>, error: rpc::Error) -> Self {
        Self::Daemon { deed: deed.into(), error, hint: None }
    }

    /// The same failure with advice on what to type next.
    #[must_use]
    pub fn hint(mut self, advice: impl Into<String>) -> Self {
        match &mut self {
            Self::Unfit(lines) => lines.push(advice.into()),
            Self::Failed { hint, .. } | Self::Api { hint, .. } | Self::Daemon { hint, .. } => {
                *hint = Some(advice.into());
            }
        }
        self
    }

    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Unfit(_) => 2,
            Self::Failed { .. } | Self::Api { .. } | Self::Daemon { .. } => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hint = match self {
            Self::Unfit(lines) => {
                for (i, line) in lines.iter().enumerate() {
                    let end = if i == 0 { "" } else { "\n" };
                    write!(f, "{end}netctl: {line}")?;
                }
                return Ok(());
            }
            Self::Failed { what, hint } => {
                write!(f, "netctl: {what}")?;
                hint
            }
            Self::Api { deed, code, message, hint } => {
                write!(f, "netctl: {deed}: {code}: {message}")?;
                hint
            }
            Self::Daemon { deed, error, hint } => {
                write!(f, "netctl: {deed}: {error}")?;
                hint
            }
        };
        match hint {
            Some(hint) => write!(f, "\n  next: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

pub type Outcome<T = ()> = Result<T, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_happened_and_what_to_type_next() {
        let failure = Failure::Api {
            deed: "instance i-0: terminate".into(),
            code: "InvalidInstanceID.NotFound".into(),
            message: "it does not exist".into(),
            hint: None,
        }
        .hint("netctl instance list");
        assert_eq!(
            failure.to_string(),
            "netctl: instance i-0: terminate: InvalidInstanceID.NotFound: it does not exist\n  next: netctl instance list"
        );
        assert_eq!((failure.exit_code(), Failure::unfit("x").exit_code()), (1, 2));
    }
}
