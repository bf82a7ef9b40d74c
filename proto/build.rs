//! Generates the message types and services from `proto/*.proto`.
fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(
        &["proto/replication.proto", "proto/control.proto", "proto/host.proto", "proto/shim.proto"],
        &["proto"],
    )
}
