//! Any tree comes back as it was written; any text is read or refused, never worse.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use vmdr_hypervisor::domain_xml::{DomainXml, add_own_qmp_socket, own_qmp_socket, remove_own_qmp_socket};
use vmdr_hypervisor::xml::{Element, Node};

/// What XML 1.0 can hold: no control characters but tab and line ends.
fn text() -> impl Strategy<Value = String> {
    let character = prop_oneof![
        any::<char>().prop_filter("no control character", |c| !c.is_control()),
        proptest::char::ranges(vec!['\t'..='\n', '\r'..='\r', '"'..='>', '\u{e9}'..='\u{e9}'].into())
    ];
    let allowed = |c: &char| !matches!(*c, '\u{fffe}' | '\u{ffff}' | '\u{85}' | '\u{2028}');
    proptest::collection::vec(character.prop_filter("allowed", allowed), 0..12).prop_map(|c| c.into_iter().collect())
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z_][a-zA-Z0-9_.-]{0,6}(:[a-zA-Z_][a-zA-Z0-9]{0,4})?"
}

fn element() -> impl Strategy<Value = Element> {
    let attributes = || proptest::collection::vec((name(), text()), 0..4);
    let build = |(name, attributes, children): (String, Vec<(String, String)>, Vec<Node>)| {
        let mut element = Element::new(name);
        for (name, value) in attributes {
            element.set_attribute(&name, value);
        }
        // Neighbouring texts are one text when read.
        for child in children {
            match (element.children.last_mut(), child) {
                (Some(Node::Text(before)), Node::Text(more)) => before.push_str(&more),
                (_, Node::Text(empty)) if empty.is_empty() => {}
                (_, child) => element.children.push(child),
            }
        }
        element
    };
    let leaf = (name(), attributes(), Just(Vec::new())).prop_map(build);
    leaf.prop_recursive(5, 40, 6, move |inner| {
        let node = prop_oneof![inner.prop_map(Node::Element), text().prop_map(Node::Text)];
        (name(), attributes(), proptest::collection::vec(node, 0..6)).prop_map(build)
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(root in element()) {
        prop_assert_eq!(Element::parse(&root.to_string()).unwrap(), root);
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        if let Ok(root) = Element::parse(&text) {
            prop_assert_eq!(Element::parse(&root.to_string()).unwrap(), root);
        }
    }

    /// Damaged definitions: bytes of a real one removed, doubled or replaced.
    #[test]
    fn damaged_definitions_are_read_or_refused(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 0..3u8, any::<char>()), 1..8),
    ) {
        let mut text: Vec<char> = include_str!("fixtures/disks.live.xml").chars().collect();
        for (index, kind, character) in damage {
            let at = index.index(text.len());
            match kind {
                0 => drop(text.remove(at)),
                1 => text.insert(at, character),
                _ => text[at] = character,
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(mut root) = Element::parse(&text) {
            let _domain = DomainXml::from_element(&root);
            if add_own_qmp_socket(&mut root).is_ok() {
                prop_assert!(own_qmp_socket(&root).is_some());
                prop_assert!(remove_own_qmp_socket(&mut root));
            }
        }
    }
}
