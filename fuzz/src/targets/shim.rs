//! What the shim reads: an NBD client's whole connection, NBD messages, QEMU's table of RAM blocks.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vmdr_shim::nbd::export::{Capabilities, Export, ExportError, Extent, WriteError};
use vmdr_shim::nbd::handshake::{decode_error_chunk, negotiate};
use vmdr_shim::nbd::message::{
    ContextQuery, ExportQuery, OptionHead, OptionReplyHead, ReplyHead, Request, decode_greeting, encode_option,
};
use vmdr_shim::nbd::proto::{client_flag, command, option};
use vmdr_shim::nbd::session::{Tally, transmit};
use vmdr_shim::ramblock;

/// Size of the export.
const SIZE_BYTES: usize = 64 << 10;

pub fn run(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    match first % 4 {
        0 => session(bytes),
        1 => {
            let _ = ramblock::parse(&String::from_utf8_lossy(bytes));
        }
        _ => messages(bytes),
    }
}

fn messages(bytes: &[u8]) {
    let _ = decode_greeting(bytes);
    let _ = OptionHead::decode(bytes);
    let _ = OptionReplyHead::decode(bytes);
    let _ = ReplyHead::decode(bytes);
    let _ = decode_error_chunk(bytes);
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(request.encode()[..], *bytes);
    }
    if let Ok(query) = ExportQuery::decode(bytes) {
        assert_eq!(query.encode(), bytes);
    }
    if let Ok(query) = ContextQuery::decode(bytes) {
        assert_eq!(query.encode(), bytes);
    }
}

/// A connection of which one direction is an input, and the other goes nowhere.
struct Connection<'a> {
    from: &'a [u8],
    answered: u64,
}

impl Read for Connection<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.from.read(buffer)
    }
}

impl Write for Connection<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answered += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn session(bytes: &[u8]) {
    let disk: Arc<dyn Export> = Arc::new(Disk(Mutex::new(vec![0; SIZE_BYTES])));
    let mut connection = Connection { from: bytes, answered: 0 };
    let mut tally = Tally::default();
    if let Ok(Some(agreed)) = negotiate(&mut connection, &[disk], 1) {
        let _ = transmit(&mut connection, &agreed, &mut tally);
    }
    // An answer to each request, of at most the size of the export and some.
    assert!(connection.answered <= (bytes.len() as u64 + 1) * (2 * SIZE_BYTES as u64), "{}", connection.answered);
}

/// Holds the server to what it promises exports: every request is inside the size.
struct Disk(Mutex<Vec<u8>>);

impl Disk {
    fn with<T>(&self, offset: u64, length: u64, act: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(offset.checked_add(length).is_some_and(|end| end <= SIZE_BYTES as u64), "{length} bytes at {offset}");
        act(&mut bytes[offset as usize..(offset + length) as usize])
    }
}

impl Export for Disk {
    fn name(&self) -> &str {
        "vda"
    }

    fn size_bytes(&self) -> u64 {
        SIZE_BYTES as u64
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            trim: true,
            fast_zero: true,
            block_status: true,
            multi_connection: true,
            block_bytes_min: 1,
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes));
        Ok(())
    }

    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        let mut data = vec![0; length as usize];
        source.read_exact(&mut data).map_err(WriteError::Source)?;
        self.with(offset, length.into(), |bytes| bytes.copy_from_slice(&data));
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool, _: bool) -> Result<(), ExportError> {
        self.with(offset, length, |bytes| bytes.fill(0));
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.with(offset, length, |_| ());
        Ok(())
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64, _: usize) -> Result<Vec<Extent>, ExportError> {
        self.with(offset, length, |_| ());
        let half = length / 2;
        let extents = [(half, true), (length - half, false)];
        let extents = extents.into_iter().filter(|(length, _)| *length > 0);
        Ok(extents.map(|(length, hole)| Extent { length, hole, zero: hole }).collect())
    }

    fn connected(&self, _: u64) {}

    fn disconnected(&self, _: u64) {}
}

pub fn seeds() -> Vec<Vec<u8>> {
    let export = ExportQuery { name: "vda".to_owned(), infos: vec![3] };
    let context = ContextQuery { name: "vda".to_owned(), queries: vec!["base:allocation".to_owned()] };
    let ask = |command, offset, length| Request { flags: 0, command, cookie: 7, offset, length }.encode().to_vec();
    let flags = u32::from(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
    let begin = [
        flags,
        encode_option(option::STRUCTURED_REPLY, &[]),
        encode_option(option::SET_META_CONTEXT, &context.encode()),
        encode_option(option::LIST, &[]),
    ]
    .concat();
    let requests = [
        ask(command::WRITE, 4096, 8),
        b"payload!".to_vec(),
        ask(command::READ, 0, 8192),
        ask(command::BLOCK_STATUS, 0, 65536),
        ask(command::WRITE_ZEROES, 0, 4096),
        ask(command::TRIM, 8192, 4096),
        ask(command::FLUSH, 0, 0),
        ask(command::DISC, 0, 0),
    ]
    .concat();
    let go = [&[0], &begin[..], &encode_option(option::GO, &export.encode()), &requests].concat();
    let name = [&[0], &begin[..], &encode_option(option::EXPORT_NAME, b"vda"), &requests].concat();
    let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                 \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f3f3fe00000  rw\n\
                 \x20   /rom@etc/acpi/tables    4 KiB  0x0000000020040000 0x0000000000020000 0x0000000000200000 0x00007f3f3f400000  ro\n";
    vec![
        go,
        name,
        [&[1], table.as_bytes()].concat(),
        [&[2], &export.encode()[..]].concat(),
        [&[2], &context.encode()[..]].concat(),
        [&[2], &ask(command::READ, 1, 2)[..]].concat(),
    ]
}
