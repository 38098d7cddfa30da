//! TLS as two independent scanners see it: testssl.sh (Debian's) and sslyze (PyPI's), against `sealgate dev` with its authority given
//! as trusted.

use std::path::{Path, PathBuf};
use std::process::Command;

use sealgate_tests::Gateway;
use serde_json::Value;

/// What testssl.sh says above INFO and is no fault of the gateway, each with its reason.
const EXCUSED: &[(&str, &str)] = &[
    // Said of the OpenSSL that testssl.sh itself runs with.
    ("engine_problem", "No engine or GOST support"),
    // Its s_client may leave before a ticket of TLS 1.3 has come, and then it has none to come back with. See tests/tls.rs.
    ("sessionresumption_ticket", "check failed because of connect problem"),
    // A private authority's certificate names no list and no responder: whoever trusts this authority ends it there.
    ("cert_revocation", "Neither CRL nor OCSP URI provided"),
];

/// What must have been looked at; without it "nothing was found" would mean nothing.
const LOOKED_AT: &[&str] = &[
    "SSLv2",
    "SSLv3",
    "TLS1",
    "TLS1_1",
    "TLS1_2",
    "TLS1_3",
    "cipherlist_NULL",
    "cipherlist_aNULL",
    "cipherlist_EXPORT",
    "cipherlist_LOW",
    "cipherlist_3DES_IDEA",
    "cipherlist_AVERAGE",
    "cipherlist_STRONG",
    "PFS",
    "PFS_ciphers",
    "PFS_ECDHE_curves",
    "cipher_order",
    "cert_keySize",
    "cert_signatureAlgorithm",
    "cert_trust",
    "cert_chain_of_trust",
    "cert_expirationStatus",
    "HSTS_time",
    "HSTS_subdomains",
    "GREASE",
    "heartbleed",
    "CCS",
    "ticketbleed",
    "ROBOT",
    "secure_renego",
    "secure_client_renego",
    "CRIME_TLS",
    "BREACH",
    "POODLE_SSL",
    "fallback_SCSV",
    "SWEET32",
    "FREAK",
    "DROWN",
    "LOGJAM",
    "BEAST",
    "LUCKY13",
    "RC4",
];

/// Rows T-2 and T-3: nothing above INFO but what is excused, and the grade A+.
#[test]
fn t3_testssl_finds_nothing_and_the_grade_is_a_plus() {
    let gateway = Gateway::dev();
    let folder = tempfile::tempdir().expect("a folder");
    let findings = testssl(gateway.port(), gateway.ca(), folder.path());
    for id in LOOKED_AT {
        assert!(findings.has(id), "testssl.sh has not looked at {id}: {:#?}", findings.0);
    }
    let excused = |finding: &Finding| {
        EXCUSED.iter().any(|(id, words)| finding.id == *id && finding.text.starts_with(words))
    };
    let faults: Vec<_> = findings
        .0
        .iter()
        .filter(|finding| !matches!(&*finding.severity, "OK" | "INFO") && !excused(finding))
        .collect();
    assert!(faults.is_empty(), "{faults:#?}");
    let (grade, why) = findings.grade();
    println!("{grade}: {why:?}");
    assert_eq!(grade, "A+", "{why:?}");
}

/// What a scanner found.
#[derive(Debug)]
struct Finding {
    id: String,
    severity: String,
    text: String,
}

struct Findings(Vec<Finding>);

