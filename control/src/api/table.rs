//! The compact table cut from botocore's model (`control/model/cut.py`): which
//! actions there are, what a request may say, and what an answer looks like.
//!
//! A request passes [`read_params`] once; after that its parameters have the
//! types that the table names, and a handler that asks for a parameter which
//! the table does not know is a mistake of ours, found in debug builds.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use serde::Deserialize;

use super::ApiError;
use super::node::{Node, Struct};
use crate::query::Tree;

const TABLE: &str = include_str!("../../model/actions.json");

/// Entries of one list in a request; the API's own lists stop at 1000.
const LIST_MAX: usize = 1000;

#[derive(Deserialize)]
struct Table {
    actions: HashMap<String, Action>,
    request: HashMap<String, Shape>,
    answer: HashMap<String, Shape>,
}

#[derive(Deserialize)]
struct Action {
    input: Option<String>,
    output: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Shape {
    List {
        l: Reference,
    },
    Struct {
        m: BTreeMap<String, Reference>,
        #[serde(default)]
        r: Vec<String>,
    },
}

/// `#Name` of a shape, a letter for a scalar, or an enumeration's values.
#[derive(Deserialize)]
#[serde(untagged)]
enum Reference {
    Word(String),
    Values(Vec<String>),
}

/// The table is part of the program: that it reads is held by the test below.
static LOADED: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(TABLE).unwrap_or_else(|e| panic!("control/model/actions.json: {e}"))
});

pub fn is_action(name: &str) -> bool {
    LOADED.actions.contains_key(name)
}

/// A parameter's value, checked against its type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Text(String),
    List(Vec<Value>),
    Struct(Params),
}

/// The parameters of a request, or of a structure in it, by their names on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    shape: &'static str,
    values: BTreeMap<String, Value>,
}

impl Params {
    fn get(&self, name: &str) -> Option<&Value> {
        if cfg!(debug_assertions) {
            let known = match LOADED.request.get(self.shape) {
                Some(Shape::Struct { m, .. }) => m.contains_key(name),
                _ => false,
            };
            assert!(known, "{}: the table knows no parameter {name}", self.shape);
        }
        self.values.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The text, which the action cannot do without.
    pub fn need(&self, name: &str) -> Result<&str, ApiError> {
        self.text(name).filter(|t| !t.is_empty()).ok_or_else(|| ApiError::missing(name))
    }

    /// The table has seen to it that the text is a number.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.text(name).and_then(|t| t.parse().ok())
    }

    pub fn flag(&self, name: &str) -> Option<bool> {
        self.text(name).map(|t| t.eq_ignore_ascii_case("true"))
    }

