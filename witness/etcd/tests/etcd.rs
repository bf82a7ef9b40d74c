//! Against a real etcd (`etcd-server` of Debian's, installed by `scripts/setup`): claims, renewals, ends, restarts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Server, WAIT, claim, take};
use vmdr_etcd::{Etcd, WitnessError};
use vmdr_witness::{Allowed, Claim, Over, Owner, View};

/// On a busy machine a renewal can take some seconds.
const TTL: Duration = Duration::from_secs(15);

fn view(owner: (u64, &str), lease: Option<&str>) -> View {
    let owner = Owner { generation: owner.0, holder: owner.1.to_owned() };
    View { owner: Some(owner), lease: lease.map(str::to_owned) }
}

async fn until_free(etcd: &Etcd, uuid: &str) -> Duration {
    let begun = Instant::now();
    while etcd.look(uuid).await.unwrap().lease.is_some() {
        assert!(begun.elapsed() < WAIT, "the lease does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.elapsed()
}

#[tokio::test]
async fn a_lease_is_one_sites_until_it_ends_and_an_owner_for_ever() {
    let server = Server::start();
    let (a, b) = (server.connect().await, server.connect().await);
    let uuid = uuid::Uuid::new_v4().to_string();
    assert_eq!(a.look(&uuid).await.unwrap(), View::default());
    assert_eq!(a.claim(&uuid, &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
    assert_eq!(b.look(&uuid).await.unwrap(), view((1, "a"), Some("a")));
    assert_eq!(b.claim(&uuid, &claim("b", 2), TTL).await.unwrap(), Allowed::Held("a".to_owned()));
    // Renewed for longer than one lease lives.
    let begun = Instant::now();
    while begun.elapsed() < TTL + TTL / 3 {
        assert_eq!(a.claim(&uuid, &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
        assert_eq!(b.claim(&uuid, &take("b", 2), TTL).await.unwrap(), Allowed::Held("a".to_owned()));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // Not before its time: what the holder counts with is on the safe side.
    let sent = Instant::now();
    assert_eq!(a.claim(&uuid, &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
    until_free(&b, &uuid).await;
    let hold = vmdr_witness::Terms::new(TTL, Duration::ZERO).unwrap().hold();
    assert!(sent.elapsed() > hold, "{:?} {hold:?}", sent.elapsed());
    assert_eq!(b.look(&uuid).await.unwrap(), view((1, "a"), None));
    assert_eq!(b.claim(&uuid, &take("b", 3), TTL).await.unwrap(), Allowed::Missing);
    assert_eq!(b.claim(&uuid, &take("b", 2), TTL).await.unwrap(), Allowed::Yes);
    assert_eq!(a.claim(&uuid, &claim("a", 1), TTL).await.unwrap(), Allowed::Outdated(2));
    // Given up before its time; an older generation gets it no more.
    a.release(&uuid, "a").await.unwrap();
    assert_eq!(b.look(&uuid).await.unwrap(), view((2, "b"), Some("b")));
    b.release(&uuid, "b").await.unwrap();
    assert_eq!(b.look(&uuid).await.unwrap(), view((2, "b"), None));
    assert_eq!(a.claim(&uuid, &claim("a", 2), TTL).await.unwrap(), Allowed::Outdated(2));
    assert_eq!(a.claim(&uuid, &claim("a", 3), TTL).await.unwrap(), Allowed::Yes);
}

#[tokio::test]
async fn of_two_that_claim_at_once_one_gets_it() {
    let server = Server::start();
    let mut won = [0; 2];
    let (a, b) = (server.connect().await, server.connect().await);
    for _ in 0..20 {
        let uuid = uuid::Uuid::new_v4().to_string();
        let (of_a, of_b) = (claim("a", 1), claim("b", 2));
        let both = tokio::join!(a.claim(&uuid, &of_a, TTL), b.claim(&uuid, &of_b, TTL));
        let got = [both.0.unwrap() == Allowed::Yes, both.1.unwrap() == Allowed::Yes];
        assert!(got[0] != got[1], "{got:?}");
        won[0] += u32::from(got[0]);
        won[1] += u32::from(got[1]);
    }
    assert_eq!(won[0] + won[1], 20);
}

#[tokio::test]
async fn a_restart_keeps_leases_and_owners_and_an_outage_is_an_error() {
    let mut server = Server::start();
    let (a, b) = (server.connect().await, server.connect().await);
    let uuid = uuid::Uuid::new_v4().to_string();
    // Longer than the restart takes on a busy machine.
    let ttl = Duration::from_secs(600);
    assert_eq!(a.claim(&uuid, &claim("a", 1), ttl).await.unwrap(), Allowed::Yes);
    server.kill();
    let down = a.claim(&uuid, &claim("a", 1), ttl).await.unwrap_err();
    assert!(matches!(down, WitnessError::Etcd { .. } | WitnessError::Late { .. }), "{down}");
    assert!(down.to_string().contains(&server.url()), "{down}");
    server.up();
    let again = server.connect().await;
    assert_eq!(again.look(&uuid).await.unwrap(), view((1, "a"), Some("a")));
    // A client from before finds it again by itself.
    let until = Instant::now() + WAIT;
    while let Err(error) = b.look(&uuid).await {
        assert!(Instant::now() < until, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(b.claim(&uuid, &claim("b", 2), ttl).await.unwrap(), Allowed::Held("a".to_owned()));
}

/// Keys that were deleted, by whomever, say nothing of who runs the guest.
#[tokio::test]
async fn a_witness_that_was_wiped_grants_nothing_to_who_goes_by_what_was_there() {
    let server = Server::start();
    let etcd = server.connect().await;
    let uuid = uuid::Uuid::new_v4().to_string();
    let own = Claim { over: Over::Own, ..claim("a", 1) };
    assert_eq!(etcd.claim(&uuid, &own, TTL).await.unwrap(), Allowed::Missing);
    assert_eq!(etcd.claim(&uuid, &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
    assert_eq!(etcd.claim(&uuid, &own, TTL).await.unwrap(), Allowed::Yes);
    let mut plain = etcd_client::Client::connect([server.url()], None).await.unwrap();
    let all = etcd_client::DeleteOptions::new().with_prefix();
    plain.delete(format!("/vmdr/{uuid}/"), Some(all)).await.unwrap();
    assert_eq!(etcd.claim(&uuid, &own, TTL).await.unwrap(), Allowed::Missing);
    assert_eq!(etcd.claim(&uuid, &take("b", 2), TTL).await.unwrap(), Allowed::Missing);
    assert_eq!(etcd.look(&uuid).await.unwrap(), View::default());
}

#[tokio::test]
async fn what_is_not_understood_is_no_permission() {
    let server = Server::start();
    let etcd = server.connect().await;
    let uuid = uuid::Uuid::new_v4().to_string();
    let mut plain = etcd_client::Client::connect([server.url()], None).await.unwrap();
    plain.put(format!("/vmdr/{uuid}/owner"), "a", None).await.unwrap();
    let damaged = etcd.claim(&uuid, &claim("a", 1), TTL).await.unwrap_err();
    assert!(matches!(&damaged, WitnessError::Damaged { key } if key.contains(&uuid)), "{damaged}");
    assert!(etcd.look(&uuid).await.is_err());
}
