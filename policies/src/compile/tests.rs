//! Every kind of error, with its place; and what the shipped bundles compile to.

use super::*;
use crate::policy::{AcmeChallenge, CertificateOrigin, OnLoss, SharedMode, SharedServer};
use crate::verdict::run_tests;

fn state() -> BTreeMap<String, String> {
    [("state".to_owned(), "/state".to_owned())].into()
}

fn with_overlay() -> Bundle {
    let mut bundle = Bundle::shipped("enterprise").unwrap();
    bundle.files.extend(Bundle::shipped("development").unwrap().files);
    bundle
}

fn bundle(files: &[(&str, &str)]) -> Bundle {
    let files = files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_owned()));
    Bundle { root: "/bundle".into(), files: files.collect() }
}

#[test]
fn every_shipped_bundle_loads_and_its_verdicts_hold() {
    let shipped = ["enterprise", "consumer", "regulated"].map(|name| (name, Bundle::shipped(name).unwrap()));
    for (name, bundle) in shipped.into_iter().chain([("development", with_overlay())]) {
        let policy = Policy::compile(&bundle, &state()).unwrap_or_else(|errors| panic!("{name}:\n{errors}"));
        let outcomes = run_tests(&policy, &bundle);
        let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed()).collect();
        assert!(failed.is_empty(), "{name}: {failed:#?}");
        // Every rule has a verdict of its own, allowed and refused.
        let tests: String = bundle
            .files
            .iter()
            .filter(|(file, _)| file.starts_with("tests/"))
            .map(|(_, bytes)| String::from_utf8_lossy(bytes))
            .collect();
        for rule in policy.route_names().filter(|rule| &***rule != "dev-whoami") {
            assert!(tests.contains(&format!("allow = \"{rule}\"")), "{name}: no test allows `{rule}`");
        }
    }
}

#[test]
fn shipped_bundles_differ_where_they_must_and_nowhere_by_accident() {
    let compile = |name| Policy::compile(&Bundle::shipped(name).unwrap(), &state()).unwrap();
    let [enterprise, consumer, regulated] = ["enterprise", "consumer", "regulated"].map(compile);
    assert_eq!(enterprise.session.idle, MINUTE * 15);
    assert!(regulated.session.idle < MINUTE * 15);
    assert_eq!(regulated.tls.versions, TlsVersions::Tls13);
    assert_eq!(regulated.audit.requests, AuditRequests::All);
    assert_eq!(consumer.tls.hsts.as_deref(), Some("max-age=63072000; includeSubDomains; preload"));
    assert_ne!(enterprise.hash, consumer.hash);
    let names = |policy: &Policy| policy.route_names().cloned().collect::<Vec<_>>();
    assert_eq!(names(&enterprise), names(&regulated));
    for policy in [&enterprise, &consumer, &regulated] {
        // A health check must not fail when others do, or the machine is taken away when it is needed most.
        assert!(policy.overload.max_in_flight.is_some() && policy.overload.max_memory.is_some());
        assert!(policy.rules.iter().all(|rule| rule.exempt == (&*rule.name == "health")));
        // What holds bodies, or makes the backend search, is limited by person.
        let limited =
            |name: &str| policy.rules.iter().any(|rule| *rule.name == *name && !rule.concurrency.is_empty());
        assert!(["keys-upload", "messages-send", "history"].into_iter().all(limited));
    }
    // No departments, and nothing that is administered or audited from the open internet.
    let mut of_everybody = names(&enterprise);
    of_everybody.retain(|name| {
        !["members", "rooms", "configuration", "accounts", "sessions", "audit"]
            .iter()
            .any(|it| name.starts_with(it))
    });
    assert_eq!(of_everybody, names(&consumer));
    // They front one message API, so its schemas are one.
    let schemas = |name| {
        let mut files = Bundle::shipped(name).unwrap().files;
        files.retain(|file, _| file.starts_with("schemas/"));
        files
    };
    let mut of_everybody = schemas("enterprise");
    of_everybody.retain(|file, _| !file.ends_with("/account.json") && !file.ends_with("/configuration.json"));
    assert_eq!(of_everybody, schemas("consumer"));
    assert_eq!(schemas("enterprise"), schemas("regulated"));
}

#[test]
fn variables_reach_every_string() {
    let mut given = state();
    given.insert("backend".into(), "tls:im.internal:8443".into());
    let policy = Policy::compile(&Bundle::shipped("enterprise").unwrap(), &given).unwrap();
    assert_eq!(policy.upstreams[0].endpoints, [Endpoint::Tcp { host: "im.internal".into(), port: 8443 }]);
    assert_eq!(policy.upstreams[0].tls.as_ref().unwrap().server_name, "im.internal");
    assert_eq!(policy.issuers[0].jwks, JwksSource::File("/state/jwks.json".into()));
    let CertificateOrigin::Given { key, .. } = &policy.certificates[0].origin else { panic!() };
    assert_eq!(*key, Source::File("/state/certs/server.key".into()));
    let plain = Policy::compile(&Bundle::shipped("enterprise").unwrap(), &state()).unwrap();
    assert_eq!(plain.upstreams[0].endpoints, [Endpoint::Unix("/state/backend.sock".into())]);
    assert_ne!(plain.hash(), policy.hash());
    assert_eq!(plain.hash().len(), 64);
}

/// What is left out has the documented default.
#[test]
fn the_smallest_policy() {
    let bundle = bundle(&[("policy.toml", "version = 1")]);
    let policy = Policy::compile(&bundle, &BTreeMap::new()).unwrap();
    assert_eq!(policy.tls.versions, TlsVersions::Tls12And13);
    assert_eq!(policy.tls.groups, [Group::X25519MlKem768, Group::X25519, Group::Secp256r1, Group::Secp384r1]);
    assert_eq!(policy.tls.hsts, None);
    assert!(policy.tls.tickets && policy.connections.http2);
    assert_eq!(policy.connections.max_total, 20_000);
    assert_eq!(policy.connections.handshake_timeout, SECOND * 5);
    assert_eq!(policy.session.lifetime, HOUR * 12);
    assert_eq!(policy.audit.requests, AuditRequests::Refused);
    assert_eq!(policy.route_names().count(), 0);
}

#[test]
fn sessions_at_the_same_time() {
    let head = "version = 1\n[session]\nidle = \"1s\"\n";
    let limits = "[[session.limit]]\nmax = 5\n[[session.limit]]\nrole = \"nurse\"\nmax = 2\nat_limit = \"replace-oldest\"\n";
    let policy =
        Policy::compile(&bundle(&[("policy.toml", &format!("{head}{limits}"))]), &BTreeMap::new()).unwrap();
    let limit_of = |roles: &[&str], session: Option<&str>| {
        let identity = crate::Identity::new(crate::IdentityParts {
            session: session.map(str::to_owned),
            roles: roles.iter().map(|role| (*role).to_owned()).collect(),
            ..crate::IdentityParts::default()
        });
        policy.session.limit_of(&identity).map(|limit| (limit.max, limit.at_limit))
    };
    assert_eq!(limit_of(&["user"], Some("s")), Some((5, crate::AtLimit::Reject)));
    assert_eq!(
        limit_of(&["user", "nurse"], Some("s")),
        Some((2, crate::AtLimit::ReplaceOldest)),
        "the smallest"
    );
    assert_eq!(limit_of(&["nurse"], None), None, "each token is a session of its own");
    assert_eq!(policy.session.max_sessions, 1_000_000);
    let twice = format!("{head}{limits}[[session.limit]]\nrole = \"nurse\"\nmax = 3\n");
    let message = "a second limit for `nurse`";
    assert_errors(&[("policy.toml", &twice)], &[("policy.toml", 10, 1, "session.limit[2]", message)]);
    let none = format!("{head}[[session.limit]]\nmax = 0\n");
    assert_errors(&[("policy.toml", &none)], &[("policy.toml", 5, 7, "session.limit[0].max", "")]);
}

/// file, line, column, key, part of the message.
type Expected<'e> = (&'e str, u32, u32, &'e str, &'e str);

