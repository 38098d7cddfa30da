//! The files of a bundle, read but not yet understood.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use include_dir::{Dir, DirEntry, include_dir};

/// Most files of a bundle.
const MAX_FILES: usize = 1_000;
/// Longest file of a bundle.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;
/// Deepest folder below `schemas/` and its like; also ends symlink loops.
const MAX_DEPTH: usize = 8;
/// Folders of a bundle that are read; others (keys, say) are none of the policy's.
const FOLDERS: [&str; 3] = ["policy.d", "schemas", "tests"];

static SHIPPED: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/bundles");

/// Files beside `policy.toml` that may be there.
const OPTIONAL: [&str; 2] = ["authz.cedar", "authz.cedarschema"];

/// All files of a bundle: relative path with `/` (`policy.toml`, `authz.cedar`, `policy.d/x.toml`, `schemas/x.json`,
/// `tests/x.toml`) → bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bundle {
    /// Folder that relative `file:` sources start from.
    pub root: PathBuf,
    /// The files.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Why a bundle cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file or folder cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file name is not UTF-8.
    #[error("{}: the name is not UTF-8", path.display())]
    Name {
        /// Which.
        path: PathBuf,
    },
    /// There is no `policy.toml`.
    #[error("{}: there is no policy.toml in it", root.display())]
    NoPolicy {
        /// The folder.
        root: PathBuf,
    },
    /// A file is too large.
    #[error("{}: larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// There are too many files.
    #[error("{}: more than {MAX_FILES} files", root.display())]
    TooMany {
        /// The folder.
        root: PathBuf,
    },
    /// Folders are nested too deeply, or a symlink leads in a circle.
    #[error("{}: folders nested more than {MAX_DEPTH} deep", path.display())]
    TooDeep {
        /// Where.
        path: PathBuf,
    },
}

impl Bundle {
    /// Names of the bundles that are shipped, for [`Bundle::shipped`].
    pub const SHIPPED: [&str; 4] = ["enterprise", "consumer", "regulated", "development"];

    /// Reads a bundle from its folder: `policy.toml`, `authz.cedar`, `authz.cedarschema`, and what is in `policy.d/`,
    /// `schemas/` and `tests/`.
    ///
    /// Symlinks are followed. Names that begin with `.` or end with `~` are skipped: editors' leavings, and the
    /// `..data` that Kubernetes swaps; if that swap happens meanwhile, reading starts over.
    ///
    /// # Errors
    /// [`BundleError`] if something is unreadable, or larger than at most 1,000 files of 16 MiB.
    pub fn read(dir: &Path) -> Result<Self, BundleError> {
        const ATTEMPTS: usize = 3;
        let generation = || fs::read_link(dir.join("..data")).ok();
        let mut before = generation();
        for _ in 1..ATTEMPTS {
            let bundle = Self::read_once(dir);
            let after = generation();
            if after == before {
                return bundle;
            }
            before = after;
        }
        Self::read_once(dir)
    }

    fn read_once(dir: &Path) -> Result<Self, BundleError> {
        let mut bundle = Self { root: dir.to_owned(), files: BTreeMap::new() };
        let policy = dir.join("policy.toml");
        match fs::metadata(&policy) {
            Ok(_) => bundle.add(&policy, "policy.toml".into())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && dir.is_dir() => {
                return Err(BundleError::NoPolicy { root: dir.to_owned() });
            }
            Err(source) => return Err(BundleError::Io { path: policy, source }),
        }
        for name in OPTIONAL {
            let path = dir.join(name);
            if path.symlink_metadata().is_ok() {
                bundle.add(&path, name.to_owned())?;
            }
        }
        for folder in FOLDERS {
            let path = dir.join(folder);
            if path.is_dir() {
                bundle.add_folder(&path, folder, 0)?;
            }
        }
        Ok(bundle)
    }

