//! `pair` and `peers`: the hosts that this one trusts.

use std::io::{BufRead, IsTerminal, Read, Write};

use vmdr_proto::control::GrantRequest;
use vmdr_proto::host::{JoinRequest, LocateRequest, Peer, PeerRequest, PeersRequest, RotateRequest, TokenRequest};

use super::Out;
use crate::args::{Common, Domain};
use crate::client::{self, Daemon, answer};
use crate::failure::Failure;
use crate::style::Tone;
use crate::table::{Cell, Side, Table};
use crate::{json, text};

/// The longest line read as a token.
const TOKEN_BYTES_MAX: u64 = 1024;
/// Characters of an id that are shown.
const ID_CHARS: usize = 12;

/// Has the receiver make a token, and shows it.
pub async fn show_token(common: &Common, out: Out, valid_seconds: u32) -> Result<(), Failure> {
    let request = TokenRequest { valid_seconds, ..TokenRequest::default() };
    let mut host = client::host(Daemon::Receiver, common).await?;
    let reply = answer(Daemon::Receiver, "pair", host.show_token(request)).await?;
    out.result(
        "pair-token",
        || json::Token { token: reply.token.clone(), expires_at: instant(reply.expires_unix) },
        || {
            format!(
                "{}\nTo be typed on the other host, once, before {} UTC: vmdr pair --with THIS-HOST\n",
                out.paint(Tone::Bold, &reply.token),
                text::instant_short(reply.expires_unix * 1_000_000_000)
            )
        },
    )
}

/// Asks for the token and has a daemon of this host join.
pub async fn join(common: &Common, out: Out, address: &str) -> Result<(), Failure> {
    let daemon = client::either(common)?;
    let token = ask_token().await?;
    let request = JoinRequest { address: address.to_owned(), token };
    let peer = answer(daemon, "pair", client::host(daemon, common).await?.join(request)).await?;
    out.result(
        "pair",
        || json::Peer::from(&peer),
        || format!("{}\n", out.paint(Tone::Good, &format!("paired with {}", named(&peer)))),
    )
}

/// Never as an argument: those are for everybody on the host to see.
async fn ask_token() -> Result<String, Failure> {
    let read = tokio::task::spawn_blocking(|| -> std::io::Result<Vec<u8>> {
        if std::io::stdin().is_terminal() {
            let mut stderr = std::io::stderr();
            stderr.write_all(b"The token that `vmdr pair` shows on the other host: ")?;
            stderr.flush()?;
        }
        let mut line = Vec::new();
        std::io::stdin().lock().take(TOKEN_BYTES_MAX).read_until(b'\n', &mut line)?;
        Ok(line)
    });
    let line = read.await.map_err(|e| Failure::Failed(format!("cannot ask: {e}")))?;
    let line = line.map_err(|e| Failure::Failed(format!("cannot read the token: {e}")))?;
    let token = String::from_utf8_lossy(&line).trim().to_owned();
    if token.is_empty() {
        return Err(Failure::Usage("no token was given: `vmdr pair` on the other host shows one".to_owned()));
    }
    Ok(token)
}

