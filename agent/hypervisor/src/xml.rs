//! A small mutable tree of an XML document, for domain definitions.
//!
//! What is read and written again means the same to libvirt: elements, attributes and text keep their order, names keep
//! their prefixes (`qemu:commandline`), declarations of namespaces are ordinary attributes, text and comments that
//! nobody touched come back as they were. CDATA becomes text, which is the same thing; the XML declaration and
//! processing instructions, of which libvirt writes none, are left out. A document type is refused: it is where entities
//! that expand to something huge come from.
//!
//! Bytes from outside are limited in size ([`BYTES_MAX`]) and depth ([`DEPTH_MAX`]), and every error has its place.

use std::fmt;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Bytes of the largest document read: what libvirt's own RPC lets pass as one string (`REMOTE_STRING_MAX`, 4 MiB).
pub const BYTES_MAX: usize = 4 << 20;
/// Elements within each other. The deepest a domain has is a backing chain, which libvirt ends at 200 images.
pub const DEPTH_MAX: usize = 256;

/// Why a document was not read. Lines and columns count from 1, columns in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// The document is larger than [`BYTES_MAX`].
    #[error("the XML has {bytes} bytes, more than the {BYTES_MAX} allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// More than [`DEPTH_MAX`] elements within each other.
    #[error("XML line {line}, column {column}: more than {DEPTH_MAX} elements within each other")]
    TooDeep {
        /// Line of the element that is too deep.
        line: usize,
        /// Column of it.
        column: usize,
    },
    /// Not well-formed, or something that is never in a domain definition.
    #[error("XML line {line}, column {column}: {what}")]
    Malformed {
        /// Line of the error.
        line: usize,
        /// Column of it.
        column: usize,
        /// What is wrong there.
        what: String,
    },
}

/// What an element holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Another element.
    Element(Element),
    /// Text, with entities replaced.
    Text(String),
    /// A comment, as it stands between `<!--` and `-->`.
    Comment(String),
}

/// An element: its name with prefix, its attributes in order, what it holds in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// Name, with the prefix if it has one.
    pub name: String,
    attributes: Vec<(String, String)>,
    /// What it holds, in order.
    pub children: Vec<Node>,
}

impl Element {
    /// An empty element.
    pub fn new(name: impl Into<String>) -> Self {
        Element { name: name.into(), ..Element::default() }
    }

    /// Reads a document and returns its root.
    pub fn parse(document: &str) -> Result<Self, XmlError> {
        Parser::new(document)?.run()
    }

    /// With one attribute more.
    #[must_use]
    pub fn with_attribute(mut self, name: &str, value: impl Into<String>) -> Self {
        self.set_attribute(name, value);
        self
    }

    /// With one element more at the end.
    #[must_use]
    pub fn with_child(mut self, child: Element) -> Self {
        self.push(child);
        self
    }

    /// With this text and nothing else in it.
    #[must_use]
    pub fn with_text(mut self, text: impl Into<String>) -> Self {
        self.set_text(text);
        self
    }

    /// The value of an attribute (`xmlns:qemu` is one too).
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// All attributes, in order.
    pub fn attributes(&self) -> impl Iterator<Item = (&str, &str)> {
        self.attributes.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Sets an attribute, at its place if it is there already.
    pub fn set_attribute(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|(n, _)| n == name) {
            Some(slot) => slot.1 = value,
            None => self.attributes.push((name.to_owned(), value)),
        }
    }

    /// Takes an attribute away and returns its value.
    pub fn remove_attribute(&mut self, name: &str) -> Option<String> {
        let at = self.attributes.iter().position(|(n, _)| n == name)?;
        Some(self.attributes.remove(at).1)
    }