    pub fn texts(&self, name: &str) -> Vec<&str> {
        match self.get(name) {
            Some(Value::List(items)) => items
                .iter()
                .filter_map(|i| match i {
                    Value::Text(text) => Some(text.as_str()),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    pub fn structs(&self, name: &str) -> Vec<&Params> {
        match self.get(name) {
            Some(Value::List(items)) => items
                .iter()
                .filter_map(|i| match i {
                    Value::Struct(params) => Some(params),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    pub fn inner(&self, name: &str) -> Option<&Params> {
        match self.get(name) {
            Some(Value::Struct(params)) => Some(params),
            _ => None,
        }
    }

    /// Text that is the same for the same parameters, for idempotency.
    pub fn fingerprint(&self, without: &[&str]) -> String {
        let mut text = String::new();
        for (name, value) in self.values.iter().filter(|(n, _)| !without.contains(&n.as_str())) {
            text.push_str(&format!("{name}={value:?};"));
        }
        crate::auth::sha256_hex(text.as_bytes())
    }
}

/// Checks a request against the table.
pub fn read_params(action: &str, mut tree: BTreeMap<String, Tree>) -> Result<Params, ApiError> {
    tree.remove("Action");
    tree.remove("Version");
    let table = &*LOADED;
    let entry = table.actions.get_key_value(action);
    let shape = entry.and_then(|(_, a)| a.input.as_deref());
    let Some((name, shape)) = shape.and_then(|s| table.request.get_key_value(s)) else {
        return match tree.keys().next() {
            Some(name) => Err(unknown(name)),
            None => Ok(Params { shape: "", values: BTreeMap::new() }),
        };
    };
    match read_struct(name, shape, tree, "")? {
        Value::Struct(params) => Ok(params),
        _ => Err(ApiError::internal("the action's input is no structure")),
    }
}

fn unknown(name: &str) -> ApiError {
    ApiError::new("UnknownParameter", format!("The parameter {name} is not recognized"))
}

fn read_struct(
    name: &'static str,
    shape: &'static Shape,
    tree: BTreeMap<String, Tree>,
    path: &str,
) -> Result<Value, ApiError> {
    let Shape::Struct { m, r } = shape else {
        return Err(ApiError::internal(format!("{name} is no structure")));
    };
    let mut values = BTreeMap::new();
    for (member, child) in tree {
        let path = format!("{path}{member}");
        let reference = m.get(&member).ok_or_else(|| unknown(&path))?;
        values.insert(member, read_value(reference, child, &path)?);
    }
    match r.iter().find(|required| !values.contains_key(*required)) {
        Some(required) => Err(ApiError::missing(&format!("{path}{required}"))),
        None => Ok(Value::Struct(Params { shape: name, values })),
    }
}

fn read_value(reference: &'static Reference, tree: Tree, path: &str) -> Result<Value, ApiError> {
    let word = match reference {
        Reference::Word(word) => word,
        Reference::Values(values) => {
            return match tree {
                Tree::Leaf(text) if values.contains(&text) => Ok(Value::Text(text)),
                Tree::Leaf(text) => Err(ApiError::invalid(format!(
                    "Value ({text}) for parameter {path} is invalid. It must be one of: {}.",
                    values.join(", ")
                ))),
                Tree::Branch(_) => Err(unknown(path)),
            };
        }
    };
    let Some(name) = word.strip_prefix('#') else {
        return match tree {
            Tree::Leaf(text) => read_scalar(word, text, path),
            Tree::Branch(children) => {
                Err(unknown(&format!("{path}.{}", children.keys().next().map_or("", |k| k))))
            }
        };
    };
    let (name, shape) = LOADED
        .request
        .get_key_value(name)
        .ok_or_else(|| ApiError::internal(format!("the table has no shape {name}")))?;
    match (shape, tree) {
        (Shape::Struct { .. }, Tree::Branch(children)) => {
            read_struct(name, shape, children, &format!("{path}."))
        }
        (Shape::List { l }, Tree::Branch(children)) => read_list(l, children, path),
        // An empty list or structure is sent as a bare name.
        (Shape::List { .. }, Tree::Leaf(text)) if text.is_empty() => Ok(Value::List(Vec::new())),
        (Shape::Struct { .. }, Tree::Leaf(text)) if text.is_empty() => {
            read_struct(name, shape, BTreeMap::new(), &format!("{path}."))
        }
        (_, Tree::Leaf(text)) => Err(ApiError::invalid(format!(
            "Value ({text}) for parameter {path} is invalid: a list or a structure is wanted."
        ))),
    }
}

/// The members of a list are numbered from 1; gaps are no error, as with EC2.
fn read_list(
    member: &'static Reference,
    children: BTreeMap<String, Tree>,
    path: &str,
) -> Result<Value, ApiError> {
    if children.len() > LIST_MAX {
        return Err(ApiError::invalid(format!(
            "The list {path} has {} members, at most {LIST_MAX} are possible.",
            children.len()
        )));
    }
    let mut numbered = BTreeMap::new();
    for (number, child) in children {
        let path = format!("{path}.{number}");
        let index = number.parse::<u32>().ok().filter(|n| *n > 0 && n.to_string() == number);
        let index = index.ok_or_else(|| unknown(&path))?;
        numbered.insert(index, read_value(member, child, &path)?);
    }
    Ok(Value::List(numbered.into_values().collect()))
}

fn read_scalar(kind: &str, text: String, path: &str) -> Result<Value, ApiError> {
    let reads = match kind {
        "i" => text.parse::<i64>().is_ok(),
        "d" => text.parse::<f64>().is_ok_and(f64::is_finite),
        "b" => text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("false"),
        _ => true,
    };
    let wanted = match kind {
        "i" => "an integer",
        "d" => "a number",
        _ => "true or false",
    };
    if reads {
        Ok(Value::Text(text))
    } else {
        Err(ApiError::invalid(format!(
            "Value ({text}) for parameter {path} is invalid: it must be {wanted}."
        )))
    }
}

/// Whether the answer is one that the model's clients can read; says what is not.
pub fn answer_matches(action: &str, answer: &Struct) -> Result<(), String> {
    let output = LOADED.actions.get(action).and_then(|a| a.output.as_deref());
    match output.and_then(|o| LOADED.answer.get(o)) {
        Some(shape) => struct_matches(shape, answer, action),
        None => {
            let others = answer.0.iter().find(|(name, _)| *name != "return");
            others.map_or(Ok(()), |(name, _)| Err(format!("{action}: {name}: no answer is known")))
        }
    }
}

fn struct_matches(shape: &Shape, answer: &Struct, path: &str) -> Result<(), String> {
    let Shape::Struct { m, .. } = shape else {
        return Err(format!("{path}: a list is wanted"));
    };
    let mut seen = std::collections::BTreeSet::new();
    for (name, value) in &answer.0 {
        let path = format!("{path}.{name}");
        if !seen.insert(name) {
            return Err(format!("{path}: stands twice"));
        }
        let reference = m.get(*name).ok_or_else(|| format!("{path}: not in the model"))?;
        value_matches(reference, value, &path)?;
    }
    Ok(())
}

fn value_matches(reference: &Reference, value: &Node, path: &str) -> Result<(), String> {
    let word = match reference {
        Reference::Word(word) => word.as_str(),
        Reference::Values(_) => "s",
    };
    if let Some(name) = word.strip_prefix('#') {
        let shape = LOADED.answer.get(name).ok_or_else(|| format!("{path}: no shape {name}"))?;
        return match (shape, value) {
            (Shape::Struct { .. }, Node::Struct(fields)) => struct_matches(shape, fields, path),
            (Shape::List { l }, Node::List(items)) => {
                items.iter().try_for_each(|i| value_matches(l, i, path))
            }
            _ => Err(format!("{path}: the model has {name} here")),
        };
    }
    let Node::Text(text) = value else { return Err(format!("{path}: a scalar is wanted")) };
    let reads = match word {
        "i" => text.parse::<i64>().is_ok(),
        "d" => text.parse::<f64>().is_ok(),
        "b" => text == "true" || text == "false",
        "t" => text.len() == 24 && text.ends_with('Z'),
        _ => true,
    };
    if reads { Ok(()) } else { Err(format!("{path}: `{text}` is not of the model's type {word}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query::{grow, parse_form};

    fn read(action: &str, form: &str) -> Result<Params, ApiError> {
        read_params(action, grow(parse_form(form.as_bytes()).unwrap()).unwrap())
    }

    fn code(action: &str, form: &str) -> String {
        read(action, form).unwrap_err().code.into_owned()
    }

    #[test]
    fn what_the_model_knows_is_read_with_its_type() {
        let params = read(
            "RunInstances",
            "MinCount=1&MaxCount=2&BlockDeviceMapping.1.Ebs.VolumeSize=8&SecurityGroupId.1=sg-1",
        )
        .unwrap();
        assert_eq!(params.number("MaxCount"), Some(2));
        let mappings = params.structs("BlockDeviceMapping");
        assert_eq!(mappings[0].inner("Ebs").unwrap().number("VolumeSize"), Some(8));
        assert_eq!(params.texts("SecurityGroupId"), ["sg-1"]);
    }

    #[test]
    fn what_it_does_not_know_is_refused_by_name() {
        assert_eq!(code("DescribeInstances", "Colour=red"), "UnknownParameter");
        assert_eq!(code("DescribeInstances", "Filter.1.Colour=red"), "UnknownParameter");
        assert_eq!(code("DescribeInstances", "Filter.x.Name=red"), "UnknownParameter");
        assert_eq!(code("RunInstances", "MinCount=1"), "MissingParameter");
        assert_eq!(code("RunInstances", "MinCount=1&MaxCount=many"), "InvalidParameterValue");
        assert_eq!(code("DescribeInstances", "DryRun=perhaps"), "InvalidParameterValue");
        assert_eq!(code("CreateKeyPair", "KeyName=a&KeyType=dsa"), "InvalidParameterValue");
    }

    #[test]
    fn an_answer_that_the_model_does_not_know_is_seen() {
        let good = Struct::new().with("instanceId", "i-1").with("output", "");
        assert_eq!(answer_matches("GetConsoleOutput", &good), Ok(()));
        let wrong = Struct::new().with("instanceID", "i-1");
        assert!(answer_matches("GetConsoleOutput", &wrong).is_err());
        let wrong = Struct::new().with("timestamp", "yesterday");
        assert!(answer_matches("GetConsoleOutput", &wrong).is_err());
    }
}
