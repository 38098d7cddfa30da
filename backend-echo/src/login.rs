//! The development login: tokens for demo users, without a password. Real accounts are another matter.

use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixStream;

use crate::problem::Problem;
use crate::server::Backend;
use crate::tokens::{Grant, random_id};
use crate::wire::{DeviceAddress, Name};

/// Who may log in, and as what.
struct DemoUser {
    name: &'static str,
    roles: &'static [&'static str],
    department: &'static str,
}

const DEMO_USERS: &[DemoUser] = &[
    DemoUser { name: "alice", roles: &["user"], department: "engineering" },
    DemoUser { name: "bob", roles: &["user"], department: "sales" },
    DemoUser { name: "carol", roles: &["auditor"], department: "audit" },
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    user: String,
    device: Name,
    /// Seconds; the backend's default if absent, and never more than that.
    lifetime: Option<u32>,
}

/// The members of RFC 6749 §5.1.
#[derive(Serialize, Deserialize)]
pub(crate) struct Granted {
    pub(crate) access_token: String,
    pub(crate) token_type: String,
    pub(crate) expires_in: u64,
}

/// Opens a session for one device of a demo user, and signs its token.
pub(crate) async fn login(backend: &Backend, wanted: Login, now: u64) -> Result<Granted, Problem> {
    let known = DEMO_USERS.iter().find(|known| known.name == wanted.user);
    let Some(known) = known else {
        return Err(Problem::forbidden(
            "unknown-user",
            "the development login knows demo users only: alice, bob, carol",
        ));
    };
    let limit = backend.tokens.lifetime();
    let lifetime = match wanted.lifetime.map(u64::from) {
        None => limit,
        Some(seconds) if (1..=limit).contains(&seconds) => seconds,
        Some(_) => return Err(Problem::shape(format!("lifetime is 1 to {limit} seconds"))),
    };

    let user: Name = known.name.parse().map_err(|error| Problem::internal(&error))?;
    let session = random_id().map_err(|error| Problem::internal(&error))?;
    let grant = Grant {
        user: &user,
        session: &session,
        roles: known.roles,
        department: known.department,
        // Honest: nothing was proved.
        methods: &["dev"],
        strength: "aal1",
        lifetime,
    };
    let access_token = backend.tokens.sign(&grant, now).map_err(|error| Problem::internal(&error))?;
    let device = DeviceAddress { user: user.clone(), device: wanted.device };
    let opened = backend.store.open_session(&session, &device, now, now.saturating_add(lifetime)).await;
    opened.map_err(|error| Problem::internal(&error))?;
    Ok(Granted { access_token, token_type: "Bearer".to_owned(), expires_in: lifetime })
}

/// A token for a demo user, from the backend that serves on the unix socket `socket`. For `sealgate dev`, which prints
/// it for people to try.
///
/// # Errors
/// If the backend cannot be reached, or refuses: unknown user, or no development login.
pub async fn demo_token(socket: &Path, user: &str, device: &str) -> anyhow::Result<String> {
    let stream = UnixStream::connect(socket).await;
    let stream = stream.with_context(|| format!("cannot reach the backend at {}", socket.display()))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::post("/v1/dev/login")
        .header(header::HOST, "backend")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(json!({ "user": user, "device": device }).to_string())))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    if !status.is_success() {
        bail!("the backend refused the login: {}", String::from_utf8_lossy(&body));
    }
    let granted: Granted = serde_json::from_slice(&body)?;
    Ok(granted.access_token)
}
