//! `sealgate`, the program: see [`sealgate::cli`].

/// A request takes and frees some dozens of small pieces; this allocator is made for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    sealgate::cli::main()
}
