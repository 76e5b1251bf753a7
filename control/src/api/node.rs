//! An answer as a tree of XML elements, and its text.

use time::OffsetDateTime;

/// Clients (libcloud, for one) compare it with its trailing slash.
const NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Text(String),
    Struct(Struct),
    /// Its elements are named `item`.
    List(Vec<Node>),
}

/// Elements in order. Building one is a chain of `with`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Struct(pub Vec<(&'static str, Node)>);

impl Struct {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(mut self, name: &'static str, value: impl Into<Node>) -> Self {
        self.0.push((name, value.into()));
        self
    }

    /// Leaves the element out where there is no value.
    pub fn with_some(self, name: &'static str, value: Option<impl Into<Node>>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    pub fn list<I: IntoIterator>(mut self, name: &'static str, items: I) -> Self
    where
        I::Item: Into<Node>,
    {
        self.0.push((name, Node::List(items.into_iter().map(Into::into).collect())));
        self
    }

    /// The whole document of an answer.
    pub fn document(&self, action: &str, request_id: &str) -> String {
        let mut text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{action}Response xmlns=\"{NAMESPACE}\"><requestId>{request_id}</requestId>"
        );
        write_struct(self, &mut text);
        text.push_str(&format!("</{action}Response>"));
        text
    }
}

impl From<Struct> for Node {
    fn from(value: Struct) -> Self {
        Self::Struct(value)
    }
}

impl From<&str> for Node {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Node {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<&String> for Node {
    fn from(value: &String) -> Self {
        Self::Text(value.clone())
    }
}

macro_rules! text_nodes {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Node {
            fn from(value: $kind) -> Self {
                Self::Text(value.to_string())
            }
        }
    )*};
}
text_nodes!(
    bool,
    u8,
    u16,
    u32,
    u64,
    i64,
    usize,
    f64,
    std::net::Ipv4Addr,
    ipnet::Ipv4Net,
    model::Mac,
    model::InstanceState,
    model::VolumeState,
    model::AttachmentState,
    model::InstanceId,
    model::VolumeId,
    model::ImageId,
    model::GroupId,
    model::RuleId,
    model::InterfaceId,
    model::AllocationId,
    model::AssociationId,
    model::KeyPairId,
    model::VpcId,
    model::PrefixListId,
    model::SubnetId,
    model::ReservationId
);

fn write_struct(fields: &Struct, text: &mut String) {
    for (name, value) in &fields.0 {
        write_element(name, value, text);
    }
}

fn write_element(name: &str, value: &Node, text: &mut String) {
    text.push('<');
    text.push_str(name);
    text.push('>');
    match value {
        Node::Text(value) => escape(value, text),
        Node::Struct(fields) => write_struct(fields, text),
        Node::List(items) => items.iter().for_each(|i| write_element("item", i, text)),
    }
    text.push_str("</");
    text.push_str(name);
    text.push('>');
}

/// XML 1.0 has no spelling for most control characters (section 2.2): they
/// become the replacement character, as nothing else would let a client read on.
fn escape(value: &str, text: &mut String) {
    for c in value.chars() {
        match c {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '"' => text.push_str("&quot;"),
            '\r' => text.push_str("&#13;"),
            '\n' | '\t' | ' '.. => {
                text.push(if matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c });
            }
            _ => text.push('\u{fffd}'),
        }
    }
}

pub fn error_document(code: &str, message: &str, request_id: &str) -> String {
    let mut text =
        String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error><Code>");
    escape(code, &mut text);
    text.push_str("</Code><Message>");
    escape(message, &mut text);
    text.push_str("</Message></Error></Errors><RequestID>");
    escape(request_id, &mut text);
    text.push_str("</RequestID></Response>");
    text
}

/// `2026-11-22T18:02:11.000Z`, as the API writes a time.
pub fn timestamp(ms_since_epoch: u64) -> String {
    let nanoseconds = i128::from(ms_since_epoch) * 1_000_000;
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanoseconds)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_escaped_and_in_the_namespace_with_its_slash() {
        let answer = Struct::new().with("a", "<&\u{1}>").list("set", ["x", "y"]);
        let text = answer.document("Describe", "id");
        assert!(text.contains("doc/2016-11-15/\""), "{text}");
        assert!(
            text.contains("<a>&lt;&amp;\u{fffd}&gt;</a><set><item>x</item><item>y</item></set>")
        );
    }

    #[test]
    fn a_time_is_written_as_the_api_writes_it() {
        assert_eq!(timestamp(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
    }
}
