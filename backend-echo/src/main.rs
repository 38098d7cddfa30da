//! backend-echo.
fn main() {}
