//! QEMU's RAM blocks as HMP `info ramblock` prints them (QEMU 8.0 and later print the host address).

/// A block of guest memory in QEMU's address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// `pc.ram`, `0000:00:02.0/vga.vram`, ...; unique.
    pub name: String,
    /// Size of the pages that the host maps it with.
    pub page_bytes: u64,
    /// Bytes in use; what a migration stream carries.
    pub used_bytes: u64,
    /// Address in QEMU.
    pub host_address: u64,
}

/// Why the answer of `info ramblock` was not understood.
#[derive(Debug, thiserror::Error)]
#[error("info ramblock: {reason}: {line:?}")]
pub struct RamBlockError {
    reason: &'static str,
    line: String,
}

/// Parses the whole table. Blocks without any used byte, or without a name, are left out.
///
/// ```text
///               Block Name    PSize              Offset               Used              Total                HVA  RO
///                   pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f3f3fe00000  rw
/// ```
pub fn parse(text: &str) -> Result<Vec<RamBlock>, RamBlockError> {
    let mut blocks = Vec::new();
    for line in text.lines().skip(1).filter(|line| !line.trim().is_empty()) {
        let error = |reason| RamBlockError { reason, line: line.to_owned() };
        // From the right, since a name may contain spaces.
        let mut fields: Vec<&str> = line.split_whitespace().collect();
        if !fields.last().is_some_and(|field| field.starts_with("0x")) {
            fields.pop();
        }
        let [name @ .., size, unit, _offset, used, _total, address] = fields.as_slice() else {
            return Err(error("too few columns (QEMU 8.0 or later is needed)"));
        };
        let unit = match *unit {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(error("unknown unit of the page size")),
        };
        let hex = |field: &str| field.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let size: u64 = size.parse().map_err(|_| error("page size is not a number"))?;
        let used_bytes = hex(used).ok_or_else(|| error("used length is not a number"))?;
        let host_address = hex(address).ok_or_else(|| error("host address is not a number"))?;
        // A block without a name is part of no migration stream and of no address space: on an activated guest, the
        // memory that libvirt asked for and that vmdr's image took the place of.
        let page_bytes = size.checked_mul(unit).ok_or_else(|| error("page size is too large"))?;
        if used_bytes > 0 && !name.is_empty() {
            blocks.push(RamBlock { name: name.join(" "), page_bytes, used_bytes, host_address });
        }
    }
    if blocks.is_empty() { Err(RamBlockError { reason: "no block", line: text.to_owned() }) } else { Ok(blocks) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_prints() {
        let text = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
                                  pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f3f3fe00000  rw\r\n\
                    0000:00:02.0/vga.vram    4 KiB  0x0000000020080000 0x0000000001000000 0x0000000001000000 0x00007f3f3ea00000  rw\r\n\
                                            4 KiB  0x0000000031340000 0x0000000020000000 0x0000000020000000 0x00007f3f0e400000  rw\r\n\
                             /rom@etc/acpi/tables    2 MiB  0x0000000021140000 0x0000000000020000 0x0000000000200000 0x00007f3f3e400000  ro\r\n";
        let blocks = parse(text).unwrap();
        assert_eq!(blocks.len(), 3);
        assert_eq!(blocks[0].name, "pc.ram");
        assert_eq!(blocks[0].used_bytes, 512 << 20);
        assert_eq!(blocks[0].host_address, 0x7f3f_3fe0_0000);
        assert_eq!(blocks[2].page_bytes, 2 << 20);
        assert_eq!(blocks[2].used_bytes, 0x20000);
    }

    #[test]
    fn older_tables_and_nonsense_are_errors() {
        assert!(parse("Block Name    PSize  Offset Used Total\n pc.ram 4 KiB 0x0 0x10 0x10\n").is_err());
        assert!(parse("").is_err());
        assert!(parse("h\nunknown command: 'info ramblock'\n").is_err());
        assert!(parse("h\n pc.ram 99999999999999999 GiB 0x0 0x10 0x10 0x10 rw\n").is_err());
    }
}
