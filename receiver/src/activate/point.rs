//! temporary
use std::path::PathBuf;
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct RamBlock { pub name: String, pub used_bytes: u64, pub page_bytes: u32, pub path: PathBuf }
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct DiskImage { pub target: String, pub size_bytes: u64, pub path: PathBuf }
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryPoint { pub generation: u64, pub epoch: u64, pub cut_unix_ns: u64, pub ram: Vec<RamBlock>, pub device_state: PathBuf, pub disks: Vec<DiskImage>, pub domain_xml: String, pub machine: String, pub dir: PathBuf }
