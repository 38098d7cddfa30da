//! A policy bundle of the test's own, with all that it refers to.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Pki, TokenIssuer, Upstream};

/// Certificates, an issuer's keys, an upstream at `/backend.sock`, and the policy that names them.
///
/// The policy is [`Bundle::BASE`] and what the test adds.
pub struct Bundle {
    folder: TempDir,
    /// The authority; `server.pem` is for localhost and 127.0.0.1.
    pub pki: Pki,
    /// Signs tokens that the policy accepts.
    pub issuer: TokenIssuer,
    /// Behind the gateway.
    pub upstream: Upstream,
}

impl Bundle {
    /// What every bundle here begins with.
    pub const BASE: &str = r#"version = 1

[[certificate]]
chain = "file:${state}/certs/server.pem"
key = "file:${state}/certs/server.key"

[[issuer]]
name = "tests"
issuer = "https://issuer.test"
audience = ["sealgate"]
algorithms = ["ES256"]
jwks = "file:${state}/jwks.json"

[[upstream]]
name = "backend"
endpoints = ["unix:${state}/backend.sock"]
"#;

    /// A bundle whose policy is [`Bundle::BASE`] and `rules`.
    pub fn new(rules: &str) -> Bundle {
        let folder = tempfile::Builder::new().prefix("sealgate-").tempdir().expect("a folder");
        let state = folder.path().join("state");
        fs::create_dir_all(folder.path().join("policy")).expect("a policy folder");
        fs::create_dir_all(&state).expect("a state folder");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&state, private).expect("the state is private");
        let pki = Pki::new(&state.join("certs"));
        pki.issue("server", &["localhost", "127.0.0.1"]);
        let issuer = TokenIssuer::new("key-1");
        fs::write(state.join("jwks.json"), issuer.jwks().to_string()).expect("a key set");
        let upstream = Upstream::unix(&state.join("backend.sock"));
        let bundle = Bundle { folder, pki, issuer, upstream };
        bundle.write(rules);
        bundle
    }

    /// A bundle that is shipped, as it is but for the issuer, which is [`Bundle::issuer`].
    pub fn shipped(name: &str) -> Bundle {
        let bundle = Bundle::new("");
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/bundles").join(name);
        for folder in ["", "schemas"] {
            for entry in fs::read_dir(shipped.join(folder)).expect("a folder of the bundle") {
                let path = entry.expect("a file of the bundle").path();
                if path.is_dir() {
                    continue;
                }
                let text = fs::read_to_string(&path).expect("a file of the bundle");
                let text = text.replace("https://identity.sealgate.test", "https://issuer.test");
                let name =
                    path.strip_prefix(&shipped).expect("it is in there").to_str().expect("UTF-8").to_owned();
                bundle.write_file(&name, &text);
            }
        }
        bundle
    }

    /// Replaces the policy by [`Bundle::BASE`] and `rules`, in one rename as editors do.
    pub fn write(&self, rules: &str) {
        self.write_file("policy.toml", &format!("{}{rules}", Bundle::BASE));
    }

    /// Replaces a file of the bundle, in one rename.
    pub fn write_file(&self, name: &str, text: &str) {
        let path = self.policy().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        // Outside the bundle until it is whole: a half-written name must not be seen as part of it.
        let fresh = self.folder.path().join("fresh");
        fs::write(&fresh, text).expect("a file");
        fs::rename(&fresh, path).expect("a rename");
    }

    /// The bundle's folder.
    pub fn policy(&self) -> PathBuf {
        self.folder.path().join("policy")
    }

    /// The state folder, `${state}`.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The folder around both.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}
