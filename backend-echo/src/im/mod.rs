//! `im`: a command-line client that sends and receives end-to-end encrypted messages through the gateway.
//!
//! Keys and sessions stay in a sealed file of this device (`vault`); what goes over the wire (`gateway`) is encrypted
//! for one receiving device each (`device`).

mod device;
mod gateway;
mod vault;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;

use self::device::Incoming;
use self::gateway::{Gateway, Refused, Stream};
use self::vault::Vault;
use crate::wire::{
    Accepted, ClaimedKey, ConversationId, Delivery, DeviceAddress, DeviceList, Envelope, KeyCount, MessageId,
    Name, ToDevice,
};

/// The longest text of one message, in bytes.
const MAX_TEXT: usize = 16 * 1024;
/// One-time keys are filled up to this many when fewer than half are left.
const ONE_TIME_KEYS: u32 = 50;
/// How long to wait before connecting anew.
const RECONNECT: Duration = Duration::from_secs(1);

/// Send and receive end-to-end encrypted messages through the gateway.
#[derive(Debug, Clone, clap::Args)]
pub struct ImArgs {
    /// The `dev.json` that `sealgate dev` wrote: where the gateway is, and whom to trust
    #[arg(long, value_name = "FILE", conflicts_with_all = ["url", "ca"], required_unless_present_all = ["url", "ca"])]
    pub dev: Option<PathBuf>,

    /// Where the gateway is, such as https://127.0.0.1:8443
    #[arg(long, value_name = "URL", requires = "ca")]
    pub url: Option<http::Uri>,

    /// The authority that signed the gateway's certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "url")]
    pub ca: Option<PathBuf>,

    /// Folder for this user's keys and sessions [default: `im` beside dev.json, or .sealgate/im]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Who you are: alice or bob
    #[arg(long, value_name = "NAME")]
    pub user: Name,

    /// Name of this device, for a user with several [default: chosen at first use, and remembered]
    #[arg(long, value_name = "NAME")]
    pub device: Option<Name>,

    /// What to do.
    #[command(subcommand)]
    pub command: ImCommand,
}

/// What to do.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum ImCommand {
    /// Make this device known, so that others can write to it
    Register,
    /// Encrypt a text for every device of a user, and send it
    Send {
        /// To whom
        to: Name,
        /// What
        text: String,
    },
    /// Print messages as they come
    Listen {
        /// Stop after this many messages
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        /// Stop after this many seconds; an error if `--count` was not reached
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u32>,
    },
}

/// Does what the command line says.
///
/// # Errors
/// In words for the person who typed it.
pub async fn im(args: ImArgs) -> anyhow::Result<()> {
    let place = Place::of(&args)?;
    let vault = Vault::open(&place.folder, &args.user, args.device.as_ref())?;
    let gateway = Gateway::new(&place.url, &place.ca, vault.address())?;
    let mut client = Client { vault, gateway };
    match args.command {
        ImCommand::Register => {
            client.gateway.log_in().await?;
            let keys = client.register().await?;
            say(&format!(
                "{} is registered, with {} one-time keys",
                client.vault.address(),
                keys.one_time_keys
            ))
        }
        ImCommand::Send { to, text } => {
            client.gateway.log_in().await?;
            client.send(to, text).await
        }
        ImCommand::Listen { count, timeout } => match timeout {
            None => client.listen(count).await,
            Some(seconds) => {
                let limit = Duration::from_secs(seconds.into());
                match (tokio::time::timeout(limit, client.listen(count)).await, count) {
                    (Ok(result), _) => result,
                    (Err(_), None) => Ok(()),
                    (Err(_), Some(count)) => bail!("fewer than {count} messages came within {seconds} s"),
                }
            }
        },
    }
}

/// Where the gateway is, whom to trust, and where our own files are.
struct Place {
    url: http::Uri,
    ca: PathBuf,
    folder: PathBuf,
}

/// What we need of `dev.json`; it holds more.
#[derive(Deserialize)]
struct DevFile {
    url: String,
    ca: PathBuf,
}

