//! State directories that versions have written, kept as files in `receiver/fixtures`: later ones must read them exactly.
//!
//! `NAME.tar.xz` is a state directory, `NAME.txt` everything that it offers, hashes of every byte included. To add those of a
//! new version: `VMDR_FIXTURES=receiver/fixtures cargo nextest run -p vmdr-receiver fixtures::` writes them under its number.
//! Those of older versions are never changed.

use std::fmt::Write as _;
use std::process::Command;

use super::sim::{Fault, SimDisk};
use super::*;

/// Bytes of all fixtures together: they are in the repository.
const FIXTURES_BYTES_MAX: u64 = 300 << 10;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Nothing is done but what is asked for; small segments, and a policy under which points of all tiers are there.
fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 12_000, history_segment_bytes: 12_000, ..lazy() }
}

fn policy() -> Retention {
    let tier = |every, up_to| Tier { every_ns: every * SECOND_NS, for_ns: up_to * SECOND_NS };
    Retention { budget_bytes: 1 << 30, tiers: vec![tier(0, 9), tier(4, 40)] }
}

/// Everything that a store offers, in words.
fn describe(store: &Store) -> String {
    let mut text = String::new();
    let summary = store.domains().pop().unwrap();
    let Position { generation, epoch, open_epoch, open_parts } = summary.position;
    writeln!(text, "domain {} {:?} frozen {}", summary.uuid, summary.name, summary.frozen).unwrap();
    writeln!(text, "position {generation} {epoch} open {open_epoch} {open_parts}").unwrap();
    writeln!(text, "trouble {:?}", summary.trouble).unwrap();
    writeln!(text, "retention {:?}", store.retention(UUID).unwrap()).unwrap();
    // Durable epochs become points of their own when they are applied.
    if epoch > 0 {
        store.domain(UUID).unwrap().apply_all().unwrap();
    }
    for point in store.points(UUID).unwrap() {
        let Point { cut_unix_ns, application, newest, ref names, verified_unix_ns, damaged, .. } = point;
        writeln!(
            text,
            "point {} cut {cut_unix_ns} application {application} newest {newest} names {names:?} verified \
             {verified_unix_ns:?} damaged {damaged}",
            point.id()
        )
        .unwrap();
        let reader = store.read_point(UUID, Some(point.id())).unwrap();
        let layout = reader.layout();
        writeln!(text, "  machine {} xml {:?}", layout.machine, reader.domain_xml()).unwrap();
        writeln!(text, "  device {} {:032x}", reader.device_state().len(), hash(reader.device_state())).unwrap();
        for array in reader.arrays().collect::<Vec<_>>() {
            let mut bytes = vec![0; reader.length(array) as usize];
            reader.read(array, 0, &mut bytes).unwrap();
            let name = match array {
                Array::Ram(n) => format!("{:?}", layout.ram[usize::from(n)]),
                Array::Disk(n) => format!("{:?}", layout.disks[usize::from(n)]),
                other => format!("{other:?}"),
            };
            writeln!(text, "  {name}: {:032x}", hash(&bytes)).unwrap();
        }
    }
    text
}

/// A guest that changes little, and little at random, so that what is kept of it is small.
struct Small {
    host: Host,
    epoch: u64,
}

impl Small {
    fn new() -> Self {
        let mut host = Host::new(4);
        host.keep = true;
        host.guest = Guest {
            layout: Layout { machine: "pc-q35-10.0".to_owned(), ..Layout::default() },
            ram: Vec::new(),
            disks: Vec::new(),
            ..host.guest
        };
        host.guest.add_block("pc.ram", 12);
        host.guest.add_block("vga.vram", 3);
        for (target, size) in [("vda", 30_000usize), ("sda", 9_000)] {
            host.guest.layout.disks.push(DiskLayout { target: target.to_owned(), size_bytes: size as u64 });
            host.guest.disks.push(vec![0; size]);
        }
        Self { host, epoch: 0 }
    }

