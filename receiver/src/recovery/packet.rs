//! Ethernet frames that tell neighbours where an address is, and sending them.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketType, netdevice, socket, socket_with};
use vmdr_plan::Mac;

const EVERYBODY: [u8; 6] = [0xff; 6];
/// All nodes of an IPv6 link (ff02::1).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const VLAN_TAG: u16 = 0x8100;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;

fn frame(to: [u8; 6], from: Mac, vlan: Option<u16>, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from.0].concat();
    if let Some(vlan) = vlan {
        frame.extend(VLAN_TAG.to_be_bytes());
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    // The shortest that Ethernet has, without its checksum.
    frame.resize(frame.len().max(60), 0);
    frame
}

/// Frames that say that `address` is at `mac`: gratuitous ARP, as a request and as a reply, since some listen to one only; or an
/// unsolicited neighbour advertisement.
pub fn announcements(mac: Mac, address: IpAddr, vlan: Option<u16>) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => {
            let reply = frame(EVERYBODY, mac, vlan, ARP, &arp(2, mac, address, EVERYBODY));
            vec![frame(EVERYBODY, mac, vlan, ARP, &arp(1, mac, address, [0; 6])), reply]
        }
        IpAddr::V6(address) => vec![frame(ALL_NODES, mac, vlan, IPV6, &advertisement(mac, address))],
    }
}

/// RFC 826, with sender and target the same address (RFC 5227).
fn arp(operation: u16, mac: Mac, address: Ipv4Addr, target: [u8; 6]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4];
    arp.extend(operation.to_be_bytes());
    arp.extend(mac.0);
    arp.extend(address.octets());
    arp.extend(target);
    arp.extend(address.octets());
    arp
}

/// RFC 4861, 4.4: unsolicited, to all nodes, overriding what they have.
fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER: u8 = 2;
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([TARGET_LINK_LAYER, 1]);
    message.extend(mac.0);
    let length = message.len() as u16;
    let mut summed = [address.octets(), to.octets()].concat();
    summed.extend(u32::from(length).to_be_bytes());
    summed.extend([0, 0, 0, ICMPV6]);
    summed.extend(&message);
    message[2..4].copy_from_slice(&checksum(&summed).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([ICMPV6, 255]);
    packet.extend(address.octets());
    packet.extend(to.octets());
    packet.extend(message);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends frames out of a network device of this host, as they are.
pub fn send(device: &str, frames: &[Vec<u8>]) -> io::Result<()> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let index = netdevice::name_to_index(&any, device)?;
    // Protocol 0: nothing is received.
    let raw = socket_with(AddressFamily::PACKET, SocketType::RAW, rustix::net::SocketFlags::CLOEXEC, None)?;
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    for frame in frames {
        // SAFETY: the frame and the address are ours, of the lengths that are given, and are only read.
        let sent = unsafe {
            libc::sendto(
                raw.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    #[test]
    fn gratuitous_arp_is_what_the_standard_says() {
        let frames = announcements(MAC, "192.0.2.10".parse().unwrap(), None);
        let request = "ffffffffffff525400123456 0806 0001 0800 06 04 0001 525400123456 c000020a 000000000000 c000020a";
        let hex = |frame: &[u8]| frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&frames[0][..42]), request.replace(' ', ""));
        assert_eq!((frames[0].len(), &frames[0][42..], frames[1][21]), (60, &[0u8; 18][..], 2));
        let tagged = announcements(MAC, "192.0.2.10".parse().unwrap(), Some(120));
        assert_eq!(&tagged[0][12..18], [0x81, 0, 0, 120, 8, 6]);
    }

    #[test]
    fn an_advertisement_sums_up() {
        let frames = announcements(MAC, "2001:db8::10".parse().unwrap(), None);
        let packet = &frames[0][14..];
        assert_eq!((frames.len(), frames[0].len(), packet[7]), (1, 86, 255));
        // With the checksum in it, the sum of what it covers is 0.
        let mut summed = packet[8..40].to_vec();
        summed.extend([0, 0, 0, 32, 0, 0, 0, ICMPV6]);
        summed.extend(&packet[40..]);
        assert_eq!(checksum(&summed), 0);
        assert_eq!((packet[40], packet[44], &packet[64..66]), (136, 0x20, &[2u8, 1][..]));
        assert_eq!(&packet[66..72], MAC.0);
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        assert!(send("vmdr-none", &[vec![0; 60]]).is_err());
    }
}
