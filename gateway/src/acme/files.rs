//! What ACME keeps in the state folder: `acme/AUTHORITY-DIGEST/`, closed to others, with the account and, in one file each so that
//! they cannot come apart, keys with their certificates.

use std::{
    io,
    path::{Path, PathBuf},
};

use ring::digest::{SHA256, digest};
use sealgate_keys::{CertificateEntry, FileError, private_dir, read_private, write_private};
use zeroize::Zeroizing;

/// The folder of an authority: another one for another directory, so that a certificate for tests is never taken for a real one.
pub(super) fn folder(state: &Path, authority: &str, directory: &str) -> PathBuf {
    state.join("acme").join(format!("{authority}-{}", short_digest(directory.as_bytes())))
}

/// The file of a certificate for `names`, which are host names in lower case.
pub(super) fn certificate_file(folder: &Path, names: &[String]) -> PathBuf {
    let mut sorted: Vec<_> = names.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let first = names.first().map_or("none", String::as_str);
    folder.join(format!("{first}-{}.pem", short_digest(sorted.join("\n").as_bytes())))
}

fn short_digest(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// A file that only the gateway's user may read; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, FileError> {
    match read_private(path) {
        Ok(content) => Ok(Some(content)),
        Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a file, whole or not at all, and the folders around it.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), FileError> {
    if let Some(folder) = path.parent() {
        if let Some(all) = folder.parent() {
            private_dir(all)?;
        }
        private_dir(folder)?;
    }
    write_private(path, content)
}

/// Keys and certificates of one file, as the certificate store takes them.
pub(super) fn entry(names: &[String], pem: &Zeroizing<Vec<u8>>) -> CertificateEntry {
    // Each of the two passes over what is not its own.
    CertificateEntry { names: names.to_vec(), chain_pem: certificates(pem), key_pem: pem.clone() }
}

/// The certificates of a file, without the key that stands before them.
fn certificates(pem: &[u8]) -> Vec<u8> {
    const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
    let at = memchr::memmem::find(pem, BEGIN).unwrap_or(pem.len());
    pem.get(at..).unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn other_directories_and_other_names_are_other_files() {
        let state = Path::new("/state");
        let staging = folder(state, "le", "https://staging.test/directory");
        assert_ne!(staging, folder(state, "le", "https://real.test/directory"));
        let of = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            certificate_file(&staging, &names)
        };
        assert_ne!(of(&["a.test"]), of(&["a.test", "b.test"]));
        assert_ne!(of(&["a.test", "b.test"]), of(&["a.test", "c.test"]));
        assert!(of(&["a.test"]).file_name().unwrap().to_str().unwrap().starts_with("a.test-"));
        assert_eq!(of(&["a.test"]).parent().unwrap(), staging);
    }

    #[test]
    fn files_are_closed_to_others_and_an_open_one_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("acme/one/account.json");
        assert!(read(&path).unwrap().is_none());
        write(&path, b"secret").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(read(&path).unwrap().unwrap().as_slice(), b"secret");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(read(&path), Err(FileError::OpenToOthers { .. })));
    }

    #[test]
    fn the_chain_of_a_file_holds_no_key() {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(["a.test".to_owned()]).unwrap();
        let pem = key.serialize_pem() + &params.self_signed(&key).unwrap().pem();
        let entry = entry(&["a.test".to_owned()], &Zeroizing::new(pem.into_bytes()));
        assert!(entry.chain_pem.starts_with(b"-----BEGIN CERTIFICATE-----"));
        assert!(memchr::memmem::find(&entry.chain_pem, b"PRIVATE").is_none());
        assert!(certificates(b"junk").is_empty());
    }
}
