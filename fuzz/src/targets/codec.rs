//! Payloads: every record that decodes has what it says; and the protobuf messages of both wires.

use prost::Message;
use vmdr_codec::{Assembler, DISK_PIECE_BYTES_MAX, Layout, PAGE_BYTES, PageData, Record};
use vmdr_proto::{frame, replication, shim};

use super::split;
use crate::wire;

pub fn run(bytes: &[u8]) {
    let Some((messages, _, bytes)) = split(bytes) else { return };
    if messages {
        let _ = replication::ToReceiver::decode(bytes);
        let _ = replication::FromReceiver::decode(bytes);
        let _ = frame::read::<shim::ToShim>(&mut &bytes[..]);
        let _ = frame::read::<shim::FromShim>(&mut &bytes[..]);
        return;
    }
    let mut page = [0; PAGE_BYTES];
    let mut piece = [0; DISK_PIECE_BYTES_MAX];
    let mut state = Assembler::new("device state", 1 << 20);
    for record in vmdr_codec::decode(bytes) {
        let Ok(record) = record else { return };
        let counts = record.counts();
        match record {
            Record::RamPages(run) => {
                let mut pages = 0;
                let mut whole = true;
                for found in run.pages() {
                    let Ok((number, data)) = found else {
                        whole = false;
                        break;
                    };
                    assert_eq!(number, run.first + pages);
                    pages += 1;
                    let read = data.read(&mut page);
                    assert!(read.is_ok() || matches!(data, PageData::Lz4(_)));
                }
                assert_eq!(counts.is_ok(), whole);
                assert!(!whole || pages == u64::from(run.count));
            }
            Record::DiskData { data, .. } => {
                if let Ok(read) = data.read(&mut piece) {
                    assert_eq!(read.len(), data.len());
                }
            }
            Record::DeviceState { offset, total, bytes } | Record::DomainXml { offset, total, bytes } => {
                let _ = state.add(offset, total, bytes);
            }
            Record::Layout(layout) => {
                let again = layout.to_bytes().unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(Layout::from_bytes(&again), Ok(layout));
            }
            Record::RamZero { .. } | Record::DiskZero { .. } => assert!(counts.is_ok()),
        }
    }
    let _ = state.take();
}

pub fn seeds() -> Vec<Vec<u8>> {
    let payloads = wire::payloads().into_iter().map(|payload| [&[0], &payload[..]].concat());
    let messages = wire::messages().into_iter().map(|message| [&[1], &message.encode_to_vec()[..]].concat());
    payloads.chain(messages).collect()
}
