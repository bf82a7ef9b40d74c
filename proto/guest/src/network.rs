//! What a guest's network is to be, and what became of it: the texts that travel in pieces as [`crate::Message::NetworkPut`] and
//! [`crate::Message::NetworkIs`].
//!
//! A description is complete: what a guest was given before and is not in it any more goes back to what it was before ("home"), and an
//! empty one ([`Network::default`]) takes all of it home. It is text, a line for each thing, so that it is what lies on the guest's
//! disk too:
//!
//! ```text
//! vmdr-network 1
//! hostname web1-dr
//! nameserver 10.1.0.53
//! search example.org
//! nic 52:54:00:12:34:56
//! address 10.1.0.5/24
//! route 0.0.0.0/0 via 10.1.0.1
//! ```
//!
//! `address` and `route` are of the `nic` above them. A line that is not known refuses all of it: half a network is worse than none.
//!
//! A report has a line for each thing, `SUBJECT TAB WHAT WAS DONE TAB ERROR`; an empty error is none.

use std::fmt::{self, Write};
use std::net::IpAddr;

/// The most bytes of either text.
pub const NETWORK_BYTES_MAX: usize = 8192;
/// The most bytes of a text that travel in one message.
pub const PIECE_BYTES_MAX: usize = 480;
/// The most NICs of a description.
pub const NICS_MAX: usize = 32;
/// The most addresses of a NIC.
pub const ADDRESSES_MAX: usize = 32;
/// The most routes of a NIC.
pub const ROUTES_MAX: usize = 64;
/// The most name servers, and the most domains to append.
pub const RESOLVER_MAX: usize = 8;
/// The most lines of a report.
pub const ITEMS_MAX: usize = 128;
/// The most bytes of a column of a report.
const COLUMN_BYTES_MAX: usize = 400;
const HEADER: &str = "vmdr-network 1";

/// An address with the length of its network's prefix, `10.1.0.5/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network, at most those of the address.
    pub prefix: u8,
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Subnet {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= most).then_some(Self { address, prefix })
    }

    /// Whether an address lies in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let same = |own: u128, other: u128, bits: u32| {
            let rest = bits.saturating_sub(u32::from(self.prefix));
            own.checked_shr(rest) == other.checked_shr(rest)
        };
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => same(own.to_bits().into(), other.to_bits().into(), 32),
            (IpAddr::V6(own), IpAddr::V6(other)) => same(own.to_bits(), other.to_bits(), 128),
            _ => false,
        }
    }

    /// Whether this is the way to everything that no other route leads to.
    pub fn is_default(&self) -> bool {
        self.prefix == 0
    }
}

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Where to; `0.0.0.0/0` or `::/0`: everything else.
    pub to: Subnet,
    /// Through whom.
    pub via: IpAddr,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} via {}", self.to, self.via)
    }
}

/// A NIC's MAC address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Mac {
    fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }
}

/// What a NIC is to have: this and nothing else of global scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nic {
    /// Which.
    pub mac: Mac,
    /// Its addresses.
    pub addresses: Vec<Subnet>,
    /// Its routes through others.
    pub routes: Vec<Route>,
}

/// What a guest's network is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// The guest's own name; `None`: as it was.
    pub hostname: Option<String>,
    /// Name servers; empty: the resolver as it was, unless there is something to append.
    pub nameservers: Vec<IpAddr>,
    /// Domains that the resolver appends.
    pub search: Vec<String>,
    /// NICs that are not as they were.
    pub nics: Vec<Nic>,
}

