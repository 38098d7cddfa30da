//! The message API as JSON: what devices and the backend say to each other.
//!
//! Every type refuses unknown members, and checks its lengths while it is read: a value of these
//! types is well-formed. The policy bundles hold JSON Schemas of the same shapes.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::{Deserialize, Serialize};

/// One-time prekeys that the backend holds for a device at most.
pub const MAX_ONE_TIME_KEYS: usize = 256;
/// Devices of one user.
pub const MAX_DEVICES: usize = 6;
/// Devices that one envelope may go to.
pub const MAX_RECIPIENTS: usize = 64;
/// Longest ciphertext for one device, in bytes before base64.
pub const MAX_CIPHERTEXT: usize = 96 * 1024;

/// The WebSocket subprotocol of `/v1/stream`.
pub const SUBPROTOCOL: &str = "im.v1.json";

/// The name of a user or of a device: 1 to 64 of `a-z 0-9 . _ -`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that is no [`Name`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a name is 1 to 64 of a-z, 0-9, `.`, `_` and `-`, beginning with a letter or digit")]
pub struct NameError;

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let whole = text.bytes().all(|c| plain(c) || matches!(c, b'.' | b'_' | b'-'));
        if whole && text.len() <= 64 && text.bytes().next().is_some_and(plain) {
            Ok(Self(text))
        } else {
            Err(NameError)
        }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One device of one user: where messages come from and go to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceAddress {
    /// Whose device it is.
    pub user: Name,
    /// Its name among that user's devices.
    pub device: Name,
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.user, self.device)
    }
}

/// Exactly `N` bytes, as unpadded base64: keys have 32, Ed25519 signatures 64.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fixed<const N: usize>([u8; N]);

/// A public key, 32 bytes.
pub type PublicKey = Fixed<32>;
/// An Ed25519 signature, 64 bytes.
pub type Signature = Fixed<64>;

/// A text that is not unpadded base64 of the right length.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected {0} bytes as unpadded base64")]
pub struct FixedError(usize);

impl<const N: usize> Fixed<N> {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> From<[u8; N]> for Fixed<N> {
    fn from(bytes: [u8; N]) -> Self {
        Self(bytes)
    }
}

impl<const N: usize> TryFrom<&[u8]> for Fixed<N> {
    type Error = FixedError;

    fn try_from(bytes: &[u8]) -> Result<Self, FixedError> {
        bytes.try_into().map(Self).map_err(|_| FixedError(N))
    }
}

impl<const N: usize> TryFrom<String> for Fixed<N> {
    type Error = FixedError;

    fn try_from(text: String) -> Result<Self, FixedError> {
        let bytes = STANDARD_NO_PAD.decode(text).map_err(|_| FixedError(N))?;
        Self::try_from(bytes.as_slice())
    }
}

impl<const N: usize> From<Fixed<N>> for String {
    fn from(fixed: Fixed<N>) -> Self {
        STANDARD_NO_PAD.encode(fixed.0)
    }
}

impl<const N: usize> fmt::Debug for Fixed<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD_NO_PAD.encode(self.0))
    }
}

/// The long-lived public keys of a device. `signature`, by `ed25519`, covers [`identity_text`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityKeys {
    /// For key agreement (Olm's identity key).
    pub curve25519: PublicKey,
    /// For signatures over the device's other keys.
    pub ed25519: PublicKey,
    /// By `ed25519`.
    pub signature: Signature,
}

/// A prekey. `signature`, by the device's `ed25519`, covers [`prekey_text`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prekey {
    /// The device's own name for the key, 1 to 32 bytes.
    pub id: KeyName,
    /// The Curve25519 key.
    pub key: PublicKey,
    /// By the device's `ed25519`.
    pub signature: Signature,
}

/// 1 to 32 of the base64 alphabet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyName(String);

impl KeyName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyName {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'/' | b'-' | b'_');
        if (1..=32).contains(&text.len()) && text.bytes().all(plain) {
            return Ok(Self(text));
        }
        Err("a key id is 1 to 32 characters of base64")
    }
}

impl From<KeyName> for String {
    fn from(name: KeyName) -> Self {
        name.0
    }
}

/// What a device's identity signature covers.
pub fn identity_text(device: &DeviceAddress, curve25519: &PublicKey, ed25519: &PublicKey) -> String {
    format!("sealgate-im/1 identity\n{device}\n{curve25519:?}\n{ed25519:?}")
}

/// What a prekey's signature covers. A one-time key cannot be passed off as a fallback key.
pub fn prekey_text(device: &DeviceAddress, fallback: bool, id: &KeyName, key: &PublicKey) -> String {
    let kind = if fallback { "fallback-key" } else { "one-time-key" };
    format!("sealgate-im/1 {kind}\n{device}\n{}\n{key:?}", id.as_str())
}