fn assert_errors(files: &[(&str, &str)], expected: &[Expected<'_>]) {
    let Err(PolicyErrors(errors)) = Policy::compile(&bundle(files), &BTreeMap::new()) else {
        panic!("compiles: {files:?}");
    };
    let mut differences = Vec::new();
    for index in 0..errors.len().max(expected.len()) {
        let (found, expected) = (errors.get(index), expected.get(index));
        let agree = found.zip(expected).is_some_and(|(e, (file, line, column, key, message))| {
            (e.file.as_str(), e.line, e.column, e.key.as_str()) == (*file, *line, *column, *key)
                && e.message.contains(message)
        });
        if !agree {
            let found =
                found.map(|e| format!("{}:{}:{}: {}: {}", e.file, e.line, e.column, e.key, e.message));
            differences.push(format!("expected {expected:?}\n   found {found:?}"));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

#[test]
fn structural_errors_come_all_at_once_and_say_what_was_expected() {
    let text = r#"version = 2
[tls]
verions = ["1.3"]
groups = ["X25519", "P-521"]
hsts = { max_age = "2 years" }
[connections]
max_total = "many"
max_per_address = 0
idle_timeout = 75
http2 = "yes"
[session]
idle = "15min"
[[upstream]]
name = "Backend"
[[rate]]
name = "api"
per = []
quota = 1
period = "1m"
[[route]]
name = "x"
path = "/x"
methods = ["get"]
upstream = "backend"
host = 7
"#;
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 1, 11, "version", "expected at most 1, found 2"),
            ("policy.toml", 3, 1, "tls.verions", "unknown key; did you mean `versions`?"),
            (
                "policy.toml",
                4,
                21,
                "tls.groups[1]",
                r#"expected one of "X25519MLKEM768", "X25519", "P-256", "P-384", found "P-521""#,
            ),
            ("policy.toml", 5, 20, "tls.hsts.max_age", "expected a duration such as"),
            ("policy.toml", 7, 13, "connections.max_total", "expected a whole number, found \"many\""),
            ("policy.toml", 8, 19, "connections.max_per_address", "expected at least 1, found 0"),
            ("policy.toml", 9, 16, "connections.idle_timeout", "expected a duration such as"),
            ("policy.toml", 10, 9, "connections.http2", "expected true or false, found \"yes\""),
            ("policy.toml", 12, 8, "session.idle", "expected a duration such as"),
            ("policy.toml", 13, 1, "upstream.Backend", "`endpoints` is missing"),
            (
                "policy.toml",
                14,
                8,
                "upstream.Backend.name",
                "expected a name of at most 64 lower-case letters",
            ),
            ("policy.toml", 17, 7, "rate.api.per", "expected at least one entry"),
            ("policy.toml", 23, 12, "route.x.methods[0]", r#"expected one of "GET""#),
            ("policy.toml", 25, 8, "route.x.host", "expected a host or a list of hosts, found 7"),
        ],
    );
}

#[test]
fn errors_of_meaning_come_all_at_once() {
    let text = r#"version = 1
[tls]
versions = ["1.2"]
hsts = { max_age = "1d", preload = true }
ticket_lifetime = "8d"
[connections]
header_timeout = "1ms"
max_header_bytes = "2MiB"
[[certificate]]
names = ["A.example"]
chain = "server.pem"
key = "env:KEY"
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "http://i.example/jwks"
[[upstream]]
name = "backend"
endpoints = ["tcp:a:1", "unix:relative", "tls:b:2"]
health = { path = "/a/../b", interval = "1s", timeout = "2s" }
[[rate]]
name = "by-subject"
per = ["subject", "subject"]
quota = 1
period = "1s"
[[rate]]
name = "by-type"
per = ["message-type"]
quota = 1
period = "1s"
[[rate]]
name = "by-type"
per = ["address"]
quota = 1
period = "1s"
[[route]]
name = "a"
path = "/a/{id}"
methods = ["POST", "POST"]
upstream = "backnd"
auth = "none"
roles = ["user"]
rates = ["by-subject", "by-type", "none-such"]
body = { max_bytes = "17MiB", schema = "schemas/y.json", content_types = ["text/plain"] }
[[route]]
name = "b"
path = "/a/{other}"
host = ["*", "Example"]
methods = ["POST"]
upstream = "backend"
[[route]]
name = "a"
path = "/c/**/d"
methods = ["GET"]
upstream = "backend"
body = { max_bytes = "1B" }
"#;
    assert_errors(
        &[("policy.toml", text), ("schemas/x.json", "{}")],
        &[
            ("policy.toml", 3, 12, "tls.versions", "\"1.3\" is always offered"),
            ("policy.toml", 4, 36, "tls.hsts.preload", "preload wants include_subdomains"),
            ("policy.toml", 5, 19, "tls.ticket_lifetime", "expected \"1s\" to \"7d\""),
            ("policy.toml", 7, 18, "connections.header_timeout", "expected \"100ms\" to \"5m\""),
            ("policy.toml", 8, 20, "connections.max_header_bytes", "expected \"1KiB\" to \"1MiB\""),
            ("policy.toml", 10, 10, "certificate[0].names[0]", "expected a host name in lower case"),
            ("policy.toml", 11, 9, "certificate[0].chain", "expected \"file:PATH\" or \"env:NAME\""),
            ("policy.toml", 18, 8, "issuer.i.jwks", "expected \"file:PATH\" or an \"https:\" URL"),
            ("policy.toml", 21, 13, "upstream.backend.endpoints", "all endpoints with \"tls:\", or none"),
            ("policy.toml", 21, 25, "upstream.backend.endpoints[1]", "expected \"unix:/PATH\""),
            ("policy.toml", 22, 19, "upstream.backend.health.path", "canonical form"),
            ("policy.toml", 22, 57, "upstream.backend.health.timeout", "at most the interval"),
            ("policy.toml", 25, 7, "rate.by-subject.per", "a key stands twice"),
            (
                "policy.toml",
                34,
                8,
                "rate.by-type.name",
                "`by-type` is defined twice; first at policy.toml:29",
            ),
            ("policy.toml", 41, 20, "route.a.methods[1]", "the method stands twice"),
            ("policy.toml", 42, 12, "route.a.upstream", "unknown upstream `backnd`; did you mean `backend`?"),
            ("policy.toml", 44, 9, "route.a.roles", "auth is \"none\""),
            ("policy.toml", 45, 10, "route.a.rates[0]", "counts by what a token says"),
            ("policy.toml", 45, 24, "route.a.rates[1]", "this is no message"),
            (
                "policy.toml",
                45,
                35,
                "route.a.rates[2]",
                "unknown rate `none-such`; there are by-subject, by-type",
            ),
            ("policy.toml", 46, 22, "route.a.body.max_bytes", "expected \"1B\" to \"16MiB\""),
            (
                "policy.toml",
                46,
                40,
                "route.a.body.schema",
                "there is no `schemas/y.json` in the bundle; did you mean `schemas/x.json`?",
            ),
            (
                "policy.toml",
                46,
                75,
                "route.a.body.content_types[0]",
                "a body that is looked into must be JSON",
            ),
            ("policy.toml", 49, 8, "route.b.path", "equal to `a`"),
            ("policy.toml", 50, 14, "route.b.host[1]", "a host name in lower case"),
            ("policy.toml", 54, 8, "route.a.name", "`a` is defined twice; first at policy.toml:39"),
            ("policy.toml", 55, 8, "route.a.path", "`**` may only be the last segment"),
            ("policy.toml", 58, 8, "route.a.body", "GET and HEAD take no body"),
        ],
    );
}

#[test]
fn proofs_of_possession() {
    let rest = r#"
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "https://i.example/jwks"
[[upstream]]
name = "backend"
endpoints = ["unix:/b"]
[[route]]
name = "a"
path = "/a"
methods = ["GET"]
upstream = "backend"
"#;
    let compile = |text: &str| {
        let bundle = bundle(&[("policy.toml", text)]);
        Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
    };
    let plain = compile(&format!("version = 1\n{rest}"));
    assert_eq!(plain.dpop.algorithms, [Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA]);
    assert_eq!((plain.dpop.max_age, plain.dpop.skew), (MINUTE, SECOND * 30));
    assert!(!plain.dpop.demanded && !plain.dpop.nonce);
    let by_rule = compile(&format!(
        "version = 1\n[dpop]\nalgorithms = [\"PS256\"]\nnonce = true\n{rest}sender = \"dpop\"\n"
    ));
    assert!(by_rule.dpop.demanded && by_rule.dpop.nonce);
    assert_eq!(by_rule.dpop.algorithm_names, "PS256");
    assert_eq!((by_rule.rules[0].sender, by_rule.issuers[0].sender), (Sender::Dpop, Sender::Any));
    let by_issuer = compile(&format!(
        "version = 1\n{}",
        rest.replacen("name = \"i\"", "name = \"i\"\nsender = \"dpop\"", 1)
    ));
    assert!(by_issuer.dpop.demanded);

    let text = format!(
        "version = 1\n[dpop]\nalgorithms = [\"ES256\", \"ES256\"]\nmax_age = \"1h\"\nnonce_lifetime = \"1s\"\nmax_proofs = 1000\n\
         max_proofs_per_subject = 1001\n{rest}sender = \"dpop\"\nauth = \"none\"\n"
    );
    assert_errors(
        &[("policy.toml", &text)],
        &[
            ("policy.toml", 3, 24, "dpop.algorithms[1]", "the algorithm stands twice"),
            ("policy.toml", 4, 11, "dpop.max_age", "expected \"5s\" to \"10m\""),
            ("policy.toml", 5, 18, "dpop.nonce_lifetime", "expected \"30s\" to \"1h\""),
            ("policy.toml", 7, 26, "dpop.max_proofs_per_subject", "at most dpop.max_proofs"),
            ("policy.toml", 23, 10, "route.a.sender", "auth is \"none\""),
        ],
    );
}

#[test]
fn logouts() {
    let head = r#"version = 1
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "https://i.example/jwks"
[[issuer]]
name = "j"
issuer = "https://j.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "https://j.example/jwks"
claims = { subject = "uid" }
[[upstream]]
name = "backend"
endpoints = ["unix:/b"]
[[rate]]
name = "logouts"
per = ["address"]
quota = 10
period = "1m"
"#;
    let good = r#"[[route]]
name = "logout"
path = "/logout"
methods = ["POST"]
auth = "none"
rates = ["logouts"]
logout = { issuer = "i" }
[[route]]
name = "other"
path = "/other"
methods = ["POST"]
auth = "none"
rates = ["logouts"]
logout = { issuer = "i", audience = ["client"], max_age = "1m", strict_type = true }
"#;
    let bundle = bundle(&[("policy.toml", &format!("{head}{good}"))]);
    let policy = Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
    let rule = policy.rules[0].logout.as_ref().unwrap();
    assert_eq!((&*rule.issuer, &*rule.audience, rule.max_age), ("i", &["a".to_owned()][..], SECOND * 300));
    assert_eq!(*policy.rules[0].body(), crate::rule::BodyRule { max_bytes: 16 * 1024, buffered: true });
    assert!(!rule.strict_type && policy.rules[1].logout.as_ref().unwrap().strict_type);

    let bad = r#"[[route]]
name = "a"
path = "/a"
methods = ["GET"]
upstream = "backend"
mode = "shadow"
logout = { issuer = "k", max_age = "1s" }
[[route]]
name = "b"
path = "/b"
methods = ["POST"]
auth = "none"
rates = ["logouts"]
body = { max_bytes = "1KiB" }
ticket = {}
logout = { issuer = "j" }
"#;
    assert_errors(
        &[("policy.toml", &format!("{head}{bad}"))],
        &[
            ("policy.toml", 29, 10, "route.a.logout", "there is an upstream"),
            ("policy.toml", 29, 10, "route.a.logout", "expected auth = \"none\""),
            ("policy.toml", 29, 10, "route.a.logout", "comes by POST"),
            ("policy.toml", 29, 10, "route.a.logout", "expected rates"),
            ("policy.toml", 29, 10, "route.a.logout", "mode \"shadow\""),
            ("policy.toml", 29, 21, "route.a.logout.issuer", "no [[issuer]] `k`"),
            ("policy.toml", 29, 36, "route.a.logout.max_age", "expected \"10s\" to \"1h\""),
            ("policy.toml", 38, 10, "route.b.logout", "and not both"),
            ("policy.toml", 38, 10, "route.b.logout", "expected none of it here"),
            ("policy.toml", 38, 21, "route.b.logout.issuer", "map subject or session"),
        ],
    );
}

#[test]
fn revocation_sources() {
    let head = r#"version = 1
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "https://i.example/jwks"
[[upstream]]
name = "backend"
endpoints = ["unix:/b"]
[[upstream]]
name = "plain"
endpoints = ["tcp:127.0.0.1:80", "tcp:10.0.0.1:80"]
[[upstream]]
name = "loopback"
endpoints = ["tcp:127.0.0.1:80", "tcp:[::1]:80", "unix:/b"]
[[upstream]]
name = "secure"
endpoints = ["tls:accounts.example:443"]
[[revocation_source]]
name = "accounts"
upstream = "backend"
path = "/revocations"
"#;
    let bundle = bundle(&[("policy.toml", head)]);
    let policy = Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
    let [source] = policy.revocation_sources() else { panic!() };
    for upstream in ["loopback", "secure"] {
        let more = format!("[[revocation_source]]\nname = \"a\"\nupstream = \"{upstream}\"\npath = \"/r\"\n");
        let bundle = self::bundle(&[("policy.toml", &format!("{head}{more}"))]);
        Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
    }
    assert_eq!(
        (&*source.upstream, source.contact_timeout, source.on_loss),
        ("backend", SECOND * 30, OnLoss::Warn)
    );
    assert_eq!(source.issuers, ["https://i.example"]);
    assert!(OnLoss::Warn < OnLoss::NoNewPrivileged && OnLoss::NoNewPrivileged < OnLoss::FailClosed);
    let bad = r#"[[revocation_source]]
name = "accounts"
upstream = "other"
path = "/a?b"
issuers = ["i", "j"]
token = "secret"
contact_timeout = "1s"
[[revocation_source]]
name = "plain"
upstream = "plain"
path = "/r"
"#;
    assert_errors(
        &[("policy.toml", &format!("{head}{bad}"))],
        &[
            ("policy.toml", 25, 8, "revocation_source.accounts.name", "defined twice"),
            ("policy.toml", 26, 12, "revocation_source.accounts.upstream", "no [[upstream]] `other`"),
            ("policy.toml", 27, 8, "revocation_source.accounts.path", "without query"),
            ("policy.toml", 28, 17, "revocation_source.accounts.issuers[1]", "no [[issuer]] `j`"),
            ("policy.toml", 29, 9, "revocation_source.accounts.token", "expected \"file:PATH\""),
            (
                "policy.toml",
                30,
                19,
                "revocation_source.accounts.contact_timeout",
                "expected \"4s\" to \"1h\"",
            ),
            ("policy.toml", 33, 12, "revocation_source.plain.upstream", "expected an [[upstream]] over TLS"),
        ],
    );
}

#[test]
fn tickets_and_stronger_logins() {
    let head = r#"version = 1
[[role]]
name = "administrator"
require_amr = ["otp", "hwk"]
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "https://i.example/jwks"
[[upstream]]
name = "backend"
endpoints = ["unix:/b"]
"#;
    let good = r#"
[[route]]
name = "ticket"
path = "/ticket"
methods = ["POST"]
ticket = {}
[[route]]
name = "erase"
path = "/erase"
methods = ["POST"]
upstream = "backend"
step_up = { acr = ["phr", "mfa"], amr = ["otp"], max_age = "5m" }
"#;
    let bundle = bundle(&[("policy.toml", &format!("{head}{good}"))]);
    let policy = Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(policy.rules[0].ticket.unwrap().ttl, SECOND * 30);
    let step_up = policy.rules[1].step_up.as_ref().unwrap();
    assert_eq!(&*step_up.challenge, "acr_values=\"phr mfa\", max_age=\"300\"");

    let bad = r#"[[role]]
name = "administrator"
require_amr = ["otp"]
[[route]]
name = "a"
path = "/a"
methods = ["GET"]
[[route]]
name = "b"
path = "/b"
methods = ["GET"]
upstream = "backend"
auth = "none"
ticket = { ttl = "1h" }
[[route]]
name = "c"
path = "/c"
methods = ["GET"]
upstream = "backend"
step_up = {}
[[route]]
name = "d"
path = "/d"
methods = ["GET"]
upstream = "backend"
auth = "none"
step_up = { acr = ["a b", "x", "x"], max_age = "1s" }
[[websocket]]
name = "e"
path = "/e"
upstream = "backend"
[[websocket.message]]
type = "m"
direction = "both"
step_up = { amr = ["otp"] }
"#;
    assert_errors(
        &[("policy.toml", &format!("{head}{bad}"))],
        &[
            ("policy.toml", 15, 8, "role.administrator.name", "defined twice"),
            ("policy.toml", 17, 1, "route.a", "expected an upstream, or a ticket"),
            ("policy.toml", 27, 10, "route.b.ticket", "there is an upstream"),
            ("policy.toml", 27, 10, "route.b.ticket", "auth is \"none\""),
            ("policy.toml", 27, 10, "route.b.ticket", "made by POST"),
            ("policy.toml", 27, 18, "route.b.ticket.ttl", "expected \"5s\" to \"5m\""),
            ("policy.toml", 33, 11, "route.c.step_up", "expected acr, amr or max_age"),
            ("policy.toml", 40, 11, "route.d.step_up", "auth is \"none\""),
            ("policy.toml", 40, 20, "route.d.step_up.acr[0]", "without blanks and quotes"),
            ("policy.toml", 40, 32, "route.d.step_up.acr[2]", "stands twice"),
            ("policy.toml", 40, 48, "route.d.step_up.max_age", "expected \"10s\" to \"30d\""),
            ("policy.toml", 48, 11, "websocket.e.message[0].step_up", "only for messages to the upstream"),
        ],
    );
}

#[test]
fn errors_of_what_is_recorded() {
    let text = r#"version = 1
[[upstream]]
name = "backend"
endpoints = ["unix:/b"]
[[route]]
name = "a"
path = "/a"
methods = ["GET"]
upstream = "backend"
auth = "none"
audit = false
reason = "Authorization"
[[route]]
name = "b"
path = "/b"
methods = ["GET"]
upstream = "backend"
auth = "none"
reason = "X-Sealgate-Subject"
[[route]]
name = "c"
path = "/c"
methods = ["GET"]
upstream = "backend"
auth = "none"
reason = "x y"
[[websocket]]
name = "e"
path = "/e"
upstream = "backend"
auth = "none"
audit = true
[[websocket.message]]
type = "m"
direction = "both"
audit = true
reason = "/why"
[[websocket.message]]
type = "n"
direction = "to-upstream"
reason = "why"
"#;
    let field = "expected the name of a field of its own";
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 11, 9, "route.a.audit", "a reason is asked for to be recorded"),
            ("policy.toml", 12, 10, "route.a.reason", field),
            ("policy.toml", 19, 10, "route.b.reason", field),
            ("policy.toml", 26, 10, "route.c.reason", field),
            ("policy.toml", 36, 9, "websocket.e.message[0].audit", "only for messages to the upstream"),
            ("policy.toml", 37, 10, "websocket.e.message[0].reason", "only for messages to the upstream"),
            ("policy.toml", 41, 10, "websocket.e.message[1].reason", "JSON pointer"),
        ],
    );
}