    fn page(&mut self, encoder: &mut Encoder, block: usize, page: usize) {
        let random = &mut self.host.random;
        let at = page * PAGE_BYTES;
        let bytes: &mut [u8; PAGE_BYTES] = (&mut self.host.guest.ram[block][at..at + PAGE_BYTES]).try_into().unwrap();
        bytes.fill(random.next() as u8);
        bytes[..8].copy_from_slice(&random.next().to_le_bytes());
        encoder.ram_page(block as u16, page as u64, bytes);
    }

    fn extent(&mut self, encoder: &mut Encoder, disk: usize, offset: usize, length: usize) {
        let bytes = &mut self.host.guest.disks[disk][offset..offset + length];
        bytes.fill(self.host.random.next() as u8);
        encoder.disk_data(disk as u16, offset as u64, bytes);
    }

    /// The next epoch, in so many parts.
    fn next(&mut self, kind: Kind, parts: u32) -> Vec<Sent> {
        self.epoch += 1;
        let epoch = self.epoch;
        let mut sent = Vec::new();
        for part in 0..parts {
            let mut encoder = Encoder::new();
            let last = part + 1 == parts;
            if kind == Kind::Seed && part == 0 {
                encoder.layout(&self.host.guest.layout).unwrap();
                encoder.domain_xml(&self.host.guest.xml).unwrap();
                self.host.guest.send_all(&mut encoder);
            }
            match epoch % 8 {
                _ if !last || kind == Kind::Seed => {}
                2 => self.host.guest.add_block(&format!("hot{epoch}"), 2),
                3 => {
                    let newest = self.host.guest.ram.len() - 1;
                    self.host.guest.layout.ram[newest].used_bytes = PAGE_BYTES as u64;
                    self.host.guest.ram[newest].resize(PAGE_BYTES, 0);
                }
                5 => {
                    let grown = self.host.guest.disks[1].len() + 512;
                    self.host.guest.layout.disks[1].size_bytes = grown as u64;
                    self.host.guest.disks[1].resize(grown, 0);
                }
                7 => self.host.guest.xml = format!("<domain><!-- epoch {epoch} --></domain>"),
                _ => {}
            }
            if last {
                encoder.layout(&self.host.guest.layout).unwrap();
            }
            for n in 0..2 {
                self.page(&mut encoder, 0, (epoch as usize * 5 + n * 3 + part as usize) % 12);
            }
            self.extent(&mut encoder, 0, (epoch as usize * 1_700) % 28_000, 1_500);
            if epoch.is_multiple_of(4) {
                self.host.guest.ram[0][..2 * PAGE_BYTES].fill(0);
                encoder.ram_zero(0, 0, 2);
                self.host.guest.disks[1][1_000..6_000].fill(0);
                encoder.disk_zero(1, 1_000, 5_000);
            }
            if last {
                self.host.guest.device = vec![epoch as u8; 700 + epoch as usize];
                encoder.device_state(&self.host.guest.device).unwrap();
                if epoch % 8 == 7 {
                    encoder.domain_xml(&self.host.guest.xml).unwrap();
                }
                self.host.guest.cut = (1_000 + epoch) * SECOND_NS;
                self.host.past.insert(epoch, self.host.guest.clone());
            }
            let cut = if last { self.host.guest.cut } else { 0 };
            sent.push(seal(encoder, PartHead { generation: 1, epoch, part, kind }, last, cut));
        }
        sent
    }

    fn send(&mut self, ingest: &mut Ingest, kind: Kind, parts: u32) -> Result<(), StoreError> {
        self.next(kind, parts).iter().try_for_each(|part| part.send(ingest).map(|_| ()))
    }

    /// Every point is what the guest was.
    fn check(&self, store: &Store) {
        for point in store.points(UUID).unwrap() {
            let reader = store.read_point(UUID, Some(point.id())).unwrap();
            self.host.past[&point.epoch].assert_read(&reader, "a new fixture");
        }
    }

