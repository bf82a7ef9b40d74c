//! Wrong input: each gets one clear line, a non-zero exit, and a guest that nothing happened to.

use anyhow::{Context, Result};
use std::fs;
use std::net::Ipv4Addr;
use std::process::Output;
use vmdr_tests::daemon::{self, Daemon, Program, vmdr_output};
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::{At, PORT};
use vmdr_tests::scene::{ANSWER, Scene};

/// How long a refusal may take.
const REFUSE_SECONDS_MAX: u64 = 90;

/// Everything of a guest that a refused command must leave alone.
fn fingerprint(scene: &Scene, guest: &str) -> Result<Vec<String>> {
    let site = scene.rig.site(At::A);
    let mut prints = vec![site.virsh(&["dumpxml", guest])?, site.virsh(&["dumpxml", "--inactive", guest])?];
    prints.push(site.virsh(&["domstate", guest])?);
    if prints[2].trim() == "running" {
        prints.push(site.virsh(&["qemu-monitor-command", guest, "--hmp", "info block-jobs"])?);
    }
    Ok(prints)
}

/// Runs a command that must be refused, with one line on stderr that has all of `says`, and this exit code.
fn refused(scene: &Scene, at: At, words: &[&str], code: i32, says: &[&str]) -> Result<()> {
    let output: Output = vmdr_output(scene.rig.site(at), REFUSE_SECONDS_MAX, words)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let command = format!("vmdr {}: exit {:?}, stderr {err:?}, stdout {out:?}", words.join(" "), output.status.code());
    assert_eq!(output.status.code(), Some(code), "{command}");
    assert_eq!(err.lines().count(), 1, "one line: {command}");
    for part in says {
        assert!(err.contains(part), "it says {part:?}: {command}");
    }
    assert!(!err.contains("panicked") && !err.contains("    "), "{command}");
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line_and_leaves_the_guest_alone() -> Result<()> {
    let mut scene = Scene::new("refusals", GuestSpec::linux("web1").workload("--ram-mib 16"))?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    let off = GuestSpec::linux("web2").address(Ipv4Addr::new(10, 78, 0, 11));
    off.define(scene.rig.site(At::A))?;
    let before = (fingerprint(&scene, "web1")?, fingerprint(&scene, "web2")?);

    refused(&scene, At::A, &["protect", "nosuch"], 4, &["nosuch"])?;
    refused(&scene, At::A, &["unprotect", "web1"], 4, &["web1"])?;
    refused(&scene, At::A, &["doctor", "nosuch"], 4, &["nosuch"])?;
    refused(&scene, At::A, &["protect", "web2"], 1, &["web2", "shut off", "virsh start"])?;
    for interval in ["5ms", "61s", "x", "100.5ms"] {
        refused(&scene, At::A, &["protect", "web1", "--interval", interval], 2, &["interval"])?;
    }
    let nobody = format!("{}:{}", At::B.address(), PORT + 1);
    refused(&scene, At::A, &["protect", "web1", "--receiver", &nobody], 1, &[&nobody])?;
    refused(&scene, At::A, &["protect", "web1", "--receiver", "10.77.0.2:x"], 2, &["port"])?;
    refused(&scene, At::B, &["activate", "web1", "--yes"], 4, &["web1"])?;
    refused(&scene, At::B, &["points", "web1"], 4, &["web1"])?;
    refused(&scene, At::B, &["activate", "web1"], 2, &["--yes"])?;

    // A receiver that is full, and one that is down.
    scene.configure_receiver("space_reserve_bytes = 1000000000000000\n");
    scene.start_receiver()?;
    refused(&scene, At::A, &["protect", "web1"], 1, &["space"])?;
    scene.receiver.as_mut().context("a receiver")?.kill()?;
    refused(&scene, At::A, &["protect", "web1"], 1, &[&At::B.receiver()])?;

    // A lock manager, which libvirt's configuration names.
    let conf = scene.rig.site(At::A).path("/etc/libvirt/qemu.conf");
    let text = fs::read_to_string(&conf)?;
    fs::write(&conf, format!("{text}lock_manager = \"lockd\"\n"))?;
    refused(&scene, At::A, &["protect", "web1"], 1, &["lock"])?;
    fs::write(&conf, text)?;

    let after = (fingerprint(&scene, "web1")?, fingerprint(&scene, "web2")?);
    assert!(after == before, "nothing happened to the guests");
    let tick = client.ping(address, ANSWER)?.tick;
    client.wait_tick(address, tick + 10, ANSWER)?;
    client.self_check(address)?;
    scene.rig.finish()
}

#[test]
fn devices_that_write_memory_unseen_are_refused_by_name() -> Result<()> {
    let scene = Scene::new("refused-devices", GuestSpec::linux("web1").workload("--ram-mib 16"))?;
    let site = scene.rig.site(At::A);
    let shmem = "<shmem name='vmdr-test'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>";
    let guest = GuestSpec::linux("shm1").memory(96).address(Ipv4Addr::new(10, 78, 0, 20)).extra(shmem, "");
    guest.start(site)?;
    let before = fingerprint(&scene, "shm1")?;
    refused(&scene, At::A, &["protect", "shm1"], 1, &["shm1", "shmem"])?;
    assert!(fingerprint(&scene, "shm1")? == before, "nothing happened to shm1");

    // These start only where the device, or its backend, is: doctor checks their definitions in the same way.
    let shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let vhost_user = "<interface type='vhostuser'><mac address='52:54:00:00:00:77'/>\
                      <source type='unix' path='/var/lib/libvirt/qemu/user.sock' mode='server'/><model type='virtio'/></interface>";
    let pci = "<hostdev mode='subsystem' type='pci' managed='yes'><source>\
               <address domain='0x0000' bus='0x7f' slot='0x1f' function='0x7'/></source></hostdev>";
    let files = "<filesystem type='mount' accessmode='passthrough'><driver type='virtiofs'/><source dir='/srv'/>\
                 <target dir='srv'/></filesystem>";
    let room = "<maxMemory slots='2' unit='MiB'>1024</maxMemory><cpu><numa>\
                <cell id='0' cpus='0' memory='192' unit='MiB'/></numa></cpu>";
    let virtio_mem = "<memory model='virtio-mem'><target><size unit='MiB'>128</size><node>0</node>\
                      <block unit='MiB'>2</block><requested unit='MiB'>64</requested></target></memory>";
    let nvdimm = "<memory model='nvdimm'><source><path>/var/tmp/nvdimm</path></source>\
                  <target><size unit='MiB'>128</size><node>0</node></target></memory>";
    for (name, devices, elements, says) in [
        ("user1", vhost_user, shared, "vhostuser"),
        ("host1", pci, "", "hostdev"),
        ("files1", files, shared, "filesystem"),
        ("balloon1", "", shared, "a balloon in shared memfd"),
        ("mem1", virtio_mem, room, "virtio-mem"),
        ("nvdimm1", nvdimm, room, "nvdimm"),
    ] {
        GuestSpec::linux(name).extra(devices, elements).define(site).with_context(|| format!("define {name}"))?;
        let doctor = vmdr_output(site, REFUSE_SECONDS_MAX, &["doctor", name])?;
        let table = String::from_utf8_lossy(&doctor.stdout).into_owned();
        let named = table.lines().any(|line| line.starts_with("refused") && line.contains(says));
        assert!(doctor.status.code() == Some(1) && named, "{table}");
    }
    scene.rig.finish()
}

#[test]
fn a_second_protect_is_refused_and_the_first_goes_on() -> Result<()> {
    let scene = Scene::new("refused-twice", GuestSpec::linux("web1").workload("--ram-mib 16"))?;
    scene.protect(&[])?;
    refused(&scene, At::A, &["protect", "web1"], 5, &["web1"])?;
    scene.wait_durable()?;
    // Unprotecting ends it and leaves the guest running, with what is stored untouched.
    daemon::vmdr(scene.rig.site(At::A), &["unprotect", "web1"])?;
    let (client, address) = (scene.rig.client(), scene.guest.address);
    let tick = client.ping(address, ANSWER)?.tick;
    client.wait_tick(address, tick + 10, ANSWER)?;
    let jobs = scene.rig.site(At::A).virsh(&["qemu-monitor-command", "web1", r#"{"execute":"query-block-jobs"}"#])?;
    assert!(jobs.contains("\"return\":[]"), "no mirror is left: {jobs}");
    let points = daemon::vmdr_json(scene.rig.site(At::B), &["points", "web1"])?;
    let of_one = |point: &serde_json::Value| point["generation"] == points["points"][0]["generation"];
    assert!(points["points"].as_array().is_some_and(|all| !all.is_empty() && all.iter().all(of_one)), "{points}");
    client.self_check(address)?;
    scene.rig.finish()
}

#[test]
fn a_configuration_that_cannot_be_read_is_refused_with_its_place() -> Result<()> {
    let rig = vmdr_tests::rig::Rig::new("refused-config")?;
    for (program, at) in [(Program::Agent, At::A), (Program::Receiver, At::B)] {
        for (config, says) in [
            ("x = [\n", &["line 1,", ":1:"][..]),
            ("\nnosuch_key = 1\n", &["nosuch_key"]),
            ("control_socket = 5\n", &["line 1,", ":1:"]),
        ] {
            let error = Daemon::start(rig.site(at), program, config).err().context("it must not start")?;
            let log = daemon::log(rig.site(at), program);
            let last = log.lines().last().unwrap_or_default();
            let file = if program == Program::Agent { "agent.toml" } else { "receiver.toml" };
            let place = says.iter().any(|place| log.contains(place));
            assert!(log.contains(file) && place && !log.contains("panicked"), "{log:?} ({error:#})");
            assert!(!last.is_empty());
            fs::remove_file(daemon::log_path(rig.site(at), program))?;
        }
    }
    rig.finish()
}