#[test]
fn errors_of_websockets() {
    let text = r#"version = 1
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[rate]]
name = "r"
per = ["address"]
quota = 1
period = "1s"
[[websocket]]
name = "w"
path = "/w"
upstream = "u"
auth = "none"
origins = ["https://a.example/", "*"]
subprotocols = ["a b", "sealgate.bearer"]
max_frame = "1B"
kinds = ["binary"]
type_pointer = "type"
message_rates = ["r", "s"]
[[websocket.message]]
type = "a"
direction = "both"
activity = true
rates = ["r"]
[[websocket.message]]
type = "a"
direction = "to-client"
activity = true
[[websocket]]
name = "v"
path = "/w"
upstream = "u"
inspect = "json"
require_subprotocol = true
[[websocket]]
name = "n"
path = "/n"
upstream = "u"
inspect = "none"
type_pointer = "/t"
[[websocket.message]]
type = "a"
direction = "both"
[[websocket]]
name = "z"
path = "/z"
upstream = "u"
max_inflate_ratio = 50
"#;
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 1, 1, "issuer", "there is no [[issuer]]"),
            ("policy.toml", 15, 12, "websocket.w.origins[0]", "scheme://host[:port]"),
            ("policy.toml", 16, 17, "websocket.w.subprotocols[0]", "a token"),
            ("policy.toml", 16, 24, "websocket.w.subprotocols[1]", "never agreed on"),
            ("policy.toml", 17, 13, "websocket.w.max_frame", "expected \"125B\" to \"16MiB\""),
            ("policy.toml", 18, 9, "websocket.w.kinds", "binary"),
            ("policy.toml", 19, 16, "websocket.w.type_pointer", "JSON pointer"),
            ("policy.toml", 20, 23, "websocket.w.message_rates[1]", "unknown rate `s`"),
            ("policy.toml", 25, 10, "websocket.w.message[0].rates[0]", "in message_rates already"),
            ("policy.toml", 27, 8, "websocket.w.message[1].type", "twice for one direction"),
            ("policy.toml", 29, 12, "websocket.w.message[1].activity", "only what the user sends"),
            ("policy.toml", 32, 8, "websocket.v.path", "equal to `w`"),
            ("policy.toml", 34, 11, "websocket.v.inspect", "nothing could be sent"),
            ("policy.toml", 35, 23, "websocket.v.require_subprotocol", "no subprotocol is listed"),
            ("policy.toml", 41, 16, "websocket.n.type_pointer", "nothing is looked into"),
            ("policy.toml", 42, 1, "websocket.n.message", "messages are listed, and inspect is"),
            ("policy.toml", 49, 21, "websocket.z.max_inflate_ratio", "expected compression = \"terminate\""),
        ],
    );
}