    fn add_folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<(), BundleError> {
        if depth == MAX_DEPTH {
            return Err(BundleError::TooDeep { path: folder.to_owned() });
        }
        let io = |source| BundleError::Io { path: folder.to_owned(), source };
        for entry in fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                return Err(BundleError::Name { path });
            };
            if name.starts_with('.') || name.ends_with('~') {
                continue;
            }
            let relative = format!("{prefix}/{name}");
            if path.is_dir() {
                self.add_folder(&path, &relative, depth + 1)?;
            } else {
                self.add(&path, relative)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, relative: String) -> Result<(), BundleError> {
        if self.files.len() == MAX_FILES {
            return Err(BundleError::TooMany { root: self.root.clone() });
        }
        let io = |source| BundleError::Io { path: path.to_owned(), source };
        // A named pipe or device would block or never end.
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(io(io::Error::other("not a regular file")));
        }
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(io)?;
        let length = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if u64::try_from(length).map_or(true, |length| length > MAX_FILE_BYTES) {
            return Err(BundleError::TooLarge { path: path.to_owned() });
        }
        self.files.insert(relative, bytes);
        Ok(())
    }

    /// A bundle that is built in: one of [`Bundle::SHIPPED`]. Its root is empty.
    ///
    /// `development` is no bundle of its own but an overlay for another: its files (`policy.d/development.…`,
    /// `schemas/…`, `tests/…`) go beside the other's.
    pub fn shipped(name: &str) -> Option<Self> {
        fn collect(dir: &Dir<'_>, root: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
            for entry in dir.entries() {
                match entry {
                    DirEntry::Dir(dir) => collect(dir, root, files),
                    DirEntry::File(file) => {
                        let relative = file.path().strip_prefix(root).ok().and_then(Path::to_str);
                        files.extend(relative.map(|path| (path.to_owned(), file.contents().to_owned())));
                    }
                }
            }
        }
        let dir = SHIPPED.get_dir(name)?;
        let mut files = BTreeMap::new();
        collect(dir, dir.path(), &mut files);
        for name in ["development.toml", "development.cedar", "development.cedarschema"] {
            if let Some(overlay) = files.remove(name) {
                files.insert(format!("policy.d/{name}"), overlay);
            }
        }
        Some(Self { root: PathBuf::new(), files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn reads_what_belongs_to_it_through_symlinks() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(matches!(Bundle::read(root), Err(BundleError::NoPolicy { .. })));
        assert!(matches!(Bundle::read(&root.join("none")), Err(BundleError::Io { .. })));
        // As Kubernetes lays out a ConfigMap.
        let data = root.join("..2026_01_01");
        fs::create_dir_all(data.join("schemas/deep")).unwrap();
        fs::write(data.join("policy.toml"), "version = 1").unwrap();
        fs::write(data.join("schemas/deep/x.json"), "{}").unwrap();
        fs::write(data.join("schemas/.x.json.swp"), "junk").unwrap();
        fs::write(data.join("schemas/x.json~"), "junk").unwrap();
        symlink("..2026_01_01", root.join("..data")).unwrap();
        symlink("..data/policy.toml", root.join("policy.toml")).unwrap();
        symlink("..data/schemas", root.join("schemas")).unwrap();
        fs::create_dir(root.join("certs")).unwrap();
        fs::write(root.join("certs/server.key"), "not the policy's").unwrap();
        let bundle = Bundle::read(root).unwrap();
        assert_eq!(bundle.files.keys().collect::<Vec<_>>(), ["policy.toml", "schemas/deep/x.json"]);

        symlink("..", data.join("schemas/loop")).unwrap();
        assert!(matches!(Bundle::read(root), Err(BundleError::TooDeep { .. })));
    }

    #[test]
    fn bounds_what_it_reads() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("policy.toml"), "version = 1").unwrap();
        fs::create_dir(root.join("tests")).unwrap();
        for index in 0..MAX_FILES {
            fs::write(root.join(format!("tests/{index}.toml")), "").unwrap();
        }
        assert!(matches!(Bundle::read(root), Err(BundleError::TooMany { .. })));
        let policy = fs::File::create(root.join("policy.toml")).unwrap();
        policy.set_len(MAX_FILE_BYTES + 1).unwrap();
        assert!(matches!(Bundle::read(root), Err(BundleError::TooLarge { .. })));
    }

    #[test]
    fn every_shipped_bundle_is_there() {
        for name in Bundle::SHIPPED {
            assert!(Bundle::shipped(name).is_some_and(|bundle| !bundle.files.is_empty()), "{name}");
        }
        assert!(Bundle::shipped("other").is_none());
    }
}
