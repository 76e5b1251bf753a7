//! One command's conversation with `control`.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rpc::{Client, Deployment};

use super::advice;
use super::xml::Element;
use crate::deployment::place::Place;
use crate::failure::{Failure, Outcome};
use crate::output::Format;

/// EC2's only version of this API.
const VERSION: &str = "2016-11-15";

/// What a call may take: `control` answers from its memory, or after one write.
const CALL_WITHIN: Duration = Duration::from_secs(60);

/// What RFC 3986 leaves as it is.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A page more than this is a server that goes round in circles.
const PAGES_MAX: usize = 1000;

/// The parameters of a call, in EC2's dotted form.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters(Vec<(String, String)>);

impl Parameters {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.0.push((name.to_owned(), value.to_string()));
        self
    }

    #[must_use]
    pub fn maybe(self, name: &str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// `name=true`, where there is a name.
    #[must_use]
    pub fn maybe_flag(self, name: Option<&str>) -> Self {
        match name {
            Some(name) => self.with(name, true),
            None => self,
        }
    }

    /// `name.1=…&name.2=…`
    #[must_use]
    pub fn list<T: ToString>(self, name: &str, values: impl IntoIterator<Item = T>) -> Self {
        values
            .into_iter()
            .enumerate()
            .fold(self, |p, (i, value)| p.with(&format!("{name}.{}", i + 1), value))
    }

    /// `Filter.1.Name=…&Filter.1.Value.1=…`
    #[must_use]
    pub fn filters(self, filters: &[Filter]) -> Self {
        filters.iter().enumerate().fold(self, |p, (i, filter)| {
            p.with(&format!("Filter.{}.Name", i + 1), &filter.name)
                .list(&format!("Filter.{}.Value", i + 1), &filter.values)
        })
    }

    /// Tags for what a call creates.
    #[must_use]
    pub fn tags(self, resource: &str, tags: &[Tag]) -> Self {
        if tags.is_empty() {
            return self;
        }
        tags.iter().enumerate().fold(
            self.with("TagSpecification.1.ResourceType", resource),
            |p, (i, tag)| {
                p.with(&format!("TagSpecification.1.Tag.{}.Key", i + 1), &tag.key)
                    .with(&format!("TagSpecification.1.Tag.{}.Value", i + 1), &tag.value)
            },
        )
    }

    fn form(&self, action: &str) -> String {
        let encode = |text: &str| utf8_percent_encode(text, KEPT).to_string();
        let mut form = format!("Action={action}&Version={VERSION}");
        for (name, value) in &self.0 {
            form.push_str(&format!("&{}={}", encode(name), encode(value)));
        }
        form
    }
}

/// `NAME=VALUE[,VALUE…]`, as `--filter` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub name: String,
    pub values: Vec<String>,
}

impl Filter {
    pub fn new(name: &str, value: impl ToString) -> Self {
        Self { name: name.to_owned(), values: vec![value.to_string()] }
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, values)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                values: values.split(',').map(str::to_owned).collect(),
            }),
            _ => {
                Err("write NAME=VALUE, such as tag:Name=web or instance-state-name=running"
                    .to_owned())
            }
        }
    }
}

/// `KEY=VALUE`, as `--tag` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    pub key: String,
    pub value: String,
}

impl Tag {
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("write KEY=VALUE, such as Name=web".to_owned()),
        }
    }
}

#[derive(Debug)]
pub struct Session {
    pub deployment: Deployment,
    pub format: Format,
    /// The options that select this deployment again, for advice.
    pub place: String,
}

impl Session {
    pub fn new(place: &Place, format: Format) -> Outcome<Self> {
        Ok(Self { deployment: place.deployment()?, format, place: place.as_options() })
    }

    pub fn daemon(&self, name: &str) -> Client {
        Client::new(self.deployment.socket_of(name))
    }

