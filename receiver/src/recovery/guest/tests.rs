//! Guests that are this test: honest ones, silent ones and hostile ones.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use vmdr_guest_channel::exchange::Desk;
use vmdr_guest_channel::network::{Item, Phase};
use vmdr_guest_channel::{Decoder, Frame, Hello, Message, features};
use vmdr_plan::Plan;

const PLAN: &str = "[domain.web1]\nhostname = \"web1-dr\"\ndns_servers = [\"10.1.0.53\"]\n[[domain.web1.nic]]\nmac = \
                    \"52:54:00:00:00:01\"\naddressing = \"changed\"\naddresses = [\"10.1.0.5/24\", \"fd00::5/64\"]\ngateway = \"10.1.0.1\"\n\
                    routes = [{ to = \"10.9.0.0/16\", via = \"10.1.0.2\" }]\n[[domain.web1.nic]]\nsource = \"br1\"\naddresses = [\"10.2.0.5/24\"]\n";

fn original() -> Element {
    let nic = |i: u8, bridge: &str| {
        format!("<interface type='bridge'><mac address='52:54:00:00:00:0{i}'/><source bridge='{bridge}'/></interface>")
    };
    Element::parse(&format!("<domain><devices>{}{}</devices></domain>", nic(1, "br0"), nic(2, "br1"))).unwrap()
}

fn network() -> Network {
    wanted(&original(), Plan::parse(PLAN).unwrap().domain("web1", ""))
}

#[test]
fn a_plan_becomes_a_description_of_what_is_changed_alone() {
    let expected = "vmdr-network 1\nhostname web1-dr\nnameserver 10.1.0.53\nnic 52:54:00:00:00:01\naddress 10.1.0.5/24\naddress \
                    fd00::5/64\nroute 0.0.0.0/0 via 10.1.0.1\nroute 10.9.0.0/16 via 10.1.0.2\n";
    assert_eq!(network().encode().as_deref(), Ok(expected));
    assert_eq!(steps(&network()).len(), 3);
    let kept = Plan::parse("[[domain.web1.nic]]\nsource = \"br0\"\naddresses = [\"10.1.0.5/24\"]\n").unwrap();
    assert!(wanted(&original(), kept.domain("web1", "")).is_home());
}

/// A guest behind a socket: what it does with each frame.
fn guest(act: impl FnMut(&mut UnixStream, Frame) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let mut act = act;
        let mut stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut decoder = Decoder::default();
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            let mut rest = &buffer[..count];
            while let Some(frame) = decoder.next(&mut rest) {
                act(&mut stream, frame);
            }
        }
    });
    (directory, path)
}

fn say(stream: &mut UnixStream, number: u32, message: Message) {
    // A host that has enough is gone.
    let _ = stream.write_all(&Frame { number, message }.encode());
}

fn greet(stream: &mut UnixStream, frame: &Frame, able: u32) -> bool {
    let Message::Hello(hello) = &frame.message else { return false };
    if hello.answer {
        say(stream, frame.number, Message::Hello(Hello::own(able, false, "tools")));
    }
    true
}

#[test]
fn tools_are_asked_until_they_are_done() {
    let (mut desk, mut asked) = (Desk::default(), 0);
    let (_directory, path) = guest(move |stream, frame| {
        if greet(stream, &frame, features::NETWORK) {
            return;
        }
        asked += 1;
        let (answer, wanted) = desk.hear(&frame.message);
        if let Some(wanted) = wanted {
            assert_eq!(wanted, network());
        }
        if asked == 3 {
            let item = |subject: &str, error: &str| Item {
                subject: subject.to_owned(),
                done: "x\u{1b}[2J".to_owned(),
                error: error.to_owned(),
            };
            desk.done(&Report { items: vec![item("NIC 52:54:00:00:00:01", ""), item("NIC 2", "no such NIC")] });
        }
        say(stream, frame.number, answer);
    });
    let changes = by_tools("web1", path, &network(), HEARD_LIMIT, true);
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert_eq!((changes[0].error.as_str(), changes[1].done.as_str()), ("no such NIC", "x[2J"));
}

#[test]
fn older_tools_are_told_and_not_waited_for() {
    let (_directory, path) = guest(|stream, frame| {
        greet(stream, &frame, features::CLOCK);
    });
    let begun = Instant::now();
    let changes = by_tools("web1", path.clone(), &network(), HEARD_LIMIT, true);
    assert!(changes.len() == 1 && changes[0].error.contains("of a version that cannot"), "{changes:?}");
    assert!(begun.elapsed() < HEARD_LIMIT);
}

#[test]
fn a_silent_guest_is_given_up_in_time_and_a_guest_at_home_without_a_word() {
    let (_directory, path) = guest(|_, _| {});
    let begun = Instant::now();
    assert_eq!(by_tools("web1", path.clone(), &Network::default(), HOME_LIMIT, false), []);
    assert!(begun.elapsed() >= HOME_LIMIT && begun.elapsed() < HOME_LIMIT + HEARD_LIMIT);
}

#[test]
fn a_guest_that_had_tools_and_is_not_heard_of_is_told() {
    let (_directory, path) = guest(|_, _| {});
    let changes = by_tools("web1", path, &Network::default(), Duration::from_millis(300), true);
    assert!(changes.len() == 1 && changes[0].error.contains("not been heard of"), "{changes:?}");
}

#[test]
fn a_report_that_has_nothing_of_a_nic_is_no_success() {
    for (items, ends) in [(Vec::new(), 1), (vec![("NIC 52:54:00:00:00:01", "")], 0), (vec![("host name", "")], 1)] {
        let item = |(subject, error): (&str, &str)| Item {
            subject: subject.to_owned(),
            done: String::new(),
            error: error.to_owned(),
        };
        let changes = complete(Report { items: items.into_iter().map(item).collect() }, &network());
        assert_eq!(changes.iter().filter(|change| !change.error.is_empty()).count(), ends, "{changes:?}");
    }
}