#[test]
fn errors_of_forms_codings_and_answers() {
    let text = r#"version = 1
[answers]
content_types = ["json"]
headers = ["X Y", "ETag", "Upgrade"]
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[route]]
name = "r"
path = "/r"
methods = ["POST"]
upstream = "u"
auth = "none"
[route.body]
max_bytes = "1KiB"
content_types = ["multipart/form-data"]
content_codings = ["gzip"]
json = {}
[route.body.form]
max_parts = 2
part = [
  { name = "a", max_bytes = "1B", min = 3, max = 2 },
  { name = "a", max_bytes = "2KiB", extensions = ["png"] },
  { name = "b", max_bytes = "1B", file = true },
  { name = "c", max_bytes = "1B", file = true, types = ["image/pgn", "image/svg+xml"], extensions = [".png"] },
  { name = "d", max_bytes = "1B", schema = "schemas/d.json" },
]
[[route]]
name = "s"
path = "/s"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "17MiB", form = { part = [{ name = "a", max_bytes = "1B" }] } }
[[route]]
name = "t"
path = "/t"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "1MiB", content_codings = ["gzip", "identity", "GZIP", "g zip"] }
"#;
    assert_errors(
        &[("policy.toml", text), ("schemas/d.json", "{}")],
        &[
            ("policy.toml", 3, 18, "answers.content_types[0]", "a media type without parameters"),
            ("policy.toml", 4, 12, "answers.headers[0]", "expected a name of a header field"),
            ("policy.toml", 4, 19, "answers.headers[1]", "passes always"),
            ("policy.toml", 4, 27, "answers.headers[2]", "never passed on"),
            ("policy.toml", 16, 17, "route.r.body.content_types", "a form is multipart/form-data"),
            ("policy.toml", 17, 19, "route.r.body.content_codings", "must not be hidden by a coding"),
            ("policy.toml", 19, 1, "route.r.body.form", "expected a form, or JSON"),
            ("policy.toml", 20, 13, "route.r.body.form.max_parts", "3 parts have to be there"),
            ("policy.toml", 22, 50, "route.r.body.form.part.a.max", "no less than min"),
            ("policy.toml", 23, 12, "route.r.body.form.part.a.name", "another part has this name"),
            ("policy.toml", 23, 29, "route.r.body.form.part.a.max_bytes", "no more than the body's"),
            ("policy.toml", 23, 50, "route.r.body.form.part.a.extensions", "only names of files"),
            ("policy.toml", 24, 3, "route.r.body.form.part.b", "expected types"),
            ("policy.toml", 25, 57, "route.r.body.form.part.c.types[0]", "did you mean `image/png`?"),
            ("policy.toml", 25, 70, "route.r.body.form.part.c.types[1]", "does not tell its type"),
            ("policy.toml", 25, 102, "route.r.body.form.part.c.extensions[0]", "without the dot"),
            ("policy.toml", 26, 44, "route.r.body.form.part.d.schema", "a schema is for types"),
            ("policy.toml", 34, 22, "route.s.body.max_bytes", "expected \"1B\" to \"16MiB\""),
            ("policy.toml", 41, 57, "route.t.body.content_codings[1]", "always taken"),
            ("policy.toml", 41, 69, "route.t.body.content_codings[2]", "stands twice"),
            ("policy.toml", 41, 77, "route.t.body.content_codings[3]", "expected a content coding"),
        ],
    );
    // What flows is not held, and may be as long as any.
    let flows = text.split("[[route]]\nname = \"s\"").next().unwrap().split("[[route]]").next().unwrap();
    let flows = flows
        .replace("\"json\"", "\"application/json\"")
        .replace("\"X Y\", \"ETag\", \"Upgrade\"", "\"Set-Cookie\"");
    let flows = flows
        + r#"
[[route]]
name = "s"
path = "/s"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "64GiB", form = { hold = false, part = [{ name = "a", max_bytes = "64GiB" }] } }
"#;
    let policy = Policy::compile(&bundle(&[("policy.toml", &flows)]), &BTreeMap::new()).unwrap();
    assert!(!policy.rules()[0].body().buffered && policy.rules()[0].answer().is_some());
}

#[test]
fn errors_of_ciphertext_and_of_http_2() {
    let text = r#"version = 1
[connections]
h2_stream_window = "1MiB"
h2_connection_window = "1MiB"
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[ciphertext]]
name = "sealed"
pointer = "conversation"
prefix = "e2e:"
readable = ["open:", "e2e"]
payload = ["/a/*/b", "b"]
min_bytes = "8B"
[[ciphertext]]
name = "sealed"
pointer = "/*/conversation"
prefix = "e2e:"
plaintext = [""]
[[route]]
name = "r"
path = "/r"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "1KiB", ciphertext = "seald" }
[[websocket]]
name = "w"
path = "/w"
upstream = "u"
auth = "none"
[[websocket.message]]
type = "a"
direction = "both"
ciphertext = "other"
"#;
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 4, 24, "connections.h2_connection_window", "at least twice h2_stream_window"),
            ("policy.toml", 10, 11, "ciphertext.sealed.pointer", "a JSON pointer"),
            ("policy.toml", 12, 22, "ciphertext.sealed.readable[1]", "cannot be confused with \"e2e:\""),
            ("policy.toml", 13, 22, "ciphertext.sealed.payload[1]", "a JSON pointer"),
            ("policy.toml", 14, 13, "ciphertext.sealed.min_bytes", "expected \"16B\" to \"16MiB\""),
            ("policy.toml", 15, 1, "ciphertext.sealed", "expected `payload`, `envelope` or both"),
            ("policy.toml", 16, 8, "ciphertext.sealed.name", "defined twice; first at policy.toml:9"),
            ("policy.toml", 17, 11, "ciphertext.sealed.pointer", "a JSON pointer"),
            ("policy.toml", 19, 14, "ciphertext.sealed.plaintext[0]", "a JSON pointer"),
            (
                "policy.toml",
                26,
                43,
                "route.r.body.ciphertext",
                "unknown ciphertext `seald`; did you mean `sealed`?",
            ),
            ("policy.toml", 35, 14, "websocket.w.message[0].ciphertext", "unknown ciphertext `other`"),
        ],
    );
    let structural = "version = 1\n[[ciphertext]]\nname = \"s\"\nprefix = \"\"\nenvelop = \"x\"\n";
    assert_errors(
        &[("policy.toml", structural)],
        &[
            ("policy.toml", 2, 1, "ciphertext.s", "`pointer` is missing"),
            ("policy.toml", 4, 10, "ciphertext.s.prefix", ""),
            ("policy.toml", 5, 1, "ciphertext.s.envelop", "did you mean `envelope`?"),
        ],
    );
}

