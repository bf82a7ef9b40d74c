//! Reads TOML tables against the schema. Nothing stops at the first mistake: what cannot be read is left out, and said.

use std::cell::RefCell;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::place::{At, Place, Sink};
use crate::schema::{self, Table};

/// A table that is being read.
pub(crate) struct Reader<'a> {
    table: &'a DeTable<'a>,
    kind: &'static Table,
    /// Where it begins.
    pub(crate) place: Place,
    pub(crate) sink: &'a Sink<'a>,
    asked: RefCell<Vec<&'static str>>,
}

fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a point",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(table: &'a DeTable<'a>, kind: &'static Table, place: Place, sink: &'a Sink<'a>) -> Self {
        Reader { table, kind, place, sink, asked: RefCell::default() }
    }

    fn value(&self, key: &'static str) -> Option<(Place, &'a Spanned<DeValue<'a>>)> {
        debug_assert!(self.kind.keys.contains(&key), "{key} is not in the schema of {}", self.kind.header);
        self.asked.borrow_mut().push(key);
        let (_, value) = self.table.iter().find(|(name, _)| name.get_ref().as_ref() == key)?;
        Some((self.sink.place(value.span().start), value))
    }

    fn wanted(&self, key: &str, place: Place, wanted: &str, value: &DeValue<'_>) {
        self.sink.wrong(place, format!("`{key}` is {}, not {}", wanted, kind_of(value)));
    }

    /// Whether a key is there, right or wrong.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.iter().any(|(name, _)| name.get_ref().as_ref() == key)
    }

    /// Where a key stands; the table's own place where it does not.
    pub(crate) fn key_place(&self, key: &str) -> Place {
        let found = self.table.iter().find(|(name, _)| name.get_ref().as_ref() == key);
        found.map_or(self.place, |(name, _)| self.sink.place(name.span().start))
    }

    /// A string that is not empty.
    pub(crate) fn string(&self, key: &'static str) -> Option<At<String>> {
        let (place, value) = self.value(key)?;
        self.as_string(key, place, value.get_ref())
    }

    fn as_string(&self, key: &str, place: Place, value: &DeValue<'_>) -> Option<At<String>> {
        match value {
            DeValue::String(text) if text.is_empty() => {
                self.sink.wrong(place, format!("`{key}` is empty"));
                None
            }
            DeValue::String(text) if text.chars().any(char::is_control) => {
                self.sink.wrong(place, format!("`{key}` has a control character in it"));
                None
            }
            DeValue::String(text) => Some(At { value: text.to_string(), place }),
            other => {
                self.wanted(key, place, "a string", other);
                None
            }
        }
    }

    /// A string that `parse` understands.
    pub(crate) fn parsed<T>(&self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<At<T>> {
        let text = self.string(key)?;
        match parse(&text.value) {
            Ok(value) => Some(text.with(value)),
            Err(what) => {
                self.sink.wrong(text.place, what);
                None
            }
        }
    }

    pub(crate) fn boolean(&self, key: &'static str) -> Option<At<bool>> {
        let (place, value) = self.value(key)?;
        match value.get_ref() {
            DeValue::Boolean(value) => Some(At { value: *value, place }),
            other => {
                self.wanted(key, place, "true or false", other);
                None
            }
        }
    }

    /// A whole number from `least` to `most`; `what` says what it is, for the message.
    pub(crate) fn number(&self, key: &'static str, least: u64, most: u64, what: &str) -> Option<At<u64>> {
        let (place, value) = self.value(key)?;
        let DeValue::Integer(number) = value.get_ref() else {
            self.wanted(key, place, "a whole number", value.get_ref());
            return None;
        };
        match u64::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) if (least..=most).contains(&value) => Some(At { value, place }),
            _ => {
                self.sink.wrong(place, format!("`{key}` is {number}: {what} is {least} to {most}"));
                None
            }
        }
    }

    fn array(&self, key: &'static str) -> Option<(Place, &'a DeArray<'a>)> {
        let (place, value) = self.value(key)?;
        match value.get_ref() {
            DeValue::Array(array) => Some((place, array)),
            other => {
                self.wanted(key, place, "a list", other);
                None
            }
        }
    }

    /// A list of strings that are not empty.
    pub(crate) fn strings(&self, key: &'static str) -> Option<At<Vec<At<String>>>> {
        let (place, array) = self.array(key)?;
        let strings = array.iter().filter_map(|item| {
            let at = self.sink.place(item.span().start);
            self.as_string(key, at, item.get_ref())
        });
        Some(At { value: strings.collect(), place })
    }

    /// A list of strings that `parse` understands.
    pub(crate) fn list<T>(&self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<At<T>> {
        let mut all = Vec::new();
        for text in self.strings(key).map(|list| list.value).unwrap_or_default() {
            match parse(&text.value) {
                Ok(value) => all.push(text.with(value)),
                Err(what) => self.sink.wrong(text.place, what),
            }
        }
        all
    }

    /// A table below this one.
    pub(crate) fn table(&self, key: &'static str, kind: &'static Table) -> Option<Reader<'a>> {
        let (place, value) = self.value(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(Reader::new(table, kind, self.key_place(key), self.sink)),
            other => {
                self.wanted(key, place, "a table", other);
                None
            }
        }
    }

    /// An array of tables below this one.
    pub(crate) fn tables(&self, key: &'static str, kind: &'static Table) -> Vec<Reader<'a>> {
        let Some((_, value)) = self.value(key) else { return Vec::new() };
        let DeValue::Array(array) = value.get_ref() else {
            let (place, kind) = (self.key_place(key), kind.header);
            self.sink.wrong(place, format!("`{key}` can be there more than once: write its header as {kind}"));
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in array {
            let place = self.sink.place(item.span().start);
            match item.get_ref() {
                DeValue::Table(table) => tables.push(Reader::new(table, kind, place, self.sink)),
                other => self.wanted(key, place, "a list of tables", other),
            }
        }
        tables
    }

    /// The tables of this one that have names of the operator's.
    pub(crate) fn named(&self, key: &'static str, kind: &'static Table) -> Vec<(At<String>, Reader<'a>)> {
        let Some((place, value)) = self.value(key) else { return Vec::new() };
        let DeValue::Table(names) = value.get_ref() else {
            self.wanted(key, place, "a table", value.get_ref());
            return Vec::new();
        };
        let mut tables = Vec::new();
        for (name, value) in names {
            let place = self.sink.place(name.span().start);
            let name = At { value: name.get_ref().to_string(), place };
            match value.get_ref() {
                DeValue::Table(table) => tables.push((name, Reader::new(table, kind, place, self.sink))),
                other => self.wanted(&name.value, place, "a table", other),
            }
        }
        tables
    }

    /// Something that has to be there.
    pub(crate) fn required<T>(&self, key: &'static str, value: Option<T>) -> Option<T> {
        if !self.has(key) {
            self.sink.wrong(self.place, format!("`{key}` is missing"));
        }
        value
    }

    /// Which of these is there, if it is exactly one; else says so.
    pub(crate) fn one_of(&self, keys: &[&'static str], what: &str) -> Option<&'static str> {
        let there: Vec<_> = keys.iter().copied().filter(|key| self.has(key)).collect();
        let all = keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        match there[..] {
            [one] => Some(one),
            [] => {
                self.sink.wrong(self.place, format!("{what} is missing: one of {all}"));
                None
            }
            [first, second, ..] => {
                let place = self.key_place(first).max(self.key_place(second));
                self.sink.wrong(place, format!("`{first}` and `{second}` exclude each other: {what} is one of {all}"));
                None
            }
        }
    }

    /// Says which keys are unknown. To be called last.
    pub(crate) fn finish(self) {
        let kind = self.kind;
        debug_assert!(
            kind.keys.iter().all(|key| self.asked.borrow().contains(key)),
            "of {} only {:?} are read",
            kind.header,
            self.asked.borrow()
        );
        for (name, _) in self.table.iter() {
            let key = name.get_ref().as_ref();
            if kind.keys.contains(&key) {
                continue;
            }
            let place = self.sink.place(name.span().start);
            let advice = match schema::hint(key) {
                Some(hint) => hint.to_owned(),
                None => format!("{} has {}", kind.header, kind.keys.join(", ")),
            };
            self.sink.wrong(place, format!("`{key}` is no key: {advice}"));
        }
    }
}