/// `PUT /v1/devices/{device}/keys`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyUpload {
    /// The same at every upload: a device whose identity changes is a new device.
    pub identity: IdentityKeys,
    /// Added to those already held.
    #[serde(default)]
    pub one_time_keys: Vec<Prekey>,
    /// Replaces the one already held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_key: Option<Prekey>,
}

/// How many prekeys the backend holds for a device; told zero too, or a client never refills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyCount {
    /// Unclaimed one-time keys.
    pub one_time_keys: u32,
    /// Whether the fallback key was handed out, so that it should be replaced.
    pub fallback_used: bool,
}

/// `GET /v1/users/{user}/devices`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceList {
    /// Whose devices they are.
    pub user: Name,
    /// In the order of their names; empty if the user never registered one.
    pub devices: Vec<DeviceKeys>,
}

/// One device in a [`DeviceList`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceKeys {
    /// Its name.
    pub device: Name,
    /// Its public keys.
    pub identity: IdentityKeys,
}

/// `POST /v1/users/{user}/devices/{device}/claim`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClaimedKey {
    /// The device's long-lived keys.
    pub identity: IdentityKeys,
    /// The key to begin a session with.
    pub prekey: Prekey,
    /// Whether `prekey` is the fallback key, because no one-time key was left.
    pub fallback: bool,
}

/// `POST /v1/messages`: one message, encrypted for each device apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// UUIDv7, chosen by the sending device; sending it again does nothing.
    pub id: MessageId,
    /// Bears its kind.
    pub conversation: ConversationId,
    /// 1 to [`MAX_RECIPIENTS`] different devices.
    pub recipients: Vec<Sealed>,
}

/// An [`Envelope`]'s content for one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    /// Whose device.
    pub user: Name,
    /// Which device.
    pub device: Name,
    /// 0: begins a session (Olm prekey message); 1: within a session.
    #[serde(rename = "type")]
    pub kind: OlmKind,
    /// What only that device can open.
    pub ciphertext: Ciphertext,
}

/// An Olm message's type, 0 or 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum OlmKind {
    /// 0: begins a session.
    Prekey,
    /// 1: within a session.
    Normal,
}

impl TryFrom<u8> for OlmKind {
    type Error = &'static str;

    fn try_from(number: u8) -> Result<Self, &'static str> {
        match number {
            0 => Ok(Self::Prekey),
            1 => Ok(Self::Normal),
            _ => Err("type is 0 or 1"),
        }
    }
}

impl From<OlmKind> for u8 {
    fn from(kind: OlmKind) -> Self {
        match kind {
            OlmKind::Prekey => 0,
            OlmKind::Normal => 1,
        }
    }
}

/// 1 to [`MAX_CIPHERTEXT`] bytes, as unpadded base64.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ciphertext(Vec<u8>);

impl Ciphertext {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Vec<u8>> for Ciphertext {
    type Error = &'static str;

    fn try_from(bytes: Vec<u8>) -> Result<Self, &'static str> {
        if (1..=MAX_CIPHERTEXT).contains(&bytes.len()) {
            return Ok(Self(bytes));
        }
        Err("a ciphertext has 1 to 98,304 bytes")
    }
}

impl TryFrom<String> for Ciphertext {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        STANDARD_NO_PAD.decode(text).map_err(|_| "a ciphertext is unpadded base64")?.try_into()
    }
}

impl From<Ciphertext> for String {
    fn from(ciphertext: Ciphertext) -> Self {
        STANDARD_NO_PAD.encode(ciphertext.0)
    }
}

impl fmt::Debug for Ciphertext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ciphertext({} bytes)", self.0.len())
    }
}

/// A UUID of version 7 (RFC 9562).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MessageId(uuid::Uuid);

impl MessageId {
    /// A new id, from the clock and the system's random numbers.
    pub fn now() -> Self {
        Self(uuid::Uuid::now_v7())
    }
}

impl TryFrom<String> for MessageId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match uuid::Uuid::try_parse(&text) {
            // One spelling only, or the same id would pass the de-duplication twice.
            Ok(id) if id.get_version_num() == 7 && id.hyphenated().to_string() == text => Ok(Self(id)),
            _ => Err("an id is a UUID of version 7 in lower case"),
        }
    }
}

impl From<MessageId> for String {
    fn from(id: MessageId) -> Self {
        id.0.hyphenated().to_string()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.hyphenated())
    }
}

/// `e2e:` and 1 to 136 of `A-Z a-z 0-9 . _ : -`. The prefix is the kind of the conversation, so that gateway and
/// device know it without asking; `e2e:` is the only kind so far.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConversationId(String);

