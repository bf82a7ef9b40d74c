//! Names that lead to a guest's addresses here: dynamic updates (RFC 2136), signed with TSIG (RFC 8945), over TCP.
//!
//! One update per zone. In the plan's zone the A and AAAA records of each of the domain's names become those of its addresses; in the
//! zones of names of addresses each address has one PTR record, to the first of the names. An update replaces what was there, so that
//! it can be repeated. The server's answer has to be signed with the same key.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::message_builder::{AuthorityBuilder, MessageBuilder};
use domain::base::rdata::UnknownRecordData;
use domain::base::{Message, Name};
use domain::rdata::tsig::Time48;
use domain::rdata::{A, Aaaa, Ptr};
use domain::tsig::{Algorithm, ClientTransaction, Key, KeyName};
use vmdr_plan::{Dns, OnFailure};
use vmdr_proto::control::Change;

/// More than any key file has.
const KEY_FILE_BYTES_MAX: u64 = 16 << 10;
/// Between two attempts.
const REST: Duration = Duration::from_millis(500);
/// The fewest bytes of a secret: less is guessed.
const SECRET_BYTES_MIN: usize = 16;

/// What one zone is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Update {
    zone: String,
    /// Of each name its addresses.
    names: Vec<(String, Vec<IpAddr>)>,
    /// Of each address its name as a name, and what it leads to.
    pointers: Vec<(String, String)>,
}

/// Why an attempt has come to nothing.
enum Trouble {
    /// Another attempt may do better.
    Passing(String),
    /// The server says no.
    Refused(String),
}

/// Tells the plan's server. What was done, zone by zone, and a sentence if that is to end the activation.
pub fn update(dns: &Dns, names: &[String], addresses: &[IpAddr]) -> (Vec<Change>, Option<String>) {
    if names.is_empty() {
        return (Vec::new(), None);
    }
    if addresses.is_empty() {
        let error = "no NIC that the guest has was found in the plan with `addresses`".to_owned();
        let failed = Some(format!("{} leads nowhere: {error}", names.join(", ")));
        let change = Change { subject: format!("DNS zone {}", dns.zone), done: String::new(), error };
        return (vec![change], failed.filter(|_| dns.on_failure == OnFailure::Abort));
    }
    let key = read_key(&dns.key_file.value);
    let mut changes = Vec::new();
    for update in updates(dns, names, addresses) {
        let told = match &key {
            Ok(key) => tell(dns, key, &update),
            Err(error) => Err(error.clone()),
        };
        let (done, error) = match told {
            Ok(()) => (describe(&update, dns.ttl_seconds), String::new()),
            Err(error) => (String::new(), error),
        };
        changes.push(Change { subject: format!("DNS zone {}", update.zone), done, error });
    }
    let failed = changes.iter().find(|change| !change.error.is_empty());
    let failed = failed.map(|change| format!("the update of {} failed: {}", change.subject, change.error));
    (changes, failed.filter(|_| dns.on_failure == OnFailure::Abort))
}

fn updates(dns: &Dns, names: &[String], addresses: &[IpAddr]) -> Vec<Update> {
    let forward = names.iter().map(|name| (name.clone(), addresses.to_vec())).collect();
    let mut all = vec![Update { zone: dns.zone.clone(), names: forward, pointers: Vec::new() }];
    for zone in &dns.reverse_zones {
        let zone = &zone.value;
        let below = |name: &str, zone: &str| name.ends_with(&format!(".{zone}"));
        let closest = |name: &str| {
            let zones = dns.reverse_zones.iter().map(|zone| &zone.value);
            zones.filter(|zone| below(name, zone)).max_by_key(|zone| zone.len()) == Some(zone)
        };
        let reverse = addresses.iter().map(|address| reverse_name(*address)).filter(|name| closest(name));
        let pointers: Vec<(String, String)> = reverse.filter_map(|name| Some((name, names.first()?.clone()))).collect();
        if !pointers.is_empty() {
            all.push(Update { zone: zone.clone(), names: Vec::new(), pointers });
        }
    }
    all
}

fn describe(update: &Update, ttl: u64) -> String {
    let names = update.names.iter().map(|(name, addresses)| {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        format!("{name} is {}", addresses.join(", "))
    });
    let pointers = update.pointers.iter().map(|(address, name)| format!("{address} is {name}"));
    let all: Vec<String> = names.chain(pointers).collect();
    format!("{} ({ttl} s)", all.join("; "))
}

/// `5.0.1.10.in-addr.arpa`.
fn reverse_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(four) => {
            let [a, b, c, d] = four.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(six) => {
            let nibbles = six.octets().into_iter().rev().flat_map(|byte| [byte & 15, byte >> 4]);
            let nibbles: String = nibbles.map(|nibble| format!("{nibble:x}.")).collect();
            format!("{nibbles}ip6.arpa")
        }
    }
}