    /// The elements in it, in order.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|n| if let Node::Element(e) = n { Some(e) } else { None })
    }

    /// The elements in it, to be changed.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|n| if let Node::Element(e) = n { Some(e) } else { None })
    }

    /// The first element at a path of names, `devices/disk`; the empty path is the element itself.
    pub fn find(&self, path: &str) -> Option<&Element> {
        self.find_all(path).into_iter().next()
    }

    /// All elements at a path of names, in document order.
    pub fn find_all(&self, path: &str) -> Vec<&Element> {
        let mut found = vec![self];
        for name in path.split('/').filter(|n| !n.is_empty()) {
            found = found.into_iter().flat_map(|e| e.elements().filter(move |c| c.name == name)).collect();
        }
        found
    }

    /// The first element at a path of names, to be changed. As [`Element::find`], it looks into every element on the way.
    pub fn find_mut(&mut self, path: &str) -> Option<&mut Element> {
        self.find_all_mut(path).into_iter().next()
    }

    /// All elements at a path of names, to be changed.
    pub fn find_all_mut(&mut self, path: &str) -> Vec<&mut Element> {
        let mut found = vec![self];
        for name in path.split('/').filter(|n| !n.is_empty()) {
            found = found.into_iter().flat_map(|e| e.elements_mut().filter(move |c| c.name == name)).collect();
        }
        found
    }

    /// The attribute of the first element at a path: `value_at("os/type", "machine")`.
    pub fn attribute_at(&self, path: &str, attribute: &str) -> Option<&str> {
        self.find(path)?.attribute(attribute)
    }

    /// The text of the first element at a path, without the white space around it.
    pub fn text_at(&self, path: &str) -> Option<String> {
        Some(self.find(path)?.text())
    }

    /// The text directly in it, without the white space around it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for node in &self.children {
            if let Node::Text(t) = node {
                text.push_str(t);
            }
        }
        text.trim().to_owned()
    }

    /// Replaces everything in it by this text.
    pub fn set_text(&mut self, text: impl Into<String>) {
        self.children = vec![Node::Text(text.into())];
    }

    /// Adds an element at the end.
    pub fn push(&mut self, child: Element) {
        self.children.push(Node::Element(child));
    }

    /// Adds an element before everything else in it.
    pub fn push_front(&mut self, child: Element) {
        self.children.insert(0, Node::Element(child));
    }

    /// The first element of this name directly in it, made at the end if there is none.
    pub fn ensure(&mut self, name: &str) -> &mut Element {
        let at = match self.children.iter().position(|n| matches!(n, Node::Element(e) if e.name == name)) {
            Some(at) => at,
            None => {
                self.push(Element::new(name));
                self.children.len() - 1
            }
        };
        match &mut self.children[at] {
            Node::Element(element) => element,
            Node::Text(_) | Node::Comment(_) => unreachable!("the position of an element was looked up"),
        }
    }

    /// Takes away every element of this name directly in it; says how many there were.
    pub fn remove_all(&mut self, name: &str) -> usize {
        self.remove_where(|e| e.name == name)
    }

    /// Takes away every element directly in it for which `gone` holds; says how many there were.
    pub fn remove_where(&mut self, mut gone: impl FnMut(&Element) -> bool) -> usize {
        let before = self.children.len();
        self.children.retain(|n| !matches!(n, Node::Element(e) if gone(e)));
        before - self.children.len()
    }

    fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        write!(out, "<{}", self.name)?;
        for (name, value) in &self.attributes {
            write!(out, " {name}=\"")?;
            escape(value, true, out)?;
            out.write_char('"')?;
        }
        if self.children.is_empty() {
            return out.write_str("/>");
        }
        out.write_char('>')?;
        for node in &self.children {
            match node {
                Node::Element(e) => e.write(out)?,
                Node::Text(t) => escape(t, false, out)?,
                Node::Comment(c) => write!(out, "<!--{c}-->")?,
            }
        }
        write!(out, "</{}>", self.name)
    }
}

/// The document, without an XML declaration (libvirt writes none either).
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

impl std::str::FromStr for Element {
    type Err = XmlError;
    fn from_str(document: &str) -> Result<Self, XmlError> {
        Element::parse(document)
    }
}

/// Line ends and tabs in attributes, and carriage returns anywhere, would be read back as something else.
fn escape(text: &str, attribute: bool, out: &mut impl fmt::Write) -> fmt::Result {
    for c in text.chars() {
        match c {
            '&' => out.write_str("&amp;")?,
            '<' => out.write_str("&lt;")?,
            '>' => out.write_str("&gt;")?,
            '"' if attribute => out.write_str("&quot;")?,
            '\n' if attribute => out.write_str("&#10;")?,
            '\t' if attribute => out.write_str("&#9;")?,
            '\r' => out.write_str("&#13;")?,
            c => out.write_char(c)?,
        }
    }
    Ok(())
}

struct Parser<'a> {
    document: &'a str,
    reader: Reader<&'a [u8]>,
    open: Vec<Element>,
    root: Option<Element>,
}

