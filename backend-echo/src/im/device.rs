//! A device's cryptography: Olm (double ratchet) by vodozemac, and whom it trusts. No network, no files.
//!
//! Olm authenticates the two devices' keys; the payload inside repeats who writes to whom in which conversation, so
//! that a server cannot pass a message off as another one.

use serde::{Deserialize, Serialize};
use vodozemac::olm::{
    Account, AccountPickle, DecryptionError, EncryptionError, OlmMessage, Session, SessionConfig,
    SessionCreationError, SessionPickle,
};
use vodozemac::{Curve25519PublicKey, Ed25519PublicKey, Ed25519Signature};
use zeroize::Zeroizing;

use crate::wire::{
    ClaimedKey, ConversationId, Delivery, DeviceAddress, Envelope, Fixed, IdentityKeys, KeyName, KeyUpload,
    MessageId, OlmKind, Prekey, PublicKey, Sealed, identity_text, prekey_text,
};

/// Sessions kept with one device: both sides may begin one at the same time.
const MAX_SESSIONS: usize = 5;

/// Version 2 keeps the whole MAC; version 1 cuts it to 8 bytes.
fn session_config() -> SessionConfig {
    SessionConfig::version_2()
}

/// One device: its keys, its sessions, what waits to be sent.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Device {
    address: DeviceAddress,
    #[serde(with = "account")]
    account: Account,
    peers: Vec<Peer>,
    /// Whether the backend has our keys.
    pub(super) registered: bool,
    /// Encrypted, not yet accepted; oldest first.
    pub(super) outbox: Vec<Envelope>,
    /// The last message that was dealt with.
    pub(super) seen: u64,
}

/// Another device, as it was when we first met it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    address: DeviceAddress,
    identity: IdentityKeys,
    /// The one that last decrypted something first: that is the one the peer uses.
    #[serde(with = "sessions")]
    sessions: Vec<Session>,
}

/// A message that was decrypted, and is what it claims to be.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) text: String,
}

