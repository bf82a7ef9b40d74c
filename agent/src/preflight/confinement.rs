//! AppArmor and SELinux: libvirt has them confine QEMU to what its definition of the domain names.
//!
//! vmdr's sockets and its tracing are not among that. Under AppArmor they need a few rules more, which libvirt's own
//! profiles read from [`LOCAL_RULES`] when a domain starts; without them a prepared domain would not start again, so that
//! both `prepare` and `protect` ask for them first. For SELinux there is only a warning: it is not tried.

use std::path::Path;

use vmdr_hypervisor::domain_xml::QMP_SOCKET_DIRECTORY;
use vmdr_hypervisor::xml::Element;

use super::Finding;

/// The file of the administrator's own that every libvirt profile includes.
pub const LOCAL_RULES: &str = "/etc/apparmor.d/local/abstractions/libvirt-qemu";

/// The rules: the domain's QMP socket, the NBD server's socket, being traced by vmdr.
pub fn rules() -> [String; 3] {
    [
        format!("owner {QMP_SOCKET_DIRECTORY}/vmdr-*.qmp rw,"),
        "/run/vmdr/** rw,".to_owned(),
        "ptrace (readby, tracedby) peer=unconfined,".to_owned(),
    ]
}

/// Whether all of them are there.
pub fn rules_present(file: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(file) else { return false };
    rules().iter().all(|rule| text.lines().any(|line| line.trim() == rule))
}

/// How to add them.
pub fn remedy() -> String {
    format!("add these lines to {LOCAL_RULES}: {}", rules().join(" "))
}

/// The security drivers by which libvirt confines domains here, from its capabilities.
pub fn drivers(capabilities: &Element) -> Vec<String> {
    let models = capabilities.find_all("host/secmodel/model").into_iter().map(Element::text);
    models.filter(|m| m != "dac" && m != "none").collect()
}

/// What follows for a domain confined by these drivers.
pub fn findings(confined_by: &[String], apparmor_rules: bool) -> Vec<Finding> {
    let one = |driver: &String| match (driver.as_str(), apparmor_rules) {
        ("apparmor", true) => Finding::ok("confinement", format!("apparmor, with vmdr's rules in {LOCAL_RULES}")),
        ("apparmor", false) => Finding::refused(
            "confinement",
            "AppArmor keeps QEMU from vmdr's sockets, and vmdr from QEMU's memory",
            format!("{}; then shut the guest down and start it", remedy()),
        ),
        (other, _) => Finding::warning(
            "confinement",
            format!("{other} confines QEMU to what libvirt knows of, and vmdr has not been tried under it"),
            format!(
                "allow QEMU {QMP_SOCKET_DIRECTORY}/vmdr-*.qmp and the sockets in /run/vmdr, and vmdr to trace QEMU"
            ),
        ),
    };
    confined_by.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn rules_are_looked_for_one_by_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("libvirt-qemu");
        assert!(!rules_present(&file));
        std::fs::write(&file, format!("# mine\n  {}\n{}\n", rules()[0], rules()[1])).unwrap();
        assert!(!rules_present(&file));
        std::fs::write(&file, format!("# {0}\n{1}\n{2}", rules()[0], rules()[1], rules()[2])).unwrap();
        assert!(!rules_present(&file));
        std::fs::write(&file, rules().join("\n")).unwrap();
        assert!(rules_present(&file));
    }

    #[test]
    fn the_document_has_the_rules() {
        let document = include_str!("../../../docs/confinement.md");
        assert!(rules().iter().all(|rule| document.lines().any(|line| line == rule)));
        assert!(document.contains(LOCAL_RULES));
    }

    #[test]
    fn drivers_and_what_follows() {
        let capabilities = "<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
                            <secmodel><model>dac</model></secmodel></host></capabilities>";
        let drivers = drivers(&Element::parse(capabilities).unwrap());
        assert_eq!(drivers, ["apparmor"]);
        assert_eq!(findings(&drivers, true)[0].severity, Severity::Ok);
        let refused = &findings(&drivers, false)[0];
        assert_eq!(refused.severity, Severity::Refused);
        assert!(rules().iter().all(|r| refused.remedy.contains(r)), "{refused}");
        assert_eq!(findings(&["selinux".into()], true)[0].severity, Severity::Warning);
        assert!(findings(&[], false).is_empty());
    }
}