impl<'a> Parser<'a> {
    fn new(document: &'a str) -> Result<Self, XmlError> {
        if document.len() > BYTES_MAX {
            return Err(XmlError::TooLarge { bytes: document.len() });
        }
        Ok(Parser { document, reader: Reader::from_str(document), open: Vec::new(), root: None })
    }

    fn run(mut self) -> Result<Element, XmlError> {
        loop {
            let event = match self.reader.read_event() {
                Ok(event) => event,
                Err(e) => {
                    let at = self.reader.error_position();
                    return Err(self.malformed_at(at, e.to_string()));
                }
            };
            match event {
                Event::Start(tag) => {
                    let element = self.element(&tag)?;
                    if self.open.len() >= DEPTH_MAX {
                        let (line, column) = self.place(self.reader.buffer_position());
                        return Err(XmlError::TooDeep { line, column });
                    }
                    self.open.push(element);
                }
                Event::Empty(tag) => {
                    let element = self.element(&tag)?;
                    self.close(element)?;
                }
                Event::End(_) => match self.open.pop() {
                    Some(element) => self.close(element)?,
                    None => return Err(self.malformed("an end without a beginning")),
                },
                Event::Text(text) => {
                    let text = text.xml_content().map_err(|e| self.malformed(e.to_string()))?;
                    self.text(&text)?;
                }
                Event::CData(text) => {
                    let text = text.xml_content().map_err(|e| self.malformed(e.to_string()))?;
                    self.text(&text)?;
                }
                Event::GeneralRef(reference) => {
                    let text = self.reference(&reference)?;
                    self.text(&text)?;
                }
                Event::Comment(comment) => {
                    let comment = comment.decode().map_err(|e| self.malformed(e.to_string()))?.into_owned();
                    if let Some(element) = self.open.last_mut() {
                        element.children.push(Node::Comment(comment));
                    }
                }
                Event::Decl(_) | Event::PI(_) => {}
                Event::DocType(_) => return Err(self.malformed("a document type, which no domain definition has")),
                Event::Eof => break,
            }
        }
        if let Some(element) = self.open.last() {
            let what = format!("the document ends within <{}>", element.name);
            return Err(self.malformed(what));
        }
        let Some(root) = self.root.take() else { return Err(self.malformed("no element at all")) };
        Ok(root)
    }

    fn element(&self, tag: &BytesStart<'_>) -> Result<Element, XmlError> {
        let name = std::str::from_utf8(tag.name().0).map_err(|e| self.malformed(e.to_string()))?;
        if name.is_empty() {
            return Err(self.malformed("an element without a name"));
        }
        let mut element = Element::new(name);
        for attribute in tag.attributes() {
            let attribute = attribute.map_err(|e| self.malformed(e.to_string()))?;
            let name = std::str::from_utf8(attribute.key.0).map_err(|e| self.malformed(e.to_string()))?;
            let value = attribute.unescape_value().map_err(|e| self.malformed(e.to_string()))?;
            element.attributes.push((name.to_owned(), value.into_owned()));
        }
        Ok(element)
    }