/// The peers, as the daemons of this host know them.
pub async fn list(common: &Common, out: Out) -> Result<(), Failure> {
    let mut all: Option<vmdr_proto::host::PeersReply> = None;
    for daemon in client::there(common)? {
        let reply = answer(daemon, "peers", client::host(daemon, common).await?.peers(PeersRequest {})).await?;
        match &mut all {
            None => all = Some(reply),
            // The same files; connections are each daemon's own.
            Some(all) => {
                for peer in &mut all.peers {
                    let same = reply.peers.iter().find(|other| other.id == peer.id);
                    peer.connections += same.map_or(0, |other| other.connections);
                }
            }
        }
    }
    let reply = all.unwrap_or_default();
    out.result(
        "peers",
        || json::Peers {
            id: reply.own_id.clone(),
            certificate_until: instant(reply.own_expires_unix),
            authority_until: instant(reply.own_authority_expires_unix),
            peers: reply.peers.iter().map(json::Peer::from).collect(),
            notices: reply.notices.clone(),
        },
        || {
            let mut table = Table::new([
                ("PEER", Side::Left),
                ("ID", Side::Left),
                ("STATE", Side::Left),
                ("LINKS", Side::Right),
                ("PAIRED (UTC)", Side::Left),
                ("ADDRESSES", Side::Left),
            ]);
            for peer in &reply.peers {
                let (state, tone) =
                    if peer.revoked_unix > 0 { ("revoked", Tone::Bad) } else { ("trusted", Tone::Good) };
                let cells = [
                    (text::one_line(&peer.name), Tone::Plain),
                    (short(&peer.id), Tone::Plain),
                    (state.to_owned(), tone),
                    (peer.connections.to_string(), Tone::Plain),
                    (text::instant_short(peer.paired_unix * 1_000_000_000), Tone::Plain),
                    (text::one_line(&peer.addresses.join(", ")), Tone::Plain),
                ];
                table.row(cells.map(|(text, tone)| Cell::toned(text, tone)), String::new());
            }
            let mut shown = if reply.peers.is_empty() {
                "this host is paired with no other; `vmdr pair` pairs it\n".to_owned()
            } else {
                table.render(out.style)
            };
            shown.push_str(&format!(
                "this host is {}, its certificate is good until {} UTC\n",
                short(&reply.own_id),
                text::instant_short(reply.own_expires_unix * 1_000_000_000)
            ));
            for notice in &reply.notices {
                shown.push_str(&text::wrapped("warning: ", &text::one_line(notice)));
            }
            shown
        },
    )
}

/// Trusts a peer no longer.
pub async fn revoke(common: &Common, out: Out, peer: &str) -> Result<(), Failure> {
    let daemon = client::either(common)?;
    let request = PeerRequest { peer: peer.to_owned() };
    let peer = answer(daemon, "peers revoke", client::host(daemon, common).await?.revoke(request)).await?;
    out.result(
        "peers-revoke",
        || json::Peer::from(&peer),
        || format!("{} is revoked: its connections end, and it is refused from now on\n", named(&peer)),
    )
}

/// Says where a peer answers.
pub async fn locate(common: &Common, out: Out, peer: &str, address: &str) -> Result<(), Failure> {
    let daemon = client::either(common)?;
    let request = LocateRequest { peer: peer.to_owned(), address: address.to_owned() };
    let peer = answer(daemon, "peers at", client::host(daemon, common).await?.locate(request)).await?;
    out.result(
        "peers-at",
        || json::Peer::from(&peer),
        || format!("{} answers at {}, and nobody else does\n", named(&peer), text::one_line(address)),
    )
}

/// Another certificate for this host.
pub async fn rotate(common: &Common, out: Out) -> Result<(), Failure> {
    let daemon = client::either(common)?;
    let reply = answer(daemon, "peers rotate", client::host(daemon, common).await?.rotate(RotateRequest {})).await?;
    let until = instant(reply.expires_unix);
    out.result(
        "peers-rotate",
        || json::Rotated { certificate_until: until.clone() },
        || {
            let until = text::instant_short(reply.expires_unix * 1_000_000_000);
            format!("this host has another certificate, good until {until} UTC; connections that stand go on\n")
        },
    )
}

/// Lets a peer have to do with a domain, or no longer.
pub async fn grant(common: &Common, out: Out, domain: &Domain, peer: &str, withdraw: bool) -> Result<(), Failure> {
    let request = GrantRequest { domain: domain.0.clone(), peer: peer.to_owned(), withdraw };
    let mut receiver = client::receiver(common).await?;
    let reply = answer(Daemon::Receiver, "peers grant", receiver.grant(request)).await?;
    out.result(
        "peers-grant",
        || json::Grant { domain: domain.0.clone(), owner: reply.owner.clone(), granted: reply.granted.clone() },
        || {
            let owner = if reply.owner.is_empty() { "nobody".to_owned() } else { text::one_line(&reply.owner) };
            let granted = if reply.granted.is_empty() { "nobody".to_owned() } else { reply.granted.join(", ") };
            let granted = text::one_line(&granted);
            format!("{} belongs to {owner}, and is granted to {granted}\n", text::one_line(&domain.0))
        },
    )
}

fn named(peer: &Peer) -> String {
    format!("{} ({})", text::one_line(&peer.name), short(&peer.id))
}

fn short(id: &str) -> String {
    text::one_line(id).chars().take(ID_CHARS).collect()
}

fn instant(unix: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(unix);
    humantime::format_rfc3339_seconds(at).to_string()
}
