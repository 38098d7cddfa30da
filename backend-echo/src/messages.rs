//! The message API: keys, devices, envelopes.

use std::collections::HashSet;
use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use serde_json::json;

use crate::caller::Caller;
use crate::problem::Problem;
use crate::server::Backend;
use crate::store::{MAX_QUEUED, Sent, Upload};
use crate::wire::{
    Accepted, ClaimedKey, DeviceAddress, DeviceList, Envelope, KeyCount, KeyUpload, MAX_DEVICES,
    MAX_ONE_TIME_KEYS, MAX_RECIPIENTS, Name,
};

/// The device behind a request: the session that the gateway verified was opened for it.
///
/// # Errors
/// 401 without an identity, 403 for callers who may not message, or with a session that is not ours.
pub(crate) async fn sender(
    backend: &Backend,
    headers: &HeaderMap,
    now: u64,
) -> Result<DeviceAddress, Problem> {
    let caller = Caller::of(headers)?;
    caller.may_message()?;
    let device =
        backend.store.session(&caller.session, now).await.map_err(|error| Problem::internal(&error))?;
    // A session of another user would mean that identity and session headers do not belong together.
    device.filter(|device| device.user == caller.user).ok_or_else(|| {
        Problem::forbidden("unknown-session", "this session was not opened for a device; log in again")
    })
}

pub(crate) async fn put_keys(
    backend: &Backend,
    own: &DeviceAddress,
    device: &Name,
    upload: &KeyUpload,
    now: u64,
) -> Result<KeyCount, Problem> {
    if own.device != *device {
        return Err(Problem::forbidden("other-device", "a device may change its own keys only"));
    }
    if upload.one_time_keys.len() > MAX_ONE_TIME_KEYS {
        return Err(too_many_keys());
    }
    let refused = |slug, detail: String| Err(Problem::new(StatusCode::CONFLICT, slug, detail));
    match backend.store.put_keys(own, upload, now).await.map_err(|error| Problem::internal(&error))? {
        Upload::Stored(count) => Ok(count),
        Upload::OtherIdentity => refused(
            "other-identity",
            "this device is registered with other identity keys; a device that lost its keys is a new device"
                .to_owned(),
        ),
        Upload::TooManyDevices => {
            refused("too-many-devices", format!("a user may have {MAX_DEVICES} devices"))
        }
        Upload::TooManyKeys => Err(too_many_keys()),
        Upload::KeyIdTaken => refused("key-id-taken", "another one-time key has the same id".to_owned()),
    }
}

pub(crate) async fn devices(backend: &Backend, user: Name) -> Result<DeviceList, Problem> {
    let devices = backend.store.devices(&user).await.map_err(|error| Problem::internal(&error))?;
    Ok(DeviceList { user, devices })
}

pub(crate) async fn claim(backend: &Backend, user: Name, device: Name) -> Result<ClaimedKey, Problem> {
    let claimed = backend.store.claim(&DeviceAddress { user, device }).await;
    claimed.map_err(|error| Problem::internal(&error))?.ok_or_else(|| {
        Problem::new(StatusCode::NOT_FOUND, "no-prekey", "there is no such device, or it has no key left")
    })
}

/// Stores an envelope and wakes its recipients. The answer comes after the commit.
pub(crate) async fn send(
    backend: &Arc<Backend>,
    sender: DeviceAddress,
    envelope: Envelope,
    now: u64,
) -> Result<Accepted, Problem> {
    judge(&sender, &envelope)?;
    let backend = backend.clone();
    // A task of its own: if the sender goes away after the commit, the recipients are woken all the same.
    let stored = tokio::spawn(async move {
        let sent = backend.store.send(&sender, &envelope, now).await?;
        if sent == Sent::Stored {
            for to in &envelope.recipients {
                backend.hub.wake(&DeviceAddress { user: to.user.clone(), device: to.device.clone() });
            }
        }
        Ok::<_, crate::store::StoreError>((envelope.id, sent))
    });
    let (id, sent) = stored
        .await
        .map_err(|error| Problem::internal(&error))?
        .map_err(|error| Problem::internal(&error))?;
    match sent {
        Sent::Stored => Ok(Accepted { id, duplicate: false }),
        Sent::Duplicate => Ok(Accepted { id, duplicate: true }),
        Sent::SenderUnregistered => {
            let detail = "this device has not uploaded its keys; put them first";
            Err(Problem::new(StatusCode::CONFLICT, "unregistered", detail))
        }
        Sent::UnknownDevices(unknown) => {
            let detail = "some recipients are no registered devices; nothing was sent";
            Err(Problem::new(StatusCode::CONFLICT, "unknown-devices", detail).with("unknown", json!(unknown)))
        }
        Sent::QueueFull(full) => {
            let detail =
                format!("{MAX_QUEUED} messages or 64 MiB wait for a recipient already; nothing was sent");
            Err(Problem::new(StatusCode::CONFLICT, "queue-full", detail).with("full", json!(full)))
        }
    }
}

/// What the types cannot say by themselves.
fn judge(sender: &DeviceAddress, envelope: &Envelope) -> Result<(), Problem> {
    if !(1..=MAX_RECIPIENTS).contains(&envelope.recipients.len()) {
        return Err(Problem::shape(format!("an envelope has 1 to {MAX_RECIPIENTS} recipients")));
    }
    let mut seen = HashSet::new();
    for to in &envelope.recipients {
        if !seen.insert((&to.user, &to.device)) {
            return Err(Problem::shape("a recipient is named twice"));
        }
        if to.user == sender.user && to.device == sender.device {
            return Err(Problem::shape("a device does not send to itself"));
        }
    }
    Ok(())
}

fn too_many_keys() -> Problem {
    let detail = format!("at most {MAX_ONE_TIME_KEYS} one-time keys are held for a device");
    Problem::new(StatusCode::CONFLICT, "too-many-keys", detail)
}
