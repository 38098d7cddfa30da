//! Certificates of the test's own authority.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, RevokedCertParams,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// An authority and the folder that its files are written to.
pub struct Pki {
    folder: PathBuf,
    authority: Issuer<'static, KeyPair>,
}

impl Pki {
    /// A new authority; its certificate is `ca.pem` in `folder`.
    pub fn new(folder: &Path) -> Pki {
        fs::create_dir_all(folder).expect("a folder for certificates");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let name = folder.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        params.distinguished_name.push(DnType::CommonName, format!("sealgate tests authority {name}"));
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(folder.join("ca.pem"), certificate.pem()).expect("ca.pem");
        Pki { folder: folder.to_owned(), authority: Issuer::new(params, key) }
    }

    /// Writes `NAME.pem` and `NAME.key` for the host names given, good for servers and clients, and returns the
    /// certificate's serial number in upper-case hex, as openssl prints it.
    pub fn issue(&self, name: &str, hosts: &[&str]) -> String {
        self.issue_with(name, hosts, KeyPair::generate().expect("a key"), |_| {})
    }

    /// As [`Pki::issue`], for a key of any kind, and with more said in the certificate.
    pub fn issue_with(
        &self,
        name: &str,
        hosts: &[&str],
        key: KeyPair,
        adjust: impl FnOnce(&mut CertificateParams),
    ) -> String {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("host names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let mut serial = [0_u8; 16];
        ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut serial)
            .expect("random numbers");
        serial[0] = serial[0] & 0x7f | 0x10;
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial));
        adjust(&mut params);
        let certificate = params.signed_by(&key, &self.authority).expect("a certificate");
        fs::write(self.folder.join(format!("{name}.pem")), certificate.pem()).expect("the chain");
        let path = self.folder.join(format!("{name}.key"));
        fs::write(&path, key.serialize_pem()).expect("the key");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, private).expect("the key is private");
        serial.iter().map(|byte| format!("{byte:02X}")).collect()
    }

    /// Writes `FILE`, a revocation list (PEM) of these serial numbers (as [`Pki::issue`] gives them), good for `seconds` from now.
    pub fn revoke(&self, file: &str, serials: &[&str], seconds: i64) {
        let now = std::time::SystemTime::now();
        let end = match u64::try_from(seconds) {
            Ok(ahead) => now + std::time::Duration::from_secs(ahead),
            Err(_) => now - std::time::Duration::from_secs(seconds.unsigned_abs()),
        };
        let begin = now.min(end) - std::time::Duration::from_secs(60);
        let number = |serial: &&str| {
            let digits: Vec<u8> = (0..serial.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&serial[at..at + 2], 16).expect("hex"))
                .collect();
            RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(&digits),
                revocation_time: begin.into(),
                reason_code: None,
                invalidity_date: None,
            }
        };
        let list = CertificateRevocationListParams {
            this_update: begin.into(),
            next_update: end.into(),
            crl_number: rcgen::SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(number).collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let pem = list.signed_by(&self.authority).expect("a list").pem().expect("PEM");
        // In one rename: the gateway watches it.
        let fresh = self.folder.join(format!("{file}.fresh"));
        fs::write(&fresh, pem).expect("the list");
        fs::rename(fresh, self.folder.join(file)).expect("a rename");
    }

    /// SHA-256 over a certificate, base64url: `x5t#S256` (RFC 8705 §3.1).
    pub fn thumbprint(&self, name: &str) -> String {
        let der =
            CertificateDer::from_pem_file(self.folder.join(format!("{name}.pem"))).expect("a certificate");
        URL_SAFE_NO_PAD.encode(ring::digest::digest(&ring::digest::SHA256, &der))
    }

    /// The authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