impl ConversationId {
    /// The conversation of two users, the same from both sides.
    pub fn between(one: &Name, other: &Name) -> Result<Self, &'static str> {
        let (first, second) = if one <= other { (one, other) } else { (other, one) };
        format!("e2e:{first}:{second}").try_into()
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ConversationId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b':' | b'-');
        match text.strip_prefix("e2e:") {
            Some(rest) if (1..=136).contains(&rest.len()) && rest.bytes().all(plain) => Ok(Self(text)),
            Some(_) => Err("after `e2e:` come 1 to 136 letters, digits, `.`, `_`, `:` or `-`"),
            None => Err("a conversation id begins with its kind, `e2e:`"),
        }
    }
}

impl From<ConversationId> for String {
    fn from(id: ConversationId) -> Self {
        id.0
    }
}

/// The answer to an [`Envelope`], given only after it was stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The envelope's id.
    pub id: MessageId,
    /// Whether it was accepted before, and this time changed nothing.
    pub duplicate: bool,
}

/// What a device says on `/v1/stream`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromDevice {
    /// Every message up to `seq` has been dealt with and may be forgotten.
    Ack {
        /// At least 1.
        seq: u64,
    },
    /// The same as `POST /v1/messages`.
    Send {
        /// The message.
        envelope: Envelope,
    },
}

/// What the backend says on `/v1/stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToDevice {
    /// Always the first.
    Ready {
        /// The device of this session.
        device: Name,
        /// How many messages wait.
        queued: u32,
        /// Prekeys that are left.
        keys: KeyCount,
    },
    /// A message, in the order of `seq`. Comes again after a reconnect until it is acknowledged.
    Message(Delivery),
    /// A `send` was stored.
    Accepted(Accepted),
    /// A `send` was refused.
    Refused {
        /// The envelope's id.
        id: MessageId,
        /// As the last part of a problem document's type.
        reason: String,
        /// For people.
        detail: String,
    },
}

/// A message on its way to one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// Counts the messages to this device, from 1, without gaps.
    pub seq: u64,
    /// Chosen by the sending device.
    pub id: MessageId,
    /// Claimed by the sender; authenticated only inside the ciphertext.
    pub conversation: ConversationId,
    /// As the gateway verified it.
    pub sender: DeviceAddress,
    /// The Olm message's type.
    pub olm_type: OlmKind,
    /// For this device alone.
    pub ciphertext: Ciphertext,
    /// When the backend stored it, in Unix seconds.
    pub received_at: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_bounded() {
        for good in ["alice", "a", "4u", "im-3f.x_y"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "Alice", "a/b", "a b", "é", "..", &"a".repeat(65)] {
            assert_eq!(bad.parse::<Name>(), Err(NameError), "{bad}");
        }
    }

    #[test]
    fn keys_have_their_exact_length_and_one_spelling() {
        let text = STANDARD_NO_PAD.encode([7; 32]);
        assert!(PublicKey::try_from(text.clone()).is_ok());
        assert!(PublicKey::try_from(format!("{text}=")).is_err());
        assert!(PublicKey::try_from(STANDARD_NO_PAD.encode([7; 31])).is_err());
        assert!(PublicKey::try_from("*".repeat(43)).is_err());
    }

    #[test]
    fn ids_are_version_7_and_canonical() {
        let id = MessageId::now();
        assert_eq!(MessageId::try_from(id.to_string()), Ok(id));
        assert!(MessageId::try_from(id.to_string().to_uppercase()).is_err());
        assert!(MessageId::try_from(id.to_string().replace('-', "")).is_err());
        assert!(MessageId::try_from("9c5b94b1-35ad-49bb-b118-8e8fc24abf80".to_owned()).is_err(), "version 4");
    }

    #[test]
    fn a_conversation_is_the_same_from_both_sides_and_names_its_kind() {
        let (alice, bob) = ("alice".parse().unwrap(), "bob".parse().unwrap());
        let id = ConversationId::between(&alice, &bob).unwrap();
        assert_eq!(id, ConversationId::between(&bob, &alice).unwrap());
        assert_eq!(id.as_str(), "e2e:alice:bob");
        assert!(ConversationId::try_from("managed:x".to_owned()).is_err());
        assert!(ConversationId::try_from("e2e:".to_owned()).is_err());
        assert!(ConversationId::try_from("e2e:a b".to_owned()).is_err());
    }

    #[test]
    fn an_envelope_with_anything_more_is_refused() {
        let good = format!(
            r#"{{"id":"{}","conversation":"e2e:a","recipients":[{{"user":"bob","device":"d","type":0,"ciphertext":"AAAA"}}]}}"#,
            MessageId::now()
        );
        assert!(serde_json::from_str::<Envelope>(&good).is_ok());
        for bad in [
            good.replace(r#""type":0"#, r#""type":2"#),
            good.replace(r#""type":0"#, r#""type":0,"plaintext":"hi""#),
            good.replace("AAAA", "AAAA===="),
            good.replace("AAAA", ""),
        ] {
            assert!(serde_json::from_str::<Envelope>(&bad).is_err(), "{bad}");
        }
    }
}
