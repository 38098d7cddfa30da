//! Where a device's keys and sessions lie: one file, sealed with AES-256-GCM, replaced whole at every change.
//!
//! Two processes of one user may run at once (one listens, one sends): a file lock lets one at a time change the state.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sealgate_keys::DataKey;
use zeroize::Zeroizing;

use super::device::Device;
use crate::wire::{DeviceAddress, Name};

/// The longest state file read, in bytes.
const MAX_STATE: u64 = 16 * 1024 * 1024;
/// Room for a usual state, taken at once: a buffer that grows leaves copies of secrets behind.
const USUAL_STATE: usize = 256 * 1024;

pub(super) struct Vault {
    folder: PathBuf,
    key: DataKey,
    address: DeviceAddress,
}

/// The state, while this process alone may change it.
pub(super) struct Open<'v> {
    vault: &'v Vault,
    pub(super) device: Device,
    /// Unlocks when closed.
    _lock: File,
}

impl Vault {
    /// Opens the vault of `user` in `folder`, making it, with new keys, at the first time.
    ///
    /// # Errors
    /// If the files cannot be used, were altered, or are another user's.
    pub(super) fn open(folder: &Path, user: &Name, device: Option<&Name>) -> anyhow::Result<Self> {
        let folder = match device {
            None => folder.join(user.as_str()),
            Some(device) => folder.join(format!("{user}@{device}")),
        };
        sealgate_keys::private_dir(&folder).context("cannot use the folder for keys")?;
        let _lock = lock(&folder)?;
        let key = DataKey::load_or_generate(&folder.join("state.key"))
            .context("cannot use the key of the state file")?;
        let place = DeviceAddress { user: user.clone(), device: user.clone() };
        let mut vault = Self { folder, key, address: place };
        let device = match vault.read(user)? {
            Some(device) => device,
            None => {
                let name = match device {
                    Some(name) => name.clone(),
                    None => random_name()?,
                };
                let device = Device::new(DeviceAddress { user: user.clone(), device: name });
                vault.write(&device)?;
                device
            }
        };
        vault.address = device.address().clone();
        Ok(vault)
    }

    /// Whose vault it is.
    pub(super) fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// Waits until no other process has it, and reads what that one left.
    pub(super) async fn lock(&self) -> anyhow::Result<Open<'_>> {
        let folder = self.folder.clone();
        let lock = tokio::task::spawn_blocking(move || lock(&folder)).await??;
        match self.read(&self.address.user)? {
            Some(device) => Ok(Open { vault: self, device, _lock: lock }),
            None => bail!("the state file {} is gone", self.file().display()),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.join("state")
    }

    fn read(&self, user: &Name) -> anyhow::Result<Option<Device>> {
        let path = self.file();
        let shown = path.display();
        let length = match path.metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
        };
        if length > MAX_STATE {
            bail!("{shown} is too long to be a state file");
        }
        let sealed = std::fs::read(&path).with_context(|| format!("cannot read {shown}"))?;
        let opened =
            self.key.unseal(&place(user), &sealed).with_context(|| format!("{shown} cannot be opened"))?;
        let device =
            serde_json::from_slice(&opened).with_context(|| format!("{shown} is of another version"))?;
        Ok(Some(device))
    }

    fn write(&self, device: &Device) -> anyhow::Result<()> {
        let mut plain = Zeroizing::new(Vec::with_capacity(USUAL_STATE));
        serde_json::to_writer(&mut *plain, device)?;
        let sealed = self.key.seal(&place(&device.address().user), &plain)?;
        sealgate_keys::write_private(&self.file(), &sealed).context("the state could not be saved")
    }
}

impl Open<'_> {
    /// Saves the state, whole or not at all.
    pub(super) fn save(&self) -> anyhow::Result<()> {
        self.vault.write(&self.device)
    }
}

/// What the state is sealed to, so that it does not open as another user's.
fn place(user: &Name) -> Vec<u8> {
    format!("sealgate-im/1 state {user}").into_bytes()
}

fn lock(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("lock");
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

fn random_name() -> anyhow::Result<Name> {
    // Only to tell a user's devices apart: the random end of an id will do.
    let id = crate::wire::MessageId::now().to_string();
    let end = id.rsplit('-').next().unwrap_or_default();
    Ok(format!("im-{end}").parse()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open(folder: &Path, user: &str) -> anyhow::Result<Vault> {
        Vault::open(folder, &user.parse().unwrap(), None)
    }

    #[tokio::test]
    async fn the_state_survives_sealed_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let vault = open(folder.path(), "alice").unwrap();
        let mut opened = vault.lock().await.unwrap();
        opened.device.seen = 7;
        opened.save().unwrap();
        drop(opened);

        let again = open(folder.path(), "alice").unwrap();
        assert_eq!(again.address(), vault.address());
        assert_eq!(again.lock().await.unwrap().device.seen, 7);
        for entry in std::fs::read_dir(folder.path().join("alice")).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        }
        let sealed = std::fs::read(vault.file()).unwrap();
        assert!(!sealed.windows(5).any(|part| part == b"alice"), "the state lies open");
    }

    #[tokio::test]
    async fn altered_or_anothers_state_does_not_open() {
        let folder = tempfile::tempdir().unwrap();
        let vault = open(folder.path(), "alice").unwrap();
        let mut sealed = std::fs::read(vault.file()).unwrap();
        open(folder.path(), "bob").unwrap();
        for name in ["state", "state.key"] {
            std::fs::copy(folder.path().join("alice").join(name), folder.path().join("bob").join(name))
                .unwrap();
        }
        assert!(open(folder.path(), "bob").is_err());

        *sealed.last_mut().unwrap() ^= 1;
        std::fs::write(vault.file(), sealed).unwrap();
        assert!(vault.lock().await.is_err());
    }

    #[tokio::test]
    async fn one_process_at_a_time_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (open(folder.path(), "alice").unwrap(), open(folder.path(), "alice").unwrap());
        let first = one.lock().await.unwrap();
        let second = OpenOptions::new().append(true).open(other.folder.join("lock")).unwrap();
        assert!(second.try_lock().is_err());
        drop(first);
        assert!(second.try_lock().is_ok());
    }
}
