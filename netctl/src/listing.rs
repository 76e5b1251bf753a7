//! How a noun is shown: one definition gives the table, the wide table and the
//! JSON, so that they cannot disagree.
//!
//! A [`Listing`] names, for each column, its heading, its key in JSON, where the
//! value stands in the API's answer, and what shape it has there. The JSON's
//! shape is ours and stable: snake_case keys, `null` where EC2 leaves out,
//! numbers and booleans as such, lists always lists.

use serde_json::{Map, Value};

use crate::api::Element;
use crate::failure::Outcome;
use crate::output::{self, Format};

#[derive(Debug)]
pub struct Listing {
    /// The key whose values `-o id` prints.
    pub id: &'static str,
    pub columns: &'static [Column],
}

#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub head: &'static str,
    pub key: &'static str,
    /// With `|` between several, for one text: the first that is there.
    pub path: &'static str,
    pub shape: Shape,
    pub shown: Shown,
}

#[derive(Debug, Clone, Copy)]
pub enum Shape {
    Text,
    Number,
    Flag,
    /// Every text at the path.
    Texts,
    /// Every element at the path, as an object of these columns.
    Objects(&'static [Column]),
    /// The set of tags at the path, as an object from key to value.
    Tags,
    /// The value of the tag `Name` in the set at the path.
    Name,
}

/// Where a column appears; in JSON, all do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    Always,
    Wide,
    /// Only in JSON and in `show`.
    Json,
}

impl Column {
    pub const fn new(head: &'static str, key: &'static str, path: &'static str) -> Self {
        Self { head, key, path, shape: Shape::Text, shown: Shown::Always }
    }

    pub const fn shape(mut self, shape: Shape) -> Self {
        self.shape = shape;
        self
    }

    pub const fn wide(mut self) -> Self {
        self.shown = Shown::Wide;
        self
    }

    pub const fn json(mut self) -> Self {
        self.shown = Shown::Json;
        self
    }

    pub fn value(&self, element: &Element) -> Value {
        let text = || {
            let texts = self.path.split('|').filter_map(|path| element.at(path));
            texts.map(|e| e.text.trim().to_owned()).find(|text| !text.is_empty())
        };
        match self.shape {
            Shape::Text => text().map_or(Value::Null, Value::String),
            Shape::Number => text()
                .and_then(|t| t.parse::<i64>().ok())
                .map_or(Value::Null, |number| Value::Number(number.into())),
            Shape::Flag => text().map_or(Value::Null, |t| Value::Bool(t == "true")),
            Shape::Texts => {
                element.all(self.path).iter().map(|e| Value::from(e.text.trim())).collect()
            }
            Shape::Objects(columns) => {
                element.all(self.path).iter().map(|e| object(columns, e)).collect()
            }
            Shape::Tags => Value::Object(tags(element, self.path)),
            Shape::Name => tags(element, self.path).remove("Name").unwrap_or(Value::Null),
        }
    }
}

fn tags(element: &Element, path: &str) -> Map<String, Value> {
    element
        .all(path)
        .iter()
        .map(|tag| (tag.text_at("key").to_owned(), Value::from(tag.text_at("value"))))
        .collect()
}

fn object(columns: &[Column], element: &Element) -> Value {
    Value::Object(columns.iter().map(|c| (c.key.to_owned(), c.value(element))).collect())
}

impl Column {
    /// The value in a table's cell, an object's members in the order of its columns.
    fn cell(&self, value: &Value) -> String {
        match (self.shape, value) {
            (Shape::Objects(_), Value::Array(values)) if !values.is_empty() => {
                values.iter().map(|v| self.cell(v)).collect::<Vec<_>>().join(", ")
            }
            (Shape::Objects(columns), Value::Object(map)) => columns
                .iter()
                .filter_map(|c| {
                    let text = cell(map.get(c.key)?);
                    (text != NOTHING).then(|| format!("{}={text}", c.key))
                })
                .collect::<Vec<_>>()
                .join(" "),
            _ => cell(value),
        }
    }
}

/// What stands in a cell where there is nothing.
const NOTHING: &str = "-";

