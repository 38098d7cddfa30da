//! Who is connected, so that a stored message is delivered at once. Only a wake-up: what is delivered comes from the
//! store, so nothing is lost if a wake-up is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::wire::DeviceAddress;

/// The open streams, one per device. As many entries as there are streams.
#[derive(Default)]
pub(crate) struct Hub {
    streams: Mutex<HashMap<DeviceAddress, Arc<Bell>>>,
}

/// Rung when there is something to do for a stream.
#[derive(Default)]
pub(crate) struct Bell {
    /// A message was stored.
    pub(crate) message: Notify,
    /// Another stream of the same device took over.
    pub(crate) replaced: Notify,
}

/// A stream's place in the hub, given up on drop.
pub(crate) struct Seat<'h> {
    hub: &'h Hub,
    device: DeviceAddress,
    pub(crate) bell: Arc<Bell>,
}

impl Hub {
    /// Takes the device's place; a stream that has it is told that it was replaced.
    pub(crate) fn enter(&self, device: DeviceAddress) -> Seat<'_> {
        let bell = Arc::<Bell>::default();
        if let Some(old) = self.streams().insert(device.clone(), bell.clone()) {
            old.replaced.notify_one();
        }
        Seat { hub: self, device, bell }
    }

    /// Tells a device's stream, if there is one, that a message waits.
    pub(crate) fn wake(&self, device: &DeviceAddress) {
        if let Some(bell) = self.streams().get(device) {
            bell.message.notify_one();
        }
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<DeviceAddress, Arc<Bell>>> {
        // The map is whole after any of the one-line changes above, so a panic elsewhere spoils nothing.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut streams = self.hub.streams();
        // A successor's place is not ours to give up.
        if streams.get(&self.device).is_some_and(|bell| Arc::ptr_eq(bell, &self.bell)) {
            streams.remove(&self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn device(name: &str) -> DeviceAddress {
        DeviceAddress { user: "bob".parse().unwrap(), device: name.parse().unwrap() }
    }

    #[test]
    fn only_the_device_itself_is_woken() {
        let hub = Hub::default();
        let (phone, laptop) = (hub.enter(device("phone")), hub.enter(device("laptop")));
        hub.wake(&device("phone"));
        assert!(phone.bell.message.notified().now_or_never().is_some());
        assert!(laptop.bell.message.notified().now_or_never().is_none());
    }

    #[test]
    fn a_newer_stream_replaces_the_older_and_keeps_its_place() {
        let hub = Hub::default();
        let old = hub.enter(device("phone"));
        let new = hub.enter(device("phone"));
        assert!(old.bell.replaced.notified().now_or_never().is_some());
        drop(old);
        hub.wake(&device("phone"));
        assert!(new.bell.message.notified().now_or_never().is_some());
        drop(new);
        assert!(hub.streams().is_empty());
    }
}
