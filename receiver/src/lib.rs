//! The receiver: journal, standby, activation.

pub mod activate;