/// Why a message was not encrypted or not believed.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    #[error(
        "{0} shows other keys than before: a new device would have a new name, so somebody may be in between"
    )]
    OtherIdentity(DeviceAddress),
    #[error("the keys of {0} are not signed by it")]
    Signature(DeviceAddress),
    #[error("{0} is not known")]
    UnknownPeer(DeviceAddress),
    #[error("no session could be begun")]
    Begin(#[from] SessionCreationError),
    #[error("it could not be encrypted")]
    Encrypt(#[from] EncryptionError),
    #[error("no session opens it")]
    NoSession,
    #[error("it does not open: {0}")]
    Decrypt(#[from] DecryptionError),
    #[error("it is no Olm message")]
    NotOlm,
    #[error("what is inside does not fit its envelope")]
    Mismatch,
    #[error("it could not be written")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Length(&'static str),
}

/// What is encrypted.
#[derive(Serialize, Deserialize)]
struct Payload {
    id: MessageId,
    conversation: ConversationId,
    from: DeviceAddress,
    to: DeviceAddress,
    text: String,
}

impl Device {
    /// With new keys, from the system's random numbers.
    pub(super) fn new(address: DeviceAddress) -> Self {
        let account = Account::new();
        Self { address, account, peers: Vec::new(), registered: false, outbox: Vec::new(), seen: 0 }
    }

    pub(super) fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// New prekeys, signed, to be uploaded after the state was saved.
    pub(super) fn fresh_keys(&mut self, one_time: u32, fallback: bool) -> KeyUpload {
        self.account.generate_one_time_keys(one_time as usize);
        if fallback {
            // The one before is kept by the account: messages that use it may be on their way.
            self.account.generate_fallback_key();
        }
        let signed = |fallback: bool, (id, key): (String, PublicKey)| {
            let id = KeyName::try_from(id).ok()?;
            let signature = self.account.sign(prekey_text(&self.address, fallback, &id, &key));
            Some(Prekey { id, key, signature: signature.to_bytes().into() })
        };
        let public =
            |(id, key): (vodozemac::KeyId, Curve25519PublicKey)| (id.to_base64(), key.to_bytes().into());
        let one_time_keys = self.account.one_time_keys().into_iter().map(public);
        let one_time_keys = one_time_keys.filter_map(|key| signed(false, key)).collect();
        let fallback_key =
            self.account.fallback_key().into_iter().map(public).find_map(|key| signed(true, key));
        let upload = KeyUpload { identity: self.identity(), one_time_keys, fallback_key };
        // At once, not after the upload: should its answer get lost, these keys must never be offered a second time.
        self.account.mark_keys_as_published();
        upload
    }

    fn identity(&self) -> IdentityKeys {
        let keys = self.account.identity_keys();
        let (curve25519, ed25519) = (keys.curve25519.to_bytes().into(), (*keys.ed25519.as_bytes()).into());
        let signature = self.account.sign(identity_text(&self.address, &curve25519, &ed25519));
        IdentityKeys { curve25519, ed25519, signature: signature.to_bytes().into() }
    }

    /// Whether we met this device.
    pub(super) fn knows(&self, address: &DeviceAddress) -> bool {
        self.peers.iter().any(|peer| peer.address == *address)
    }

    /// Remembers a device's keys at first sight; later on they must be the same.
    pub(super) fn trust(
        &mut self,
        address: &DeviceAddress,
        identity: &IdentityKeys,
    ) -> Result<(), DeviceError> {
        if let Some(peer) = self.peers.iter().find(|peer| peer.address == *address) {
            if peer.identity == *identity {
                return Ok(());
            }
            return Err(DeviceError::OtherIdentity(address.clone()));
        }
        let text = identity_text(address, &identity.curve25519, &identity.ed25519);
        verify(address, &identity.ed25519, &text, &identity.signature)?;
        self.peers.push(Peer { address: address.clone(), identity: identity.clone(), sessions: Vec::new() });
        Ok(())
    }

    pub(super) fn has_session(&self, address: &DeviceAddress) -> bool {
        self.peers.iter().any(|peer| peer.address == *address && !peer.sessions.is_empty())
    }

    /// Begins a session with a claimed prekey, which must be signed by the device that we trust.
    pub(super) fn begin_session(
        &mut self,
        address: &DeviceAddress,
        claimed: &ClaimedKey,
    ) -> Result<(), DeviceError> {
        self.trust(address, &claimed.identity)?;
        let prekey = &claimed.prekey;
        let text = prekey_text(address, claimed.fallback, &prekey.id, &prekey.key);
        verify(address, &claimed.identity.ed25519, &text, &prekey.signature)?;
        let session = self.account.create_outbound_session(
            session_config(),
            curve(&claimed.identity.curve25519),
            curve(&prekey.key),
        )?;
        self.peer(address)?.keep(session);
        Ok(())
    }

    pub(super) fn encrypt(
        &mut self,
        to: &DeviceAddress,
        id: MessageId,
        conversation: &ConversationId,
        text: &str,
    ) -> Result<Sealed, DeviceError> {
        let payload = Payload {
            id,
            conversation: conversation.clone(),
            from: self.address.clone(),
            to: to.clone(),
            text: text.to_owned(),
        };
        let payload = Zeroizing::new(serde_json::to_vec(&payload)?);
        let session = self.peer(to)?.sessions.first_mut().ok_or(DeviceError::NoSession)?;
        let message = session.encrypt(payload.as_slice())?;
        let kind = match message {
            OlmMessage::PreKey(_) => OlmKind::Prekey,
            OlmMessage::Normal(_) => OlmKind::Normal,
        };
        let ciphertext = message.to_parts().1.try_into().map_err(DeviceError::Length)?;
        Ok(Sealed { user: to.user.clone(), device: to.device.clone(), kind, ciphertext })
    }

    /// Decrypts a message of a device that we trust, and checks that the inside fits the outside.
    pub(super) fn decrypt(&mut self, delivery: &Delivery) -> Result<Incoming, DeviceError> {
        let kind = usize::from(u8::from(delivery.olm_type));
        let message =
            OlmMessage::from_parts(kind, delivery.ciphertext.as_bytes()).map_err(|_| DeviceError::NotOlm)?;
        let plain = Zeroizing::new(self.open(&delivery.sender, &message)?);
        let payload: Payload = serde_json::from_slice(&plain).map_err(|_| DeviceError::Mismatch)?;
        let fits = payload.id == delivery.id
            && payload.conversation == delivery.conversation
            && payload.from == delivery.sender
            && payload.to == self.address
            && ConversationId::between(&payload.from.user, &payload.to.user)
                .is_ok_and(|id| id == payload.conversation);
        if fits { Ok(Incoming { text: payload.text }) } else { Err(DeviceError::Mismatch) }
    }

    fn open(&mut self, sender: &DeviceAddress, message: &OlmMessage) -> Result<Vec<u8>, DeviceError> {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.address == *sender) else {
            return Err(DeviceError::UnknownPeer(sender.clone()));
        };
        if let OlmMessage::PreKey(prekey) = message {
            // The same session again: the peer has had no answer from us yet.
            let known = peer.sessions.iter().position(|session| session.session_id() == prekey.session_id());
            if let Some(position) = known {
                let mut session = peer.sessions.remove(position);
                let opened = session.decrypt(message);
                peer.keep(session);
                return Ok(opened?);
            }
            let identity = curve(&peer.identity.curve25519);
            let begun = self.account.create_inbound_session(session_config(), identity, prekey)?;
            peer.keep(begun.session);
            return Ok(begun.plaintext);
        }
        for position in 0..peer.sessions.len() {
            let Some(session) = peer.sessions.get_mut(position) else {
                break;
            };
            if let Ok(plain) = session.decrypt(message) {
                let session = peer.sessions.remove(position);
                peer.keep(session);
                return Ok(plain);
            }
        }
        Err(DeviceError::NoSession)
    }

    fn peer(&mut self, address: &DeviceAddress) -> Result<&mut Peer, DeviceError> {
        let known = self.peers.iter_mut().find(|peer| peer.address == *address);
        known.ok_or_else(|| DeviceError::UnknownPeer(address.clone()))
    }
}

impl Peer {
    /// As the one to use next; the least used one goes.
    fn keep(&mut self, session: Session) {
        self.sessions.insert(0, session);
        self.sessions.truncate(MAX_SESSIONS);
    }
}

fn curve(key: &PublicKey) -> Curve25519PublicKey {
    Curve25519PublicKey::from_bytes(*key.as_bytes())
}

fn verify(by: &DeviceAddress, key: &PublicKey, text: &str, signature: &Fixed<64>) -> Result<(), DeviceError> {
    let bad = || DeviceError::Signature(by.clone());
    let key = Ed25519PublicKey::from_slice(key.as_bytes()).map_err(|_| bad())?;
    let signature = Ed25519Signature::from_slice(signature.as_bytes()).map_err(|_| bad())?;
    key.verify(text.as_bytes(), &signature).map_err(|_| bad())
}

/// Vodozemac's own forms for storing.
mod account {
    use super::{Account, AccountPickle};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(account: &Account, serializer: S) -> Result<S::Ok, S::Error> {
        account.pickle().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Account, D::Error> {
        AccountPickle::deserialize(deserializer).map(Account::from_pickle)
    }
}

mod sessions {
    use super::{Session, SessionPickle};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(sessions: &[Session], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(sessions.iter().map(Session::pickle))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Session>, D::Error> {
        let pickles = Vec::<SessionPickle>::deserialize(deserializer)?;
        Ok(pickles.into_iter().map(Session::from_pickle).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(user: &str) -> Device {
        Device::new(DeviceAddress { user: user.parse().unwrap(), device: "d".parse().unwrap() })
    }

    /// What the backend would hand out for the device's first one-time key.
    fn claim(upload: &KeyUpload) -> ClaimedKey {
        ClaimedKey {
            identity: upload.identity.clone(),
            prekey: upload.one_time_keys[0].clone(),
            fallback: false,
        }
    }

    fn conversation() -> ConversationId {
        "e2e:alice:bob".to_owned().try_into().unwrap()
    }

    fn deliver(from: &mut Device, to: &Device, seq: u64, text: &str) -> Delivery {
        let id = MessageId::now();
        let sealed = from.encrypt(&to.address, id, &conversation(), text).unwrap();
        Delivery {
            seq,
            id,
            conversation: conversation(),
            sender: from.address.clone(),
            olm_type: sealed.kind,
            ciphertext: sealed.ciphertext,
            received_at: 0,
        }
    }

    /// Alice has a session with Bob; each trusts the other.
    fn pair() -> (Device, Device) {
        let (mut alice, mut bob) = (device("alice"), device("bob"));
        let keys = bob.fresh_keys(1, true);
        alice.trust(&bob.address, &keys.identity).unwrap();
        alice.begin_session(&bob.address, &claim(&keys)).unwrap();
        bob.trust(&alice.address, &alice.identity()).unwrap();
        (alice, bob)
    }

    fn stored(device: &Device) -> Device {
        serde_json::from_slice(&serde_json::to_vec(device).unwrap()).unwrap()
    }

    #[test]
    fn a_conversation_goes_both_ways_and_survives_storing() {
        let (mut alice, mut bob) = pair();
        for (seq, text) in ["one", "two"].into_iter().enumerate() {
            let delivery = deliver(&mut alice, &bob, seq as u64, text);
            assert_eq!(delivery.olm_type, OlmKind::Prekey, "no answer yet");
            assert_eq!(bob.decrypt(&delivery).unwrap().text, text);
            (alice, bob) = (stored(&alice), stored(&bob));
        }
        let answer = deliver(&mut bob, &alice, 1, "three");
        assert_eq!(alice.decrypt(&answer).unwrap().text, "three");
        let last = deliver(&mut alice, &bob, 3, "four");
        assert_eq!(last.olm_type, OlmKind::Normal);
        assert_eq!(bob.decrypt(&last).unwrap().text, "four");
        assert!(bob.decrypt(&last).is_err(), "a message opens once");
    }

    #[test]
    fn both_may_begin_at_the_same_time() {
        let (mut alice, mut bob) = pair();
        let keys = alice.fresh_keys(1, false);
        bob.begin_session(&alice.address, &claim(&keys)).unwrap();
        let (there, back) = (deliver(&mut alice, &bob, 1, "there"), deliver(&mut bob, &alice, 1, "back"));
        assert_eq!(bob.decrypt(&there).unwrap().text, "there");
        assert_eq!(alice.decrypt(&back).unwrap().text, "back");
        for seq in 2..5 {
            let there = deliver(&mut alice, &bob, seq, "there");
            assert_eq!(bob.decrypt(&there).unwrap().text, "there");
            let back = deliver(&mut bob, &alice, seq, "back");
            assert_eq!(alice.decrypt(&back).unwrap().text, "back");
        }
    }

    #[test]
    fn what_a_server_changes_is_noticed() {
        let (mut alice, mut bob) = pair();
        let good = deliver(&mut alice, &bob, 1, "hello");
        let mut other = good.clone();
        other.conversation = "e2e:alice:carol".to_owned().try_into().unwrap();
        assert!(matches!(stored(&bob).decrypt(&other), Err(DeviceError::Mismatch)));
        let mut other = good.clone();
        other.id = MessageId::now();
        assert!(matches!(stored(&bob).decrypt(&other), Err(DeviceError::Mismatch)));
        let mut other = good.clone();
        let mut bytes = other.ciphertext.as_bytes().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        other.ciphertext = bytes.try_into().unwrap();
        assert!(stored(&bob).decrypt(&other).is_err());
        let mut other = good.clone();
        other.sender = device("mallory").address;
        assert!(matches!(stored(&bob).decrypt(&other), Err(DeviceError::UnknownPeer(_))));
        assert_eq!(bob.decrypt(&good).unwrap().text, "hello");
    }

    #[test]
    fn keys_that_a_server_swaps_are_refused() {
        let (mut alice, mut bob) = pair();
        let mut mallory = device("mallory");
        let (keys, evil) = (bob.fresh_keys(2, false), mallory.fresh_keys(1, false));

        // Another device's identity under bob's name: at once for one we know, by its signature for a new one.
        assert!(matches!(alice.trust(&bob.address, &evil.identity), Err(DeviceError::OtherIdentity(_))));
        assert!(matches!(
            device("carol").trust(&bob.address, &evil.identity),
            Err(DeviceError::Signature(_))
        ));

        // Bob's identity with another's prekey.
        let mut claimed = claim(&keys);
        claimed.prekey = evil.one_time_keys[0].clone();
        assert!(matches!(alice.begin_session(&bob.address, &claimed), Err(DeviceError::Signature(_))));
        // A one-time key passed off as the fallback key, which could then be handed out for ever.
        let mut claimed = claim(&keys);
        claimed.fallback = true;
        assert!(matches!(alice.begin_session(&bob.address, &claimed), Err(DeviceError::Signature(_))));
        assert!(alice.begin_session(&bob.address, &claim(&keys)).is_ok());
    }

    #[test]
    fn a_prekey_is_offered_once() {
        let mut bob = device("bob");
        let first = bob.fresh_keys(3, true);
        assert_eq!(first.one_time_keys.len(), 3);
        assert!(first.fallback_key.is_some());
        let second = bob.fresh_keys(2, false);
        assert_eq!(second.one_time_keys.len(), 2);
        assert!(second.fallback_key.is_none());
        assert!(first.one_time_keys.iter().all(|key| !second.one_time_keys.contains(key)));
    }
}
