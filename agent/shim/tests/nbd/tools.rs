//! Real tools against the file server.

use crate::common::{
    KIB, LIMIT, MIB, SPARSE_DATA, SPARSE_SIZE, Served, allocated, assert_same_bytes, pattern, run, sparse_file, succeed,
};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use tempfile::TempDir;
use vmdr_shim::nbd::Client;

fn patterned() -> Served {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, SPARSE_SIZE, &SPARSE_DATA);
    Served::over(dir, file, false)
}

/// `qemu-io` with these commands; what it prints.
fn qemu_io(served: &Served, commands: &[&str]) -> String {
    let uri = served.uri();
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend_from_slice(&["-c", command]);
    }
    args.push(&uri);
    let said = succeed("qemu-io", &args);
    assert!(!said.contains("failed"), "{said}");
    said
}

#[test]
fn nbdinfo_sees_what_the_server_can_do() {
    let served = patterned();
    let json: Value = serde_json::from_str(&succeed("nbdinfo", &["--json", &served.uri()])).unwrap();
    assert_eq!(json["protocol"], "newstyle-fixed");
    assert_eq!(json["structured"], true);
    let export = &json["exports"][0];
    assert_eq!(export["export-name"], "vda");
    assert_eq!(export["export-size"], SPARSE_SIZE);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 64 * KIB);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in ["can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);

    let listed: Value = serde_json::from_str(&succeed("nbdinfo", &["--list", "--json", &served.uri()])).unwrap();
    assert_eq!(listed["exports"][0]["export-name"], "vda");
}

#[test]
fn a_read_only_server_says_so_and_means_it() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("disk.raw");
    sparse_file(&file, MIB, &[(0, MIB)]);
    let served = Served::over(dir, file, true);
    let json: Value = serde_json::from_str(&succeed("nbdinfo", &["--json", &served.uri()])).unwrap();
    assert_eq!(json["exports"][0]["is_read_only"], true);
    assert_eq!(json["exports"][0]["can_zero"], false);
    let mut raw = served.raw();
    assert_eq!(raw.write(0, 0, &[1; 512]).code(), 1);
    for command in [4, 6] {
        assert_eq!(raw.ask(command, 0, 0, 512, 0).code(), 1, "command {command}");
    }
    drop(raw);
    served.assert_alive();
    assert_eq!(served.content(), pattern(0, MIB));
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let served = patterned();
    let json: Value = serde_json::from_str(&succeed("nbdinfo", &["--map", "--json", &served.uri()])).unwrap();
    let mut data = Vec::new();
    let mut at = 0;
    for extent in json.as_array().unwrap() {
        let (offset, length) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        assert_eq!(offset, at);
        at += length;
        match extent["type"].as_u64().unwrap() {
            0 => data.push((offset, length)),
            3 => {}
            other => panic!("type {other} at {offset}"),
        }
    }
    assert_eq!(at, SPARSE_SIZE);
    assert_eq!(data, SPARSE_DATA);
}

#[test]
fn nbdcopy_from_the_server_keeps_bytes_and_holes() {
    let served = patterned();
    let copy = served.dir.path().join("copy.raw");
    File::create(&copy).unwrap().set_len(SPARSE_SIZE).unwrap();
    for connections in ["--connections=1", "--connections=4"] {
        succeed("nbdcopy", &[connections, &served.uri(), copy.to_str().unwrap()]);
        assert_same_bytes(&served.file, &copy);
        assert!(allocated(&copy) <= allocated(&served.file) + MIB, "the copy takes {} bytes", allocated(&copy));
    }
}

#[test]
fn nbdcopy_to_the_server_keeps_bytes_and_holes() {
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("source.raw");
    sparse_file(&source, SPARSE_SIZE, &SPARSE_DATA);
    for (connections, flush) in [("--connections=1", "--flush"), ("--connections=4", "--flush")] {
        // Old content where the source has holes must go.
        let target_dir = TempDir::new().unwrap();
        let file = target_dir.path().join("disk.raw");
        sparse_file(&file, SPARSE_SIZE, &[(0, 2 * MIB), (50 * MIB, 16 * MIB)]);
        let served = Served::over(target_dir, file, false);
        succeed("nbdcopy", &[connections, flush, source.to_str().unwrap(), &served.uri()]);
        assert_same_bytes(&source, &served.file);
        let taken = allocated(&served.file);
        assert!(taken <= allocated(&source) + MIB, "the copy takes {taken} bytes");
    }
}

#[test]
fn a_size_that_is_no_multiple_of_anything_is_copied_to_its_last_byte() {
    let size = 3 * MIB + 8 * 77;
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("source.raw");
    sparse_file(&source, size, &[(0, 4 * KIB), (2 * MIB, size - 2 * MIB)]);
    let served = Served::empty(size);
    succeed("nbdcopy", &[source.to_str().unwrap(), &served.uri()]);
    assert_same_bytes(&source, &served.file);
    let back = dir.path().join("back.raw");
    succeed("nbdcopy", &[&served.uri(), back.to_str().unwrap()]);
    assert_same_bytes(&source, &back);
}

