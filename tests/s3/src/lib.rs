//! An S3 server over a directory, for tests: `s3s` speaks the protocol and checks signatures, `s3s-fs` keeps each bucket in a
//! directory of its name and each object in a file below it, as it was sent. So a test can look at objects, and damage them.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::runtime::Runtime;

/// The one bucket.
pub const BUCKET: &str = "bucket";
/// Who may use it.
pub const ACCESS_KEY: &str = "TESTKEY";
/// The password of that.
pub const SECRET_KEY: &str = "TESTSECRET";
/// A region; any will do.
pub const REGION: &str = "us-east-1";

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    directory: PathBuf,
    // With it ends what runs on it.
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves on this listener, out of this directory.
    pub fn start(listener: TcpListener, directory: &Path) -> Result<Self> {
        let objects = directory.join(BUCKET);
        std::fs::create_dir_all(&objects).with_context(|| format!("make {}", objects.display()))?;
        let files = s3s_fs::FileSystem::new(directory).map_err(|e| anyhow!("serve {}: {e:?}", directory.display()))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("start a runtime")?;
        let address = listener.local_addr().context("look at the listener")?;
        listener.set_nonblocking(true).context("make the listener non-blocking")?;
        let entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).context("take the listener over")?;
        drop(entered);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    // A client that goes away is no failure of the server's.
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Ok(Self { address, directory: objects, runtime: Some(runtime) })
    }

    /// `http://HOST:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where the bucket's objects are, each a file.
    pub fn objects(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for it is not possible where a test is asynchronous itself.
            runtime.shutdown_background();
        }
    }
}