fn testssl(port: u16, ca: &Path, folder: &Path) -> Findings {
    let json = folder.join("testssl.json");
    let output = Command::new("testssl")
        .args(["--quiet", "--warnings", "batch", "--color", "0"])
        // No name server and nobody else is asked.
        .args(["--nodns", "none", "--ip", "127.0.0.1"])
        .args(["--connect-timeout", "20", "--openssl-timeout", "20"])
        // Protocols, kinds of suites, forward secrecy, preferences, server defaults, fields of answers, vulnerabilities, tolerance.
        // Not: each of 370 suites by itself, which tests/tls.rs does with OpenSSL, and what old browsers would agree on.
        .args(["-p", "-s", "-f", "-P", "-S", "-h", "-U", "-g"])
        .arg("--add-ca")
        .arg(ca)
        .arg("--jsonfile")
        .arg(&json)
        .arg(format!("localhost:{port}"))
        .current_dir(folder)
        .output()
        .expect("testssl.sh runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let text = std::fs::read_to_string(&json).unwrap_or_else(|error| panic!("{error}: {said}"));
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let field = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let finding = |row: &Value| Finding {
        id: field(row, "id"),
        severity: field(row, "severity"),
        text: field(row, "finding"),
    };
    Findings(rows.iter().map(finding).collect())
}

impl Findings {
    fn has(&self, id: &str) -> bool {
        self.0.iter().any(|finding| finding.id == id)
    }

    fn text(&self, id: &str) -> &str {
        self.0.iter().find(|finding| finding.id == id).map_or("", |finding| &finding.text)
    }

    fn is_ok(&self, id: &str) -> bool {
        self.0.iter().any(|finding| finding.id == id && finding.severity == "OK")
    }

    fn offers(&self, id: &str) -> bool {
        self.text(id).starts_with("offered")
    }

    /// The grade by the SSL Server Rating Guide (2009q) of SSL Labs. Debian 12's testssl.sh measures what it takes and does not grade;
    /// its later versions do, by the same guide.
    fn grade(&self) -> (&'static str, Vec<String>) {
        let mut why = Vec::new();
        // Not trusted, not for this name, or out of its time: T, whatever else.
        for id in ["cert_trust", "cert_chain_of_trust", "cert_expirationStatus"] {
            if !self.is_ok(id) {
                return ("T", vec![format!("{id}: {}", self.text(id))]);
            }
        }
        // Any of these: F.
        let fatal =
            ["heartbleed", "CCS", "ticketbleed", "ROBOT", "secure_renego", "DROWN", "FREAK", "LOGJAM"];
        let broken = fatal.iter().find(|id| !self.is_ok(id));
        let weak = ["SSLv2", "cipherlist_NULL", "cipherlist_aNULL", "cipherlist_EXPORT", "cipherlist_LOW"]
            .into_iter()
            .find(|id| self.offers(id));
        if let Some(id) = broken.copied().or(weak) {
            return ("F", vec![format!("{id}: {}", self.text(id))]);
        }
        // No better than B.
        let capped =
            ["SSLv3", "TLS1", "TLS1_1", "cipherlist_3DES_IDEA"].into_iter().find(|id| self.offers(id));
        let capped = capped.or((!self.is_ok("RC4")).then_some("RC4"));
        let capped = capped.or((!self.offers("cipherlist_STRONG")).then_some("cipherlist_STRONG"));
        let capped = capped.or((!self.offers("PFS")).then_some("PFS"));
        // Protocols: half the worst and half the best; 1.2 and 1.3 count 100 each.
        let protocols: Vec<u32> =
            [("SSLv3", 80), ("TLS1", 90), ("TLS1_1", 95), ("TLS1_2", 100), ("TLS1_3", 100)]
                .into_iter()
                .filter(|(id, _)| self.offers(id))
                .map(|(_, score)| score)
                .collect();
        let mean = |scores: &[u32]| {
            (scores.iter().min().copied().unwrap_or(0) + scores.iter().max().copied().unwrap_or(0)) / 2
        };
        // Key exchange: the weaker of key and groups, as bits of RSA: 256 bits of a curve are 3072 of RSA.
        let curve = |bits: u32| if bits < 224 { 40 } else { 90 };
        let key = match self.text("cert_keySize").split_whitespace().collect::<Vec<_>>()[..] {
            ["EC", bits, ..] => curve(bits.parse().expect("bits")),
            ["RSA", bits, ..] => match bits.parse::<u32>().expect("bits") {
                0..512 => 20,
                512..1024 => 40,
                1024..2048 => 80,
                2048..4096 => 90,
                _ => 100,
            },
            _ => panic!("{}", self.text("cert_keySize")),
        };
        let groups = self.text("PFS_ECDHE_curves").split_whitespace().map(|group| match group {
            "prime256v1" | "X25519" => curve(256),
            "secp384r1" => curve(384),
            "secp521r1" => curve(521),
            other => panic!("a group that no policy can have: {other}"),
        });
        let exchange = groups.min().expect("groups").min(key);
        // Suites: half the weakest and half the strongest.
        let suites: Vec<u32> = self
            .text("PFS_ciphers")
            .split_whitespace()
            .map(|suite| if suite.contains("128") { 80 } else { 100 })
            .collect();
        assert!(suites.len() >= 3, "{}", self.text("PFS_ciphers"));
        let score = mean(&protocols) * 30 / 100 + exchange * 30 / 100 + mean(&suites) * 40 / 100;
        why.push(format!("protocols {}, exchange {exchange}, suites {}", mean(&protocols), mean(&suites)));
        if let Some(id) = capped {
            why.push(format!("{id}: {}", self.text(id)));
            return (if score >= 65 { "B" } else { "C" }, why);
        }
        let letter = match score {
            80.. => "A",
            65.. => "B",
            50.. => "C",
            _ => "D",
        };
        // The plus is for those who also see to it that browsers stay on HTTPS, for half a year at least, and offer TLS 1.3.
        let days: u32 =
            self.text("HSTS_time").split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
        match letter {
            "A" if days >= 183 && self.offers("TLS1_3") => ("A+", why),
            other => (other, why),
        }
    }
}

/// sslyze's own check against Mozilla's recommendations passes for *intermediate*, and for *modern* with one setting; and it can fail.
#[test]
fn t2_sslyze_agrees_with_mozillas_intermediate_and_modern() {
    let gateway = Gateway::dev();
    let folder = tempfile::tempdir().expect("a folder");
    let scan = |profile: &str| sslyze(gateway.port(), gateway.ca(), profile, folder.path());

    let (fine, said, result) = scan("intermediate");
    assert!(fine && said.contains("OK - Compliant"), "{said}");
    no_faults(&result);
    // TLS 1.2 is what *modern* has against it, and nothing else.
    let (fine, said, _) = scan("modern");
    assert!(!fine, "{said}");
    let faults: Vec<_> = said.lines().filter_map(|line| line.trim().strip_prefix("* ")).collect();
    let faults: Vec<_> = faults.iter().filter(|line| line.contains("should be rejected")).collect();
    assert!(
        faults.iter().all(|line| line.starts_with("tls_versions") || line.starts_with("ciphers")),
        "{said}"
    );

    let policy = gateway.policy().join("policy.toml");
    let text = std::fs::read_to_string(&policy).expect("the policy");
    let changed = text.replace("versions = [\"1.2\", \"1.3\"]", "versions = [\"1.3\"]");
    assert_ne!(text, changed);
    std::fs::write(&policy, changed).expect("the policy");
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    let (fine, said, result) = scan("modern");
    assert!(fine && said.contains("OK - Compliant"), "{said}");
    no_faults(&result);
}

/// One scan: whether the gateway is as `profile` wants it, what was said, and what was found.
fn sslyze(port: u16, ca: &Path, profile: &str, folder: &Path) -> (bool, String, Value) {
    let json = folder.join(format!("{profile}.json"));
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/venv/bin/python3");
    let output = Command::new(python)
        .args(["-m", "sslyze", "--mozilla_config", profile, "--certinfo_ca_file"])
        .arg(ca)
        // What the profile does not ask for as well.
        .args(["--resum", "--early_data", "--http_headers", "--json_out"])
        .arg(&json)
        .arg(format!("localhost:{port}"))
        .output()
        .expect("sslyze runs");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let found = std::fs::read_to_string(&json).unwrap_or_else(|error| panic!("{error}: {said}"));
    let mut found: Value = serde_json::from_str(&found).expect("JSON");
    let result = found["server_scan_results"][0]["scan_result"].take();
    assert!(result.is_object(), "{said}");
    (output.status.success(), said, result)
}

/// Every scan that was begun came to its end, and found nothing.
fn no_faults(result: &Value) {
    for (name, scan) in result.as_object().expect("scans") {
        let status = scan["status"].as_str();
        assert!(
            matches!(status, Some("COMPLETED" | "NOT_SCHEDULED")),
            "{name}: {status:?}: {}",
            scan["error_trace"]
        );
    }
    let of = |scan: &str, field: &str| result[scan]["result"][field].clone();
    assert_eq!(of("heartbleed", "is_vulnerable_to_heartbleed"), false);
    assert_eq!(of("openssl_ccs_injection", "is_vulnerable_to_ccs_injection"), false);
    assert_eq!(of("tls_compression", "supports_compression"), false);
    assert_eq!(of("tls_1_3_early_data", "supports_early_data"), false);
    assert_eq!(of("tls_fallback_scsv", "supports_fallback_scsv"), true);
    assert_eq!(of("session_renegotiation", "supports_secure_renegotiation"), true);
    assert_eq!(of("session_renegotiation", "is_vulnerable_to_client_renegotiation_dos"), false);
    assert!(of("robot", "robot_result").as_str().is_some_and(|found| found.starts_with("NOT_VULNERABLE")));
    let age = &of("http_headers", "strict_transport_security_header")["max_age"];
    assert!(age.as_u64().is_some_and(|seconds| seconds >= 63_072_000), "{age}");
    for old in ["ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1"] {
        let scan = format!("{old}_cipher_suites");
        assert_eq!(of(&scan, "is_tls_version_supported"), false, "{old}");
    }
    assert_eq!(of("tls_1_3_cipher_suites", "is_tls_version_supported"), true);
}

/// Both scanners are there; `./test` installs them.
#[test]
fn both_scanners_are_installed() {
    let python = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/clients/venv/bin/python3"));
    assert!(python.exists(), "no {}: run ./test once", python.display());
    let version = Command::new("testssl").arg("--version").output();
    assert!(version.is_ok(), "no testssl.sh: run ./test once");
}
