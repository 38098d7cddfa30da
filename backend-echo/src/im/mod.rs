//! The client.
/// Arguments.
#[derive(Debug, clap::Args)]
pub struct ImArgs {}
/// Runs.
pub async fn im(_args: ImArgs) -> anyhow::Result<()> {
    Ok(())
}