#[test]
fn qemu_io_patterns_arrive_where_they_belong() {
    let served = Served::empty(64 * MIB);
    qemu_io(
        &served,
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 -f 1M 64k",
            "write -P 0x33 33554432 32M",
            "write -P 0x44 4097 513",
            "flush",
            "read -P 0x11 0 4097",
            "read -P 0x44 4097 513",
            "read -P 0x22 1M 64k",
            "read -P 0 2M 1M",
            "read -P 0x33 32M 32M",
        ],
    );
    let content = served.content();
    let mut expected = vec![0; 64 << 20];
    expected[..1 << 20].fill(0x11);
    expected[1 << 20..(1 << 20) + (64 << 10)].fill(0x22);
    expected[32 << 20..].fill(0x33);
    expected[4097..4097 + 513].fill(0x44);
    assert!(content == expected, "what qemu-io wrote is not what is in the file");
}

#[test]
fn qemu_io_zeroes_and_discards_and_the_space_comes_back() {
    let served = Served::empty(64 * MIB);
    qemu_io(&served, &["write -P 0x55 0 32M", "flush"]);
    let full = allocated(&served.file);
    assert!(full >= 32 * MIB);
    qemu_io(&served, &["write -z -u 0 8M", "read -P 0 0 8M", "read -P 0x55 8M 24M"]);
    let punched = allocated(&served.file);
    assert!(punched + 8 * MIB <= full + MIB, "{punched} after zeroing with unmap, {full} before");
    qemu_io(&served, &["write -z 8M 8M", "read -P 0 8M 8M", "read -P 0x55 16M 16M"]);
    let kept = allocated(&served.file);
    assert!(kept + MIB >= punched, "zeroing without unmap gave space back: {kept}, {punched} before");
    qemu_io(&served, &["discard 16M 8M", "flush", "read -P 0x55 24M 8M"]);
    let discarded = allocated(&served.file);
    assert!(discarded + 8 * MIB <= kept + MIB, "{discarded} after discard, {kept} before");
    qemu_io(&served, &["write -z 31457281 1001", "read -P 0 31457281 1001", "read -P 0x55 31458282 4000"]);
}

#[test]
fn qemu_io_beyond_the_end_fails_and_harms_nothing() {
    let served = Served::empty(MIB);
    qemu_io(&served, &["write -P 0x66 0 1M"]);
    for command in ["write -P 1 1M 512", "read 1048064 1024", "write -z 1M 4k", "write -P 1 1073741824 64k"] {
        let output = run("qemu-io", &["-f", "raw", "-c", command, &served.uri()]);
        assert!(!output.status.success(), "{command} succeeded");
    }
    assert!(served.content() == vec![0x66; 1 << 20]);
    served.assert_alive();
}

#[test]
fn qemu_img_converts_both_ways() {
    let served = patterned();
    let qcow = served.dir.path().join("copy.qcow2");
    let qcow = qcow.to_str().unwrap();
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &served.uri(), qcow]);
    let target = Served::empty(SPARSE_SIZE);
    succeed("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", qcow, &target.uri()]);
    assert_same_bytes(&served.file, &target.file);
    assert!(allocated(&target.file) <= allocated(&served.file) + MIB);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &served.uri(), &target.uri()]);
}

#[test]
fn three_tebibytes_have_an_end_that_can_be_written_and_read() {
    let size: u64 = 3 << 40;
    let served = Served::empty(size);
    assert_eq!(succeed("nbdinfo", &["--size", &served.uri()]).trim(), size.to_string());
    let (last, beyond_32_bits) = (size - 64 * KIB, (2 << 40) + 4096);
    qemu_io(
        &served,
        &[
            &format!("write -P 0x77 {last} 64k"),
            &format!("write -P 0x88 -f {beyond_32_bits} 8k"),
            &format!("read -P 0x77 {last} 64k"),
            &format!("read -P 0x88 {beyond_32_bits} 8k"),
            &format!("read -P 0 {} 1M", size / 2),
        ],
    );
    let file = File::open(&served.file).unwrap();
    let mut buf = vec![0; 64 << 10];
    file.read_exact_at(&mut buf, last).unwrap();
    assert!(buf.iter().all(|b| *b == 0x77));

    let mut client = Client::connect(&served.socket, "vda", LIMIT).unwrap();
    assert_eq!(client.size_bytes(), size);
    client.read(last, &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 0x77));
    let extents = client.block_status(0, size).unwrap();
    assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), size);
    let mut at = 0;
    let mut data = Vec::new();
    for extent in extents {
        if !extent.zero {
            data.push((at, extent.length));
        }
        at += extent.length;
    }
    assert_eq!(data, [(beyond_32_bits, 8 * KIB), (last, 64 * KIB)]);
}
