//! Composes the file that libvirt restores a guest from: libvirt's save image, holding a QEMU migration stream.
//!
//! The image is small whatever the size of the guest: it declares the guest's main memory but does not carry it, because
//! the restored QEMU maps the standby's RAM image instead (see [`super::xml`]). What it carries are the small blocks
//! (firmware, video memory, ROMs) and the device state of the checkpoint. Nothing here does I/O except through the
//! reader and writer given, and the same input gives the same bytes.
//!
//! ```text
//! libvirt's header, 92 bytes     "LibvirtQemudSave", little-endian u32: version 2, data length, was running 1,
//!                                compression 0, cookie offset 0, 14 reserved   (libvirt: src/qemu/qemu_saveimage.h)
//! domain XML, NUL, zeroes        up to the next multiple of 64 KiB, as libvirt itself pads it
//! QEMU migration stream          big-endian                                    (QEMU: migration/savevm.c, ram.c)
//!   "QEVM" 3
//!   07 length machine            configuration section: the machine type
//!   01 id "ram" 0 4              start of section "ram", version 4
//!     total|MEM_SIZE             then every block: length of its name (u8), name, used bytes (u64); EOS
//!   7e id                        footer
//!   03 id                        end of section "ram": the pages
//!     offset|PAGE name bytes     4096 bytes; CONTINUE instead of the name within a block
//!     offset|ZERO name 00        a page of zeroes
//!     EOS
//!   7e id
//!   device sections ... 00       what xen-save-devices-state wrote, without its own 8 bytes of "QEVM" 3
//!   06 length "{}"               description of the stream, which QEMU warns about when it is missing
//! ```

use std::io::{self, Read, Write};

use vmdr_proto::PAGE_BYTES;

const LIBVIRT_MAGIC: &[u8; 16] = b"LibvirtQemudSave";
const LIBVIRT_VERSION: u32 = 2;
/// Reserved words at the end of libvirt's header.
const LIBVIRT_UNUSED_WORDS: usize = 14;
const LIBVIRT_HEADER_BYTES: usize = LIBVIRT_MAGIC.len() + 4 * (5 + LIBVIRT_UNUSED_WORDS);
/// libvirt reserves this much after the XML, so that the XML can be edited in place.
const XML_ALIGN_BYTES: usize = 64 << 10;

const QEMU_FILE_MAGIC: u32 = 0x5145_564d;
const QEMU_FILE_VERSION: u32 = 3;
/// Magic and version, with which a device state begins and which the stream has already.
pub const QEMU_FILE_HEADER_BYTES: usize = 8;
const SECTION_START: u8 = 0x01;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const SECTION_VMDESC: u8 = 0x06;
const SECTION_CONFIGURATION: u8 = 0x07;
const SECTION_FOOTER: u8 = 0x7e;
const SECTION_EOF: u8 = 0x00;

/// Any number that no other section of the stream has; QEMU itself gives "ram" this one.
const RAM_SECTION_ID: u32 = 2;
const RAM_SECTION_VERSION: u32 = 4;
const RAM_ZERO: u64 = 0x02;
const RAM_MEM_SIZE: u64 = 0x04;
const RAM_PAGE: u64 = 0x08;
const RAM_EOS: u64 = 0x10;
const RAM_CONTINUE: u64 = 0x20;

/// An empty description is enough: QEMU reads and drops it.
const VMDESC: &[u8] = b"{}";