/// A TSIG key as `tsig-keygen` or `keymgr -t` write it, or `[hmac-sha256:]NAME:SECRET`. An error says what is wrong, and never has
/// anything of the secret.
pub fn read_key(file: &str) -> Result<Key, String> {
    let told = |what: String| format!("the TSIG key in {file}: {what}");
    let read = || -> io::Result<(u32, String)> {
        let open = std::fs::File::open(file)?;
        let mode = open.metadata()?.mode();
        let mut text = String::new();
        open.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text)?;
        Ok((mode, text))
    };
    let (mode, text) = read().map_err(|error| told(error.to_string()))?;
    if mode & 0o077 != 0 {
        return Err(told(format!("others than its owner can read or write it: `chmod 600 {file}`")));
    }
    parse_key(&text).map_err(told)
}

fn parse_key(text: &str) -> Result<Key, String> {
    // (`//` begins a remark in such files, too, but is found in secrets.)
    let lines = text.lines().filter(|line| !line.trim_start().starts_with(['#', '/']));
    let text = lines.collect::<Vec<_>>().join("\n");
    let (algorithm, name, secret) = bind_key(&text).ok_or(
        "it is neither `key \"NAME\" { algorithm hmac-sha256; secret \"...\"; };` nor `hmac-sha256:NAME:SECRET`",
    )?;
    let algorithm = match algorithm.to_ascii_lowercase().trim_end_matches('.') {
        "hmac-sha256" => Algorithm::Sha256,
        "hmac-sha384" => Algorithm::Sha384,
        "hmac-sha512" => Algorithm::Sha512,
        // Not what it is: in a file of another form it may be the secret.
        _ => return Err("its algorithm is none of hmac-sha256, hmac-sha384 and hmac-sha512".to_owned()),
    };
    let name = KeyName::from_str(&name).map_err(|error| format!("its name: {error}"))?;
    let secret = BASE64.decode(secret.as_bytes()).map_err(|_| "its secret is no base64".to_owned())?;
    if secret.len() < SECRET_BYTES_MIN {
        return Err(format!("its secret has less than {SECRET_BYTES_MIN} bytes"));
    }
    Key::new(algorithm, &secret, name, None, None).map_err(|error| error.to_string())
}

/// Algorithm, name and secret.
fn bind_key(text: &str) -> Option<(String, String, String)> {
    let text = text.trim();
    if let Some((head, body)) = text.split_once('{') {
        let name = head.trim().strip_prefix("key")?.trim().trim_matches('"');
        let field = |key: &str| {
            let mut fields = body.split(['{', '}', ';']).map(str::trim);
            let value =
                fields.find_map(|field| field.strip_prefix(key).filter(|rest| rest.starts_with([' ', '\t', '"'])));
            value.map(|value| value.trim().trim_matches('"').to_owned())
        };
        return Some((field("algorithm")?, name.to_owned(), field("secret")?));
    }
    if let Some(yaml) = yaml_key(text) {
        return Some(yaml);
    }
    let mut parts = text.rsplitn(3, ':');
    let (secret, name) = (parts.next()?, parts.next()?);
    let algorithm = parts.next().unwrap_or("hmac-sha256");
    let one_word = [secret, name, algorithm].iter().all(|part| !part.is_empty() && !part.contains(char::is_whitespace));
    one_word.then(|| (algorithm.to_owned(), name.to_owned(), secret.to_owned()))
}

/// As `keymgr -t` writes it: lines `id:`, `algorithm:`, `secret:`.
fn yaml_key(text: &str) -> Option<(String, String, String)> {
    let field = |key: &str| {
        let lines = text.lines().map(|line| line.trim().trim_start_matches("- "));
        let value = lines.filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key)?.1;
        Some(value.trim().trim_matches('"').to_owned()).filter(|value| !value.is_empty())
    };
    Some((field("algorithm")?, field("id")?, field("secret")?))
}

/// Tries as often as the plan says.
fn tell(dns: &Dns, key: &Key, update: &Update) -> Result<(), String> {
    let limit = Duration::from_secs(dns.timeout_seconds);
    let mut last = String::new();
    for attempt in 0..dns.tries {
        if attempt > 0 {
            std::thread::sleep(REST);
        }
        match attempt_within(dns, key, update, limit) {
            Ok(()) => return Ok(()),
            Err(Trouble::Refused(why)) => return Err(format!("{}: {why}", dns.server)),
            Err(Trouble::Passing(why)) => last = why,
        }
    }
    Err(format!("{}: {last} (tried {} times)", dns.server, dns.tries))
}

