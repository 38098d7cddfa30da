//! What the operator says on the command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Where and how the backend serves; used by the binary `backend-echo` and by `sealgate dev`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where the gateway reaches this backend: `unix:PATH` (socket of mode 0600) or `tls:ADDRESS:PORT`
    /// (mutual TLS). May be repeated [default: unix:STATE/backend.sock]
    #[arg(long = "listen", value_name = "unix:PATH|tls:ADDR")]
    pub listen: Vec<Listen>,

    /// Folder for the database, the signing key and `jwks.json`; made with mode 0700 if absent
    #[arg(long, value_name = "DIR", default_value = ".sealgate")]
    pub state: PathBuf,

    /// Certificate chain for `tls:` listeners (PEM)
    #[arg(long, value_name = "FILE")]
    pub cert: Option<PathBuf>,

    /// Private key for `tls:` listeners (PEM)
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,

    /// Authority that the gateway's client certificate must come from (PEM)
    #[arg(long, value_name = "FILE")]
    pub client_ca: Option<PathBuf>,

    /// DNS name that the gateway's client certificate must bear
    #[arg(long, value_name = "NAME")]
    pub client_name: Option<String>,

    /// Offer `POST /v1/dev/login`, which hands tokens to demo users without a password
    #[arg(long)]
    pub development: bool,

    /// The `iss` of tokens
    #[arg(long, value_name = "URL", default_value = "https://identity.sealgate.test")]
    pub issuer: String,

    /// The `aud` of tokens
    #[arg(long, value_name = "NAME", default_value = "sealgate")]
    pub audience: String,

    /// Longest and default life of a token, in seconds (1 to 86,400)
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub token_lifetime: u32,

    /// How long a stop waits for open connections, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub drain: u32,
}

impl Options {
    /// What `sealgate dev` runs: one unix socket in `state`, with the development login.
    pub fn development(state: &Path) -> Self {
        Self {
            listen: Vec::new(),
            state: state.to_owned(),
            cert: None,
            key: None,
            client_ca: None,
            client_name: None,
            development: true,
            issuer: "https://identity.sealgate.test".to_owned(),
            audience: "sealgate".to_owned(),
            token_lifetime: 3600,
            drain: 5,
        }
    }

    /// The listeners asked for, or the default one.
    pub fn listeners(&self) -> Vec<Listen> {
        if self.listen.is_empty() { vec![Listen::Unix(self.socket())] } else { self.listen.clone() }
    }

    /// The default unix socket, `STATE/backend.sock`.
    pub fn socket(&self) -> PathBuf {
        self.state.join("backend.sock")
    }

    pub(crate) fn drain_time(&self) -> Duration {
        Duration::from_secs(self.drain.into())
    }
}

/// A place that only the gateway can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A unix socket; the file's mode (0600) decides who may connect.
    Unix(PathBuf),
    /// TCP with mutual TLS; the client certificate's name decides who may connect.
    Tls(SocketAddr),
}

/// Why a listener was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ListenError {
    /// Anyone who reaches plain TCP could claim any identity.
    #[error(
        "`{0}` would be plain TCP, where anyone could claim to be the gateway; use unix:PATH, or tls:ADDRESS:PORT with \
         --cert, --key, --client-ca and --client-name"
    )]
    PlainTcp(String),
    /// After `tls:` there must be an IP address and a port.
    #[error("`{0}` is not an IP address with a port, such as 127.0.0.1:9443")]
    Address(String),
    /// After `unix:` there must be a path.
    #[error("unix: needs a path")]
    NoPath,
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        match text.split_once(':') {
            Some(("unix", "")) => Err(ListenError::NoPath),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tls", address)) => match address.parse() {
                Ok(address) => Ok(Self::Tls(address)),
                Err(_) => Err(ListenError::Address(address.to_owned())),
            },
            _ => Err(ListenError::PlainTcp(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_mutual_tls_are_taken() {
        assert_eq!("unix:/run/b.sock".parse(), Ok(Listen::Unix("/run/b.sock".into())));
        assert_eq!("tls:[::1]:9443".parse(), Ok(Listen::Tls("[::1]:9443".parse().unwrap())));
    }

    #[test]
    fn plain_tcp_is_refused_however_it_is_written() {
        for text in ["127.0.0.1:9000", "tcp:127.0.0.1:9000", "http:127.0.0.1:9000", "9000", ""] {
            assert!(matches!(text.parse::<Listen>(), Err(ListenError::PlainTcp(_))), "{text}");
        }
        assert!(matches!("tls:localhost".parse::<Listen>(), Err(ListenError::Address(_))));
        assert_eq!("unix:".parse::<Listen>(), Err(ListenError::NoPath));
    }
}
