//! Who may ask an etcd: certificates, users.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Server, Tls, WAIT, claim};
use etcd_client::{Client, Permission};
use vmdr_etcd::{Config, Etcd};
use vmdr_witness::Allowed;

const TTL: Duration = Duration::from_secs(600);

fn uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[tokio::test]
async fn a_certificate_of_the_authority_is_needed_at_both_ends() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start_with(Some(Tls::make(directory.path())));
    // One of several endpoints that does not answer is no hindrance.
    let dead = "https://127.0.0.1:1".to_owned();
    let etcd = server.connect().await;
    assert_eq!(etcd.claim(&uuid(), &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
    let two = Etcd::connect(&Config { endpoints: vec![dead, server.url()], ..server.config() }).await.unwrap();
    let until = Instant::now() + WAIT;
    while let Err(error) = two.look("nobody").await {
        assert!(Instant::now() < until, "{error}");
    }

    let other = tempfile::tempdir().unwrap();
    let other = Tls::make(other.path());
    let bare = Config { certificate_file: None, key_file: None, ..server.config() };
    let foreign = Config {
        certificate_file: Some(other.certificate.clone()),
        key_file: Some(other.key.clone()),
        ..server.config()
    };
    let impostor = Config { ca_file: Some(other.ca.clone()), ..server.config() };
    for config in [bare, foreign, impostor] {
        if let Ok(etcd) = Etcd::connect(&config).await {
            assert!(etcd.look("nobody").await.is_err(), "{config:?}");
        }
    }
    let missing = Config { ca_file: Some("/nonexistent/ca.pem".into()), ..server.config() };
    let error = Etcd::connect(&missing).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/ca.pem"), "{error}");
}

#[tokio::test]
async fn a_user_may_be_needed_and_gets_at_its_prefix_only() {
    let server = Server::start();
    let open = server.connect().await;
    assert!(open.look("nobody").await.is_ok());
    let mut root = Client::connect([server.url()], None).await.unwrap();
    for user in ["root", "vmdr"] {
        root.user_add(user, format!("{user}-secret"), None).await.unwrap();
        root.role_add(user).await.unwrap();
        root.user_grant_role(user, user).await.unwrap();
    }
    let permission = Permission::read_write("/vmdr/").with_prefix();
    root.role_grant_permission("vmdr", permission).await.unwrap();
    root.auth_enable().await.unwrap();

    assert!(open.look("nobody").await.is_err());
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    std::fs::write(&password, "vmdr-secret\n").unwrap();
    let config = Config { user: Some("vmdr".to_owned()), password_file: Some(password.clone()), ..server.config() };
    let etcd = Etcd::connect(&config).await.unwrap();
    let id = uuid();
    for _ in 0..2 {
        assert_eq!(etcd.claim(&id, &claim("a", 1), TTL).await.unwrap(), Allowed::Yes);
    }
    etcd.release(&id, "a").await.unwrap();
    let elsewhere = Etcd::connect(&Config { prefix: "/other".to_owned(), ..config.clone() }).await.unwrap();
    assert!(elsewhere.look(&id).await.is_err());
    std::fs::write(&password, "wrong").unwrap();
    let wrong = Etcd::connect(&config).await;
    assert!(wrong.is_err() || wrong.unwrap().look(&id).await.is_err());
}
