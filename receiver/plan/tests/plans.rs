//! Plans that are kept as examples: right ones, and wrong ones with the one message that each has.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vmdr_plan::{Mistake, NicTarget, OnFailure, Plan, schema};

fn files(directory: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(directory);
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}

fn read(file: &Path) -> (String, Result<Plan, Vec<Mistake>>) {
    let text = std::fs::read_to_string(file).unwrap();
    let plan = Plan::parse(&text);
    (text, plan)
}

fn right(name: &str) -> Plan {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/right").join(name).with_extension("toml");
    read(&file).1.unwrap()
}

/// `VMDR_GOLDEN=write` writes what is said now.
#[test]
fn each_wrong_plan_has_one_message_at_its_place() {
    let write = std::env::var_os("VMDR_GOLDEN").is_some_and(|v| v == "write");
    let wrong = files("wrong");
    assert!(wrong.len() >= 25, "{}", wrong.len());
    for file in wrong {
        let (_, plan) = read(&file);
        let said = match plan {
            Ok(plan) => plan.unsupported(),
            Err(mistakes) => mistakes,
        };
        let lines: Vec<String> = said.iter().map(|mistake| format!("{mistake}\n")).collect();
        let beside = file.with_extension("txt");
        if write {
            std::fs::write(&beside, lines.concat()).unwrap();
        }
        assert_eq!(lines.len(), 1, "{}: {}", file.display(), lines.concat());
        let expected = std::fs::read_to_string(&beside).unwrap_or_default();
        assert_eq!(lines.concat(), expected, "{}", file.display());
        assert!(!said[0].message.contains('\n') && said[0].place.line > 0, "{}", file.display());
    }
}

#[test]
fn right_plans_are_right() {
    for file in files("right") {
        read(&file).1.unwrap_or_else(|mistakes| panic!("{}: {mistakes:?}", file.display()));
    }
}

#[test]
fn the_plan_with_everything_has_every_key() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/right/everything.toml");
    let text = std::fs::read_to_string(file).unwrap();
    let words: BTreeSet<&str> = text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    for key in schema::TABLES.iter().flat_map(|table| table.keys) {
        assert!(words.contains(key), "{key}");
    }
}

#[test]
fn what_cannot_be_done_yet_is_told_at_its_place() {
    assert_eq!(right("site").unsupported(), []);
    let said = right("everything").unsupported();
    let of = |word: &str| said.iter().filter(|mistake| mistake.message.contains(word)).count();
    for (word, count) in [("iSCSI", 1), ("Ceph", 1), ("NBD", 1), ("block device", 1), ("in a file", 1)] {
        assert_eq!(of(word), count, "{word}: {said:?}");
    }
    assert_eq!((of("updates"), of("resolver")), (0, 0), "{said:?}");
    assert!(said.is_sorted() && said.iter().all(|mistake| mistake.message.contains("not supported yet")), "{said:?}");
}

#[test]
fn all_mistakes_are_told_in_the_order_of_the_text() {
    let text = "[domain.web1]\ncpu_percent = 0\n[[domain.web1.nic]]\nmac = \"x\"\nbridge = 3\nfoo = 1\n[domain.\"\"]\n";
    let mistakes = Plan::parse(text).unwrap_err();
    let places: Vec<String> = mistakes.iter().map(|mistake| mistake.place.to_string()).collect();
    assert_eq!(places, ["2:15", "4:7", "5:10", "6:1", "7:9"], "{mistakes:?}");
}

#[test]
fn columns_are_characters() {
    let mistakes = Plan::parse("[domain.\"d\u{e4}\u{e4}\"]\ndns_names = [\"\u{e4}\", 1]").unwrap_err();
    let places: Vec<String> = mistakes.iter().map(|mistake| mistake.place.to_string()).collect();
    assert_eq!(places, ["2:14", "2:19"], "{mistakes:?}");
}