fn cell(value: &Value) -> String {
    match value {
        Value::Null => NOTHING.to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => NOTHING.to_owned(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(map) if map.is_empty() => NOTHING.to_owned(),
        Value::Object(map) => {
            map.iter().map(|(k, v)| format!("{k}={}", cell(v))).collect::<Vec<_>>().join(" ")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

impl Listing {
    pub fn object(&self, element: &Element) -> Value {
        object(self.columns, element)
    }

    /// Shows any number of them: a table, or a JSON array.
    pub fn show_all(&self, format: Format, elements: &[Element]) -> Outcome {
        let objects: Vec<Value> = elements.iter().map(|e| self.object(e)).collect();
        match format {
            Format::Json => output::json(&objects),
            Format::Id => {
                self.print_ids(&objects);
                Ok(())
            }
            Format::Table | Format::Wide => {
                let columns: Vec<&Column> = self
                    .columns
                    .iter()
                    .filter(|c| match c.shown {
                        Shown::Always => true,
                        Shown::Wide => format == Format::Wide,
                        Shown::Json => false,
                    })
                    .collect();
                let head: Vec<&str> = columns.iter().map(|c| c.head).collect();
                let rows: Vec<Vec<String>> = objects
                    .iter()
                    .map(|o| columns.iter().map(|c| c.cell(&o[c.key])).collect())
                    .collect();
                output::table(&head, &rows);
                Ok(())
            }
        }
    }

    /// Shows one: a line a column, or a JSON object.
    pub fn show_one(&self, format: Format, element: &Element) -> Outcome {
        self.show_object(format, &self.object(element))
    }

    pub fn show_object(&self, format: Format, object: &Value) -> Outcome {
        match format {
            Format::Json => return output::json(object),
            Format::Id => self.print_ids(std::slice::from_ref(object)),
            Format::Table | Format::Wide => {
                let width = self.columns.iter().map(|c| c.key.len()).max().unwrap_or(0);
                for column in self.columns {
                    let label = format!("{}:", column.key);
                    let indent = width + 2;
                    match &object[column.key] {
                        value if cell(value) == NOTHING => {}
                        // One of several things a line, below each other.
                        Value::Array(values) if values.iter().all(Value::is_object) => {
                            for (i, value) in values.iter().enumerate() {
                                let label = if i == 0 { label.as_str() } else { "" };
                                output::line(&format!("{label:indent$}{}", column.cell(value)));
                            }
                        }
                        value => output::line(&format!("{label:indent$}{}", cell(value))),
                    }
                }
            }
        }
        Ok(())
    }

    fn print_ids(&self, objects: &[Value]) {
        for object in objects {
            output::line(&cell(&object[self.id]));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RULE: &[Column] = &[Column::new("", "port", "fromPort").shape(Shape::Number)];
    const COLUMNS: &[Column] = &[
        Column::new("ID", "id", "id"),
        Column::new("NAME", "name", "tagSet/item").shape(Shape::Name),
        Column::new("SIZE", "size", "size").shape(Shape::Number),
        Column::new("FREE", "free", "free").shape(Shape::Flag),
        Column::new("GROUPS", "groups", "set/item/g").shape(Shape::Texts),
        Column::new("RULES", "rules", "rules/item").shape(Shape::Objects(RULE)),
        Column::new("TAGS", "tags", "tagSet/item").shape(Shape::Tags),
        Column::new("GONE", "gone", "gone"),
        Column::new("PEER", "peer", "cidr|set/item/g|size"),
    ];

    #[test]
    fn one_definition_gives_json_of_a_stable_shape_and_cells() {
        let element = Element::parse(
            b"<i><id>x</id><size>7</size><free>false</free><set><item><g>a</g></item>\
              <item><g>b</g></item></set><rules><item><fromPort>22</fromPort></item></rules>\
              <tagSet><item><key>Name</key><value>web</value></item></tagSet></i>",
        )
        .unwrap();
        let listing = Listing { id: "id", columns: COLUMNS };
        let object = listing.object(&element);
        assert_eq!(
            object,
            json!({ "id": "x", "name": "web", "size": 7, "free": false, "groups": ["a", "b"],
                    "rules": [{ "port": 22 }], "tags": { "Name": "web" }, "gone": null, "peer": "a" })
        );
        assert_eq!(cell(&object["groups"]), "a,b");
        assert_eq!(COLUMNS[5].cell(&object["rules"]), "port=22");
        assert_eq!(cell(&object["gone"]), "-");
    }

    #[test]
    fn a_list_without_members_is_an_empty_list_in_json() {
        let element = Element::parse(b"<i><id>x</id></i>").unwrap();
        let object = Listing { id: "id", columns: COLUMNS }.object(&element);
        assert_eq!(object["groups"], json!([]));
        assert_eq!(object["tags"], json!({}));
    }
}