impl Network {
    /// Whether everything is to be as it was before.
    pub fn is_home(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the resolver is to be another one.
    pub fn has_resolver(&self) -> bool {
        !self.nameservers.is_empty() || !self.search.is_empty()
    }

    /// The text. An error: it is more than a guest takes, or has values that a guest would not take.
    pub fn encode(&self) -> Result<String, String> {
        let text = self.to_string();
        match Self::parse(&text)? {
            same if same == *self => Ok(text),
            _ => Err("it has something that cannot be written down".to_owned()),
        }
    }

    /// Reads a text, whoever has written it. An error says which line is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > NETWORK_BYTES_MAX {
            return Err(format!("it has more than {NETWORK_BYTES_MAX} bytes"));
        }
        let mut lines = text.lines();
        if lines.next() != Some(HEADER) {
            return Err(format!("its first line is not {HEADER:?}"));
        }
        let mut network = Self::default();
        for (number, line) in lines.enumerate() {
            if network.line(line).is_none() {
                let line: String = line.chars().filter(|c| !c.is_control()).take(60).collect();
                return Err(format!("line {}, {line:?}, is not understood or is one too many", number + 2));
            }
        }
        Ok(network)
    }

    fn line(&mut self, line: &str) -> Option<()> {
        let (key, value) = line.split_once(' ')?;
        match key {
            "hostname" if self.hostname.is_none() => self.hostname = Some(name(value)?),
            "nameserver" => push(&mut self.nameservers, value.parse().ok()?, RESOLVER_MAX)?,
            "search" => push(&mut self.search, name(value)?, RESOLVER_MAX)?,
            "nic" => {
                let mac = Mac::parse(value)?;
                let known = self.nics.iter().any(|nic| nic.mac == mac);
                let nic = Nic { mac, ..Nic::default() };
                push(&mut self.nics, (!known).then_some(nic)?, NICS_MAX)?;
            }
            "address" => {
                let subnet = Subnet::parse(value)?;
                let address = subnet.address;
                let of_a_nic = !address.is_unspecified() && !address.is_loopback() && !address.is_multicast();
                let usable = of_a_nic && subnet.prefix > 0;
                push(&mut self.nics.last_mut()?.addresses, usable.then_some(subnet)?, ADDRESSES_MAX)?;
            }
            "route" => {
                let (to, via) = value.split_once(" via ")?;
                let (to, via) = (Subnet::parse(to)?, via.parse::<IpAddr>().ok()?);
                let usable = to.address.is_ipv4() == via.is_ipv4() && !via.is_unspecified() && !via.is_multicast();
                push(&mut self.nics.last_mut()?.routes, usable.then_some(Route { to, via })?, ROUTES_MAX)?;
            }
            _ => return None,
        }
        Some(())
    }
}

fn push<T>(list: &mut Vec<T>, value: T, most: usize) -> Option<()> {
    (list.len() < most).then(|| list.push(value))
}

/// A host's or a domain's name: letters, digits and hyphens, in labels of at most 63.
fn name(text: &str) -> Option<String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    (text.len() <= 253 && text.split('.').all(label)).then(|| text.to_owned())
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        if let Some(hostname) = &self.hostname {
            writeln!(f, "hostname {hostname}")?;
        }
        for server in &self.nameservers {
            writeln!(f, "nameserver {server}")?;
        }
        for domain in &self.search {
            writeln!(f, "search {domain}")?;
        }
        for nic in &self.nics {
            writeln!(f, "nic {}", nic.mac)?;
            for address in &nic.addresses {
                writeln!(f, "address {address}")?;
            }
            for route in &nic.routes {
                writeln!(f, "route {route}")?;
            }
        }
        Ok(())
    }
}

/// One thing that was done in a guest, or was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Item {
    /// `NIC 52:54:00:12:34:56`, `host name`, `after a reboot`.
    pub subject: String,
    /// What was done.
    pub done: String,
    /// What was not, and why; empty: all was.
    pub error: String,
}

/// What became of a description.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Each thing.
    pub items: Vec<Item>,
}

impl Report {
    /// The text. What is too much for it is left out, errors last.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let errors = self.items.iter().filter(|item| !item.error.is_empty());
        let done = self.items.iter().filter(|item| item.error.is_empty());
        for item in errors.chain(done).take(ITEMS_MAX) {
            let mut line = String::new();
            // Writing to a String cannot fail.
            let _ = writeln!(line, "{}\t{}\t{}", column(&item.subject), column(&item.done), column(&item.error));
            if text.len() + line.len() > NETWORK_BYTES_MAX {
                break;
            }
            text.push_str(&line);
        }
        text
    }

    /// Reads a text, whoever has written it.
    pub fn parse(text: &str) -> Self {
        let item = |line: &str| {
            let mut columns = line.splitn(3, '\t').map(column);
            let mut next = || columns.next().unwrap_or_default();
            Item { subject: next(), done: next(), error: next() }
        };
        Self { items: text.lines().take(ITEMS_MAX).map(item).collect() }
    }
}

