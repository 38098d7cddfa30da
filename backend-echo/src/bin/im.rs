//! `im`: a command-line client for end-to-end encrypted messages. See `backend_echo::im`.

use std::process::ExitCode;

use backend_echo::ImArgs;
use clap::Parser;

/// Send and receive end-to-end encrypted messages through the gateway.
#[derive(Parser)]
#[command(name = "im", version)]
struct Arguments {
    #[command(flatten)]
    args: ImArgs,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Arguments { args } = Arguments::parse();
    match backend_echo::im(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "im: {error:#}");
            ExitCode::FAILURE
        }
    }
}