impl Place {
    fn of(args: &ImArgs) -> anyhow::Result<Self> {
        if let Some(path) = &args.dev {
            let text = std::fs::read(path)
                .with_context(|| format!("cannot read {}; does `sealgate dev` run?", path.display()))?;
            let dev: DevFile = serde_json::from_slice(&text)
                .with_context(|| format!("{} is not what `sealgate dev` writes", path.display()))?;
            let beside = path.parent().unwrap_or(Path::new("."));
            return Ok(Self {
                url: dev.url.parse().context("dev.json: url is no URL")?,
                // Relative paths count from where the file is, not from where we happen to be.
                ca: if dev.ca.exists() { dev.ca } else { beside.join(dev.ca) },
                folder: args.state.clone().unwrap_or_else(|| beside.join("im")),
            });
        }
        let (Some(url), Some(ca)) = (args.url.clone(), args.ca.clone()) else {
            bail!("say where the gateway is: --dev FILE, or --url and --ca");
        };
        let folder = args.state.clone().unwrap_or_else(|| PathBuf::from(".sealgate/im"));
        Ok(Self { url, ca, folder })
    }
}

struct Client {
    vault: Vault,
    gateway: Gateway,
}

impl Client {
    /// Uploads this device's keys, with a new fallback key and as many one-time keys as are missing.
    async fn register(&mut self) -> anyhow::Result<KeyCount> {
        self.refill(KeyCount { one_time_keys: 0, fallback_used: true }).await
    }

    async fn refill(&mut self, held: KeyCount) -> anyhow::Result<KeyCount> {
        let mut open = self.vault.lock().await?;
        let upload =
            open.device.fresh_keys(ONE_TIME_KEYS.saturating_sub(held.one_time_keys), held.fallback_used);
        // Before the upload: a key that others may use must not be lost.
        open.save()?;
        let path = format!("/v1/devices/{}/keys", open.device.address().device);
        let count = self.gateway.put(&path, &upload).await.context("the keys could not be uploaded")?;
        open.device.registered = true;
        open.save()?;
        Ok(count)
    }

    async fn send(&mut self, to: Name, text: String) -> anyhow::Result<()> {
        if text.len() > MAX_TEXT {
            bail!("a message has {MAX_TEXT} bytes at most; this one has {}", text.len());
        }
        let own = self.vault.address().clone();
        if to == own.user {
            bail!("a message goes to someone else");
        }
        if !self.vault.lock().await?.device.registered {
            self.register().await?;
        }
        let conversation = ConversationId::between(&own.user, &to).map_err(anyhow::Error::msg)?;
        let list: DeviceList = self.gateway.get(&format!("/v1/users/{to}/devices")).await?;
        if list.devices.is_empty() {
            bail!(
                "{to} has no device yet, so there is nobody to encrypt for; {to} must run `im … --user {to} listen` first"
            );
        }

        // Locked from the first encryption to the answer: a device reads our messages in the order we encrypted them.
        let mut open = self.vault.lock().await?;
        send_outbox(&mut self.gateway, &mut open).await?;
        let id = MessageId::now();
        let mut recipients = Vec::with_capacity(list.devices.len());
        for keys in &list.devices {
            let address = DeviceAddress { user: to.clone(), device: keys.device.clone() };
            open.device.trust(&address, &keys.identity)?;
            if !open.device.has_session(&address) {
                let path = format!("/v1/users/{}/devices/{}/claim", address.user, address.device);
                let claimed: ClaimedKey =
                    self.gateway.post_to(&path).await.context("no key to encrypt with")?;
                open.device.begin_session(&address, &claimed)?;
            }
            recipients.push(open.device.encrypt(&address, id, &conversation, &text)?);
        }
        // The step of the ratchet and what it produced are saved as one, before anything leaves.
        open.device.outbox.push(Envelope { id, conversation, recipients });
        open.save()?;
        send_outbox(&mut self.gateway, &mut open).await?;
        say(&format!(
            "sent to {to} ({} device{})",
            list.devices.len(),
            if list.devices.len() == 1 { "" } else { "s" }
        ))
    }