    /// A standby with a history, thinned out, and named points.
    fn live(&mut self, store: &Store, to: u64) -> Result<Ingest, StoreError> {
        let mut ingest = store.open_stream(UUID, "gast", 0)?;
        let domain = store.domain(UUID)?;
        store.set_retention(UUID, Some(policy()))?;
        self.send(&mut ingest, Kind::Seed, 2)?;
        while self.epoch < to {
            self.send(&mut ingest, Kind::Delta, 1 + u32::from(self.epoch.is_multiple_of(6)))?;
            if self.epoch.is_multiple_of(2) {
                domain.apply_all()?;
                domain.thin(false);
            }
            if self.epoch == 6 {
                store.pin(UUID, "before-upgrade", Some(PointId { generation: 1, epoch: 6 }))?;
            }
        }
        Ok(ingest)
    }
}

/// A standby that was seeded twice, histories of both, named points, durable epochs that are not applied, a part of one more.
fn history(dir: &Path) {
    let mut small = Small::new();
    let store = Store::open(dir, options()).unwrap();
    let mut ingest = small.live(&store, 30).unwrap();
    let domain = store.domain(UUID).unwrap();
    small.send(&mut ingest, Kind::Seed, 2).unwrap();
    for _ in 0..6 {
        small.send(&mut ingest, Kind::Delta, 1).unwrap();
        domain.apply_all().unwrap();
    }
    store.note_verified(UUID, PointId { generation: 1, epoch: 33 }, 1_800_000_000 * SECOND_NS).unwrap();
    store.pin(UUID, "second", Some(PointId { generation: 1, epoch: 34 })).unwrap();
    small.check(&store);
    small.send(&mut ingest, Kind::Delta, 2).unwrap();
    small.send(&mut ingest, Kind::Delta, 1).unwrap();
    small.next(Kind::Delta, 3)[0].send(&mut ingest).unwrap();
}

/// The machine died while a batch was being applied: its before-images are announced, the images are anything.
fn stopped(dir: &Path) {
    let mut in_the_images = 0;
    for after in 1.. {
        let disk = SimDisk::new();
        let mut small = Small::new();
        let store = Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options()).unwrap();
        let mut ingest = small.live(&store, 14).unwrap();
        for _ in 0..3 {
            small.send(&mut ingest, Kind::Delta, 1).unwrap();
        }
        disk.fail(after, Fault::Crash);
        store.domain(UUID).unwrap().batch().unwrap_err();
        drop((ingest, store));
        let disk = disk.crashed(&mut Random(after));
        disk.export(dir);
        let uuid = parse(UUID).unwrap();
        let control = vmdr_journal::Control::load(&FsDisk, &dir.join(UUID), uuid.as_bytes()).unwrap();
        let standby = control.standby.unwrap();
        let announced = standby.applying > standby.epoch && control.history.announced > control.history.committed;
        if announced {
            in_the_images += 1;
        }
        // Some writes to the images came through.
        if in_the_images == 3 {
            return;
        }
        std::fs::remove_dir_all(dir.join(UUID)).unwrap();
    }
}

/// A second seed is under way, and the machine died while the journal was written before it: its end is torn.
fn seeding(dir: &Path) {
    let disk = SimDisk::new();
    let mut small = Small::new();
    let store = Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options()).unwrap();
    let mut ingest = small.live(&store, 10).unwrap();
    store.domain(UUID).unwrap().apply_all().unwrap();
    let seed = small.next(Kind::Seed, 3);
    for part in &seed[..2] {
        part.send(&mut ingest).unwrap();
    }
    drop((ingest, store));
    disk.export(dir);
}

