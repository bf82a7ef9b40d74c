//! Addresses and routes of the kernel, over rtnetlink. Every answer is bounded, every wait is short: the kernel answers at once.

use std::io;
use std::net::IpAddr;
use std::num::NonZeroI32;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use vmdr_guest_channel::network::{Mac, Route, Subnet};

/// The most bytes of one datagram of the kernel's.
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// The most objects of a dump that are looked at.
const OBJECTS_MAX: usize = 10_000;

/// A network device of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number of it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: Mac,
    /// Whether it is part of another device: of a bridge, a bond.
    pub is_part: bool,
}

/// An address that a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The address.
    pub subnet: Subnet,
    /// For good; not by a lease, nor from a router's announcement.
    pub permanent: bool,
}

/// A socket to the kernel.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let mut datagram = Vec::with_capacity(DATAGRAM_BYTES_MAX);
            self.socket.recv(&mut datagram, 0)?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let wrong = |error| io::Error::other(format!("an answer of the kernel: {error}"));
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(wrong)?;
                // Messages begin at multiples of four bytes.
                let length = (answer.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
                rest = &rest[length..];
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => match error.code.map(NonZeroI32::get) {
                        None => return Ok(found),
                        Some(code) => return Err(io::Error::from_raw_os_error(code.saturating_abs())),
                    },
                    NetlinkPayload::InnerMessage(message) if found.len() < OBJECTS_MAX => found.push(message),
                    _ => {}
                }
            }
        }
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_ACK | flags).map(drop)
    }

    /// All devices that have a MAC address.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let link = |answer| {
            let RouteNetlinkMessage::NewLink(link) = answer else { return None };
            let (mut name, mut mac, mut is_part) = (None, None, false);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = Some(text),
                    LinkAttribute::Controller(other) => is_part = other != 0,
                    LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes).ok(),
                    _ => {}
                }
            }
            let loopback = link.header.flags.contains(LinkFlags::Loopback);
            Some(Link { index: link.header.index, name: name?, mac: Mac(mac.filter(|_| !loopback)?), is_part })
        };
        Ok(answers.into_iter().filter_map(link).collect())
    }

    /// Brings a device up.
    pub fn up(&mut self, link: &Link) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// A device's addresses of global scope.
    pub fn addresses(&mut self, link: &Link) -> io::Result<Vec<Held>> {
        let answers = self.ask(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let held = |answer| {
            let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
            let header = &message.header;
            if header.index != link.index || header.scope != AddressScope::Universe {
                return None;
            }
            // Of a point-to-point device ADDRESS is the peer's and LOCAL its own.
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = local.or_else(|| {
                message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                })
            });
            let subnet = Subnet { address: address?, prefix: header.prefix_len };
            Some(Held { subnet, permanent: header.flags.contains(AddressHeaderFlags::Permanent) })
        };
        Ok(answers.into_iter().filter_map(held).collect())
    }

    /// Gives a device an address; one that it has already is left.
    pub fn add_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewAddress(address_message(link, subnet));
        self.change(message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address from a device.
    pub fn remove_address(&mut self, link: &Link, subnet: Subnet) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelAddress(address_message(link, subnet)), 0)
    }

    /// A device's routes through others, of the main table; those that routers announce come and go by themselves.
    pub fn routes(&mut self, link: &Link) -> io::Result<Vec<Route>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            all.extend(answers.into_iter().filter_map(|answer| route_of(link, answer)));
        }
        Ok(all)
    }

    /// Adds a route; others to the same network, of other devices, stay.
    pub fn add_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        self.change(RouteNetlinkMessage::NewRoute(route_message(link, route)), NLM_F_CREATE)
    }

    /// Removes a route.
    pub fn remove_route(&mut self, link: &Link, route: Route) -> io::Result<()> {
        let mut message = route_message(link, route);
        // Whoever has set it.
        message.header.protocol = RouteProtocol::Unspec;
        message.header.scope = RouteScope::NoWhere;
        self.change(RouteNetlinkMessage::DelRoute(message), 0)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(link: &Link, subnet: Subnet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(subnet.address);
    message.header.prefix_len = subnet.prefix;
    message.header.index = link.index;
    if subnet.address.is_ipv6() {
        // The site announces it, which the guest, while it looks whether somebody else has it, would take for that somebody.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Local(subnet.address));
    message.attributes.push(AddressAttribute::Address(subnet.address));
    if let IpAddr::V4(address) = subnet.address
        && subnet.prefix < 31
    {
        let hosts = u32::MAX.checked_shr(subnet.prefix.into()).unwrap_or(0);
        message.attributes.push(AddressAttribute::Broadcast((u32::from(address) | hosts).into()));
    }
    message
}

fn route_message(link: &Link, route: Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.via);
    message.header.destination_prefix_length = route.to.prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    if !route.to.is_default() {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(route.to.address)));
    }
    message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(route.via)));
    message.attributes.push(RouteAttribute::Oif(link.index));
    message
}

fn route_of(link: &Link, answer: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let header = &message.header;
    let ours = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    if !ours || matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::IcmpRedirect | RouteProtocol::Ra) {
        return None;
    }
    let (mut to, mut via, mut out) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(IpAddr::from(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => to = Some(IpAddr::from(*address)),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => via = Some(IpAddr::from(*address)),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => via = Some(IpAddr::from(*address)),
            RouteAttribute::Oif(index) => out = Some(*index),
            _ => {}
        }
    }
    let via = via.filter(|_| out == Some(link.index))?;
    let everything = if via.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let to = Subnet { address: to.unwrap_or(everything), prefix: header.destination_prefix_length };
    Some(Route { to, via })
}