/// Printable, and of bounded length.
fn column(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    text[..text.floor_char_boundary(COLUMN_BYTES_MAX)].to_owned()
}

/// How far a guest has come with a description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// None has come.
    #[default]
    Idle,
    /// Some of it has come: `at` bytes.
    Receiving,
    /// It is being applied.
    Working,
    /// It was: the bytes are the report's.
    Done,
    /// It was not understood: the bytes say why.
    Refused,
    /// Nothing can be written at the moment, as file systems are frozen.
    Busy,
    /// Of a later version.
    Other(u8),
}

impl Phase {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Idle => 0,
            Self::Receiving => 1,
            Self::Working => 2,
            Self::Done => 3,
            Self::Refused => 4,
            Self::Busy => 5,
            Self::Other(number) => number,
        }
    }

    pub(crate) fn of(number: u8) -> Self {
        match number {
            0 => Self::Idle,
            1 => Self::Receiving,
            2 => Self::Working,
            3 => Self::Done,
            4 => Self::Refused,
            5 => Self::Busy,
            other => Self::Other(other),
        }
    }
}

/// A text that comes in pieces, in their order. Keeps at most [`NETWORK_BYTES_MAX`] bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intake {
    bytes: Vec<u8>,
    total: usize,
}

/// What a piece has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// There is more to come, from this byte on.
    More(usize),
    /// This is all of it.
    Whole(String),
    /// It cannot be: what is wrong. All of it is forgotten.
    Wrong(&'static str),
}

impl Intake {
    /// Takes a piece of a text of `total` bytes, its bytes from `at` on. One that begins at 0 begins anew; one that does not follow
    /// the last is left.
    pub fn put(&mut self, at: usize, total: usize, bytes: &[u8]) -> Taken {
        if at == 0 {
            *self = Self { bytes: Vec::new(), total };
        }
        let wrong = |intake: &mut Self, what| {
            *intake = Self::default();
            Taken::Wrong(what)
        };
        if total > NETWORK_BYTES_MAX {
            return wrong(self, "it is too long");
        }
        if total != self.total || at != self.bytes.len() {
            return Taken::More(self.bytes.len());
        }
        if bytes.len() > total - at || bytes.len() > PIECE_BYTES_MAX {
            return wrong(self, "a piece is longer than it says");
        }
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() < total {
            return Taken::More(self.bytes.len());
        }
        let whole = std::mem::take(self).bytes;
        String::from_utf8(whole).map_or(Taken::Wrong("it is no UTF-8"), Taken::Whole)
    }

