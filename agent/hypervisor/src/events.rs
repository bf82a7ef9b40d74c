//! What libvirt tells about its domains while it happens.
//!
//! libvirt's client needs an event loop: it answers keep-alive probes there and calls back with events. One thread runs
//! it for the whole process, started before the first connection is opened ([`start_event_loop`]).
//!
//! An [`EventStream`] is bounded: when nobody takes events, the newest are dropped and counted. [`EventStream::lost`]
//! says how many; after a loss, and after [`Event::Disconnected`], the state of every domain must be asked for anew.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uuid::Uuid;

use crate::error::Error;
use crate::libvirt::Connection;
use crate::raw;

/// Events that wait to be taken. Two come with every cut made by passthrough, so that this is minutes of them.
const EVENTS_MAX: usize = 4096;
/// How long the event loop rests after an error, which there should never be, instead of spinning.
const EVENT_LOOP_REST: Duration = Duration::from_millis(100);

/// Something that libvirt told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// About a domain.
    Domain {
        /// Its UUID.
        uuid: Uuid,
        /// Its name.
        name: String,
        /// What happened.
        event: DomainEvent,
    },
    /// The connection is gone. Nothing more will come: open another.
    Disconnected(Disconnect),
}

/// What happened to a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainEvent {
    /// It started, stopped, paused...
    Lifecycle {
        /// What it did.
        change: Lifecycle,
        /// Why: libvirt's `virDomainEvent<Change>DetailType`.
        detail: i32,
    },
    /// The guest rebooted itself. QEMU goes on.
    Rebooted,
    /// A disk reported an error.
    IoError {
        /// Path of the image.
        path: String,
        /// libvirt's alias of the disk.
        alias: String,
        /// `enospc`, or empty.
        reason: String,
        /// What QEMU did about it.
        action: IoErrorAction,
    },
    /// A device was plugged in.
    DeviceAdded {
        /// libvirt's alias.
        alias: String,
    },
    /// A device was unplugged.
    DeviceRemoved {
        /// libvirt's alias.
        alias: String,
    },
    /// A block job changed its state.
    BlockJob {
        /// The disk's target, `vda`.
        disk: String,
        /// The new state.
        status: BlockJobStatus,
    },
}

/// A change in the life of a domain (`virDomainEventType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// The persistent definition changed or came.
    Defined,
    /// The persistent definition went.
    Undefined,
    /// It started: booted, restored, migrated here.
    Started,
    /// It was paused.
    Suspended,
    /// It goes on.
    Resumed,
    /// QEMU is gone: shut down, destroyed, crashed, migrated away, saved.
    Stopped,
    /// The guest shut down; QEMU is still there.
    Shutdown,
    /// The guest sleeps.
    PmSuspended,
    /// The guest panicked.
    Crashed,
    /// Something newer.
    Other(i32),
}

/// What QEMU did about an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorAction {
    /// Ignored it.
    Ignored,
    /// Paused the guest.
    Paused,
    /// Reported it to the guest.
    Reported,
    /// Something newer.
    Other(i32),
}

/// State of a block job (`virConnectDomainEventBlockJobStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockJobStatus {
    /// It ended well.
    Completed,
    /// It failed.
    Failed,
    /// It was ended.
    Canceled,
    /// A mirror has caught up.
    Ready,
    /// Something newer.
    Other(i32),
}

/// Why a connection ended (`virConnectCloseReason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disconnect {
    /// An I/O error.
    Error,
    /// libvirtd closed it, or ended.
    EndOfFile,
    /// libvirtd did not answer keep-alive probes.
    KeepAlive,
    /// This process closed it.
    Client,
    /// Something newer.
    Other(i32),
}

impl Lifecycle {
    pub(crate) fn from_raw(event: i32) -> Self {
        match event {
            0 => Self::Defined,
            1 => Self::Undefined,
            2 => Self::Started,
            3 => Self::Suspended,
            4 => Self::Resumed,
            5 => Self::Stopped,
            6 => Self::Shutdown,
            7 => Self::PmSuspended,
            8 => Self::Crashed,
            other => Self::Other(other),
        }
    }
}