#[test]
fn one_kind_of_error_does_not_hide_the_other() {
    let text = "version = 1\n[tls]\nx = 1\n[[route]]\nname = \"a\"\npath = \"a\"\nmethods = [\"GET\"]\nupstream = \"u\"\nauth = \"none\"\nactivity = 5\n";
    assert_errors(
        &[("policy.toml", text), ("schemas/x.json", "{\n \"type\": 5\n}")],
        &[
            ("policy.toml", 3, 1, "tls.x", "unknown key"),
            ("policy.toml", 6, 8, "route.a.path", "begins with `/`"),
            ("policy.toml", 8, 12, "route.a.upstream", "there are none"),
            ("policy.toml", 10, 12, "route.a.activity", "expected true or false, found 5"),
            ("schemas/x.json", 2, 10, "/type", "5 is not valid"),
        ],
    );
}

#[test]
fn syntax_errors_have_a_place() {
    assert_errors(
        &[("policy.toml", "version = 1\n[tls\n"), ("policy.d/a.toml", "a =")],
        &[
            ("policy.toml", 2, 5, "", "expected `]`"),
            ("policy.d/a.toml", 1, 4, "", "string values must be quoted"),
        ],
    );
    let not_text = Bundle {
        root: PathBuf::new(),
        files: [("policy.toml".to_owned(), b"version = 1\n# \xff".to_vec())].into(),
    };
    let errors = Policy::compile(&not_text, &BTreeMap::new()).unwrap_err();
    assert_eq!((errors.0[0].line, errors.0[0].column), (2, 3));
    let nothing = Policy::compile(&Bundle::default(), &BTreeMap::new()).unwrap_err();
    assert!(nothing.to_string().contains("there is no such file"));
}

#[test]
fn files_merge_and_may_not_contradict_each_other() {
    let main = "version = 1\n[variables]\na = \"/x\"\n[tls]\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:${b}\"]\n";
    let more = "version = 1\n[variables]\nb = \"${a}/y\"\n[[upstream]]\nname = \"v\"\nendpoints = [\"unix:/$${a}\"]\n";
    let files = bundle(&[("policy.toml", main), ("policy.d/more.toml", more), ("policy.d/notes.txt", "?")]);
    let policy = Policy::compile(&files, &BTreeMap::new()).unwrap();
    let endpoints: Vec<_> = policy.upstreams().iter().flat_map(|upstream| &upstream.endpoints).collect();
    assert_eq!(endpoints, [&Endpoint::Unix("/x/y".into()), &Endpoint::Unix("/${a}".into())]);

    assert_errors(
        &[
            ("policy.toml", main),
            ("policy.d/a.toml", "[variables]\na = \"1\"\nb = \"2\"\n[tls]\n"),
            ("policy.d/b.toml", "version = 2\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/v\"]"),
        ],
        &[
            ("policy.d/a.toml", 2, 1, "variables.a", "defined twice; first at policy.toml:3"),
            ("policy.d/a.toml", 4, 2, "tls", "defined twice; first at policy.toml:4"),
            ("policy.d/b.toml", 1, 1, "version", "defined twice; first at policy.toml:1"),
        ],
    );
    assert_errors(
        &[
            ("policy.toml", "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n"),
            ("policy.d/b.toml", "[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/v\"]"),
        ],
        &[("policy.d/b.toml", 2, 8, "upstream.u.name", "`u` is defined twice; first at policy.toml:3")],
    );
}

#[test]
fn bad_variables() {
    let text = "version = 1\n[variables]\na = \"${b}\"\nb = \"${a}\"\nc = \"x\"\n[[issuer]]\nname = \"${cc}\"\nissuer = \"${c\"\n";
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 3, 5, "variables.a", "is made of itself"),
            ("policy.toml", 4, 5, "variables.b", "is made of itself"),
            ("policy.toml", 7, 8, "issuer.0.name", "unknown variable `cc`; did you mean `c`?"),
            ("policy.toml", 8, 10, "issuer.0.issuer", "`${` without `}`"),
        ],
    );
    // Growing by a factor of ten with each line must end before memory does.
    let mut text = "version = 1\n[variables]\na0 = \"xxxxxxxxxx\"\n".to_owned();
    for index in 1..9 {
        let ten = format!("${{a{}}}", index - 1).repeat(10);
        text.push_str(&format!("a{index} = \"{ten}\"\n"));
    }
    let errors = Policy::compile(&bundle(&[("policy.toml", &text)]), &BTreeMap::new()).unwrap_err();
    assert!(errors.0.iter().all(|error| error.message.contains("longer than")), "{errors}");
}