/// On a thread of its own: finding a server's address may take as long as it likes.
fn attempt_within(dns: &Dns, key: &Key, update: &Update, limit: Duration) -> Result<(), Trouble> {
    let (server, ttl) = (dns.server.clone(), u32::try_from(dns.ttl_seconds).unwrap_or(u32::MAX));
    let (key, update) = (key.clone(), update.clone());
    let (sender, answer) = mpsc::sync_channel(1);
    let until = Instant::now() + limit;
    let spawned = std::thread::Builder::new().name("dns".to_owned()).spawn(move || {
        // Whoever waits may have given up.
        let _ = sender.try_send(attempt(&server, &key, &update, ttl, until));
    });
    spawned.map_err(|error| Trouble::Passing(format!("start a thread: {error}")))?;
    let late = || Trouble::Passing(format!("no answer within {} s", limit.as_secs()));
    answer.recv_timeout(limit).unwrap_or_else(|_| Err(late()))
}

fn attempt(server: &str, key: &Key, update: &Update, ttl: u32, until: Instant) -> Result<(), Trouble> {
    let passing = |error: io::Error| Trouble::Passing(error.to_string());
    let (request, transaction) = request(key, update, ttl).map_err(Trouble::Refused)?;
    let mut last = Trouble::Passing("its name has no address".to_owned());
    for address in server.to_socket_addrs().map_err(passing)?.take(4) {
        match exchange(address, &request, until) {
            Ok(answer) => return understand(answer, &transaction),
            Err(error) => last = passing(error),
        }
    }
    Err(last)
}

/// The signed update.
fn request(key: &Key, update: &Update, ttl: u32) -> Result<(Vec<u8>, ClientTransaction<Key>), String> {
    let name = |text: &str| Name::<Vec<u8>>::from_str(text).map_err(|error| format!("{text}: {error}"));
    let long = "the update is too long for one message".to_owned();
    let mut message = MessageBuilder::new_vec();
    message.header_mut().set_id(uuid::Uuid::new_v4().as_fields().1);
    message.header_mut().set_opcode(Opcode::UPDATE);
    let mut question = message.question();
    question.push((name(&update.zone)?, Rtype::SOA)).map_err(|_| long.clone())?;
    let mut section = question.authority();
    for (text, addresses) in &update.names {
        let owner = name(text)?;
        for kind in [Rtype::A, Rtype::AAAA] {
            delete(&mut section, &owner, kind).map_err(|()| long.clone())?;
        }
        for address in addresses {
            let pushed = match address {
                IpAddr::V4(four) => section.push((&owner, Class::IN, ttl, A::new(*four))),
                IpAddr::V6(six) => section.push((&owner, Class::IN, ttl, Aaaa::new(*six))),
            };
            pushed.map_err(|_| long.clone())?;
        }
    }
    for (text, target) in &update.pointers {
        let owner = name(text)?;
        delete(&mut section, &owner, Rtype::PTR).map_err(|()| long.clone())?;
        section.push((&owner, Class::IN, ttl, Ptr::new(name(target)?))).map_err(|_| long.clone())?;
    }
    let mut message = section.additional();
    let transaction = ClientTransaction::request(key.clone(), &mut message, Time48::now()).map_err(|_| long)?;
    Ok((message.finish(), transaction))
}

/// "Delete an RRset": class ANY, time to live 0, no data.
fn delete(section: &mut AuthorityBuilder<Vec<u8>>, owner: &Name<Vec<u8>>, kind: Rtype) -> Result<(), ()> {
    let none = UnknownRecordData::from_octets(kind, [0_u8; 0]).map_err(drop)?;
    section.push((owner, Class::ANY, 0_u32, none)).map_err(drop)
}

/// Sends a message and reads the answer.
fn exchange(address: SocketAddr, request: &[u8], until: Instant) -> io::Result<Vec<u8>> {
    let left = || {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let length = u16::try_from(request.len()).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, left()?)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(left()?))?;
    stream.write_all(&[&length.to_be_bytes(), request].concat())?;
    let mut read = |buffer: &mut [u8]| -> io::Result<()> {
        let mut at = 0;
        while at < buffer.len() {
            stream.set_read_timeout(Some(left()?))?;
            match stream.read(&mut buffer[at..])? {
                0 => return Err(io::Error::other("it closed the connection before it had answered")),
                count => at += count,
            }
        }
        Ok(())
    };
    let mut length = [0; 2];
    read(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    read(&mut answer)?;
    Ok(answer)
}

