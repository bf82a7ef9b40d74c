//! Places in a plan's text, and what is wrong there.

use std::cell::RefCell;
use std::fmt;

/// A place in a text, counted from 1; columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place {
    /// The line.
    pub line: u32,
    /// The column.
    pub column: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands in the plan.
    pub place: Place,
}

impl<T> At<T> {
    /// Something else at the same place.
    pub fn with<U>(&self, value: U) -> At<U> {
        At { value, place: self.place }
    }
}

/// Something wrong in a plan: a place and a sentence that says what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Where.
    pub place: Place,
    /// What.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// Turns offsets into places, and collects what is wrong.
pub(crate) struct Sink<'a> {
    text: &'a str,
    lines: Vec<usize>,
    found: RefCell<Vec<Mistake>>,
}

impl<'a> Sink<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1));
        Sink { text, lines: starts.collect(), found: RefCell::default() }
    }

    pub(crate) fn place(&self, offset: usize) -> Place {
        let line = self.lines.partition_point(|start| *start <= offset).max(1);
        let before = self.text.get(self.lines[line - 1]..offset.min(self.text.len())).unwrap_or_default();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place { line: number(line), column: number(before.chars().count() + 1) }
    }

    pub(crate) fn wrong(&self, place: Place, message: impl Into<String>) {
        self.found.borrow_mut().push(Mistake { place, message: message.into() });
    }

    /// Everything, in the order of the text.
    pub(crate) fn found(self) -> Vec<Mistake> {
        let mut found = self.found.into_inner();
        found.sort();
        found.dedup();
        found
    }
}
