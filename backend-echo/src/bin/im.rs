//! im.
fn main() {}
