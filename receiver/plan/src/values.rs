//! Values of a plan and how they are written.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// An address with its prefix length, `10.1.0.5/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address, with its host part.
    pub address: IpAddr,
    /// Bits of the network.
    pub prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => u128::from(v6),
    }
}

impl Cidr {
    /// Reads `ADDRESS/PREFIX`.
    pub fn parse(text: &str) -> Result<Cidr, String> {
        let Some((address, prefix)) = text.split_once('/') else {
            return Err(format!("{text:?} has no prefix length: write ADDRESS/PREFIX, like 10.1.0.5/24"));
        };
        let address: IpAddr = address.parse().map_err(|_| format!("{address:?} is no IP address"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        match prefix.parse() {
            Ok(length) if length <= most => Ok(Cidr { address, prefix: length }),
            _ => Err(format!("{prefix:?} is no prefix length of an {} address: 0 to {most}", family(address))),
        }
    }

    /// The same, of an address that a NIC can have.
    pub fn parse_host(text: &str) -> Result<Cidr, String> {
        let cidr = Cidr::parse(text)?;
        let host_bits = if cidr.address.is_ipv4() { 32 } else { 128 } - u32::from(cidr.prefix);
        let host = bits(cidr.address) & !cidr.mask();
        if cidr.address.is_unspecified() || cidr.address.is_multicast() || cidr.address.is_loopback() {
            return Err(format!("{} is no address that a NIC can have", cidr.address));
        }
        if host_bits > 1 && host == 0 {
            return Err(format!("{text} is the network itself and no address in it"));
        }
        if cidr.address.is_ipv4() && host_bits > 1 && host == !cidr.mask() & (u128::from(u32::MAX) << 96) {
            return Err(format!("{text} is the broadcast address of its network"));
        }
        Ok(cidr)
    }

    fn mask(&self) -> u128 {
        match u32::from(self.prefix) {
            0 => 0,
            length => u128::MAX << (128 - length),
        }
    }

    /// Whether this is all addresses of its family.
    pub fn is_everything(&self) -> bool {
        self.prefix == 0
    }

    /// Whether an address is in this network.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && (bits(address) ^ bits(self.address)) & self.mask() == 0
    }
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

pub(crate) fn ip(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IP address"))
}

/// A MAC address in lower case with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Mac {
    /// Reads `52:54:00:12:34:56`.
    pub fn parse(text: &str) -> Result<Mac, String> {
        let wrong = || format!("{text:?} is no MAC address: write it like 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(format!("{text} is no address of a NIC, but one of a group"));
        }
        Ok(Mac(bytes))
    }
}

/// The name of a network device.
pub(crate) fn device_name(text: &str) -> Result<String, String> {
    const LONGEST: usize = 15;
    if text.len() > LONGEST || text.contains(['/', ' ']) || text == "." || text == ".." {
        return Err(format!(
            "{text:?} is no name of a bridge: at most {LONGEST} characters without spaces and slashes"
        ));
    }
    Ok(text.to_owned())
}

/// The name of a libvirt network.
pub(crate) fn network_name(text: &str) -> Result<String, String> {
    if text.contains('/') { Err(format!("{text:?} is no name of a libvirt network")) } else { Ok(text.to_owned()) }
}

/// A path from the root.
pub(crate) fn path(text: &str) -> Result<String, String> {
    if text.starts_with('/') && !text.ends_with('/') && !text.split('/').any(|part| part == "..") {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is no file by its absolute path"))
}

pub(crate) fn device_path(text: &str) -> Result<String, String> {
    let text = path(text)?;
    if text.starts_with("/dev/") {
        Ok(text)
    } else {
        Err(format!("{text:?} is no device: it does not begin with /dev/"))
    }
}

/// Letters, digits and hyphens, in labels of at most 63.
pub(crate) fn host_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!("{text:?} is no host name: letters, digits and hyphens, in labels of at most 63"))
}

/// A zone of names of addresses.
pub(crate) fn reverse_zone(text: &str) -> Result<String, String> {
    let zone = host_name(text)?;
    if [".in-addr.arpa", ".ip6.arpa"].iter().any(|top| zone.ends_with(top)) {
        return Ok(zone);
    }
    Err(format!(
        "{text:?} is no zone of names of addresses: write it like 1.10.in-addr.arpa or 8.b.d.0.1.0.0.2.ip6.arpa"
    ))
}