/// Why no save image was made. None of these can be helped by trying again.
#[derive(Debug, thiserror::Error)]
pub enum SaveImageError {
    /// A string does not fit the field it goes to.
    #[error("{what} {value:?} has {} bytes, the save image has room for {max}", value.len())]
    TooLong {
        /// What the string is.
        what: &'static str,
        /// The string.
        value: String,
        /// The longest that fits.
        max: usize,
    },
    /// Two blocks of one name: QEMU could not tell which page belongs where.
    #[error("the checkpoint has two RAM blocks named {0:?}")]
    DuplicateBlock(String),
    /// The device state is not what xen-save-devices-state writes.
    #[error("the device state of the checkpoint is damaged: {0}")]
    DeviceState(&'static str),
    /// The content of a block ended early or could not be read.
    #[error("read RAM block {block:?} at byte {offset}: {source}")]
    ReadBlock {
        /// The block.
        block: String,
        /// How far it was read.
        offset: u64,
        /// What went wrong.
        source: io::Error,
    },
    /// The image could not be written.
    #[error("write the save image: {0}")]
    Write(#[from] io::Error),
}

/// How a block gets its content in the restored guest.
pub enum Content<'a> {
    /// From a file that the restored QEMU maps: the stream only declares the block.
    Mapped,
    /// Mapped as well, with these pages over it, which go into QEMU's private mapping.
    Patched(&'a mut dyn Patch),
    /// From the stream, zero pages included: whatever the restored QEMU put there before (firmware, ROMs) is replaced.
    Carried(&'a mut dyn Read),
    /// From the stream, but zero pages are left out: for memory that QEMU has just taken from the kernel.
    CarriedSparse(&'a mut dyn Read),
}

/// Pages of a block, one after the other.
pub trait Patch {
    /// Fills in the next page and says where it belongs; nothing: that was all.
    fn next(&mut self, page: &mut [u8; PAGE_BYTES]) -> io::Result<Option<u64>>;
}

/// A RAM block of the guest, under the name that the restored QEMU has for it.
pub struct Block<'a> {
    /// Its name in the restored QEMU.
    pub name: &'a str,
    /// Bytes in use, a multiple of 4 KiB (QEMU rounds up to a page).
    pub used_bytes: u64,
    /// Where its content comes from.
    pub content: Content<'a>,
}

/// Writes a whole save image and returns its length in bytes.
///
/// `machine` is the full name of the machine type (`pc-q35-10.0`), not an alias; `device_state` is what
/// `xen-save-devices-state` wrote.
pub fn write(
    to: &mut dyn Write,
    xml: &str,
    machine: &str,
    blocks: &mut [Block<'_>],
    device_state: &[u8],
) -> Result<u64, SaveImageError> {
    check(machine, blocks, device_state)?;
    let mut to = Counted { to, bytes: 0 };
    write_libvirt_header(&mut to, xml)?;
    to.be32(QEMU_FILE_MAGIC)?;
    to.be32(QEMU_FILE_VERSION)?;
    to.bytes(&[SECTION_CONFIGURATION])?;
    to.be32(machine.len() as u32)?;
    to.bytes(machine.as_bytes())?;
    write_ram(&mut to, blocks)?;
    to.bytes(&device_state[QEMU_FILE_HEADER_BYTES..])?;
    to.bytes(&[SECTION_VMDESC])?;
    to.be32(VMDESC.len() as u32)?;
    to.bytes(VMDESC)?;
    Ok(to.bytes)
}

fn check(machine: &str, blocks: &[Block<'_>], device_state: &[u8]) -> Result<(), SaveImageError> {
    const NAME_BYTES_MAX: usize = u8::MAX as usize;
    if machine.is_empty() || machine.len() > NAME_BYTES_MAX {
        return Err(SaveImageError::TooLong { what: "machine type", value: machine.to_owned(), max: NAME_BYTES_MAX });
    }
    for (i, block) in blocks.iter().enumerate() {
        if block.name.is_empty() || block.name.len() > NAME_BYTES_MAX {
            let value = block.name.to_owned();
            return Err(SaveImageError::TooLong { what: "RAM block name", value, max: NAME_BYTES_MAX });
        }
        if blocks[..i].iter().any(|b| b.name == block.name) {
            return Err(SaveImageError::DuplicateBlock(block.name.to_owned()));
        }
    }
    check_device_state(device_state).map_err(SaveImageError::DeviceState)
}

/// Whether these bytes look like a device state: the header, at least one full section, the end mark.
pub fn check_device_state(device_state: &[u8]) -> Result<(), &'static str> {
    let header = [QEMU_FILE_MAGIC.to_be_bytes(), QEMU_FILE_VERSION.to_be_bytes()].concat();
    if !device_state.starts_with(&header) {
        return Err("it does not begin with QEMU's magic number and version 3");
    }
    match device_state.get(QEMU_FILE_HEADER_BYTES) {
        Some(&SECTION_FULL) => {}
        Some(_) => return Err("it does not begin with a device section"),
        None => return Err("it holds no device"),
    }
    if device_state.last() != Some(&SECTION_EOF) {
        return Err("it does not end with QEMU's end mark");
    }
    Ok(())
}

fn write_libvirt_header(to: &mut Counted<'_>, xml: &str) -> Result<(), SaveImageError> {
    let unpadded = LIBVIRT_HEADER_BYTES + xml.len() + 1;
    let padding = unpadded.next_multiple_of(XML_ALIGN_BYTES) - unpadded;
    let Ok(data_bytes) = u32::try_from(xml.len() + 1 + padding) else {
        return Err(SaveImageError::TooLong { what: "domain XML", value: String::new(), max: u32::MAX as usize });
    };
    to.bytes(LIBVIRT_MAGIC)?;
    let (was_running, uncompressed, no_cookie) = (1, 0, 0);
    for word in [LIBVIRT_VERSION, data_bytes, was_running, uncompressed, no_cookie] {
        to.bytes(&u32::to_le_bytes(word))?;
    }
    to.zeroes(4 * LIBVIRT_UNUSED_WORDS)?;
    to.bytes(xml.as_bytes())?;
    to.zeroes(1 + padding)?;
    Ok(())
}

fn write_ram(to: &mut Counted<'_>, blocks: &mut [Block<'_>]) -> Result<(), SaveImageError> {
    to.bytes(&[SECTION_START])?;
    to.be32(RAM_SECTION_ID)?;
    to.name("ram")?;
    to.be32(0)?; // instance
    to.be32(RAM_SECTION_VERSION)?;
    let total: u64 = blocks.iter().map(|b| b.used_bytes).sum();
    to.be64(total | RAM_MEM_SIZE)?;
    for block in blocks.iter() {
        to.name(block.name)?;
        to.be64(block.used_bytes)?;
    }
    to.be64(RAM_EOS)?;
    to.footer()?;

    to.bytes(&[SECTION_END])?;
    to.be32(RAM_SECTION_ID)?;
    for block in blocks.iter_mut() {
        match &mut block.content {
            Content::Mapped => {}
            Content::Patched(from) => write_patches(to, block.name, *from)?,
            Content::Carried(from) => write_pages(to, block.name, block.used_bytes, *from, true)?,
            Content::CarriedSparse(from) => write_pages(to, block.name, block.used_bytes, *from, false)?,
        }
    }
    to.be64(RAM_EOS)?;
    to.footer()?;
    Ok(())
}

fn write_pages(
    to: &mut Counted<'_>,
    name: &str,
    used_bytes: u64,
    from: &mut dyn Read,
    zeroes: bool,
) -> Result<(), SaveImageError> {
    let mut page = [0; PAGE_BYTES];
    let mut named = false;
    let mut offset = 0;
    while offset < used_bytes {
        let take = usize::try_from(used_bytes - offset).unwrap_or(PAGE_BYTES).min(PAGE_BYTES);
        page[take..].fill(0);
        from.read_exact(&mut page[..take]).map_err(|source| SaveImageError::ReadBlock {
            block: name.to_owned(),
            offset,
            source,
        })?;
        if zeroes || page.iter().any(|&b| b != 0) {
            write_page(to, name, offset, &page, &mut named)?;
        }
        offset += PAGE_BYTES as u64;
    }
    Ok(())
}

fn write_patches(to: &mut Counted<'_>, name: &str, from: &mut dyn Patch) -> Result<(), SaveImageError> {
    let mut page = [0; PAGE_BYTES];
    let (mut named, mut last) = (false, 0);
    let failed = |offset| move |source| SaveImageError::ReadBlock { block: name.to_owned(), offset, source };
    while let Some(offset) = from.next(&mut page).map_err(failed(last))? {
        last = offset;
        write_page(to, name, offset, &page, &mut named)?;
    }
    Ok(())
}

fn write_page(
    to: &mut Counted<'_>,
    name: &str,
    offset: u64,
    page: &[u8; PAGE_BYTES],
    named: &mut bool,
) -> Result<(), SaveImageError> {
    let is_zero = page.iter().all(|&b| b == 0);
    let kind = if is_zero { RAM_ZERO } else { RAM_PAGE };
    to.be64(offset | kind | if *named { RAM_CONTINUE } else { 0 })?;
    if !*named {
        to.name(name)?;
        *named = true;
    }
    if is_zero {
        to.bytes(&[0])?
    } else {
        to.bytes(page)?
    }
    Ok(())
}

struct Counted<'a> {
    to: &'a mut dyn Write,
    bytes: u64,
}

impl Counted<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn be32(&mut self, value: u32) -> io::Result<()> {
        self.bytes(&value.to_be_bytes())
    }

    fn be64(&mut self, value: u64) -> io::Result<()> {
        self.bytes(&value.to_be_bytes())
    }

    /// A string of at most 255 bytes behind its length; `check` has seen to the length.
    fn name(&mut self, name: &str) -> io::Result<()> {
        self.bytes(&[name.len() as u8])?;
        self.bytes(name.as_bytes())
    }

    fn footer(&mut self) -> io::Result<()> {
        self.bytes(&[SECTION_FOOTER])?;
        self.be32(RAM_SECTION_ID)
    }

    fn zeroes(&mut self, mut count: usize) -> io::Result<()> {
        const ZEROES: [u8; 4096] = [0; 4096];
        while count > 0 {
            let some = count.min(ZEROES.len());
            self.bytes(&ZEROES[..some])?;
            count -= some;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device state of one section; what is in it does not matter here.
    fn device_state() -> Vec<u8> {
        let mut state = b"QEVM\0\0\0\x03\x04DEVICE\x7e".to_vec();
        state.push(0);
        state
    }

    fn image(xml: &str, blocks: &mut [Block<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        let bytes = write(&mut out, xml, "pc-q35-10.0", blocks, &device_state()).unwrap();
        assert_eq!(bytes, out.len() as u64);
        out
    }

    #[test]
    fn every_byte_is_where_libvirt_and_qemu_look_for_it() {
        let mut rom = vec![0; 3 * 4096];
        rom[0] = 0xaa;
        rom[2 * 4096 + 4095] = 0xbb;
        let mut node = vec![0; 2 * 4096];
        node[4096] = 0xcc;
        let (mut rom_from, mut node_from) = (rom.as_slice(), node.as_slice());
        let got = image(
            "<domain/>",
            &mut [
                Block { name: "vmdr-ram", used_bytes: 0x2000_0000, content: Content::Mapped },
                Block { name: "pc.bios", used_bytes: 3 * 4096, content: Content::Carried(&mut rom_from) },
                Block { name: "ram-node1", used_bytes: 2 * 4096, content: Content::CarriedSparse(&mut node_from) },
            ],
        );

        // By hand, from libvirt's qemu_saveimage.h and QEMU's savevm.c and ram.c.
        let mut want = b"LibvirtQemudSave".to_vec();
        want.extend([2, 0, 0, 0]);
        want.extend([0xa4, 0xff, 0, 0]); // 65536 - 92
        want.extend([1, 0, 0, 0]);
        want.extend([0; 4 + 4 + 56]);
        assert_eq!(want.len(), 92);
        want.extend(b"<domain/>\0");
        want.resize(65536, 0);
        want.extend(b"QEVM\x00\x00\x00\x03");
        want.extend(b"\x07\x00\x00\x00\x0bpc-q35-10.0");
        want.extend(b"\x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04");
        want.extend(b"\x00\x00\x00\x00\x20\x00\x50\x04"); // the sum of all, and 4
        want.extend(b"\x08vmdr-ram\x00\x00\x00\x00\x20\x00\x00\x00");
        want.extend(b"\x07pc.bios\x00\x00\x00\x00\x00\x00\x30\x00");
        want.extend(b"\x09ram-node1\x00\x00\x00\x00\x00\x00\x20\x00");
        want.extend(b"\x00\x00\x00\x00\x00\x00\x00\x10");
        want.extend(b"\x7e\x00\x00\x00\x02");
        want.extend(b"\x03\x00\x00\x00\x02");
        want.extend(b"\x00\x00\x00\x00\x00\x00\x00\x08\x07pc.bios");
        want.extend(&rom[..4096]);
        want.extend(b"\x00\x00\x00\x00\x00\x00\x10\x22\x00");
        want.extend(b"\x00\x00\x00\x00\x00\x00\x20\x28");
        want.extend(&rom[8192..]);
        want.extend(b"\x00\x00\x00\x00\x00\x00\x10\x08\x09ram-node1");
        want.extend(&node[4096..]);
        want.extend(b"\x00\x00\x00\x00\x00\x00\x00\x10");
        want.extend(b"\x7e\x00\x00\x00\x02");
        want.extend(b"\x04DEVICE\x7e\x00");
        want.extend(b"\x06\x00\x00\x00\x02{}");
        assert!(got == want, "first difference at {:?}", got.iter().zip(&want).position(|(a, b)| a != b));
    }

    #[test]
    fn xml_that_fills_its_space_exactly_gets_no_padding_and_one_byte_more_gets_64_kib() {
        let exact = "x".repeat(65536 - 92 - 1);
        let got = image(&exact, &mut []);
        assert_eq!(&got[65535..65540], b"\0QEVM");
        assert_eq!(got[20..24], 65444u32.to_le_bytes());
        let got = image(&format!("{exact}y"), &mut []);
        assert_eq!(&got[65535..65537], b"y\0");
        assert_eq!(&got[131072..131076], b"QEVM");
        assert_eq!(got[20..24], (131072u32 - 92).to_le_bytes());
    }

    #[test]
    fn the_size_does_not_depend_on_the_mapped_memory() {
        let small = image("<d/>", &mut [Block { name: "vmdr-ram", used_bytes: 1 << 29, content: Content::Mapped }]);
        let large = image("<d/>", &mut [Block { name: "vmdr-ram", used_bytes: 1 << 42, content: Content::Mapped }]);
        assert_eq!(small.len(), large.len());
    }

    #[test]
    fn patched_pages_follow_the_declaration_and_no_others() {
        struct Two(u64);
        impl Patch for Two {
            fn next(&mut self, page: &mut [u8; PAGE_BYTES]) -> io::Result<Option<u64>> {
                self.0 += 1;
                page.fill(if self.0 == 1 { 5 } else { 0 });
                Ok((self.0 < 3).then_some(self.0 * 0x1000))
            }
        }
        let mut two = Two(0);
        let patched = [Block { name: "vmdr-ram", used_bytes: 1 << 29, content: Content::Patched(&mut two) }];
        let patched = image("<d/>", &mut { patched });
        let plain = image("<d/>", &mut [Block { name: "vmdr-ram", used_bytes: 1 << 29, content: Content::Mapped }]);
        // Offset and flags, the name once, the page; then offset and flags, and a zero.
        let pages = [&[0, 0, 0, 0, 0, 0, 0x10, 8, 8][..], b"vmdr-ram", &[5; 4096], &[0, 0, 0, 0, 0, 0, 0x20, 0x22, 0]];
        let pages = pages.concat();
        assert_eq!(patched.len(), plain.len() + pages.len());
        let at = patched.iter().zip(&plain).position(|(a, b)| a != b).unwrap() - 6;
        assert_eq!(patched[at..at + pages.len()], pages[..]);
        assert_eq!([&patched[..at], &patched[at + pages.len()..]].concat(), plain);
    }

    #[test]
    fn damage_is_named() {
        let mut out = Vec::new();
        for (state, what) in [
            (b"".to_vec(), "magic"),
            (b"QEVM\0\0\0\x02\x04x\0".to_vec(), "magic"),
            (b"QEVM\0\0\0\x03".to_vec(), "no device"),
            (b"QEVM\0\0\0\x03\x01x\0".to_vec(), "device section"),
            (b"QEVM\0\0\0\x03\x04x".to_vec(), "end mark"),
        ] {
            let error = write(&mut out, "<d/>", "pc", &mut [], &state).unwrap_err();
            assert!(error.to_string().contains(what), "{state:?}: {error}");
            assert!(out.is_empty(), "nothing may be written for {state:?}");
        }
        let mut short: &[u8] = &[1; 5000];
        let block = Block { name: "pc.rom", used_bytes: 8192, content: Content::Carried(&mut short) };
        let error = write(&mut out, "<d/>", "pc", &mut [block], &device_state()).unwrap_err();
        assert!(matches!(error, SaveImageError::ReadBlock { offset: 4096, .. }), "{error}");
        let long = "n".repeat(256);
        let block = Block { name: &long, used_bytes: 4096, content: Content::Mapped };
        let error = write(&mut out, "<d/>", "pc", &mut [block], &device_state()).unwrap_err();
        assert!(matches!(error, SaveImageError::TooLong { max: 255, .. }), "{error}");
        let twice = || Block { name: "a", used_bytes: 4096, content: Content::Mapped };
        let error = write(&mut out, "<d/>", "pc", &mut [twice(), twice()], &device_state()).unwrap_err();
        assert!(matches!(error, SaveImageError::DuplicateBlock(_)), "{error}");
    }
}
