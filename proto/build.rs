//! Generates the message types and services from `proto/*.proto`.

/// Messages that are also kept in files, as JSON: fields that a file lacks are empty.
const KEPT: [&str; 9] =
    ["ActivationReport", "Change", "DrillCheck", "GivenUp", "GroupMember", "GroupReport", "HookRun", "Mapped", "Point"];

fn main() -> std::io::Result<()> {
    let kept = "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]";
    let configured = KEPT.into_iter().fold(tonic_prost_build::configure(), |configured, message| {
        configured.type_attribute(format!(".vmdr.control.v1.{message}"), kept)
    });
    configured.compile_protos(
        &["proto/replication.proto", "proto/control.proto", "proto/host.proto", "proto/shim.proto"],
        &["proto"],
    )
}