    /// How much has come.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing has come.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The piece of a text from a byte on.
pub fn piece(text: &str, at: usize) -> &[u8] {
    let rest = text.as_bytes().get(at..).unwrap_or_default();
    &rest[..rest.len().min(PIECE_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "vmdr-network 1\nhostname web1-dr\nnameserver 10.1.0.53\nnameserver fd00::53\nsearch example.org\n\
                        nic 52:54:00:12:34:56\naddress 10.1.0.5/24\naddress fd00::5/64\nroute 0.0.0.0/0 via 10.1.0.1\n\
                        nic 52:54:00:12:34:57\naddress 10.2.0.5/24\n";

    #[test]
    fn a_description_is_its_text() {
        let network = Network::parse(TEXT).unwrap();
        assert_eq!(network.to_string(), TEXT);
        assert_eq!(network.encode().as_deref(), Ok(TEXT));
        assert_eq!((network.nics.len(), network.nics[0].addresses.len(), network.nics[1].routes.len()), (2, 2, 0));
        assert!(network.nics[0].routes[0].to.is_default() && !network.is_home() && network.has_resolver());
        assert!(Network::parse("vmdr-network 1\n").unwrap().is_home());
    }

    #[test]
    fn what_no_guest_should_take_is_refused_by_its_line() {
        let nic = "nic 52:54:00:12:34:56\n";
        for (wrong, line) in [
            ("hostname a;reboot\n", 2),
            ("hostname a b\n", 2),
            ("hostname a\nhostname b\n", 3),
            ("hostname -a\n", 2),
            ("search ../etc\n", 2),
            ("nameserver localhost\n", 2),
            ("address 10.1.0.5/24\n", 2),
            ("nic 01:00:5e:00:00:01\n", 2),
            ("nic 52:54:00:12:34\n", 2),
            ("dance\n", 2),
            ("dance now\n", 2),
            (&format!("{nic}address 10.1.0.5/33\n"), 3),
            (&format!("{nic}address 10.1.0.5\n"), 3),
            (&format!("{nic}address 127.0.0.1/8\n"), 3),
            (&format!("{nic}address 10.1.0.5/0\n"), 3),
            (&format!("{nic}address 224.0.0.1/8\n"), 3),
            (&format!("{nic}{nic}"), 3),
            (&format!("{nic}route 0.0.0.0/0 via ::1\n"), 3),
            (&format!("{nic}route 0.0.0.0/0 via 0.0.0.0\n"), 3),
            (&format!("{nic}route 10.0.0.0/8\n"), 3),
            (&"nameserver 10.0.0.1\n".repeat(RESOLVER_MAX + 1), 10),
            (&format!("{nic}{}", "address 10.0.0.1/8\n".repeat(ADDRESSES_MAX + 1)), 35),
        ] {
            let said = Network::parse(&format!("{HEADER}\n{wrong}")).unwrap_err();
            assert!(said.starts_with(&format!("line {line}, ")), "{wrong:?}: {said}");
        }
        assert!(Network::parse("").is_err() && Network::parse("vmdr-network 2\n").is_err());
        assert!(Network::parse(&format!("{HEADER}\n{}", " ".repeat(NETWORK_BYTES_MAX))).is_err());
        let newline = Network { hostname: Some("a\nnic 52:54:00:12:34:56".to_owned()), ..Network::default() };
        assert!(newline.encode().is_err(), "a value cannot be another line");
    }

    #[test]
    fn a_report_is_its_text_and_bounded() {
        let item = |subject: &str, error: &str| Item {
            subject: subject.to_owned(),
            done: "10.1.0.5/24 on eth0".to_owned(),
            error: error.to_owned(),
        };
        let report = Report { items: vec![item("NIC 1", "no such NIC"), item("NIC 2", "")] };
        assert_eq!(Report::parse(&report.encode()), report);
        let many = Report { items: (0..1000).map(|i| item(&format!("{i}\t\n\u{1b}[2J"), &"x".repeat(2000))).collect() };
        let text = many.encode();
        assert!(text.len() <= NETWORK_BYTES_MAX && !text.contains('\u{1b}'));
        let read = Report::parse(&"a\tb\tc\n".repeat(10_000));
        assert_eq!(read.items.len(), ITEMS_MAX);
        assert_eq!(Report::parse("").items, []);
    }

    #[test]
    fn pieces_become_the_text_whatever_is_lost_or_comes_twice() {
        let text = "x".repeat(1000);
        let mut intake = Intake::default();
        assert_eq!(intake.put(0, 1000, piece(&text, 0)), Taken::More(480));
        assert_eq!(intake.put(0, 1000, piece(&text, 0)), Taken::More(480), "from the beginning");
        assert_eq!(intake.put(960, 1000, piece(&text, 960)), Taken::More(480), "one was lost");
        assert_eq!(intake.put(480, 1000, piece(&text, 480)), Taken::More(960));
        assert_eq!(intake.put(480, 1000, piece(&text, 480)), Taken::More(960), "twice");
        assert_eq!(intake.put(960, 1000, piece(&text, 960)), Taken::Whole(text));
        assert!(intake.is_empty());
        assert_eq!(intake.put(0, 0, &[]), Taken::Whole(String::new()));
        assert!(matches!(intake.put(0, NETWORK_BYTES_MAX + 1, &[0; 10]), Taken::Wrong(_)));
        assert!(matches!(intake.put(0, 5, &[0; 10]), Taken::Wrong(_)));
        assert!(matches!(intake.put(0, 2, &[0xff; 2]), Taken::Wrong(_)));
        assert_eq!(intake.put(7, 1000, &[0; 10]), Taken::More(0));
    }
}
