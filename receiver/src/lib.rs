//! The receiver: journal, standby, activation.

pub mod activate;
pub mod store;
pub mod config;
pub mod metrics;
