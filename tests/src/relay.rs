//! A TCP relay in user space on the link between the sites: the kernel here may lack netem, and a stall or a limit on one
//! connection is what replication has to bear anyway.

use crate::client::Client;
use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes read at once; also the grain of the bandwidth limit.
const BLOCK_BYTES: usize = 16 * 1024;
/// Bytes held back by the delay, per direction, before nothing more is read: what "is on the wire".
const FLIGHT_BYTES_MAX: usize = 4 << 20;
/// How long a thread sleeps when it has nothing to do.
const IDLE_MS: u64 = 1;
/// How long the way to the other end may take.
const CONNECT_SECONDS_MAX: u64 = 5;

/// What happens to what passes, in each direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Added to every byte's way.
    pub delay: Duration,
    /// Bytes per second that pass; 0: no limit.
    pub bytes_per_second: u64,
}

#[derive(Debug)]
struct Shared {
    shape: Mutex<Shape>,
    stalled: AtomicBool,
    ended: AtomicBool,
    passed: AtomicU64,
    flips: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
}

/// A running relay; it ends when dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens at `listen` and passes every connection on to `to`, both in the client's namespace.
    pub fn start(client: &Client, listen: SocketAddr, to: SocketAddr, shape: Shape) -> Result<Self> {
        let listener = client.listen(listen)?;
        listener.set_nonblocking(true).context("make the relay's listener non-blocking")?;
        let shared = Arc::new(Shared {
            shape: Mutex::new(shape),
            stalled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            flips: AtomicU64::new(0),
            connections: Mutex::new(Vec::new()),
        });
        let (inner, client) = (Arc::clone(&shared), client.clone());
        let listener = thread::spawn(move || accept(&listener, &client, to, &inner));
        Ok(Self { shared, listener: Some(listener) })
    }

    /// Changes delay and bandwidth from now on.
    pub fn shape(&self, shape: Shape) {
        *self.shared.shape.lock().unwrap_or_else(PoisonError::into_inner) = shape;
    }

    /// Lets nothing through, without closing anything, or goes on.
    pub fn stall(&self, stalled: bool) {
        self.shared.stalled.store(stalled, SeqCst);
    }

    /// Breaks every connection there is; new ones are taken.
    pub fn reset(&self) {
        for stream in self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One that is broken already is as wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Flips one bit in each of the next `blocks` full blocks that pass.
    pub fn flip_bits(&self, blocks: u64) {
        self.shared.flips.store(blocks, SeqCst);
    }

    /// How many bits are still to be flipped.
    pub fn flips_left(&self) -> u64 {
        self.shared.flips.load(SeqCst)
    }

    /// Bytes passed in both directions.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        self.reset();
        if let Some(listener) = self.listener.take() {
            // A panic there has been printed.
            let _ = listener.join();
        }
    }
}

fn accept(listener: &TcpListener, client: &Client, to: SocketAddr, shared: &Arc<Shared>) {
    while !shared.ended.load(SeqCst) {
        let Ok((near, _)) = listener.accept() else {
            thread::sleep(Duration::from_millis(IDLE_MS));
            continue;
        };
        let Ok(far) = client.tcp(to, Duration::from_secs(CONNECT_SECONDS_MAX)) else {
            // Dropping it tells the near end that nobody is there.
            continue;
        };
        let mut ways = Vec::new();
        for (from, to) in [(&near, &far), (&far, &near)] {
            let _ = (from.set_nonblocking(true), from.set_nodelay(true));
            if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                ways.push((from, to));
            }
        }
        shared.connections.lock().unwrap_or_else(PoisonError::into_inner).extend([near, far]);
        for (from, to) in ways {
            let shared = Arc::clone(shared);
            thread::spawn(move || {
                pass(&from, &to, &shared);
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            });
        }
    }
}

/// Moves bytes one way until an end closes.
fn pass(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared) {
    let mut flight: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut flight_bytes = 0;
    let mut next_send = Instant::now();
    let mut open = true;
    while (open || !flight.is_empty()) && !shared.ended.load(SeqCst) {
        let shape = *shared.shape.lock().unwrap_or_else(PoisonError::into_inner);
        let mut idle = true;
        if open && flight_bytes < FLIGHT_BYTES_MAX {
            let mut block = vec![0; BLOCK_BYTES];
            match from.read(&mut block) {
                Ok(0) => open = false,
                Ok(bytes) => {
                    block.truncate(bytes);
                    let take = |left: u64| left.checked_sub(1);
                    if bytes == BLOCK_BYTES && shared.flips.fetch_update(SeqCst, SeqCst, take).is_ok() {
                        block[BLOCK_BYTES / 2] ^= 0x10;
                    }
                    flight_bytes += bytes;
                    flight.push_back((Instant::now() + shape.delay, block));
                    idle = false;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        let now = Instant::now();
        let due = flight.front().is_some_and(|(at, _)| *at <= now && next_send <= now);
        if due && !shared.stalled.load(SeqCst) {
            let Some((at, mut block)) = flight.pop_front() else { continue };
            match to.write(&block) {
                Ok(bytes) => {
                    shared.passed.fetch_add(bytes as u64, SeqCst);
                    flight_bytes -= bytes;
                    if shape.bytes_per_second > 0 {
                        next_send = now + Duration::from_secs_f64(bytes as f64 / shape.bytes_per_second as f64);
                    }
                    if bytes < block.len() {
                        block.drain(..bytes);
                        flight.push_front((at, block));
                    }
                    idle = false;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => flight.push_front((at, block)),
                Err(_) => return,
            }
        }
        if idle {
            thread::sleep(Duration::from_millis(IDLE_MS));
        }
    }
}
