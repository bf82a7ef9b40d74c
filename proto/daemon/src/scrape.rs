//! Serves metrics as text to Prometheus: as much HTTP as a scrape needs, bounded in connections, bytes and time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Scrapes served at the same time; more wait.
const CONNECTIONS_MAX: usize = 8;
/// The longest request head read: Prometheus sends some 300 bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// From connecting to the last byte of the answer.
const SCRAPE_TIME_MAX: Duration = Duration::from_secs(10);
/// Rest after a failed accept: mostly descriptors ran out, and come back.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// Makes the text of all metrics. May block.
pub type Text = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves scrapes until it is dropped.
pub async fn serve(listener: TcpListener, text: Text) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept a connection for metrics");
                tokio::time::sleep(ACCEPT_REST).await;
                continue;
            }
        };
        let text = Arc::clone(&text);
        tokio::spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(SCRAPE_TIME_MAX, answer(stream, text)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "answer a scrape"),
                Err(_) => tracing::debug!("a scrape took too long"),
            }
        });
    }
}

async fn answer(mut stream: TcpStream, text: Text) -> io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let got = stream.read(&mut buffer).await?;
        if got == 0 || head.len() + got > REQUEST_BYTES_MAX {
            return respond(&mut stream, "400 Bad Request", "not an HTTP request\n").await;
        }
        head.extend_from_slice(&buffer[..got]);
    }
    let line = head.split(|&b| b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|&b| b == b' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split(|&b| b == b'?').next().unwrap_or_default();
    if method != b"GET" {
        return respond(&mut stream, "405 Method Not Allowed", "only GET\n").await;
    }
    if path != b"/metrics" {
        return respond(&mut stream, "404 Not Found", "the metrics are at /metrics\n").await;
    }
    let body = tokio::task::spawn_blocking(move || text()).await?;
    respond(&mut stream, "200 OK", &body).await
}

async fn respond(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    async fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let reading = stream.read_to_end(&mut answer);
        tokio::time::timeout(SCRAPE_TIME_MAX, reading).await.unwrap().unwrap();
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn a_scrape_is_answered_and_anything_else_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(|| "x 5\n".to_owned())));
        let ok = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(ok.starts_with("HTTP/1.1 200 OK\r\n") && ok.ends_with("\r\n\r\nx 5\n"), "{ok}");
        assert!(ask(address, b"GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, b"POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        assert!(ask(address, b"\x16\x03\x01").await.starts_with("HTTP/1.1 400"));
        server.abort();
    }
}