#[test]
fn schema_files() {
    let good = r#"{"type": "object", "properties": {"a": {"$ref": "b/c.json#/$defs/n"}}}"#;
    let files = [("policy.toml", "version = 1"), ("schemas/a.json", good)];
    let other = ("schemas/b/c.json", r#"{"$defs": {"n": {"type": "integer"}}}"#);
    let all = bundle(&[files[0], files[1], other]);
    assert!(Policy::compile(&all, &BTreeMap::new()).is_ok());

    for (schema, line, column, key, message) in [
        ("{\n  \"a\": }", 2, 8, "", "not JSON: expected value"),
        ("{\"a\": 1,\n\"a\": 2}", 2, 7, "", "a key stands twice"),
        (r#"{"properties": {"a": {"type": "strin"}}}"#, 1, 31, "/properties/a/type", "strin"),
        (r#"{"$ref": "missing.json"}"#, 1, 1, "", "missing.json"),
        (r#"{"$ref": "https://example.com/x.json"}"#, 1, 1, "", "https://example.com/x.json"),
        (r#"{"$ref": "file:///etc/passwd"}"#, 1, 1, "", "/etc/passwd"),
        (r#"{"$schema": "http://json-schema.org/draft-07/schema#"}"#, 1, 13, "/$schema", "draft 2020-12"),
        (r#"{"$id": "https://example.com/"}"#, 1, 9, "/$id", "leave `$id` out"),
        (r#"{"pattern": "(?=x)"}"#, 1, 13, "/pattern", ""),
        (r#"{"format": "emial"}"#, 1, 12, "/format", "emial"),
    ] {
        assert_errors(
            &[files[0], ("schemas/a.json", schema)],
            &[("schemas/a.json", line, column, key, message)],
        );
    }
}

#[test]
fn endpoints() {
    let tcp = |host: &str, port, tls| Some((Endpoint::Tcp { host: host.into(), port }, tls));
    assert_eq!(endpoint("tcp:im.internal:80"), tcp("im.internal", 80, false));
    assert_eq!(endpoint("tls:[::1]:443"), tcp("::1", 443, true));
    assert_eq!(endpoint("unix:/run/x.sock"), Some((Endpoint::Unix("/run/x.sock".into()), false)));
    for bad in [
        "",
        "unix:x",
        "tcp:a",
        "tcp:a:",
        "tcp:a:+1",
        "tcp:a:65536",
        "tcp:a:0",
        "udp:a:1",
        "tls:*.a:1",
        "tcp::1",
    ] {
        assert_eq!(endpoint(bad), None, "{bad}");
    }
}

#[test]
fn endpoints_that_fail() {
    let upstream = |more: &str| {
        format!(
            "version = 1\n[[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/a\", \"unix:/b\"]\n{more}"
        )
    };
    let compile = |more: &str| {
        let bundle = bundle(&[("policy.toml", &upstream(more))]);
        let policy = Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
        policy.upstreams[0].clone()
    };
    let plain = compile("");
    assert_eq!((plain.balance, plain.breaker), (Balance::RoundRobin, None));
    assert_eq!((plain.retries, plain.retry_budget), (1, 20));
    let careful = compile("balance = \"least-connections\"\nretries = 0\nbreaker = {}\n");
    assert_eq!((careful.balance, careful.retries), (Balance::LeastConnections, 0));
    let breaker = Breaker { failures: 5, open_for: SECOND * 10, trials: 1, server_errors: false };
    assert_eq!(careful.breaker, Some(breaker));
    let wrong = upstream(
        "balance = \"least\"\nretries = 6\nretry_budget = 101\n\
         breaker = { failures = 0, open_for = \"2h\", trials = 0, after = 1 }\n",
    );
    assert_errors(
        &[("policy.toml", &wrong)],
        &[
            ("policy.toml", 5, 11, "upstream.backend.balance", "least-connections"),
            ("policy.toml", 6, 11, "upstream.backend.retries", "at most 5"),
            ("policy.toml", 7, 16, "upstream.backend.retry_budget", "at most 100"),
            ("policy.toml", 8, 24, "upstream.backend.breaker.failures", "at least 1"),
            ("policy.toml", 8, 38, "upstream.backend.breaker.open_for", "expected \"100ms\" to \"1h\""),
            ("policy.toml", 8, 53, "upstream.backend.breaker.trials", "at least 1"),
            ("policy.toml", 8, 56, "upstream.backend.breaker.after", "unknown key"),
        ],
    );
}

#[test]
fn headers_and_costs_of_rates_fit() {
    let text = |rate: &str, route: &str, message: &str| {
        format!(
            "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n[[rate]]\nname = \"r\"\nquota = 9\nperiod = \"1s\"\n\
             {rate}\n[[websocket]]\nname = \"w\"\npath = \"/w\"\nupstream = \"u\"\nauth = \"none\"\n{route}\n\
             [[websocket.message]]\ntype = \"t\"\ndirection = \"to-upstream\"\n{message}\n"
        )
    };
    let header = "per = [\"header\"]\nheader = \"X-Api-Key\"";
    for (rate, route, message, error) in [
        ("per = [\"header\"]", "", "", ("policy.toml", 9, 7, "rate.r.per", "needs the name of one")),
        (
            "per = [\"address\"]\nheader = \"x-a\"",
            "",
            "",
            ("policy.toml", 10, 10, "rate.r.header", "nothing counts by it"),
        ),
        (
            "per = [\"header\"]\nheader = \"x a\"",
            "",
            "",
            ("policy.toml", 10, 10, "rate.r.header", "expected the name of a header"),
        ),
        (
            header,
            "",
            "rates = [\"r\"]",
            ("policy.toml", 20, 10, "websocket.w.message[0].rates[0]", "messages have none"),
        ),
        (
            "per = [\"device\"]",
            "rates = [\"r\"]",
            "",
            ("policy.toml", 15, 10, "websocket.w.rates[0]", "by what a token says"),
        ),
        (
            "per = [\"address\"]",
            "rates = [\"r\"]\ncost = 10",
            "",
            ("policy.toml", 16, 8, "websocket.w.cost", "its burst is 9"),
        ),
        (
            "per = [\"address\"]",
            "cost = 2",
            "",
            ("policy.toml", 15, 8, "websocket.w.cost", "no rates to take"),
        ),
        (
            "per = [\"address\"]",
            "",
            "rates = [\"r\"]\ncost = 10",
            ("policy.toml", 20, 8, "websocket.w.message[0].cost", "its burst is 9"),
        ),
    ] {
        assert_errors(&[("policy.toml", &text(rate, route, message))], &[error]);
    }
    let fine = text(header, "rates = [\"r\"]\ncost = 9", "");
    Policy::compile(&bundle(&[("policy.toml", &fine)]), &BTreeMap::new()).unwrap();
}

#[test]
fn penalties_and_lists_make_sense() {
    let text = r#"version = 1
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[penalty]]
name = "p"
per = ["account"]
routes = ["login", "none"]
tokens = true
refuse = "connections"
max_block = "1s"
[[route]]
name = "login"
path = "/login"
methods = ["POST"]
upstream = "u"
auth = "none"
[lists]
deny = ["deny.txt"]
default = "deny"
"#;
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 8, 11, "penalty.p.routes[0]", "expected body.account there"),
            ("policy.toml", 8, 20, "penalty.p.routes[1]", "unknown route `none`"),
            ("policy.toml", 9, 10, "penalty.p.tokens", "expected per = [\"address\"]"),
            ("policy.toml", 10, 10, "penalty.p.refuse", "connections come from addresses"),
            ("policy.toml", 11, 13, "penalty.p.max_block", "expected \"30s\" to \"30d\""),
            ("policy.toml", 19, 9, "lists.deny[0]", "expected \"file:PATH\""),
            ("policy.toml", 20, 11, "lists.default", "nobody could connect"),
        ],
    );
    let fine = "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n[[penalty]]\nname = \"p\"\nper = [\"account\"]\n\
                routes = [\"login\"]\nblock = \"2h\"\n[[route]]\nname = \"login\"\npath = \"/login\"\nmethods = [\"POST\"]\nupstream = \"u\"\n\
                auth = \"none\"\nbody = { max_bytes = \"1KiB\", account = \"/user\" }\n";
    let policy = Policy::compile(&bundle(&[("policy.toml", fine)]), &BTreeMap::new()).unwrap();
    let [penalty] = policy.penalties() else { panic!("one penalty") };
    assert_eq!((penalty.after, &penalty.statuses[..], penalty.max_block), (5, &[401][..], HOUR * 2));
    assert!(policy.rules()[0].body().buffered);
}

#[test]
fn limits_of_what_is_under_way_make_sense() {
    let text = r#"version = 1
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[concurrency]]
name = "c"
per = ["subject", "socket"]
limit = 2
[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "u"
auth = "none"
concurrency = ["c", "d"]
[overload]
max_memory = "1MiB"
exempt = ["opn"]
"#;
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 7, 7, "concurrency.c.per", "not by \"message-type\" or \"socket\""),
            ("policy.toml", 15, 16, "route.open.concurrency[0]", "auth is \"none\""),
            ("policy.toml", 15, 21, "route.open.concurrency[1]", "unknown concurrency limit `d`"),
            ("policy.toml", 17, 14, "overload.max_memory", "expected \"16MiB\" to \"999GiB\""),
            ("policy.toml", 18, 11, "overload.exempt[0]", "did you mean `open`?"),
        ],
    );
    let text = "version = 1\n[[concurrency]]\nname = \"c\"\nper = []\nlimit = 0\n[overload]\nshed_at = 101\n";
    assert_errors(
        &[("policy.toml", text)],
        &[
            ("policy.toml", 4, 7, "concurrency.c.per", "expected"),
            ("policy.toml", 5, 9, "concurrency.c.limit", "at least 1"),
            ("policy.toml", 7, 11, "overload.shed_at", "at most 100"),
        ],
    );
    let fine = "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n[[concurrency]]\nname = \"c\"\n\
                per = [\"address\"]\nlimit = 2\n[[route]]\nname = \"open\"\npath = \"/open\"\nmethods = [\"GET\"]\n\
                upstream = \"u\"\nauth = \"none\"\nconcurrency = [\"c\"]\n[overload]\nmax_in_flight = 9\nexempt = [\"open\"]\n";
    let policy = Policy::compile(&bundle(&[("policy.toml", fine)]), &BTreeMap::new()).unwrap();
    assert_eq!((policy.overload().max_in_flight, policy.overload().shed_at), (Some(9), 80));
    assert!(policy.rules()[0].is_exempt_from_shedding());
}

#[test]
fn shared_rates_need_somebody_to_share_with() {
    let text = |rate: &str, shared: bool| {
        let shared = if shared { "[shared]\nredis = [\"redis://r:1\"]\n" } else { "" };
        format!("version = 1\n[[rate]]\nname = \"r\"\nquota = 9\nperiod = \"1s\"\n{rate}\n{shared}")
    };
    for (rate, shared, error) in [
        (
            "per = [\"address\"]\non_error = \"deny\"",
            true,
            ("policy.toml", 7, 12, "rate.r.on_error", "nobody is asked"),
        ),
        (
            "per = [\"address\"]\nscope = \"shared\"",
            false,
            ("policy.toml", 7, 9, "rate.r.scope", "expected [shared]"),
        ),
        (
            "per = [\"socket\"]\nscope = \"shared\"",
            true,
            ("policy.toml", 7, 9, "rate.r.scope", "one gateway only"),
        ),
    ] {
        assert_errors(&[("policy.toml", &text(rate, shared))], &[error]);
    }
    let fast = "version = 1\n[[rate]]\nname = \"r\"\nquota = 100_001\nperiod = \"1s\"\nper = [\"address\"]\nscope = \"shared\"\n\
                [shared]\nredis = [\"redis://r:1\"]\n";
    assert_errors(&[("policy.toml", fast)], &[("policy.toml", 4, 9, "rate.r.quota", "100000 a second")]);
    let fine = text("per = [\"address\"]\nscope = \"shared\"", true);
    let policy = Policy::compile(&bundle(&[("policy.toml", &fine)]), &BTreeMap::new()).unwrap();
    assert_eq!(policy.rates()[0].shared, Some(crate::OnRateError::Local));
}

#[test]
fn rates_by_socket_are_for_messages() {
    let text = |rates: &str, of_messages: &str| {
        format!(
            "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n[[rate]]\nname = \"r\"\nper = [\"socket\"]\n\
             quota = 1\nperiod = \"1s\"\n[[websocket]]\nname = \"w\"\npath = \"/w\"\nupstream = \"u\"\nauth = \"none\"\n\
             rates = [{rates}]\nmessage_rates = [{of_messages}]\n"
        )
    };
    let opening = text("\"r\"", "");
    let message = "`r` counts by socket, and this is no message";
    assert_errors(&[("policy.toml", &opening)], &[("policy.toml", 15, 10, "websocket.w.rates[0]", message)]);
    let messages = text("", "\"r\"");
    Policy::compile(&bundle(&[("policy.toml", &messages)]), &BTreeMap::new()).unwrap();
}

#[test]
fn hashing_wants_endpoints_that_stand_on_a_ring() {
    let text = |endpoints: &str| {
        format!(
            "version = 1\n[[upstream]]\nname = \"u\"\nbalance = \"consistent-hash\"\nendpoints = [{endpoints}]\n"
        )
    };
    let several = text(r#""unix:/a", "unix:/b""#);
    let message = "\"consistent-hash\" over several endpoints needs \"tcp:\" or \"tls:\"";
    assert_errors(&[("policy.toml", &several)], &[("policy.toml", 4, 11, "upstream.u.balance", message)]);
    for endpoints in [r#""unix:/a""#, r#""tcp:a:1", "tcp:b:1""#] {
        let text = text(endpoints);
        Policy::compile(&bundle(&[("policy.toml", &text)]), &BTreeMap::new()).unwrap();
    }
}

#[test]
fn the_json_schema_is_valid_and_describes_every_table() {
    let schema = crate::json_schema();
    assert!(jsonschema::meta::is_valid(&schema));
    let text = schema.to_string();
    assert!(!text.contains("\"null\""), "TOML has no null");
    for key in [
        "tls",
        "connections",
        "certificate",
        "acme",
        "issuer",
        "session",
        "dpop",
        "role",
        "upstream",
        "rate",
        "route",
        "websocket",
        "audit",
    ] {
        assert!(schema.pointer(&format!("/properties/{key}")).is_some(), "{key}");
    }
}

const TUNNEL: &str = r#"
version = 1
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "file:jwks.json"
[[upstream]]
name = "backend"
endpoints = ["unix:/backend"]
[[websocket]]
name = "stream"
path = "/stream"
upstream = "backend"
"#;

const HELLO: &str = "message = [{ type = \"hello\", direction = \"to-upstream\" }]\n";

#[test]
fn a_renewal_has_a_type_of_its_own_and_safe_defaults() {
    let compiled = |keys: &str| {
        let text = format!("{TUNNEL}{HELLO}{keys}");
        Policy::compile(&bundle(&[("policy.toml", &text)]), &BTreeMap::new()).unwrap()
    };
    let policy = compiled("renew = { type = \"renew\" }");
    let renew = policy.rules()[0].tunnel.as_ref().unwrap().renew.as_ref().unwrap();
    assert_eq!(
        (&*renew.name, renew.min_interval, &renew.pointer[..]),
        ("renew", SECOND * 5, &["token".to_owned()][..])
    );
    assert_eq!(renew.on_refusal, crate::rule::OnRefusal::Answer);
    let policy = compiled(
        "renew = { type = \"r\", token_pointer = \"/a/b\", min_interval = \"1m\", on_refusal = \"close\" }",
    );
    let renew = policy.rules()[0].tunnel.as_ref().unwrap().renew.as_ref().unwrap();
    assert_eq!((renew.min_interval, renew.pointer.len()), (MINUTE, 2));
    assert_eq!(renew.on_refusal, crate::rule::OnRefusal::Close);

    let start = u32::try_from(TUNNEL.lines().count()).unwrap() + 1;
    let errors = |keys: &str, expected: &[Expected<'_>]| {
        assert_errors(&[("policy.toml", &format!("{TUNNEL}{keys}"))], expected);
    };
    errors(
        &format!("{HELLO}renew = {{ type = \"hello\", token_pointer = \"token\", min_interval = \"1ms\" }}"),
        &[
            ("policy.toml", start + 1, 18, "websocket.stream.renew.type", "a type of its own"),
            ("policy.toml", start + 1, 43, "websocket.stream.renew.token_pointer", "expected a JSON pointer"),
            (
                "policy.toml",
                start + 1,
                67,
                "websocket.stream.renew.min_interval",
                "expected \"100ms\" to \"1h\"",
            ),
        ],
    );
    errors(
        "auth = \"none\"\nrenew = { type = \"renew\" }",
        &[
            ("policy.toml", start + 1, 9, "websocket.stream.renew", "no token to renew"),
            ("policy.toml", start + 1, 9, "websocket.stream.renew", "would not be seen"),
        ],
    );
}

#[test]
fn open_sockets_are_limited_by_what_is_known_of_them() {
    let compiled = |keys: &str| {
        let text = format!("{TUNNEL}{keys}");
        Policy::compile(&bundle(&[("policy.toml", &text)]), &BTreeMap::new()).unwrap()
    };
    let policy = compiled("max_open = { session = 2, address = 9, at_limit = \"replace-oldest\" }");
    let max_open = policy.rules()[0].tunnel.as_ref().unwrap().max_open.unwrap();
    let expected = crate::rule::MaxOpen {
        session: Some(2),
        subject: None,
        address: Some(9),
        at_limit: crate::rule::AtLimit::ReplaceOldest,
    };
    assert_eq!(max_open, expected);
    assert!(compiled("").rules()[0].tunnel.as_ref().unwrap().max_open.is_none());

    let start = u32::try_from(TUNNEL.lines().count()).unwrap() + 1;
    let errors = |keys: &str, expected: &[Expected<'_>]| {
        assert_errors(&[("policy.toml", &format!("{TUNNEL}{keys}"))], expected);
    };
    let at = "websocket.stream.max_open";
    errors("max_open = {}", &[("policy.toml", start, 12, at, "expected a limit")]);
    errors(
        "auth = \"none\"\nmax_open = { subject = 1 }",
        &[("policy.toml", start + 1, 24, &format!("{at}.subject"), "nobody is known")],
    );
    errors(
        "max_open = { address = 1, at_limit = \"replace-oldest\" }",
        &[("policy.toml", start, 38, &format!("{at}.at_limit"), "expected \"reject\"")],
    );
}

#[test]
fn draining_spreads_over_five_seconds_or_what_time_there_is() {
    let jitter = |keys: &str| {
        let text = format!("version = 1\n[connections]\n{keys}");
        Policy::compile(&bundle(&[("policy.toml", &text)]), &BTreeMap::new())
            .unwrap()
            .connections
            .drain_jitter
    };
    assert_eq!(jitter(""), SECOND * 5);
    assert_eq!(jitter("drain_timeout = \"2s\""), SECOND * 2);
    assert_eq!(jitter("drain_jitter = \"0s\""), Duration::ZERO);
    assert_eq!(jitter("drain_jitter = \"30s\""), SECOND * 30);
    assert_errors(
        &[("policy.toml", "version = 1\n[connections]\ndrain_timeout = \"10s\"\ndrain_jitter = \"11s\"\n")],
        &[("policy.toml", 4, 16, "connections.drain_jitter", "expected \"0ms\" to \"10s\"")],
    );
}

#[test]
fn load_balancers_are_addresses_and_prefixes() {
    let text = "version = 1\n[connections]\n\
                proxy_protocol_from = [\"192.0.2.1\", \"10.0.0.0/8\", \"2001:db8::/32\", \"::ffff:198.51.100.0/120\"]\n";
    let policy = Policy::compile(&bundle(&[("policy.toml", text)]), &BTreeMap::new()).unwrap();
    let is_proxy = |address: &str| policy.connections.is_proxy(address.parse().unwrap());
    for address in ["192.0.2.1", "10.255.0.1", "2001:db8::7", "198.51.100.7"] {
        assert!(is_proxy(address), "{address}");
    }
    for address in ["192.0.2.2", "11.0.0.1", "2001:db9::", "198.51.101.1", "::1"] {
        assert!(!is_proxy(address), "{address}");
    }
    assert_errors(
        &[(
            "policy.toml",
            "version = 1\n[connections]\nproxy_protocol_from = [\"10.0.0.0/8\", \"lb.example\"]\n",
        )],
        &[(
            "policy.toml",
            3,
            38,
            "connections.proxy_protocol_from[1]",
            "expected an address or a prefix such as \"192.0.2.0/24\", found \"lb.example\"",
        )],
    );
}

#[test]
fn several_gateways_agree_through_servers_that_are_named_without_secrets() {
    let compile = |text: &str| {
        let text = format!("version = 1\n[shared]\n{text}\n");
        let bundle = bundle(&[("policy.toml", &text)]);
        Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
    };
    assert_eq!(
        Policy::compile(&bundle(&[("policy.toml", "version = 1")]), &BTreeMap::new()).unwrap().shared(),
        None
    );
    let plain = compile("redis = [\"redis://10.0.0.1:6379\"]");
    let shared = plain.shared().unwrap();
    assert_eq!((shared.deadline, shared.contact_timeout), (MILLISECOND * 50, SECOND * 10));
    assert_eq!(
        (&*shared.key_prefix, &shared.mode, shared.on_loss),
        ("sealgate", &SharedMode::Single, OnLoss::Warn)
    );
    assert!(!shared.dpop_fails_closed);
    assert_eq!(
        shared.servers,
        [SharedServer { endpoint: Endpoint::Tcp { host: "10.0.0.1".into(), port: 6379 }, tls: false }]
    );
    let full = compile(
        "redis = [\"rediss://a.example:6379/\", \"rediss://[::1]:6380\"]\nmode = \"sentinel\"\nservice = \"chat\"\nca = \"file:ca.pem\"\n\
         username = \"env:USER\"\npassword = \"env:PASSWORD\"\nkey_prefix = \"chat.eu\"\ndeadline = \"20ms\"\ncontact_timeout = \"1m\"\n\
         on_loss = \"fail-closed\"\ndpop_on_loss = \"deny\"",
    );
    let shared = full.shared().unwrap();
    assert_eq!(shared.mode, SharedMode::Sentinel { service: "chat".into() });
    assert!(shared.servers.iter().all(|server| server.tls) && shared.dpop_fails_closed);
    assert_eq!(
        (shared.on_loss, &shared.password),
        (OnLoss::FailClosed, &Some(Source::Env("PASSWORD".into())))
    );
    let local = compile("redis = [\"unix:/run/redis.sock\"]\non_loss = \"no-new-privileged\"");
    assert_eq!(local.shared().unwrap().servers[0].endpoint, Endpoint::Unix("/run/redis.sock".into()));

    let bad_server = "expected \"redis://HOST:PORT\", \"rediss://HOST:PORT\" or \"unix:/PATH\"; user and password have keys of their own";
    assert_errors(
        &[(
            "policy.toml",
            "version = 1\n[shared]\nredis = [\"redis://me:secret@a:6379\", \"redis://a\"]\nusername = \"env:U\"\npassword = \"secret\"\n\
             ca = \"file:\"\ndeadline = \"3s\"\ncontact_timeout = \"1s\"\nservice = \"chat\"\n",
        )],
        &[
            (
                "policy.toml",
                3,
                9,
                "shared.redis",
                "one server; for several, expected mode \"sentinel\" or \"cluster\"",
            ),
            ("policy.toml", 3, 10, "shared.redis[0]", bad_server),
            ("policy.toml", 3, 38, "shared.redis[1]", bad_server),
            ("policy.toml", 5, 12, "shared.password", "expected \"file:PATH\" or \"env:NAME\""),
            ("policy.toml", 6, 6, "shared.ca", "expected \"file:PATH\" or \"env:NAME\""),
            ("policy.toml", 7, 12, "shared.deadline", "expected \"5ms\" to \"2s\""),
            ("policy.toml", 8, 19, "shared.contact_timeout", "expected \"2s\" to \"1h\""),
            ("policy.toml", 9, 11, "shared.service", "only for mode \"sentinel\""),
        ],
    );
    assert_errors(
        &[(
            "policy.toml",
            "version = 1\n[shared]\nredis = [\"redis://a:1\", \"rediss://b:1\", \"unix:/r\"]\nmode = \"sentinel\"\nusername = \"env:U\"\n",
        )],
        &[
            ("policy.toml", 3, 9, "shared.redis", "sentinels and cluster nodes are reached by host and port"),
            (
                "policy.toml",
                3,
                9,
                "shared.redis",
                "expected \"redis:\" for all servers, or \"rediss:\" for all",
            ),
            ("policy.toml", 4, 8, "shared.mode", "sentinels want the master's name in `service`"),
            ("policy.toml", 5, 12, "shared.username", "a user wants a `password`"),
        ],
    );
}

#[test]
fn bounds_of_json_narrow_from_the_policy_to_the_message() {
    let head = "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n";
    let rules = r#"
[json]
max_depth = 8
max_string = "1KiB"
[[route]]
name = "own"
path = "/own"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "1KiB", json = { max_depth = 9, max_key = "8B" } }
[[route]]
name = "unread"
path = "/unread"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "1KiB" }
[[websocket]]
name = "w"
path = "/w"
upstream = "u"
auth = "none"
json = { max_items = 5 }
[[websocket.message]]
type = "m"
direction = "to-upstream"
json = { max_depth = 2 }
"#;
    let policy = Policy::compile(&bundle(&[("policy.toml", &format!("{head}{rules}"))]), &state()).unwrap();
    let around = Limits { depth: 8, string: 1024, ..Limits::DEFAULT };
    let find = |method: &http::Method, path, websocket| {
        policy.routes.find("localhost", method, path, websocket).unwrap().0.clone()
    };
    let post = http::Method::POST;
    assert_eq!(find(&post, "/own", false).body_json, Some(Limits { depth: 9, key: 8, ..around }));
    assert_eq!(find(&post, "/unread", false).body_json, None);
    let socket = find(&http::Method::GET, "/w", true);
    let table = socket.tunnel.as_ref().unwrap().to_upstream.as_ref().unwrap();
    assert_eq!(table.json, Limits { items: 5, ..around });
    assert_eq!(table.types["m"].json, Some(Limits { depth: 2, items: 5, ..around }));

    let wrong = format!(
        "{head}{}",
        r#"[json]
max_depth = 128
max_values = 0
[[websocket]]
name = "w"
path = "/w"
upstream = "u"
auth = "none"
json = { max_key = "1MiB" }
[[websocket.message]]
type = "m"
direction = "to-upstream"
json = { max_item = 1 }
"#
    );
    assert_errors(
        &[("policy.toml", &wrong)],
        &[
            ("policy.toml", 6, 13, "json.max_depth", ""),
            ("policy.toml", 7, 14, "json.max_values", ""),
            ("policy.toml", 13, 20, "websocket.w.json.max_key", "expected \"1B\" to \"64KiB\""),
            ("policy.toml", 17, 10, "websocket.w.message[0].json.max_item", "did you mean `max_items`?"),
        ],
    );
    let wide = format!(
        "{head}{}",
        r#"[[websocket]]
name = "w"
path = "/w"
upstream = "u"
auth = "none"
json = { max_items = 5 }
[[websocket.message]]
type = "m"
direction = "to-upstream"
json = { max_items = 6, max_digits = 100 }
[[websocket]]
name = "blind"
path = "/blind"
upstream = "u"
auth = "none"
inspect = "none"
json = {}
"#
    );
    assert_errors(
        &[("policy.toml", &wide)],
        &[
            (
                "policy.toml",
                14,
                22,
                "websocket.w.message[0].json.max_items",
                "no more than the websocket's, which is 5",
            ),
            ("policy.toml", 21, 8, "websocket.blind.json", "nothing is looked into"),
        ],
    );
}

#[test]
fn certificates_of_acme_authorities_and_what_is_wrong_with_them() {
    let good = r#"version = 1
[[certificate]]
names = ["chat.example", "www.chat.example"]
acme = "le"
[[acme]]
name = "le"
directory = "https://acme.example/directory"
contact = ["mailto:operators@chat.example"]
terms_agreed = true
renew_before = "20d"
external_account = { id = "kid-1", key = "env:EAB" }
"#;
    let policy = Policy::compile(&bundle(&[("policy.toml", good)]), &state()).unwrap();
    assert_eq!(policy.certificates()[0].origin, CertificateOrigin::Acme(0));
    let authority = &policy.acme()[0];
    assert_eq!(authority.challenges, [AcmeChallenge::TlsAlpn, AcmeChallenge::Http]);
    assert_eq!((authority.renew_before, authority.ca.as_ref()), (Some(DAY * 20), None));

    let bad = r#"version = 1
[[certificate]]
names = ["*.chat.example", "127.0.0.1", "a.example"]
acme = "el"
[[certificate]]
acme = "le"
[[certificate]]
names = ["b.example"]
acme = "le"
chain = "env:CHAIN"
[[certificate]]
names = ["c.example"]
key = "env:KEY"
[[acme]]
name = "le"
directory = "http://acme.example/directory"
contact = ["operators@chat.example", "mailto:a@b,c@d"]
terms_agreed = false
challenges = ["http-01", "http-01"]
renew_before = "1m"
ca = "ca.pem"
external_account = { id = "kid-1", key = "secret" }
"#;
    assert_errors(
        &[("policy.toml", bad)],
        &[
            ("policy.toml", 3, 10, "certificate[0].names[0]", "neither http-01 nor tls-alpn-01"),
            ("policy.toml", 3, 28, "certificate[0].names[1]", "no address can be validated"),
            ("policy.toml", 4, 8, "certificate[0].acme", "`el` is no [[acme]]"),
            ("policy.toml", 6, 8, "certificate[1].acme", "expected 1 to 100 names"),
            ("policy.toml", 7, 1, "certificate[2]", "expected chain and key, or acme"),
            ("policy.toml", 11, 1, "certificate[3]", "expected chain and key, or acme"),
            ("policy.toml", 16, 13, "acme.le.directory", "expected an \"https:\" URL"),
            ("policy.toml", 17, 12, "acme.le.contact[0]", "expected \"mailto:\""),
            ("policy.toml", 17, 38, "acme.le.contact[1]", "expected \"mailto:\""),
            ("policy.toml", 18, 16, "acme.le.terms_agreed", "expected true"),
            ("policy.toml", 19, 26, "acme.le.challenges[1]", "stands twice"),
            ("policy.toml", 20, 16, "acme.le.renew_before", "expected \"1h\" to \"365d\""),
            ("policy.toml", 21, 6, "acme.le.ca", "expected \"file:PATH\" or \"env:NAME\""),
            ("policy.toml", 22, 42, "acme.le.external_account.key", "expected \"file:PATH\" or \"env:NAME\""),
        ],
    );
}
