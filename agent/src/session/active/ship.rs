//! Parts on their way: encoded, with what the receiver does not know yet of the domain, and queued.

use std::time::{Duration, Instant};

use vmdr_codec::{Layout, RamBlock};
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;
use vmdr_proto::shim::{DiskOpKind, Part};
use vmdr_shim::capture::Whole;

use super::{Active, InFlight, Mode, Stop};
use crate::encode::Extras;
use crate::link::{Closed, send};

/// How often the domain's XML is compared with what the receiver has.
const XML_LOOK: Duration = Duration::from_secs(30);

impl Active<'_> {
    /// Encodes a part and queues it. A link that went down meanwhile is no error: the part is sent again later.
    pub(in crate::session) fn ship(&mut self, mut part: Part) -> Result<u64, Stop> {
        let Some(sender) = self.sender.clone() else { return Ok(0) };
        let layout = self.layout(&part);
        self.resync.take_if(|resync| resync.open_epoch() != part.epoch);
        if let Some(resync) = &mut self.resync {
            if !resync.fits(&layout) {
                // Numbers of blocks or disks mean something else there: begin anew, with everything.
                tracing::info!(domain = self.worker.protection.name, "the guest is not made of what the receiver has");
                self.resync = None;
                self.attached.shim.arm(part.generation, part.epoch, Whole::Seed, false)?;
                self.in_flight.clear();
                self.set_mode(Mode::Copy { round: 0, need_pass: true }, true);
                return Ok(0);
            }
            if let Err(error) = resync.reduce(&mut part, &self.attached.arena) {
                // The link is in trouble, or the receiver's standby has moved on: whatever it is, the next connection
                // decides anew.
                self.worker.set_error(format!("compare with the receiver: {error:#}"));
                self.sender = None;
                return Ok(0);
            }
        }
        let layout = (self.sent_layout.as_ref() != Some(&layout)).then_some(layout);
        // A guest that is gone has the definition that the receiver knows.
        let xml = if part.last && self.ended.is_none() { self.new_xml(part.seed)? } else { None };
        let application = self.application.marks(part.epoch);
        let extras = Extras { domain_xml: xml.as_deref(), layout: layout.as_ref(), application };
        let begun = Instant::now();
        let worker = &self.worker;
        worker.shared.status().waiting_since.get_or_insert(begun);
        let encoded = self.encoder.encode(&part, &self.attached.arena, &extras, |message| {
            send(&worker.runtime, &sender, message, || worker.shared.is_ending()).map_err(|Closed| Unsent::LinkDown)
        });
        let bytes = match encoded {
            Ok(bytes) => bytes,
            Err(Unsent::LinkDown) => {
                self.sender = None;
                return Ok(0);
            }
            Err(Unsent::Encoding(error)) => return Err(error.into()),
        };
        if let Some(xml) = xml {
            self.sent_xml = xml;
        }
        if layout.is_some() {
            self.sent_layout = layout;
        }
        let data = part.ops.iter().filter(|op| op.kind() == DiskOpKind::Data);
        let disk_bytes: u64 = data.map(|op| op.length).sum();
        {
            let mut status = self.worker.shared.status();
            status.figures.sent(bytes);
            status.figures.sent_disk_bytes += disk_bytes;
        }
        self.in_flight.push_back(InFlight {
            epoch: part.epoch,
            part: part.part,
            last: part.last,
            cut_unix_ns: part.cut_unix_ns,
            begun,
        });
        Ok(bytes)
    }

    fn layout(&self, part: &Part) -> Layout {
        let ram = part.blocks.iter().map(|block| RamBlock {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
            page_bytes: block.page_bytes,
        });
        Layout { machine: self.attached.machine.clone(), ram: ram.collect(), disks: self.attached.disks.clone() }
    }

    /// A recovery point whose definition has a disk that is not mirrored is not one.
    fn same_disks(&self, xml: &Element) -> anyhow::Result<()> {
        let xml = DomainXml::from_element(xml)?;
        let defined = xml.disks.iter().filter(|disk| disk.is_writable()).map(|disk| &disk.target);
        anyhow::ensure!(
            defined.eq(self.attached.disks.iter().map(|disk| &disk.target)),
            "the disks of domain {} have changed",
            xml.name
        );
        Ok(())
    }

    /// The domain's XML, if it is not what the receiver has.
    fn new_xml(&mut self, needed: bool) -> anyhow::Result<Option<String>> {
        if !self.xml_changed && self.xml_looked.elapsed() < XML_LOOK {
            return Ok(None);
        }
        self.xml_looked = Instant::now();
        let xml = match self.attached.domain.migratable_xml() {
            Ok(xml) => {
                self.same_disks(&xml)?;
                xml.to_string()
            }
            Err(error) if needed && self.sent_xml.is_empty() => return Err(error.into()),
            Err(error) => {
                // libvirtd being away is no reason to be without epochs: the receiver has an XML.
                tracing::warn!(domain = self.worker.protection.name, "{error}");
                return Ok(None);
            }
        };
        self.xml_changed = false;
        Ok((xml != self.sent_xml).then_some(xml))
    }
}

/// Why a part was not queued.
enum Unsent {
    LinkDown,
    Encoding(anyhow::Error),
}

impl From<anyhow::Error> for Unsent {
    fn from(error: anyhow::Error) -> Self {
        Self::Encoding(error)
    }
}