    async fn listen(&mut self, count: Option<u64>) -> anyhow::Result<()> {
        let mut left = count;
        let mut connected = false;
        while left != Some(0) {
            let ended = match self.connect().await {
                Ok(mut stream) => {
                    if !connected {
                        note(&format!("{} listens", self.vault.address()));
                    }
                    connected = true;
                    self.receive(&mut stream, &mut left).await
                }
                // What never worked will not mend itself; what worked before may have been restarted.
                Err(error) if !connected || error.is::<Refused>() => return Err(error),
                Err(error) => Err(error),
            };
            match ended {
                Ok(()) => {}
                Err(error) if error.is::<Refused>() => return Err(error),
                Err(error) => {
                    note(&format!("not connected ({error:#}); trying again"));
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
        Ok(())
    }

    async fn connect(&mut self) -> anyhow::Result<Stream> {
        self.gateway.log_in().await?;
        if !self.vault.lock().await?.device.registered {
            self.register().await?;
        }
        self.gateway.stream().await
    }

    /// Until the stream ends (an error) or enough messages came.
    async fn receive(&mut self, stream: &mut Stream, left: &mut Option<u64>) -> anyhow::Result<()> {
        loop {
            match stream.next().await? {
                ToDevice::Ready { keys, .. } => {
                    if keys.one_time_keys < ONE_TIME_KEYS / 2 || keys.fallback_used {
                        self.refill(keys).await?;
                    }
                }
                ToDevice::Message(delivery) => {
                    let seq = delivery.seq;
                    if self.read(delivery).await?
                        && let Some(left) = left.as_mut()
                    {
                        *left = left.saturating_sub(1);
                    }
                    stream.ack(seq).await?;
                    if *left == Some(0) {
                        return stream.close().await;
                    }
                }
                ToDevice::Accepted(_) | ToDevice::Refused { .. } => {}
            }
        }
    }

    /// Decrypts and prints a message. False if it was seen before, or cannot be read.
    async fn read(&mut self, delivery: Delivery) -> anyhow::Result<bool> {
        let mut open = self.vault.lock().await?;
        if delivery.seq <= open.device.seen {
            return Ok(false);
        }
        if !open.device.knows(&delivery.sender) {
            let path = format!("/v1/users/{}/devices", delivery.sender.user);
            let list: DeviceList = self.gateway.get(&path).await?;
            if let Some(keys) = list.devices.iter().find(|keys| keys.device == delivery.sender.device)
                && let Err(error) = open.device.trust(&delivery.sender, &keys.identity)
            {
                note(&error.to_string());
            }
        }
        let read = open.device.decrypt(&delivery);
        match &read {
            // Shown before it is marked as seen: a crash in between shows it twice rather than never.
            Ok(Incoming { text }) => say(&format!("{}: {}", delivery.sender.user, printable(text)))?,
            Err(error) => note(&format!("a message from {} cannot be read: {error}", delivery.sender)),
        }
        open.device.seen = delivery.seq;
        open.save()?;
        Ok(read.is_ok())
    }
}

/// Sends what is in the outbox, oldest first. What the backend refuses for good is dropped with an error; what did not
/// get through stays, and goes out before the next message. The backend ignores a repeated id.
async fn send_outbox(gateway: &mut Gateway, open: &mut vault::Open<'_>) -> anyhow::Result<()> {
    while let Some(envelope) = open.device.outbox.first() {
        let sent = gateway.post::<Accepted>("/v1/messages", envelope).await;
        match sent {
            Ok(_) => {
                open.device.outbox.remove(0);
                open.save()?;
            }
            Err(error) if error.is::<Refused>() => {
                open.device.outbox.remove(0);
                if error.downcast_ref::<Refused>().is_some_and(|refused| refused.is("unregistered")) {
                    // The backend lost its memory; the next command registers again.
                    open.device.registered = false;
                }
                open.save()?;
                return Err(error.context("the message was refused"));
            }
            Err(error) => return Err(error.context("the message waits, and goes out before the next one")),
        }
    }
    Ok(())
}

/// To stdout, at once: somebody may read it through a pipe.
fn say(line: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// To stderr, for the person who watches.
fn note(line: &str) {
    // If nobody can see it, nothing is lost.
    let _ = writeln!(io::stderr(), "{line}");
}

/// A peer's text, without what could move the cursor or fake a line.
fn printable(text: &str) -> String {
    let seen = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        // Controls, and the marks that reverse the direction of writing.
        c if c.is_control() => '\u{fffd}',
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c => c,
    };
    text.chars().map(seen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_cannot_play_with_the_terminal() {
        assert_eq!(printable("Grüße, 世界 🙂"), "Grüße, 世界 🙂");
        assert_eq!(printable("hi\nbob: fake\x1b[2J\u{202e}"), "hi bob: fake\u{fffd}[2J\u{fffd}");
    }
}