#[test]
fn what_no_guest_takes_is_refused_before_it_runs() {
    let parse = |text: &str| Plan::parse(text).unwrap().domain("web1", "").clone();
    assert_eq!(refusal(&original(), &parse(PLAN)), None);
    let both = "[[domain.web1.nic]]\nsource = \"lan\"\naddressing = \"changed\"\naddresses = [\"10.1.0.5/24\"]\n";
    let lan = original();
    let xml = lan.to_string().replace("br0", "lan").replace("br1", "lan");
    let said = refusal(&Element::parse(&xml).unwrap(), &parse(both));
    assert!(said.as_ref().is_some_and(|said| said.contains("the same addresses")), "{said:?}");
    let nics: String = (0..40)
        .map(|i| format!("<interface type='bridge'><mac address='52:54:00:00:01:{i:02x}'/></interface>"))
        .collect();
    let changed: String = (0..40)
        .map(|i| {
            format!(
                "[[domain.web1.nic]]\nmac = \"52:54:00:00:01:{i:02x}\"\naddressing = \"changed\"\naddresses = \
                 [\"10.2.{i}.5/24\"]\n"
            )
        })
        .collect();
    let many = Element::parse(&format!("<domain><devices>{nics}</devices></domain>")).unwrap();
    let said = refusal(&many, &parse(&changed));
    assert!(said.as_ref().is_some_and(|said| said.contains("one too many")), "{said:?}");
}

#[test]
fn a_guest_that_talks_nonsense_without_an_end_holds_up_nobody_for_ever() {
    for phase in [Phase::Working, Phase::Receiving, Phase::Done] {
        let (_directory, path) = guest(move |stream, frame| {
            if !greet(stream, &frame, features::NETWORK) {
                let bytes = vec![b'x'; 480];
                say(stream, frame.number, Message::NetworkIs { phase, at: 1, total: 8000, bytes });
                say(stream, frame.number.wrapping_add(1), Message::Unknown(7));
            }
        });
        let channel = GuestChannel::open("web1", path, true).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        let line = loop {
            match channel.networker() {
                Ok(line) => break line,
                Err(why) => assert!(Instant::now() < until, "{why}"),
            }
            std::thread::sleep(REST);
        };
        let begun = Instant::now();
        let ended = converse(&line, &network(), Duration::from_secs(2));
        assert!(ended.is_err(), "{phase:?}: {ended:?}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}

fn interfaces() -> Value {
    json!([
        { "name": "lo", "hardware-address": "00:00:00:00:00:00" },
        { "name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": [
            { "ip-address": "10.0.0.5", "prefix": 24 }, { "ip-address": "10.1.0.5", "prefix": 24 },
            { "ip-address": "fe80::1", "prefix": 64 }, { "ip-address": "x", "prefix": 1 }, { "ip-address": "10.0.0.6", "prefix": 99 }] },
    ])
}

/// After the change.
fn changed() -> Value {
    json!([{ "name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": [
        { "ip-address": "10.1.0.5", "prefix": 24 }, { "ip-address": "fd00::5", "prefix": 64 }] }])
}

#[test]
fn a_delete_that_fails_ends_nothing_and_what_is_left_is_seen() {
    let mut refuses = |words: &[String]| match words.iter().any(|word| word == "delete") {
        true => Err("it is gone".to_owned()),
        false => Ok(()),
    };
    let nic = &network().nics[0];
    assert!(by_ip(nic, &interfaces(), &mut refuses, &mut || Ok(changed())).is_ok());
    let said = by_ip(nic, &interfaces(), &mut refuses, &mut || Ok(interfaces()));
    assert_eq!(said, Err("eth0: it has not fd00::5/64, it still has 10.0.0.5/24".to_owned()));
}

#[test]
fn the_qemu_guest_agent_runs_ip() {
    let mut ran = Vec::new();
    let mut run = |words: &[String]| {
        ran.push(words.join(" "));
        Ok(())
    };
    let done = by_ip(&network().nics[0], &interfaces(), &mut run, &mut || Ok(changed())).unwrap();
    assert!(done.contains("10.1.0.5/24") && done.contains("on eth0"), "{done}");
    let expected = [
        "ip link set dev eth0 up",
        "ip address replace 10.1.0.5/24 dev eth0",
        "ip address replace fd00::5/64 dev eth0 nodad",
        "ip address delete 10.0.0.5/24 dev eth0",
        "ip address replace 10.1.0.5/24 dev eth0",
        "ip address replace fd00::5/64 dev eth0 nodad",
        "ip route replace 0.0.0.0/0 via 10.1.0.1 dev eth0",
        "ip route replace 10.9.0.0/16 via 10.1.0.2 dev eth0",
    ];
    assert_eq!(ran, expected);
}

#[test]
fn a_device_whose_name_is_no_name_is_not_touched() {
    for name in ["-force", "eth0; reboot", "", "a\nb", "sixteen-letters-", "../x"] {
        let mut claimed = interfaces();
        claimed[1]["name"] = json!(name);
        let said = by_ip(&network().nics[0], &claimed, &mut |_| panic!("it was run"), &mut || Ok(changed()));
        assert!(said.is_err_and(|why| why.contains("no name that can be used")), "{name:?}");
    }
    let missing = Nic { mac: Mac([2, 0, 0, 0, 0, 9]), ..Nic::default() };
    assert!(by_ip(&missing, &interfaces(), &mut |_| Ok(()), &mut || Ok(changed())).is_err());
}
