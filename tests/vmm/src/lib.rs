//! A VMM of one vCPU, for tests of the dirty logs: a guest without an operating system that writes memory at random, and the
//! model that says what it must have written.

pub mod guest;
pub mod memory;
pub mod program;
