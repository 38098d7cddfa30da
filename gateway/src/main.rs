//! `sealgate`, the program: see [`sealgate::cli`].

fn main() -> std::process::ExitCode {
    sealgate::cli::main()
}