/// The machine died while a part was appended to the journal.
fn torn(dir: &Path) {
    let disk = SimDisk::new();
    let mut small = Small::new();
    let store = Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options()).unwrap();
    let mut ingest = small.live(&store, 11).unwrap();
    let part = small.next(Kind::Delta, 1);
    disk.fail(2, Fault::Crash);
    part[0].send(&mut ingest).unwrap_err();
    drop((ingest, store));
    for seed in 0.. {
        disk.crashed(&mut Random(seed)).export(dir);
        let store = Store::open(dir, options()).unwrap();
        let epoch = store.position(UUID).unwrap().epoch;
        drop(store);
        std::fs::remove_dir_all(dir.join(UUID)).unwrap();
        if epoch == 11 {
            disk.crashed(&mut Random(seed)).export(dir);
            return;
        }
    }
}

/// What makes a fixture in a directory.
type Make = fn(&Path);

const ALL: [(&str, Make); 4] = [("history", history), ("stopped", stopped), ("seeding", seeding), ("torn", torn)];

fn archive(dir: &Path, to: &Path) {
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--sparse", "-cJf"]).arg(to).arg("-C").arg(dir);
    assert!(tar.arg(UUID).status().unwrap().success());
}

#[test]
fn what_this_version_writes_is_what_its_fixtures_tell() {
    let written = std::env::var_os("VMDR_FIXTURES").map(|at| {
        // Tests run in the package's directory; what is given is meant from the repository's.
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(at)
    });
    for (name, make) in ALL {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let name = format!("{}-{name}", env!("CARGO_PKG_VERSION"));
        if let Some(to) = &written {
            std::fs::create_dir_all(to).unwrap();
            archive(dir.path(), &to.join(format!("{name}.tar.xz")));
        }
        let text = describe(&Store::open(dir.path(), options()).unwrap());
        if let Some(to) = &written {
            std::fs::write(to.join(format!("{name}.txt")), &text).unwrap();
        }
        let told = std::fs::read_to_string(fixtures().join(format!("{name}.txt"))).unwrap();
        assert!(text == told, "{name} is now\n{text}and was\n{told}");
    }
}

#[test]
fn what_earlier_versions_wrote_is_read_exactly_and_goes_on() {
    let mut names: Vec<_> = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "xz"));
    names.sort();
    assert!(names.len() >= ALL.len(), "{names:?}");
    let bytes: u64 = names.iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes < FIXTURES_BYTES_MAX, "{bytes} bytes");
    for path in names {
        let told = std::fs::read_to_string(path.with_extension("").with_extension("txt")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tar = Command::new("tar").arg("-xJf").arg(&path).arg("-C").arg(dir.path()).status().unwrap();
        assert!(tar.success());
        let context = path.display().to_string();
        for opened in 0..2 {
            let text = describe(&Store::open(dir.path(), options()).unwrap());
            assert!(text == told, "{context}, opened {opened} times before, is\n{text}and was\n{told}");
        }
        // It goes on: with another epoch on top, and with a seed, after which the older points are what they were.
        let store = Store::open(dir.path(), options()).unwrap();
        let before = describe(&store);
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        let epoch = ingest.position().epoch + 1;
        let mut host = Host::new(1);
        host.guest.clock = Some(1_100 * SECOND_NS);
        store.set_retention(UUID, None).unwrap();
        for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Seed) {
            part.send(&mut ingest).unwrap();
        }
        for part in host.guest.epoch(&mut host.random, 1, epoch + 1, Kind::Delta) {
            part.send(&mut ingest).unwrap();
        }
        drop(ingest);
        host.guest.assert_stored(&store, epoch + 1, &context);
        let after = describe(&store);
        let hashes =
            |text: &str| text.lines().filter(|line| line.starts_with("  ")).map(str::to_owned).collect::<Vec<_>>();
        let (before, after) = (hashes(&before), hashes(&after));
        assert!(after.len() > before.len() && after.ends_with(&before), "{context}: {after:#?}");
    }
}