    /// Asks for one action. `deed` says what the user wanted, for the error:
    /// `instance i-…: terminate`.
    pub fn call(&self, deed: &str, action: &str, parameters: &Parameters) -> Outcome<Element> {
        let request = Request::post("/")
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded; charset=utf-8")
            .body(Full::new(Bytes::from(parameters.form(action))))
            .map_err(|e| Failure::failed(format!("{deed}: {e}")))?;
        let client = self.daemon("control").with_timeout(CALL_WITHIN);
        let (status, body) =
            crate::wait_for(client.send(request)).map_err(|e| self.unreachable(deed, e))?;
        let answer = Element::parse(&body).map_err(|e| {
            Failure::failed(format!("{deed}: control answered {status}: {e}"))
                .hint(format!("netctl status{0}; netctl logs control{0}", self.place))
        })?;
        if status.is_success() {
            return Ok(answer);
        }
        Err(refusal(deed, &answer, status.as_str()))
    }

    /// Asks a Describe action, page after page, for all items at `path`.
    pub fn describe(
        &self,
        deed: &str,
        action: &str,
        parameters: &Parameters,
        path: &str,
    ) -> Outcome<Vec<Element>> {
        let mut items = Vec::new();
        let mut page = parameters.clone();
        for _ in 0..PAGES_MAX {
            let answer = self.call(deed, action, &page)?;
            items.extend(answer.all(path).into_iter().cloned());
            match answer.text_at("nextToken") {
                "" => return Ok(items),
                token => page = parameters.clone().with("NextToken", token),
            }
        }
        Err(Failure::failed(format!("{deed}: the answer has more than {PAGES_MAX} pages")))
    }

    /// A daemon could not be asked at all.
    pub fn unreachable(&self, deed: &str, error: rpc::Error) -> Failure {
        let advice = if nix::unistd::geteuid().is_root() {
            format!("netctl status{0}, or start it: netctl up{0}", self.place)
        } else {
            "sudo netctl …: only root may speak to the daemons".to_owned()
        };
        match error.kind {
            rpc::Kind::Unavailable => Failure::daemon(deed, error).hint(advice),
            _ => Failure::daemon(deed, error),
        }
    }
}

/// `<Response><Errors><Error><Code/><Message/></Error></Errors></Response>`
fn refusal(deed: &str, answer: &Element, status: &str) -> Failure {
    let error = answer.at("Errors/Error");
    let text = |name: &str| error.map_or("", |e| e.text_at(name)).to_owned();
    let code = match text("Code") {
        code if code.is_empty() => format!("HTTP {status}"),
        code => code,
    };
    let hint = advice::for_code(&code).map(str::to_owned);
    Failure::Api { deed: deed.to_owned(), code, message: text("Message"), hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_written_in_the_dotted_form() {
        let parameters = Parameters::new()
            .list("InstanceId", ["i-1", "i-2"])
            .filters(&[Filter::parse("tag:Name=a b,ü").unwrap()])
            .tags("instance", &[Tag::parse("Name=x=y").unwrap()])
            .maybe("KeyName", None::<&str>);
        assert_eq!(
            parameters.form("DescribeInstances"),
            "Action=DescribeInstances&Version=2016-11-15&InstanceId.1=i-1&InstanceId.2=i-2\
             &Filter.1.Name=tag%3AName&Filter.1.Value.1=a%20b&Filter.1.Value.2=%C3%BC\
             &TagSpecification.1.ResourceType=instance&TagSpecification.1.Tag.1.Key=Name\
             &TagSpecification.1.Tag.1.Value=x%3Dy"
        );
    }

    #[test]
    fn an_error_shows_its_code_and_what_to_type_next() {
        let answer = Element::parse(
            b"<Response><Errors><Error><Code>InvalidInstanceID.NotFound</Code>\
              <Message>The instance ID 'i-0' does not exist</Message></Error></Errors>\
              <RequestID>r</RequestID></Response>",
        )
        .unwrap();
        assert_eq!(
            refusal("instance i-0: stop", &answer, "400").to_string(),
            "netctl: instance i-0: stop: InvalidInstanceID.NotFound: The instance ID 'i-0' does \
             not exist\n  next: netctl instance list"
        );
    }

    #[test]
    fn a_filter_and_a_tag_need_a_name() {
        assert!(Filter::parse("=x").is_err() && Filter::parse("x").is_err());
        assert!(Tag::parse("=x").is_err() && Tag::parse("x").is_err());
        assert_eq!(Tag::parse("x=").unwrap().value, "");
    }
}
