//! What can go wrong between vmdr and libvirt, in words for the operator.

use crate::domain_xml::DomainXmlError;
use crate::xml::XmlError;

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such domain.
    #[error("there is no domain {wanted:?} at {uri}: give a name or UUID that `virsh -c {uri} list --all` shows")]
    NoSuchDomain {
        /// Name or UUID that was asked for.
        wanted: String,
        /// The libvirt it was asked for at.
        uri: String,
    },
    /// libvirt cannot be reached.
    #[error("cannot connect to libvirt at {uri}: {message}; is libvirtd running, and may this process use its socket?")]
    Connect {
        /// Where.
        uri: String,
        /// libvirt's words.
        message: String,
    },
    /// libvirt refused or failed.
    #[error("libvirt could not {what}: {message} (libvirt error {code})")]
    Libvirt {
        /// A verb and its object: "define domain web1".
        what: String,
        /// libvirt's words.
        message: String,
        /// libvirt's number, `virErrorNumber`.
        code: u32,
    },
    /// QEMU refused a monitor command.
    #[error("QEMU refused {command} for {domain}: {message} ({class})")]
    Monitor {
        /// The domain.
        domain: String,
        /// The QMP command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's words.
        message: String,
    },
    /// Something that came from libvirt or QEMU cannot be understood.
    #[error("the answer to {what} for {domain} cannot be understood: {message}")]
    Answer {
        /// The domain.
        domain: String,
        /// What had been asked.
        what: String,
        /// What is wrong with it.
        message: String,
    },
    /// QEMU's process was not found.
    #[error("cannot find the QEMU process of {domain}: {message}")]
    Process {
        /// The domain.
        domain: String,
        /// Why.
        message: String,
    },
    /// A value that libvirt's C functions cannot take.
    #[error("{what} contains a NUL byte, which libvirt cannot take")]
    Nul {
        /// What the value is.
        what: String,
    },
    /// A definition that makes no sense.
    #[error(transparent)]
    DomainXml(#[from] DomainXmlError),
    /// Not XML.
    #[error(transparent)]
    Xml(#[from] XmlError),
}

impl Error {
    /// An error of the `virt` crate, with what was tried.
    pub(crate) fn libvirt(what: impl Into<String>, error: &virt::error::Error) -> Self {
        Error::Libvirt { what: what.into(), message: error.message().to_owned(), code: error.code().to_raw() }
    }

    /// Whether the domain is not (any longer) there.
    pub fn is_no_such_domain(&self) -> bool {
        matches!(self, Error::NoSuchDomain { .. }) || self.code() == Some(virt_sys::VIR_ERR_NO_DOMAIN)
    }

    /// Whether the domain is in a state in which this cannot be done: not running, mostly.
    pub fn is_wrong_state(&self) -> bool {
        self.code() == Some(virt_sys::VIR_ERR_OPERATION_INVALID)
    }

    /// Whether another operation on the domain kept this one waiting for too long.
    pub fn is_timeout(&self) -> bool {
        self.code() == Some(virt_sys::VIR_ERR_OPERATION_TIMEOUT)
    }

    /// Whether the connection looks lost, so that opening a new one may help.
    pub fn is_connection(&self) -> bool {
        match self {
            Error::Connect { .. } => true,
            // A connection that broke is reported as an internal error with these words of the RPC client.
            Error::Libvirt { code, message, .. } => {
                matches!(*code, virt_sys::VIR_ERR_NO_CONNECT | virt_sys::VIR_ERR_RPC)
                    || message.contains("client socket is closed")
                    || message.contains("End of file while reading data")
                    || message.contains("connection closed due to keepalive timeout")
            }
            _ => false,
        }
    }

    /// libvirt's number, if it is an error of libvirt's.
    pub fn code(&self) -> Option<u32> {
        match self {
            Error::Libvirt { code, .. } => Some(*code),
            _ => None,
        }
    }
}
