//! An answer of the API as a tree of elements, without knowing its shape.

use quick_xml::Reader;
use quick_xml::events::Event;

/// EC2's deepest answers have about ten levels; beyond this an answer is not one.
const DEPTH_MAX: usize = 64;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    pub name: String,
    pub text: String,
    pub children: Vec<Element>,
}

#[derive(Debug, thiserror::Error)]
#[error("the answer is not well-formed XML: {0}")]
pub struct Malformed(String);

impl Element {
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let malformed = |e: &dyn std::fmt::Display| Malformed(e.to_string());
        let text = std::str::from_utf8(bytes).map_err(|e| malformed(&e))?;
        let mut reader = Reader::from_str(text);
        let mut open = vec![Self::default()];
        loop {
            match reader.read_event().map_err(|e| malformed(&e))? {
                Event::Start(start) => {
                    if open.len() > DEPTH_MAX {
                        return Err(Malformed(format!("more than {DEPTH_MAX} levels")));
                    }
                    let name = start.local_name().as_ref().to_owned();
                    open.push(Self { name, ..Self::default() });
                }
                Event::Empty(start) => {
                    let name = start.local_name().as_ref().to_owned();
                    if let Some(parent) = open.last_mut() {
                        parent.children.push(Self { name, ..Self::default() });
                    }
                }
                Event::End(_) => {
                    if let (Some(done), Some(parent)) = (open.pop(), open.last_mut()) {
                        parent.children.push(done);
                    }
                }
                Event::Text(text) => {
                    if let Some(element) = open.last_mut() {
                        element.text.push_str(&text);
                    }
                }
                Event::CData(text) => {
                    if let Some(element) = open.last_mut() {
                        element.text.push_str(&text);
                    }
                }
                Event::GeneralRef(reference) => {
                    let character = resolve(&reference)
                        .ok_or_else(|| Malformed(format!("unknown entity `{}`", &*reference)))?;
                    if let Some(element) = open.last_mut() {
                        element.text.push(character);
                    }
                }
                Event::Eof => break,
                _ => {}
            }
        }
        match open.pop().map(|top| top.children) {
            Some(mut roots) if roots.len() == 1 && open.is_empty() => Ok(roots.remove(0)),
            _ => Err(Malformed("it has not exactly one root element".to_owned())),
        }
    }

    pub fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|c| c.name == name)
    }

    /// The first element at a path such as `instanceState/name`.
    pub fn at(&self, path: &str) -> Option<&Self> {
        path.split('/').try_fold(self, |element, name| element.child(name))
    }

    /// The text at a path; empty where there is none.
    pub fn text_at(&self, path: &str) -> &str {
        self.at(path).map_or("", |e| e.text.trim())
    }

    /// Every element at a path, branching at each step.
    pub fn all<'a>(&'a self, path: &str) -> Vec<&'a Self> {
        path.split('/').fold(vec![self], |elements, name| {
            elements.iter().flat_map(|e| e.children.iter().filter(|c| c.name == name)).collect()
        })
    }
}

/// The five entities that XML defines, and character references.
fn resolve(reference: &quick_xml::events::BytesRef<'_>) -> Option<char> {
    if let Ok(Some(character)) = reference.resolve_char_ref() {
        return Some(character);
    }
    match &**reference {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "amp" => Some('&'),
        "apos" => Some('\''),
        "quot" => Some('"'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_becomes_a_tree() {
        let root = Element::parse(
            br#"<?xml version="1.0" encoding="UTF-8"?>
            <R xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">
              <set><item><key>a&amp;b</key><value/></item><item><key>&#65;</key></item></set>
              <next> t </next>
            </R>"#,
        )
        .unwrap();
        assert_eq!(root.name, "R");
        assert_eq!(root.text_at("next"), "t");
        let keys: Vec<&str> = root.all("set/item/key").iter().map(|e| e.text.as_str()).collect();
        assert_eq!(keys, ["a&b", "A"]);
        assert_eq!(root.text_at("set/item/value"), "");
        assert_eq!(root.text_at("no/such/path"), "");
    }

    #[test]
    fn what_is_not_xml_is_an_error() {
        for text in ["", "plain", "<a>", "<a></b>", "<a/><b/>", "<a>&nbsp;</a>"] {
            assert!(Element::parse(text.as_bytes()).is_err(), "{text}");
        }
        let deep = "<a>".repeat(1000) + &"</a>".repeat(1000);
        assert!(Element::parse(deep.as_bytes()).is_err());
    }
}