#[test]
fn what_a_domain_says_goes_before_the_defaults() {
    let plan = right("site");
    let web1 = plan.domain("web1", "");
    let nic = |mac, source| web1.nic(mac, source).and_then(|nic| nic.target.as_ref()).map(|at| at.value.clone());
    let bridge = |name: &str| Some(NicTarget::Bridge(name.to_owned()));
    assert_eq!(nic(Some("52:54:00:12:34:56"), Some("br0")), bridge("br-dmz"));
    assert_eq!(nic(Some("52:54:00:00:00:01"), Some("br0")), bridge("br-dr"));
    assert_eq!(nic(None, Some("default")), Some(NicTarget::Network("dr".to_owned())));
    assert_eq!(nic(None, Some("br7")), None);
    assert_eq!((web1.before.len(), web1.after.len()), (1, 1));
    assert_eq!((web1.before[0].timeout_seconds, web1.before[0].on_failure), (5, OnFailure::Abort));
    assert_eq!((web1.after[0].timeout_seconds, web1.after[0].on_failure), (20, OnFailure::Warn));
    let percent = |domain: &vmdr_plan::Domain| domain.limits.cpu_percent.as_ref().map(|at| at.value);
    assert_eq!((percent(web1), percent(plan.domain("db 1", ""))), (Some(150), None));
    assert!(plan.domain("db 1", "").nics.iter().all(|nic| !nic.announce));
    let other = plan.domain("unknown", "");
    assert!(other.nics.len() == 2 && other.after.len() == 1 && other.nics[0].announce);
}

/// Keys in backquotes in the first cells of a section's table.
fn documented(section: &str) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    // A second table of a section, such as that of the environment, is about something else.
    let rows = section.lines().skip_while(|line| !line.starts_with("| key |")).take_while(|line| line.starts_with('|'));
    for row in rows.skip(2) {
        let cell = row.split('|').nth(1).unwrap();
        keys.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    keys
}

#[test]
fn the_reference_has_every_key_and_no_other() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/plan.md");
    let text = std::fs::read_to_string(file).unwrap();
    let reference = text.split("\n## Reference\n").nth(1).expect("a section Reference");
    let sections: Vec<&str> = reference.split("\n### ").skip(1).collect();
    let titles: BTreeSet<&str> = sections.iter().map(|section| section.lines().next().unwrap()).collect();
    let headers: BTreeSet<&str> = schema::TABLES.iter().map(|table| table.header).collect();
    assert_eq!(titles, headers);
    for table in schema::TABLES {
        let section = sections.iter().find(|section| section.lines().next() == Some(table.header)).unwrap();
        let keys: BTreeSet<String> = table.keys.iter().map(|key| (*key).to_owned()).collect();
        assert_eq!(documented(section), keys, "{}", table.header);
    }
}

#[test]
fn the_example_of_the_reference_is_right() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/plan.md");
    let text = std::fs::read_to_string(file).unwrap();
    let example = text.split("```toml\n").find(|block| block.starts_with("# /etc/vmdr/plan.toml")).unwrap();
    let plan = Plan::parse(example.split("```").next().unwrap()).unwrap();
    assert_eq!((plan.unsupported(), plan.domains.len()), (Vec::new(), 1));
}

#[test]
fn whatever_is_missing_of_a_plan_its_mistakes_are_within_it() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/right/everything.toml");
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.is_ascii());
    let mut wrong = 0;
    for at in 0..text.len() {
        for changed in [format!("{}{}", &text[..at], &text[at + 1..]), format!("{}\"{}", &text[..at], &text[at..])] {
            let lines: Vec<&str> = changed.split('\n').collect();
            for Mistake { place, message } in Plan::parse(&changed).err().unwrap_or_default() {
                wrong += 1;
                let line = lines.get(place.line as usize - 1).unwrap_or_else(|| panic!("{place}: {message}"));
                assert!((1..=line.chars().count() as u32 + 1).contains(&place.column), "{place}: {message}");
                assert!(!message.is_empty() && !message.contains('\n'), "{place}: {message:?}");
            }
        }
    }
    assert!(wrong > text.len(), "{wrong}");
}

#[test]
fn only_what_a_guest_is_given_is_limited() {
    let addresses: Vec<String> = (1..=40).map(|i| format!("\"10.0.0.{i}/24\"")).collect();
    let nic = format!("[[domain.web1.nic]]\nsource = \"br0\"\naddresses = [{}]\n", addresses.join(", "));
    assert!(Plan::parse(&nic).is_ok());
    assert!(Plan::parse(&format!("{nic}addressing = \"changed\"\n")).is_err());
}