    fn close(&mut self, element: Element) -> Result<(), XmlError> {
        match self.open.last_mut() {
            Some(parent) => parent.push(element),
            None if self.root.is_some() => return Err(self.malformed("a second root element")),
            None => self.root = Some(element),
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), XmlError> {
        let Some(parent) = self.open.last_mut() else {
            // A byte order mark, or the line end after the root.
            let outside = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
            return if outside.is_empty() { Ok(()) } else { Err(self.malformed("text outside the root element")) };
        };
        // Text around an entity or a CDATA section comes in pieces, but is one text.
        if let Some(Node::Text(before)) = parent.children.last_mut() {
            before.push_str(text);
        } else if !text.is_empty() {
            parent.children.push(Node::Text(text.to_owned()));
        }
        Ok(())
    }

    fn reference(&self, reference: &quick_xml::events::BytesRef<'_>) -> Result<String, XmlError> {
        if let Some(c) = reference.resolve_char_ref().map_err(|e| self.malformed(e.to_string()))? {
            return Ok(c.to_string());
        }
        let name = reference.decode().map_err(|e| self.malformed(e.to_string()))?;
        match quick_xml::escape::resolve_xml_entity(&name) {
            Some(text) => Ok(text.to_owned()),
            None => Err(self.malformed(format!("&{name}; is not defined"))),
        }
    }

    fn malformed(&self, what: impl Into<String>) -> XmlError {
        self.malformed_at(self.reader.buffer_position(), what)
    }

    fn malformed_at(&self, at: u64, what: impl Into<String>) -> XmlError {
        let (line, column) = self.place(at);
        XmlError::Malformed { line, column, what: what.into() }
    }

    fn place(&self, at: u64) -> (usize, usize) {
        let end = usize::try_from(at).unwrap_or(usize::MAX).min(self.document.len());
        let before = &self.document.as_bytes()[..end];
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        let column = before.iter().rev().take_while(|&&b| b != b'\n').count() + 1;
        (line, column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n  <name>a&amp;b</name>\n  \
        <devices><disk device='disk'/><!-- two --><disk device='cdrom'/></devices>\n  \
        <qemu:commandline><qemu:arg value='-x &quot;y&quot;'/></qemu:commandline>\n</domain>\n";

    #[test]
    fn reads_finds_and_writes_back() {
        let root = Element::parse(SMALL).unwrap();
        assert_eq!(root.attribute("type"), Some("kvm"));
        assert_eq!(root.text_at("name").unwrap(), "a&b");
        assert_eq!(root.find_all("devices/disk").len(), 2);
        assert_eq!(root.attribute_at("qemu:commandline/qemu:arg", "value"), Some("-x \"y\""));
        assert_eq!(root.find("").unwrap().name, "domain");
        let again = Element::parse(&root.to_string()).unwrap();
        assert_eq!(again, root);
        assert!(root.to_string().contains("<!-- two -->"));
    }

    #[test]
    fn what_must_be_escaped_survives() {
        let text = "<&>\"'\r\n\t;]]>";
        let root = Element::new("a").with_attribute("b", text).with_text(text);
        let again = Element::parse(&root.to_string()).unwrap();
        assert_eq!(again.attribute("b"), Some(text));
        assert_eq!(again.children, vec![Node::Text(text.to_owned())]);
    }

    #[test]
    fn pieces_of_text_are_one() {
        let root = Element::parse("<a>x&#65;&lt;<![CDATA[<y>&amp;]]>z</a>").unwrap();
        assert_eq!(root.children, vec![Node::Text("xA<<y>&amp;z".to_owned())]);
    }

    #[test]
    fn changes() {
        let mut root = Element::parse(SMALL).unwrap();
        root.find_mut("devices/disk").unwrap().set_attribute("device", "lun");
        root.ensure("devices").push(Element::new("tpm"));
        assert_eq!(root.find_mut("devices").unwrap().remove_where(|e| e.attribute("device") == Some("cdrom")), 1);
        assert_eq!(root.remove_all("qemu:commandline"), 1);
        root.ensure("metadata").set_text("m");
        assert_eq!(root.remove_attribute("type").as_deref(), Some("kvm"));
        let names: Vec<_> = root.find("devices").unwrap().elements().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["disk", "tpm"]);
        assert_eq!(root.text_at("metadata").unwrap(), "m");
        assert_eq!(root.attribute_at("devices/disk", "device"), Some("lun"));
    }

    #[test]
    fn errors_have_a_place() {
        for (document, line, what) in [
            ("<a>\n  <b>\n</a>", 3, "expected"),
            ("<a>\n&nothing;</a>", 2, "nothing"),
            ("<a/>\n<b/>", 2, "second root"),
            ("<a/>\nx", 2, "outside"),
            ("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>", 1, "document type"),
            ("<a x='1' x='2'/>", 1, "dupl"),
            ("<a>\n\n", 3, "within <a>"),
            ("", 1, "no element"),
            ("<a>&#xD800;</a>", 1, ""),
            ("</a>", 1, ""),
        ] {
            match Element::parse(document) {
                Err(XmlError::Malformed { line: l, what: w, .. }) => {
                    assert_eq!(l, line, "{document:?}: {w}");
                    assert!(w.contains(what), "{document:?}: {w}");
                }
                other => panic!("{document:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn limits() {
        let deep = |n: usize| "<a>".repeat(n) + &"</a>".repeat(n);
        assert!(Element::parse(&deep(DEPTH_MAX)).is_ok());
        assert!(matches!(Element::parse(&deep(DEPTH_MAX + 1)), Err(XmlError::TooDeep { line: 1, .. })));
        let large = format!("<a>{}</a>", " ".repeat(BYTES_MAX));
        assert_eq!(Element::parse(&large), Err(XmlError::TooLarge { bytes: large.len() }));
    }
}
