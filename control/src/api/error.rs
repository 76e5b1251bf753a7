//! What the API answers when it does not do what was asked.

use std::borrow::Cow;

use http::StatusCode;

/// `code` is EC2's own word: clients match on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    pub code: Cow<'static, str>,
    pub message: String,
    pub status: StatusCode,
}

impl ApiError {
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), status: StatusCode::BAD_REQUEST }
    }

    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    pub fn missing(parameter: &str) -> Self {
        Self::new("MissingParameter", format!("The request must contain the parameter {parameter}"))
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", message)
    }

    pub fn combination(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterCombination", message)
    }

    pub fn dry_run() -> Self {
        Self::new("DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
            .with_status(StatusCode::PRECONDITION_FAILED)
    }

    pub fn unauthenticated(code: &'static str, message: impl Into<String>) -> Self {
        let status = match code {
            "AuthFailure" => StatusCode::UNAUTHORIZED,
            "SignatureDoesNotMatch" => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::new(code, message).with_status(status)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new("InternalError", message).with_status(StatusCode::INTERNAL_SERVER_ERROR)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new("Unavailable", message).with_status(StatusCode::SERVICE_UNAVAILABLE)
    }

    pub fn throttled() -> Self {
        Self::new("RequestLimitExceeded", "Request limit exceeded.")
            .with_status(StatusCode::SERVICE_UNAVAILABLE)
    }
}