impl IoErrorAction {
    pub(crate) fn from_raw(action: i32) -> Self {
        match action {
            0 => Self::Ignored,
            1 => Self::Paused,
            2 => Self::Reported,
            other => Self::Other(other),
        }
    }
}

impl BlockJobStatus {
    pub(crate) fn from_raw(status: i32) -> Self {
        match status {
            0 => Self::Completed,
            1 => Self::Failed,
            2 => Self::Canceled,
            3 => Self::Ready,
            other => Self::Other(other),
        }
    }
}

impl Disconnect {
    pub(crate) fn from_raw(reason: i32) -> Self {
        match reason {
            0 => Self::Error,
            1 => Self::EndOfFile,
            2 => Self::KeepAlive,
            3 => Self::Client,
            other => Self::Other(other),
        }
    }
}

/// Where callbacks put events. They run in the event loop, which must never wait.
#[derive(Clone)]
pub(crate) struct Sink {
    sender: SyncSender<Event>,
    lost: Arc<AtomicU64>,
}

impl Sink {
    pub(crate) fn deliver(&self, event: Event) {
        if self.sender.try_send(event).is_err() {
            self.lose();
        }
    }

    pub(crate) fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// Events of all domains of a connection, from the moment it was made.
pub struct EventStream {
    connection: Connection,
    receiver: Receiver<Event>,
    lost: Arc<AtomicU64>,
    registered: Vec<i32>,
    close_registered: bool,
}

impl EventStream {
    /// Subscribes. libvirt allows one stream per connection.
    pub(crate) fn new(connection: &Connection) -> Result<Self, Error> {
        let (sender, receiver) = sync_channel(EVENTS_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let sink = Sink { sender, lost: Arc::clone(&lost) };
        let mut stream = EventStream {
            connection: connection.clone(),
            receiver,
            lost,
            registered: Vec::new(),
            close_registered: false,
        };
        let failed = |e| Error::libvirt("subscribe to events", &e);
        raw::register_close(connection.virt(), &sink).map_err(failed)?;
        stream.close_registered = true;
        for id in [
            virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            virt_sys::VIR_DOMAIN_EVENT_ID_REBOOT,
            virt_sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
            virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
            virt_sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
        ] {
            stream.registered.push(raw::register(connection.virt(), id, &sink).map_err(failed)?);
        }
        Ok(stream)
    }

    /// The next event, if one comes in time. `Disconnected` of the error: the stream has ended.
    pub fn next_timeout(&self, timeout: Duration) -> Result<Event, RecvTimeoutError> {
        self.receiver.recv_timeout(timeout)
    }

    /// An event that is there already.
    pub fn try_next(&self) -> Result<Event, TryRecvError> {
        self.receiver.try_recv()
    }

    /// How many events were dropped because nobody took them.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        // On a connection that broke these fail, and there is nothing left to end.
        for number in self.registered.drain(..) {
            if let Err(e) = raw::unregister(self.connection.virt(), number) {
                tracing::debug!(error = %e, "unsubscribe from libvirt events");
            }
        }
        if self.close_registered
            && let Err(e) = raw::unregister_close(self.connection.virt())
        {
            tracing::debug!(error = %e, "unsubscribe from the end of the libvirt connection");
        }
    }
}

/// Starts the thread that runs libvirt's event loop, unless it runs. It must be there before a connection is opened.
pub(crate) fn start_event_loop() -> Result<(), Error> {
    static STARTED: OnceLock<Result<(), Error>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            raw::silence_errors();
            virt::event::event_register_default_impl().map_err(|e| Error::libvirt("set up the event loop", &e))?;
            let run = || loop {
                if let Err(e) = virt::event::event_run_default_impl() {
                    tracing::error!(error = %e, "run libvirt's event loop");
                    std::thread::sleep(EVENT_LOOP_REST);
                }
            };
            let thread = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(run);
            thread.map(drop).map_err(|e| Error::Libvirt {
                what: "start the event loop".to_owned(),
                message: e.to_string(),
                code: 0,
            })
        })
        .clone()
}
