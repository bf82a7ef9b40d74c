//! What both of vmdr's daemons need of the hypervisor: libvirt, and the domain definitions it speaks.
//!
//! - [`xml`]: a mutable tree of an XML document.
//! - [`domain_xml`]: what a domain definition says, and changes to it.
//! - [`libvirt`]: connections and domains; every call blocks until libvirt answers, so daemons call from threads that may.
//! - [`block`]: block jobs: the mirror of a disk into an NBD server.
//! - [`host`]: what the host could give a domain: networks, CPU features.
//! - [`events`]: what libvirt tells by itself.

pub mod block;
pub mod domain_xml;
pub mod error;
pub mod events;
pub mod host;
pub mod libvirt;
pub mod xml;

mod raw;

pub use error::Error;
