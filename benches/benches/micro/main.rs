//! Micro benchmarks of what sealgate does per request, per message and per frame, without sockets.
//!
//! `cargo bench -p sealgate-benches`; `-- message` runs the groups whose names hold `message`. All judge by
//! the policy that the comparison uses, `benches/policy/`.

mod access;
mod clock;
mod fixture;
mod frames;
mod handshake;
mod keys;
mod lists;
mod message;
mod permit;
mod rates;
mod session;
mod token;

use criterion::Criterion;

use crate::fixture::Fixture;

fn main() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let mut criterion = Criterion::default().configure_from_args();
    permit::measure(&mut criterion, &fixture)?;
    message::measure(&mut criterion, &fixture)?;
    access::measure(&mut criterion)?;
    token::measure(&mut criterion, &fixture)?;
    session::measure(&mut criterion, &fixture)?;
    rates::measure(&mut criterion, &fixture)?;
    clock::measure(&mut criterion, &fixture)?;
    frames::measure(&mut criterion)?;
    handshake::measure(&mut criterion)?;
    lists::measure(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