/// The name of a group, which is that of a file, too.
pub(crate) fn group_name(text: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && text.len() <= 64 && text.chars().all(good) {
        return Ok(());
    }
    Err(format!(
        "{text:?} is no name of a group: 1 to 64 letters, digits, dots, underscores and hyphens, the first a letter or digit"
    ))
}

/// The name of a network namespace, as `ip netns` has it.
pub(crate) fn namespace(text: &str) -> Result<String, String> {
    if text.len() <= 255 && !text.contains('/') && !text.starts_with('.') {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is no name of a network namespace, as `ip netns list` has it"))
}

/// `HOST:PORT`, an IPv6 address in brackets.
pub(crate) fn host_and_port(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is no address with a port: write HOST:PORT, an IPv6 address in brackets");
    if text.parse::<SocketAddr>().is_ok_and(|at| at.port() > 0) {
        return Ok(text.to_owned());
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if (numeric && host.parse::<Ipv4Addr>().is_err()) || host_name(host).is_err() {
        return Err(wrong());
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(text.to_owned()),
        _ => Err(wrong()),
    }
}

pub(crate) fn iqn(text: &str) -> Result<String, String> {
    let named = ["iqn.", "eui.", "naa."].iter().any(|kind| text.starts_with(kind) && text.len() > kind.len() + 2);
    let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:_".contains(&b));
    if named && good && text.len() <= 223 {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is no name of an iSCSI target: write it like iqn.2026-01.example:storage"))
}

/// Hexadecimal digits of a WWN, with or without 0x, as libvirt writes them: without.
pub(crate) fn wwn(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    if digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(digits.to_ascii_lowercase());
    }
    Err(format!("{text:?} is no WWN: 16 hexadecimal digits"))
}

/// A number of bytes, `2GiB`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    const LEAST: u64 = 64 << 20;
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(format!("{text:?} is no size: write it like 512MiB, 2GiB or 1TiB")),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes >= LEAST => Ok(bytes),
        Some(_) => Err(format!("{text} is less than any guest needs: at least 64MiB")),
        None => Err(format!("{text:?} is no size: write it like 512MiB, 2GiB or 1TiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let cidr = Cidr::parse_host("10.1.0.5/24").unwrap();
        assert!(cidr.contains("10.1.0.254".parse().unwrap()) && !cidr.contains("10.1.1.5".parse().unwrap()));
        assert!(!cidr.contains("a01:5::".parse().unwrap()), "families are told apart");
        let six = Cidr::parse_host("fd00::5/64").unwrap();
        assert!(six.contains("fd00::ffff:1".parse().unwrap()) && !six.contains("fd00:0:0:1::5".parse().unwrap()));
        assert!(Cidr::parse("0.0.0.0/0").unwrap().contains("192.0.2.1".parse().unwrap()));
        for good in ["10.1.0.4/31", "10.1.0.5/32", "fd00::1/128", "10.0.0.255/16"] {
            assert_eq!(Cidr::parse_host(good).unwrap().to_string(), good);
        }
        for bad in [
            "10.1.0.5",
            "10.1.0.5/33",
            "10.1.0/24",
            "fd00::5/129",
            "10.1.0.0/24",
            "10.1.0.255/24",
            "0.0.0.0/0",
            "224.0.0.1/4",
            "x/1",
            "1.2.3.4/-1",
        ] {
            assert!(Cidr::parse_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_addresses() {
        assert_eq!(Mac::parse("52:54:00:AB:cd:0f").unwrap().to_string(), "52:54:00:ab:cd:0f");
        for bad in
            ["", "52:54:00:ab:cd", "52:54:00:ab:cd:0f:11", "52-54-00-ab-cd-0f", "01:00:5e:00:00:01", "5:54:0:1:2:3"]
        {
            assert!(Mac::parse(bad).is_err(), "{bad}");
        }
        for good in ["10.0.0.1:3260", "[fd00::1]:3260", "san.example:3260"] {
            assert_eq!(host_and_port(good).as_deref(), Ok(good));
        }
        for bad in ["10.0.0.1", "10.0.0:1", "fd00::1:3260x", "san:0", "san:70000", ":1", "a b:1"] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
        assert_eq!(size("2GiB"), Ok(2 << 30));
        for bad in ["", "1", "1MiB", "2GB", "99999999999TiB", "-1GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(wwn("0x5000C500A1B2C3D4").as_deref(), Ok("5000c500a1b2c3d4"));
        assert!(wwn("5000").is_err() && iqn("iqn.x").is_err() && iqn("iqn.2026-01.example:a").is_ok());
        assert!(host_name("-a").is_err() && host_name("a..b").is_err() && host_name("a-b.example").is_ok());
    }
}
