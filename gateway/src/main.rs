//! sealgate.
fn main() {}
