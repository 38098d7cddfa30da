//! Files that nobody but their owner may read, from their first byte on.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::random;

/// Longest key file that [`read_private`] takes, in bytes. A 16,384-bit RSA key in PEM is under 14 KiB.
const MAX_KEY_FILE: u64 = 64 * 1024;

const PRIVATE_DIR: u32 = 0o700;
const PRIVATE_FILE: u32 = 0o600;
const PUBLIC_FILE: u32 = 0o644;
const OTHERS: u32 = 0o077;

/// A key file or its folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused; the source says why.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was being done, such as `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Group or others have rights on it. What it held may be known to them: `chmod` it, and consider new keys.
    #[error("{path} is open to other users (mode {mode:04o}): run `chmod go= {path}`")]
    OpenToOthers {
        /// The file or folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is no ordinary file, or no folder where one is meant.
    #[error("{path} is not a {wanted}")]
    WrongKind {
        /// The file or folder.
        path: PathBuf,
        /// `file` or `folder`.
        wanted: &'static str,
    },
    /// It is longer than any key.
    #[error("{path} is {size} bytes long; a key file has at most {limit}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// The longest one allowed, in bytes.
        limit: u64,
    },
}

/// Makes sure that `path` is a folder which only its owner may enter (0700), creating it and its parents if need be.
///
/// # Errors
/// [`FileError::OpenToOthers`] for a folder that exists, holds something and is open to others: what lies there may
/// have been read or placed by them, so closing it silently would hide that. An empty one is closed.
pub fn private_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(PRIVATE_DIR).create(path).map_err(io_error("create", path))?;
    let metadata = fs::metadata(path).map_err(io_error("inspect", path))?;
    if !metadata.is_dir() {
        return Err(FileError::WrongKind { path: path.to_owned(), wanted: "folder" });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    let empty = fs::read_dir(path).map_err(io_error("read", path))?.next().is_none();
    if !empty {
        return Err(FileError::OpenToOthers { path: path.to_owned(), mode });
    }
    fs::set_permissions(path, Permissions::from_mode(PRIVATE_DIR)).map_err(io_error("close", path))
}

/// Writes a file that only its owner may read (0600), whole or not at all: readers see the old or the new content.
///
/// The content reaches the disk before the name does. An existing file is replaced, whatever its mode was.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, PRIVATE_FILE)
}

/// As [`write_private`], for what everybody may read (0644), such as certificates.
pub(crate) fn write_public(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, PUBLIC_FILE)
}

/// Reads a key file, and refuses one that others may read. The content is erased when dropped.
pub fn read_private(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    // Asked of the open file, so that nobody can swap it between the question and the reading.
    let metadata = file.metadata().map_err(io_error("inspect", path))?;
    if !metadata.is_file() {
        return Err(FileError::WrongKind { path: path.to_owned(), wanted: "file" });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(FileError::OpenToOthers { path: path.to_owned(), mode });
    }
    let size = metadata.len();
    if size > MAX_KEY_FILE {
        return Err(FileError::TooLarge { path: path.to_owned(), size, limit: MAX_KEY_FILE });
    }
    // Room for the longest allowed, taken at once: a vector that grows leaves copies of the key behind.
    let mut content = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE as usize + 1));
    file.take(MAX_KEY_FILE + 1).read_to_end(&mut content).map_err(io_error("read", path))?;
    if content.len() as u64 > MAX_KEY_FILE {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
            size: content.len() as u64,
            limit: MAX_KEY_FILE,
        });
    }
    Ok(content)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(FileError::WrongKind { path: path.to_owned(), wanted: "file" });
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let suffix = random::bytes::<8>().map_err(|error| FileError::Io {
        action: "name a new file beside",
        path: path.to_owned(),
        source: io::Error::other(error),
    })?;
    // Hidden, so that a folder of `*.pem` read at this moment does not take it.
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}", u64::from_ne_bytes(*suffix)));
    let temporary = folder.join(temporary);

    let written = write_new(&temporary, content, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(io_error("create", path)));
    if written.is_err() {
        // Best effort; the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        return written;
    }
    // Makes the rename itself survive a power cut.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
}

/// Creates `path`, which must not exist (`O_EXCL`, so no symlink is followed either).
fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(io_error("create", path))?;
    // The umask may have taken bits away that a public file needs; it never adds any.
    file.set_permissions(Permissions::from_mode(mode)).map_err(io_error("set the mode of", path))?;
    file.write_all(content).map_err(io_error("write", path))?;
    file.sync_all().map_err(io_error("sync", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn private_files_are_0600_and_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.key");
        write_private(&path, b"first").unwrap();
        assert_eq!(mode(&path), 0o600);

        // A file that was open to others is not reused: the new one starts closed.
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        write_private(&path, b"second").unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(read_private(&path).unwrap().as_slice(), b"second");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn public_files_are_0644() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pem");
        write_public(&path, b"x").unwrap();
        assert_eq!(mode(&path), 0o644);
    }

    #[test]
    fn a_symlink_is_replaced_and_not_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, b"untouched").unwrap();
        let path = folder.path().join("a.key");
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        write_private(&path, b"secret").unwrap();
        assert_eq!(fs::read(&elsewhere).unwrap(), b"untouched");
        assert_eq!(read_private(&path).unwrap().as_slice(), b"secret");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("occupied");
        fs::create_dir(&path).unwrap();
        assert!(matches!(write_private(&path, b"x"), Err(FileError::Io { action: "create", .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_private(Path::new("/"), b"x").is_err());
    }

    #[test]
    fn key_files_open_to_others_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.key");
        write_private(&path, b"secret").unwrap();
        for (bits, allowed) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)]
        {
            fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
            let read = read_private(&path);
            assert_eq!(read.is_ok(), allowed, "mode {bits:o}");
            if let Err(error) = read {
                assert!(error.to_string().contains(&format!("mode {bits:04o}")), "{error}");
            }
        }
    }

    #[test]
    fn what_is_no_key_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read_private(folder.path()), Err(FileError::WrongKind { wanted: "file", .. })));
        assert!(matches!(
            read_private(&folder.path().join("absent")),
            Err(FileError::Io { action: "open", .. })
        ));
        let path = folder.path().join("long");
        write_private(&path, &vec![0; MAX_KEY_FILE as usize]).unwrap();
        assert!(read_private(&path).is_ok());
        write_private(&path, &vec![0; MAX_KEY_FILE as usize + 1]).unwrap();
        assert!(matches!(read_private(&path), Err(FileError::TooLarge { .. })));
    }

    #[test]
    fn private_folders_are_0700() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/certs");
        private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        private_dir(&path).unwrap();

        // Empty and open: closed. Open with something in it: refused.
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        write_private(&path.join("a.key"), b"x").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(private_dir(&path), Err(FileError::OpenToOthers { mode: 0o750, .. })));

        let file = folder.path().join("file");
        write_private(&file, b"x").unwrap();
        assert!(private_dir(&file).is_err());
    }
}