fn understand(answer: Vec<u8>, transaction: &ClientTransaction<Key>) -> Result<(), Trouble> {
    let refused = |what: String| Trouble::Refused(what);
    let mut message = Message::from_octets(answer).map_err(|_| refused("its answer is too short".to_owned()))?;
    let code = message.header().rcode();
    if let Err(error) = transaction.answer(&mut message, Time48::now()) {
        let said = if code == Rcode::NOERROR { String::new() } else { format!("it says {code}; ") };
        return Err(refused(format!("{said}its answer is not signed with the plan's key: {error}")));
    }
    match code {
        Rcode::NOERROR => Ok(()),
        Rcode::SERVFAIL => Err(Trouble::Passing("it says SERVFAIL".to_owned())),
        other => Err(refused(format!("it says {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_plan::{At, Plan};

    fn dns(more: &str) -> Dns {
        let text = format!("[dns]\nserver = \"127.0.0.1:1\"\nzone = \"example.org\"\nkey_file = \"/k\"\n{more}");
        Plan::parse(&text).unwrap().dns.unwrap().value
    }

    const SECRET: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

    #[test]
    fn keys_are_read_as_others_write_them() {
        for text in [
            format!("key \"vmdr.example\" {{\n\talgorithm hmac-sha256;\n\tsecret \"{SECRET}\";\n}};\n"),
            format!("# a remark\nkey vmdr.example {{ algorithm \"hmac-sha512\"; secret {SECRET}; }};"),
            format!("hmac-sha256:vmdr.example:{SECRET}\n"),
            format!("vmdr.example:{SECRET}"),
            format!(
                "# hmac-sha256:vmdr.example:...\nkey:\n  - id: vmdr.example\n    algorithm: hmac-sha256\n    secret: {SECRET}\n"
            ),
        ] {
            let key = parse_key(&text).unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(key.name().to_string(), "vmdr.example");
        }
        for (text, why) in [
            ("", "neither"),
            ("nonsense", "neither"),
            ("vmdr:x", "no base64"),
            ("vmdr:MDEy", "less than"),
            (&format!("hmac-md5:vmdr:{SECRET}"), "its algorithm is none of"),
            (&format!("{SECRET}:vmdr:MDEy"), "its algorithm is none of"),
        ] {
            let said = parse_key(text).unwrap_err();
            let secret = said.to_ascii_lowercase().contains(&SECRET.to_ascii_lowercase());
            assert!(said.contains(why) && !secret, "{text}: {said}");
        }
    }

    #[test]
    fn a_key_that_others_can_read_is_none() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        std::fs::write(&file, format!("vmdr:{SECRET}")).unwrap();
        let read = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            read_key(&file.display().to_string())
        };
        assert!(read(0o600).is_ok());
        assert!(read(0o640).is_err_and(|why| why.contains("chmod 600")));
        assert!(read_key("/no/such/key").is_err_and(|why| why.contains("No such file")));
    }

    #[test]
    fn addresses_find_their_zones() {
        let more =
            "reverse_zones = [\"10.in-addr.arpa\", \"1.10.in-addr.arpa\", \"0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa\"]\n";
        let addresses: Vec<IpAddr> =
            ["10.1.0.5", "10.2.0.5", "192.0.2.1", "2001:db8::5"].map(|a| a.parse().unwrap()).to_vec();
        let names = ["web1.example.org".to_owned(), "www.example.org".to_owned()];
        let all = updates(&dns(more), &names, &addresses);
        let told: Vec<(String, usize, String)> = all
            .into_iter()
            .map(|u| (u.zone, u.names.len(), u.pointers.first().map(|p| p.0.clone()).unwrap_or_default()))
            .collect();
        let six = format!("5.{}8.b.d.0.1.0.0.2.ip6.arpa", "0.".repeat(23));
        let expected = [
            ("example.org", 2, ""),
            ("10.in-addr.arpa", 0, "5.0.2.10.in-addr.arpa"),
            ("1.10.in-addr.arpa", 0, "5.0.1.10.in-addr.arpa"),
            ("0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa", 0, six.as_str()),
        ];
        assert_eq!(told, expected.map(|(zone, names, first)| (zone.to_owned(), names, first.to_owned())));
    }

    #[test]
    fn nothing_is_asked_where_nothing_is_to_be_told() {
        assert_eq!(update(&dns(""), &[], &["10.1.0.5".parse().unwrap()]), (Vec::new(), None));
        let unreadable = Dns { key_file: At { value: "/no/such/key".to_owned(), ..At::default() }, ..dns("") };
        let (changes, failed) = update(&unreadable, &["a.example.org".to_owned()], &["10.1.0.5".parse().unwrap()]);
        assert!(changes[0].error.contains("/no/such/key") && failed.is_some());
    }
}
